"""From a float network to a quantized copy: what it must equal, what it must leave alone, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitwright.data import TensorSplit
from bitwright.errors import BitwrightError, PolicyError, SiteError
from bitwright.policy import Bits, Policy
from bitwright.quant import QuantLayer, QuantOptions, named_quant_layers, quantize, verify_widths
from bitwright.quant.batchnorm import batchnorms, collect, correct_batchnorm
from bitwright.quant.calibration import calibrate
from bitwright.quant.functional import fake_quantize
from bitwright.quant.modules import Op
from bitwright.sites import trace


def seeded(seed, make):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def values(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_at(model, w, a=32):
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
    return Policy((name, Bits(w, a)) for name, m in model.named_modules() if isinstance(m, kinds))


def small_net():
    layers = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


@pytest.fixture
def net():
    return seeded(0, small_net)


# ---- every kind of layer

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear, 3-D input, no bias": (lambda: nn.Linear(6, 4, bias=False), (3, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0), bias=False), (2, 4, 7, 8)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 9, 9)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 6, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 6, 6)),
    "conv2d replicate": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"), (2, 4, 6, 6)),
    "conv1d circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular", stride=2), (2, 4, 8)),
    "conv2d reflect same": (lambda: nn.Conv2d(4, 6, 4, padding="same", padding_mode="reflect"), (2, 4, 6, 6)),
    "conv2d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=1, groups=2), (1, 2, 4, 5, 6)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, padding=1), (2, 4, 7)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, dilation=2), (2, 4, 5, 5)),
    "transposed 2d grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (1, 2, 3, 3, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_at_32_bits_every_layer_equals_itself_bitwise(kind):
    make, shape = LAYERS[kind]
    net, x = nn.Sequential(seeded(1, make)).eval(), values(2, *shape)
    quantized = quantize(net, all_at(net, 32))
    assert isinstance(quantized[0], QuantLayer)
    assert torch.equal(quantized(x), net(x))
    assert list(quantized.state_dict()) == list(net.state_dict())
    quantized.load_state_dict(net.state_dict())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_low_widths_are_the_layer_on_rounded_weights(kind, per_channel):
    make, shape = LAYERS[kind]
    layer, x = seeded(1, make).eval(), values(2, *shape)
    net = nn.Sequential(layer)
    quantized = quantize(net, all_at(net, 3), options=QuantOptions(per_channel=per_channel))
    axis = None if not per_channel else 1 if kind.startswith("transposed") else 0
    step = calibrate(layer.weight, 3, axis=axis)
    expected = copy.deepcopy(layer)
    expected.weight.data = fake_quantize(layer.weight.data, step, 3)
    assert torch.equal(quantized(x), expected(x))
    assert verify_widths(quantized)["0"] <= 8


def test_16_bits_round_weights_to_bfloat16_and_leave_the_input_alone(net):
    x = values(3, 4, 2, 8, 8)
    quantized = quantize(net, all_at(net, 16, 16))
    rounded = copy.deepcopy(net)
    for name, layer in named_quant_layers(quantized):
        assert layer.weight_quantizer is None
        assert layer.input_quantizer is None
        weight = rounded.get_submodule(name).weight
        weight.data = weight.data.bfloat16().float()
        assert torch.equal(layer.quantized_weight(), weight)
        assert torch.equal(layer.weight, net.get_submodule(name).weight)
    assert torch.equal(quantized(x), rounded(x))
    quantized(x).sum().backward()
    assert quantized[0].weight.grad is not None


@pytest.mark.parametrize("quantizer", ["lsq", "entropy", "dorefa", "pact"])
def test_every_scheme_keeps_its_widths_with_weights_and_activations(net, quantizer):
    x = values(4, 16, 2, 8, 8)
    quantized = quantize(net, all_at(net, 2, 4), quantizer=quantizer, calibration=x)
    assert all(levels <= 4 for levels in verify_widths(quantized).values())
    for _, layer in named_quant_layers(quantized):
        assert layer.bits == Bits(2, 4)
        assert len(layer.input_quantizer(values(5, 300).abs()).unique()) <= 16
    assert bool(torch.isfinite(quantized(x)).all())
    quantized(x).square().sum().backward()
    assert bool(torch.isfinite(quantized[0].weight.grad).all())
    assert float(quantized[0].weight.grad.abs().sum()) > 0


def test_inputs_are_calibrated_on_what_the_float_network_feeds_them(net):
    x = values(6, 12, 2, 8, 8)
    quantized = quantize(net, all_at(net, 4, 3), calibration=x)
    assert quantized[0].input_quantizer.signed
    assert not quantized[3].input_quantizer.signed
    with torch.no_grad():
        entering = net[:3](x)
    assert torch.equal(quantized[3].input_quantizer.scale.detach(), calibrate(entering, 3, signed=False))
    split = TensorSplit(x, torch.zeros(12, dtype=torch.int64), classes=3)
    assert torch.equal(quantize(net, all_at(net, 4, 3), calibration=split)(x), quantized(x))


# ---- the model stays as it is


def test_the_model_is_untouched_bitwise(net):
    net.train()
    net[1].eval()
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    kinds = [type(m) for m in net.modules()]
    state = torch.get_rng_state()
    x = values(7, 8, 2, 8, 8)
    quantized = quantize(net, all_at(net, 2, 2), calibration=x, correct=("batchnorm",))
    with torch.no_grad():
        for parameter in quantized.parameters():
            parameter.add_(1)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in kept.items())
    assert [m.training for m in net.modules()] == modes
    assert [type(m) for m in net.modules()] == kinds
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in [*net.modules(), *quantized.modules()])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())


def test_the_copy_keeps_the_training_flags(net):
    net.train()
    net[1].eval()
    quantized = quantize(net, all_at(net, 2, 4), calibration=values(7, 8, 2, 8, 8), correct=("batchnorm",))
    assert quantized.training
    assert not quantized[1].training
    assert quantized[4].training


# ---- shared modules


class Shared(nn.Module):
    """One layer that runs twice, and one that two names hold."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.again = self.second
        self.blocks = nn.ModuleList([self.first, nn.Sequential(self.second)])

    def forward(self, x):
        return self.again(self.blocks[1](self.blocks[0](self.first(x).relu()).relu()))


def test_a_module_that_is_registered_twice_stays_one():
    net, x = seeded(8, Shared).eval(), values(9, 6, 5)
    quantized = quantize(net, Policy({"first": (2, 4), "second": (3, 4)}), calibration=x)
    assert isinstance(quantized.first, QuantLayer)
    assert quantized.blocks[0] is quantized.first
    assert quantized.again is quantized.second is quantized.blocks[1][0]
    assert [name for name, _ in named_quant_layers(quantized)] == ["first", "second"]
    with torch.no_grad():
        expected = copy.deepcopy(net)
        for name in ("first", "second"):
            layer, rounds = getattr(expected, name), getattr(quantized, name).input_quantizer
            layer.weight.data = getattr(quantized, name).quantized_weight()
            layer.register_forward_pre_hook(lambda _, args, rounds=rounds: (rounds(args[0]),))
        assert torch.equal(quantized(x), expected(x))


def test_the_same_module_twice_in_one_parent():
    layer = seeded(10, lambda: nn.Linear(4, 4))
    net = nn.Sequential(layer, nn.ReLU(), layer).eval()
    quantized = quantize(net, Policy({"0": (2, 32)}))
    assert quantized[2] is quantized[0]
    assert isinstance(quantized[0], QuantLayer)
    x = values(11, 3, 4)
    weight = quantized[0].quantized_weight()
    assert torch.equal(quantized(x), F.linear(F.linear(x, weight, layer.bias).relu(), weight, layer.bias))


def test_two_modules_that_share_a_weight_go_on_sharing_it():
    net = nn.Sequential(seeded(12, lambda: nn.Linear(4, 4)), nn.Linear(4, 4)).eval()
    net[1].weight = net[0].weight
    quantized = quantize(net, all_at(net, 4))
    assert quantized[0].weight is quantized[1].weight
    assert quantized[0].weight is not net[0].weight


def test_a_model_that_is_one_bare_layer_is_refused_rather_than_left_as_it_is():
    with pytest.raises(SiteError, match=r"the model is itself the layer to quantize.*wrap it in nn.Sequential\(model\)"):
        quantize(nn.Linear(4, 3), Policy({"": (1, 32)}))


# ---- sites


def test_policies_by_site_name_and_skip(net):
    sites = trace(net, values(0, 1, 2, 8, 8)).sites
    by_site = quantize(net, Policy((s.name, Bits(2, 32)) for s in sites), sites=sites)
    assert verify_widths(by_site) == verify_widths(quantize(net, all_at(net, 2)))
    skipped = quantize(net, Policy({"3": (2, 32)}), skip=["0", "[8-9]"])
    assert isinstance(skipped[3], QuantLayer)
    assert isinstance(skipped[0], nn.Conv2d)
    assert isinstance(skipped[8], nn.Linear)


def test_tied_sites_share_their_width(net):
    sites = trace(net, values(0, 1, 2, 8, 8), tie=[("0", "3")]).sites
    quantized = quantize(net, Policy((s.name, Bits(1 if len(s.layers) > 1 else 8, 32)) for s in sites), sites=sites)
    assert [layer.bits.w for _, layer in named_quant_layers(quantized)] == [1, 1, 8]


class Functional(nn.Module):
    """A product of two activations beside a layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return torch.matmul(self.fc(x), x.transpose(-1, -2))


@pytest.mark.parametrize("bits", [(32, 32), (8, 8)])
def test_a_product_of_activations_is_quantized_or_refused_in_one_line(bits):
    net, x = seeded(15, Functional).eval(), values(16, 2, 4, 6)
    sites = trace(net, x).sites
    assert [s.operands for s in sites] == [1, 2]
    policy = Policy((s.name, bits) for s in sites)
    refused = ""
    try:
        quantized = quantize(net, policy, sites=sites, calibration=x)
    except BitwrightError as error:
        refused = str(error)
    if refused:
        assert bits == (8, 8)
        assert sites[1].name in refused
        assert "\n" not in refused
    else:
        assert torch.equal(quantized(x), net(x)) if bits == (32, 32) else torch.allclose(quantized(x), net(x), atol=0.3)


# ---- refusals


def test_unknown_site_missing_entry_missing_calibration(net):
    good = dict(all_at(net, 4))
    with pytest.raises(PolicyError, match=r"the model has no site 'conv'; known: 0, 3, 8"):
        quantize(net, Policy({**good, "conv": (4, 32)}))
    with pytest.raises(PolicyError, match=r"site '3' has no entry; add it, or name it in skip="):
        quantize(net, Policy({"0": (4, 32), "8": (4, 32)}))
    with pytest.raises(BitwrightError, match=r"activations below 16 bits need calibration=; give a batch of inputs or a split"):
        quantize(net, all_at(net, 4, 8))
    with pytest.raises(BitwrightError, match=r"correct=\('batchnorm',\) needs calibration="):
        quantize(net, all_at(net, 4), correct=("batchnorm",))


def test_unknown_correction_and_quantizer_and_rule(net):
    with pytest.raises(BitwrightError, match=r"correction 'baise' is unknown; did you mean 'bias'"):
        quantize(net, all_at(net, 4), correct=("baise",))
    with pytest.raises(BitwrightError, match=r"quantizer 'lsqq' is unknown; did you mean 'lsq'\?"):
        quantize(net, all_at(net, 4), quantizer="lsqq")
    with pytest.raises(BitwrightError, match=r"calibration rule 'max' is unknown"):
        quantize(net, all_at(net, 4), options=QuantOptions(rule="max"))


def test_a_layer_that_the_calibration_data_never_reached_is_named():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    net = seeded(17, Branch)
    with pytest.raises(BitwrightError, match=r"layer 'unused' did not run on the calibration data.*name it in skip="):
        quantize(net, all_at(net, 4, 4), calibration=values(18, 3, 4))
    assert all(not m._forward_pre_hooks for m in net.modules())


def test_calibration_data_with_a_nan_is_refused(net):
    x = values(19, 4, 2, 8, 8)
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(BitwrightError, match="not finite"):
        quantize(net, all_at(net, 4, 4), calibration=x)


def test_weights_with_a_nan_are_refused(net):
    net[3].weight.data[0, 0, 0, 0] = float("inf")
    with pytest.raises(BitwrightError, match="not finite"):
        quantize(net, all_at(net, 4))


def test_an_op_that_torch_does_not_provide_is_refused():
    with pytest.raises(SiteError, match=r"a LSTM cannot be quantized; name it in skip="):
        Op.of(nn.LSTM(3, 4))


# ---- verify_widths


def test_verify_widths_counts_levels():
    net = nn.Sequential(seeded(20, lambda: nn.Linear(400, 3)), seeded(21, lambda: nn.Linear(3, 2))).eval()
    for bits in (1, 2, 3, 4):
        for per_channel in (True, False):
            quantized = quantize(net, Policy({"0": (bits, 32), "1": (32, 32)}), options=QuantOptions(per_channel=per_channel))
            assert verify_widths(quantized) == {"0": 2**bits}
    narrow = quantize(net, Policy({"0": (3, 32), "1": (16, 32)}), options=QuantOptions(narrow=True))
    assert verify_widths(narrow) == {"0": 7}


def test_verify_widths_refuses_a_layer_that_holds_too_many_levels():
    net = nn.Sequential(seeded(20, lambda: nn.Linear(400, 3))).eval()
    quantized = quantize(net, Policy({"0": (3, 32)}))
    quantized[0].bits = Bits(2, 32)
    with pytest.raises(BitwrightError, match=r"layer '0' holds 8 distinct weights, but its policy says 2 bits"):
        verify_widths(quantized)


# ---- BatchNorm correction


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k}


def test_batchnorm_correction_is_zero_when_nothing_is_quantized(net):
    x = values(22, 32, 2, 8, 8)
    quantized = quantize(net, all_at(net, 32), calibration=x, correct=("batchnorm",))
    before, after = statistics(net), statistics(quantized)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(quantized(x), net(x))


def test_batchnorm_correction_by_hand():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)).eval()
    other = copy.deepcopy(net)
    other[0].weight.data *= 2
    other[1].running_mean.copy_(torch.tensor([1.0, -1.0]))
    x = values(23, 40, 2)
    y = F.linear(x, net[0].weight)
    correct_batchnorm(other, net, x)
    assert torch.allclose(other[1].running_mean, torch.tensor([1.0, -1.0]) + 2 * y.mean(0) - y.mean(0), atol=1e-6)
    assert torch.allclose(other[1].running_var, torch.full((2,), 4.0), rtol=1e-5)
    assert int(other[1].num_batches_tracked) == 0
    assert other[1].momentum == 0.1
    assert not other[1].training


def test_collecting_statistics_changes_nothing(net):
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    seen = collect(net, values(24, 8, 2, 8, 8))
    assert set(seen) == set(batchnorms(net)) == {"1", "4"}
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in kept.items())
    assert all(not m.training for m in net.modules())


def stripes(seed, n):
    """Images of three classes that differ in where they are bright."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=generator)
    x = torch.randn(n, 2, 8, 8, generator=generator) * 0.7
    for k in range(3):
        x[y == k, k % 2, 2 * k : 2 * k + 3] += 1.5
    return x, y


@pytest.fixture(scope="module")
def trained():
    net = seeded(25, small_net).train()
    x, y = stripes(26, 256)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def test_batchnorm_correction_reduces_the_error_at_2_bits(trained):
    x, _ = stripes(27, 400)
    calibration, _ = stripes(28, 128)
    errors = {}
    for correct in ((), ("batchnorm",)):
        quantized = quantize(trained, all_at(trained, 2), calibration=calibration, correct=correct)
        with torch.no_grad():
            errors[correct] = float((quantized(x) - trained(x)).square().mean())
    assert errors[("batchnorm",)] < 0.8 * errors[()]


def test_known_float_statistics_save_a_pass_and_change_nothing(trained):
    calibration, _ = stripes(28, 64)
    arguments = {"calibration": calibration, "correct": ("batchnorm",)}
    plain = quantize(trained, all_at(trained, 2), **arguments)
    given = quantize(trained, all_at(trained, 2), **arguments, float_statistics=collect(trained, calibration))
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), given.state_dict().values(), strict=True))


class _Upsampling(nn.Module):
    def __init__(self, dims):
        super().__init__()
        kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
        self.up = kind(3, 2, 3, stride=2, padding=1)

    def forward(self, x, size=None):
        return self.up(x, output_size=size)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_transposed_convolution_takes_an_output_size(dims):
    net, x = _Upsampling(dims), torch.randn(2, 3, *[5] * dims)
    quantized = quantize(net, Policy({"up": (32, 8)}), calibration=x)
    for size in (9, 10):
        assert quantized(x, [size] * dims).shape == net(x, [size] * dims).shape
        assert torch.allclose(quantized(x, [size] * dims), net(x, [size] * dims), atol=0.1)
    with pytest.raises(ValueError, match=r"output_size=\[11.*: this input gives \[9"):
        quantized(x, [11] * dims)
