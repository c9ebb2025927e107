"""The transfer certificate: correlation, predicted loss, margins, verdict."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bitwright.certificate import certify, layer_sensitivities, predicted_loss, rank_correlation, scores_of, verdict
from bitwright.costs import Budget, WeightBits
from bitwright.data import Data, TensorSplit
from bitwright.problem import Problem, SearchData, build_choices
from bitwright.proxy import replace_head
from bitwright.sites import trace
from bitwright.testing import Planted, planted


@pytest.fixture(scope="module")
def plant() -> Planted:
    return planted("linear", 0)


def test_a_problem_transfers_to_itself(plant: Planted) -> None:
    content = certify(plant.problem, plant.problem, plant.optimum)
    assert content["safe"]
    assert content["correlation"]["value"] == 1.0
    assert content["predicted"]["found"] <= content["predicted"]["uniform"]
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    for histogram in content["margins"].values():
        assert {sum(counts) for counts in histogram["counts"].values()} == {256}
        assert histogram["mean"]["float"] >= histogram["mean"]["found"] - 0.05


def test_the_cheapest_policy_is_not_safe(plant: Planted) -> None:
    content = certify(plant.problem, plant.problem, plant.problem.cheapest())
    assert not content["safe"]
    assert any("below the threshold 40%" in reason for reason in content["reasons"])


def test_a_proxy_of_zeros_is_not_safe(plant: Planted) -> None:
    shape = plant.problem.data.fit.batch(torch.arange(1))[0].shape[1:]
    blank = TensorSplit(torch.zeros(64, *shape), torch.arange(64) % 8)
    proxy = plant.problem.on(plant.problem.model, SearchData(blank, blank))
    content = certify(plant.problem, proxy, plant.optimum)
    assert not content["safe"]
    assert content["correlation"]["value"] < content["thresholds"]["correlation"]


def test_a_proxy_of_one_class_has_no_margins_and_is_not_safe() -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(32, 1, 4, 4), torch.arange(32) % 3
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    traced, split = trace(net, images[:1]), TensorSplit(images, labels, classes=3)
    problem = Problem(net, traced, build_choices(traced, (2, 4)), Budget(WeightBits(), 10**6, "weight_bits"), SearchData(split, split))
    one, network = TensorSplit(images, torch.zeros(32, dtype=torch.long), classes=1), copy.deepcopy(net)
    replace_head(network, traced.last, Data("one", one, one, one, 1, (1, 4, 4)))
    content = certify(problem, problem.on(network, SearchData(one, one)), problem.cheapest())
    assert not content["safe"]
    assert "the proxy has fewer than two classes, so no class margin can be kept" in content["reasons"]
    assert list(content["margins"]) == ["target"]
    assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_layers_are_ranked_as_planted(plant: Planted) -> None:
    layers = layer_sensitivities(plant.problem, scores_of(plant.problem))
    assert max(layers, key=layers.__getitem__) == plant.sensitive[0]
    assert min(layers, key=layers.__getitem__) == plant.sensitive[-1]


def test_predicted_loss_is_the_sum(plant: Planted) -> None:
    scores = scores_of(plant.problem)
    policy = plant.problem.cheapest()
    expected = sum(float(scores[name][plant.problem.choices[name].index(bits)]) for name, bits in policy.items())
    assert predicted_loss(plant.problem, scores, policy) == pytest.approx(expected)


def test_rank_correlation_of_a_reversed_order() -> None:
    ranks = {str(k): float(k) for k in range(8)}
    found = rank_correlation(ranks, {name: -value for name, value in ranks.items()})
    assert found["value"] == -1.0
    assert found["interval"][1] < 0


def test_too_few_or_equal_layers_have_no_correlation() -> None:
    assert rank_correlation({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0})["value"] == 0.0
    assert rank_correlation(dict.fromkeys("abc", 1.0), {"a": 1.0, "b": 2.0, "c": 3.0})["value"] == 0.0


@pytest.mark.parametrize(("correlation", "found", "safe"), [(0.7, 1.0, True), (0.6999, 1.0, False), (0.9, 3.0, True), (0.9, 3.0001, False)])
def test_the_verdicts_boundaries(correlation: float, found: float, safe: bool) -> None:
    answer, reasons = verdict(correlation, {"found": found, "uniform": 5.0, "best": 0.0})
    assert answer is safe
    assert len(reasons) == 2


def test_where_mixing_gains_nothing_only_the_ranks_decide() -> None:
    assert verdict(0.8, {"found": 1.0, "uniform": 1.0, "best": 1.0})[0]
    assert not verdict(0.8, {"found": 1.1, "uniform": 1.0, "best": 1.0})[0]


def test_the_best_policy_is_the_exact_allocation(plant: Planted) -> None:
    content = certify(plant.problem, plant.problem, plant.optimum)
    assert content["predicted"]["best"] <= min(content["predicted"]["found"], content["predicted"]["uniform"])


def test_nothing_to_gain_is_said(plant: Planted) -> None:
    _, reasons = verdict(0.9, {"found": 1.2, "uniform": 1.0, "best": 1.0}, rival="the cheapest policy (no uniform one fits)")
    assert "mixing has nothing to gain over the cheapest policy (no uniform one fits), and the policy is worse than it" in reasons[1]
    assert "keeps" not in reasons[1]


def test_few_sites_leave_the_correlation_unknown() -> None:
    safe, reasons = verdict(0.9, {"found": 1.2, "uniform": 2.0, "best": 1.0}, few_sites=4)
    assert not safe
    assert "it is not known: 4 free sites are too few" in reasons[0]


def test_a_certificate_of_few_sites_is_not_safe_unless_the_interval_is_sure(plant: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    for low, sites, safe in ((0.69, 5, False), (0.7, 5, True), (1.0, 4, False), (0.5, 8, True)):
        found = {"value": 0.9, "interval": [low, 1.0], "n": sites}
        monkeypatch.setattr("bitwright.certificate.rank_correlation", lambda a, b, *, seed=0, found=found: found)
        assert certify(plant.problem, plant.problem, plant.optimum)["safe"] is safe


def test_committed_verdicts_stand() -> None:
    """Of ResNet-20's 18 or more free sites."""
    with (Path(__file__).parents[1] / "results" / "transfer.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["safe"]]
    assert rows
    for row in rows:
        predicted = {name: float(row[f"predicted_{name}"]) for name in ("found", "uniform", "best")}
        assert verdict(float(row["correlation"]), predicted)[0] == (row["safe"] == "True"), row["arm"]


def test_a_number_just_below_its_threshold_is_said_to_be_below() -> None:
    safe, reasons = verdict(0.6999, {"found": 1.6001, "uniform": 2.0, "best": 1.0})
    assert not safe
    assert "rank correlation just below 0.70, below the threshold 0.7" in reasons[0]
    assert "keeps just below 40% of what mixing can gain over uniform" in reasons[1]
    assert "below the threshold 40%" in reasons[1]
