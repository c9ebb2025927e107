r"""Layers that run on a gate: a weight for each of a few widths, both held as data.

One relaxation mechanism serves every search method. A gated tensor is :math:`\sum_k g_k Q_{b_k}(x)`, with widths
:math:`b_k` and gate :math:`g_k` in tensors that a method writes before each step, so that no step recompiles. The gradient
of the gate is :math:`\partial L/\partial g_k = \langle \partial L/\partial x^q, Q_{b_k}(x)\rangle`; how it reaches the
method's own parameters (a Bernoulli draw, a softmax, an interpolation) is the method's business.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from bitwright.policy import Bits
from bitwright.quant.calibration import TINY, calibrate, is_signed
from bitwright.quant.convert import layer_inputs
from bitwright.quant.functional import (
    SIGNED_MAX,
    UNSIGNED_MAX,
    UNTOUCHED,
    bounds,
    dorefa_weights,
    entropy_weights,
    fake_quantize,
    pick,
    round_to_grid,
    scale_gradient,
)
from bitwright.quant.modules import Op, QuantLayer, replace_module

WeightForm = Literal["lsq", "entropy", "dorefa"]
TABLE = 8
"""Widths of an integer grid, 1 to 8: learned step sizes are held for each."""


@dataclass(frozen=True)
class Gate:
    """The widths that a tensor mixes, and with what weights; layers that decide together share one.

    Attributes:
        widths: int64 ``[K]``.
        weights: ``[K]``, a leaf whose gradient a method reads.
    """

    widths: Tensor
    weights: nn.Parameter

    @classmethod
    def at(cls, widths: Sequence[int], weights: Sequence[float]) -> Gate:
        """Return a gate at some widths."""
        return cls(torch.tensor(widths), nn.Parameter(torch.tensor(weights)))


class GatedWeight(nn.Module):
    """Weights on a mixture of grids.

    Args:
        gate: widths and their weights.
        form: ``lsq`` holds one learned step size per width and output channel; ``entropy`` and ``dorefa`` hold none.
        weight: float weights, for calibration.
        axis: output-channel axis.
    """

    widths: Tensor

    def __init__(self, gate: Gate, form: WeightForm, weight: Tensor, axis: int):
        super().__init__()
        self.register_buffer("widths", gate.widths, persistent=False)
        self.gate, self.form, self.axis = gate.weights, form, axis
        if form == "lsq":
            steps = [calibrate(weight, bits, axis=axis) for bits in range(1, TABLE + 1)]
            self.shape = steps[0].shape
            self.scale = nn.Parameter(torch.stack([step.flatten() for step in steps]))
            per_step = weight.numel() / weight.shape[axis]
            factors = [1 / math.sqrt(per_step * SIGNED_MAX[bits]) for bits in range(1, TABLE + 1)]
            self.register_buffer("factors", torch.tensor(factors), persistent=False)

    def at_width(self, weight: Tensor, bits: Tensor) -> Tensor:
        """Return the weights on the grid of one width, a 0-dimensional tensor."""
        if self.form == "dorefa":
            return dorefa_weights(weight, bits)
        if self.form == "entropy":
            return entropy_weights(weight.movedim(self.axis, 0), bits).movedim(0, self.axis)
        place = (bits - 1).clamp(0, TABLE - 1)
        step = scale_gradient(pick(self.scale, place), pick(cast(Tensor, self.factors), place)).abs().clamp_min(TINY).view(self.shape)
        low, high = bounds(bits, weight)
        return torch.where(bits >= UNTOUCHED, weight, round_to_grid(weight, step, low, high, bits == 1))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the mixture."""
        parts = [self.gate[k] * self.at_width(weight, self.widths[k]) for k in range(len(self.widths))]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


class GatedActivation(nn.Module):
    """Activations on a mixture of unsigned or signed integer grids, one learned step size per width.

    Args:
        gate: widths and their weights.
        sample: inputs of the layer, ``[N, …]``; they decide sign and first step sizes.
    """

    widths: Tensor

    def __init__(self, gate: Gate, sample: Tensor):
        super().__init__()
        self.register_buffer("widths", gate.widths, persistent=False)
        self.gate, self.signed = gate.weights, is_signed(sample)
        steps = [calibrate(sample, bits, signed=self.signed) for bits in range(1, TABLE + 1)]
        self.scale = nn.Parameter(torch.stack(steps))
        self.error = torch.tensor([self._error(sample, step, bits) for bits, step in enumerate(steps, 1)])
        highest = SIGNED_MAX if self.signed else UNSIGNED_MAX
        count = max(1, sample.numel() // sample.shape[0])
        factors = [1 / math.sqrt(count * highest[bits]) for bits in range(1, TABLE + 1)]
        self.register_buffer("factors", torch.tensor(factors), persistent=False)

    def _error(self, sample: Tensor, step: Tensor, bits: int) -> float:
        """Return the relative squared error of a width on the sample."""
        rounded = fake_quantize(sample, step, bits, signed=self.signed)
        return float((rounded - sample).square().sum() / sample.square().sum().clamp_min(TINY))

    def at_width(self, x: Tensor, bits: Tensor) -> Tensor:
        """Return the activations on the grid of one width, a 0-dimensional tensor."""
        place = (bits - 1).clamp(0, TABLE - 1)
        step = scale_gradient(pick(self.scale, place), pick(cast(Tensor, self.factors), place)).abs().clamp_min(TINY)
        low, high = bounds(bits, step, signed=self.signed)
        rounded = round_to_grid(x, step, low, high, (bits == 1) if self.signed else False)
        return torch.where(bits >= UNTOUCHED, x, rounded)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixture."""
        parts = [self.gate[k] * self.at_width(x, self.widths[k]) for k in range(len(self.widths))]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


@dataclass(frozen=True)
class LayerGates:
    """What a layer runs on: a gate, or a fixed width, for its weights and for its input."""

    weights: Gate | int
    inputs: Gate | int


def switchable(model: nn.Module, gates: Mapping[str, LayerGates], images: Tensor, *, form: WeightForm = "lsq") -> nn.Module:
    """Return a copy of a model whose layers run on gates.

    Args:
        model: float network.
        gates: by module path; a layer that is not named stays float.
        images: calibration inputs ``[N, …]``.
        form: how weights are quantized.

    >>> gate = Gate.at([4, 2], [1.0, 0.0])
    >>> net = switchable(nn.Sequential(nn.Linear(4, 2)), {"0": LayerGates(gate, 32)}, torch.zeros(1, 4))
    >>> net[0].quantized_weight().shape
    torch.Size([2, 4])
    """
    result = copy.deepcopy(model)
    seen = layer_inputs(result, gates, images)
    for path, wanted in gates.items():
        layer = cast(nn.Conv2d, result.get_submodule(path))
        op = Op.of(layer)
        weight, bias = cast(nn.Parameter, layer.weight), cast("nn.Parameter | None", layer.bias)
        weights = inputs = None
        if isinstance(wanted.weights, Gate) or wanted.weights < UNTOUCHED:
            weights = GatedWeight(_gate(wanted.weights), form, weight.detach(), op.channel_axis)
        if isinstance(wanted.inputs, Gate) or wanted.inputs < UNTOUCHED:
            inputs = GatedActivation(_gate(wanted.inputs), seen[path])
        shell = QuantLayer(op, weight, bias, Bits(32, 32), None, None)
        shell.weight_quantizer, shell.input_quantizer = weights, inputs  # type: ignore[assignment]
        replace_module(result, path, shell.to(weight.device))
    return result


def _gate(wanted: Gate | int) -> Gate:
    """Return a fixed width as a gate that no gradient enters."""
    if isinstance(wanted, Gate):
        return wanted
    fixed = Gate.at([wanted], [1.0])
    fixed.weights.requires_grad_(False)
    return fixed
