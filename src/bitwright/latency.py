r"""Measured latency as a cost: what each layer and choice takes on a target's runtime, on the machine at hand.

Layers are not timed alone: what one takes depends on its neighbours, because a change between integers and floating point costs
time of its own and fused operations cost none. Whole networks are timed instead, at random policies, and

.. math:: T(\pi) \approx T_0 + \sum_i t_i(c_i(\pi)) + b \sum_i [c_i(\pi) \ne c_{i+1}(\pi)]

is fitted by non-negative least squares, where a class c is what the target runs a pair of widths as (``int8``, ``bf16``, …), and b is
what a border between two sites that run one after the other costs. Terms are drawn towards a share of the uniform networks' times in
proportion to multiply-accumulates. As a cost, a table is this prediction: a budget counts the borders that each policy has. How well
whole networks are predicted is judged on policies that nothing was fitted on, and kept in the table.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear
from torch import Tensor, nn

from bitwright.costs import Cost, Pair
from bitwright.errors import BudgetError, TargetError
from bitwright.policy import Bits, Policy
from bitwright.runs import versions, write_text_atomic
from bitwright.sites import Site, Trace
from bitwright.targets import Target

FORMAT = "bitwright-latency-1"
FILE = "latency.json"
SECONDS = 0.1
"""For how long a network is run in one turn."""
TURNS = 3
"""Turns that every network gets; those of different networks alternate."""
SHRINKAGE = 0.3
"""Standard deviation of a term about its prior, as a share of the prior, where measurements are exact to `NOISE`."""
NOISE = 0.02
"""Standard deviation of a measurement, as a share of it."""
COMPARED = ("processor", "features", "runtime")
"""What two machines have in common if a table of one holds for the other."""
RUNTIMES = ("openvino", "onnxruntime")
"""What measures latencies."""
T = TypeVar("T")
Floats = NDArray[np.float64]
Classes = Mapping[str, Mapping[Bits, str]]
"""By site, what the target runs each pair of widths as."""


@dataclass(frozen=True)
class Timing:
    """How long one network took, in nanoseconds: the tenth percentile of its runs, the fastest one, their median, and how many.

    The tenth percentile stands for the network: what else the machine does makes a run longer, and never shorter.
    """

    policy: Policy
    typical: int
    low: int
    high: int
    runs: int

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        sites = {name: list(bits) for name, bits in self.policy.items()}
        return {"policy": sites, "typical": self.typical, "fastest": self.low, "median": self.high, "n": self.runs}


@dataclass(frozen=True)
class Table(Cost):
    """A latency table, and the cost that it is: call it as ``table(site, bits)``.

    Attributes:
        target: name and version of the target.
        machine: what the times hold for.
        base: nanoseconds of what no site is charged for.
        terms: nanoseconds by site and class.
        classes: by site, the class of every pair of widths.
        macs: by site, multiply-accumulates of a sample: whether it is of this network at this input size.
        fitted: the timings that the terms are fitted on.
        judged: timings beside predictions of policies that nothing was fitted on.
        border: nanoseconds of a change of class between two sites that run one after the other.
    """

    name: ClassVar[str] = "latency"
    unit: ClassVar[str] = "ns"
    suffixes: ClassVar[Mapping[str, int]] = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}

    target: str
    machine: Mapping[str, Any] = field(hash=False)
    base: int
    terms: Mapping[str, Mapping[str, int]] = field(hash=False)
    classes: Mapping[str, Mapping[Bits, str]] = field(hash=False)
    macs: Mapping[str, int] = field(hash=False)
    fitted: tuple[Timing, ...] = field(default=(), hash=False)
    judged: tuple[Timing, ...] = field(default=(), hash=False)
    border: int = 0

    @property
    def fixed(self) -> int:
        """What is spent whatever the policy says."""
        return self.base

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The sites that run one after the other, and what a border between them costs."""
        neighbours = itertools.pairwise(self.classes.items())
        return tuple(Pair((a, b), (left, right), self.border) for (a, left), (b, right) in neighbours)

    def __call__(self, site: Site, bits: Bits) -> int:
        """Return the nanoseconds of a site at a pair of widths."""
        if site.name not in self.terms:
            raise BudgetError(
                f"latency: the table has no site '{site.name}'; measure this network: bitwright profile --target NAME --measure"
            )
        if bits not in self.classes[site.name]:
            raise BudgetError(
                f"latency: {self.target} does not run '{site.name}' at {bits!r}; give --target, which leaves such choices out"
            )
        return self.terms[site.name][self.classes[site.name][bits]]

    def in_float(self, sites: Sequence[Site]) -> int:  # type: ignore[override]
        """Return the time with every site at its slowest, borders left out: the whole of a budget in percent."""
        return self.fixed + sum(max(self.terms[site.name].values()) for site in sites)

    def check(self, sites: Sequence[Site]) -> None:
        """Raise `BudgetError` unless the table is of these sites at these sizes."""
        for site in sites:
            if self.macs.get(site.name) != site.macs:
                found = f"{self.macs[site.name]:,}" if site.name in self.macs else "no"
                ask = "it is of another network or input size; measure again"
                raise BudgetError(f"latency: the table has {found} MACs for site '{site.name}', which has {site.macs:,} here; {ask}")

    def elsewhere(self) -> str | None:
        """Return a sentence that names both machines where the table's is not this one, by processor, features or runtime; else None."""
        runtime = str(self.machine.get("runtime", "")).partition(" ")[0]
        here = fingerprint(runtime)
        if all(self.machine.get(part) == here[part] for part in COMPARED):
            return None
        machines = f"another machine ({_machine_text(self.machine)}) than this one ({_machine_text(here)})"
        return f"The latency table was measured on {machines}: its predictions, and budgets on latency, hold for that one."

    def covers(self, policy: Mapping[str, Bits]) -> bool:
        """Return whether all of a policy's widths were measured."""
        return all(bits in self.classes.get(name, ()) for name, bits in policy.items())

    def predict(self, policy: Mapping[str, Bits]) -> int:
        """Return the nanoseconds of a whole network with the borders that it has; raises `BudgetError` for widths not in the table."""
        if not self.covers(policy):
            name = next(name for name, bits in policy.items() if bits not in self.classes.get(name, ()))
            raise BudgetError(f"latency: {self.target} was not measured with '{name}' at {policy[name]!r}; measure again with these widths")
        terms = sum(self.terms[name][self.classes[name][bits]] for name, bits in policy.items())
        return self.base + terms + self.border * count_borders(self.classes, policy)

    def errors(self) -> list[float]:
        """Return how far each judged prediction is off, as a share of the measurement."""
        return [abs(self.predict(timing.policy) / timing.typical - 1) for timing in self.judged]

    def spread(self) -> dict[str, Any]:
        """Return how sure base, border and every term are (`spreads`); empty for a table that says no timings that it was fitted on."""
        return spreads(self.macs, self.classes, self.fitted) if self.fitted else {}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values; `load` reads them back."""
        classes = {name: {f"{b.w},{b.a}": kind for b, kind in known.items()} for name, known in self.classes.items()}
        facts: dict[str, Any] = {"format": FORMAT, "unit": "ns", "clock": "wall, one thread, tenth percentile of the runs", "batch": 1}
        facts |= {"target": self.target, "machine": dict(self.machine)}
        errors = self.errors()
        judged = {"median_error": float(np.median(errors)), "worst_error": max(errors), "policies": len(errors)} if errors else None
        terms = {name: dict(known) for name, known in self.terms.items()}
        timings = {"fitted": [t.to_dict() for t in self.fitted], "judged": [t.to_dict() for t in self.judged]}
        facts |= {"base": self.base, "border": self.border, "macs": dict(self.macs)}
        return {**facts, "terms": terms, "spread": self.spread(), "classes": classes, "prediction": judged, **timings}

    def save(self, path: str | Path) -> None:
        """Write the table to a JSON file."""
        write_text_atomic(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """Read what `save` wrote; raises `BudgetError` for anything else."""
        try:
            data = json.loads(Path(path).read_text("utf-8"))
            for key, wanted in (("format", FORMAT), ("unit", "ns")):
                if data[key] != wanted:
                    raise BudgetError(f"latency: {path}: its {key} is {data[key]!r}, expected '{wanted}'; measure again")
            classes = {
                name: {Bits(*map(int, key.split(","))): str(kind) for key, kind in known.items()} for name, known in data["classes"].items()
            }
            terms = {
                name: {str(kind): _whole(ns, f"the term of '{name}' as {kind}") for kind, ns in known.items()}
                for name, known in data["terms"].items()
            }
            fitted, judged = (tuple(_timing(entry) for entry in data[part]) for part in ("fitted", "judged"))
            base, border = (_whole(data[part], part) for part in ("base", "border"))
            macs = {str(name): _whole(count, f"the MACs of '{name}'") for name, count in data["macs"].items()}
            table = cls(str(data["target"]), dict(data["machine"]), base, terms, classes, macs, fitted, judged, border)
        except OSError as error:
            ask = "measure one: bitwright profile --target NAME --measure"
            raise BudgetError(f"latency: no table in {path} ({error.strerror}); {ask}") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise BudgetError(f"latency: {path} is no latency table ({type(error).__name__}: {str(error)[:120]}); measure again") from None
        gap = table._gap()
        if gap is not None:
            raise BudgetError(f"latency: {path}: {gap}; measure again")
        return table

    def _gap(self) -> str | None:
        """Return what the parts of a table do not say of each other; None where they agree."""
        if not any(self.machine.get(part) for part in COMPARED):
            return f"names no machine by {', '.join(COMPARED)}"
        for part, known in (("terms", self.terms), ("macs", self.macs)):
            odd = sorted(set(known) ^ set(self.classes))
            if odd:
                return f"'{odd[0]}' is in its {part} or its classes, and not in both"
        untimed = [(name, kind) for name, known in self.classes.items() for kind in known.values() if kind not in self.terms[name]]
        if untimed:
            return "it has no term of '{}' as {}, which its classes name".format(*untimed[0])
        if any(set(t.policy) != set(self.classes) or not self.covers(t.policy) for t in (*self.fitted, *self.judged)):
            return "a network that it was fitted or judged on has other sites or widths than its classes"
        return None


def _whole(value: object, what: str, least: int = 0) -> int:
    """Return a whole number from ``least`` on; raises `ValueError` for anything else, such as the Infinity that JSON may hold."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what} is {value!r}, expected a whole number from {least}")
    return value


def _timing(entry: Mapping[str, Any]) -> Timing:
    policy = Policy({name: (int(w), int(a)) for name, (w, a) in entry["policy"].items()})
    typical, low, high, runs = (_whole(entry[part], f"'{part}' of a network", 1) for part in ("typical", "fastest", "median", "n"))
    return Timing(policy, typical, low, high, runs)


def fingerprint(runtime: str) -> dict[str, Any]:
    """Return what a latency table holds for: processor, its features, threads, runtime and versions."""
    text = Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").is_file() else ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in lines.items()}
    wanted = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    features = [flag for flag in wanted if flag in known.get("flags", "").split()]
    facts = {"processor": known.get("model name", platform.processor()), "features": features, "cores": os.cpu_count(), "threads": 1}
    return {**facts, "system": platform.system(), "runtime": f"{runtime} {_version(runtime)}", "versions": versions()}


def _version(runtime: str) -> str:
    if runtime not in RUNTIMES or importlib.util.find_spec(runtime) is None:
        return "not installed"
    return str(importlib.import_module(runtime).__version__)


def _machine_text(machine: Mapping[str, Any]) -> str:
    features = " ".join(machine.get("features") or ()) or "no known features"
    return f"{machine.get('processor') or 'unknown processor'}, {features}, {machine.get('runtime') or 'unknown runtime'}"


# ---- measuring


def measure_table(
    model: nn.Module,
    trace: Trace,
    example: Tensor,
    target: Target,
    choices: Mapping[str, Sequence[Bits]],
    *,
    policies: int | None = None,
    judged: int = 0,
    seed: int = 0,
    log: Callable[[str], None] | None = None,
) -> Table:
    """Time random policies of a network on a target's runtime and fit a table.

    Args:
        model: the float network; its weights do not matter.
        trace: its sites.
        example: an input; one sample of it is run.
        target: whose runtime measures; its ``latency`` says which.
        choices: the widths that each site may have.
        policies: how many are timed to fit on, beside the uniform ones; by default two for each site that has classes to choose from.
        judged: further policies that the table is judged on.
        seed: of the policies.
        log: told what is being measured.

    Raises:
        TargetError: nothing here measures for the target.
    """
    from bitwright.timing import Stopwatch  # noqa: PLC0415  (needs the extras of the runtimes)

    if target.latency is None:
        raise TargetError(f"target {target.name}: {_unmeasured(target)}; take openvino-x86 or onnxruntime-x86")
    classes = {
        site.name: {bits: str(target.runs(site, bits)) for bits in choices[site.name] if target.runs(site, bits)} for site in trace.sites
    }
    free = [name for name, known in classes.items() if len(set(known.values())) > 1]
    rng = np.random.default_rng(seed)
    count = max(8, 2 * len(free)) if policies is None else policies
    drawn = [*uniform_policies(classes), *(random_policy(classes, rng) for _ in range(count + judged))]
    stopwatch = Stopwatch(model, trace, example, target)
    timings = stopwatch.time(drawn, SECONDS, TURNS, log)
    fitted, held = timings[: len(timings) - judged], timings[len(timings) - judged :]
    base, border, terms = fit(trace.sites, classes, fitted)
    macs = {site.name: site.macs for site in trace.sites}
    return Table(named(target), fingerprint(target.latency), base, terms, classes, macs, tuple(fitted), tuple(held), border)


def named(target: Target) -> str:
    """Return a target's name and version."""
    return f"{target.name} version {target.version}"


def uniform_policies(classes: Mapping[str, Mapping[Bits, str]]) -> list[Policy]:
    """Return for each class the policy of it wherever it is, and of the site's first choice elsewhere."""
    kinds = dict.fromkeys(kind for known in classes.values() for kind in known.values())
    return [Policy((name, _of(known, kind)) for name, known in classes.items()) for kind in kinds]


def _of(known: Mapping[Bits, str], kind: str) -> Bits:
    return next((bits for bits, own in known.items() if own == kind), next(iter(known)))


def random_policy(classes: Mapping[str, Mapping[Bits, str]], rng: np.random.Generator) -> Policy:
    """Draw a policy: first how much of each class, then the class of each site, so that rare mixtures come too."""
    kinds = list(dict.fromkeys(kind for known in classes.values() for kind in known.values()))
    shares = dict(zip(kinds, rng.dirichlet(np.ones(len(kinds))), strict=True))
    entries = []
    for name, known in classes.items():
        own = list(dict.fromkeys(known.values()))
        weights = np.array([shares[kind] for kind in own])
        entries.append((name, _of(known, own[int(rng.choice(len(own), p=weights / weights.sum()))])))
    return Policy(entries)


def count_borders(classes: Classes, policy: Mapping[str, Bits]) -> int:
    """Return how often the class changes from one site to the next."""
    kinds = [known[policy[name]] for name, known in classes.items()]
    return sum(a != b for a, b in itertools.pairwise(kinds))


def fit(sites: Sequence[Site], classes: Classes, timings: Sequence[Timing]) -> tuple[int, int, dict[str, dict[str, int]]]:
    """Return (base, border, terms) of least squared relative error, each term drawn towards its prior; none is below zero.

    Args:
        sites: with their multiply-accumulates.
        classes: by site, the class of every pair of widths.
        timings: of whole networks.
    """
    rows, wanted, keys = _system({site.name: site.macs for site in sites}, classes, timings)
    solution = lsq_linear(rows, wanted, bounds=(0, np.inf)).x
    values = [round(float(value)) for value in solution]
    return values[-1], values[-2], _by_site(keys, values)


def spreads(macs: Mapping[str, int], classes: Classes, timings: Sequence[Timing]) -> dict[str, Any]:
    """Return for ``base``, ``border`` and by site and class for ``terms`` a standard error in ns and in how many networks each one is.

    The errors are the roots of s^2 (A'A)^-1 of the least squares that `fit` solves, with s^2 the squared residuals per timing: how far
    a term may be from what it is fitted as, the pull towards the prior counted as a measurement. What timings cannot tell apart, such
    as the base from terms that every network has, so has a large one. That nothing is below zero is left out.

    Args:
        macs: by site, multiply-accumulates.
        classes: by site, the class of every pair of widths.
        timings: the networks that were fitted on.
    """
    rows, wanted, keys = _system(macs, classes, timings)
    residual = rows @ lsq_linear(rows, wanted, bounds=(0, np.inf)).x - wanted
    errors = np.sqrt(residual @ residual / len(timings) * np.square(np.linalg.pinv(rows)).sum(1))
    counts = np.count_nonzero(rows[: len(timings)], axis=0)
    found = [{"standard_error": round(float(error)), "n": int(count)} for error, count in zip(errors, counts, strict=True)]
    return {"base": found[-1], "border": found[-2], "terms": _by_site(keys, found)}


def _by_site(keys: Sequence[tuple[str, str]], values: Sequence[T]) -> dict[str, dict[str, T]]:
    """Return what belongs to sites and classes, and not to border and base, by site."""
    terms: dict[str, dict[str, T]] = {}
    for (name, kind), value in zip(keys, values, strict=False):
        terms.setdefault(name, {})[kind] = value
    return terms


def _system(macs: Mapping[str, int], classes: Classes, timings: Sequence[Timing]) -> tuple[Floats, Floats, list[tuple[str, str]]]:
    """Return rows and right-hand side of the least squares, the timings before the prior, and the columns before border and base."""
    keys = [(name, kind) for name, known in classes.items() for kind in dict.fromkeys(known.values())]
    place = {key: k for k, key in enumerate(keys)}
    design = np.zeros((len(timings), len(keys) + 2))
    design[:, -1] = 1
    for row, timing in enumerate(timings):
        design[row, -2] = count_borders(classes, timing.policy)
        for name, bits in timing.policy.items():
            design[row, place[name, classes[name][bits]]] = 1
    wanted = np.array([timing.typical for timing in timings], dtype=np.float64)
    prior = _prior(macs, classes, keys, timings)
    weights = 1 / (NOISE * wanted)
    pull = 1 / (SHRINKAGE * np.maximum(prior, prior.sum() / len(prior) / 5))
    pull[-2:] /= 100  # nothing is known of borders and base beforehand
    rows = np.concatenate([design * weights[:, None], np.diag(pull)])
    return rows, np.concatenate([wanted * weights, prior * pull]), keys


def _prior(
    work: Mapping[str, int], classes: Mapping[str, Mapping[Bits, str]], keys: Sequence[tuple[str, str]], timings: Sequence[Timing]
) -> Floats:
    """Return a share of the time of the network that is most of a class, by multiply-accumulates; a tenth is nobody's."""
    macs = {name: max(count, 1) for name, count in work.items()}
    whole = sum(macs.values())
    by_kind: dict[str, tuple[float, float]] = {}
    for timing in timings:
        for kind in {classes[name][bits] for name, bits in timing.policy.items()}:
            share = sum(macs[name] for name, bits in timing.policy.items() if classes[name][bits] == kind) / whole
            by_kind[kind] = max(by_kind.get(kind, (0.0, 0.0)), (share, float(timing.typical)))
    mean = math.fsum(timing.typical for timing in timings) / len(timings)
    prior = [0.9 * by_kind.get(kind, (0.0, mean))[1] * macs[name] / whole for name, kind in keys]
    return np.array([*prior, 0.01 * mean, 0.1 * mean])


def _unmeasured(target: Target) -> str:
    """Return why there are no latency tables of a target."""
    if target.name == "nvidia-gpu":
        return "tables of whole networks are not measured on GPUs; benchmarks/gpu_latency.py times single layers on a CUDA device"
    return "nothing here measures its latency"


__all__ = ["FILE", "Table", "Timing", "fit", "measure_table", "spreads"]
