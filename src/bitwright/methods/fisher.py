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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.allocation import allocate
from bitwright.driver import Proposal, SearchMethod, Trial
from bitwright.errors import RecipeError, TrainingError
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem
from bitwright.quant import QuantLayer, quantize
from bitwright.quant.functional import UNTOUCHED
from bitwright.quant.functional_calls import ProductCall
from bitwright.quant.modules import call_address

if TYPE_CHECKING:
    from bitwright.sites import Site

CALIBRATION = 256
"""Fit images whose activations set the step sizes of activation quantizers."""
OPERANDS = (("input_quantizer",), ("left_quantizer", "right_quantizer"))
"""Where a layer, and where a product of two activations, keeps the quantizers of its operands."""
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


class _Probe(nn.Module):
    """Adds zeros to an operand: their gradient is that of the operand as this layer alone reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Return the operand, and note it."""
        zeros = torch.zeros_like(x, requires_grad=True)
        self.seen.append((x.detach(), zeros))
        return x + zeros


@dataclass
class _Layer:
    """One layer or functional call that is scored: what each width changes, and the sums so far (kind and width to value)."""

    site: str
    module: nn.Module
    weight: nn.Parameter | None
    channel_axis: int
    errors: dict[int, Tensor] = field(default_factory=dict)
    probes: list[_Probe] = field(default_factory=list)
    quantizers: list[dict[int, nn.Module]] = field(default_factory=list)
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
    network, layers = _probed(problem, free, problem.data.fit.batch(order[:CALIBRATION])[0])
    order = order[: options.samples]
    for index in torch.split(order, 1 if options.labels == "given" else options.group):
        x, y = problem.data.fit.batch(index)
        logits = network(x.to(_device(network)))
        if options.labels == "model":
            y = torch.multinomial(logits.detach().double().softmax(1).cpu(), 1, generator=generator)[:, 0]
        problem.spend(len(x), backward=True)
        _add(layers, functional.cross_entropy(logits, y.to(logits.device), reduction="sum"), options.block)
    for layer in layers:
        for j, bits in enumerate(problem.choices[layer.site]):
            scores[layer.site][j] += (layer.sums.get(("w", bits.w), 0.0) + layer.sums.get(("a", bits.a), 0.0)) / (2 * len(order))
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise TrainingError(f"fisher: the gradients at site '{name}' are not finite; look for overflow in the network")
    return scores


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _probed(problem: Problem, free: Sequence[Site], images: Tensor) -> tuple[nn.Module, list[_Layer]]:
    """Return a float copy of the network with probes at the operands, and its layers with the errors of every width."""
    images = images.to(_device(problem.model))
    # A product has a place for probes only where it is quantized; they take the place of its quantizers.
    float_bits = {site.name: Bits(1, 1) if site.operands == 2 else Bits(32, 32) for site in free}
    network, modules = _shells(problem, float_bits, free, images)
    network.eval().requires_grad_()
    axes = {site.name: site.channel_axis for site in free}
    layers = {at: _Layer(site, module, _weight(module), axes[site]) for at, (site, module) in modules.items()}
    for width in sorted({bits.w for site in free for bits in problem.choices[site.name]}):
        for at, (_, module) in _shells(problem, {site.name: Bits(width, 32) for site in free}, free, images)[1].items():
            if isinstance(module, QuantLayer):
                layers[at].errors[width] = (module.quantized_weight() - module.weight).detach()
    inputs = sorted({bits.a for site in free for bits in problem.choices[site.name]})
    if len(inputs) > 1:  # with one width there is nothing to compare
        _place_probes(problem, free, images, layers, [width for width in inputs if width < UNTOUCHED])
    return network, list(layers.values())


def _place_probes(problem: Problem, free: Sequence[Site], images: Tensor, layers: dict[str, _Layer], widths: list[int]) -> None:
    """Put a probe at every operand, and note the quantizers of every width that could stand there."""
    for layer in layers.values():
        for slot in OPERANDS[type(layer.module) is ProductCall]:
            layer.probes.append(_Probe())
            layer.quantizers.append({})
            setattr(layer.module, slot, layer.probes[-1])
    for width in widths:
        for at, (_, module) in _shells(problem, {site.name: Bits(32, width) for site in free}, free, images)[1].items():
            for slot, quantizers in zip(OPERANDS[type(module) is ProductCall], layers[at].quantizers, strict=True):
                quantizers[width] = getattr(module, slot)


def _shells(
    problem: Problem, policy: dict[str, Bits], free: Sequence[Site], images: Tensor
) -> tuple[nn.Module, dict[str, tuple[str, nn.Module]]]:
    """Return a quantized copy, and by address the site and the module that quantizes there."""
    quantized = quantize(problem.model, Policy(policy), calibration=images, sites=free)
    owner = {address: site.name for site in free for address in site.layers}
    found = {call_address(path): module for path, module in quantized.named_modules() if isinstance(module, (QuantLayer, ProductCall))}
    return quantized, {at: (owner[at], module) for at, module in found.items() if at in owner}


def _weight(module: nn.Module) -> nn.Parameter | None:
    return module.weight if isinstance(module, QuantLayer) else None


def _add(layers: list[_Layer], loss: Tensor, block: Block) -> None:
    """Add the squared effects of one backward pass to every layer's sums."""
    weights = {id(layer.weight): layer.weight for layer in layers if layer.weight is not None}
    zeros = [zero for layer in layers for probe in layer.probes for _, zero in probe.seen]
    gradients = iter(torch.autograd.grad(loss, [*weights.values(), *zeros], allow_unused=True))
    by_weight = dict(zip(weights, gradients, strict=False))
    for layer in layers:
        gradient = by_weight.pop(id(layer.weight), None)  # popped: a weight that two layers share counts once
        if gradient is not None:
            for width, error in layer.errors.items():
                _accumulate(layer, ("w", width), _blocks(gradient * error, block, layer.channel_axis))
        for probe, quantizers in zip(layer.probes, layer.quantizers, strict=False):
            for x, _ in probe.seen:
                gradient = next(gradients)
                for width, quantizer in quantizers.items() if gradient is not None else ():
                    _accumulate(layer, ("a", width), gradient * (quantizer(x) - x).detach())
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
