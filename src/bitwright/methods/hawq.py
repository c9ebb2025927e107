r"""HAWQ: the curvature of the loss at each layer, by Hutchinson's estimate of the Hessian's trace, then exact allocation.

To second order, rounding errors δ at a minimum raise the loss by :math:`\tfrac12\delta^\top H\delta`. HAWQ-V2 (Dong et al., 2020) takes the
Hessian of a layer for a multiple of the identity, its mean eigenvalue (trace over size), so that the weights of layer l at width b cost

.. math:: \Omega_l(b) = \tfrac12\,\overline{Tr}(H_l)\,\|Q_b(W_l) - W_l\|^2,

and likewise an input activation, with the trace of the Hessian with respect to it and its squared error, both averaged over samples.
The trace is :math:`E[z^\top H z]` with random signs z (Hutchinson, 1989), each probe one product of the Hessian with a vector, by
differentiating twice (Pearlmutter, 1994). HAWQ-V3 (Yao et al., 2021) chooses the widths by an integer program, as here.

Differs: the half, which makes the scores increases of the loss and changes no allocation; one vector probes the weights of all layers
at once, and one all activations (unbiased, at the price of some variance; the authors probe layer by layer), on a batch of its own;
probing ends when the mean trace of *every* layer has settled; a trace below its standard error, negative ones included, counts as that
error.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.errors import RecipeError, TrainingError, nearest
from bitwright.policy import Bits
from bitwright.problem import Problem
from bitwright.quant.bench import Bench, Place, Probe
from bitwright.sensitivity import ScoredMethod

CALIBRATION = 256
"""Fit images whose activations set the step sizes of activation quantizers."""
LEAST = 8
"""Probes that are always made: the change of a mean over fewer says little."""
Labels = Literal["given", "model"]


@dataclass(frozen=True)
class HAWQ(ScoredMethod):
    """Score every choice by the Hessian's mean trace times the squared rounding error, and allocate exactly.

    Attributes:
        samples: fit images that the loss is taken on.
        batch_size: images of one probe; the batches take turns.
        probes: random vectors at most.
        tolerance: probing ends when one more probe changes no layer's mean trace by more than this share of it.
        labels: ``given`` takes the data's, as published; ``model`` draws them from the network's own output, which needs no data and
            makes the Hessian that of the KL divergence.
    """

    samples: int = 512
    batch_size: int = 64
    probes: int = 50
    tolerance: float = 0.01
    labels: Labels = "given"

    def __post_init__(self) -> None:
        if min(self.samples, self.batch_size, self.probes) < 1 or self.tolerance < 0:
            given = f"samples={self.samples}, batch_size={self.batch_size}, probes={self.probes}, tolerance={self.tolerance}"
            raise RecipeError(f"hawq: {given}; give at least 1 of each, and a tolerance of 0 or more")
        if self.labels not in get_args(Labels):
            raise RecipeError(f"hawq: labels='{self.labels}' is unknown; {nearest(self.labels, get_args(Labels))}")

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return the estimated increase of the cross-entropy by every choice; pinned sites get zeros.

        Raises:
            TrainingError: a trace is not finite.
        """
        scores = {site.name: torch.zeros(len(problem.choices[site.name]), dtype=torch.float64) for site in problem.sites}
        for part in _probed(problem, self):
            name, trace = part.place.site.name, part.mean_trace()
            if not math.isfinite(trace):
                raise TrainingError(f"hawq: the curvature at site '{name}' is not finite; look for overflow in the network")
            for j, bits in enumerate(problem.choices[name]):
                scores[name][j] += 0.5 * trace * part.error(bits)
        return scores


@dataclass
class _Part(ABC):
    """What is quantized as one: its size, the squared error of each width, and the estimates of its Hessian's trace, one a probe.

    Of an operand all three are per sample.
    """

    place: Place
    size: int = 1
    errors: dict[int, float] = field(default_factory=dict)
    traces: list[float] = field(default_factory=list)

    @abstractmethod
    def variables(self) -> list[Tensor]:
        """Return what the loss of the pass just made is differentiated by."""

    @abstractmethod
    def error(self, bits: Bits) -> float:
        """Return the squared error that a choice causes here."""

    def mean_trace(self) -> float:
        """Return the mean eigenvalue, not below its standard error."""
        traces = torch.tensor(self.traces, dtype=torch.float64)
        noise = float(traces.std()) / len(traces) ** 0.5 if len(traces) > 1 else 0.0
        return max(float(traces.mean()), noise) / self.size

    def settled(self, tolerance: float) -> bool:
        """Say whether the last probe changed the mean trace by no more than this share of it."""
        before, now = (sum(traces) / len(traces) for traces in (self.traces[:-1], self.traces))
        return abs(now - before) <= tolerance * abs(now)


class _Weight(_Part):
    """The weight of a layer."""

    def variables(self) -> list[Tensor]:
        assert self.place.weight is not None
        return [self.place.weight]

    def error(self, bits: Bits) -> float:
        return self.errors[bits.w]


@dataclass
class _Operand(_Part):
    """An input activation, read through a probe."""

    slot: int = 0
    probe: Probe = field(default_factory=Probe)
    samples: int = 0

    def variables(self) -> list[Tensor]:
        return [zeros for _, zeros in self.probe.seen]

    def error(self, bits: Bits) -> float:
        return self.errors.get(bits.a, 0.0) / self.samples

    def note(self, samples: int) -> None:
        """Add the errors of the pass just made."""
        self.samples += samples
        self.size = sum(x.numel() for x, _ in self.probe.seen) // samples
        for width, quantizers in self.place.inputs.items():
            squares = [float((quantizers[self.slot](x) - x).detach().square().sum()) for x, _ in self.probe.seen]
            self.errors[width] = self.errors.get(width, 0.0) + sum(squares)


def _probed(problem: Problem, options: HAWQ) -> list[_Part]:
    """Return the parts of the free sites between whose widths there is a choice, with their errors and traces."""
    free = [site for site in problem.sites if site.name not in problem.pins]
    offered = [bits for site in free for bits in problem.choices[site.name]]
    weights, inputs = (sorted(widths) if len(widths) > 1 else [] for widths in ({b.w for b in offered}, {b.a for b in offered}))
    if not free:
        return []
    generator = torch.Generator().manual_seed(problem.seed)
    order = torch.randperm(len(problem.data.fit), generator=generator)
    device = next(problem.model.parameters()).device
    bench = Bench(problem.model, free, problem.data.fit.batch(order[:CALIBRATION])[0].to(device), weights=weights, inputs=inputs)
    problem.spend(bench.passes)
    parts = [*_weights(bench, weights), *(_operands(bench) if inputs else ())]
    batches = torch.split(order[: options.samples], options.batch_size)
    for k in range(options.probes):
        x, y = problem.data.fit.batch(batches[k % len(batches)])
        logits = bench.network(x.to(device))
        if options.labels == "model":
            y = torch.multinomial(logits.detach().double().softmax(1).cpu(), 1, generator=generator)[:, 0]
        loss = functional.cross_entropy(logits, y.to(logits.device), reduction="sum")
        _probe(problem, parts, loss, len(x), generator)
        if k + 1 >= max(LEAST, len(batches)) and all(part.settled(options.tolerance) for part in parts):
            break
    return parts


def _weights(bench: Bench, widths: Sequence[int]) -> list[_Part]:
    """Return the weights, each once, with the errors of every width."""
    bench.network.requires_grad_(requires_grad=False)
    owners = {id(place.weight): place for place in bench.places.values() if widths and place.weight is not None}
    parts: list[_Part] = []
    for place in owners.values():
        assert place.weight is not None
        place.weight.requires_grad_()
        parts.append(_Weight(place, place.weight.numel(), {width: float(place.weight_error(width).square().sum()) for width in widths}))
    return parts


def _operands(bench: Bench) -> list[_Part]:
    return [_Operand(place, slot=slot, probe=probe) for place in bench.places.values() for slot, probe in enumerate(place.probes())]


def _probe(problem: Problem, parts: Sequence[_Part], loss: Tensor, samples: int, generator: torch.Generator) -> None:
    """Add one estimate of every trace: of the mean loss by the weights, of each sample's loss by its operands."""
    variables = [part.variables() for part in parts]
    gradients = iter(torch.autograd.grad(loss, [v for own in variables for v in own], create_graph=True, allow_unused=True))
    problem.spend(samples, backward=True)
    pairs = [[(v, next(gradients)) for v in own] for own in variables]
    for kind in (_Weight, _Operand):
        chosen = [k for k, part in enumerate(parts) if isinstance(part, kind)]
        products = iter(_products([pair for k in chosen for pair in pairs[k]], generator))
        problem.spend(2 * samples * bool(chosen), backward=True)  # the gradient's gradient: twice the arithmetic of the gradient
        for k in chosen:
            parts[k].traces.append(sum(next(products) for _ in pairs[k]) / samples)
    for part in parts:
        if isinstance(part, _Operand):
            part.note(samples)
            part.probe.seen.clear()


def _products(pairs: Sequence[tuple[Tensor, Tensor | None]], generator: torch.Generator) -> list[float]:
    r"""Return :math:`z_k^\top (Hz)_k` of every variable k, for random signs z.

    Args:
        pairs: variables and the gradients of the loss by them, as functions of the variables.
        generator: draws the signs.
    """
    signs = [2.0 * torch.randint(2, v.shape, generator=generator).to(v) - 1 for v, _ in pairs]
    inner = [(g * z).sum() for (_, g), z in zip(pairs, signs, strict=True) if g is not None and g.requires_grad]
    if not inner:
        return [0.0] * len(pairs)
    seconds = torch.autograd.grad(torch.stack(inner).sum(), [v for v, _ in pairs], retain_graph=True, allow_unused=True)
    return [0.0 if h is None else float((z * h).sum()) for z, h in zip(signs, seconds, strict=True)]
