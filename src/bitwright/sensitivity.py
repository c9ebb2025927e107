"""Sensitivities: what every choice of every site adds to the loss, measured once and solved again for any budget.

The total loss is taken to be the sum over the sites, each changed alone, so the best policy within any budgets is an integer program
(`bitwright.allocation`). Whether that sum is true of a network can be checked: `bitwright.additivity`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bitwright import runs
from bitwright.allocation import allocate
from bitwright.driver import Proposal, SearchMethod, Trial
from bitwright.errors import RunError
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem, digest, identity
from bitwright.quant import QuantOptions

FORMAT = "bitwright-sensitivity-2"
FORMER = "bitwright-sensitivity-1"
"""Of tables without a digest: nobody can tell whether they were changed."""
FILE = "sensitivity.json"
"""What a search by a `ScoredMethod` leaves in its run directory."""
PARTS = {"model": "another network", "data": "other data", "quantizer": "another quantizer", "options": "other options"}
"""What a table must share with the problem that it is used on, and what is said of one that does not."""


@dataclass(frozen=True)
class Sensitivity:
    """A table of loss increases, one site changed at a time.

    Attributes:
        measure: name of the method that scored.
        values: per site, the increase of the loss by each choice; lower is better.
        fingerprint: what the values depend on: network, data, quantizer, the method's options, and the layers of each site.
        sample_passes: images that measuring passed through a network (`Problem.spend`).
    """

    measure: str
    values: Mapping[str, Mapping[Bits, float]]
    fingerprint: Mapping[str, Any]
    sample_passes: int = 0

    @classmethod
    def of(cls, problem: Problem, method: ScoredMethod, scores: Mapping[str, Tensor], sample_passes: int = 0) -> Sensitivity:
        """Return the table of scores just taken."""
        columns = {name: [float(value) for value in scores[name]] for name in problem.choices}
        values = {name: dict(zip(allowed, columns[name], strict=True)) for name, allowed in problem.choices.items()}
        return cls(method.name, values, fingerprint(problem, method), sample_passes)

    def scores(self, problem: Problem, where: str = "sensitivity table") -> dict[str, Tensor]:
        """Return the values of a problem's choices, float64 ``[choices]`` per site.

        Raises:
            RunError: the table holds no value of one of them.
        """
        for name, allowed in problem.choices.items():
            known = self.values.get(name, {})
            lacking = next((bits for bits in allowed if bits not in known), None)
            if lacking is not None:
                listed = ", ".join(map(repr, known)) or "no choice at all"
                raise RunError(
                    f"{where}: measured on other choices: site '{name}' has {listed}, and not {lacking!r}; {_mend(self.measure)}"
                )
        return {n: torch.tensor([self.values[n][bits] for bits in allowed], dtype=torch.float64) for n, allowed in problem.choices.items()}

    def solve(self, problem: Problem) -> Policy:
        """Return the policy of least summed value within the problem's budgets, exactly and without a pass through the network.

        Raises:
            RunError: the table is stale (see `check`).
            BudgetError: no policy keeps the budgets.
        """
        self.check(problem)
        return solve(problem, self.scores(problem))

    def predict(self, policy: Mapping[str, Bits]) -> float:
        """Return the loss that the table foretells for a policy: the sum of its values.

        >>> Sensitivity("kl", {"a": {Bits(2, 8): 0.5}, "b": {Bits(4, 8): 0.25}}, {}).predict({"a": Bits(2, 8), "b": Bits(4, 8)})
        0.75
        """
        return sum(self.values[name][bits] for name, bits in policy.items())

    def check(self, problem: Problem, method: ScoredMethod | None = None, where: str = "sensitivity table") -> None:
        """Raise `RunError` unless the table tells of this problem; the message names what differs.

        Sites and choices that the problem does not have do no harm: the table was measured one site at a time.

        Args:
            problem: whose network, data and sites must be those that the table was measured on.
            method: also compare how it was measured: measure, options and quantizer.
            where: what the message calls the table.
        """
        if method is not None and self.measure != method.name:
            raise RunError(f"{where}: holds '{self.measure}', and '{method.name}' was asked for; {_mend(method.name)}")
        now = fingerprint(problem, method)
        for part, others in PARTS.items():
            if part in now and self.fingerprint.get(part) != now[part]:
                what = runs.difference(part, self.fingerprint.get(part), now[part])
                raise RunError(f"{where}: stale, measured on {others}: {what}; {_mend(self.measure)}")
        for name, layers in now["sites"].items():
            was = self.fingerprint.get("sites", {}).get(name)
            if was != layers:
                raise RunError(
                    f"{where}: stale, measured on other sites: {runs.difference(f'site {name}', was, layers)}; {_mend(self.measure)}"
                )
        if method is not None and method.joint and self.fingerprint.get("choices") != now["choices"]:
            what = runs.difference("choices", self.fingerprint.get("choices"), now["choices"])
            raise RunError(f"{where}: stale, measured on other choices: {what}; {_mend(self.measure)}")

    def to_json(self) -> str:
        """Return the table as JSON text; `load` reads it back from a file."""
        values = {site: {repr(bits): value for bits, value in row.items()} for site, row in self.values.items()}
        content = {"measure": self.measure, "sample_passes": self.sample_passes, "fingerprint": self.fingerprint, "values": values}
        return json.dumps({"format": FORMAT, "digest": _digest(content), **content}, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the table to a JSON file, atomically."""
        runs.write_text_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what `save` wrote; raises `RunError` for anything else, and for a table that was changed since."""
        try:
            content = json.loads(Path(path).read_text("utf-8"))
            if content["format"] not in (FORMAT, FORMER):
                raise ValueError(f"format {content['format']!r}, expected '{FORMAT}'")
            values = {str(site): {parse_bits(text): float(value) for text, value in row.items()} for site, row in content["values"].items()}
            fault = _fault(content, values)
            if fault is not None:
                raise RunError(f"table {path}: {fault}; {_mend(content['measure'])}")
            return cls(str(content["measure"]), values, dict(content["fingerprint"]), int(content["sample_passes"]))
        except OSError as error:
            raise RunError(f"table {path}: cannot be read ({error.strerror}); give a file that `bitwright profile --save` wrote") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            found = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
            raise RunError(
                f"table {path}: no table of sensitivities ({found}); give a file that `bitwright profile --save` wrote"
            ) from None


def solve(problem: Problem, scores: Mapping[str, Tensor]) -> Policy:
    """Return the policy of least total score within the problem's budgets."""
    return problem.policy(allocate([scores[name].numpy() for name in problem.choices], problem.terms, problem.limits, problem.borders))


def fingerprint(problem: Problem, method: ScoredMethod | None) -> dict[str, Any]:
    """Return what a table of this problem depends on, as JSON-able parts; without a method what it does not decide."""
    data = problem.data if problem.has_data else None
    parts: dict[str, Any] = {
        "model": digest(problem.model)[:16],
        "data": data and {"fit": identity(data.fit), "selection": identity(data.selection)},
        "sites": {site.name: list(site.layers) for site in problem.sites},
    }
    if method is not None:
        options = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name != "table"}
        parts |= {"quantizer": method.quantizer(), "options": options, "seed": problem.seed}
        parts["choices"] = {name: [list(bits) for bits in allowed] for name, allowed in problem.choices.items()}
    plain: dict[str, Any] = json.loads(json.dumps(parts, default=repr))
    return plain


def _fault(content: Mapping[str, Any], values: Mapping[str, Mapping[Bits, float]]) -> str | None:
    """Return why the values of a table are not those that were measured, if that is so."""
    for site, row in values.items():
        for bits, value in row.items():
            if not math.isfinite(value):
                return f"the value of site '{site}' at {bits!r} is {value}, not a finite number"
    if content["format"] == FORMER:
        return "written by an earlier version, which does not show whether it was changed"
    if content["digest"] != _digest({name: part for name, part in content.items() if name not in ("format", "digest")}):
        return "changed by hand since it was measured (its digest does not match)"
    return None


def _digest(content: Mapping[str, Any]) -> str:
    """Return the digest of a table's content."""
    return runs.fingerprint(content)[:16]


def other_quantizer(options: QuantOptions) -> str | None:
    """Return what is to be known where a policy will be quantized otherwise than sensitivities are measured; None where alike.

    Like the loss of a policy, they are taken with one reference quantizer, the default `QuantOptions`; points are no sites.

    >>> other_quantizer(QuantOptions(points=("add",)))
    >>> other_quantizer(QuantOptions(rule="minmax")).partition(",")[0]
    'Sensitivities are measured with the reference quantizer'
    """
    changed = [f"{f.name}={getattr(options, f.name)}" for f in dataclasses.fields(QuantOptions) if f.name != "points"]
    reference = [f"{f.name}={f.default}" for f in dataclasses.fields(QuantOptions) if f.name != "points"]
    others = ", ".join(text for text, usual in zip(changed, reference, strict=True) if text != usual)
    if not others:
        return None
    way = "the order of choices may be another there, so look at the policy after fine-tuning (`bitwright compare`)"
    return f"Sensitivities are measured with the reference quantizer, and the recipe quantizes with {others}: {way}."


def parse_bits(text: str) -> Bits:
    """Read bits as they are written; raises `ValueError` for anything else.

    >>> parse_bits("W2A32")
    W2A32
    """
    match = re.fullmatch(r"W(\d+)A(\d+)", text)
    if match is None:
        raise ValueError(f"'{text}' is no choice such as W4A8")
    return Bits(int(match[1]), int(match[2]))


def _mend(measure: str) -> str:
    return f"measure it anew with `bitwright profile TARGET --sensitivity --measure {measure} --save FILE`, or leave out table"


# ---- methods that score


@dataclass
class Scores:
    """The state of a `ScoredMethod`: per site one number per choice, once they are known, and what measuring them took."""

    scores: dict[str, Tensor] = field(default_factory=dict)
    sample_passes: int = 0


@dataclass(frozen=True)
class ScoredMethod(SearchMethod[Scores]):
    """A method that scores every choice of every site, adds the scores up, and allocates exactly.

    Attributes:
        table: file of sensitivities that this method measured earlier (`sensitivity.json` of a run, or `bitwright profile
            --save`), to be used instead of measuring anew; a stale one is refused.
    """

    ranking: ClassVar[Literal["loss", "last"]] = "loss"
    joint: ClassVar[bool] = False
    """Whether the score of a choice depends on which other choices there are."""

    table: str | None = field(default=None, kw_only=True)

    @abstractmethod
    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return the loss increase of every choice, float64 ``[choices]`` per site; the problem is left as it was."""

    def quantizer(self) -> Mapping[str, Any]:
        """Return what the scores assume of the quantizer, as JSON-able data."""
        return dataclasses.asdict(QuantOptions())

    def sensitivity(self, problem: Problem) -> Sensitivity:
        """Return the table of a problem: read from `table` where that is given, else measured.

        Raises:
            RunError: the file is no table, or a stale one.
        """
        if self.table is None:
            before = problem.sample_passes
            scores = self.scores(problem)
            return Sensitivity.of(problem, self, scores, problem.sample_passes - before)
        found = Sensitivity.load(self.table)
        found.check(problem, self, f"table {self.table}")
        return found

    def start(self, problem: Problem) -> Scores:
        """Return the state before any score."""
        return Scores()

    def step(self, problem: Problem, state: Scores, told: Trial | None) -> tuple[Scores, Proposal | None]:
        """Score every choice and propose the policy of least total score within the budgets."""
        table = self.sensitivity(problem)
        state.scores, state.sample_passes = table.scores(problem, f"table {self.table}"), table.sample_passes
        return state, Proposal(solve(problem, state.scores))

    def done(self, problem: Problem, state: Scores) -> bool:
        """Say whether the proposal was made."""
        return bool(state.scores)

    def files(self, problem: Problem, state: Scores) -> Mapping[str, str]:
        """Leave the table for later budgets."""
        return {FILE: Sensitivity.of(problem, self, state.scores, state.sample_passes).to_json()}
