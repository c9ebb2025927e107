"""Latency tables: fitted on whole networks, kept with what they hold for, and spent as a budget."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from bitwright import methods
from bitwright.allocation import repair
from bitwright.costs import parse_budget
from bitwright.driver import search
from bitwright.errors import BudgetError, TargetError
from bitwright.latency import Table, Timing, count_borders, fingerprint, fit, measure_table, named, random_policy, spreads, uniform_policies
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem, build_choices
from bitwright.relaxation import Decisions
from bitwright.sensitivity import solve
from bitwright.sites import trace
from bitwright.targets import get_target

NET = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)
)
TRACE = trace(NET, torch.zeros(1, 3, 8, 8))
CLASSES = {site.name: {Bits(8, 8): "int8", Bits(4, 8): "int8", Bits(16, 16): "bf16"} for site in TRACE.sites}
MACS = {site.name: site.macs for site in TRACE.sites}
TRUE = {site.name: {"int8": 1000 + site.macs, "bf16": 2000 + 3 * site.macs} for site in TRACE.sites}


def timing(policy, base=5000, noise=0.0, rng=None):
    total = base + 4000 * count_borders(CLASSES, policy) + sum(TRUE[name][CLASSES[name][bits]] for name, bits in policy.items())
    total *= 1 + (0 if rng is None else rng.normal(0, noise))
    return Timing(policy, int(total), int(total), int(total), 10)


def table(count=24, judged=20, noise=0.01):
    rng = np.random.default_rng(0)
    timings = [timing(policy, noise=noise, rng=rng) for policy in uniform_policies(CLASSES)]
    timings += [timing(random_policy(CLASSES, rng), noise=noise, rng=rng) for _ in range(count + judged)]
    base, border, terms = fit(TRACE.sites, CLASSES, timings[: len(timings) - judged])
    fitted, held = tuple(timings[: len(timings) - judged]), tuple(timings[len(timings) - judged :])
    return Table("openvino-x86 version 1", {"processor": "p"}, base, terms, CLASSES, MACS, fitted, held, border)


PAIRS = {site.name: (Bits(8, 8), Bits(16, 16)) for site in TRACE.sites}


def planted(limit, border=300, choices=None):
    """A problem where the second site loses most by 8 bits, and every change of type costs time."""
    terms = {name: {"int8": 100, "bf16": 150 + 50 * (name == "2")} for name in CLASSES}
    classes = {name: {Bits(8, 8): "int8", Bits(16, 16): "bf16"} for name in CLASSES} if choices is None else choices
    made = Table("openvino-x86 version 2", {"processor": "p"}, 100, terms, classes, MACS, border=border)
    budget = parse_budget(f"latency<={limit}ns", TRACE.sites, pins={}, costs=(made,))
    harm = {name: 4.0 if name == "2" else 1.0 for name in CLASSES}
    widths = PAIRS if choices is None else {name: tuple(known) for name, known in choices.items()}
    loss = lambda policy: sum(harm[name] for name, bits in policy.items() if bits.w == 8)  # noqa: E731
    return made, Problem(NET, TRACE, widths, budget, evaluate=loss, seed=1)


def test_a_budget_counts_the_borders_that_a_policy_has():
    made, problem = planted(900)
    one = Policy((name, Bits(16, 16) if name == "2" else Bits(8, 8)) for name in CLASSES)
    assert made.total(TRACE.sites, one) == made.predict(one) == problem.costs(one)[0] == 100 + 3 * 100 + 200 + 2 * 300
    assert not problem.feasible(one)
    assert problem.feasible(Policy((name, Bits(16, 16)) for name in CLASSES))  # no border: 750 ns
    assert repair(one, problem) != one
    assert not planted(1199)[1].feasible(one)
    assert planted(1200)[1].feasible(one)


@pytest.mark.parametrize("name", ["uniform", "random", "greedy", "evolution"])
@pytest.mark.parametrize("limit", [500, 620, 749, 849, 949, 1049, 1199])
def test_what_a_search_returns_is_predicted_within_its_budget(name, limit):
    if name == "evolution":
        pytest.importorskip("optuna", reason="optuna is not installed")
    made, problem = planted(limit, border=100)
    options = {"random": {"count": 8}, "evolution": {"trials": 12, "population": 4}}.get(name, {})
    result = search(problem, methods.get_method(name)(**options))
    assert made.predict(result.policy) == result.costs[0] <= limit
    assert all(made.predict(trial.policy) <= limit for trial in result.history)


@pytest.mark.parametrize("limit", range(500, 1000, 50))
def test_an_allocation_by_scores_is_the_best_policy_that_is_predicted_within_the_budget(limit):
    made, problem = planted(limit, border=100)
    scores = {name: torch.tensor([4.0 if name == "2" else 1.0, 0.0]) for name in CLASSES}
    every = (Policy(zip(CLASSES, bits, strict=True)) for bits in itertools.product(*PAIRS.values()))
    best = min(problem.loss(policy) for policy in every if made.predict(policy) <= limit)
    assert problem.loss(solve(problem, scores)) == best


def test_a_limit_that_only_borders_break_says_the_nearest_feasible_one():
    terms = {name: {"int8": 100, "bf16": 90} if k % 2 else {"int8": 90, "bf16": 100} for k, name in enumerate(CLASSES)}
    classes = {name: {Bits(8, 8): "int8", Bits(16, 16): "bf16"} for name in CLASSES}
    made = Table("openvino-x86 version 2", {"processor": "p"}, 0, terms, classes, MACS, border=300)
    budget = parse_budget("latency<=379ns", TRACE.sites, pins={}, costs=(made,))
    with pytest.raises(BudgetError, match=r"its limit is 379ns .* reach 380ns .*; the nearest feasible limit is 380ns \(380 ns\)"):
        Problem(NET, TRACE, PAIRS, budget, evaluate=lambda policy: 0.0).check()
    Problem(NET, TRACE, PAIRS, parse_budget("latency<=380ns", TRACE.sites, pins={}, costs=(made,)), evaluate=lambda policy: 0.0).check()


HERE = {"processor": "here", "features": ["avx2"], "runtime": "openvino 2026.4"}


@pytest.mark.parametrize(
    ("part", "other"), [("processor", "there"), ("features", ["avx2", "amx_int8"]), ("runtime", "openvino 2025.1"), ("cores", 99)]
)
def test_a_table_of_another_machine_is_told(monkeypatch, part, other):
    monkeypatch.setattr("bitwright.latency.fingerprint", lambda runtime: {**HERE, "runtime": f"{runtime} 2026.4", "cores": 2})
    made = dataclasses.replace(table(0, 0), machine={**HERE, "cores": 2})
    assert made.elsewhere() is None
    said = dataclasses.replace(made, machine={**made.machine, part: other}).elsewhere()
    assert (said is None) == (part == "cores")
    if said is not None:
        spelled = " ".join(other) if isinstance(other, list) else other
        assert said.startswith("The latency table was measured on another machine (")
        assert spelled in said
        assert "than this one (here, avx2, openvino 2026.4)" in said


def test_a_table_names_no_module_to_import():
    odd = dataclasses.replace(table(0, 0), machine={**fingerprint("no.such"), "runtime": "antigravity 1"})
    assert "antigravity 1) than this one" in (odd.elsewhere() or "")
    assert "antigravity not installed)" in (odd.elsewhere() or "")


@pytest.mark.parametrize("granularity", ["layer", "net"])
def test_a_differentiable_search_expects_and_keeps_borders(granularity):
    grid = {Bits(4, 8): "int8", Bits(4, 16): "bf16", Bits(8, 8): "int8", Bits(8, 16): "bf16"}
    made, problem = planted(900, border=100, choices=dict.fromkeys(CLASSES, grid))
    decisions = Decisions(problem, granularity)
    index = [len(row.widths) - 1 if row.kind == "w" or "2" in row.sites else 0 for row in decisions.rows]
    sure = torch.nn.functional.one_hot(torch.tensor(index), decisions.widest).double()
    assert decisions.expected_spending(sure) == (made.predict(decisions.policy(index)),)
    found = decisions.allocate(-torch.arange(2.0).expand(len(index), 2), torch.ones(len(index), 2, dtype=torch.bool))
    assert found is not None
    assert made.predict(found) <= 900


def test_networks_that_nothing_was_fitted_on_are_predicted():
    errors = table().errors()
    assert len(errors) == 20
    assert np.median(errors) < 0.03
    assert max(errors) < 0.1


def test_a_table_is_a_cost_of_integers_and_a_promise():
    made = table(noise=0.0)
    policy = Policy((site.name, Bits(8, 8)) for site in TRACE.sites)
    assert made.total(TRACE.sites, policy) == made.predict(policy)
    assert made(TRACE.sites[0], Bits(4, 8)) == made(TRACE.sites[0], Bits(8, 8)) < made(TRACE.sites[0], Bits(16, 16))
    limit = (made.predict(policy) + made.predict(Policy((site.name, Bits(16, 16)) for site in TRACE.sites))) // 2
    budget = parse_budget(f"latency<={limit / 1e3:.3f}us", TRACE.sites, pins={}, costs=(made,))
    assert abs(budget.limit - limit) <= 1
    choices = build_choices(TRACE, (8, 16), (8, 16), pin_first="free", pin_last="free")
    choices = {name: tuple(bits for bits in known if bits.w == bits.a) for name, known in choices.items()}
    problem = Problem(NET, TRACE, choices, budget, evaluate=lambda policy: float(sum(bits.w == 8 for bits in policy.values())))
    problem.check()
    assert problem.feasible(problem.cheapest())
    assert not problem.feasible(Policy((site.name, Bits(16, 16)) for site in TRACE.sites))
    percent = parse_budget("latency<=50%", TRACE.sites, pins={}, costs=(made,))
    assert percent.limit == (made.fixed + sum(max(made.terms[site.name].values()) for site in TRACE.sites)) // 2
    slowest = Policy((site.name, Bits(16, 16)) for site in TRACE.sites)
    whole = parse_budget("latency<=100%", TRACE.sites, pins={}, costs=(made,))
    assert Problem(NET, TRACE, choices, whole, evaluate=lambda policy: 0.0).feasible(slowest)


def test_a_table_is_kept_with_units_runs_spread_and_machine(tmp_path):
    made = table(noise=0.0)
    made.save(tmp_path / "t.json")
    assert Table.load(tmp_path / "t.json") == made
    data = json.loads((tmp_path / "t.json").read_text())
    assert (data["unit"], data["batch"], data["prediction"]["policies"]) == ("ns", 1, 20)
    assert {"typical", "fastest", "median", "n"} < set(data["fitted"][0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no table in .*measure one: bitwright profile --target NAME --measure"),
        ("nonsense", "is no latency table"),
        ('{"format": "x", "unit": "ns"}', "its format is 'x', expected 'bitwright-latency-1'; measure again"),
        ('{"format": "bitwright-latency-1", "unit": "us"}', "its unit is 'us', expected 'ns'; measure again"),
        ('{"format": "bitwright-latency-1", "unit": "ns"}', "is no latency table"),
    ],
)
def test_a_missing_or_damaged_table_says_what_to_do(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises(BudgetError, match=message):
        Table.load(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("base",), float("inf"), "base is inf, expected a whole number from 0"),
        (("base",), float("nan"), "base is nan, expected a whole number"),
        (("base",), 1.9, "base is 1.9, expected a whole number"),
        (("base",), -5, "base is -5, expected a whole number from 0"),
        (("border",), -5000, "border is -5000, expected a whole number from 0"),
        (("terms", "2", "int8"), -1, "the term of '2' as int8 is -1, expected a whole number from 0"),
        (("terms", "2", "int8"), None, "it has no term of '2' as int8, which its classes name"),
        (("terms", "2"), None, "'2' is in its terms or its classes, and not in both"),
        (("terms", "zzz"), {"int8": 1}, "'zzz' is in its terms or its classes, and not in both"),
        (("macs", "2"), None, "'2' is in its macs or its classes, and not in both"),
        (("machine",), {}, "names no machine by processor, features, runtime"),
        (("judged", 0, "typical"), 0, "'typical' of a network is 0, expected a whole number from 1"),
        (("judged", 0, "policy", "2"), [2, 2], "has other sites or widths than its classes"),
        (("fitted", 0, "policy", "2"), [float("inf"), 8], "OverflowError"),
    ],
)
def test_a_table_that_says_what_cannot_be_is_refused(tmp_path, place, value, message):
    data = json.loads(json.dumps(table(0, 1).to_dict()))
    *path, last = place
    part = data
    for key in path:
        part = part[key]
    if value is None:
        del part[last]
    else:
        part[last] = value
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(BudgetError, match=re.escape(message)) as refused:
        Table.load(tmp_path / "t.json")
    assert str(refused.value).endswith("; measure again")


def test_every_term_has_a_standard_error_and_a_count_and_old_tables_are_read_without(tmp_path):
    made = table()
    made.save(tmp_path / "t.json")
    data = json.loads((tmp_path / "t.json").read_text())
    spread = data.pop("spread")
    assert {name: set(known) for name, known in spread["terms"].items()} == {name: set(known) for name, known in made.terms.items()}
    counts = spread["terms"]["2"]
    assert spread["base"]["n"] == counts["int8"]["n"] + counts["bf16"]["n"] == len(made.fitted) == 26
    assert 0 < spread["border"]["n"] < 26
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert Table.load(tmp_path / "old.json") == made
    assert dataclasses.replace(made, fitted=()).spread() == {}


def test_standard_errors_say_how_far_terms_are_from_the_truth():
    rng, gaps = np.random.default_rng(1), []
    policies = [*uniform_policies(CLASSES), *(random_policy(CLASSES, rng) for _ in range(24))]
    for _ in range(60):
        timings = [timing(policy, noise=0.02, rng=rng) for policy in policies]
        base, border, terms = fit(TRACE.sites, CLASSES, timings)
        spread = spreads(MACS, CLASSES, timings)
        row = [(base - 5000) / spread["base"]["standard_error"], (border - 4000) / spread["border"]["standard_error"]]
        row += [(terms[s][kind] - TRUE[s][kind]) / entry["standard_error"] for s in TRUE for kind, entry in spread["terms"][s].items()]
        gaps.append(row)
    far = np.sqrt(np.square(gaps).mean(axis=0))
    assert (far < 2).all(), far
    assert 0.7 < far[1] < 1.5, far  # the border, which nothing but timings says


def test_sites_and_widths_that_a_table_does_not_know_are_errors():
    made = table(noise=0.0)
    with pytest.raises(BudgetError, match="does not run '0' at W2A2; give --target"):
        made(TRACE.sites[0], Bits(2, 2))
    with pytest.raises(BudgetError, match="was not measured with '0' at W4A4; measure again with these widths"):
        made.predict(Policy((site.name, Bits(4, 4)) for site in TRACE.sites))
    larger = trace(NET, torch.zeros(1, 3, 16, 16))
    with pytest.raises(BudgetError, match="it is of another network or input size"):
        made.check(larger.sites)
    made.check(TRACE.sites)
    other = trace(nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4)).sites[0]
    made.terms.pop("0")
    with pytest.raises(BudgetError, match="the table has no site '0'; measure this network"):
        made(other, Bits(8, 8))


def test_a_target_that_nothing_measures_is_an_error():
    with pytest.raises(TargetError, match="target generic: nothing here measures its latency; take openvino-x86 or onnxruntime-x86"):
        measure_table(NET, TRACE, torch.zeros(2, 3, 8, 8), get_target("generic"), build_choices(TRACE, (8,), (8,)))


@pytest.mark.parametrize(("name", "package", "wide"), [("onnxruntime-x86", "onnxruntime", 32), ("openvino-x86", "openvino", 16)])
def test_a_small_network_is_timed_on_the_runtime(name, package, wide):
    pytest.importorskip(package, reason=f"{package} is not installed")
    target = get_target(name)
    choices = target.restrict(TRACE, build_choices(TRACE, (8, wide), (8, wide), pin_first="free", pin_last="free"))
    made = measure_table(NET, TRACE, torch.rand(2, 3, 8, 8), target, choices, policies=1, judged=1)
    assert made.target == named(target)
    assert len(made.fitted) == 3
    assert all(0 < timing.low <= timing.typical <= timing.high and timing.runs >= 15 for timing in made.fitted + made.judged)
    assert made.machine["threads"] == 1
    assert package in made.machine["runtime"]
    assert {kind for known in made.terms.values() for kind in known} == {"int8", "float32" if wide == 32 else "bf16"}
