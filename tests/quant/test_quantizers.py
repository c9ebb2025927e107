"""Quantizers as modules: codes that say exactly what forward says, the declared grid, widths as data, calibration."""

from __future__ import annotations

import math

import pytest
import torch

import reference
from bitwright.errors import BitwrightError
from bitwright.quant.calibration import calibrate, is_signed
from bitwright.quant.functional import SIGNED_MAX, fake_quantize
from bitwright.quant.quantizers import DoReFaActivation, DoReFaWeight, EntropyWeight, LSQActivation, LSQWeight, PACTActivation

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


def values(seed, *shape, spread=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def lsq(axis=0, **options):
    return lambda w, bits: LSQWeight(w, bits, axis=axis, **options)


SCHEMES = {
    "lsq-channel": lsq(),
    "lsq-tensor": lsq(None),
    "lsq-transposed": lsq(1),
    "lsq-channel-narrow": lsq(narrow=True),
    "lsq-tensor-narrow": lsq(None, narrow=True),
    "lsq-channel-entropy": lsq(entropy=True),
    "lsq-tensor-entropy": lsq(None, entropy=True),
    "lsq-channel-narrow-entropy": lsq(narrow=True, entropy=True),
    "lsq-tensor-narrow-entropy": lsq(None, narrow=True, entropy=True),
    "lsq-transposed-entropy": lsq(1, entropy=True),
    "lsq-minmax": lsq(rule="minmax"),
    "lsq-percentile": lsq(rule="percentile"),
    "entropy": lambda w, bits: EntropyWeight(bits),
    "entropy-transposed": lambda w, bits: EntropyWeight(bits, axis=1),
    "dorefa": lambda w, bits: DoReFaWeight(bits),
}

WEIGHTS = {
    "normal": values(1, 6, 4, 3, 3, spread=0.1),
    "matrix": values(2, 5, 40, spread=2.0),
    "one channel of zeros": values(3, 4, 9) * torch.tensor([[1.0], [0.0], [1e-3], [50.0]]),
    "ties": (torch.arange(-12, 12) / 2).view(4, 6),
    "constant": torch.full((3, 5), -0.7),
}


# ---- codes


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_decoded_codes_equal_forward_bit_for_bit(scheme, bits):
    for name, weight in WEIGHTS.items():
        quantizer = SCHEMES[scheme](weight, bits)
        coded = quantizer.encode(weight)
        assert coded.codes.dtype == torch.uint8
        assert coded.bits == bits
        assert coded.scale.dtype == torch.float32
        assert 2 * coded.origin == round(2 * coded.origin)
        assert int(coded.codes.max()) < 2**bits, name
        assert torch.equal(coded.decode(), quantizer(weight)), name


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.startswith("lsq")])
def test_codes_survive_learned_steps(scheme, bits):
    weight = values(4, 6, 4, 3)
    quantizer = SCHEMES[scheme](weight, bits)
    with torch.no_grad():
        quantizer.scale.mul_(torch.linspace(0.37, 2.9, quantizer.scale.numel()).view(quantizer.scale.shape))
        quantizer.scale.view(-1)[0].neg_()  # a step that training pushed below zero still means its magnitude
    assert torch.equal(quantizer.encode(weight).decode(), quantizer(weight))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_declared_grid_is_the_true_one(scheme, bits):
    weight = values(5, 6, 5, 3, spread=0.4)
    quantizer = SCHEMES[scheme](weight, bits)
    units = (quantizer(weight) / quantizer.step(weight)).detach().double()
    if quantizer.grid == "half-integer":
        assert bool(((2 * units).round() % 2 == 1).all())
        units = 2 * units
    assert quantizer.grid in ("integer", "half-integer")
    assert float((units - units.round()).abs().max()) < 1e-4


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_few_levels_in_every_scale_group(scheme, bits):
    weight = values(6, 6, 300)
    quantizer = SCHEMES[scheme](weight, bits)
    value, shape = quantizer(weight), quantizer.step(weight).shape
    axis = max(range(2), key=lambda k: shape[k]) if len(shape) == 2 and max(shape) > 1 else None
    rows = [value.flatten()] if axis is None else list(value.movedim(axis, 0))
    assert max(len(row.unique()) for row in rows) <= 2**bits


@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_equal_the_twins(bits):
    weight = values(7, 5, 12, spread=0.3)
    lsq_channel = LSQWeight(weight, bits)
    expected = reference.fake_quantize(weight.numpy(), lsq_channel.scale.detach().numpy(), bits)
    assert torch.equal(lsq_channel(weight), torch.from_numpy(expected))
    for quantizer, twin in ((DoReFaWeight(bits), reference.dorefa_weights), (EntropyWeight(bits), reference.entropy_weights)):
        assert torch.allclose(quantizer(weight).double(), torch.from_numpy(twin(weight.numpy(), bits)).double(), rtol=1e-5, atol=1e-6)
    moved = EntropyWeight(bits, axis=1)(weight.T)
    assert torch.equal(moved.T, EntropyWeight(bits)(weight))


def test_one_bit_is_plus_and_minus_the_step():
    weight = values(8, 3, 50)
    quantizer = LSQWeight(weight, 1, rule="minmax")
    steps = quantizer.scale.detach().flatten()
    assert torch.allclose(steps, weight.abs().amax(1))
    for row, step in zip(quantizer(weight), steps, strict=True):
        assert row.unique().tolist() == [-step.item(), step.item()]
    coded = quantizer.encode(weight)
    assert coded.origin == -0.5
    assert set(coded.codes.flatten().tolist()) == {0, 1}


# ---- the step size's gradient


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("bits", WIDTHS)
def test_step_gradient_is_equation_3_times_the_gradient_scale(bits, axis):
    weight, up = values(9, 4, 30), values(10, 4, 30)
    quantizer = LSQWeight(weight, bits, axis=axis)
    quantizer(weight).backward(up)
    groups = [(weight, up)] if axis is None else list(zip(weight, up, strict=True))
    steps = quantizer.scale.detach().flatten()
    for (w, u), step, grad in zip(groups, steps, quantizer.scale.grad.flatten(), strict=True):
        _, raw = reference.lsq_gradients(w.numpy(), step.item(), bits, u.numpy())
        highest = 1 if bits == 1 else 2 ** (bits - 1) - 1
        assert grad.item() == pytest.approx(raw / math.sqrt(w.numel() * highest), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("low", [0.0, -3.0])
def test_activation_step_gradient_is_scaled_by_the_elements_of_a_sample(bits, low):
    x, up = values(11, 5, 3, 8).clamp_min(low), values(12, 5, 3, 8)
    quantizer = LSQActivation(bits)
    quantizer.calibrate(x)
    quantizer(x).backward(up)
    _, raw = reference.lsq_gradients(x.numpy(), quantizer.scale.item(), bits, up.numpy(), signed=low < 0)
    highest = 2**bits - 1 if low == 0 else SIGNED_MAX[bits]
    assert quantizer.scale.grad.item() == pytest.approx(raw / math.sqrt(24 * highest), rel=1e-3, abs=1e-5)


def test_entropy_starts_where_n2uq_puts_the_levels():
    weight = values(13, 3, 500, spread=0.2)
    for bits in (2, 3, 4):
        quantizer = LSQWeight(weight, bits, entropy=True)
        step = quantizer.step(weight).flatten()
        assert torch.allclose(step, 2.0 ** (2 - bits) * weight.abs().mean(1), rtol=1e-5)


# ---- widths in place


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.startswith("lsq")])
def test_set_bits_in_place_equals_a_new_quantizer(scheme):
    weight = values(14, 6, 4, 3)
    quantizer = SCHEMES[scheme](weight, 8)
    places = {name: t.data_ptr() for name, t in [*quantizer.named_parameters(), *quantizer.named_buffers()]}
    for bits in (3, 1, 5, 2, 8):
        quantizer.set_bits(bits, weight)
        fresh = SCHEMES[scheme](weight, bits)
        assert torch.equal(quantizer(weight), fresh(weight))
        assert torch.equal(quantizer.encode(weight).codes, fresh.encode(weight).codes)
        assert torch.equal(quantizer.gradient_scale, fresh.gradient_scale)
        assert places == {name: t.data_ptr() for name, t in [*quantizer.named_parameters(), *quantizer.named_buffers()]}


@pytest.mark.parametrize("make", [EntropyWeight, DoReFaWeight])
def test_width_is_a_buffer_for_every_weight_scheme(make):
    weight, quantizer = values(15, 4, 20), make(8)
    for bits in (2, 1, 6):
        quantizer.bits.fill_(bits)
        assert torch.equal(quantizer(weight), make(bits)(weight))
        assert torch.equal(quantizer.encode(weight).decode(), quantizer(weight))


@pytest.mark.parametrize("make", [LSQActivation, PACTActivation, DoReFaActivation])
def test_width_is_a_buffer_for_every_activation_scheme(make):
    x, quantizer = values(16, 10, 6).abs(), make(8)
    for bits in (2, 1, 6):
        quantizer.bits.fill_(bits)
        quantizer.calibrate(x)
        fresh = make(bits)
        fresh.calibrate(x)
        assert torch.equal(quantizer(x), fresh(x))
        assert len(quantizer(x).unique()) <= 2**bits


# ---- activations


@pytest.mark.parametrize("bits", WIDTHS)
def test_sign_is_chosen_by_what_the_tensor_holds_and_survives_a_state_dict(bits):
    positive, mixed = values(17, 8, 20).abs(), values(18, 8, 20)
    for x, signed in ((positive, False), (mixed, True)):
        quantizer = LSQActivation(bits)
        quantizer.calibrate(x)
        assert quantizer.signed is signed is is_signed(x)
        twin = reference.fake_quantize(x.numpy(), quantizer.scale.item(), bits, signed=signed)
        assert torch.equal(quantizer(x), torch.from_numpy(twin))
        copy = LSQActivation(bits)
        copy.calibrate(mixed if not signed else positive)  # of the other sign before it is loaded
        holder, other = torch.nn.Sequential(quantizer), torch.nn.Sequential(copy)
        other.load_state_dict(holder.state_dict())
        assert copy.signed is signed
        assert torch.equal(copy(x), quantizer(x))


def test_a_new_calibration_may_turn_the_sign():
    quantizer = LSQActivation(4)
    quantizer.calibrate(values(19, 4, 10))
    quantizer.calibrate(values(19, 4, 10).abs())
    assert not quantizer.signed
    assert quantizer(torch.tensor([-5.0])).item() == 0


def test_pact_starts_at_the_published_clip_and_is_calibrated_to_the_sample():
    quantizer = PACTActivation(4)
    assert quantizer.scale.item() == 10
    x = values(20, 16, 50).abs()
    quantizer.calibrate(x)
    assert 0 < quantizer.scale.item() <= 1.21 * float(x.max())
    assert quantizer(x).max().item() == pytest.approx(quantizer.scale.item())
    assert float((quantizer(x) - x).square().mean()) < float((PACTActivation(4)(x) - x).square().mean())


# ---- calibration


@pytest.mark.parametrize("bits", WIDTHS)
def test_minmax_covers_the_extremes(bits):
    x = torch.tensor([[-3.0, 1.0], [0.5, 2.0], [-0.1, 0.0]])
    low, high = reference.clip_bounds(bits)
    expected = [max(3.0 / -low, 1.0 / high), 2.0 / high, 0.1 / -low]
    got = calibrate(x, bits, axis=0, rule="minmax")
    assert got.shape == (3, 1)
    assert got.flatten().tolist() == pytest.approx(expected)
    assert calibrate(x, bits, rule="minmax").item() == pytest.approx(max(3.0 / -low, 2.0 / high))
    assert calibrate(x, bits, signed=False, rule="minmax").item() == pytest.approx(2.0 / (2**bits - 1))
    low, high = reference.clip_bounds(bits, narrow=True)
    assert calibrate(x, bits, narrow=True, rule="minmax").item() == pytest.approx(max(3.0 / -low, 2.0 / high))


def test_percentile_leaves_the_largest_thousandth_outside():
    x = torch.linspace(-1, 1, 1000)
    x[17] = 500.0
    step = calibrate(x, 8, rule="percentile").item()
    assert step == pytest.approx(1 / 127, rel=0.01)
    assert calibrate(x, 8, rule="minmax").item() == pytest.approx(500 / 127)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("signed", [True, False])
def test_mse_is_near_the_best_step_of_a_fine_scan(bits, signed):
    x = values(21, 3000)
    x = x if signed else x.clamp_min(0)

    def error(step):
        return float((fake_quantize(x, torch.tensor(step), bits, signed=signed) - x).square().mean())

    found = error(calibrate(x, bits, signed=signed, rule="mse").item())
    widest = calibrate(x, bits, signed=signed, rule="minmax").item()
    assert found <= error(widest)
    assert found <= 1.05 * min(error(widest * k / 400) for k in range(4, 500, 2))


def test_mse_at_one_bit_is_the_mean_magnitude():
    x = values(22, 5000)
    assert calibrate(x, 1, rule="mse").item() == pytest.approx(x.abs().mean().item(), rel=0.05)


@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_channels_are_calibrated_each_alone(rule, axis):
    x = values(23, 3, 4, 5) * torch.tensor([0.1, 1.0, 7.0]).view(3, 1, 1)
    steps = calibrate(x, 3, axis=axis, rule=rule)
    assert list(steps.shape) == [n if k == axis else 1 for k, n in enumerate(x.shape)]
    alone = [calibrate(part, 3, rule=rule).item() for part in x.unbind(axis)]
    assert steps.flatten().tolist() == pytest.approx(alone, rel=1e-6)


def test_zeros_get_a_positive_step():
    for rule in ("minmax", "percentile", "mse"):
        steps = calibrate(torch.zeros(2, 6), 4, axis=0, rule=rule)
        assert bool((steps > 0).all())
    assert float(calibrate(-torch.ones(4), 4, signed=False, rule="minmax")) > 0


def test_calibration_errors():
    with pytest.raises(BitwrightError, match="rule 'mean' is unknown; use minmax, percentile or mse"):
        calibrate(torch.ones(3), 4, rule="mean")
    for bad in (torch.empty(0), torch.tensor([1.0, math.nan]), torch.tensor([math.inf])):
        with pytest.raises(BitwrightError, match="empty or holds values that are not finite; check the calibration data"):
            calibrate(bad, 4)


def test_calibration_draws_nothing_and_keeps_the_tensor():
    x = values(24, 600, 600)
    kept, state = x.clone(), torch.get_rng_state()
    first, second = calibrate(x, 4), calibrate(x, 4)
    assert torch.equal(first, second)
    assert torch.equal(x, kept)
    assert torch.equal(state, torch.get_rng_state())
