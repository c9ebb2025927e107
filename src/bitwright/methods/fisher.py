r"""Fisher: one pass of gradients scores every choice of every site, then exact allocation.

To second order, changing a trained network's weights by δ moves its output distribution by
:math:`KL \approx \tfrac12 \delta^\top F \delta` with the Fisher information :math:`F = E[g g^\top]`, where g is the gradient
of one sample's log-likelihood and the label is drawn from the network's own distribution (Amari, 1998; Martens, 2020, §5).
With δ the rounding error of a choice this scores the choice with no evaluation of the quantized network, as HAWQ-V2 does with
the Hessian's trace (Dong et al., 2020). F is taken to be zero between sites (so scores add, and allocation is exact) and
between blocks B of weights inside a site; activations are taken one by one:

.. math:: s_w = \tfrac12 \sum_B E\Big[\big(\textstyle\sum_{k \in B} g_k \delta_k\big)^2\Big], \qquad
          s_a = \tfrac12 \sum_j E\big[g_j^2 \delta_j^2\big].

By default a block is one spatial kernel. Labels drawn from the network need no data, and make the square of the summed gradient of
a few independent samples an unbiased estimate of the sum of their squared gradients (the Gauss-Newton-Bartlett estimator; Liu
et al., "Sophia", 2024, §2.3): one backward pass per ``group`` samples is enough. With given labels (the "empirical" Fisher;
Kunstner et al., 2019, on its flaws) that does not hold, and every sample gets a pass of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.errors import RecipeError, TrainingError, nearest
from bitwright.problem import Problem
from bitwright.quant.bench import Bench, Place, Probe
from bitwright.quant.codes import rounded_errors
from bitwright.quant.modules import QuantLayer
from bitwright.sensitivity import ScoredMethod

CALIBRATION = 256
"""Fit images whose activations set the step sizes of activation quantizers."""
Block = Literal["weight", "kernel", "channel", "layer"]
Labels = Literal["model", "given"]
Errors = Literal["nearest", "second-order"]


@dataclass(frozen=True)
class Fisher(ScoredMethod):
    """Score every choice by the Fisher information of the float network, and allocate exactly.

    Attributes:
        samples: fit images that gradients are taken on.
        group: samples per backward pass (with ``labels="given"`` it is always one).
        block: weights whose errors are taken together: each ``weight`` by itself (the diagonal), the spatial ``kernel`` of an
            input-output pair, an output ``channel``, or the whole ``layer``.
        labels: ``model`` draws them from the network's own output; ``given`` takes the data's.
        errors: δ is the error of the ``nearest`` codes, or what ``second-order`` rounding leaves, as a post-training quantization that
            corrects itself will have it (`bitwright.quant.corrections`); its errors make up for each other within an output channel,
            so take ``block="channel"`` with it.
    """

    samples: int = 512
    group: int = 8
    block: Block = "kernel"
    labels: Labels = "model"
    errors: Errors = "nearest"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.group < 1:
            raise RecipeError(f"fisher: samples={self.samples}, group={self.group}; give at least 1 of each")
        for name, known in (("block", Block), ("labels", Labels), ("errors", Errors)):
            value = getattr(self, name)
            if value not in get_args(known):
                raise RecipeError(f"fisher: {name}='{value}' is unknown; {nearest(value, get_args(known))}")

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return the estimated increase of the KL divergence by every choice."""
        return fisher_scores(problem, self)


@dataclass
class _Layer:
    """One layer or functional call that is scored: what each width changes, and the sums so far (kind and width to value)."""

    place: Place
    errors: dict[int, Tensor]
    probes: list[Probe] = field(default_factory=list)
    sums: dict[tuple[str, int], float] = field(default_factory=dict)


def fisher_scores(problem: Problem, options: Fisher | None = None) -> dict[str, Tensor]:
    """Return the estimated increase of the KL divergence, float64 ``[choices]`` per site; pinned sites get zeros.

    The network is left as it was, and the same problem gives the same scores.

    Raises:
        TrainingError: gradients are not finite.
    """
    options = options or Fisher()
    scores = {site.name: torch.zeros(len(problem.choices[site.name]), dtype=torch.float64) for site in problem.sites}
    free = [site for site in problem.sites if site.name not in problem.pins]
    if not free:
        return scores
    generator = torch.Generator().manual_seed(problem.seed)
    order = torch.randperm(len(problem.data.fit), generator=generator)
    network, layers = _probed(problem, problem.data.fit.batch(order[:CALIBRATION])[0], options.errors)
    order = order[: options.samples]
    for index in torch.split(order, 1 if options.labels == "given" else options.group):
        x, y = problem.data.fit.batch(index)
        logits = network(x.to(_device(network)))
        if options.labels == "model":
            y = torch.multinomial(logits.detach().double().softmax(1).cpu(), 1, generator=generator)[:, 0]
        problem.spend(len(x), backward=True)
        _add(layers, functional.cross_entropy(logits, y.to(logits.device), reduction="sum"), options.block)
    for layer in layers:
        name = layer.place.site.name
        for j, bits in enumerate(problem.choices[name]):
            scores[name][j] += (layer.sums.get(("w", bits.w), 0.0) + layer.sums.get(("a", bits.a), 0.0)) / (2 * len(order))
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise TrainingError(f"fisher: the gradients at site '{name}' are not finite; look for overflow in the network")
    return scores


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _probed(problem: Problem, images: Tensor, rounding: str) -> tuple[nn.Module, list[_Layer]]:
    """Return a float copy of the network with probes at the operands, and its layers with the errors of every weight width."""
    free = [site for site in problem.sites if site.name not in problem.pins]
    offered = [bits for site in free for bits in problem.choices[site.name]]
    weights, inputs = sorted({bits.w for bits in offered}), sorted({bits.a for bits in offered})
    compared = inputs if len(inputs) > 1 else ()  # with one width there is nothing to compare
    images = images.to(_device(problem.model))
    bench = Bench(problem.model, free, images, weights=weights, inputs=compared)
    problem.spend(bench.passes)
    changed: dict[str, dict[int, Tensor]] = {}
    if rounding == "second-order":
        modules = {at: place.module for at, place in bench.places.items() if isinstance(place.module, QuantLayer)}
        changed = rounded_errors(bench.network, modules, {at: bench.places[at].weights for at in modules}, images)
        problem.spend(len(images))
    layers = []
    for address, place in bench.places.items():
        errors = {width: place.weight_error(width) for width in weights} if place.weight is not None else {}
        errors |= changed.get(address, {})
        layers.append(_Layer(place, errors, place.probes() if compared else []))
    return bench.network.requires_grad_(), layers


def _add(layers: list[_Layer], loss: Tensor, block: Block) -> None:
    """Add the squared effects of one backward pass to every layer's sums."""
    weights = {id(layer.place.weight): layer.place.weight for layer in layers if layer.place.weight is not None}
    zeros = [zero for layer in layers for probe in layer.probes for _, zero in probe.seen]
    gradients = iter(torch.autograd.grad(loss, [*weights.values(), *zeros], allow_unused=True))
    by_weight = dict(zip(weights, gradients, strict=False))
    for layer in layers:
        gradient = by_weight.pop(id(layer.place.weight), None)  # popped: a weight that two layers share counts once
        if gradient is not None:
            for width, error in layer.errors.items():
                _accumulate(layer, ("w", width), _blocks(gradient * error, block, layer.place.site.channel_axis))
        for k, probe in enumerate(layer.probes):
            for x, _ in probe.seen:
                gradient = next(gradients)
                for width, quantizers in layer.place.inputs.items() if gradient is not None else ():
                    _accumulate(layer, ("a", width), gradient * (quantizers[k](x) - x).detach())
            probe.seen.clear()


def _accumulate(layer: _Layer, key: tuple[str, int], effect: Tensor) -> None:
    layer.sums[key] = layer.sums.get(key, 0.0) + float(effect.square().sum())


def _blocks(effect: Tensor, block: Block, channel_axis: int) -> Tensor:
    """Sum the first-order effects of the weights over each block."""
    if block == "kernel":
        return effect.flatten(2).sum(2) if effect.dim() > 2 else effect
    if block == "channel":
        return effect.movedim(channel_axis, 0).flatten(1).sum(1) if effect.dim() > 1 else effect
    return effect.sum() if block == "layer" else effect
