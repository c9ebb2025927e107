"""The problem a search solves: a model cut into sites, the choices of each, what they cost, and what may be spent."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitwright import allocation
from bitwright.errors import BitwrightError, BudgetError, PolicyError, SiteError, nearest
from bitwright.outside import callback_digest
from bitwright.policy import Bits, Policy, check_bits

if TYPE_CHECKING:
    from bitwright.costs import Budget, Cost, Pair
    from bitwright.data import Split
    from bitwright.sites import Site, Trace

Choices = Mapping[str, Sequence[Bits]]
Loss = Callable[[Policy], float]
SAMPLE = 16
"""Images of each split, evenly spaced, that stand for it in a fingerprint."""


class HasSplits(Protocol):
    """Anything with a fit and a selection split, such as `bitwright.data.Data`."""

    @property
    def fit(self) -> Split:
        """The images weights may be trained and calibrated on."""

    @property
    def selection(self) -> Split:
        """The images policies are judged on."""


@dataclass(frozen=True)
class SearchData:
    """The two splits that a search may see: the test split is not in here."""

    fit: Split
    selection: Split


def build_choices(
    trace: Trace,
    weights: Iterable[int] = range(1, 9),
    activations: Iterable[int] = (32,),
    *,
    pin_first: Bits | tuple[int, int] | Literal["free"] | None = None,
    pin_last: Bits | tuple[int, int] | Literal["free"] | None = None,
) -> dict[str, tuple[Bits, ...]]:
    """Return the choices of every site: each weight width with each activation width, the ends pinned.

    Args:
        trace: the traced model.
        weights: weight widths to choose from.
        activations: widths of the input activations to choose from. A product of two activations has no weight: both of
            its operands take the activation width.
        pin_first: the bits of the first weighted site; None is 8 for weights and for activations (32 for activations
            where they are all left in floating point), ``"free"`` gives it the choices of the others.
        pin_last: the same for the last weighted site.

    Raises:
        PolicyError: a width is not legal, or none is given.

    >>> from bitwright.sites import trace
    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    >>> build_choices(trace(net, torch.zeros(1, 4)), weights=(2, 4))
    {'0': (W8A32,), '1': (W2A32, W4A32), '2': (W8A32,)}
    """
    widths, inputs = sorted(set(weights)), sorted(set(activations))
    if not widths or not inputs:
        raise PolicyError("choices: no width to choose from; give at least one weight and one activation width, for example 2 4 8")
    pairs = tuple(check_bits(Bits(w, a), "choices") for w, a in itertools.product(widths, inputs))
    products = tuple(Bits(a, a) for a in inputs)
    choices = {site.name: pairs if site.operands == 1 else products for site in trace.sites}
    default = Bits(8, 8 if min(inputs) < 16 else 32)
    for name, pin in ((trace.first, pin_first), (trace.last, pin_last)):
        if pin != "free":
            choices[name] = (check_bits(default if pin is None else Bits(*pin), f"pin of '{name}'"),)
    return choices


class Problem:
    """What a search method sees: sites, choices, integer costs, limits, data and the loss of a policy.

    Args:
        model: the float network; a search works on copies of it.
        trace: what `bitwright.sites.trace` found in the network that will be deployed.
        choices: the allowed bits of every site; one choice pins a site.
        budgets: costs and their limits (one or a sequence); a policy is feasible when it keeps them all.
        data: fit and selection splits; anything else in it is left out. None where nothing needs data.
        seed: what all randomness of a search derives from.
        kind: the task; decides what the default loss compares.
        evaluate: the loss of a policy, lower is better; None takes `bitwright.quant.reference.ReferenceLoss`. A run directory tells one
            callback from another by its code and the numbers and texts that it holds (`bitwright.outside.callback_digest`).

    Attributes:
        evaluations: how many policies were really evaluated (each one once).
        sample_passes: images that went through a network so far, in forward passes; a backward pass counts two (`spend`).

    Raises:
        SiteError: the choices name an unknown site.
        PolicyError: a site has no choices, or the same one twice.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        choices: Choices,
        budgets: Budget | Sequence[Budget],
        data: HasSplits | None = None,
        *,
        seed: int = 0,
        kind: Literal["classification"] = "classification",
        evaluate: Loss | None = None,
    ):
        self.model = model
        self.trace = trace
        self.choices = _checked_choices(trace, choices)
        self.budgets: tuple[Budget, ...] = tuple(budgets) if isinstance(budgets, Sequence) else (budgets,)
        self.seed = seed
        self.kind = kind
        self.evaluations = 0
        self.sample_passes = 0
        self._data = None if data is None else SearchData(data.fit, data.selection)
        self._evaluate = evaluate
        self._losses: dict[tuple[int, ...], float] = {}
        self._calibrated: set[tuple[str, int]] = set()

    @property
    def data(self) -> SearchData:
        """The fit and selection splits; raises `BitwrightError` where the problem was made without data."""
        if self._data is None:
            raise BitwrightError("problem: it was made without data, and this needs images; give Problem(..., data=)")
        return self._data

    @property
    def has_data(self) -> bool:
        """Whether the problem was made with data."""
        return self._data is not None

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in execution order."""
        return self.trace.sites

    @property
    def pins(self) -> dict[str, Bits]:
        """The sites that have only one choice."""
        return {name: allowed[0] for name, allowed in self.choices.items() if len(allowed) == 1}

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The sums that budgets limit: one a budget, or several of a peak, as far as they can be its largest."""
        rows = [Row(k, cost) for k, budget in enumerate(self.budgets) for cost in _undominated(budget.cost, self.sites, self.choices)]
        return tuple(rows)

    @cached_property
    def terms(self) -> tuple[tuple[NDArray[np.int64], ...], ...]:
        """The integer cost of every choice: ``terms[row][site][choice]``, in the order of ``choices``; see `rows` and `borders`."""
        return tuple(cost_matrix(row.cost, self.sites, self.choices) for row in self.rows)

    @cached_property
    def borders(self) -> tuple[tuple[allocation.Border, ...], ...]:
        """What each row costs besides, where neighbours differ in class; see `bitwright.costs.Pair`."""
        return tuple(tuple(self._border(pair) for pair in row.cost.pairs) for row in self.rows)

    def _border(self, pair: Pair) -> allocation.Border:
        names, kinds = list(self.choices), sorted({kind for classes in pair.classes for kind in classes.values()})
        left, right = (
            np.asarray([kinds.index(classes[bits]) for bits in self.choices[name]], dtype=np.int64)
            for name, classes in zip(pair.sites, pair.classes, strict=True)
        )
        return allocation.Border((names.index(pair.sites[0]), names.index(pair.sites[1])), (left, right), pair.price)

    @cached_property
    def limits(self) -> tuple[int, ...]:
        """What the terms of each row may sum to: its budget's limit less the row's fixed part."""
        return tuple(self.budgets[row.budget].limit - row.cost.fixed for row in self.rows)

    def by_budget(self, totals: Iterable[float]) -> list[float]:
        """Return the largest of the rows of each budget, from what every row sums to (`totals`); fixed parts are added."""
        largest = [-math.inf] * len(self.budgets)
        for row, amount in zip(self.rows, totals, strict=True):
            largest[row.budget] = max(largest[row.budget], amount + row.cost.fixed)
        return largest

    def index(self, policy: Mapping[str, Bits]) -> tuple[int, ...]:
        """Return the position of each site's bits among its choices.

        Raises:
            PolicyError: a site is unknown or missing, or its bits are none of its choices.
        """
        for name in policy:
            if name not in self.choices:
                raise PolicyError(f"policy: the problem has no site '{name}'; {nearest(name, self.choices)}")
        return tuple(self._position(policy, name) for name in self.choices)

    def _position(self, policy: Mapping[str, Bits], name: str) -> int:
        if name not in policy:
            raise PolicyError(f"policy: site '{name}' has no entry; give it one of {_listed(self.choices[name])}")
        if policy[name] not in self.choices[name]:
            raise PolicyError(
                f"policy: site '{name}' has {policy[name]!r}, which is no choice of it; choose from {_listed(self.choices[name])}"
            )
        return self.choices[name].index(policy[name])

    def policy(self, index: Sequence[int]) -> Policy:
        """Return the policy of one choice position per site: the inverse of `index`."""
        return Policy((name, allowed[j]) for (name, allowed), j in zip(self.choices.items(), index, strict=True))

    def totals(self, index: Sequence[int]) -> tuple[int, ...]:
        """Return what every row sums to at one choice position per site: its terms and borders, to be held against `limits`."""
        return tuple(allocation.total(terms, index, borders) for terms, borders in zip(self.terms, self.borders, strict=True))

    def costs(self, policy: Mapping[str, Bits]) -> tuple[int, ...]:
        """Return what a policy costs, per budget and in the cost's unit, its fixed part included."""
        return tuple(int(cost) for cost in self.by_budget(self.totals(self.index(policy))))

    def feasible(self, policy: Mapping[str, Bits]) -> bool:
        """Say whether a policy keeps every budget, in exact integers."""
        return all(cost <= budget.limit for cost, budget in zip(self.costs(policy), self.budgets, strict=True))

    def cheapest(self) -> Policy:
        """Return the policy of the smallest choice of every site: least cost, summed over budgets as shares of their limits.

        Borders are not looked at; see `bitwright.allocation.repair`.
        """
        shares = [t / max(1, abs(limit)) for site_terms, limit in zip(self.terms, self.limits, strict=True) for t in [_padded(site_terms)]]
        if not shares:
            return self.policy([0] * len(self.choices))
        return self.policy([int(j) for j in np.sum(shares, 0).argmin(1)])

    def spend(self, samples: int, *, backward: bool = False) -> None:
        """Count a pass of so many images through a network of the search: forward alone, or forward and backward (three passes).

        What searches cost is compared in this unit, so a method calls it for every pass of its own; policies that `loss`
        evaluates are counted there.
        """
        self.sample_passes += samples * (3 if backward else 1)

    def loss(self, policy: Mapping[str, Bits]) -> float:
        """Return the loss of a policy: scale-free, lower is better, evaluated once and remembered.

        By default the mean KL divergence of the quantized from the float network on the selection split, with one fixed
        quantizer on the float weights (`bitwright.quant.reference`).
        """
        index = self.index(policy)
        if index not in self._losses:
            self._losses[index] = float(self._evaluator(self.policy(index)))
            self.evaluations += 1
        return self._losses[index]

    def memory(self) -> dict[str, Any]:
        """Return the losses known so far and what their evaluation calibrated, as a tree that `bitwright.runs.save_tree` takes."""
        policies = torch.tensor(list(self._losses), dtype=torch.int16).reshape(-1, len(self.choices))
        losses = torch.tensor(list(self._losses.values()), dtype=torch.float64)
        return {"policies": policies, "losses": losses, "calibrated": sorted(self._calibrated)}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Take what an earlier session knew (`memory`): no loss of it is evaluated again, and no calibration counted again."""
        known = zip(memory["policies"].tolist(), memory["losses"].tolist(), strict=True)
        self._losses = {tuple(index): loss for index, loss in known} | self._losses
        self._calibrated.update(memory["calibrated"])

    @cached_property
    def _evaluator(self) -> Loss:
        if self._evaluate is not None:
            return self._evaluate
        from bitwright.quant.reference import ReferenceLoss  # noqa: PLC0415  (only where it is used)

        splits = (self.data.selection, self.data.fit)
        return ReferenceLoss(self.model, *splits, self.sites, self.seed, spend=self.spend, calibrated=self._calibrated)

    def uniform(self) -> Policy | None:
        """Return the widest policy of one width pair that keeps every budget, or None.

        Every pair of a weight and an activation width that some free site offers is tried, widest first: by the narrower of the
        two widths, then by the wider, then by the weight width (so W3A3 comes before W8A2). A site that lacks the pair takes the
        nearest of its choices by the ratio of widths; pinned sites keep theirs.
        """
        free = [bits for name, allowed in self.choices.items() if name not in self.pins for bits in allowed]
        pairs = itertools.product({bits.w for bits in free}, {bits.a for bits in free}) if free else [(1, 1)]
        for pair in sorted(itertools.starmap(Bits, pairs), key=lambda bits: (min(bits), max(bits), bits.w), reverse=True):
            policy = Policy((name, _nearest(allowed, pair)) for name, allowed in self.choices.items())
            if self.feasible(policy):
                return policy
        return None

    def check(self) -> None:
        """Raise `BudgetError` unless some policy keeps every budget: it says the reachable ranges and the nearest feasible limits."""
        if not self.budgets:
            raise BudgetError("problem: a search without a budget has nothing to decide; give one, for example weight_bits<=2.5")
        ranges = allocation.reachable(self)
        for budget, (low, high) in zip(self.budgets, ranges, strict=True):
            if budget.limit < low:
                raise BudgetError(self._unmet_text(budget, low, high))
        nearest_limits = [allocation.nearest_limit(self, k) for k in range(len(self.budgets))]
        if len(self.budgets) == 1 and nearest_limits[0] is not None and nearest_limits[0] > self.budgets[0].limit:
            raise BudgetError(self._unmet_text(self.budgets[0], nearest_limits[0], ranges[0][1]))
        if any(found is None or found > budget.limit for found, budget in zip(nearest_limits, self.budgets, strict=True)):
            raise BudgetError(self._joint_text(ranges, nearest_limits))

    def _unmet_text(self, budget: Budget, low: int, high: int) -> str:
        shown, reached = self._shown(budget, budget.limit), f"{self._shown(budget, low)} to {self._shown(budget, high)}"
        nearest_limit = f"the nearest feasible limit is {self._shown(budget, low)}"
        return f"budget '{budget.text}' cannot be met: its limit is {shown} and the choices reach {reached}; {nearest_limit}"

    def _shown(self, budget: Budget, total: int) -> str:
        return f"{budget.cost.show(total, self.sites)} ({total} {budget.cost.unit})"

    def _joint_text(self, ranges: Sequence[tuple[int, int]], nearest_limits: Sequence[int | None]) -> str:
        parts, ways = [], []
        for budget, (low, high), found in zip(self.budgets, ranges, nearest_limits, strict=True):
            parts.append(f"'{budget.text}' alone reaches {self._shown(budget, low)} to {self._shown(budget, high)}")
            if found is not None:
                ways.append(f"'{budget.text}' to {self._shown(budget, found)}")
        way = "raise " + " or ".join(ways) if ways else "raise several of them"
        return f"budgets {', '.join(repr(b.text) for b in self.budgets)} cannot be met together: {'; '.join(parts)}; {way}"

    def on(self, model: nn.Module, data: HasSplits | None = None, *, evaluate: Loss | None = None) -> Problem:
        """Return the problem of another network and data with the same sites, choices and *target* costs.

        The sites are matched by name: a proxy network must hold the same layers, whatever their sizes.

        Raises:
            SiteError: a layer of a site is missing in ``model``.
        """
        known = [name for name, _ in itertools.chain(model.named_modules(), model.named_parameters())]
        for site in self.sites:
            for layer in site.layers:
                owner = layer.partition("#")[0]
                if owner not in known:
                    raise SiteError(f"on: the other network has no layer '{owner}' for site '{site.name}'; {nearest(owner, known)}")
        return Problem(model, self.trace, self.choices, self.budgets, data, seed=self.seed, kind=self.kind, evaluate=evaluate)

    def fingerprint(self) -> dict[str, Any]:
        """Return what makes this problem this one, as JSON-able parts that can be compared one by one."""
        return {
            "sites": [[site.name, site.kind, list(site.weight_shape), site.macs] for site in self.sites],
            "choices": {name: [list(bits) for bits in allowed] for name, allowed in self.choices.items()},
            "budgets": [[budget.cost.name, budget.limit] for budget in self.budgets],
            "data": self._data and {"fit": identity(self._data.fit), "selection": identity(self._data.selection)},
            "kind": self.kind,
            "evaluate": None if self._evaluate is None else callback_digest(self._evaluate),
            "seed": self.seed,
            "weights": digest(self.model),
        }


@dataclass(frozen=True)
class Row:
    """A sum of terms that a budget limits: the number of the budget, and the sum as a cost."""

    budget: int
    cost: Cost


def cost_matrix(cost: Cost, sites: Sequence[Site], choices: Mapping[str, Sequence[Bits]]) -> tuple[NDArray[np.int64], ...]:
    """Return the terms of a cost: per site one integer per choice."""
    return tuple(np.asarray([cost(site, bits) for bits in choices[site.name]], dtype=np.int64) for site in sites)


def _undominated(cost: Cost, sites: Sequence[Site], choices: Mapping[str, Sequence[Bits]]) -> list[Cost]:
    """Return the rows of a cost without those that another one reaches or exceeds at every policy."""
    rows = cost.rows
    if len(rows) == 1:
        return list(rows)
    flat = np.stack([np.concatenate([[row.fixed], *cost_matrix(row, sites, choices)]) for row in rows])
    starts = np.cumsum([0, 1, *(len(choices[site.name]) for site in sites)])[:-1]
    kept: list[int] = []
    for r in np.argsort(-flat.sum(1), kind="stable"):
        excess = np.minimum.reduceat(flat[kept] - flat[r], starts, 1).sum(1)  # at the policy where it is least
        if not (excess >= 0).any():
            kept.append(int(r))
    return [rows[r] for r in sorted(kept)]


def digest(model: nn.Module) -> str:
    """Return the SHA-256 of a network's parameters and buffers, names and bytes.

    >>> net = nn.Linear(2, 2)
    >>> before = digest(net)
    >>> _ = nn.init.constant_(net.bias, 7.0)
    >>> digest(net) == before
    False
    """
    return digest_of(model.state_dict())


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the `digest` of a network that has these parameters and buffers."""
    hashed = hashlib.sha256()
    for name, tensor in tensors.items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def identity(split: Split) -> dict[str, Any]:
    """Return what tells one split from another: its size, and a digest of a few images, as evaluated and as trained on."""
    hashed = hashlib.sha256()
    index = torch.linspace(0, len(split) - 1, min(SAMPLE, len(split))).long()
    for generator in (None, torch.Generator().manual_seed(0)):
        for tensor in split.batch(index, generator):
            hashed.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            hashed.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {"images": len(split), "classes": split.classes, "sample": hashed.hexdigest()[:16]}


def condition(model: nn.Module) -> dict[str, Any]:
    """Return what a search must leave of a network as it was; the keys complete "after the search …"."""
    modules = list(model.modules())
    return {
        "the network's weights or buffers are others": digest(model),
        "modules of the network are in another mode": [module.training for module in modules],
        "other parameters of the network want gradients": [p.requires_grad for p in model.parameters()],
        "hooks are left on the network": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
    }


def _checked_choices(trace: Trace, choices: Choices) -> dict[str, tuple[Bits, ...]]:
    names = [site.name for site in trace.sites]
    for name in choices:
        if name not in names:
            raise SiteError(f"choices: no site '{name}' in the model; {nearest(name, names)}")
    for name in names:
        if not choices.get(name):
            raise PolicyError(f"choices: site '{name}' has none; give it at least one, or name it in skip= when tracing")
        if len(set(choices[name])) != len(choices[name]):
            raise PolicyError(f"choices: site '{name}' has the same bits twice ({_listed(choices[name])}); give each once")
    return {name: tuple(check_bits(Bits(*bits), f"choices of '{name}'") for bits in choices[name]) for name in names}


def _listed(allowed: Sequence[Bits]) -> str:
    return ", ".join(map(repr, allowed))


def _nearest(allowed: Sequence[Bits], pair: Bits) -> Bits:
    """Return the choice at the least distance by the ratios of widths; of two equally near ones the narrower."""
    return min(allowed, key=lambda bits: (abs(math.log2(bits.w / pair.w)) + abs(math.log2(bits.a / pair.a)), bits))


def _padded(site_terms: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    padded = np.full((len(site_terms), max(map(len, site_terms))), np.inf)
    for row, column in zip(padded, site_terms, strict=True):
        row[: len(column)] = column
    return padded
