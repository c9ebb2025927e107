r"""Layers whose width is chosen for every sample: samples of one width run together, each sample once a site.

A layer is :math:`y_n = s^x_{k} s^w_{k} (\bar w_k * \bar x_{n,k})` where k is the choice of sample n, :math:`\bar w_k` and
:math:`\bar x_{n,k}` are the integer codes at its widths and :math:`s` the step sizes learned for that width. Activations and
normalisation are quantized and scaled sample by sample, which costs nothing; the convolution groups the batch by weight width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from bitwright.adaptive.grouped import geometry_of, grouped_convolution, grouped_linear
from bitwright.errors import SiteError
from bitwright.policy import Bits
from bitwright.quant.calibration import TINY
from bitwright.quant.functional import UNTOUCHED, pick
from bitwright.quant.gates import GatedActivation, GatedWeight
from bitwright.quant.modules import Op

PRIOR = 4.0
"""Samples that the running statistics of a width count for beside those of the batch: a group of one, or none, is then no exception."""


@dataclass(frozen=True)
class Decision:
    """What a site does with each sample of a batch.

    Attributes:
        index: the choice that runs, int64 ``[N]``.
        other: the one neighbour whose output the gradient needs, int64 ``[N]``; None where no gradient is asked for.
        gate: weight of the neighbour ``[N]``: zero, and there for its gradient alone, unless outputs are interpolated.
    """

    index: Tensor
    other: Tensor | None = None
    gate: Tensor | None = None


@dataclass
class Ledger:
    """What was executed, counted where it happens: each entry is (layer, bits, samples, MACs a sample)."""

    entries: list[tuple[str, Bits, int, int]] = field(default_factory=list)

    @property
    def bitops(self) -> int:
        """The bit operations of all entries, MACs · w · a."""
        return sum(samples * macs * bits.w * bits.a for _, bits, samples, macs in self.entries)

    def samples(self, layer: str) -> int:
        """Return how many executions of one sample a layer had."""
        return sum(samples for name, _, samples, _ in self.entries if name == layer)


class Pass:
    """What the layers of one forward pass share: how a site decides, what was decided, and what is still owed.

    Attributes:
        decide: called with a site's number and its input ``[N, C, …]``.
        decisions: by site, of this pass.
        owed: outputs of neighbours that a normalisation has yet to take, by layer.
        normalised: how often the output of each layer was normalised in this pass.
        interpolate: outputs of the two widths are mixed, and both are trained.
        trust: a gate's gradient counts for no more than this: the linear estimate of a large step means little.
        replay: a pass of the same batch again: normalisation in training takes the statistics of the pass before, and moves none but
            those of choices that were hardly taken.
        ledger: counts executions, where it is set.
    """

    def __init__(self, sites: int, decide: Callable[[int, Tensor], Decision]):
        self.decide = decide
        self.decisions: list[Decision | None] = [None] * sites
        self.owed: dict[str, Tensor] = {}
        self.normalised: dict[str, int] = {}
        self.interpolate = False
        self.trust = math.inf
        self.replay = False
        self.ledger: Ledger | None = None

    def reset(self) -> None:
        """Forget the decisions of the pass before."""
        self.decisions = [None] * len(self.decisions)
        self.owed = {}
        self.normalised = {}

    def decision(self, site: int, x: Tensor) -> Decision:
        """Return what a site does; the first of its layers to run decides."""
        known = self.decisions[site]
        if known is None:
            known = self.decide(site, x)
            self.decisions[site] = known
        return known


class AdaptiveLayer(nn.Module):
    """A convolution or linear layer with one or several choices of bits; with several, its site chooses for every sample.

    Args:
        name: path in the network.
        op: what the layer computes.
        weight: latent float weight, shared by all widths.
        bias: float bias or None.
        choices: the bits it may run at.
        weights: step sizes of every weight width; None where all are 32.
        inputs: step sizes of every activation width; None where all are 32.
        site: number of its site among those that decide; -1 with one choice.
        shared: the pass.
        normalised: a `SwitchableNorm` follows and takes the neighbour's output.
    """

    a_widths: Tensor
    w_place: Tensor
    w_widths: Tensor

    def __init__(
        self,
        name: str,
        op: Op,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        choices: Sequence[Bits],
        weights: GatedWeight | None,
        inputs: GatedActivation | None,
        site: int,
        shared: Pass,
        *,
        normalised: bool = False,
    ):
        super().__init__()
        self.name, self.op, self.choices, self.site, self.shared, self.normalised = name, op, tuple(choices), site, shared, normalised
        self.weight = weight
        self.register_parameter("bias", bias)
        self.weight_quantizer, self.input_quantizer = weights, inputs
        distinct = sorted({bits.w for bits in choices})
        self.geometry = None if len(distinct) == 1 else geometry_of(name, op)
        for label, values in (
            ("a_widths", [bits.a for bits in choices]),
            ("w_widths", distinct),
            ("w_place", [distinct.index(bits.w) for bits in choices]),
        ):
            self.register_buffer(label, torch.tensor(values, device=weight.device), persistent=False)
        integer = weights is not None and inputs is not None and max(max(bits) for bits in choices) < UNTOUCHED
        self.integer = integer and weights is not None and weights.form == "lsq"

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Return each sample's output at its own width."""
        if output_size is not None:
            raise SiteError(f"layer '{self.name}' is asked for an output size, which an adaptive layer does not take; name it in skip=")
        if len(self.choices) == 1:
            index = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            return self._execute(x, index, self._weights())
        decision = self.shared.decision(self.site, x)
        weights = self._weights()
        y = self._execute(x, decision.index, weights)
        if decision.other is None:
            return y
        if self.shared.interpolate:
            other = self._execute(x, decision.other, weights)
        else:
            with torch.no_grad():
                other = self._execute(x.detach(), decision.other, weights.detach())
        if self.normalised:
            self.shared.owed[self.name] = other
            return y
        return mix(y, other, decision.gate, attached=self.shared.interpolate, trust=self.shared.trust)

    def _weights(self) -> Tensor:
        """Return the weights at every distinct width, ``[D, …]``."""
        if self.weight_quantizer is None:
            return self.weight[None]
        count = len(self.w_widths)
        return torch.stack([self.weight_quantizer.at_width(self.weight, self.w_widths[d]) for d in range(count)])

    def _execute(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Run every sample once, at its choice."""
        if self.shared.ledger is not None:
            self._record(x, index, self.shared.ledger)
        exact = self.integer and not self.training and not torch.is_grad_enabled()
        bits = spread(pick(self.a_widths, index), x)
        values = x if self.input_quantizer is None else self.input_quantizer.at_width(x, bits)
        if exact:
            return self._integers(values, bits, weights, index)
        if torch.is_autocast_enabled(x.device.type):
            half = torch.get_autocast_dtype(x.device.type)
            values, weights = values.to(half), weights.to(half)
        return self._with_bias(self._operate(values, weights, index))

    def _integers(self, values: Tensor, bits: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """Run on integer codes and scale afterwards: sums of integers below 2^24 are exact in any order, so in any batch."""
        inputs, quantizer = cast(GatedActivation, self.input_quantizer), cast(GatedWeight, self.weight_quantizer)
        step = _step(inputs.scale, bits)
        table = torch.stack([_step(quantizer.scale, width) for width in self.w_widths])
        y = self._operate((values / step).round(), (weights / table.view(len(table), *quantizer.shape)).round(), index)
        scale = pick(table, pick(self.w_place, index)) * step.view(-1, 1)
        if self.op.kind == "transposed":
            scale = scale.repeat(1, self.op.groups)
        shape = (len(y), *[1] * (y.dim() - 2), -1) if self.op.kind == "linear" else (len(y), -1, *[1] * (y.dim() - 2))
        return self._with_bias(y * scale.view(shape))

    def _operate(self, values: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        if self.geometry is None:
            return self.op(values, weights[0], None)
        place = pick(self.w_place, index)
        if self.op.kind == "linear":
            return grouped_linear(values, weights, place)
        stride, padding, dilation, transposed, extra, groups = self.geometry
        if self.op.padding_mode != "zeros":
            values = F.pad(values, self.op.padding_both, mode=self.op.padding_mode)
        result: Tensor = grouped_convolution(values, weights, place, stride, padding, dilation, transposed, extra, groups)
        return result

    def _with_bias(self, y: Tensor) -> Tensor:
        if self.bias is None:
            return y
        bias = cast(Tensor, self.bias)
        return y + (bias if self.op.kind == "linear" else bias.view(-1, *[1] * (y.dim() - 2)))

    def _record(self, x: Tensor, index: Tensor, ledger: Ledger) -> None:
        """Count what is about to run, from the tensors themselves."""
        with torch.no_grad():
            out = self.op(x[:1].detach(), self.weight.detach(), None).numel()
        per_output = math.prod(self.weight.shape[1:])
        macs = per_output * (x[0].numel() if self.op.kind == "transposed" else out)
        counts = torch.bincount(index, minlength=len(self.choices)).tolist()
        ledger.entries += [(self.name, bits, count, macs) for bits, count in zip(self.choices, counts, strict=True) if count]

    def extra_repr(self) -> str:
        """Return the choices."""
        return f"{self.op.kind}, {tuple(self.weight.shape)}, {' | '.join(map(repr, self.choices))}"


class SwitchableNorm(nn.Module):
    r"""BatchNorm with statistics, weight and bias of its own for every choice of a site (Yu et al., "Slimmable networks", 2019).

    In training a choice normalises by :math:`(n_k \hat\mu_k + n_0\mu_k)/(n_k+n_0)`, with :math:`\hat\mu_k` the mean over its
    :math:`n_k` samples of the batch, :math:`\mu_k` the running one and :math:`n_0` = `PRIOR`; the variance likewise.
    Differs: Yu et al. see whole batches of one width, so their :math:`n_0` is 0. The calls of one pass share weight, bias and
    running statistics, as those of a BatchNorm do; with ``momentum`` None these become the average over the calls.

    Args:
        norm: the BatchNorm it takes the place of.
        count: number of choices.
        site: number of the site before it.
        layer: path of the layer before it.
        shared: the pass.
        calls: how often it runs in a pass.
    """

    running_mean: Tensor
    running_var: Tensor
    last_size: Tensor
    last_mean: Tensor
    last_var: Tensor
    momentum: float | None
    decays: ClassVar[bool] = False

    def __init__(self, norm: BatchNorm, count: int, site: int, layer: str, shared: Pass, *, calls: int = 1):
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.kind, self.eps, self.momentum = type(norm), norm.eps, 0.1 if norm.momentum is None else norm.momentum
        self.site, self.layer, self.shared = site, layer, shared
        ones = torch.ones_like(norm.running_mean)
        weight, bias = (ones, 0 * ones) if norm.weight is None else (norm.weight.detach(), norm.bias.detach())
        self.weight = nn.Parameter(weight.repeat(count, 1))
        self.bias = nn.Parameter(bias.repeat(count, 1))
        self.register_buffer("running_mean", norm.running_mean.repeat(count, 1))
        self.register_buffer("running_var", norm.running_var.repeat(count, 1))
        self.register_buffer("last_size", torch.zeros(calls, count, 1), persistent=False)
        self.register_buffer("last_mean", self.running_mean.repeat(calls, 1, 1), persistent=False)
        self.register_buffer("last_var", self.running_var.repeat(calls, 1, 1), persistent=False)

    def forward(self, y: Tensor) -> Tensor:
        """Normalise each sample ``[N, C, …]`` by the statistics of its choice, and settle the neighbour's share."""
        decision = self.shared.decisions[self.site]
        assert decision is not None
        mean, var = self._statistics(y, decision.index)
        slope = self.weight * (var + self.eps).rsqrt()
        offset = self.bias - mean * slope
        out = affine(y, slope, offset, decision.index)
        other = self.shared.owed.pop(self.layer, None)
        if other is None or decision.other is None:
            return out
        changed = affine(other, slope, offset, decision.other)
        return mix(out, changed, decision.gate, attached=self.shared.interpolate, trust=self.shared.trust)

    def _statistics(self, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self.running_mean, self.running_var
        call = self.shared.normalised.get(self.layer, 0)
        self.shared.normalised[self.layer] = call + 1
        size, mean, var = self._batch(y, index)
        if self.shared.replay:
            return self._replayed(call, size, mean, var)
        share = (1 / (call + 1) if self.momentum is None else self.momentum) * (size * len(size) / len(y)).clamp_max(1.0)
        self._move(share, mean, var)
        with torch.no_grad():
            self.last_size[call].copy_(size)
            self.last_mean[call].copy_(mean.detach())
            self.last_var[call].copy_(var.detach())
        return mean, var

    def _replayed(self, call: int, size: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the pass before normalised by; choices that it hardly took are taken from this pass, and follow it.

        Without that a choice that is tried but never taken would be judged by statistics that the weights have long left behind.
        """
        seldom = self.last_size[call] < PRIOR
        self._move((0.1 if self.momentum is None else self.momentum) * (seldom & (size > 0)).to(mean.dtype), mean, var)
        return torch.where(seldom, mean, self.last_mean[call]), torch.where(seldom, var, self.last_var[call])

    def _move(self, share: Tensor, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics by a share ``[K, 1]`` of the way."""
        with torch.no_grad():
            self.running_mean.copy_(self.running_mean + share * (mean.detach() - self.running_mean))
            self.running_var.copy_(self.running_var + share * (var.detach() - self.running_var))

    def _batch(self, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return how many samples every choice has ``[K, 1]``, and its mean and variance ``[K, C]``."""
        count, axes = len(self.weight), tuple(range(2, y.dim()))
        places = math.prod(y.shape[2:])
        value = y.float()
        first = value.sum(axes) if axes else value
        second = value.square().sum(axes) if axes else value.square()
        hot = F.one_hot(index, count).to(value.dtype).transpose(0, 1)[:, :, None]
        size = hot.sum(1)
        total = (size + PRIOR) * places
        mean0, var0 = self.running_mean, self.running_var
        mean = ((hot * first).sum(1) + PRIOR * places * mean0) / total
        square = ((hot * second).sum(1) + PRIOR * places * (var0 + mean0.square())) / total
        return size, mean, (square - mean.square()).clamp_min(0)

    def plain(self, choice: int) -> BatchNorm:
        """Return the BatchNorm of one choice."""
        norm = self.kind(self.weight.shape[1], eps=self.eps, momentum=self.momentum).to(self.weight.device)
        with torch.no_grad():
            for own, table in ((norm.weight, self.weight), (norm.bias, self.bias)):
                own.copy_(table[choice])
            cast(Tensor, norm.running_mean).copy_(self.running_mean[choice])
            cast(Tensor, norm.running_var).copy_(self.running_var[choice])
        return norm.eval()


class _Toward(torch.autograd.Function):
    """A value, whose gate (of value zero) gets the gradient of moving it toward another: one pass forward and one back."""

    @staticmethod
    def forward(y: Tensor, other: Tensor, gate: Tensor, trust: float) -> Tensor:
        """Return ``y`` itself."""
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the two values."""
        y, other, _, trust = inputs
        ctx.save_for_backward(y, other)
        ctx.trust = trust

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        """Return the gradient of the value, and of each sample's gate."""
        y, other = ctx.saved_tensors
        return grad, None, (grad * (other - y)).flatten(1).float().sum(1).clamp(-ctx.trust, ctx.trust), None


def mix(y: Tensor, other: Tensor, gate: Tensor | None, *, attached: bool, trust: float) -> Tensor:
    """Return ``y`` with the neighbour's share; detached, the difference of the two is what the gate's gradient is taken against."""
    assert gate is not None
    if attached:
        return y + spread(gate, y).to(y.dtype) * (other - y)
    result: Tensor = _Toward.apply(y, other.detach(), gate, trust)  # type: ignore[no-untyped-call]
    return result


def affine(y: Tensor, slope: Tensor, offset: Tensor, index: Tensor) -> Tensor:
    """Scale and shift each sample by its choice's row of the tables ``[K, C]``."""
    shape = (len(y), -1, *[1] * (y.dim() - 2))
    return y * pick(slope, index).view(shape) + pick(offset, index).view(shape)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Return one value a sample ``[N]`` as ``[N, 1, …]``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _step(scale: Tensor, bits: Tensor) -> Tensor:
    """Return the step sizes of some widths as the quantizers use them."""
    return pick(scale, (bits - 1).clamp(0, len(scale) - 1)).abs().clamp_min(TINY)
