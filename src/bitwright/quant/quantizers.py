"""Quantizers as modules: a grid, a width held as data, and the parameters that are learned.

============  =======================  ============  ==========================  ===================
name          weights                  grid          activations                 learned
============  =======================  ============  ==========================  ===================
``lsq``       LSQ, per channel/tensor  integer       LSQ, per tensor             step sizes
``entropy``   N2UQ-normalised          half-integer  LSQ, per tensor             activation steps
``dorefa``    tanh-normalised          half-integer  clip to [0, 1]              nothing
``pact``      tanh-normalised          half-integer  PACT                        activation clip
============  =======================  ============  ==========================  ===================

A half-integer grid has no integer zero point: a level is ``(k + 1/2)`` steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from bitwright.quant.calibration import TINY, Rule, calibrate, is_signed, power_of_two_steps
from bitwright.quant.functional import (
    SIGNED_MAX,
    SIGNED_MIN,
    SIGNED_MIN_NARROW,
    UNSIGNED_MAX,
    codes,
    dorefa_activations,
    dorefa_weights,
    entropy_scale,
    entropy_weights,
    pact_activations,
    round_to_grid,
    scale_gradient,
    to_power_of_two,
)

Grid = Literal["integer", "half-integer"]


class Codes(NamedTuple):
    """A tensor as codes: ``value = (codes + origin) * scale``, exactly.

    ``codes`` is uint8 in ``0 … 2^bits - 1``; ``origin`` a multiple of one half; ``scale`` float32, broadcastable to the codes.
    """

    codes: Tensor
    origin: float
    scale: Tensor
    bits: int

    def decode(self) -> Tensor:
        """Return the float32 values."""
        return (self.codes.to(torch.float32) + self.origin) * self.scale


class WeightQuantizer(nn.Module, ABC):
    """Maps latent weights to the levels of a grid; the width is a buffer, so that changing it recompiles nothing."""

    grid: ClassVar[Grid]
    bits: Tensor

    def __init__(self, bits: int):
        super().__init__()
        self.register_buffer("bits", torch.tensor(bits), persistent=False)

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """Return weights on the grid, of the same shape."""

    @abstractmethod
    def step(self, weight: Tensor) -> Tensor:
        """Return the distance of two neighbouring levels, broadcastable to ``weight``."""

    def clip(self, weight: Tensor) -> Tensor:
        """Return the latent weights kept between the outermost levels; a grid that clips nothing returns them as they are."""
        return weight

    def encode(self, weight: Tensor) -> Codes:
        """Return the codes whose `Codes.decode` equals ``forward(weight)`` bit for bit."""
        with torch.no_grad():
            width, value, step = int(self.bits), self(weight), self.step(weight)
            origin = self.origin(width)
            index = (value / step - origin).round().clamp(0, 2**width - 1).to(torch.uint8)
            return Codes(index, origin, step.float(), width)

    def origin(self, bits: int) -> float:
        """Return the lowest level in steps; a half-integer grid is symmetric."""
        return -float(2**bits - 1) / 2


class LSQWeight(WeightQuantizer):
    r"""Learned step size (Esser et al., 2020) on the integer grid.

    Args:
        weight: float weights that the step sizes are calibrated on.
        bits: width, 1 to 8.
        axis: output-channel axis for one step size a channel; None for one in all.
        narrow: drop the lowest code.
        entropy: express the step in units of the filter's mean magnitude, starting at
            :math:`2^{2-b}\,\mathrm{mean}|w|`, where the levels are about equally used (Liu et al., "N2UQ", 2022, eq. 7).
            Differs: they have a half-integer grid and no learned step.
        rule: calibration of the first step size without ``entropy``.
        power_of_two: round every step size to a power of two.

    The gradient of the step size is multiplied by :math:`1/\sqrt{N Q_p}`, N the weights that share it (§2.2).
    """

    grid = "integer"
    low: Tensor
    high: Tensor
    gradient_scale: Tensor

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        *,
        axis: int | None = 0,
        narrow: bool = False,
        entropy: bool = False,
        rule: Rule = "mse",
        power_of_two: bool = False,
    ):
        super().__init__(bits)
        self.axis, self.narrow, self.entropy, self.rule, self.power_of_two = axis, narrow, entropy, rule, power_of_two
        for name in ("low", "high", "gradient_scale"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32), persistent=False)
        self.scale = nn.Parameter(torch.ones(self._shape(weight), dtype=torch.float32))
        self.set_bits(bits, weight)

    def set_bits(self, bits: int, weight: Tensor) -> None:
        """Change the width in place and calibrate the step sizes anew."""
        self.bits.fill_(bits)
        self.low.fill_((SIGNED_MIN_NARROW if self.narrow else SIGNED_MIN)[bits])
        self.high.fill_(SIGNED_MAX[bits])
        self.gradient_scale.fill_(1 / math.sqrt(weight.numel() / self.scale.numel() * SIGNED_MAX[bits]))
        with torch.no_grad():
            if self.entropy:
                self.scale.fill_(2.0 ** (2 - bits) if bits > 1 else 1.0)
            else:
                step = calibrate(weight, bits, narrow=self.narrow, axis=self.axis, rule=self.rule)
                self.scale.copy_(power_of_two_steps(weight, step, bits, narrow=self.narrow) if self.power_of_two else step)

    def _shape(self, weight: Tensor) -> list[int]:
        return [n if self.axis is not None and k == self.axis else 1 for k, n in enumerate(weight.shape)]

    def step(self, weight: Tensor) -> Tensor:
        """Return the effective step sizes, at least `TINY`."""
        step = scale_gradient(self.scale, self.gradient_scale).abs().clamp_min(TINY)
        step = step * self._magnitude(weight) if self.entropy else step
        return to_power_of_two(step) if self.power_of_two else step

    def _magnitude(self, weight: Tensor) -> Tensor:
        """Return the mean magnitude that shares each step."""
        moved = weight if self.axis is None else weight.movedim(self.axis, 0)
        if self.axis is None:
            return moved.detach().abs().mean().clamp_min(TINY).view(self._shape(weight))
        return entropy_scale(moved).view(self._shape(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Return weights on the grid."""
        step = self.step(weight)
        return round_to_grid(weight, step, self.low, self.high, self.bits == 1)

    def clip(self, weight: Tensor) -> Tensor:
        """Return the latent weights kept between the outermost levels; no gradient flows into the step sizes."""
        step = self.step(weight).detach()
        return torch.minimum(torch.maximum(weight, self.low * step), self.high * step)

    def origin(self, bits: int) -> float:
        """Return the lowest level in steps; one bit has the levels -1/2 and 1/2 of a doubled step."""
        return -0.5 if bits == 1 else float((SIGNED_MIN_NARROW if self.narrow else SIGNED_MIN)[bits])

    def encode(self, weight: Tensor) -> Codes:
        """Return the codes; at one bit the step is doubled so that neighbouring levels are one code apart."""
        with torch.no_grad():
            step = self.step(weight)
            units = codes(weight, step, self.low, self.high, self.bits == 1)
            width = int(self.bits)
            index = (units + 1) / 2 if width == 1 else units - self.low
            return Codes(index.to(torch.uint8), self.origin(width), (2 * step if width == 1 else step).float(), width)


class DoReFaWeight(WeightQuantizer):
    """DoReFa-Net weights (Zhou et al., 2016): tanh-normalised to [-1, 1]; half-integer grid, nothing learned."""

    grid = "half-integer"

    def step(self, weight: Tensor) -> Tensor:
        """Return two over the number of steps; twice the mean magnitude at one bit."""
        width = int(self.bits)
        if width == 1:
            return 2 * weight.detach().abs().mean()
        return 2 / torch.tensor(float(2**width - 1), device=weight.device)

    def forward(self, weight: Tensor) -> Tensor:
        """Return weights on the grid."""
        return dorefa_weights(weight, self.bits)

    def clip(self, weight: Tensor) -> Tensor:
        """Return the weights as they are rounded: normalised by tanh, above one bit."""
        squashed = torch.tanh(weight)
        return torch.where(self.bits == 1, weight, squashed / squashed.detach().abs().amax().clamp_min(1e-12))


class EntropyWeight(WeightQuantizer):
    """Entropy-normalised uniform weights (Liu et al., "N2UQ", 2022, eq. 7); half-integer grid, nothing learned."""

    grid = "half-integer"

    def __init__(self, bits: int, *, axis: int = 0):
        super().__init__(bits)
        self.axis = axis

    def step(self, weight: Tensor) -> Tensor:
        """Return the step of each output channel."""
        steps = torch.tensor(float(2 ** int(self.bits) - 1), device=weight.device)
        moved = 2 * (entropy_scale(weight.movedim(self.axis, 0)) * (2 * steps / (steps + 1))) / steps
        return moved.movedim(0, self.axis)

    def forward(self, weight: Tensor) -> Tensor:
        """Return weights on the grid."""
        return entropy_weights(weight.movedim(self.axis, 0), self.bits).movedim(0, self.axis)


class ActivationQuantizer(nn.Module, ABC):
    """Maps a layer's input to a grid; the width is a buffer."""

    bits: Tensor

    def __init__(self, bits: int):
        super().__init__()
        self.register_buffer("bits", torch.tensor(bits), persistent=False)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return activations on the grid, of the same shape."""

    @abstractmethod
    def calibrate(self, x: Tensor) -> None:
        """Set the start of what is learned from a sample of the input."""

    @abstractmethod
    def step(self) -> Tensor:
        """Return the distance of two neighbouring levels, 0-dimensional."""

    @property
    def codes(self) -> tuple[int, int]:
        """The lowest and the highest level, in steps; a signed binary grid has nothing between its -1 and 1."""
        return 0, UNSIGNED_MAX[int(self.bits)]


class LSQActivation(ActivationQuantizer):
    r"""Learned step size for activations, one a tensor (Esser et al., 2020); unsigned unless the sample holds negatives.

    The gradient of the step size is multiplied by :math:`1/\sqrt{N Q_p}`, N the elements of the input per sample (§2.2).
    """

    low: Tensor
    high: Tensor
    gradient_scale: Tensor

    def __init__(self, bits: int, *, rule: Rule = "mse", power_of_two: bool = False):
        super().__init__(bits)
        self.rule, self.signed, self.power_of_two = rule, False, power_of_two
        for name in ("low", "high", "gradient_scale"):
            self.register_buffer(name, torch.ones((), dtype=torch.float32))
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float32))
        self.register_load_state_dict_post_hook(_read_sign)  # type: ignore[no-untyped-call]
        self.set_sign(signed=False)

    def set_sign(self, *, signed: bool) -> None:
        """Choose the signed or unsigned grid of the width."""
        width = int(self.bits)
        self.signed = signed
        self.low.fill_(SIGNED_MIN[width] if signed else 0)
        self.high.fill_((SIGNED_MAX if signed else UNSIGNED_MAX)[width])

    def calibrate(self, x: Tensor) -> None:
        """Choose the sign by what ``x`` holds and the step size by the rule; ``x`` has the batch first."""
        self.set_sign(signed=is_signed(x))
        with torch.no_grad():
            width = int(self.bits)
            step = calibrate(x, width, signed=self.signed, rule=self.rule)
            self.scale.copy_(power_of_two_steps(x, step, width, signed=self.signed) if self.power_of_two else step)
        self.gradient_scale.fill_(1 / math.sqrt(max(1, x.numel() // x.shape[0]) * float(self.high)))

    def step(self) -> Tensor:
        """Return the effective step size, at least `TINY`."""
        step = scale_gradient(self.scale, self.gradient_scale).abs().clamp_min(TINY)
        return to_power_of_two(step) if self.power_of_two else step

    @property
    def codes(self) -> tuple[int, int]:
        """The lowest and the highest level, in steps."""
        return int(self.low), int(self.high)

    def forward(self, x: Tensor) -> Tensor:
        """Return activations on the grid."""
        binary = (self.bits == 1) if self.signed else False
        return round_to_grid(x, self.step(), self.low, self.high, binary)


def _read_sign(module: nn.Module, _: object) -> None:
    """Take the sign from the loaded bounds."""
    cast(LSQActivation, module).signed = bool(cast(LSQActivation, module).low < 0)


class PACTActivation(ActivationQuantizer):
    """Learned clip (Choi et al., "PACT", 2018) on the unsigned integer grid."""

    def __init__(self, bits: int, *, alpha: float = 10.0):
        super().__init__(bits)
        self.scale = nn.Parameter(torch.tensor(float(alpha)))

    def calibrate(self, x: Tensor) -> None:
        """Start the clip at the least-squares range of the sample."""
        with torch.no_grad():
            self.scale.copy_(calibrate(x, int(self.bits), signed=False) * UNSIGNED_MAX[int(self.bits)])

    def step(self) -> Tensor:
        """Return the clip over the number of steps."""
        return self.scale.abs().clamp_min(TINY) / UNSIGNED_MAX[int(self.bits)]

    def forward(self, x: Tensor) -> Tensor:
        """Return activations on the grid; negative inputs become zero."""
        return pact_activations(x, self.scale.abs().clamp_min(TINY), self.bits)


class DoReFaActivation(ActivationQuantizer):
    """Activations clipped to [0, 1] (Zhou et al., 2016, eq. 11); nothing is learned or calibrated."""

    def calibrate(self, x: Tensor) -> None:
        """Do nothing: the range is fixed."""

    def step(self) -> Tensor:
        """Return one over the number of steps."""
        return 1 / torch.tensor(float(UNSIGNED_MAX[int(self.bits)]), device=self.bits.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return activations on the grid."""
        return dorefa_activations(x, self.bits)


Scheme = Literal["lsq", "entropy", "dorefa", "pact"]
SCHEMES: tuple[Scheme, ...] = ("lsq", "entropy", "dorefa", "pact")


def weight_quantizer(
    scheme: Scheme, weight: Tensor, bits: int, *, axis: int | None, narrow: bool, entropy: bool, rule: Rule, power_of_two: bool = False
) -> WeightQuantizer:
    """Return the weight quantizer of a scheme; see the table of this module."""
    if scheme == "lsq":
        return LSQWeight(weight, bits, axis=axis, narrow=narrow, entropy=entropy, rule=rule, power_of_two=power_of_two)
    return EntropyWeight(bits, axis=axis or 0) if scheme == "entropy" else DoReFaWeight(bits)


def activation_quantizer(scheme: Scheme, bits: int, *, rule: Rule, power_of_two: bool = False) -> ActivationQuantizer:
    """Return the activation quantizer of a scheme; see the table of this module."""
    if scheme == "pact":
        return PACTActivation(bits)
    if scheme == "dorefa":
        return DoReFaActivation(bits)
    return LSQActivation(bits, rule=rule, power_of_two=power_of_two)
