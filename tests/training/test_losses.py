"""Distillation and bin regularization, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from bitwright.policy import Policy
from bitwright.quant import QuantOptions, quantize
from bitwright.quant.quantizers import DoReFaWeight, EntropyWeight, LSQWeight
from bitwright.training.losses import bin_regularization, bin_statistics, bins_weight, distillation


def values(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def at_step(weight, bits, step, **options):
    """Return an LSQ quantizer of one step size."""
    quantizer = LSQWeight(weight, bits, axis=None, **options)
    with torch.no_grad():
        quantizer.scale.fill_(step)
    return quantizer


# ---- distillation


def test_distillation_is_the_soft_cross_entropy():
    student, teacher = values(1, 7, 5) * 3, values(2, 7, 5) * 3
    total = 0.0
    for s, t in zip(student.double().numpy(), teacher.double().numpy(), strict=True):
        p = np.exp(t) / np.exp(t).sum()
        log_q = s - math.log(np.exp(s).sum())
        total -= float((p * log_q).sum())
    assert distillation(student, teacher).item() == pytest.approx(total / 7, rel=1e-5)


def test_distillation_gradient_reaches_the_student_alone():
    student, teacher = values(3, 4, 6).requires_grad_(), values(4, 4, 6).requires_grad_()
    distillation(student, teacher).backward()
    assert teacher.grad is None
    assert torch.allclose(student.grad, (student.detach().softmax(1) - teacher.detach().softmax(1)) / 4, atol=1e-6)


def test_distillation_is_least_at_the_teacher_and_has_no_overflow():
    teacher = values(5, 3, 4)
    least = distillation(teacher, teacher)
    assert all(distillation(teacher + 0.1 * values(k, 3, 4), teacher) > least for k in range(6, 10))
    assert torch.allclose(distillation(teacher + 50, teacher), least, atol=1e-4)
    assert bool(torch.isfinite(distillation(teacher * 1e4, -teacher * 1e4)))


# ---- bin regularization

SIX = [0.2, -0.4, 1.3, 0.8, -1.6, -5.0]
"""At two bits and step 1: levels 0, 0, 1, 1, -2, -2; 1.3 and -5 are clipped to 1 and -2."""


@pytest.mark.parametrize("step", [1.0, 0.25])
def test_bin_regularization_by_hand(step):
    weight = torch.tensor(SIX) * step
    quantizer = at_step(weight, 2, step)
    # distances to the level, in steps: 0.2, -0.4 | 0, -0.2 | 0.4, 0
    error = step**2 * (0.04 + 0.16 + 0.04 + 0.16) / 6
    variances = step**2 * (0.18 + 0.02 + 0.08)  # unbiased, two members each
    assert bin_regularization(weight, quantizer, reduction="mean").item() == pytest.approx(error + variances, rel=1e-5)
    assert bin_regularization(weight, quantizer).item() == pytest.approx(0.5 * (6 * error + 2 * variances), rel=1e-5)


def test_a_bin_of_one_member_has_no_variance_and_an_empty_one_nothing():
    weight = torch.tensor([0.3, -1.9])
    quantizer = at_step(weight, 3, 1.0)
    assert bin_regularization(weight, quantizer, reduction="mean").item() == pytest.approx((0.09 + 0.01) / 2, rel=1e-5)
    assert bin_regularization(weight, quantizer).item() == pytest.approx((0.09 + 0.01) / 2, rel=1e-5)


def slow(weight, quantizer, bits):
    """The mean form once more, in loops: a weight counts by its distance from its level, a bin is a level's number."""
    rows = weight.flatten(1).double()
    steps = quantizer.scale.detach().double().flatten().expand(len(rows))
    low, high = (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    bins, errors = {}, []
    for row, step in zip(rows, steps.tolist(), strict=True):
        for w in row.tolist():
            clipped = min(max(w / step, low), high)
            level = (1 if w >= 0 else -1) if bits == 1 else round(clipped)
            bins.setdefault(level, []).append((clipped - level) * step)
            errors.append(bins[level][-1] ** 2)
    return np.mean(errors) + sum(np.var(members, ddof=1) for members in bins.values() if len(members) > 1)


def test_with_one_step_for_all_it_is_the_published_variance_of_the_weights():
    weight, quantizer = torch.tensor(SIX), at_step(torch.tensor(SIX), 2, 1.0)
    variances = sum(np.var(members, ddof=1) for members in ([0.2, -0.4], [1.0, 0.8], [-1.6, -2.0]))
    error = float((weight.clamp(-2, 1) - torch.tensor([0.0, 0, 1, 1, -2, -2])).square().mean())
    assert bin_regularization(weight, quantizer, reduction="mean").item() == pytest.approx(error + variances, rel=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, None])
def test_bin_regularization_equals_loops_over_the_bins(bits, axis):
    weight = values(11, 4, 50)
    quantizer = LSQWeight(weight, bits, axis=axis)
    assert bin_regularization(weight, quantizer, reduction="mean").item() == pytest.approx(slow(weight, quantizer, bits), rel=1e-3)


def test_its_gradient_by_hand():
    weight = torch.tensor(SIX, requires_grad=True)
    quantizer = at_step(weight, 2, 1.0)
    bin_regularization(weight, quantizer).backward()
    # distance + n/(n-1) (distance - the bin's mean); what is clipped gets none
    by_hand = [0.2 + 2 * 0.3, -0.4 - 2 * 0.3, 0.0, -0.2 - 2 * 0.1, 0.4 + 2 * 0.2, 0.0]
    assert weight.grad.tolist() == pytest.approx(by_hand, abs=1e-5)
    assert quantizer.scale.grad is None


QUANTIZERS = {
    "lsq": LSQWeight,
    "lsq-tensor": lambda w, bits: LSQWeight(w, bits, axis=None),
    "lsq-narrow": lambda w, bits: LSQWeight(w, bits, narrow=True),
    "lsq-entropy": lambda w, bits: LSQWeight(w, bits, entropy=True),
    "entropy": lambda w, bits: EntropyWeight(bits),
    "dorefa": lambda w, bits: DoReFaWeight(bits),
}


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_descent_pulls_every_latent_weight_towards_its_level(name, reduction, bits):
    weight = (0.4 * values(12, 4, 30)).requires_grad_()
    quantizer = QUANTIZERS[name](weight.detach(), bits)
    rate = {"sum": 0.02, "mean": 0.25}[reduction]

    def spread():
        with torch.no_grad():
            return float(((quantizer.clip(weight) - quantizer(weight)) / quantizer.step(weight)).square().mean())

    before = spread()
    for _ in range(60):
        weight.grad = None
        bin_regularization(weight, quantizer, reduction=reduction).backward()
        with torch.no_grad():
            weight -= rate * weight.grad
    assert spread() < 0.9 * before


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_on_the_grid_are_left_alone(name, bits):
    """A latent weight that lies on a level before rounding is where the regularizer wants it."""
    weight = values(13, 4, 30)
    quantizer = QUANTIZERS[name](weight, bits)
    if name == "dorefa":  # its levels are those of tanh(w)/max|tanh w|
        top = math.tanh(0.9)
        on_grid = torch.atanh(top * (2 * torch.arange(2**bits).float() / (2**bits - 1) - 1)).view(2, -1)
    elif name == "entropy":
        odd = torch.arange(2**bits) - (2**bits - 1) / 2  # equally used levels lie on themselves
        on_grid = torch.stack([odd, 3 * odd])
    elif name == "lsq-entropy":
        return  # the step moves with the weights
    else:
        on_grid = quantizer(weight).detach()
    assert float(bin_regularization(on_grid, quantizer)) < 1e-6
    assert float(bin_regularization(on_grid, quantizer, reduction="mean")) < 1e-6


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_levels_get_no_gradient(name):
    weight = values(14, 3, 20).requires_grad_()
    quantizer = QUANTIZERS[name](weight.detach(), 3)
    bin_regularization(weight, quantizer).backward()
    assert all(p.grad is None or not bool(p.grad.any()) for p in quantizer.parameters())
    assert bool(weight.grad.any())


def test_it_grows_with_the_square_of_the_weights():
    weight = values(15, 4, 60)
    for reduction in ("sum", "mean"):
        one, tenth = (bin_regularization(w, LSQWeight(w, 3), reduction=reduction).item() for w in (weight, weight / 10))
        assert one == pytest.approx(100 * tenth, rel=1e-3)


def test_the_weight_rises_along_a_cosine_from_its_start():
    assert [bins_weight(p, 2.0, 0.25) for p in (0.0, 0.1, 0.25)] == [0, 0, 0]
    for p in (0.3, 0.5, 0.8, 1.0):
        assert bins_weight(p, 2.0, 0.25) == pytest.approx(2.0 * (1 - math.cos(math.pi * (p - 0.25) / 0.75)) / 2)
    assert bins_weight(1.0, 0.1, 0.0) == pytest.approx(0.1)
    steps = [bins_weight(k / 50, 1.0, 0.5) for k in range(51)]
    assert steps == sorted(steps)


# ---- statistics


def test_bin_statistics_by_hand():
    net = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[-2.1, -0.9, 0.2, 1.0], [-1.8, -1.2, 0.0, 1.1]]))
    quantized = quantize(net, Policy({"0": (2, 32), "1": (32, 32)}), options=QuantOptions(per_channel=False))
    with torch.no_grad():
        quantized[0].weight_quantizer.scale.fill_(1.0)
    found = bin_statistics(quantized)
    assert list(found) == ["0"]
    assert found["0"].bits == 2
    assert found["0"].entropy == pytest.approx(2)  # four levels, two weights each
    distances = [0, 0.1, 0.2, 0, 0.2, -0.2, 0, 0]
    assert found["0"].variance == pytest.approx(np.mean(np.square(distances)), rel=1e-4)


@pytest.mark.parametrize("quantizer", ["lsq", "entropy"])
def test_evenly_spread_weights_have_a_twelfth(quantizer):
    net = nn.Sequential(nn.Linear(2000, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.linspace(-1, 1, 2000)[None])
    found = bin_statistics(quantize(net, Policy({"0": (4, 32)}), options=QuantOptions(quantizer=quantizer, rule="minmax")))["0"]
    assert found.variance == pytest.approx(1 / 12, rel=0.15)
    assert 3.5 < found.entropy <= 4
