from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bitwright
from bitwright import cli
from bitwright.adaptive.bank import BankOptions, Router, _settle, build_bank, choose_members, criterion, save_bank, session_of, try_bank
from bitwright.adaptive.network import AdaptiveNet, Space, adapt
from bitwright.adaptive.session import _checksum
from bitwright.data import Mix, MixedSplit, TensorSplit
from bitwright.errors import DataError, ExportError, RecipeError
from bitwright.exporters import verify
from bitwright.models import build
from bitwright.policy import Bits
from bitwright.report.adaptive import _bank_alarms
from bitwright.sites import trace

CHOICES = [Bits(1, 1), Bits(2, 2), Bits(4, 4)]


@pytest.fixture(scope="module")
def case() -> tuple[AdaptiveNet, MixedSplit]:
    """Return an untrained adaptive network whose decisions differ, and images of mixed quality."""
    torch.manual_seed(0)
    model = build("digits_cnn").eval()
    base = TensorSplit(torch.rand(300, 1, 8, 8), torch.randint(0, 10, (300,)), classes=10, mean=(0.3,), std=(0.4,))
    data = MixedSplit(base, Mix({"gaussian_blur": 1.0, "contrast": 1.0}, {5: 1.0}, clean=0.4), 0)
    x = data.batch(torch.arange(128))[0]
    found = trace(model, x[:1])
    choices = {name: [Bits(8, 8)] if name in ("conv1", "fc") else CHOICES for name in found.names}
    net = adapt(model, Space.of(found, choices, sum(site.macs for site in found.sites) * 10), x)
    for head in net.actor.heads:
        nn.init.normal_(head.weight, std=4.0)
    return net.eval(), data


@pytest.fixture(scope="module")
def saved(case: tuple[AdaptiveNet, MixedSplit], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    net, data = case
    bank = build_bank(net, data, BankOptions(most=4, explained=0.6, epochs=40))
    folder = tmp_path_factory.mktemp("bank")
    save_bank(bank, folder, data.batch(torch.arange(8))[0], reference=("digits_cnn", {}))
    return bank, folder


def test_members_explain_what_they_promise() -> None:
    torch.manual_seed(0)
    terms = torch.tensor([[1.0, 4.0, 16.0]] * 6, dtype=torch.float64)
    centres = torch.tensor([[0] * 6, [2] * 6, [0, 0, 0, 2, 2, 2]])
    index = centres[torch.randint(0, 3, (200,))].T
    count, found, told = choose_members(index, terms, BankOptions(explained=0.99))
    assert count == 3
    assert {tuple(row) for row in found.tolist()} == {tuple(row) for row in centres.tolist()}
    assert told == sorted(told)
    assert choose_members(index, terms, BankOptions(most=2, explained=0.99))[0] == 2


def test_a_bank_says_where_it_falls_short() -> None:
    assert criterion(BankOptions(explained=0.9), 0.95, 50).endswith("of 50 images' decisions")
    assert criterion(BankOptions(explained=0.9, most=3), -0.1, 50).endswith("3 at most: these explain 0%")
    artefact: dict[str, Any] = {"to": "bank", "bank": {"gain": -0.02, "gain_interval": [-0.03, -0.01]}}
    (alarm,) = _bank_alarms(artefact)
    assert "-2.00 points" in alarm
    assert "export.options.explained" in alarm
    artefact["bank"]["gain_interval"] = [-0.05, 0.0]
    assert _bank_alarms(artefact) == []
    assert _bank_alarms({"to": "onnx"}) == []


def test_a_bank_without_its_checksum_is_refused(saved: tuple[Any, Path], tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    shutil.copytree(saved[1], folder)
    record = json.loads((folder / "bank.json").read_text())
    del record["sha256"]
    record["mean"] = [0.9]
    (folder / "bank.json").write_text(json.dumps(record))
    with pytest.raises(ExportError, match="its checksum does not match"):
        bitwright.load(folder)


def test_a_session_runs_the_right_member(saved: tuple[Any, Path], case: tuple[AdaptiveNet, MixedSplit]) -> None:
    (bank, folder), (net, data) = saved, case
    pixels = data.base.pixels(torch.arange(60))[0]
    session = bitwright.load(folder)
    logits = session(pixels)
    x = (pixels - 0.3) / 0.4
    chosen = session.router.route(x)
    with torch.no_grad():
        wanted = torch.stack([net(x[n : n + 1], forced=bank.index[k][:, None])[0] for n, k in enumerate(chosen)])
    assert torch.allclose(logits, wanted, atol=1e-4)
    assert torch.equal(session_of(bank).run(x)[0], session.run(x)[0])
    assert bitwright.load(folder / "bank.json").policies == session.policies


def test_costs_are_those_of_the_policies(saved: tuple[Any, Path]) -> None:
    bank, folder = saved
    record = json.loads((folder / "bank.json").read_text())
    for policy, cost in zip(bank.members, record["bitops"], strict=True):
        own = sum(site.macs * policy[site.name].w * policy[site.name].a for site in bank.net.space.sites)
        assert cost == pytest.approx(own + 64 * bank.router.macs, rel=1e-6)
    assert record["bitops"] == sorted(record["bitops"])
    assert record["explained"][-1] >= 0.6 or len(record["policies"]) == 4


def test_what_was_tried_is_measured_or_modelled(saved: tuple[Any, Path], case: tuple[AdaptiveNet, MixedSplit]) -> None:
    bank, _ = saved
    facts = try_bank(bank, case[0], case[1])
    assert set(facts["measured"]["images_per_second"]) == {"session", "widest"}
    assert 0 < facts["modelled_bitops_ratio"] <= 1
    assert sum(facts["member_use"]) == pytest.approx(1)
    assert facts["bank"]["share"] <= max(1.0, facts["adaptive"]["share"]) + 1e-6


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.rand(2, 1, 8, 8) * 255, "pixels run from .* give them in 0 … 1, not normalised"),
        (torch.rand(2, 1, 8, 8) - 0.5, "pixels run from -0"),
        (torch.full((2, 1, 8, 8), float("nan")), "image 0 of 2 has values that are not finite"),
        (torch.rand(2, 3, 8, 8), r"give a tensor of torch.float32 and shape \(N, 1, 8, 8\), N at least 1"),
        (torch.rand(2, 1, 8, 8).double(), r"session: got torch.float64 of shape \(2, 1, 8, 8\); give a tensor of torch.float32"),
        (torch.rand(0, 1, 8, 8), r"session: got torch.float32 of shape \(0, 1, 8, 8\); give .* N at least 1"),
        (torch.rand(2, 1, 8, 8).numpy(), "session: got a ndarray; give a tensor of torch.float32"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "got torch.uint8"),
    ],
)
def test_bad_images_are_named(saved: tuple[Any, Path], pixels: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        bitwright.load(saved[1])(pixels)


def test_a_router_spends_what_the_network_spends(case: tuple[AdaptiveNet, MixedSplit]) -> None:
    images, shares = case[1].take(200), torch.tensor([0.5, 0.8, 1.2])
    torch.manual_seed(0)
    router = Router((1, 8, 8), 3, 8)
    for target in (0.6, 0.8, 1.0):
        _settle(router, images, shares, target)
        chosen = router.route(images.batch(torch.arange(200))[0])
        assert target - 0.03 < float(shares[chosen].mean()) <= target


def test_bad_files_are_named(saved: tuple[Any, Path], tmp_path: Path) -> None:
    for name in ("bank.json", "bank.safetensors"):
        folder = tmp_path / name
        shutil.copytree(saved[1], folder)
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
        with pytest.raises(ExportError, match="export the bank again"):
            bitwright.load(folder)
    with pytest.raises(ExportError, match=r"export the bank again|pass its own model="):
        bitwright.load(saved[1], build("resnet8"))
    record = json.loads((saved[1] / "bank.json").read_text())
    folder = tmp_path / "unnamed"
    shutil.copytree(saved[1], folder)
    (folder / "bank.json").write_text(json.dumps({**record, "model": None}))
    with pytest.raises(ExportError, match="pass the float architecture"):
        bitwright.load(folder)
    (folder / "bank.json").write_text(json.dumps({**record, "format": "x"}))
    with pytest.raises(ExportError, match="has format 'x'"):
        bitwright.load(folder)


def test_a_bank_is_verified_from_the_outside(saved: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank, folder = saved
    for path in (folder, folder / "bank.json", folder / "bank.safetensors"):
        found = verify(path)
        assert found.answer == 0.0
        assert found.samples > 0
    layers = sum(len(site.layers) for site in bank.net.space.sites)
    assert len(found.tensors) == len(bank.members) * layers
    for row in found.tensors:
        number, _, name = row.name.removeprefix("member ").partition(": ")
        assert row.bits == bank.members[int(number)][name].w
        assert row.levels is not None
        assert 1 < row.levels <= 2**row.bits
    assert cli.main(["verify", str(folder)]) == 0
    assert f"keeps its policy of {len(bank.members) * layers} sites; run on 2 samples" in capsys.readouterr().out


def test_a_bank_that_was_tampered_with_is_refused(saved: tuple[Any, Path], tmp_path: Path) -> None:
    record = json.loads((saved[1] / "bank.json").read_text())

    def changed(name: str, sign: bool = True, **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(saved[1], folder)
        new = {**record, **changes}
        if sign:
            new["sha256"] = _checksum(new, folder)
        (folder / "bank.json").write_text(json.dumps(new))
        return folder

    assert verify(changed("signed")).answer == 0.0
    other = [{site: [8, 8] if site in ("conv1", "fc") else [1, 1] for site in policy} for policy in record["policies"]]
    with pytest.raises(ExportError, match="checksum does not match"):
        verify(changed("plain", sign=False, policies=other))
    with pytest.raises(ExportError, match="checksum does not match"):
        bitwright.load(tmp_path / "plain")
    with pytest.raises(ExportError, match=r"its output on the sample differs by .* % of the largest"):
        verify(changed("other", policies=other))
    with pytest.raises(ExportError, match="its router sends the sample to members"):
        verify(changed("routed", routed=[9, 9]))
    with pytest.raises(ExportError, match="no answer in it of its own shape"):
        verify(changed("blank", answers=[" "] * len(record["policies"])))
    older = {name: value for name, value in record.items() if name not in ("sha256", "answers", "routed")}
    folder = changed("older")
    (folder / "bank.json").write_text(json.dumps({**older, "sha256": _checksum(older, folder)}))
    assert verify(folder).answer is None
    (folder / "bank.safetensors").unlink()
    with pytest.raises(ExportError, match=r"bank\.safetensors"):
        verify(folder)


def test_a_run_has_its_bank_in_its_export(saved: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(saved[1], tmp_path / "export")
    shutil.copy(saved[1] / "bank.json", tmp_path)
    for path in (tmp_path, tmp_path / "bank.json", tmp_path / "export"):
        assert bitwright.load(path).policies == bitwright.load(saved[1]).policies
        assert verify(path).answer == 0.0
    assert cli.main(["verify", str(tmp_path)]) == 0
    capsys.readouterr()
    (tmp_path / "export" / "bank.safetensors").unlink()
    for path in (tmp_path, tmp_path / "bank.json"):
        for read in (bitwright.load, verify):
            with pytest.raises(ExportError, match=r"bank\.json: bank\.safetensors is not beside it; copy it there, or give the folder"):
                read(path)


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(RecipeError, match="explained in"):
        BankOptions(explained=0.0)
