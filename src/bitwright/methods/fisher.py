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

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.allocation import allocate
from bitwright.driver import Proposal, SearchMethod, Trial
from bitwright.errors import RecipeError, SiteError, TrainingError
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem
from bitwright.quant import QuantLayer, quantize
from bitwright.quant.quantizers import ActivationQuantizer

CALIBRATION = 256
"""Fit images whose activations set the step sizes of activation quantizers."""
Block = Literal["weight", "kernel", "channel", "layer"]


@dataclass
class State:
    """The scores: per site one number per choice."""

    scores: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Fisher(SearchMethod[State]):
    """Score every choice by the Fisher information of the float network, and allocate exactly.

    Attributes:
        samples: fit images that gradients are taken on.
        group: samples per backward pass (with ``labels="given"`` it is always one).
        block: weights whose errors are taken together: each ``weight`` by itself (the diagonal), the spatial ``kernel`` of an
            input-output pair, an output ``channel``, or the whole ``layer``.
        labels: ``model`` draws them from the network's own output; ``given`` takes the data's.
    """

    ranking: ClassVar[Literal["loss", "last"]] = "loss"

    samples: int = 512
    group: int = 8
    block: Block = "kernel"
    labels: Literal["model", "given"] = "model"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.group < 1:
            raise RecipeError(f"fisher: samples={self.samples}, group={self.group}; give at least 1 of each")

    def start(self, problem: Problem) -> State:
        """Return the state before any score."""
        return State()

    def step(self, problem: Problem, state: State, told: Trial | None) -> tuple[State, Proposal | None]:
        """Score every choice and propose the policy of least total score within the budgets."""
        scores = fisher_scores(problem, self)
        policy = problem.policy(allocate([scores[site.name].numpy() for site in problem.sites], problem.terms, problem.limits))
        return State(scores), Proposal(policy)

    def done(self, problem: Problem, state: State) -> bool:
        """Say whether the proposal was made."""
        return bool(state.scores)


@dataclass
class _Layer:
    """One layer that is scored: what each width changes, what the last pass saw, and the sums so far (kind and width to value)."""

    path: str
    site: str
    weight: nn.Parameter
    channel_axis: int
    errors: dict[int, Tensor]
    quantizers: dict[int, ActivationQuantizer | None]
    sums: dict[tuple[str, int], float]
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def fisher_scores(problem: Problem, options: Fisher | None = None) -> dict[str, Tensor]:
    """Return the estimated increase of the KL divergence, float64 ``[choices]`` per site; pinned sites get zeros.

    The network is left as it was, and the same problem gives the same scores.

    Raises:
        SiteError: a site with several choices is a functional call, whose operands cannot be reached.
        TrainingError: gradients are not finite.
    """
    options = options or Fisher()
    scores = {site.name: torch.zeros(len(problem.choices[site.name]), dtype=torch.float64) for site in problem.sites}
    model = copy.deepcopy(problem.model).eval().requires_grad_()
    layers = _layers(problem, model)
    if not layers:
        return scores
    count = _pass(problem, options, model, layers)
    for layer in layers:
        for j, bits in enumerate(problem.choices[layer.site]):
            scores[layer.site][j] += (layer.sums.get(("w", bits.w), 0.0) + layer.sums.get(("a", bits.a), 0.0)) / (2 * count)
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise TrainingError(f"fisher: the gradients at site '{name}' are not finite; look for overflow in the network")
    return scores


def _pass(problem: Problem, options: Fisher, model: nn.Module, layers: list[_Layer]) -> int:
    """Run the samples through the network, add up every layer's sums, and return how many samples there were."""
    fit, device = problem.data.fit, layers[0].weight.device
    generator = torch.Generator().manual_seed(problem.seed)
    order = torch.randperm(len(fit), generator=generator)[: options.samples]
    for layer in layers:
        if len(layer.quantizers) > 1:
            model.get_submodule(layer.path).register_forward_pre_hook(_probe(layer))
    for index in torch.split(order, 1 if options.labels == "given" else options.group):
        x, y = fit.batch(index)
        logits = model(x.to(device))
        if options.labels == "model":
            y = torch.multinomial(logits.detach().double().softmax(1).cpu(), 1, generator=generator)[:, 0]
        _add(layers, functional.cross_entropy(logits, y.to(device), reduction="sum"), options.block)
    return len(order)


def _layers(problem: Problem, model: nn.Module) -> list[_Layer]:
    """Return the layers of the sites that have a choice, with the rounding errors of the reference quantizer."""
    free = [site for site in problem.sites if site.name not in problem.pins]
    found: list[_Layer] = []
    for site in free:
        for path in site.layers:
            if "#" in path:
                raise SiteError(f"fisher: site '{site.name}' is a functional call, which it cannot score; pin it, or use another method")
            weight = cast(nn.Parameter, model.get_submodule(path).weight)
            found.append(_Layer(path, site.name, weight, site.channel_axis, {}, {}, {}))
    widths = sorted({bits.w for site in free for bits in problem.choices[site.name]})
    inputs = sorted({bits.a for site in free for bits in problem.choices[site.name]})
    if found:
        images = problem.data.fit.take(CALIBRATION).batch(torch.arange(min(CALIBRATION, len(problem.data.fit))))[0]
        images = images.to(found[0].weight.device)
    for bits in [Bits(w, 32) for w in widths] + [Bits(32, a) for a in inputs]:
        quantized = quantize(model, Policy({site.name: bits for site in free}), calibration=images, sites=free)
        for layer in found:
            shell = cast(QuantLayer, quantized.get_submodule(layer.path))
            if bits.a == 32:
                layer.errors[bits.w] = (shell.quantized_weight() - shell.weight).detach()
            else:
                layer.quantizers[bits.a] = shell.input_quantizer
    return found


def _probe(layer: _Layer) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Return a hook that adds zeros to a layer's input: their gradient is that of this layer's input, whoever else reads it."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        zeros = torch.zeros_like(args[0], requires_grad=True)
        layer.seen.append((args[0].detach(), zeros))
        return (args[0] + zeros, *args[1:])

    return hook


def _add(layers: list[_Layer], loss: Tensor, block: Block) -> None:
    """Add the squared effects of one backward pass to every layer's sums."""
    weights = {id(layer.weight): layer.weight for layer in layers}
    zeros = [zero for layer in layers for _, zero in layer.seen]
    gradients = torch.autograd.grad(loss, [*weights.values(), *zeros], allow_unused=True)
    by_weight = dict(zip(weights, gradients, strict=False))
    by_input = iter(gradients[len(weights) :])
    for layer in layers:
        gradient = by_weight.pop(id(layer.weight), None)  # popped: a weight that two layers share counts once
        if gradient is not None:
            for width, error in layer.errors.items():
                _accumulate(layer, ("w", width), _blocks(gradient * error, block, layer.channel_axis))
        for x, _ in layer.seen:
            gradient = next(by_input)
            for width, quantizer in layer.quantizers.items():
                if gradient is not None and quantizer is not None:
                    _accumulate(layer, ("a", width), gradient * (quantizer(x) - x).detach())
        layer.seen.clear()


def _accumulate(layer: _Layer, key: tuple[str, int], effect: Tensor) -> None:
    layer.sums[key] = layer.sums.get(key, 0.0) + float(effect.square().sum())


def _blocks(effect: Tensor, block: Block, channel_axis: int) -> Tensor:
    """Sum the first-order effects of the weights over each block."""
    if block == "kernel":
        return effect.flatten(2).sum(2) if effect.dim() > 2 else effect
    if block == "channel":
        return effect.movedim(channel_axis, 0).flatten(1).sum(1)
    return effect.sum() if block == "layer" else effect
