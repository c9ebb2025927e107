"""The search loop: repair, ranking, stopping, Ctrl-C, resuming bit for bit after anything, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from bitwright import runs
from bitwright.data import TensorSplit
from bitwright.driver import Proposal, SearchMethod, Stop, Trial, pareto_front, search
from bitwright.errors import BitwrightError, BudgetError, PolicyError, RunError, TrainingError
from bitwright.methods import available
from bitwright.methods.greedy import Greedy
from bitwright.methods.random import Random
from bitwright.policy import Policy
from bitwright.problem import Problem, SearchData
from bitwright.testing import planted, table_problem

VALUES = [[9.0, 4.0, 1.0], [3.0, 1.0, 0.0]]
TERMS = [[[1, 2, 4], [1, 2, 5]]]


def problem(limit=6, **options):
    return table_problem(VALUES, TERMS, [limit], **options)


def with_loss(loss, limit=6):
    base = problem(limit)
    return Problem(base.model, base.trace, base.choices, base.budgets, evaluate=loss)


def policy(*widths):
    return Policy({str(i): (w, 32) for i, w in enumerate(widths)})


@dataclass
class Place:
    at: int = 0


@dataclass(frozen=True)
class Scripted(SearchMethod[Place]):
    """Proposes what it is given, step by step; an exception is raised, None is no proposal."""

    ranking: ClassVar = "loss"

    script: tuple[Any, ...] = ()

    def start(self, problem):
        return Place()

    def step(self, problem, state, told):
        entry = self.script[state.at]
        if isinstance(entry, BaseException):
            raise entry
        proposal = entry if entry is None or isinstance(entry, Proposal) else Proposal(entry)
        return Place(state.at + 1), proposal

    def done(self, problem, state):
        return state.at >= len(self.script)


@dataclass(frozen=True)
class ScriptedLast(Scripted):
    ranking: ClassVar = "last"


@dataclass
class WalkState:
    steps: int
    position: Tensor
    generator: Tensor
    seen: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Walk(SearchMethod[WalkState]):
    """A random walk with every kind of state: tensors changed in place, a generator, told losses, torch's global generator."""

    ranking: ClassVar = "loss"

    steps: int = 12
    pause: float = 0.0

    def start(self, problem):
        generator = torch.Generator().manual_seed(problem.seed)
        return WalkState(0, torch.zeros(len(problem.sites), dtype=torch.float64), generator.get_state())

    def step(self, problem, state, told):
        time.sleep(self.pause)
        generator = torch.Generator()
        generator.set_state(state.generator)
        state.position += torch.randn(len(state.position), generator=generator, dtype=torch.float64) + 0.1 * torch.randn(())
        state.generator = generator.get_state()
        state.steps += 1
        if told is not None:
            state.seen.setdefault("losses", []).append(told.loss)
            state.position -= 0.01 * told.loss
        if state.steps % 3 == 0:
            return state, None
        index = [int(abs(p) * 10) % len(c) for p, c in zip(state.position, problem.choices.values(), strict=True)]
        return state, Proposal(
            problem.policy(index), expected=(float(state.position[0]),), gates={"0": state.position}, note={"step": state.steps}
        )

    def done(self, problem, state):
        return state.steps >= self.steps


def timeless(result):
    trials = [dataclasses.replace(trial, seconds=0.0) for trial in result.history]
    return repr((result.policy, result.loss, result.costs, trials, result.status, result.steps))


def final_state(out):
    tree = runs.load_tree(max((Path(out) / "checkpoint").iterdir()))
    skeleton, tensors = runs.flatten({key: value for key, value in tree.items() if key != "seconds"})
    return json.dumps(skeleton), [tensor.tolist() for tensor in tensors]


def lines(out):
    return [json.loads(line) for line in (Path(out) / "search.jsonl").read_text().splitlines()]


# ---- proposing and disposing


@pytest.mark.parametrize("name", list(available()))
def test_a_problem_without_a_budget_is_refused_alike_by_all_methods(name):
    base = problem()
    free = Problem(base.model, base.trace, base.choices, [], evaluate=base.loss)
    with pytest.raises(BudgetError, match=r"a search without a budget has nothing to decide; give one, for example weight_bits<=2\.5"):
        search(free, available()[name]())


def test_the_best_loss_wins_and_infeasible_proposals_are_repaired():
    result = search(problem(), Scripted((policy(1, 1), policy(3, 3), policy(1, 2))))
    assert [trial.repaired for trial in result.history] == [False, True, False]
    assert result.history[1].proposed == policy(3, 3)
    assert result.history[1].policy == policy(3, 2)
    assert (result.policy, result.loss, result.costs, result.status, result.steps) == (policy(3, 2), 2.0, (6,), "done", 3)


@pytest.mark.parametrize(("limit", "expected"), [(9, (3, 3)), (8, (2, 3)), (7, (2, 3)), (6, (3, 2)), (5, (2, 2)), (4, (2, 2)), (2, (1, 1))])
def test_repair_follows_the_limit_across_each_boundary(limit, expected):
    result = search(problem(limit), Scripted((policy(3, 3),)))
    assert result.costs[0] <= limit
    assert result.policy == policy(*expected)


def test_the_last_proposal_wins_where_the_method_says_so_and_only_it_is_evaluated():
    asked = problem()
    result = search(asked, ScriptedLast((policy(3, 2), policy(2, 2), None, policy(1, 2))))
    assert (result.policy, result.loss) == (policy(1, 2), 10.0)
    assert [math.isnan(trial.loss) for trial in result.history] == [True, True, False]
    assert asked.evaluations == 2  # the uniform point and the last


def test_a_proposal_can_ask_for_its_loss_and_so_can_the_caller():
    script = (Proposal(policy(3, 2), evaluate=True), policy(2, 2), policy(1, 2))
    assert search(problem(), ScriptedLast(script)).history[0].loss == 2.0
    result = search(problem(), ScriptedLast(script), loss_every_proposal=True)
    assert [trial.loss for trial in result.history] == [2.0, 5.0, 10.0]


def test_the_method_is_told_what_became_of_its_proposal():
    told_all = []

    @dataclass(frozen=True)
    class Listener(Scripted):
        def step(self, problem, state, told):
            told_all.append(told)
            return super().step(problem, state, told)

    search(problem(), Listener((policy(3, 3), None, policy(1, 1))))
    assert [told and told.policy for told in told_all] == [None, policy(3, 2), None]


def test_the_uniform_point_is_reported_and_wins_only_if_asked():
    result = search(problem(), Scripted((policy(1, 1),)))
    assert result.uniform.policy == policy(2, 2)
    assert (result.loss, result.uniform.loss) == (12.0, 5.0)
    assert search(problem(), Scripted((policy(1, 1),)), never_worse=True).policy == policy(2, 2)
    assert search(problem(), Scripted((policy(3, 2),)), never_worse=True).policy == policy(3, 2)


def test_a_problem_without_a_uniform_point(tmp_path):
    odd = table_problem([[1.0, 0.0], [1.0, 0.0]], [[[2, 1], [1, 2]]], [2])
    result = search(odd, Scripted((policy(2, 1),)), out=tmp_path, never_worse=True)
    assert result.uniform is None
    assert lines(tmp_path)[0] == {"step": 0, "uniform": True, "policy": None}
    assert search(odd, Scripted((policy(2, 1),)), out=tmp_path).uniform is None


def test_the_front_holds_what_nothing_beats():
    def trial(step, cost, loss):
        return Trial(step, policy(1, 1), policy(1, 1), (cost,), loss, repaired=False, seconds=0.0)

    trials = [trial(1, 5, 1.0), trial(2, 5, 1.0), trial(3, 4, 2.0), trial(4, 6, 1.5), trial(5, 1, math.nan), trial(6, 3, 2.0)]
    assert [t.step for t in pareto_front(trials)] == [6, 1]


def test_one_json_line_per_proposal_and_the_same_to_the_log(tmp_path):
    seen = []
    gated = Proposal(policy(3, 3), expected=(7.5,), gates={"0": torch.tensor([0.25, 0.75])}, note={"heat": 1})
    search(problem(), ScriptedLast((gated, None, policy(1, 1))), out=tmp_path, log=seen.append)
    first, second, third = lines(tmp_path)
    assert first["uniform"] is True
    assert {key: second[key] for key in ("step", "proposed", "policy", "costs", "loss", "repaired")} == {
        "step": 1,
        "proposed": {"0": [3, 32], "1": [3, 32]},
        "policy": {"0": [3, 32], "1": [2, 32]},
        "costs": [6],
        "loss": None,
        "repaired": True,
    }
    assert (second["expected"], second["gates"], second["note"]) == ([7.5], {"0": [0.25, 0.75]}, {"heat": 1.0})
    assert third["step"] == 3
    assert [record["step"] for record in seen] == [0, 1, 3]
    assert Policy.from_json((tmp_path / "policy.json").read_text()) == policy(1, 1)


# ---- what a method, or a loss, does wrong


@pytest.mark.parametrize(
    ("proposed", "message"),
    [
        (Policy({"0": (1, 32), "l": (1, 32)}), r"method 'test_driver', step 2: policy: the problem has no site 'l'; known: 0, 1"),
        (Policy({"0": (1, 32)}), "method 'test_driver', step 2: policy: site '1' has no entry; give it one of W1A32, W2A32, W3A32"),
        (policy(1, 8), "method 'test_driver', step 2: policy: site '1' has W8A32, which is no choice of it"),
    ],
)
def test_a_proposal_that_is_no_policy_of_the_problem(proposed, message):
    with pytest.raises(PolicyError, match=message):
        search(problem(), Scripted((policy(1, 1), proposed)))


def test_a_method_without_a_proposal_or_without_a_state():
    with pytest.raises(PolicyError, match="method 'test_driver' was done after 2 steps without a proposal"):
        search(problem(), Scripted((None, None)))

    class Stateless(Scripted):
        def start(self, problem):
            return [0]

    with pytest.raises(TypeError, match="its state is a list; let start"):
        search(problem(), Stateless((policy(1, 1),)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, r"step 1: step\(\) returned NoneType; let it return a tuple of the state and a Proposal or None"),
        ((Place(1), policy(1, 1)), r"step 1: step\(\) returned \(Place, Policy\); let it"),
        ((Place(1), None, None), r"returned \(Place, NoneType, NoneType\)"),
        ((3, None), r"its state is a int; let step\(\) return a dataclass"),
    ],
)
def test_a_step_that_returns_something_else(answer, message):
    class Odd(Scripted):
        def step(self, problem, state, told):
            return answer

    with pytest.raises(TypeError, match=message):
        search(problem(), Odd((policy(1, 1),)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(tmp_path, bad):
    losses = {policy(3, 1): bad}
    asked = with_loss(lambda p: losses.get(p, 1.0))
    message = rf"the loss of the policy of step 2 is {bad} \(0=W3A32, 1=W1A32\); it must be a finite number"
    with pytest.raises(TrainingError, match=message):
        search(asked, Scripted((policy(1, 1), policy(3, 1), policy(1, 2))), out=tmp_path, save_every=1)
    losses.clear()
    mended = search(with_loss(lambda p: losses.get(p, 1.0)), Scripted((policy(1, 1), policy(3, 1), policy(1, 2))), out=tmp_path)
    assert [trial.step for trial in mended.history] == [1, 2, 3]


def test_the_uniform_policys_loss_must_be_a_number_too():
    with pytest.raises(TrainingError, match="the loss of the uniform policy is nan"):
        search(with_loss(lambda p: math.nan), Scripted((policy(1, 1),)))


def test_an_unreachable_budget_fails_before_anything_starts(tmp_path):
    with pytest.raises(BudgetError, match="cannot be met"):
        search(problem(1), Scripted((RuntimeError("started"),)), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_save_every_is_at_least_one():
    with pytest.raises(BitwrightError, match="save_every is 0; give 1 or more"):
        search(problem(), Scripted((policy(1, 1),)), save_every=0)


# ---- stopping


def test_stopped_a_last_method_is_ranked_by_its_latest_proposal_that_fits():
    script = (policy(3, 2), policy(2, 2), policy(3, 3), policy(1, 1))
    assert search(problem(), ScriptedLast(script), stop=Stop(steps=3)).policy == policy(2, 2)
    assert search(problem(), ScriptedLast(script), stop=Stop(steps=3)).loss == 5.0
    only_over = search(problem(), ScriptedLast((policy(3, 3), policy(1, 1))), stop=Stop(steps=1))
    assert (only_over.policy, only_over.status, only_over.steps) == (policy(3, 2), "stopped", 1)


def test_stopped_before_any_proposal_the_uniform_point_is_returned():
    result = search(problem(), Scripted((policy(1, 1),)), stop=Stop(steps=0))
    assert (result.policy, result.loss, result.history) == (policy(2, 2), 5.0, ())
    odd = table_problem([[1.0, 0.0], [1.0, 0.0]], [[[2, 1], [1, 2]]], [2])
    assert odd.feasible(search(odd, Scripted((policy(1, 1),)), stop=Stop(steps=0)).policy)


def test_seconds_stop_and_add_up_over_sessions(tmp_path):
    first = search(problem(), Walk(steps=10**6, pause=0.01), out=tmp_path, stop=Stop(seconds=0.2))
    assert first.status == "stopped"
    assert first.seconds >= 0.2
    again = search(problem(), Walk(steps=10**6, pause=0.01), out=tmp_path, stop=Stop(seconds=first.seconds + 0.2))
    assert again.steps > first.steps
    assert again.seconds >= first.seconds + 0.2
    assert again.history[: len(first.history)] == first.history


def test_ctrl_c_in_a_step_keeps_the_best_so_far_and_the_last_checkpoint(tmp_path):
    script = (policy(1, 1), policy(3, 2), KeyboardInterrupt(), policy(2, 2))
    result = search(problem(), Scripted(script), out=tmp_path, save_every=1)
    assert (result.status, result.policy, result.loss) == ("interrupted", policy(3, 2), 2.0)
    assert Policy.from_json((tmp_path / "policy.json").read_text()) == policy(3, 2)
    assert runs.load_tree(max((tmp_path / "checkpoint").iterdir()))["step"] == 2


@dataclass(frozen=True)
class Killer(Walk):
    """Sends its own process SIGINT in one step; twice means without patience."""

    at: int = 5
    times: int = 1

    def step(self, problem, state, told):
        if state.steps == self.at and os.environ.get("INTERRUPT"):
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
        return super().step(problem, state, told)


@pytest.mark.parametrize(("times", "kept"), [(1, 6), (2, 0)])
def test_the_first_sigint_waits_for_the_step_the_second_does_not(tmp_path, monkeypatch, times, kept):
    method = Killer(times=times)
    whole = search(problem(), method, out=tmp_path / "whole")
    monkeypatch.setenv("INTERRUPT", "1")
    result = search(problem(), method, out=tmp_path / "parts", save_every=100)
    assert result.status == "interrupted"
    assert runs.load_tree(max((tmp_path / "parts" / "checkpoint").iterdir()))["step"] == kept
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.delenv("INTERRUPT")
    assert timeless(search(problem(), method, out=tmp_path / "parts")) == timeless(whole)


# ---- resuming


@pytest.mark.parametrize("save_every", [1, 3, 50])
def test_resumed_at_any_step_is_as_if_never_stopped(tmp_path, save_every):
    whole = search(problem(), Walk(), out=tmp_path / "whole")
    for steps in range(13):
        search(problem(), Walk(), out=tmp_path / "parts", stop=Stop(steps=steps), save_every=save_every)
    parts = search(problem(), Walk(), out=tmp_path / "parts")
    assert timeless(parts) == timeless(whole) == timeless(search(problem(), Walk()))
    assert final_state(tmp_path / "parts") == final_state(tmp_path / "whole")
    assert len(lines(tmp_path / "parts")) == len(lines(tmp_path / "whole")) == 9


def test_a_resumed_search_evaluates_no_policy_again(tmp_path):
    script = (policy(1, 1), policy(2, 1), policy(1, 2), policy(2, 1), policy(2, 2), policy(1, 3))
    search(problem(), Scripted(script), out=tmp_path, stop=Stop(steps=3))
    again = problem()
    search(again, Scripted(script), out=tmp_path)
    assert again.evaluations == 1  # of (1, 3): the session before knew the others, (2, 2) as the uniform point


@pytest.mark.parametrize("where", range(1, 12))
def test_lines_written_after_the_last_checkpoint_are_written_again(tmp_path, where):
    @dataclass(frozen=True)
    class Crash(Walk):
        def step(self, problem, state, told):
            if state.steps == where and os.environ.get("CRASH"):
                raise SystemError
            return super().step(problem, state, told)

    whole = search(problem(), Crash(), out=tmp_path / "whole")
    os.environ["CRASH"] = "1"
    try:
        with pytest.raises(SystemError):
            search(problem(), Crash(), out=tmp_path / "parts", save_every=4)
    finally:
        del os.environ["CRASH"]
    with (tmp_path / "parts" / "search.jsonl").open("a") as file:
        file.write('{"step": 99, "propo')  # a line that a kill cut off
    assert timeless(search(problem(), Crash(), out=tmp_path / "parts", save_every=4)) == timeless(whole)
    assert len(lines(tmp_path / "parts")) == len(lines(tmp_path / "whole"))


def test_a_finished_search_is_not_repeated(tmp_path):
    whole = search(problem(), Walk(), out=tmp_path)
    asked = problem()
    assert timeless(search(asked, Walk(), out=tmp_path)) == timeless(whole)
    assert asked.evaluations == 0


def test_only_the_two_latest_checkpoints_stay(tmp_path):
    search(problem(), Walk(), out=tmp_path, save_every=5)
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == [
        "search-000000010.safetensors",
        "search-000000012.safetensors",
    ]


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    one, same, other = (search(problem(seed=seed), Walk()) for seed in (0, 0, 1))
    torch.manual_seed(5)
    assert timeless(one) == timeless(same) == timeless(search(problem(), Walk()))
    assert timeless(one) != timeless(other)
    torch.set_rng_state(before)


def walk_slowly(out):
    return search(problem(), Walk(steps=60, pause=0.01), out=out, save_every=7)


def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path):
    whole = walk_slowly(tmp_path / "whole")
    out = tmp_path / "parts"
    for delay in (0.01, 0.05, 0.1, 0.15, 0.2, 0.25):
        process = multiprocessing.get_context("fork").Process(target=walk_slowly, args=(out,))
        process.start()
        time.sleep(delay)
        process.kill()
        process.join()
    assert timeless(walk_slowly(out)) == timeless(whole)
    assert final_state(out) == final_state(tmp_path / "whole")


# ---- what a resume refuses


def test_a_directory_with_another_search_is_refused_and_left_as_it_is(tmp_path):
    search(problem(), Walk(steps=4), out=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused = [
        (problem(), Scripted((policy(1, 1),)), r"another method \(was \"test_driver:Walk\", now \"test_driver:Scripted\"\)"),
        (problem(), Walk(steps=5), r"another options.steps \(was 4, now 5\); give another --out"),
        (problem(5), Walk(steps=4), r"another problem.budgets \(was \[\[\"table\", 6\]\], now \[\[\"table\", 5\]\]\)"),
        (problem(seed=1), Walk(steps=4), r"another problem.seed \(was 0, now 1\)"),
    ]
    for other, method, message in refused:
        with pytest.raises(RunError, match=message.replace("test_driver:", r"[\w.]*test_driver:")):
            search(other, method, out=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_result_of_other_data_or_of_another_loss_is_refused(tmp_path):
    """Same network, sizes and seed: only the images, the labels or the callback differ."""
    plant = planted("joint").problem
    fit, selection = plant.data.fit, plant.data.selection

    def asked(data=plant.data, evaluate=None):
        return Problem(plant.model, plant.trace, plant.choices, plant.budgets, data, evaluate=evaluate)

    def brighter(split):
        return TensorSplit(split.images + 0.1, split.labels, classes=split.classes, _rows=split._rows)

    def weighed(by):
        return lambda policy: by * sum(2.0**-bits.w for bits in policy.values())

    search(asked(), Random(count=2), out=tmp_path / "reference")
    search(asked(evaluate=weighed(1.0)), Random(count=2), out=tmp_path / "own")
    refused = [
        ("reference", asked(SearchData(brighter(fit), selection)), r"another problem\.data\.fit\.sample \(was"),
        ("reference", asked(SearchData(fit, brighter(selection))), r"another problem\.data\.selection\.sample \(was"),
        ("reference", asked(evaluate=weighed(1.0)), r"another problem\.evaluate \(was null, now"),
        ("own", asked(evaluate=weighed(2.0)), r"another problem\.evaluate \(was .*; give another --out"),
        ("own", asked(evaluate=lambda policy: 1.0), r"another problem\.evaluate \(was"),
    ]
    for folder, other, message in refused:
        with pytest.raises(RunError, match=message):
            search(other, Random(count=2), out=tmp_path / folder)
        assert other.memory()["losses"].tolist() == []
    for folder, evaluate in (("reference", None), ("own", weighed(1.0))):
        same = asked(evaluate=evaluate)
        search(same, Random(count=2), out=tmp_path / folder)
        assert same.evaluations == 0


def test_a_search_that_did_not_note_its_data_is_refused_with_what_to_do(tmp_path):
    search(problem(), Walk(), out=tmp_path)
    newest = max((tmp_path / "checkpoint").iterdir())
    tree = runs.load_tree(newest)
    for part in ("kind", "evaluate"):
        del tree["fingerprint"]["problem"][part]
    runs.save_tree(newest, tree)
    with pytest.raises(RunError, match=r"begun by an earlier version, .*; give another --out, or delete .*checkpoint to search anew here"):
        search(problem(), Walk(), out=tmp_path)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(tmp_path):
    whole = search(problem(), Walk(), out=tmp_path, save_every=5)
    newest = max((tmp_path / "checkpoint").iterdir())
    newest.write_bytes(newest.read_bytes()[:-10])
    with pytest.raises(RunError, match=r"damaged or truncated .*without it the search goes on from search-000000010"):
        search(problem(), Walk(), out=tmp_path)
    newest.unlink()
    assert timeless(search(problem(), Walk(), out=tmp_path)) == timeless(whole)


def test_missing_lines_are_refused(tmp_path):
    search(problem(), Walk(), out=tmp_path)
    (tmp_path / "search.jsonl").write_text("")
    with pytest.raises(RunError, match="has 0 lines and the checkpoint beside it expects 9"):
        search(problem(), Walk(), out=tmp_path)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    whole = search(problem(), Walk(), out=tmp_path / "whole")
    good = runs.save_tree
    saves = iter([True, True, False])

    def full(path, tree):
        if not next(saves):
            raise RunError(f"{path}: cannot be written (no space)")
        good(path, tree)

    monkeypatch.setattr(runs, "save_tree", full)
    with pytest.raises(RunError, match="cannot be written"):
        search(problem(), Walk(), out=tmp_path / "parts", save_every=4)
    monkeypatch.setattr(runs, "save_tree", good)
    assert timeless(search(problem(), Walk(), out=tmp_path / "parts", save_every=4)) == timeless(whole)


@dataclass(frozen=True)
class Asking(Scripted):
    """Asks losses within its steps, of policies that it proposes later or never."""

    def step(self, problem, state, told):
        for index in ([state.at] * len(problem.sites), [0] * len(problem.sites)):
            problem.loss(problem.policy(index))
        return Place(state.at + 1), Proposal(problem.policy([0] * len(problem.sites)))

    def done(self, problem, state):
        return state.at >= 3


@pytest.mark.parametrize("method", [Random(count=6), Greedy(exchanges=4), Asking()])
def test_a_resumed_search_counts_as_many_sample_passes(tmp_path, method):
    """A new session calibrates again what an earlier one had; that is no cost of the search, wherever the loss was asked."""
    plant = planted("joint").problem

    def fresh():  # with the reference loss, which calibrates
        return Problem(plant.model, plant.trace, plant.choices, plant.budgets, plant.data)

    whole_problem = fresh()
    whole, evaluations = search(whole_problem, method), 0
    for steps in (0, 1, 2, 4, None):
        part = fresh()
        result = search(part, method, out=tmp_path, stop=Stop(steps=steps))
        evaluations += part.evaluations
    assert result.sample_passes == whole.sample_passes > 0
    assert timeless(result) == timeless(whole)
    assert evaluations == whole_problem.evaluations
