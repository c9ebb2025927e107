"""The quantizers once more, slow and obvious: NumPy float32 scalars in plain loops, straight from the papers.

Nothing here is imported from bitwright. Every function takes and returns float32 arrays; widths are plain ints.
"""

from __future__ import annotations

import math

import numpy as np

F = np.float32
FLOAT_WIDTHS = (16, 32)


def clip_bounds(bits, signed=True, narrow=False):
    """LSQ's -Q_N and Q_P (Esser et al., 2020, §2); one signed bit has the codes -1 and +1."""
    if not signed:
        return 0, 2**bits - 1
    if bits == 1:
        return -1, 1
    return -(2 ** (bits - 1)) + (1 if narrow else 0), 2 ** (bits - 1) - 1


def half_to_even(value):
    """Round to the nearest integer; of two equally near ones to the even one."""
    below = math.floor(value)
    rest = float(value) - below
    if rest != 0.5:
        return below + (1 if rest > 0.5 else 0)
    return below if below % 2 == 0 else below + 1


def code_of(value, scale, bits, signed=True, narrow=False):
    """The integer code of one value."""
    low, high = clip_bounds(bits, signed, narrow)
    unit = F(value) / F(scale)
    if signed and bits == 1:
        return 1 if unit >= 0 else -1
    return min(max(half_to_even(unit), low), high)


def fake_quantize(x, scale, bits, signed=True, narrow=False):
    """LSQ eqs. 1 and 2, value by value; ``scale`` broadcasts."""
    x = np.asarray(x, F)
    if bits in FLOAT_WIDTHS:
        return x.copy()
    scales = np.broadcast_to(np.asarray(scale, F), x.shape)
    out = np.empty_like(x)
    for place in np.ndindex(x.shape):
        out[place] = F(code_of(x[place], scales[place], bits, signed, narrow)) * scales[place]
    return out


def lsq_gradients(x, scale, bits, upstream, signed=True, narrow=False):
    """LSQ eqs. 3 and 5 in float64: the gradients of the values and, summed over what shares it, of one scalar scale."""
    x = np.asarray(x, F)
    low, high = clip_bounds(bits, signed, narrow)
    by_x, by_scale = np.zeros(x.shape), 0.0
    for place in np.ndindex(x.shape):
        unit = float(F(x[place]) / F(scale))
        if unit <= low:
            local = low
        elif unit >= high:
            local = high
        else:
            local = code_of(x[place], scale, bits, signed, narrow) - unit
            by_x[place] = upstream[place]
        by_scale += float(upstream[place]) * local
    return by_x, by_scale


def dorefa_units(weight, bits):
    """Where each weight lies on DoReFa's line of codes before rounding, float64 (Zhou et al., 2016, eq. 9)."""
    squashed = [math.tanh(float(v)) for v in np.asarray(weight, F).ravel()]
    largest = max(abs(v) for v in squashed)
    return np.array([(2**bits - 1) * (v / (2 * largest) + 0.5) for v in squashed]).reshape(np.shape(weight))


def dorefa_weights(weight, bits):
    """DoReFa eq. 9 (and the sign times the mean magnitude at one bit), float64."""
    weight = np.asarray(weight, F)
    if bits in FLOAT_WIDTHS:
        return weight.copy()
    if bits == 1:
        mean = sum(abs(float(v)) for v in weight.ravel()) / weight.size
        return np.array([mean if v >= 0 else -mean for v in weight.ravel()]).reshape(weight.shape)
    levels = 2**bits - 1
    return np.array([2 * half_to_even(u) / levels - 1 for u in dorefa_units(weight, bits).ravel()]).reshape(weight.shape)


def dorefa_weight_gradient(weight, upstream):
    """The gradient of eq. 9 with a straight-through round: that of tanh(w)/max|tanh w|, the maximum included."""
    flat = [float(v) for v in np.asarray(weight, F).ravel()]
    up = [float(v) for v in np.asarray(upstream).ravel()]
    t = [math.tanh(v) for v in flat]
    top = max(range(len(t)), key=lambda k: abs(t[k]))
    largest = abs(t[top])
    grad = [u * (1 - v * v) / largest for u, v in zip(up, t, strict=True)]
    pull = sum(u * v for u, v in zip(up, t, strict=True)) / largest**2
    grad[top] -= pull * math.copysign(1, t[top]) * (1 - t[top] ** 2)
    return np.array(grad).reshape(np.shape(weight))


def dorefa_activations(x, bits):
    """DoReFa eq. 11 on inputs clipped to [0, 1]."""
    x = np.asarray(x, F)
    if bits in FLOAT_WIDTHS:
        return x.copy()
    levels = F(2**bits - 1)
    out = np.empty_like(x)
    for place in np.ndindex(x.shape):
        out[place] = F(half_to_even(min(max(x[place], F(0)), F(1)) * levels)) / levels
    return out


def pact_activations(x, alpha, bits):
    """PACT eqs. 1 and 2 in float64, with the published form of the clip."""
    x = np.asarray(x, F)
    if bits in FLOAT_WIDTHS:
        return x.astype(np.float64)
    out = np.empty(x.shape)
    for place in np.ndindex(x.shape):
        value, top = float(x[place]), float(alpha)
        clipped = 0.5 * (abs(value) - abs(value - top) + top)
        out[place] = half_to_even(clipped * (2**bits - 1) / top) * top / (2**bits - 1)
    return out


def entropy_units(weight, bits):
    """Where each weight lies on the line of codes before rounding and clipping, float64 (N2UQ eq. 7), and each row's bound."""
    rows = np.asarray(weight, F).reshape(len(weight), -1).astype(np.float64)
    gamma = (2**bits - 1) / 2 ** (bits - 1)
    bounds = [gamma * sum(abs(v) for v in row) / len(row) for row in rows]
    units = [[(v / bound + 1) / 2 * (2**bits - 1) for v in row] for row, bound in zip(rows, bounds, strict=True)]
    return np.array(units).reshape(np.shape(weight)), np.array(bounds)


def entropy_weights(weight, bits):
    """Levels evenly on [-s, s], s = (2^b-1)/2^(b-1) mean|w| of the output channel, float64."""
    if bits in FLOAT_WIDTHS:
        return np.asarray(weight, F).astype(np.float64)
    units, bounds = entropy_units(weight, bits)
    steps = 2**bits - 1
    out = [
        [bound * (2 * min(max(half_to_even(u), 0), steps) / steps - 1) for u in row]
        for row, bound in zip(units.reshape(len(units), -1), bounds, strict=True)
    ]
    return np.array(out).reshape(np.shape(weight))


def near_tie(units, margin=1e-4):
    """Where rounding could go either way for an error of ``margin``."""
    return np.abs(np.abs(units - np.floor(units)) - 0.5) < margin
