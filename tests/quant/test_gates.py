"""Layers that run on gates: one-hot equals the plain quantizer, the gate's gradient, widths as data without recompilation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitwright.quant.functional import SIGNED_MAX, dorefa_weights, entropy_weights
from bitwright.quant.gates import Gate, GatedActivation, GatedWeight, LayerGates, switchable
from bitwright.quant.quantizers import LSQActivation, LSQWeight

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


def values(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(form, weight, bits, axis=0):
    """Return the weights that a form has at one width, from the quantizers of a fixed width."""
    if bits >= 16:
        return weight
    if form == "lsq":
        return LSQWeight(weight, bits, axis=axis)(weight).detach()
    if form == "dorefa":
        return dorefa_weights(weight, bits)
    return entropy_weights(weight.movedim(axis, 0), bits).movedim(0, axis)


@pytest.mark.parametrize("form", ["lsq", "entropy", "dorefa"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_one_hot_gate_is_the_plain_weight_quantizer_bitwise(form, axis):
    weight = values(1, 5, 4, 3)
    for bits in (*WIDTHS, 32):
        for widths, hot in (([bits, max(1, bits - 1)], [1.0, 0.0]), ([8, bits], [0.0, 1.0]), ([bits], [1.0])):
            gated = GatedWeight(Gate.at(widths, hot), form, weight, axis)
            assert torch.equal(gated(weight), plain(form, weight, bits, axis)), bits


@pytest.mark.parametrize("signed", [True, False])
def test_a_one_hot_gate_is_the_plain_activation_quantizer_bitwise(signed):
    x = values(2, 6, 4, 5) if signed else values(2, 6, 4, 5).abs()
    for bits in (*WIDTHS, 32):
        gated = GatedActivation(Gate.at([bits, 4], [1.0, 0.0]), x)
        if bits == 32:
            assert torch.equal(gated(x), x)
            continue
        fixed = LSQActivation(bits)
        fixed.calibrate(x)
        assert gated.signed is fixed.signed is signed
        assert torch.equal(gated(x), fixed(x))


@pytest.mark.parametrize("weights", [[0.3, 0.7], [1.0, 0.0], [0.0, 1.0], [0.2, 0.5, 0.3]])
@pytest.mark.parametrize("form", ["lsq", "entropy", "dorefa"])
def test_a_mixture_and_the_gradients_of_its_gate(form, weights):
    """The gradient of gate k is the inner product of the result's gradient with the k-th quantized weight, used or not."""
    weight, widths = values(3, 5, 8), [6, 2, 1][: len(weights)]
    gate = Gate.at(widths, weights)
    gated = GatedWeight(gate, form, weight, 0)
    latent = weight.clone().requires_grad_()
    up = values(4, 5, 8)
    out = gated(latent)
    parts = [plain(form, weight, bits) for bits in widths]
    assert torch.allclose(out, sum(g * part for g, part in zip(weights, parts, strict=True)), atol=1e-6)
    out.backward(up)
    for k, part in enumerate(parts):
        assert gate.weights.grad[k].item() == pytest.approx(float((up * part).sum()), rel=1e-4, abs=1e-5)
    if form == "entropy":
        assert torch.allclose(latent.grad, up * sum(weights), atol=1e-6)


def test_the_gradient_of_an_activation_gate():
    x, up = values(5, 6, 9), values(6, 6, 9)
    gate = Gate.at([4, 2], [0.0, 1.0])
    GatedActivation(gate, x)(x).backward(up)
    for k, bits in enumerate((4, 2)):
        fixed = LSQActivation(bits)
        fixed.calibrate(x)
        assert gate.weights.grad[k].item() == pytest.approx(float((up * fixed(x)).detach().sum()), rel=1e-4)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_step_of_the_width_in_use_alone_gets_its_lsq_gradient(bits):
    weight, up = values(7, 3, 20), values(8, 3, 20)
    gated = GatedWeight(Gate.at([bits], [1.0]), "lsq", weight, 0)
    gated(weight).backward(up)
    fixed = LSQWeight(weight, bits)
    fixed(weight).backward(up)
    assert torch.allclose(gated.scale.grad[bits - 1], fixed.scale.grad.flatten(), rtol=1e-5)
    others = [k for k in range(8) if k != bits - 1]
    assert float(gated.scale.grad[others].abs().sum()) == 0
    assert gated.factors[bits - 1].item() == pytest.approx(1 / math.sqrt(20 * SIGNED_MAX[bits]))


def test_the_error_of_an_activation_width_is_that_on_the_sample():
    x = values(9, 30, 10)
    gated = GatedActivation(Gate.at([8], [1.0]), x)
    for bits in WIDTHS:
        fixed = LSQActivation(bits)
        fixed.calibrate(x)
        assert gated.error[bits - 1].item() == pytest.approx(float((fixed(x).detach() - x).square().sum() / x.square().sum()), rel=1e-4)


# ---- whole networks


def two_layers():
    with torch.random.fork_rng():
        torch.manual_seed(10)
        return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 3)).eval()


def by_hand(net, x, bits):
    """Return what the network gives with its two layers at (weight, input) widths."""
    expected = copy.deepcopy(net)
    entering = {"0": x, "4": net[:4](x)}
    with torch.no_grad():
        for name, (w, a) in zip(("0", "4"), bits, strict=True):
            layer = expected.get_submodule(name)
            layer.weight.data = plain("lsq", layer.weight.data, w)
            rounds = nn.Identity() if a >= 16 else LSQActivation(a)
            if a < 16:
                rounds.calibrate(entering[name])
            layer.register_forward_pre_hook(lambda _, args, rounds=rounds: (rounds(args[0]),))
        return expected(x)


def test_switchable_equals_a_network_quantized_by_hand_and_leaves_the_model_alone():
    net, x = two_layers(), values(11, 7, 2, 5, 5)
    kept = copy.deepcopy(net.state_dict())
    weights, inputs = Gate.at([8, 3], [0.0, 1.0]), Gate.at([4, 2], [1.0, 0.0])
    gated = switchable(net, {"0": LayerGates(weights, 8), "4": LayerGates(2, inputs)}, x)
    with torch.no_grad():
        assert torch.equal(gated(x), by_hand(net, x, [(3, 8), (2, 4)]))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in kept.items())
    assert not net[0]._forward_pre_hooks
    assert not gated[4].weight_quantizer.gate.requires_grad
    assert "0.bias" in gated.state_dict()


def test_layers_that_share_a_gate_move_together_in_place():
    net, x = two_layers(), values(12, 6, 2, 5, 5)
    gate = Gate.at([8, 7], [1.0, 0.0])
    gated = switchable(net, {"0": LayerGates(gate, 32), "4": LayerGates(gate, 32)}, x)
    with torch.no_grad():
        for bits in (8, 1, 4, 32, 2):
            gate.widths.copy_(torch.tensor([bits, 1]))
            assert torch.equal(gated(x), by_hand(net, x, [(bits, 32), (bits, 32)]))
        gate.widths.copy_(torch.tensor([5, 3]))
        gate.weights.copy_(torch.tensor([0.0, 1.0]))
        assert torch.equal(gated(x), by_hand(net, x, [(3, 32), (3, 32)]))
    gated(x).sum().backward()
    assert gate.weights.grad.shape == (2,)


def test_a_gate_survives_a_state_dict_of_its_network():
    net, x = two_layers(), values(13, 6, 2, 5, 5)
    gated = switchable(net, {"0": LayerGates(Gate.at([4, 2], [0.25, 0.75]), 4)}, x)
    other = switchable(net, {"0": LayerGates(Gate.at([4, 2], [1.0, 0.0]), 4)}, x)
    with torch.no_grad():
        gated[0].weight_quantizer.scale.mul_(1.3)
    other.load_state_dict(gated.state_dict())
    assert torch.equal(other(x), gated(x))


def test_changing_widths_in_place_does_not_recompile():
    """A training step is one graph without breaks; widths and gates are inputs of it."""
    net, x, y = two_layers(), values(14, 6, 2, 5, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    weights, inputs = Gate.at([8, 7], [1.0, 0.0]), Gate.at([8, 7], [1.0, 0.0])
    gated = switchable(net, {"0": LayerGates(weights, inputs), "4": LayerGates(weights, 4)}, x)

    def loss(x, y):
        return F.cross_entropy(gated(x), y)

    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")
    torch._dynamo.reset()
    try:
        compiled(x, y).backward()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for pair, hot in (([4, 3], [1.0, 0.0]), ([2, 1], [0.0, 1.0]), ([3, 2], [0.4, 0.6]), ([1, 1], [1.0, 0.0]), ([8, 7], [0.0, 1.0])):
                for gate in (weights, inputs):
                    gate.widths.copy_(torch.tensor(pair))
                    gate.weights.data.copy_(torch.tensor(hot))
                results = []
                for step in (loss, compiled):
                    gated.zero_grad(set_to_none=True)
                    value = step(x, y)
                    value.backward()
                    results.append([value.detach(), weights.weights.grad, inputs.weights.grad, gated[4].weight.grad])
                for eager, fast in zip(*results, strict=True):
                    assert torch.allclose(eager, fast, rtol=1e-4, atol=1e-6)
    finally:
        torch._dynamo.reset()
