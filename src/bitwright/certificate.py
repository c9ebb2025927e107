"""The transfer certificate: whether a policy that was searched on a proxy dataset suits the target.

No label of the target is used, and few of its images. Two things are asked. Do the layers that are sensitive on the proxy matter on
the target too: the rank correlation of layer sensitivities? And does the policy that was found keep enough of what mixing can gain
over the uniform policy of the same budget: by the sum of the target's own sensitivities? Class margins of the float network, the
uniform policy and the found one stand beside them. Reconstructed: SEAM (Tang et al., 2023) argues with margins, but publishes no
such check.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.correlation import spearman
from bitwright.data import Split, TensorSplit
from bitwright.margins import features_of, margins_of
from bitwright.methods.fisher import Fisher
from bitwright.policy import Policy
from bitwright.problem import Problem
from bitwright.quant import quantize
from bitwright.sensitivity import solve

SAMPLE = 256
"""Images of the target, and of the proxy, on which sensitivities and margins are taken."""
CORRELATION = 0.7
"""Least rank correlation of layer sensitivities of a proxy that counts as safe; benchmarks/transfer.py measures what it is worth."""
KEPT = 0.4
"""Least share of the foretold gain over uniform that a policy must keep: what searching on the target's own sensitivities gains is 1."""
SITES = 8
"""Free sites from which a rank correlation counts by itself; of fewer its interval's lower end must reach the threshold, too."""
FEWEST = 5
"""Free sites below which no order tells anything: four fall into any order by chance once in 24 times, and resampling does not show it."""
BINS = 24


def certify(target: Problem, proxy: Problem, policy: Policy) -> dict[str, Any]:
    """Return the certificate of a policy that was searched on a proxy, as JSON-able data.

    Args:
        target: the target's float network and data; only ``SAMPLE`` unlabelled fit images of it are looked at.
        proxy: the adapted network and the proxy's data, with the same sites.
        policy: what the search found.

    Returns:
        ``correlation`` (Spearman's, its 95 % bootstrap interval, per-layer sensitivities on both), ``predicted`` (summed target
        sensitivity of the found policy, of the uniform one and of the best for those sensitivities; the cheapest stands in for uniform
        where no single width fits), ``margins`` (histograms and means; none where there are fewer than two classes), ``safe`` and the
        ``reasons``.
    """
    known = {"target": scores_of(target), "proxy": scores_of(proxy)}
    layers = {name: layer_sensitivities(target, scores) for name, scores in known.items()}
    correlation = rank_correlation(layers["proxy"], layers["target"], seed=target.seed)
    uniform = target.uniform()
    named = {"found": policy} if uniform is None else {"found": policy, "uniform": uniform}
    rivals = {"uniform": uniform or target.cheapest(), "best": solve(target, known["target"])}
    predicted = {name: predicted_loss(target, known["target"], chosen) for name, chosen in ({"found": policy} | rivals).items()}
    stand_in = "uniform" if uniform is not None else "the cheapest policy (no uniform one fits)"
    few = correlation["n"] < FEWEST or (correlation["n"] < SITES and correlation["interval"][0] < CORRELATION)
    safe, reasons = verdict(correlation["value"], predicted, few_sites=correlation["n"] if few else None, rival=stand_in)
    sides = {"target": target, "proxy": proxy}
    single = [
        f"the {name} has fewer than two classes, so no class margin can be kept" for name, side in sides.items() if _classes(side) < 2
    ]
    return {
        "safe": safe and not single,
        "reasons": [*reasons, *single],
        "thresholds": {"correlation": CORRELATION, "kept": KEPT},
        "samples": min(SAMPLE, len(target.data.fit)),
        "correlation": {**correlation, "layers": {site: [layers["proxy"][site], layers["target"][site]] for site in layers["target"]}},
        "predicted": predicted,
        "margins": {name: histograms(side, named) for name, side in sides.items() if _classes(side) > 1},
    }


def _classes(problem: Problem) -> int:
    """Return how many classes a problem's network tells apart."""
    head = problem.model.get_submodule(problem.trace[problem.trace.last].layers[0])
    return len(head.get_parameter("weight"))


def scores_of(problem: Problem) -> dict[str, Tensor]:
    """Return the label-free Fisher sensitivity of every choice of every site, on few images."""
    return Fisher(samples=min(SAMPLE, len(problem.data.fit))).scores(problem)


def layer_sensitivities(problem: Problem, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Return one number for each free site: the mean logarithm of what its choices but the widest add to the loss."""
    free = [site.name for site in problem.sites if site.name not in problem.pins]
    return {name: float(scores[name].clamp_min(1e-30).log()[scores[name] > scores[name].min()].mean().nan_to_num(-69.0)) for name in free}


def rank_correlation(a: Mapping[str, float], b: Mapping[str, float], *, seed: int = 0) -> dict[str, Any]:
    """Return Spearman's rank correlation of two sets of numbers by name, with a 95 % bootstrap interval over the names.

    Fewer than three names tell nothing: the value is then 0, as for numbers that are all equal.

    >>> rank_correlation({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 5.0, "b": 6.0, "c": 9.0})["value"]
    1.0
    """
    if len(a) < 3:
        return {"value": 0.0, "interval": [-1.0, 1.0], "n": len(a)}
    found = spearman(list(a.values()), [b[name] for name in a], seed)
    return {"value": found.value, "interval": [found.low, found.high], "n": found.n}


def predicted_loss(problem: Problem, scores: Mapping[str, Tensor], policy: Policy) -> float:
    """Return the summed sensitivity of a policy's choices."""
    places = problem.index(policy)
    return float(sum(scores[name][place] for name, place in zip(problem.choices, places, strict=True)))


def verdict(
    correlation: float, predicted: Mapping[str, float], *, few_sites: int | None = None, rival: str = "uniform"
) -> tuple[bool, list[str]]:
    """Return whether a policy is safe to transfer, and why.

    Args:
        correlation: of the layers' sensitivities on proxy and target.
        predicted: summed target sensitivity of the policy ``found``, of ``uniform`` and of the ``best``.
        few_sites: number of free sites where they are too few for the correlation to be known; None where they are enough.
        rival: what stands for uniform.

    >>> verdict(0.9, {"found": 1.2, "uniform": 2.0, "best": 1.0})[0], verdict(0.1, {"found": 1.2, "uniform": 2.0, "best": 1.0})[0]
    (True, False)
    """
    ranked = correlation >= CORRELATION and few_sites is None
    side = "at least" if correlation >= CORRELATION else "below"
    shown = distinct(correlation, CORRELATION, "{:.2f}")
    reasons = [f"layer sensitivities on proxy and target have rank correlation {shown}, {side} the threshold {CORRELATION}"]
    if few_sites is not None:
        reasons[0] += f", and it is not known: {few_sites} free sites are too few, of {SITES} or more it counts by itself"
    gain, most = predicted["uniform"] - predicted["found"], predicted["uniform"] - predicted["best"]
    enough = gain >= KEPT * most
    figures = f"(foretold loss {predicted['found']:.4g}, {rival} {predicted['uniform']:.4g}, best {predicted['best']:.4g})"
    if most > 0:
        kept = f"the policy keeps {distinct(gain / most, KEPT, '{:.0%}')} of what mixing can gain over {rival} {figures}"
        reasons.append(f"by the target's sensitivities {kept}, {'at least' if enough else 'below'} the threshold {KEPT:.0%}")
    else:
        worth = "is no worse than" if enough else "is worse than"
        reasons.append(f"by the target's sensitivities mixing has nothing to gain over {rival}, and the policy {worth} it {figures}")
    return ranked and enough, reasons


def distinct(value: float, threshold: float, form: str) -> str:
    """Return a number in a form, or as its threshold and the side it lies on where the two would look alike.

    >>> distinct(0.25, 0.4, "{:.0%}"), distinct(0.3999, 0.4, "{:.0%}"), distinct(0.4, 0.4, "{:.0%}")
    ('25%', 'just below 40%', '40%')
    """
    text = form.format(value)
    return f"just below {text}" if value < threshold and text == form.format(threshold) else text


def histograms(problem: Problem, policies: Mapping[str, Policy]) -> dict[str, Any]:
    """Return the class margins of the float network and of some policies: their means and histograms on common edges.

    The margin is the distance to the nearest boundary of the class that the float network answers, over the spread of the
    features, so it needs no label; policies are applied without training.
    """
    fit, head = problem.data.fit, problem.trace[problem.trace.last].layers[0]
    order = torch.randperm(len(fit), generator=torch.Generator().manual_seed(problem.seed))[:SAMPLE]
    images, _ = fit.batch(order)
    device = next(problem.model.parameters()).device
    split = _answered(problem, head, images)
    networks = {"float": problem.model}
    for name, policy in policies.items():
        calibration = images.to(device)
        networks[name] = quantize(problem.model, policy, calibration=calibration, correct=("batchnorm",), sites=problem.sites)
    margins = {name: margins_of(network, head, split) for name, network in networks.items()}
    low, high = (float(torch.quantile(torch.cat(list(margins.values())), q)) for q in (0.005, 0.995))
    edges = np.linspace(low, max(high, low + 1e-6), BINS + 1)
    counts = {name: np.histogram(values.numpy().clip(low, edges[-1]), edges)[0].tolist() for name, values in margins.items()}
    return {"edges": edges.tolist(), "counts": counts, "mean": {name: float(values.mean()) for name, values in margins.items()}}


def _answered(problem: Problem, head: str, images: Tensor) -> Split:
    """Return images labelled by the float network's own answers."""
    unlabelled = TensorSplit(images.cpu(), torch.zeros(len(images), dtype=torch.long))
    z, _ = features_of(problem.model, head, unlabelled)
    layer = problem.model.get_submodule(head)
    logits = z @ layer.get_parameter("weight").detach().float().cpu().T
    if isinstance(layer.bias, Tensor):
        logits = logits + layer.bias.detach().float().cpu()
    return TensorSplit(images.cpu(), logits.argmax(1), classes=logits.shape[1])
