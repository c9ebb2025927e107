"""What an adaptive network promises to cost on average, how the promise is made to fit a budget, and whether it is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bitwright.adaptive.network import AdaptiveNet
from bitwright.data.quality import MixedSplit
from bitwright.data.splits import Split
from bitwright.quant.modules import evaluating

Z = 1.959963984540054
BATCH = 250
BISECTIONS = 30
ROUNDS = 3
LARGEST = 1e4
REACH = 0.05
"""How far below the price of all sites that of one may go to spend what is left: so little that its preferences still decide."""

FAR = 0.1
"""How far from its budget an actor may end before that is an alarm."""
ALIKE = 0.99
"""An actor whose decisions agree this much across samples decides the same for all."""


@dataclass(frozen=True)
class Promise:
    """The mean cost of an input over the budget, on images that set nothing.

    Attributes:
        mean: mean share of the budget.
        interval: its 95 % interval over images (normal).
        limit: the budget, in bit operations.
        n: images.
        agreement: share of decisions that are their site's most frequent one.
        met: the mean is within the budget.
    """

    mean: float
    interval: tuple[float, float]
    limit: int
    n: int
    agreement: float
    met: bool

    @classmethod
    def of(cls, shares: Tensor, index: Tensor, limit: int) -> Promise:
        """Take it from each image's share of the budget ``[N]`` and its decisions ``[S, N]``."""
        mean, n = float(shares.double().mean()), len(shares)
        half = Z * float(shares.double().std(correction=1 if n > 1 else 0)) / math.sqrt(n)
        agreement = float((index == index.mode(1, keepdim=True).values).double().mean())
        return cls(mean, (mean - half, mean + half), limit, n, agreement, mean <= 1 + 1e-9)

    @property
    def text(self) -> str:
        """The promise in a sentence's part."""
        low, high = self.interval
        return f"{100 * self.mean:.2f} % of the budget on {self.n} held-out images (95 %: {100 * low:.2f} to {100 * high:.2f})"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {**asdict(self), "interval": list(self.interval), "bitops": self.mean * self.limit}


def batches(split: Split, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield images, labels and true severities (where the split knows them), in order, in the evaluation view."""
    for start in range(0, len(split), size):
        index = torch.arange(start, min(start + size, len(split)))
        if isinstance(split, MixedSplit):
            x, y, quality = split.labelled(index)
            yield x, y, quality.severity
        else:
            x, y = split.batch(index)
            yield x, y, None


def decisions(net: AdaptiveNet, split: Split, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return each image's share of the budget ``[N]`` and its decisions ``[S, N]``, on the CPU."""
    device = next(net.parameters()).device
    shares, taken = [], []
    with torch.no_grad(), evaluating(net), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for x, _, severity in batches(split):
            net(x.to(device), condition=None if severity is None else severity.to(device))
            shares.append(net.spent().cpu())
            taken.append(net.taken().cpu())
    return torch.cat(shares), torch.cat(taken, 1)


def check(net: AdaptiveNet, split: Split, *, seed: int = 0) -> Promise:
    """Return what an input costs on average on a split."""
    shares, index = decisions(net, split, seed=seed)
    return Promise.of(shares, index, net.space.limit)


def alarms_of(net: AdaptiveNet, promise: Promise, rows: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Return what is wrong with a trained actor, in sentences.

    Args:
        net: the network as it is deployed.
        promise: what it costs on held-out images.
        rows: of the epochs of its training.
    """
    found, last = [], rows[-1] if rows else {}
    if net.actor.reads and promise.agreement > ALIKE:
        share = f"{100 * promise.agreement:.1f} % of its decisions are the same for every sample"
        found.append(f"degenerate actor: {share}; train longer, raise adaptive.actor_lr, or choose widths further apart")
    elif "alarm" in last:
        found.append(f"at the end of training a {last['alarm']}; what it decides now comes from the price set afterwards alone")
    if last.get("spent", 1.0) > 1 + FAR:
        spent = f"training ended at {100 * last['spent']:.0f} % of the budget"
        found.append(f"{spent}, and the price that brings it down was set afterwards: the weights are not trained for it; train longer")
    if promise.interval[0] > 1:
        found.append(f"the budget is not kept: {promise.text}; give a larger budget, or narrower widths to choose from")
    elif not promise.met:
        found.append(f"it is not certain that the budget is kept: {promise.text}; hold out more images, or give a larger budget")
    elif promise.interval[1] < 1 - FAR:
        found.append(f"much of the budget is unspent: {promise.text}; choose widths closer together, or a smaller budget")
    return found


def settle_price(net: AdaptiveNet, split: Split, *, margin: float = Z, others: int | None = None) -> float:
    """Set the actor's prices so that the mean cost on a split plus ``margin`` standard errors is the budget's; return their mean.

    The standard error is that of the difference between the split's mean and that of as many ``others`` images (None: of all there are).

    A price is subtracted from every choice in proportion to its cost, as a Lagrange multiplier would be. One price for all sites is
    found by bisection on what the actor said in one pass; where a site then falls as a whole and leaves something of the budget, sites
    get a lower price one after another as long as the budget keeps. All is found again a few times: a site's decision changes what the
    sites after it read.
    """
    margin *= math.sqrt(1 + len(split) / others) if others else 1.0
    best, price = None, net.actor.price
    for _ in range(ROUNDS):
        found, excess = _heard_price(net, split, margin)
        if excess <= 0 and (best is None or float(price.mean()) < float(best.mean())):
            best = price.clone()
        price.copy_(found)
    step = 0.02
    while _excess(decisions(net, split)[0], margin) > 0 and step < LARGEST:
        price += step
        step *= 2
        if best is not None and float(best.mean()) < float(price.mean()):
            price.copy_(best)
            break
    return float(price.mean())


def _heard_price(net: AdaptiveNet, split: Split, margin: float) -> tuple[Tensor, float]:
    """Return the prices ``[S]`` at which what the actor now says would keep the budget, and by how much the present ones do not."""
    with net.hearing() as heard:
        shares, _ = decisions(net, split)
    sites = len(net.space.names)
    scores = torch.stack([torch.cat(heard[site::sites]) for site in range(sites)])

    def over(price: Tensor) -> bool:
        return _excess(net.shares_at(price, scores), margin) > 0

    low, high = bracket(sites, over)
    for site in () if net.draws else range(sites):
        high = _lowered(high, site, float(low[site]) - REACH, over)
    return high, _excess(shares, margin)


def bracket(sites: int, over: Callable[[Tensor], bool]) -> tuple[Tensor, Tensor]:
    """Return prices ``[S]``, one for all sites, just below and just above the least one that is not ``over`` the budget."""
    low, high = torch.full((sites,), -1.0), torch.full((sites,), 1.0)
    while not over(low) and float(low[0]) > -LARGEST:
        low *= 4
    while over(high) and float(high[0]) < LARGEST:
        high *= 4
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if over(middle) else (low, middle)
    return low, high


def _lowered(price: Tensor, site: int, least: float, over: Callable[[Tensor], bool]) -> Tensor:
    """Return prices with that of one site as low as keeps the budget, down to ``least``."""

    def at(value: float) -> Tensor:
        changed = price.clone()
        changed[site] = value
        return changed

    if not over(at(least)):
        return at(least)
    low, high = least, float(price[site])
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if over(at(middle)) else (low, middle)
    return at(high)


def _excess(shares: Tensor, margin: float) -> float:
    """Return by how much of the budget the mean share, and some standard errors, are over it."""
    error = float(shares.double().std()) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
    return float(shares.double().mean()) + margin * error - 1


__all__ = ["Promise", "alarms_of", "batches", "bracket", "check", "decisions", "settle_price"]
