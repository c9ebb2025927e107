"""Tables of sensitivities: kept exactly, solved for any budget in no time and without the network, refused when stale."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from dataclasses import dataclass

import pytest
import scipy.optimize  # noqa: F401  (its import is not what is timed)
import torch
from safetensors.torch import save_file

from bitwright import cli, runs
from bitwright.costs import BitOps, Budget, WeightBits
from bitwright.data import TensorSplit
from bitwright.driver import search
from bitwright.errors import RunError
from bitwright.methods.fisher import Fisher
from bitwright.methods.kl import KL
from bitwright.methods.limpq import LIMPQ
from bitwright.models import build
from bitwright.policy import Bits
from bitwright.problem import Problem, SearchData, build_choices
from bitwright.sensitivity import FILE, ScoredMethod, Sensitivity
from bitwright.sites import trace
from bitwright.testing import planted


@dataclass(frozen=True)
class Given(ScoredMethod):
    """Scores that need no network: 4 to the minus width, times the place of the site.

    Attributes:
        scale: of all scores.
    """

    scale: float = 1.0

    def scores(self, problem: Problem) -> dict[str, torch.Tensor]:
        return {
            name: torch.tensor([self.scale * (k + 1) * (4.0**-b.w + 4.0**-b.a) for b in allowed], dtype=torch.float64)
            for k, (name, allowed) in enumerate(problem.choices.items())
        }


def on(problem, **changes):
    """Return the same problem with some parts changed."""
    parts = {"model": problem.model, "trace": problem.trace, "choices": problem.choices, "budgets": problem.budgets, "data": problem.data}
    return Problem(**parts | changes, seed=problem.seed, evaluate=problem.loss)


@pytest.fixture(scope="module")
def resnet20():
    """A ResNet-20 with 64 choices a site."""
    torch.manual_seed(0)
    net = build("cifar_resnet20").eval()
    images = torch.randn(32, 3, 32, 32)
    split = TensorSplit(images, torch.arange(32) % 10, classes=10)
    traced = trace(net, images[:1])
    choices = build_choices(traced, range(1, 9), range(1, 9))

    def loss(policy):
        raise AssertionError("solving asks for no loss")

    return Problem(net, traced, choices, Budget(BitOps(), 10**12, ""), SearchData(split, split), evaluate=loss)


def test_any_budget_is_solved_at_once_and_without_the_network(resnet20, tmp_path, monkeypatch):
    Sensitivity.of(resnet20, Given(), Given().scores(resnet20)).save(tmp_path / "t.json")
    table = Sensitivity.load(tmp_path / "t.json")
    monkeypatch.setattr(resnet20.model, "forward", None)  # whoever calls it fails
    found = []
    for width in (2, 3, 4):
        bits = dict.fromkeys(resnet20.trace.names, Bits(width, width)) | resnet20.pins
        budgets = [Budget(cost, cost.total(resnet20.sites, bits), "") for cost in (BitOps(), WeightBits())]
        problem = on(resnet20, budgets=budgets)
        started = time.process_time()  # the processor's time: other work on the machine does not count
        policy = table.solve(problem)
        assert time.process_time() - started < 1.0
        assert problem.sample_passes == problem.evaluations == 0
        assert problem.feasible(policy)
        assert table.predict(policy) < table.predict(bits)
        found.append(table.predict(policy))
    assert found[0] > found[1] > found[2]


def test_a_table_comes_back_from_its_file_exactly(tmp_path):
    problem = planted("joint", seed=0).problem
    table = Fisher(samples=16).sensitivity(problem)
    table.save(tmp_path / "t.json")
    again = Sensitivity.load(tmp_path / "t.json")
    assert again == table
    assert all(torch.equal(again.scores(problem)[name], score) for name, score in Fisher(samples=16).scores(problem).items())
    assert json.loads((tmp_path / "t.json").read_text())["values"]["branches.0"].keys() >= {"W2A4", "W8A8"}


def test_a_search_leaves_its_table_and_another_uses_it_without_a_pass(tmp_path):
    problem = planted("linear", seed=0).problem
    first = search(problem, Fisher(samples=32), out=tmp_path / "one")
    table = Sensitivity.load(tmp_path / "one" / FILE)
    assert table.measure == "fisher"
    assert table.solve(problem) == first.policy
    second = search(on(problem), Fisher(samples=32, table=str(tmp_path / "one" / FILE)), out=tmp_path / "two")
    assert second.policy == first.policy
    assert first.sample_passes > 0
    assert second.sample_passes == 0
    assert Sensitivity.load(tmp_path / "two" / FILE).values == table.values
    low = problem.costs(problem.cheapest())[0]
    tighter = on(problem, budgets=[Budget(WeightBits(), (low + problem.limits[0]) // 2, "")])
    assert tighter.feasible(search(tighter, Fisher(samples=32, table=str(tmp_path / "one" / FILE))).policy)


def test_limpq_takes_a_table_and_trains_nothing(tmp_path):
    problem = planted("linear", seed=0).problem
    method = LIMPQ(max_steps=1, batch_size=16)
    method.sensitivity(problem).save(tmp_path / "t.json")
    before = problem.sample_passes
    result = search(on(problem), dataclasses.replace(method, table=str(tmp_path / "t.json")))
    assert result.steps == 1
    assert result.sample_passes == 0
    assert before > 0


class TestStale:
    """What differs is named."""

    @pytest.fixture(scope="class")
    def problem(self):
        return planted("joint", seed=0).problem

    @pytest.fixture(scope="class")
    def table(self, problem):
        return Given().sensitivity(problem)

    def refused(self, table, problem, match, method=None):
        with pytest.raises(RunError, match=match) as found:
            table.check(problem, method)
        assert "measure it anew with `bitwright profile TARGET --sensitivity --measure" in str(found.value)
        assert "\n" not in str(found.value)

    def test_the_same_problem_and_other_budgets_are_fine(self, table, problem):
        table.check(problem, Given())
        table.check(on(problem, budgets=[Budget(WeightBits(), 10**6, "")]), Given())

    def test_a_changed_weight(self, table, problem):
        model = copy.deepcopy(problem.model)
        with torch.no_grad():
            model.branches[0].weight[0, 0] += 1e-6
        self.refused(table, on(problem, model=model), r"stale, measured on another network: model \(was ")
        with pytest.raises(RunError, match="another network"):
            table.solve(on(problem, model=model))

    def test_other_data(self, table, problem):
        fit, selection = problem.data.fit, problem.data.selection
        shorter = SearchData(fit, selection.take(200))
        self.refused(table, on(problem, data=shorter), r"stale, measured on other data: data\.selection\.images \(was 256, now 200\)")
        other = SearchData(TensorSplit(fit.images + 1e-3, fit.labels, classes=fit.classes, _rows=fit._rows), selection)
        self.refused(table, on(problem, data=other), r"stale, measured on other data: data\.fit\.sample")
        labels = SearchData(TensorSplit(fit.images, (fit.labels + 1) % 8, classes=fit.classes, _rows=fit._rows), selection)
        self.refused(table, on(problem, data=labels), r"data\.fit\.sample")

    def test_other_training_views(self, table, problem):
        fit = problem.data.fit
        augmented = TensorSplit(fit.images, fit.labels, classes=fit.classes, augment="crop", _rows=fit._rows)
        self.refused(table, on(problem, data=SearchData(augmented, problem.data.selection)), r"data\.fit\.sample")

    def test_another_quantizer(self, table, problem):
        quantizer = {**table.fingerprint["quantizer"], "rule": "minmax"}
        other = dataclasses.replace(table, fingerprint={**table.fingerprint, "quantizer": quantizer})
        self.refused(other, problem, r'another quantizer: quantizer\.rule \(was "minmax", now "mse"\)', Given())

    def test_other_options_and_another_measure(self, table, problem):
        self.refused(table, problem, r"other options: options\.scale \(was 1\.0, now 2\.0\)", Given(scale=2.0))
        self.refused(table, problem, "holds 'test_sensitivity', and 'kl' was asked for", KL())

    def test_other_sites(self, table, problem):
        layers = {**table.fingerprint["sites"], "branches.1": ["branches.1", "branches.9"]}
        other = dataclasses.replace(table, fingerprint={**table.fingerprint, "sites": layers})
        self.refused(other, problem, r"measured on other sites: site branches\.1 ")

    def test_choices_that_were_not_measured(self, table, problem):
        wider = {**problem.choices, "branches.2": (Bits(3, 4), Bits(8, 8))}
        with pytest.raises(RunError, match=r"other choices: site 'branches\.2' has W2A4, W2A8, .* and not W3A4; measure it anew"):
            table.solve(on(problem, choices=wider))

    def test_fewer_choices_are_fine_unless_they_were_measured_together(self, problem):
        fewer = on(problem, choices={**problem.choices, "branches.2": (Bits(2, 4), Bits(8, 8))})
        table = Given().sensitivity(problem)
        table.check(fewer, Given())
        assert table.scores(fewer)["branches.2"].tolist() == [table.values["branches.2"][bits] for bits in (Bits(2, 4), Bits(8, 8))]
        method = LIMPQ(max_steps=1, batch_size=16)
        joint = method.sensitivity(problem)
        joint.check(problem, method)
        self.refused(joint, fewer, r"stale, measured on other choices: choices\.branches\.2", method)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no table of sensitivities"),
        ('{"format": "bitwright-policy-1"}', r"format 'bitwright-policy-1', expected 'bitwright-sensitivity-2'"),
        ('{"format": "bitwright-sensitivity-2"}', "KeyError: 'values'"),
        (
            '{"format": "bitwright-sensitivity-2", "measure": "kl", "fingerprint": {}, "values": {"a": {"4": 1}}}',
            "'4' is no choice such as W4A8",
        ),
        (
            '{"format": "bitwright-sensitivity-1", "measure": "kl", "fingerprint": {}, "values": {"a": {"W4A8": 1}}}',
            r"written by an earlier version, .*; measure it anew with `bitwright profile TARGET --sensitivity --measure kl",
        ),
        ("[]", "no table of sensitivities"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text, message):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(RunError, match=message):
        Sensitivity.load(tmp_path / "t.json")
    with pytest.raises(RunError, match=r"none.json: cannot be read \(No such file or directory\)"):
        Sensitivity.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W2A4": -5.0}, r"t\.json: changed by hand since it was measured .*; measure it anew with `bitwright profile .* --measure fisher"),
        ({"W2A4": math.nan}, r"t\.json: the value of site 'branches\.0' at W2A4 is nan, not a finite number; measure it anew"),
        ({"W2A4": math.inf}, r"site 'branches\.0' at W2A4 is inf"),
    ],
)
def test_a_table_that_was_changed_by_hand_is_refused(tmp_path, change, message):
    problem, file = planted("joint", seed=0).problem, tmp_path / "t.json"
    Fisher(samples=16).sensitivity(problem).save(file)
    content = json.loads(file.read_text())
    content["values"]["branches.0"] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(RunError, match=message):
        search(problem, Fisher(samples=16, table=str(file)))


def test_another_quantizer_of_the_recipe_is_said(finished_run, tmp_path, capsys):
    """Tables are of the reference quantizer, like the loss of a policy; a recipe may quantize otherwise."""
    state = {name: tensor.contiguous() for name, tensor in runs.load_tree(finished_run / "float.safetensors").items()}
    save_file(state, tmp_path / "net.safetensors")
    network = ["--model", "digits_cnn", "--weights", str(tmp_path / "net.safetensors"), "--data", "digits", "--held-out", "100"]
    asked = ["search", *network, "--activation-bits", "4", "--budget", "weight_bits<=4", "--samples", "16", "--method", "fisher"]
    assert cli.main([*asked, "--out", str(tmp_path / "plain")]) == 0
    assert "reference quantizer" not in capsys.readouterr().out
    table = ["--table", str(tmp_path / "plain" / FILE)]
    for name, options in (("other", table), ("anew", [])):
        other = ["--set", "quantize.quantizer=dorefa", "--set", "quantize.per_channel=false"]
        assert cli.main([*asked, *options, *other, "--out", str(tmp_path / name)]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert (
            "! Sensitivities are measured with the reference quantizer, and the recipe quantizes with quantizer=dorefa, per_channel="
            in said
        )
        assert (
            "per_channel=False: the order of choices may be another there"
            in json.loads((tmp_path / name / "search.json").read_text())["alarm"]
        )
    assert cli.main(["profile", str(tmp_path / "other"), "--measure", "fisher", "--sensitivity"]) == 0
    assert "the recipe quantizes with quantizer=dorefa" in " ".join(capsys.readouterr().out.split())
