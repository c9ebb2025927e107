"""The search loop: a method proposes, the driver disposes.

The driver checks the budgets, repairs what breaks them, asks the loss, writes one JSON line per proposal, keeps the Pareto
front and saves the method's state, so every method can be stopped, killed and resumed bit for bit with no code of its own.

Files in ``out``: ``search.jsonl`` (line 0 is the uniform point, then one line per proposal), ``checkpoint/search-*.safetensors``
(the two latest states) and, at the end, ``policy.json`` and what the method leaves beside it (`SearchMethod.files`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch

from bitwright import runs
from bitwright.allocation import repair
from bitwright.checkpoints import keep, latest, map_tensors
from bitwright.errors import BitwrightError, PolicyError, RunError, TrainingError
from bitwright.outside import source_digest
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem
from bitwright.stopping import Stop as Stop  # noqa: PLC0414 - a part of what this module offers

S = TypeVar("S")
Status = Literal["done", "stopped", "interrupted"]
Log = Callable[[Mapping[str, Any]], None]

LINES = "search.jsonl"


@dataclass(frozen=True)
class Proposal:
    """What a method thinks of: a policy, feasible or not.

    Attributes:
        policy: bits of every site, each one of the site's choices.
        expected: what the method expects it to cost, per budget; logged.
        gates: per site, the method's distribution over widths; logged.
        note: numbers worth a look later, such as a temperature; logged.
        evaluate: ask the loss although the method is ranked by its last proposal. (Methods ranked by loss are always told it.)
    """

    policy: Policy
    expected: tuple[float, ...] | None = None
    gates: Mapping[str, Sequence[float]] | None = None
    note: Mapping[str, float] | None = None
    evaluate: bool = False


@dataclass(frozen=True)
class Trial:
    """What became of a proposal: ``policy`` is the feasible one nearest to ``proposed``; ``loss`` is nan where it was not asked."""

    step: int
    proposed: Policy
    policy: Policy
    costs: tuple[int, ...]
    loss: float
    repaired: bool
    seconds: float


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        policy: the winner; it keeps every budget.
        loss: its loss.
        costs: its costs, per budget.
        history: every trial, in order.
        front: the evaluated trials that no other beats in every cost and in loss.
        uniform: the widest policy of one width pair within the same budgets (None if there is none), for comparison.
        status: "done" by the method's own account, "stopped" by a stop rule, or "interrupted" by Ctrl-C.
        steps: steps taken, earlier sessions included.
        seconds: time taken, earlier sessions included.
        sample_passes: images that the search passed through a network (`Problem.spend`), earlier sessions included; the
            uniform point, which stands beside every search, is not counted.
    """

    policy: Policy
    loss: float
    costs: tuple[int, ...]
    history: tuple[Trial, ...]
    front: tuple[Trial, ...]
    uniform: Trial | None
    status: Status
    steps: int
    seconds: float
    sample_passes: int


class SearchMethod(ABC, Generic[S]):
    """A search method: a frozen dataclass of options, and three functions of a state.

    ``S`` is a dataclass of tensors, numbers, strings, bools, None, and dicts, lists or tuples of those; nothing else holds state
    (an optimiser's or a generator's state goes in as tensors). A step may change the state it was given in place. Every call
    runs under torch's global generator seeded by (problem.seed, step), so draws from it repeat after a resume.

    ``ranking`` says who wins: the proposal of least "loss", or the "last" one (methods whose weights adapt as they search).
    """

    ranking: ClassVar[Literal["loss", "last"]]

    @property
    def name(self) -> str:
        """The method's name: that of its file."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def start(self, problem: Problem) -> S:
        """Return the state before the first step; also called on a resume, as the mould that the saved state is poured into."""

    @abstractmethod
    def step(self, problem: Problem, state: S, told: Trial | None) -> tuple[S, Proposal | None]:
        """Do one optimiser step, episode or solve; ``told`` is what became of the proposal of the step before, if it made one."""

    @abstractmethod
    def done(self, problem: Problem, state: S) -> bool:
        """Say whether the search is over; asked after every step."""

    def files(self, problem: Problem, state: S) -> Mapping[str, str]:
        """Return texts worth keeping, by file name: a finished search leaves them in its directory beside the policy."""
        return {}


def search(
    problem: Problem,
    method: SearchMethod[Any],
    *,
    out: str | Path | None = None,
    stop: Stop | None = None,
    log: Log | None = None,
    never_worse: bool = False,
    save_every: int = 50,
    loss_every_proposal: bool = False,
) -> Result:
    """Search the best policy of a problem that keeps every budget.

    The loss is asked for every proposal of a method ranked by loss; for one ranked by its last proposal only when it is done,
    when the proposal says ``evaluate``, and for the winner. Stopped or interrupted, such a method is ranked by its latest proposal
    that kept the budgets unrepaired (by its latest one if none did); with no proposal yet, the uniform point is returned.

    Args:
        problem: sites, choices, costs, limits, data.
        method: what proposes.
        out: run directory; the search goes on from the checkpoint in it and ends as if it had never stopped.
        stop: when to stop before the method is done.
        log: called with every JSON line as it is written.
        never_worse: return the uniform point where it has the lower loss.
        save_every: steps between checkpoints; they change nothing in the result.
        loss_every_proposal: ask the loss of every proposal whatever the ranking.

    Returns:
        The winner, the history and the front.

    Raises:
        BudgetError: no policy keeps the budgets (before anything else is done).
        PolicyError: the method proposed what is no policy of the problem, or nothing at all.
        TrainingError: the loss of a policy is not a finite number; the last checkpoint stays.
        RunError: ``out`` holds the search of another method, other options or another problem, or a damaged checkpoint.
    """
    if save_every < 1:
        raise BitwrightError(f"search: save_every is {save_every}; give 1 or more steps")
    problem.check()
    stop = stop or Stop()
    session = _Session(problem, method, None if out is None else Path(out), log, loss_every_proposal)
    session.begin()
    status = session.finished
    with _deferred_interrupt() as interrupted:
        try:
            while status is None:
                if stop.reached(session.steps, session.elapsed()):
                    status = "stopped"
                elif interrupted():
                    status = "interrupted"
                else:
                    status = session.advance()
                if status is not None or session.steps % save_every == 0:
                    session.save()
        except KeyboardInterrupt:  # in the middle of a step: its state is in doubt, the last checkpoint is not
            status = "interrupted"
    return session.result(status, never_worse=never_worse)


@dataclass
class _Session:
    """One call of `search`: where it stands, and the files it writes."""

    problem: Problem
    method: SearchMethod[Any]
    out: Path | None
    log: Log | None
    ask_all: bool
    identity: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    steps: int = 0
    finished: Status | None = None
    told: Trial | None = None
    uniform: Trial | None = None
    history: list[Trial] = field(default_factory=list)
    lines: int = 0
    earlier: float = 0.0
    passes: int = 0
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        return self.earlier + time.monotonic() - self.started

    def sample_passes(self) -> int:
        return self.problem.sample_passes - self.passes

    def begin(self) -> None:
        """Start the method, or pour the newest checkpoint into its mould."""
        before = self.problem.sample_passes
        with _seeded(self.problem, 0):
            self.state = self.method.start(self.problem)
        started = self.problem.sample_passes - before
        self._check_state(self.state, "start()")
        self.identity = self._fingerprint()
        saved = None if self.out is None else latest(self.out, self.identity)
        if saved is None:
            if self.out is not None:
                runs.truncate_jsonl(self.out / LINES, 0)
            self._uniform_point()
            self.passes = self.problem.sample_passes - started
            self.save()
            return
        self._resume(saved)

    def _resume(self, saved: Mapping[str, Any]) -> None:
        assert self.out is not None
        runs.truncate_jsonl(self.out / LINES, saved["lines"])
        first, *records = runs.read_jsonl(self.out / LINES)
        self.uniform = _trial(first) if first["policy"] is not None else None
        self.history = [_trial(record) for record in records]
        self.problem.recall(saved["memory"])
        self.steps, self.lines, self.earlier, self.finished = saved["step"], saved["lines"], saved["seconds"], saved["finished"]
        self.told = self.history[-1] if saved["told"] else None
        self.passes = self.problem.sample_passes - saved["sample_passes"]
        devices = iter(saved["devices"])
        fields = map_tensors(saved["state"], lambda tensor: tensor.to(next(devices)))
        try:
            self.state = type(self.state)(**fields)
        except TypeError as error:  # written by another version of the method, whose state had other fields
            begun = f"its search was begun by another version of '{self.method.name}'"
            raise RunError(f"{self.out}: {begun} ({error}); give another --out") from None

    def _uniform_point(self) -> None:
        policy = self.problem.uniform()
        if policy is None:
            self._write({"step": 0, "uniform": True, "policy": None})
            return
        loss = self._ask(policy, "the uniform policy")
        self.uniform = Trial(0, policy, policy, self.problem.costs(policy), loss, repaired=False, seconds=self.elapsed())
        self._write({"uniform": True, **_record(self.uniform)})

    def advance(self) -> Status | None:
        """Take one step; return "done" if it was the method's last."""
        with _seeded(self.problem, self.steps + 1):
            answer = self.method.step(self.problem, self.state, self.told)
            self.steps += 1
            self.state, proposal = self._checked(answer)
            done = self.method.done(self.problem, self.state)
        self.told = None if proposal is None else self._dispose(proposal, last=done)
        if done and not self.history:
            raise PolicyError(f"method '{self.method.name}' was done after {self.steps} steps without a proposal; let step() return one")
        self.finished = "done" if done else None
        return self.finished

    def _checked(self, answer: Any) -> tuple[Any, Proposal | None]:
        """Return the state and the proposal of a step; raises `TypeError` for anything else."""
        if isinstance(answer, tuple) and len(answer) == 2 and (answer[1] is None or isinstance(answer[1], Proposal)):
            self._check_state(answer[0], "step()")
            return answer
        shown = f"({', '.join(type(part).__name__ for part in answer)})" if isinstance(answer, tuple) else type(answer).__name__
        where = f"method '{self.method.name}', step {self.steps}"
        raise TypeError(f"{where}: step() returned {shown}; let it return a tuple of the state and a Proposal or None")

    def _check_state(self, state: Any, who: str) -> None:
        if not dataclasses.is_dataclass(state) or isinstance(state, type):
            kind = type(state).__name__
            raise TypeError(f"method '{self.method.name}': its state is a {kind}; let {who} return a dataclass of tensors and numbers")

    def _dispose(self, proposal: Proposal, *, last: bool) -> Trial:
        """Check, repair, evaluate and write down a proposal."""
        try:
            proposed = self.problem.policy(self.problem.index(proposal.policy))
        except PolicyError as error:
            raise PolicyError(f"method '{self.method.name}', step {self.steps}: {error}") from None
        policy = repair(proposed, self.problem)
        loss = math.nan
        if self.method.ranking == "loss" or last or proposal.evaluate or self.ask_all:
            loss = self._ask(policy, f"the policy of step {self.steps}")
        trial = Trial(self.steps, proposed, policy, self.problem.costs(policy), loss, policy != proposed, self.elapsed())
        self.history.append(trial)
        self._write(_record(trial) | _extras(proposal))
        return trial

    def _ask(self, policy: Policy, which: str) -> float:
        with _seeded(self.problem, self.steps):
            loss = self.problem.loss(policy)
        if not math.isfinite(loss):
            raise TrainingError(
                f"search: the loss of {which} is {loss} ({_spelled(policy)}); it must be a finite number: look for overflow in the "
                "network, or return a large finite loss for a policy that cannot be used"
            )
        return loss

    def _write(self, record: dict[str, Any]) -> None:
        if self.out is not None:
            runs.append_jsonl(self.out / LINES, record)
        self.lines += 1
        if self.log is not None:
            self.log(record)

    def _fingerprint(self) -> dict[str, Any]:
        kind = type(self.method)
        options = {f.name: getattr(self.method, f.name) for f in dataclasses.fields(self.method)}  # type: ignore[arg-type]
        parts = {"method": f"{kind.__module__}:{kind.__qualname__}", "options": options, "problem": self.problem.fingerprint()}
        source = source_digest(kind)
        if source is not None:  # a method of somebody's own may be edited between two searches
            parts["source"] = source
        known: dict[str, Any] = json.loads(json.dumps(parts, default=repr))
        return known

    def save(self) -> None:
        """Write the state; the lines it counts are on the disk before it is."""
        if self.out is None:
            return
        with (self.out / LINES).open("rb") as file:
            os.fsync(file.fileno())
        state = {f.name: getattr(self.state, f.name) for f in dataclasses.fields(self.state)}
        devices: list[str] = []
        map_tensors(state, lambda tensor: devices.append(str(tensor.device)))
        position = {"step": self.steps, "lines": self.lines, "told": self.told is not None, "finished": self.finished}
        spent = {"seconds": self.elapsed(), "sample_passes": self.sample_passes()}
        known = {"devices": devices, "state": state, "memory": self.problem.memory()}
        tree = {"fingerprint": self.identity, **position, **spent, **known}
        keep(self.out, self.steps, tree)

    def result(self, status: Status, *, never_worse: bool) -> Result:
        """Rank the trials, and write the winner's policy."""
        winner = self._winner(status)
        if never_worse and self.uniform is not None and self.uniform.loss < winner.loss:
            winner = self.uniform
        if self.out is not None:
            runs.write_text_atomic(self.out / "policy.json", winner.policy.to_json() + "\n")
            for name, text in self.method.files(self.problem, self.state).items() if status == "done" else ():
                runs.write_text_atomic(self.out / name, text)
        front = pareto_front(self.history)
        spent = (self.steps, self.elapsed(), self.sample_passes())
        return Result(winner.policy, winner.loss, winner.costs, tuple(self.history), front, self.uniform, status, *spent)

    def _winner(self, status: Status) -> Trial:
        if not self.history:
            policy = self.uniform.policy if self.uniform is not None else repair(self.problem.cheapest(), self.problem)
            winner = Trial(0, policy, policy, self.problem.costs(policy), math.nan, repaired=False, seconds=self.elapsed())
        elif self.method.ranking == "loss":
            winner = min(self.history, key=lambda trial: trial.loss)
        else:
            fitting = [trial for trial in self.history if not trial.repaired]
            winner = fitting[-1] if fitting and status != "done" else self.history[-1]
        if math.isnan(winner.loss):
            winner = dataclasses.replace(winner, loss=self._ask(winner.policy, f"the policy of step {winner.step}"))
        return winner


def pareto_front(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Return the evaluated trials that no other beats in every cost and in loss, by rising cost; of equal ones the first."""
    points: dict[tuple[float, ...], Trial] = {}
    for trial in trials:
        if not math.isnan(trial.loss):
            points.setdefault((*trial.costs, trial.loss), trial)
    front: list[tuple[float, ...]] = []
    for point in sorted(points):  # whatever beats a point comes before it in this order
        if not any(all(a <= b for a, b in zip(other, point, strict=True)) for other in front):
            front.append(point)
    return tuple(points[point] for point in front)


# ---- determinism and Ctrl-C


@contextmanager
def _seeded(problem: Problem, step: int) -> Iterator[None]:
    """Run with torch's global generators seeded by the problem and the step, and put them back afterwards."""
    devices = {p.device for p in problem.model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index or 0 for device in devices)):
        torch.manual_seed((problem.seed * 1_000_003 + step) % 2**63)
        yield


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C wait for the end of the step, so that its state can be saved; a second one does not wait."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        # Someone else's handler (a server's, a notebook's) stays: a KeyboardInterrupt from it is caught in any case.
        ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if ours:
            signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: signals do not come here
        ours = False
    try:
        yield lambda: bool(asked)
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


# ---- what is on disk


def _record(trial: Trial) -> dict[str, Any]:
    policies = {"proposed": _plain(trial.proposed), "policy": _plain(trial.policy)}
    return {
        "step": trial.step,
        **policies,
        "costs": list(trial.costs),
        "loss": trial.loss,
        "repaired": trial.repaired,
        "seconds": trial.seconds,
    }


def _extras(proposal: Proposal) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if proposal.expected is not None:
        extras["expected"] = [float(value) for value in proposal.expected]
    if proposal.gates is not None:
        extras["gates"] = {site: [float(value) for value in gate] for site, gate in proposal.gates.items()}
    if proposal.note is not None:
        extras["note"] = {name: float(value) for name, value in proposal.note.items()}
    return extras


def _trial(record: Mapping[str, Any]) -> Trial:
    proposed, policy = (Policy({name: Bits(*bits) for name, bits in record[key].items()}) for key in ("proposed", "policy"))
    loss = math.nan if record["loss"] is None else record["loss"]
    return Trial(record["step"], proposed, policy, tuple(record["costs"]), loss, record["repaired"], record["seconds"])


def _plain(policy: Policy) -> dict[str, list[int]]:
    return {name: list(bits) for name, bits in policy.items()}


def _spelled(policy: Policy) -> str:
    text = ", ".join(f"{name}={bits!r}" for name, bits in policy.items())
    return text if len(text) <= 400 else text[:397] + "…"
