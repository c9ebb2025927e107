"""Quantization arithmetic against its twin, torch's own, the cited gradients, and what must hold for any input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from bitwright.quant import functional as Q

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)
ALL = (*WIDTHS, 16, 32)
KINDS = [{"signed": True}, {"signed": True, "narrow": True}, {"signed": False}]


def values(seed, *shape, spread=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def awkward(scale):
    """Ties, bounds, zeros of both signs, far outliers."""
    ties = torch.arange(-20, 20) / 2 * scale
    return torch.cat([ties, torch.tensor([0.0, -0.0, 1e6, -1e6, 1e-9, -1e-9]), values(1, 90, spread=6.0)])


# ---- the twin


@pytest.mark.parametrize("bits", ALL)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.25, 0.3, 1.7])
def test_fake_quantize_equals_its_twin_per_tensor(bits, kind, scale):
    x = awkward(scale)
    got = Q.fake_quantize(x, torch.tensor(scale), bits, **kind)
    assert np.array_equal(got.numpy(), reference.fake_quantize(x.numpy(), scale, bits, **kind))


@pytest.mark.parametrize("bits", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_fake_quantize_equals_its_twin_per_channel(bits, kind):
    x, scale = values(2, 5, 3, 4, spread=3.0), values(3, 5).abs().add(0.05).view(5, 1, 1)
    got = Q.fake_quantize(x, scale, bits, **kind)
    assert np.array_equal(got.numpy(), reference.fake_quantize(x.numpy(), scale.numpy(), bits, **kind))


@pytest.mark.parametrize("bits", ALL)
def test_dorefa_weights_equal_their_twin(bits):
    w = values(4, 6, 5, spread=0.7)
    got = Q.dorefa_weights(w, bits).numpy()
    if 1 < bits < 16:
        assert not reference.near_tie(reference.dorefa_units(w.numpy(), bits), 1e-6).any()
    np.testing.assert_allclose(got, reference.dorefa_weights(w.numpy(), bits), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("bits", ALL)
def test_dorefa_activations_equal_their_twin(bits):
    x = torch.cat([values(5, 200), torch.tensor([0.0, 0.5, 1.0, 2.0, -3.0])])
    assert np.array_equal(Q.dorefa_activations(x, bits).numpy(), reference.dorefa_activations(x.numpy(), bits))


@pytest.mark.parametrize("bits", ALL)
@pytest.mark.parametrize("alpha", [0.7, 6.0, 10.0])
def test_pact_equals_its_twin(bits, alpha):
    x = torch.cat([values(6, 200, spread=alpha), torch.tensor([0.0, alpha, 2 * alpha, -alpha])])
    got = Q.pact_activations(x, torch.tensor(alpha), bits).numpy()
    np.testing.assert_allclose(got, reference.pact_activations(x.numpy(), F32(alpha), bits), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("bits", ALL)
def test_entropy_weights_equal_their_twin(bits):
    w = values(7, 6, 3, 3, spread=0.4)
    got = Q.entropy_weights(w, bits).numpy()
    if bits < 16:
        assert not reference.near_tie(reference.entropy_units(w.numpy(), bits)[0], 1e-6).any()
    np.testing.assert_allclose(got, reference.entropy_weights(w.numpy(), bits), rtol=2e-6, atol=1e-7)


def test_entropy_normalised_levels_are_about_equally_used():
    w = values(8, 1, 40_000)
    for bits in (1, 2, 3):
        counts = Q.entropy_weights(w, bits).unique(return_counts=True)[1].double()
        share = counts / counts.sum()
        assert len(counts) == 2**bits
        assert float(-(share * share.log2()).sum()) > bits - 0.2


def F32(value):
    return float(np.float32(value))


# ---- clip bounds: an integer table


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_bounds(bits, kind):
    for width in (bits, torch.tensor(bits)):
        low, high = Q.bounds(width, torch.zeros(()), **kind)
        assert (low.item(), high.item()) == reference.clip_bounds(bits, **kind)


def test_one_and_two_signed_bits_are_as_decided():
    x = torch.linspace(-5, 5, 101)
    assert Q.fake_quantize(x, torch.tensor(1.0), 1).unique().tolist() == [-1, 1]
    assert Q.fake_quantize(x, torch.tensor(1.0), 2).unique().tolist() == [-2, -1, 0, 1]
    assert Q.fake_quantize(x, torch.tensor(1.0), 2, narrow=True).unique().tolist() == [-1, 0, 1]
    assert Q.fake_quantize(x, torch.tensor(1.0), 1, signed=False).unique().tolist() == [0, 1]
    assert Q.fake_quantize(torch.zeros(1), torch.tensor(0.5), 1).item() == 0.5


# ---- torch's own


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.125, 0.5, 0.3])
def test_equals_torch_per_tensor(bits, kind, scale):
    if bits == 1 and kind["signed"]:
        pytest.skip("torch has no grid without zero")
    low, high = reference.clip_bounds(bits, **kind)
    x = values(9, 500, spread=4.0)
    if scale == 0.3:  # torch multiplies by the reciprocal, which may fall on the other side of a tie
        x = x[~torch.from_numpy(reference.near_tie(x.numpy() / scale))]
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, 0, low, high)
    assert torch.equal(Q.fake_quantize(x, torch.tensor(scale), bits, **kind), theirs)


@pytest.mark.parametrize("bits", WIDTHS[1:])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_equals_torch_per_channel(bits, narrow, axis):
    low, high = reference.clip_bounds(bits, narrow=narrow)
    x, scale = values(10, 4, 4, 9, spread=2.0), torch.tensor([0.125, 0.25, 0.5, 1.0])
    theirs = torch.fake_quantize_per_channel_affine(x, scale, torch.zeros(4, dtype=torch.int32), axis, low, high)
    shape = (4, 1, 1) if axis == 0 else (1, 4, 1)
    assert torch.equal(Q.fake_quantize(x, scale.view(shape), bits, narrow=narrow), theirs)


# ---- gradients


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_lsq_gradients_are_those_of_equations_3_and_5(bits, kind, as_tensor):
    x, scale = values(11, 60, spread=3.0).requires_grad_(), torch.tensor(0.37, requires_grad=True)
    up = values(12, 60)
    Q.fake_quantize(x, scale, torch.tensor(bits) if as_tensor else bits, **kind).backward(up)
    by_x, by_scale = reference.lsq_gradients(x.detach().numpy(), 0.37, bits, up.numpy(), **kind)
    np.testing.assert_allclose(x.grad.numpy(), by_x, rtol=1e-6)
    assert scale.grad.item() == pytest.approx(by_scale, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_lsq_gradient_of_a_channel_sums_over_that_channel(bits):
    x, scale = values(13, 3, 20, spread=3.0).requires_grad_(), torch.tensor([[0.2], [0.5], [1.1]], requires_grad=True)
    up = values(14, 3, 20)
    Q.fake_quantize(x, scale, bits).backward(up)
    for c in range(3):
        by_x, by_scale = reference.lsq_gradients(x.detach()[c].numpy(), scale[c].item(), bits, up[c].numpy())
        np.testing.assert_allclose(x.grad[c].numpy(), by_x, rtol=1e-6)
        assert scale.grad[c].item() == pytest.approx(by_scale, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("bits", [16, 32, torch.tensor(16), torch.tensor(32)])
def test_wide_widths_are_the_identity_and_give_the_step_no_gradient(bits):
    x, scale = values(15, 9).requires_grad_(), torch.tensor(0.3, requires_grad=True)
    out = Q.fake_quantize(x, scale, bits)
    assert torch.equal(out, x)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones(9))
    assert scale.grad is None or scale.grad.item() == 0


def test_scale_gradient_is_exact_forward_and_scales_the_gradient():
    x = values(16, 1000).requires_grad_()
    out = Q.scale_gradient(x, 1 / 3)
    assert torch.equal(out, x)
    out.backward(torch.full((1000,), 6.0))
    assert torch.allclose(x.grad, torch.full((1000,), 2.0))


def test_straight_through_rounding_is_exact_forward():
    x = torch.cat([values(17, 500, spread=1e3), torch.tensor([0.5, 1.5, 2.5, -0.5, 0.0])]).requires_grad_()
    assert torch.equal(Q.round_ste(x), x.round())
    (grad,) = torch.autograd.grad(Q.round_ste(x).sum(), x)
    assert torch.equal(grad, torch.ones_like(x))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_pact_gradients_are_those_of_equation_3(bits, as_tensor):
    x, alpha = values(18, 200, spread=4.0).requires_grad_(), torch.tensor(2.5, requires_grad=True)
    up = values(19, 200)
    Q.pact_activations(x, alpha, torch.tensor(bits) if as_tensor else bits).backward(up)
    above, inside = x.detach() >= 2.5, (x.detach() > 0) & (x.detach() < 2.5)
    assert alpha.grad.item() == pytest.approx(up[above].sum().item(), rel=1e-5)
    assert torch.equal(x.grad, torch.where(inside, up, 0.0))


def test_pact_at_exactly_alpha_counts_as_clipped():
    alpha = torch.tensor(2.0, requires_grad=True)
    Q.pact_activations(torch.tensor([2.0]), alpha, 4).backward()
    assert alpha.grad.item() == 1


@pytest.mark.parametrize("bits", WIDTHS[1:])
def test_dorefa_weight_gradient_is_that_of_the_normalised_weight(bits):
    w = values(20, 5, 7, spread=0.8).requires_grad_()
    up = values(21, 5, 7)
    Q.dorefa_weights(w, bits).backward(up)
    np.testing.assert_allclose(w.grad.numpy(), reference.dorefa_weight_gradient(w.detach().numpy(), up.numpy()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [1, torch.tensor(1)])
def test_dorefa_one_bit_passes_the_gradient_unchanged(bits):
    """Zhou et al. (2016), eqs. 7 and 8: forward sign(w) E|w|, backward the gradient itself."""
    w = values(22, 5, 7, spread=0.3).requires_grad_()
    up = values(23, 5, 7)
    Q.dorefa_weights(w, bits).backward(up)
    assert torch.allclose(w.grad, up)


@pytest.mark.parametrize("bits", WIDTHS)
def test_dorefa_activation_gradient_is_one_inside_the_clip(bits):
    x = values(24, 100, spread=2.0).requires_grad_()
    Q.dorefa_activations(x, bits).sum().backward()
    assert torch.allclose(x.grad, ((x.detach() > 0) & (x.detach() < 1)).float())


@pytest.mark.parametrize("bits", WIDTHS)
def test_entropy_weight_gradient(bits):
    w = values(25, 4, 6, spread=0.2).requires_grad_()
    up = values(26, 4, 6)
    Q.entropy_weights(w, bits).backward(up)
    assert torch.equal(w.grad, up)
    w.grad = None
    Q.entropy_weights(w, bits, through="normalised").backward(up)
    gamma = (2**bits - 1) / 2 ** (bits - 1)
    assert torch.allclose(w.grad, up / (gamma * w.detach().abs().mean(1, keepdim=True)), rtol=1e-5)
    assert torch.equal(Q.entropy_weights(w, bits, through="normalised"), Q.entropy_weights(w, bits))


# ---- bits as data


FORMS = {
    "signed": Q.fake_quantize,
    "narrow": lambda x, s, b: Q.fake_quantize(x, s, b, narrow=True),
    "unsigned": lambda x, s, b: Q.fake_quantize(x, s, b, signed=False),
    "dorefa_weights": lambda x, _, b: Q.dorefa_weights(x, b),
    "dorefa_activations": lambda x, _, b: Q.dorefa_activations(x, b),
    "pact": Q.pact_activations,
    "entropy": lambda x, _, b: Q.entropy_weights(x, b),
}


@pytest.mark.parametrize("bits", ALL)
@pytest.mark.parametrize("form", FORMS)
def test_tensor_bits_give_bitwise_what_int_bits_give(form, bits):
    results = []
    for width in (bits, torch.tensor(bits), torch.tensor(bits, dtype=torch.int32)):
        x, scale = values(27, 6, 8, spread=2.0).requires_grad_(), torch.tensor(0.43, requires_grad=True)
        out = FORMS[form](x, scale, width)
        out.backward(values(28, 6, 8))
        zero = torch.zeros(())
        results.append((out.detach(), zero if x.grad is None else x.grad, zero if scale.grad is None else scale.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bits_may_differ_per_row():
    x, bits = values(29, 4, 50, spread=3.0), torch.tensor([[1], [2], [8], [32]])
    got = Q.fake_quantize(x, torch.tensor(0.3), bits)
    for row, width in zip(range(4), (1, 2, 8, 32), strict=True):
        assert torch.equal(got[row], Q.fake_quantize(x[row], torch.tensor(0.3), width))


# ---- what holds for any input

finite = st.floats(-1e4, 1e4, allow_nan=False, width=32)
scales = st.floats(2**-10, 1024, width=32)
lists = st.lists(finite, min_size=1, max_size=30)
widths = st.sampled_from(WIDTHS)
kinds = st.sampled_from(KINDS)


@settings(max_examples=150, deadline=None)
@given(lists, scales, widths, kinds)
def test_idempotent_and_few_levels_and_monotone(xs, scale, bits, kind):
    x, s = torch.tensor(sorted(xs)), torch.tensor(scale)
    once = Q.fake_quantize(x, s, bits, **kind)
    assert torch.equal(Q.fake_quantize(once, s, bits, **kind), once)
    assert len(once.unique()) <= 2**bits
    assert bool((once.diff() >= 0).all())
    assert np.array_equal(once.numpy(), reference.fake_quantize(x.numpy(), scale, bits, **kind))


@settings(max_examples=100, deadline=None)
@given(lists, scales, widths)
def test_narrow_grids_are_symmetric(xs, scale, bits):
    x, s = torch.tensor([v for v in xs if bits > 1 or abs(v) > 1e-6] or [1.0]), torch.tensor(scale)
    there, back = (Q.fake_quantize(v, s, bits, narrow=True) for v in (x, -x))
    assert torch.equal(there, -back)


@settings(max_examples=100, deadline=None)
@given(lists, scales, widths, kinds)
def test_no_value_inside_the_clip_moves_by_more_than_half_a_step(xs, scale, bits, kind):
    if bits == 1 and kind["signed"]:
        return
    x, s = torch.tensor(xs), torch.tensor(scale)
    low, high = reference.clip_bounds(bits, **kind)
    moved = (Q.fake_quantize(x, s, bits, **kind) - x.clamp(low * scale, high * scale)).abs()
    assert float(moved.max()) <= scale * 0.5 * (1 + 1e-4) + 1e-3 * scale


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(finite, min_size=4, max_size=4), min_size=1, max_size=4), widths)
def test_weight_grids_without_steps_hold_few_levels_and_are_odd(rows, bits):
    w = torch.tensor(rows)
    if float(w.abs().max()) < 1e-3:
        return
    dorefa = Q.dorefa_weights(w, bits)
    assert len(dorefa.unique()) <= 2**bits
    assert bits == 1 or float(dorefa.abs().max()) <= 1
    for row in Q.entropy_weights(w, bits):
        assert len(row.unique()) <= 2**bits
    steps = 2**bits - 1
    if bits > 1:
        odd = dorefa.double() * steps
        assert bool(((odd.round() % 2).abs() == 1).all())
        assert float((odd - odd.round()).abs().max()) < 1e-3


@settings(max_examples=100, deadline=None)
@given(lists, st.floats(2**-7, 128, width=32), widths)
def test_activation_grids_stay_in_range(xs, alpha, bits):
    x = torch.tensor(xs)
    pact, dorefa = Q.pact_activations(x, torch.tensor(alpha), bits), Q.dorefa_activations(x, bits)
    assert float(pact.min()) >= 0
    assert float(pact.max()) <= alpha * (1 + 1e-6)
    assert float(dorefa.min()) >= 0
    assert float(dorefa.max()) <= 1
    assert len(pact.unique()) <= 2**bits
    assert math.isfinite(float(pact.sum()))
