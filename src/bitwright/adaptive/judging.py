"""What an adaptive network does, by the quality of its inputs: accuracy, bits, cost, their trend, and the decisions of others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.adaptive.network import AdaptiveNet
from bitwright.adaptive.promise import batches
from bitwright.data.quality import TEST_SEED, Condition, Mix, MixedSplit
from bitwright.data.splits import Split
from bitwright.evaluation import wilson
from bitwright.quant.modules import evaluating

RESAMPLES = 1000
Z = 1.959963984540054
SEGMENTS = 12
"""Parts of a stream, each of one quality."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What a network did with each image of a split.

    Attributes:
        correct: bool ``[N]``.
        shares: of the budget, ``[N]``.
        index: choices ``[S, N]``.
    """

    correct: Tensor
    shares: Tensor
    index: Tensor


def look(net: AdaptiveNet, split: Split, *, forced: Tensor | None = None, seed: int = 0) -> Seen:
    """Run a network over a split; with ``forced``, at those choices ``[S, N]`` instead of its own."""
    device = next(net.parameters()).device
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    place = 0
    with torch.no_grad(), evaluating(net), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for x, y, severity in batches(split):
            told = None if severity is None else severity.to(device)
            own = None if forced is None else forced[:, place : place + len(x)].to(device)
            place += len(x)
            logits = net(x.to(device), forced=own, condition=told)
            parts.append(((logits.argmax(1).cpu() == y.cpu()), net.spent().cpu(), net.taken().cpu()))
    correct, shares, index = zip(*parts, strict=True)
    return Seen(torch.cat(correct), torch.cat(shares), torch.cat(index, 1))


def mean_bits(net: AdaptiveNet, index: Tensor) -> Tensor:
    """Return each sample's mean activation width over the deciding sites, weighted by their MACs, ``[N]``."""
    known = {site.name: site.macs for site in net.space.sites}
    macs = torch.tensor([float(known[name]) for name in net.space.names])
    widths = torch.tensor([float(bits.a) for bits in net.space.choices])
    if len(set(widths.tolist())) == 1:
        widths = torch.tensor([float(bits.w) for bits in net.space.choices])
    return (widths[index] * macs[:, None]).sum(0) / macs.sum()


def describe(net: AdaptiveNet, seen: Seen) -> dict[str, Any]:
    """Return accuracy, bits and cost of what was seen, with 95 % intervals."""
    n, hits = len(seen.correct), int(seen.correct.sum())
    bits, limit = mean_bits(net, seen.index), net.space.limit
    half = Z * float(seen.shares.double().std()) / math.sqrt(n) if n > 1 else 0.0
    mean = float(seen.shares.double().mean())
    return {
        "n": n,
        "top1": hits / n,
        "interval": list(wilson(hits, n)),
        "bits": float(bits.mean()),
        "bits_spread": float(bits.std()) if n > 1 else 0.0,
        "bitops": mean * limit,
        "bitops_interval": [(mean - half) * limit, (mean + half) * limit],
        "share": mean,
    }


def judge(net: AdaptiveNet, test: Split, mix: Mix, *, images: int, seed: int = TEST_SEED) -> dict[str, Any]:
    """Return all that a report shows of an adaptive network, as JSON-able data.

    Args:
        net: the trained network.
        test: test images, mixed or not; those before corruption are taken from it.
        mix: the stated mix, with its held-out corruptions.
        images: how many test images each corruption and severity is tried on; clean, mixed and held-out images are all of them.
        seed: of the corruptions.
    """
    base = test.base if isinstance(test, MixedSplit) else test
    whole = ["clean", "mixed", *(["held_out"] if mix.held_out else [])]
    result: dict[str, Any] = {"conditions": {}}
    for name in whole:
        seen = look(net, _under(Condition(name), base, mix, seed))
        result["conditions"][name] = describe(net, seen)
        if name == "mixed":
            result["mixed"] = _mixed(net, base, mix, seed, seen)
    few = base.take(images)
    clean = look(net, _under(Condition("clean"), few, mix, seed))
    result["conditions"]["clean, fewer images"] = describe(net, clean)
    result["corruptions"] = {}
    for name in (*mix.corruptions, *(mix.held_out or ())):
        table = {0: clean} | {s: look(net, Condition(name, s).split(few, mix, seed)) for s in (1, 2, 3, 4, 5)}
        rows = {str(s): describe(net, seen) for s, seen in table.items()}
        trend = rank_trend([float(s) for s in table], [mean_bits(net, seen.index) for seen in table.values()])
        result["corruptions"][name] = {"held_out": name in (mix.held_out or ()), "severities": rows, "spearman": trend}
    result["sites"] = list(net.space.names)
    return result


def _under(condition: Condition, base: Split, mix: Mix, seed: int) -> Split:
    """Return images under a condition; of clean ones, too, it is known how good they are."""
    return MixedSplit(base, Mix(clean=1.0), seed) if condition.name == "clean" else condition.split(base, mix, seed)


def _mixed(net: AdaptiveNet, base: Split, mix: Mix, seed: int, seen: Seen) -> dict[str, Any]:
    """Return what needs the true severities of the mix: the table by severity, sites, and the decisions of other samples."""
    split = MixedSplit(base, mix, seed)
    severity = split.quality.severity
    rows, sites = {}, {}
    widths = torch.tensor([float(bits.a) for bits in net.space.choices])
    for level in sorted(set(severity.tolist())):
        own = (severity == level).nonzero().flatten()
        rows[str(level)] = describe(net, Seen(seen.correct[own], seen.shares[own], seen.index[:, own]))
        sites[str(level)] = widths[seen.index[:, own]].mean(1).tolist()
    order = torch.randperm(seen.index.shape[1], generator=torch.Generator().manual_seed(seed))
    swapped = look(net, split, forced=seen.index[:, order])
    return {"by_severity": rows, "sites_by_severity": sites, "permuted": {**describe(net, swapped), **paired_gain(seen, swapped)}}


def paired_gain(one: Seen, other: Seen) -> dict[str, Any]:
    """Return by how much the first is more often right than the second on the same images, with the normal 95 % interval."""
    difference = one.correct.double() - other.correct.double()
    half = Z * float(difference.std()) / math.sqrt(len(difference))
    mean = float(difference.mean())
    return {"gain": mean, "gain_interval": [mean - half, mean + half]}


def rank_trend(severities: Sequence[float], bits: Sequence[Tensor], *, seed: int = 0) -> dict[str, float]:
    """Return Spearman's rank correlation of bits with severity, and its 95 % bootstrap interval over images.

    The same images come at every severity, so whole images are resampled, with the ranks of all pairs.

    >>> rank_trend([0, 1, 2], [torch.tensor([4.0, 5.0]), torch.tensor([3.0, 4.0]), torch.tensor([2.0, 3.0])])["value"] < -0.6
    True
    """
    from scipy.stats import rankdata  # noqa: PLC0415  (scipy is slow to import)

    table = torch.stack([row.double() for row in bits], 1).numpy()
    levels = np.broadcast_to(np.asarray(severities, dtype=np.float64), table.shape)
    x, y = (np.asarray(rankdata(values), dtype=np.float64).reshape(table.shape) for values in (levels, np.round(table, 9)))
    x, y = x - x.mean(), y - y.mean()
    sums = np.stack([np.ones(table.shape).sum(1), x.sum(1), y.sum(1), (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)])
    weights = np.random.default_rng(seed).multinomial(len(table), np.full(len(table), 1 / len(table)), size=RESAMPLES)
    draws = _correlation(sums @ weights.T)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"value": float(_correlation(sums.sum(1, keepdims=True))[0]), "low": float(low), "high": float(high), "n": len(table)}


def _correlation(sums: Any) -> Any:
    """Return the linear correlation from count, sums and sums of products; 0 where one does not vary."""
    n, x, y, xx, yy, xy = sums
    spread = np.sqrt(np.maximum(0, (xx - x * x / n) * (yy - y * y / n)))
    return np.where(spread > 1e-9, (xy - x * y / n) / np.where(spread > 1e-9, spread, 1.0), 0.0)


def stream(net: AdaptiveNet, test: Split, mix: Mix, *, images: int, seed: int = TEST_SEED) -> dict[str, Any]:
    """Return bits and accuracy over a stream whose quality rises and falls: two corruptions of the mix, from clean to 5 and back."""
    base = test.base if isinstance(test, MixedSplit) else test
    names = list(mix.corruptions)
    first, second = names[0], names[min(1, len(names) - 1)]
    plan = [("clean", 0), (first, 1), (first, 3), (first, 5), (first, 3), ("clean", 0)]
    plan += [(second, 1), (second, 3), (second, 5), (second, 5), (second, 1), ("clean", 0)]
    each = max(1, min(images, len(base)) // SEGMENTS)
    correct, bits, rows = [], [], []
    for k, (name, severity) in enumerate(plan):
        part = base.subset(torch.arange(k * each, (k + 1) * each) % len(base))
        seen = look(net, _under(Condition(name, severity or None), part, mix, seed + k))
        correct.append(seen.correct)
        bits.append(mean_bits(net, seen.index))
        rows.append({"condition": name, "severity": severity, **describe(net, seen)})
    return {"each": each, "segments": rows, "bits": _rolling(torch.cat(bits)), "accuracy": _rolling(torch.cat(correct).float())}


def _rolling(values: Tensor, points: int = 120) -> list[float]:
    """Return a moving mean over a fortieth of the values, at evenly spread places."""
    window = max(1, len(values) // 40)
    sums = torch.cat([torch.zeros(1), values.cumsum(0)])
    ends = torch.linspace(window, len(values), min(points, len(values) - window + 1)).round().long()
    return [float(v) for v in (sums[ends] - sums[ends - window]) / window]


def averages(net: AdaptiveNet, seen: Seen) -> Mapping[str, float]:
    """Return the mean bits of a weight and of an activation over all sites, pinned ones included, each weighted by its number."""
    sites = {site.name: site for site in net.space.sites}
    w, a = (torch.tensor([float(bits[part]) for bits in net.space.choices])[seen.index].mean(1).tolist() for part in (0, 1))
    of_w = {**{name: float(bits.w) for name, bits in net.space.pinned.items()}, **dict(zip(net.space.names, w, strict=True))}
    of_a = {**{name: float(bits.a) for name, bits in net.space.pinned.items()}, **dict(zip(net.space.names, a, strict=True))}
    weights, acts = sum(site.weights for site in sites.values()), sum(site.acts for site in sites.values())
    return {
        "average_weight_bits": sum(sites[name].weights * value for name, value in of_w.items()) / weights,
        "average_activation_bits": sum(sites[name].acts * value for name, value in of_a.items()) / acts,
    }
