from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import bitwright
from bitwright import runs
from bitwright.adaptive import files, stages
from bitwright.cli import main
from bitwright.errors import BitwrightError, BudgetError, RecipeError, RunError
from bitwright.job import Job
from bitwright.pipeline import evaluate_under, run, run_stages
from bitwright.recipe import bundled_recipes, load_recipe
from bitwright.report import render

sys.path.insert(0, str(Path(__file__).parents[1]))
from pages import checked

SHORT = [
    "float.max_steps=40",
    "finetune.max_steps=24",
    "finetune.checkpoint_seconds=0",
    "adaptive.calibration=64",
    "export.options={images: 200, epochs: 5}",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the digits recipe, shortened, once."""
    path = tmp_path_factory.mktemp("adaptive") / "run"
    before, stages.PROBE = stages.PROBE, 60
    try:
        run("digits-dqmq", path, overrides=SHORT)
    finally:
        stages.PROBE = before
    return path


def test_a_run_has_all_its_files(finished: Path) -> None:
    names = ("actor.safetensors", "model.safetensors", "bank.json", "adaptive.json", "promise.json", "evaluation.json", "report.html")
    assert all((finished / name).is_file() for name in (*names, "export/bank.json", "export/bank.safetensors", "adaptive.jsonl"))
    assert list(runs.Run.load(finished).manifest["stages"]) == ["float", "adaptive", "evaluate", "export", "report"]


def test_what_was_evaluated_is_told_by_quality(finished: Path) -> None:
    record = json.loads((finished / "adaptive.json").read_text())
    assert set(record["conditions"]) == {"clean", "mixed", "held_out", "clean, fewer images"}
    assert set(record["corruptions"]) == {"gaussian_noise", "gaussian_blur", "contrast", "shot_noise"}
    assert record["corruptions"]["shot_noise"]["held_out"]
    for one in record["corruptions"].values():
        assert list(one["severities"]) == list("012345")
        assert -1 <= one["spearman"]["low"] <= one["spearman"]["value"] <= one["spearman"]["high"] <= 1
    assert set(record["mixed"]["by_severity"]) == {"0", "1", "3", "5"}
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert evaluation["quantized"]["top1"] == pytest.approx(record["conditions"]["mixed"]["top1"])
    assert evaluation["quantized"]["bitops"] == pytest.approx(record["conditions"]["mixed"]["bitops"])
    promise = record["promise"]
    assert promise["met"] == (promise["mean"] <= 1)
    assert promise["actor"]["share_of_macs"] <= 0.015


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("finetune.stop_at=gaussian_noise:3>=0.8", r"knows no stop_at; leave finetune\.stop_at out"),
        ("finetune.mixup=0.2", r"knows no mixup; leave finetune\.mixup out"),
        ("finetune.low_bit_decay=true", r"low_bit_decay goes by a layer's one width"),
        ("adaptive.interpolate=0.5", r"interpolate mixes outputs with relaxation=gaussian and estimator=pathwise, not with"),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_is_trained(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("digits-dqmq", [change])


def test_the_report_stands_alone(finished: Path) -> None:
    page = checked(render(finished))
    for text in (
        "Input-adaptive bit-widths",
        "Rank correlation of bits with severity",
        "A stream whose quality changes",
        "Bank of static members",
    ):
        assert text in page.text
    assert "speed (measured)" in page.text
    assert "BitOps (modelled)" in page.text
    assert page.references == []


def test_a_degenerate_actor_is_in_the_report(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    record = json.loads((copy / "adaptive.json").read_text())
    record["promise"]["alarms"] = ["degenerate actor: 100.0 % of its decisions are the same for every sample"]
    record["mixed"]["permuted"] |= {"gain": 0.0, "gain_interval": [-0.01, 0.01]}
    (copy / "adaptive.json").write_text(json.dumps(record))
    text = checked(render(copy)).text
    assert "Degenerate actor: 100.0 % of its decisions are the same" in text
    assert "bits do not follow the input" in text


def test_the_exported_bank_is_a_session(finished: Path) -> None:
    session, own = bitwright.load(finished / "export"), bitwright.load(finished)
    with torch.no_grad():
        assert session(pixels := torch.rand(5, 1, 8, 8)).shape == (5, 10)
        assert torch.equal(own(pixels), session(pixels))


def test_an_actor_of_another_network_is_refused(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    tree = runs.load_tree(copy / "actor.safetensors")
    tree["identity"]["choices"] = [[2, 2], [3, 3], [4, 4]]
    runs.save_tree(copy / "actor.safetensors", tree)
    with pytest.raises(RunError, match=r"does not match the network; they differ in actor\.choices .*train again"):
        files.restored(Job.load(copy))
    runs.save_tree(copy / "actor.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(RunError, match="it holds no actor"):
        files.restored(Job.load(copy))


def test_the_verbs_work_on_an_adaptive_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    monkeypatch.setattr(stages, "PROBE", 30)
    assert main(["report", str(copy)]) == 0
    assert main(["evaluate", str(copy), "--conditions", "clean,contrast:5", "--device", "cpu"]) == 0
    assert "contrast:5" in capsys.readouterr().out
    assert main(["finetune", str(copy)]) == 2
    assert "an adaptive run has no stage 'finetune'" in capsys.readouterr().err
    assert main(["export", str(copy), "--to", "packed"]) == 2
    assert "exported as a bank" in capsys.readouterr().err


def test_a_killed_run_goes_on_to_the_same_bits(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    copy = tmp_path / "run"
    recipe = load_recipe("digits-dqmq", SHORT)

    def kill(stage: str, row: Mapping[str, Any]) -> None:
        if stage == "adaptive" and row.get("epoch") == 1:
            raise Killed

    with pytest.raises(Killed):
        run_stages(Job.open(recipe, copy, log=kill), ["adaptive"])
    run_stages(Job.open(recipe, copy), ["adaptive"])
    for name in ("model.safetensors", "actor.safetensors"):
        one, other = (runs.flatten(runs.load_tree(path / name)) for path in (copy, finished))
        assert one[0] == other[0]
        assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    ours, theirs = (runs.read_jsonl(path / "adaptive.jsonl") for path in (copy, finished))
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (["adaptive.tau=3"], RecipeError, "unknown key 'adaptive.tau'"),
        (["search.method=hawq"], RecipeError, "search.method looks for one static policy"),
        (["teacher=float"], RecipeError, "section 'teacher' belongs to static policies"),
        (["finetune=null"], RecipeError, "trains its weights by the section 'finetune'"),
        (["export.to=packed", "export.options={}"], RecipeError, "give export.to=bank"),
        (["export.options={k: 3}"], RecipeError, "unknown key 'export.options.k'"),
        (["quantize.narrow=true"], RecipeError, "quantize.narrow has no meaning"),
        (["search.weights=[1, 2]"], RecipeError, "2 weight widths and 3 activation widths cannot be paired"),
        (["adaptive.actor=agent"], BitwrightError, "agent"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(change: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_recipe("digits-dqmq", change)


def test_budgets_are_checked_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="keeps one budget of bit operations"):
        run("digits-dqmq", tmp_path / "a", overrides=["search.budgets=weight_bits<=2"])
    with pytest.raises(BudgetError, match=r"these widths reach .* and the actor; give narrower widths"):
        run("digits-dqmq", tmp_path / "b", overrides=["search.budgets=bitops<=1K"])


def test_bundled_recipes_load() -> None:
    found = [name for name in bundled_recipes() if name.endswith(("dqmq", "dqmq-quick"))]
    assert {"digits-dqmq", "cifar10-resnet20-dqmq", "cifar10-resnet20-dqmq-quick", "fashion-resnet8-dqmq"} <= set(found)
    for name in found:
        recipe = load_recipe(name)
        assert load_recipe(recipe.to_dict()) == recipe


def test_an_actor_that_is_told_the_severity_is_judged_on_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "PROBE", 30)
    job = Job.open(load_recipe("digits-dqmq", [*SHORT, "adaptive.actor=severity", "export=null"]), tmp_path / "run")
    run_stages(job)
    record = json.loads((tmp_path / "run" / "adaptive.json").read_text())
    bits = {level: row["bits"] for level, row in record["corruptions"]["contrast"]["severities"].items()}
    assert bits["2"] == bits["1"]  # nobody trained on 2 and 4: the nearest milder one that somebody did
    assert bits["4"] == bits["3"]
    with pytest.raises(RecipeError, match="an actor of true severities is told them by its data set alone"):
        evaluate_under(job, ["clean"])


@pytest.mark.parametrize("changed", ["limit", "network"])
def test_an_actor_of_other_weights_or_another_budget_is_refused(finished: Path, tmp_path: Path, changed: str) -> None:
    tree = runs.load_tree(finished / "actor.safetensors")
    tree["identity"][changed] = 7 if changed == "limit" else "0" * 64
    copy = shutil.copytree(finished, tmp_path / "copy")
    runs.save_tree(copy / "actor.safetensors", tree)
    with pytest.raises(RunError, match=f"does not match the network; they differ in actor.{changed}"):
        files.restored(Job.open(load_recipe(copy / "recipe.yaml"), copy))
    runs.save_tree(copy / "actor.safetensors", {"identity": tree["identity"]})
    with pytest.raises(RunError, match="it holds no actor"):
        files.restored(Job.open(load_recipe(copy / "recipe.yaml"), copy))


def test_the_actor_is_part_of_what_a_budget_must_reach(tmp_path: Path) -> None:
    job = Job.open(load_recipe("digits-dqmq", ["search.budgets=[bitops<=1.1M]"]), tmp_path / "run")
    files.space_of(job)  # the narrowest widths alone would fit
    with pytest.raises(BudgetError, match=r"the narrowest widths take .* and the actor .*; give narrower widths"):
        run_stages(job)
    assert not (tmp_path / "run" / "float.safetensors").exists()
