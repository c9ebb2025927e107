"""Planted problems whose optimum is known, and the check that binds every search method to its contract.

``check_method(MyMethod())`` runs a method on each kind of planted problem and raises `AssertionError` with everything that is
wrong; the report it returns says how far from the optimum the method's own proposals are, before repair and without the
uniform point.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bitwright import allocation, runs
from bitwright.costs import BitOps, Budget, Cost, WeightBits
from bitwright.data import TensorSplit
from bitwright.driver import Result, SearchMethod, Stop, Trial, search
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem, SearchData, condition
from bitwright.quant import QuantLayer, quantize
from bitwright.quant.batchnorm import correct_batchnorm
from bitwright.quant.reference import ReferenceLoss, divergence
from bitwright.sites import Site, Trace, trace

Kind = Literal["table", "linear", "conv", "joint"]
NETWORKS: tuple[Kind, ...] = ("linear", "conv", "joint")
"""The kinds that are real networks with data; ``table`` has a loss but nothing to differentiate."""
FIT, SELECTION, CLASSES = 512, 256, 8
RATIO = 3.0
"""How much more each site's output counts than the next one's; its quantization error counts by the square."""
SHARPNESS = 3.0
"""Standard deviation of the strongest branch's logits: sure of most answers, torn about some."""


@dataclass(frozen=True)
class Planted:
    """A problem with a known answer.

    Attributes:
        name: kind and seed.
        problem: sites, choices, costs and loss.
        optimum: the feasible policy of least loss (over all feasible policies).
        best: its loss.
        worst: the loss of the cheapest policy.
        sensitive: the sites whose widths matter, by falling weight; empty for tables.
    """

    name: str
    problem: Problem
    optimum: Policy
    best: float
    worst: float
    sensitive: tuple[str, ...] = ()

    def gap(self, policy: Policy) -> float:
        """Return how far a policy is from the optimum, as a share of how far the cheapest policy is.

        A policy over a limit is no better than the optimum, and the largest excess over a limit, as a share of it, is added.
        """
        costs = zip(self.problem.costs(policy), self.problem.budgets, strict=True)
        excess = max((cost / max(1, budget.limit) - 1 for cost, budget in costs), default=0.0)
        return max(0.0, (self.problem.loss(policy) - self.best) / (self.worst - self.best)) + max(0.0, excess)


def planted(kind: Kind, seed: int = 0) -> Planted:
    """Return a planted problem; which sites are sensitive is permuted by the seed.

    - ``table``: random costs under two budgets and a random loss per (site, choice); the total loss is their sum.
    - ``linear``: a classifier that sums five linear branches of different sizes whose outputs count by powers of 3; weight
      widths 1, 2, 3, 4 or 8 within an average.
    - ``conv``: a chain of four residual convolutions between a pinned first and last layer, their gains by powers of 3.
    - ``joint``: four linear branches; weight widths 2, 4 or 8 with activation widths 4 or 8 within bit operations.

    The networks' labels are their own answers, so they need no training and are right on every sample. Their loss is the KL
    divergence of the really quantized network, and their optimum the least of it over all feasible policies.

    >>> problem = planted("linear", seed=1)
    >>> problem.gap(problem.optimum), problem.gap(problem.problem.cheapest())
    (0.0, 1.0)
    """
    if kind == "table":
        return _planted_table(seed)
    generator = torch.Generator().manual_seed(seed)
    gains = _permuted_gains(5 if kind == "linear" else 4, generator)
    if kind == "conv":
        return _planted_network(kind, _Residual(gains, generator), (4, 4, 4), gains, seed)
    network = _Branches(gains, generator)
    return _planted_network(kind, network, (network.inputs, 1, 1), gains, seed)


# ---- tables


@dataclass(frozen=True)
class TableCost(Cost):
    """A cost looked up in a table of (site, bits)."""

    name: ClassVar[str] = "table"
    unit: ClassVar[str] = "units"
    suffixes: ClassVar[Mapping[str, int]] = {"": 1}

    terms: tuple[tuple[tuple[str, Bits], int], ...]

    def __call__(self, site: Site, bits: Bits) -> int:
        """Return the table's entry."""
        return dict(self.terms)[site.name, bits]


def table_problem(values: allocation.Values, terms: allocation.Terms, limits: Sequence[int], *, seed: int = 0) -> Problem:
    """Return a problem whose loss is a sum of given values and whose costs are given terms.

    Choice j of a site is the j-th of the widths 1, 2, 3, … 8. There is no network and no data behind it.

    Args:
        values: per site, what each choice adds to the loss.
        terms: per budget and site, the integer cost of each choice.
        limits: per budget, the largest total.
        seed: of the problem.

    >>> problem = table_problem([[4.0, 1.0], [0.5, 0.1]], [[[1, 2], [1, 2]]], [3])
    >>> problem.loss(Policy({"0": (2, 32), "1": (1, 32)})), problem.uniform()
    (1.5, Policy(0=W1A32, 1=W1A32))
    """
    names = [str(i) for i in range(len(values))]
    sites = tuple(Site(name, "linear", (name,), (1, 1), 1, 1, 1, 1, 1, 1, 0) for name in names)
    choices = {name: tuple(Bits(j + 1, 32) for j in range(len(column))) for name, column in zip(names, values, strict=True)}
    budgets = []
    for site_terms, limit in zip(terms, limits, strict=True):
        entries = [
            ((name, choices[name][j]), int(term)) for name, column in zip(names, site_terms, strict=True) for j, term in enumerate(column)
        ]
        budgets.append(Budget(TableCost(tuple(entries)), int(limit), f"table<={limit}"))

    def loss(policy: Policy) -> float:
        return math.fsum(float(column[policy[name].w - 1]) for name, column in zip(names, values, strict=True))

    return Problem(nn.Identity(), Trace(sites, (), 0), choices, budgets, seed=seed, evaluate=loss)


def _planted_table(seed: int, sites: int = 8, choices: int = 5) -> Planted:
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(0, 2, (sites, 1)))
    values = np.sort(rng.random((sites, choices)), axis=1)[:, ::-1] * scale
    terms = [np.sort(rng.integers(1, 1000, (sites, choices)), axis=1) for _ in range(2)]
    # Limits that a random policy keeps can be kept.
    kept = rng.integers(0, choices - 1, sites)
    limits = [int(t[np.arange(sites), kept].sum()) for t in terms]
    problem = table_problem(list(values), [list(t) for t in terms], limits, seed=seed)
    optimum = problem.policy(allocation.allocate(list(values), problem.terms, limits))
    return Planted(f"table-{seed}", problem, optimum, problem.loss(optimum), problem.loss(problem.cheapest()))


# ---- networks


class _Branches(nn.Module):
    """Sums linear branches, each on its own part of the input, times a fixed gain each."""

    gains: Tensor

    def __init__(self, gains: Tensor, generator: torch.Generator):
        super().__init__()
        sizes = [int(n) for n in torch.tensor([12, 16, 20, 16, 24])[torch.randperm(5, generator=generator)[: len(gains)]]]
        self.sizes, self.inputs = sizes, sum(sizes)
        self.branches = nn.ModuleList(nn.Linear(size, CLASSES, bias=False) for size in sizes)
        self.register_buffer("gains", gains)
        _draw_weights(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.flatten(1).split(self.sizes, 1)  # type: ignore[no-untyped-call]
        return torch.stack([gain * branch(part) for gain, branch, part in zip(self.gains, self.branches, parts, strict=True)]).sum(0)


class _Residual(nn.Module):
    """A stem, residual convolutions with BatchNorm times a fixed gain each, pooling and a linear head."""

    gains: Tensor

    def __init__(self, gains: Tensor, generator: torch.Generator):
        super().__init__()
        self.stem = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)) for _ in gains)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, CLASSES, bias=False)
        self.register_buffer("gains", gains)
        _draw_weights(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for gain, block in zip(self.gains, self.blocks, strict=True):
            x = x + gain * block(x).relu()
        logits: Tensor = self.head(self.norm(x.mean((2, 3))))
        return logits


def _permuted_gains(count: int, generator: torch.Generator) -> Tensor:
    return (RATIO ** -torch.arange(count).float())[torch.randperm(count, generator=generator)]


def _draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of convolutions and linear layers at random; the logits come out large enough to be sure of."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                weight = module.weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * SHARPNESS / math.prod(weight.shape[1:]) ** 0.5)


def _settle(model: nn.Module, images: Tensor) -> None:
    """Give every BatchNorm the statistics of the images."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = None  # a plain average: of this one pass
    with torch.no_grad():
        model.train()(images)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 0.1
    model.eval()


def _planted_network(kind: Kind, model: nn.Module, shape: tuple[int, ...], gains: Tensor, seed: int) -> Planted:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(FIT + SELECTION, *shape, generator=generator)
    _settle(model, images[:FIT])
    with torch.no_grad():
        labels = model(images).argmax(1)
    split = TensorSplit(images, labels, classes=CLASSES)
    data = SearchData(split.subset(torch.arange(FIT)), split.subset(torch.arange(FIT, FIT + SELECTION)))
    traced = trace(model, images[:1])
    free = [site.name for site in traced.sites if "." in site.name]
    choices, budget = _choices_and_budget(traced, free, joint=kind == "joint")
    loss = _RealLoss(ReferenceLoss(model, data.selection, data.fit, traced.sites, seed), choices)
    problem = Problem(model, traced, choices, budget, data, seed=seed, evaluate=loss)
    order = gains.argsort(descending=True).tolist()
    return _solved(f"{kind}-{seed}", problem, tuple(free[i] for i in order))


def _choices_and_budget(traced: Trace, free: Sequence[str], *, joint: bool) -> tuple[dict[str, tuple[Bits, ...]], Budget]:
    """Return widths and a limit that the sensitive sites can only live with if the others give way."""
    widths = tuple(Bits(w, a) for w in (2, 4, 8) for a in (4, 8)) if joint else tuple(Bits(w, 32) for w in (1, 2, 3, 4, 8))
    choices = {site.name: widths if site.name in free else (Bits(8, 32),) for site in traced.sites}
    if joint:
        limit = BitOps().total(traced.sites, dict.fromkeys(choices, Bits(3, 5)))
        return choices, Budget(BitOps(), limit, "bitops<=W3A5")
    weights = sum(site.weights for site in traced.sites if site.name in free)
    low = WeightBits().total(traced.sites, {name: Bits(2 if name in free else 8, 32) for name in choices})
    limit = low + weights // 2
    return choices, Budget(WeightBits(), limit, f"weight_bits<={limit / sum(site.weights for site in traced.sites):.3f}")


class _RealLoss:
    """The reference loss, made fast for a network whose every policy is asked: each layer is quantized once per choice."""

    def __init__(self, reference: ReferenceLoss, choices: Mapping[str, Sequence[Bits]]):
        self.reference = reference
        self.network = copy.deepcopy(reference.model)
        self.statistics = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        self.bank: dict[tuple[str, Bits], nn.Module] = {}
        self.known: dict[Policy, float] = {}
        for bits in sorted({bits for allowed in choices.values() for bits in allowed}):
            policy = Policy(dict.fromkeys(choices, bits))
            quantized = quantize(reference.model, policy, calibration=reference.calibration, sites=reference.sites)
            for name in choices:
                self.bank[name, bits] = _frozen(reference.model.get_submodule(name), quantized.get_submodule(name))

    def __call__(self, policy: Policy) -> float:
        if policy not in self.known:
            self.known[policy] = self._measured(policy)
        return self.known[policy]

    def _measured(self, policy: Policy) -> float:
        reference = self.reference
        for name, bits in policy.items():
            self.network.set_submodule(name, self.bank[name, bits])
        with torch.no_grad():
            for name, buffer in self.network.named_buffers():
                if name in self.statistics:
                    buffer.copy_(self.statistics[name])
            if reference.statistics:
                correct_batchnorm(self.network, reference.model, reference.calibration, reference.statistics)
            return float(divergence(reference.outputs, self.network(reference.images)))


def _frozen(layer: nn.Module, quantized: nn.Module) -> nn.Module:
    """Return a float layer that holds the quantized weight, behind the quantizer of its input if there is one."""
    assert isinstance(quantized, QuantLayer)
    plain = copy.deepcopy(layer).eval()
    with torch.no_grad():
        plain.get_parameter("weight").copy_(quantized.quantized_weight())
    return plain if quantized.input_quantizer is None else nn.Sequential(quantized.input_quantizer.eval(), plain)


def _solved(name: str, problem: Problem, sensitive: tuple[str, ...]) -> Planted:
    """Ask the loss of every feasible policy, and keep the best."""
    sizes = [range(len(allowed)) for allowed in problem.choices.values()]
    feasible = [index for index in itertools.product(*sizes) if allocation.within(problem.terms, problem.limits, index)]
    optimum = min((problem.policy(index) for index in feasible), key=problem.loss)
    return Planted(name, problem, optimum, problem.loss(optimum), problem.loss(problem.cheapest()), sensitive)


# ---- the check


@dataclass(frozen=True)
class Row:
    """What a method did on one planted problem; ``uniform`` is the gap of the widest single width."""

    problem: str
    gap: float
    uniform: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """What `check_method` saw."""

    method: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        """Return a table: problem, gap and the gap of the uniform policy in percent, steps, seconds."""
        head = f"{self.method:<16}{'gap %':>10}{'uniform %':>11}{'steps':>8}{'seconds':>9}"
        lines = [f"{r.problem:<16}{100 * r.gap:>10.3f}{100 * r.uniform:>11.2f}{r.steps:>8}{r.seconds:>9.2f}" for r in self.rows]
        return "\n".join([head, *lines])


def check_method(
    method: SearchMethod[Any],
    *,
    kinds: Sequence[Kind] = ("table", *NETWORKS),
    seeds: Sequence[int] = (0,),
    limit: float | None = None,
) -> Report:
    """Hold a search method to its contract on planted problems, and measure how far from the optimum its proposals are.

    On every problem: the policies returned keep the budgets; the same seed gives the same result bit for bit, also when the search
    is stopped at several steps and resumed from disk; another seed gives a valid result; the problem, its network and
    torch's global generator are as they were. The method is a frozen dataclass with a legal ``ranking``.

    The gap (see `Planted.gap`) is that of the method's best proposal before repair (of its last one where it is ranked so).

    Args:
        method: the method with its options.
        kinds: problems to run on; a method that needs a network cannot do ``table``.
        seeds: of the problems: which sites are sensitive differs between them.
        limit: largest gap allowed; None allows 0 for a method ranked by loss and 0.05 for one ranked by its last proposal.
            Baselines that do not optimise take ``math.inf``.

    Returns:
        The gaps, and those of the uniform policy beside them.

    Raises:
        AssertionError: something is wrong; the message lists all of it.
    """
    wrong = _shape_of(method)
    allowed = limit if limit is not None else (1e-9 if method.ranking == "loss" else 0.05)
    rows = []
    for kind, seed in itertools.product(kinds, seeds):
        plant = planted(kind, seed)
        row, complaints = _observed(plant, method)
        rows.append(row)
        wrong += [f"{plant.name}: {complaint}" for complaint in complaints]
        if not row.gap <= allowed:
            wrong.append(f"{plant.name}: its proposal is {100 * row.gap:.3g} % from the optimum, more than {100 * allowed:.3g} %")
    report = Report(method.name, tuple(rows))
    if wrong:
        raise AssertionError(f"method '{method.name}' breaks its contract:\n- " + "\n- ".join(wrong) + f"\n{report}")
    return report


def _shape_of(method: SearchMethod[Any]) -> list[str]:
    """Return what is wrong with the class itself."""
    wrong = []
    parameters = getattr(type(method), "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        wrong.append("its options are no frozen dataclass; write @dataclass(frozen=True) above the class")
    if getattr(type(method), "ranking", None) not in {"loss", "last"}:
        wrong.append("its ranking is neither 'loss' nor 'last'")
    return wrong


def _observed(plant: Planted, method: SearchMethod[Any]) -> tuple[Row, list[str]]:
    """Run a method whole, in pieces and with another seed; return its figures and what is wrong."""
    before = _condition(plant.problem)
    with tempfile.TemporaryDirectory() as folder:
        whole, pieces = Path(folder) / "whole", Path(folder) / "pieces"
        result = search(plant.problem, method, out=whole)
        wrong = [f"after the search {what}" for what, now in _condition(plant.problem).items() if before[what] != now]
        if not wrong:  # a search of another problem than the one on disk cannot be resumed
            for steps in sorted({0, 1, result.steps // 3, 2 * result.steps // 3, max(0, result.steps - 1)}):
                search(_again(plant.problem, plant.problem.seed), _fresh(method), out=pieces, stop=Stop(steps=steps))
            resumed = search(_again(plant.problem, plant.problem.seed), _fresh(method), out=pieces)
            wrong = _differences(result, resumed, whole, pieces)
            wrong += [f"after a resumed search {what}" for what, now in _condition(plant.problem).items() if before[what] != now]
    other = search(_again(plant.problem, plant.problem.seed + 1), method)
    for answer, seed in ((result, "its"), (other, "another")):
        wrong += [f"with {seed} seed, {what}" for what in _invalid(plant.problem, answer)]
    uniform = plant.problem.uniform()
    reference = math.nan if uniform is None else plant.gap(uniform)
    return Row(plant.name, _gap(plant, method, result), reference, result.steps, result.seconds), wrong


def _gap(plant: Planted, method: SearchMethod[Any], result: Result) -> float:
    proposals = [trial.proposed for trial in result.history]
    return plant.gap(proposals[-1]) if method.ranking == "last" else min(map(plant.gap, proposals))


def _again(problem: Problem, seed: int) -> Problem:
    """Return the same problem as a new object, with nothing remembered."""
    evaluate = problem.loss
    data = problem.data if problem.has_data else None
    return Problem(problem.model, problem.trace, problem.choices, problem.budgets, data, seed=seed, evaluate=evaluate)


def _fresh(method: SearchMethod[Any]) -> SearchMethod[Any]:
    return copy.deepcopy(method)


def _condition(problem: Problem) -> dict[str, Any]:
    """Return what a search must leave as it was; the keys complete "after the search …"."""
    return {
        **condition(problem.model),
        "the network holds gradients": [p.grad is not None for p in problem.model.parameters()],
        "the problem is another": json.dumps(problem.fingerprint()),
        "torch's global generator stands elsewhere": torch.get_rng_state().tolist(),
    }


def _invalid(problem: Problem, result: Result) -> list[str]:
    wrong = [] if problem.feasible(result.policy) else ["the policy returned is over a limit"]
    if not result.history:
        wrong.append("nothing was proposed")
    if result.status != "done":
        wrong.append(f"the search ended as {result.status}")
    return wrong


SAME = ("policy", "loss", "costs", "status", "steps", "sample_passes")
"""What a search that was stopped and resumed reports like one that was not."""
BESIDE = ("seconds", "memory", "fingerprint")
"""What a checkpoint holds beside the state: the time, what the problem was asked, also by other searches, and by which callback."""


def _differences(whole: Result, pieces: Result, *folders: Path) -> list[str]:
    """Return how a search that was stopped and resumed differs from one that was not."""
    values = [(name, getattr(whole, name), getattr(pieces, name)) for name in SAME]
    wrong = [f"stopped and resumed, its {name} is {got} instead of {want}" for name, want, got in values if want != got]
    if [_timeless(trial) for trial in whole.history] != [_timeless(trial) for trial in pieces.history]:
        wrong.append("stopped and resumed, its history is another")
    states = [runs.flatten({k: v for k, v in _last_checkpoint(folder).items() if k not in BESIDE}) for folder in folders]
    if states[0][0] != states[1][0] or not all(map(_same_bits, states[0][1], states[1][1])):
        wrong.append("stopped and resumed, its final state is another")
    return wrong


def _timeless(trial: Trial) -> str:
    return repr(dataclasses.replace(trial, seconds=0.0))


def _last_checkpoint(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = runs.load_tree(max((folder / "checkpoint").glob("search-*.safetensors")))
    return tree


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
