"""Pure quantization arithmetic: bits are an argument, and may be a tensor.

Rounding is half to even. Clip bounds come from integer tables, never from a power function. Signed one bit has the two
codes -1 and +1; signed two bits are -2…1 unless ``narrow`` is asked for. Widths of 16 and above leave values untouched.

A straight-through value is written ``r.detach() + (x - x.detach())``: the bracket is exactly zero, so the forward value is
exactly ``r`` while the gradient is that of ``x``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

UNTOUCHED = 16
"""Widths from here on are not rounded to a grid."""

LEVELS = (0, 2, 4, 8, 16, 32, 64, 128, 256)
"""Number of levels of a grid, by width."""
SIGNED_MIN = (0, -1, -2, -4, -8, -16, -32, -64, -128)
SIGNED_MIN_NARROW = (0, -1, -1, -3, -7, -15, -31, -63, -127)
SIGNED_MAX = (0, 1, 1, 3, 7, 15, 31, 63, 127)
UNSIGNED_MAX = (0, 1, 3, 7, 15, 31, 63, 127, 255)

Width = int | Tensor


def lookup(table: tuple[int, ...], bits: Width, like: Tensor) -> Tensor:
    """Return ``table[bits]`` as a tensor of ``like``'s dtype and device; widths above the table read its last entry."""
    last = len(table) - 1
    if isinstance(bits, Tensor):
        return pick(torch.tensor(table, dtype=like.dtype, device=like.device), bits.clamp(0, last))
    return torch.tensor(table[min(bits, last)], dtype=like.dtype, device=like.device)


def pick(table: Tensor, index: Tensor) -> Tensor:
    """Return ``table[index]`` along the first axis; plain indexing by a 0-dimensional tensor would break a compiled graph."""
    return table.index_select(0, index.reshape(-1)).reshape(index.shape + table.shape[1:])


def bounds(bits: Width, like: Tensor, *, signed: bool = True, narrow: bool = False) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest code of a width.

    >>> [v.item() for v in bounds(2, torch.zeros(()))], [v.item() for v in bounds(4, torch.zeros(()), signed=False)]
    ([-2.0, 1.0], [0.0, 15.0])
    """
    if not signed:
        return lookup((0,) * len(UNSIGNED_MAX), bits, like), lookup(UNSIGNED_MAX, bits, like)
    return lookup(SIGNED_MIN_NARROW if narrow else SIGNED_MIN, bits, like), lookup(SIGNED_MAX, bits, like)


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged (Bengio, Léonard and Courville, 2013)."""
    return x.round().detach() + (x - x.detach())


def scale_gradient(x: Tensor, factor: Tensor | float) -> Tensor:
    """Return ``x`` exactly, with its gradient multiplied by ``factor`` (Esser et al., 2020, listing 1)."""
    scaled = x * factor
    return x.detach() + (scaled - scaled.detach())


def to_power_of_two(step: Tensor) -> Tensor:
    """Return the power of two nearest to each positive step by their ratio; the gradient passes unchanged.

    >>> to_power_of_two(torch.tensor([0.7, 0.72, 5.0]))
    tensor([0.5000, 1.0000, 4.0000])
    """
    mantissa = torch.frexp(step.detach()).mantissa
    above = step.detach() / mantissa  # exact: the quotient is a power of two
    return torch.where(mantissa < math.sqrt(0.5), above / 2, above) + (step - step.detach())


class _Rounding(torch.autograd.Function):
    """Codes times step, with the gradients of Esser et al. (2020), eqs. 2 and 3, written out: one pass over the values each way."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, binary: Tensor | bool) -> Tensor:
        """Return the rounded values."""
        return codes(x, scale, low, high, binary) * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the inputs: the codes are cheaper to compute again than to store."""
        x, scale, low, high, binary = inputs
        ctx.binary = binary if isinstance(binary, bool) else None
        ctx.save_for_backward(x, scale, low, high, *(() if isinstance(binary, bool) else (binary,)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Return the gradients of values and step."""
        x, scale, low, high, *rest = ctx.saved_tensors
        unit = x / scale
        inside = (unit > low) & (unit < high)
        code = codes(x, scale, low, high, rest[0] if rest else ctx.binary)
        # The mask is used once: a compiler that must keep it for two readers stores it as bytes, which is slow on a CPU.
        passed = torch.where(inside, grad, 0.0)
        by_scale = grad * code - passed * unit
        return passed, by_scale.sum_to_size(scale.shape), None, None, None


def codes(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, binary: Tensor | bool) -> Tensor:
    """Return the integer codes of ``x / scale`` as floats, without gradient; ``binary`` grids hold -1 and +1 alone."""
    unit = x / scale
    rounded = torch.clamp(unit.round(), low, high)
    if isinstance(binary, bool):
        return torch.where(unit >= 0, 1.0, -1.0).to(unit.dtype) if binary else rounded
    return torch.where(binary, torch.where(unit >= 0, 1.0, -1.0).to(unit.dtype), rounded)


def round_to_grid(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, binary: Tensor | bool) -> Tensor:
    """Return ``codes * scale`` with the gradients of `fake_quantize`; ``low`` and ``high`` are float tensors."""
    result: Tensor = _Rounding.apply(x, scale, low, high, binary)  # type: ignore[no-untyped-call]
    return result


def fake_quantize(x: Tensor, scale: Tensor, bits: Width, *, signed: bool = True, narrow: bool = False) -> Tensor:
    r"""Round ``x`` to the uniform integer grid of a width and scale it back.

    :math:`\hat x = s\,\mathrm{round}(\mathrm{clip}(x/s, Q_n, Q_p))` (Esser et al., "Learned step size quantization",
    2020, eqs. 1 and 2). The gradient with respect to ``x`` is 1 inside the clip and 0 outside; with respect to ``s`` it is
    :math:`\mathrm{round}(x/s) - x/s` inside and the clip bound outside (eq. 3). At one signed bit the codes are
    :math:`\{-1, +1\}`.

    Args:
        x: values, any shape.
        scale: step size, positive, broadcastable to ``x``.
        bits: width, 1 to 8, or 16 and above to return ``x`` as it is; an int, or an integer tensor broadcastable to ``x``.
        signed: whether negative codes exist.
        narrow: drop the lowest signed code, so that the grid is symmetric.

    Returns:
        Tensor of the shape of ``x``.

    >>> fake_quantize(torch.tensor([-1.0, 0.26, 0.9]), torch.tensor(0.5), 2)
    tensor([-1.0000, 0.5000, 0.5000])
    >>> fake_quantize(torch.tensor([-0.1, 0.4]), torch.tensor(0.5), torch.tensor(1))
    tensor([-0.5000, 0.5000])
    """
    if isinstance(bits, int):
        if bits >= UNTOUCHED:
            return x
        low, high = bounds(bits, x, signed=signed, narrow=narrow)
        return round_to_grid(x, scale, low, high, signed and bits == 1)
    low, high = bounds(bits, x, signed=signed, narrow=narrow)
    rounded = round_to_grid(x, scale, low, high, bits == 1 if signed else False)
    return torch.where(bits >= UNTOUCHED, x, rounded)


def levels(bits: Width, like: Tensor) -> Tensor:
    """Return :math:`2^b - 1`, the number of steps between the lowest and the highest level."""
    return lookup(LEVELS, bits, like) - 1


def dorefa_weights(weight: Tensor, bits: Width) -> Tensor:
    r"""Quantize weights as DoReFa-Net does (Zhou et al., 2016, eqs. 9 and 7).

    :math:`\hat w = 2\,\frac{\mathrm{round}((2^b-1)\tilde w)}{2^b-1} - 1` with
    :math:`\tilde w = \frac{\tanh w}{2\max|\tanh w|} + \frac12`; at one bit
    :math:`\hat w = \mathrm{sign}(w)\,\mathrm{mean}|w|`, whose gradient passes unchanged (eq. 8). The result
    lies in :math:`[-1, 1]` (the one-bit form in the range of the weights), on a half-integer grid.

    >>> dorefa_weights(torch.tensor([-1.0, 0.1, 0.5]), 2)
    tensor([-1.0000, 0.3333, 0.3333])
    """
    squashed = torch.tanh(weight)
    unit = squashed / (2 * squashed.abs().amax().clamp_min(1e-12)) + 0.5
    steps = levels(bits, weight).clamp_min(1)
    many = (round_ste(unit * steps) - steps / 2) * (2 / steps)
    size = weight.abs().mean()
    one = torch.where(weight >= 0, size, -size).detach() + (weight - weight.detach())
    return _by_width(bits, weight, one, many)


def dorefa_activations(x: Tensor, bits: Width) -> Tensor:
    r"""Quantize activations to :math:`\mathrm{round}((2^b-1)\,\mathrm{clip}(x,0,1))/(2^b-1)` (Zhou et al., 2016, eq. 11).

    >>> dorefa_activations(torch.tensor([-0.2, 0.4, 3.0]), 2)
    tensor([0.0000, 0.3333, 1.0000])
    """
    steps = levels(bits, x).clamp_min(1)
    rounded = round_ste(x.clamp(0, 1) * steps) / steps
    return _by_width(bits, x, rounded, rounded)


def pact_activations(x: Tensor, alpha: Tensor, bits: Width) -> Tensor:
    r"""Clip to a learned :math:`\alpha`, then quantize uniformly (Choi et al., "PACT", 2018, eqs. 1 and 2).

    :math:`y = \frac12(|x| - |x-\alpha| + \alpha)`, :math:`\hat y = \mathrm{round}(y\frac{2^b-1}{\alpha})\frac{\alpha}{2^b-1}`.
    The gradient of :math:`\alpha` is 1 where :math:`x \ge \alpha` and 0 elsewhere (eq. 3).

    >>> pact_activations(torch.tensor([-1.0, 2.0, 9.0]), torch.tensor(6.0), 2)
    tensor([0., 2., 6.])
    """
    clipped = torch.where(x >= alpha, alpha, x.clamp_min(0))
    step = (alpha / levels(bits, x).clamp_min(1)).detach()
    rounded = (clipped / step).round().detach() * step + (clipped - clipped.detach())
    return _by_width(bits, x, rounded, rounded)


def entropy_scale(weight: Tensor) -> Tensor:
    r"""Return :math:`\|w\|_1/|w|` of each output channel (axis 0), shape ``[C, 1, …]``, without gradient.

    Dividing by it makes the :math:`2^b` levels of a uniform grid about equally used (Liu et al., "N2UQ", 2022, eq. 7).
    """
    return weight.detach().abs().flatten(1).mean(1).clamp_min(1e-12).view(-1, *[1] * (weight.dim() - 1))


def entropy_weights(weight: Tensor, bits: Width, *, through: str = "value") -> Tensor:
    r"""Quantize weights uniformly after normalising each filter for maximal entropy (Liu et al., "N2UQ", 2022, eq. 7).

    With :math:`s = \frac{2^b-1}{2^{b-1}}\,\mathrm{mean}|w|` for each output channel, the :math:`2^b` levels lie evenly on
    :math:`[-s, s]` (a half-integer grid). There is no clip mask in the gradient.

    Args:
        weight: ``[C, …]``.
        bits: width, int or tensor.
        through: ``"value"`` passes the gradient of the output to ``weight`` unchanged; ``"normalised"`` passes it to
            ``weight / s``, that is :math:`1/s` of it, as the authors' code does.

    >>> entropy_weights(torch.tensor([[-0.3, -0.1, 0.1, 0.3]]), 2)
    tensor([[-0.3000, -0.1000, 0.1000, 0.3000]])
    """
    steps = levels(bits, weight).clamp_min(1)
    bound = entropy_scale(weight) * (2 * steps / (steps + 1))
    step = 2 * bound / steps
    index = torch.minimum(torch.round((weight.detach() + bound) / step).clamp_min(0), steps)
    value = (index - steps / 2) * step
    passed = weight / bound if through == "normalised" else weight
    rounded = value + (passed - passed.detach())
    return _by_width(bits, weight, rounded, rounded)


def _by_width(bits: Width, untouched: Tensor, one: Tensor, many: Tensor) -> Tensor:
    """Select by width: the value itself from 16 bits on, the one-bit form at 1, the general form otherwise."""
    if isinstance(bits, int):
        return untouched if bits >= UNTOUCHED else one if bits == 1 else many
    return torch.where(bits >= UNTOUCHED, untouched, torch.where(bits == 1, one, many))
