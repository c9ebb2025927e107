"""Post-training corrections: each does what its name says, together they keep what packing and training rely on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitwright import export
from bitwright.errors import BitwrightError, SiteError
from bitwright.exporters.packed import load
from bitwright.policy import Bits, Policy
from bitwright.quant import QuantOptions, named_quant_layers, quantize, verify_widths
from bitwright.quant.batchnorm import batchnorms, statistics
from bitwright.quant.corrections import STEPS, check_steps
from bitwright.quant.reference import divergence
from bitwright.sites import trace

CODES = ("compensate", "rounding", "refine")


class Net(nn.Module):
    """Convolutions plain, depthwise and transposed, with and without BatchNorm and bias, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.norm2(self.depthwise(x)).relu()
        out: Tensor = self.last(self.up(x).relu().mean((2, 3)))
        return out


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
        for norm in batchnorms(model).values():
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
        model(images(256))  # running statistics worth the name
        return model.eval()


def images(count: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, 8, mode="bilinear") + 0.1 * torch.randn(count, 3, 8, 8, generator=generator)


def at(model: nn.Module, width: int, activations: int = 32) -> Policy:
    return Policy((site.name, Bits(width, activations)) for site in trace(model, images(1)).sites)


def loss(model: nn.Module, quantized: nn.Module) -> float:
    x = images(256)
    with torch.no_grad():
        return float((quantized.eval()(x) - model(x)).square().mean())


# ---- names


def test_steps_have_one_order_and_unknown_ones_are_refused(net: nn.Module) -> None:
    assert check_steps(reversed(STEPS)) == STEPS
    assert check_steps(()) == ()
    with pytest.raises(BitwrightError, match=r"correction 'rouding' is unknown; did you mean 'rounding'\?"):
        check_steps(("rouding",))
    policy, x = at(net, 3, 8), images()
    forwards, backwards = (quantize(net, policy, calibration=x, correct=steps).state_dict() for steps in (STEPS, STEPS[::-1]))
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


@pytest.mark.parametrize("step", STEPS)
def test_every_step_needs_images_and_leaves_the_float_network_alone(net: nn.Module, step: str) -> None:
    with pytest.raises(BitwrightError, match=rf"correct=\('{step}',\) needs calibration="):
        quantize(net, at(net, 3), correct=(step,))
    before = copy.deepcopy(net.state_dict())
    quantized = quantize(net, at(net, 3), calibration=images(), correct=(step,))
    assert all(torch.equal(before[name], net.state_dict()[name]) for name in before)
    plain = quantize(net, at(net, 3), calibration=images())
    assert not torch.equal(quantized(images(8)), plain(images(8)))  # and it does something
    assert quantized.state_dict().keys() == plain.state_dict().keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in quantized.modules())


# ---- what they do


def test_each_step_that_chooses_codes_lowers_the_error_and_all_of_them_most(net: nn.Module) -> None:
    policy, x = at(net, 2), images()
    errors = {
        steps: loss(net, quantize(net, policy, calibration=x, correct=steps))
        for steps in [(), *((step,) for step in CODES), ("rounding", "refine"), CODES, (*CODES, "bias", "batchnorm")]
    }
    assert errors[("rounding",)] < 0.7 * errors[()]
    assert errors[("refine",)] < 0.7 * errors[()]
    assert errors[CODES] < errors[("rounding", "refine")]
    assert errors[(*CODES, "bias", "batchnorm")] < 0.5 * errors[()]


def test_bias_correction_is_exact_on_a_linear_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    x = torch.randn(50, 6, generator=generator) + 1
    quantized = quantize(model, Policy({"0": (2, 32)}), calibration=x, correct=("bias",))
    error = quantized[0].quantized_weight() - model[0].weight
    torch.testing.assert_close(quantized[0].bias, model[0].bias - error @ x.mean(0))
    torch.testing.assert_close(quantized(x).mean(0), model(x).mean(0))


def test_bias_correction_restores_every_mean_in_order(net: nn.Module) -> None:
    x = images()
    quantized = quantize(net, at(net, 2), calibration=x, correct=("bias",))
    means: dict[str, list[Tensor]] = {"up": [], "last": []}
    for model in (net, quantized):
        for name, seen in means.items():
            model.get_submodule(name).register_forward_hook(lambda _, __, y, seen=seen: seen.append(statistics(y)[0]))
        model(x)
    for first, second in means.values():
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_batchnorm_in_order_restores_every_batch_statistic(net: nn.Module) -> None:
    x = images()
    quantized = quantize(net, at(net, 2), calibration=x, correct=("rounding", "batchnorm"))
    for (_, a), (_, b) in zip(batchnorms(net).items(), batchnorms(quantized).items(), strict=True):
        seen: list[tuple[Tensor, Tensor]] = []
        for model, norm in ((net, a), (quantized, b)):
            handle = norm.register_forward_hook(lambda _, args, __, seen=seen: seen.append(statistics(args[0])))
            model(x)
            handle.remove()
        torch.testing.assert_close(b.running_mean - a.running_mean, seen[1][0] - seen[0][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(b.running_var / a.running_var, seen[1][1] / seen[0][1], atol=1e-5, rtol=1e-4)


def test_float_weights_and_sixteen_bits_are_not_rounded(net: nn.Module) -> None:
    policy = Policy({**at(net, 2), "first": (32, 32), "up": (16, 32)})
    quantized = quantize(net, policy, calibration=images(), correct=CODES)
    assert torch.equal(quantized.first.weight, net.first.weight)
    assert torch.equal(quantized.up.weight, net.up.weight)
    assert not torch.equal(quantized.last.weight, net.last.weight)


# ---- what they keep


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("width", range(1, 9))
def test_the_latent_weights_lie_on_the_codes_at_every_width(net: nn.Module, width: int, per_channel: bool) -> None:
    options = QuantOptions(per_channel=per_channel, narrow=width % 2 == 0 and width > 2)
    quantized = quantize(net, at(net, width), calibration=images(32), correct=CODES, options=options)
    assert max(verify_widths(quantized).values()) <= 2**width
    for _, layer in named_quant_layers(quantized):
        torch.testing.assert_close(layer.quantized_weight(), layer.weight, atol=0, rtol=1e-6)
        steps = layer.weight_quantizer.scale
        assert (steps.numel() == 1) == (not per_channel)
        assert bool((steps > 0).all())


def test_a_corrected_network_is_packed_and_loaded_bit_for_bit(net: nn.Module, tmp_path: Path) -> None:
    quantized = quantize(net, at(net, 3, 8), calibration=images(), correct=STEPS).eval()
    export(quantized, "packed", tmp_path / "net.safetensors", example=images(8), policy=at(net, 3, 8))
    assert torch.equal(load(tmp_path / "net.safetensors", Net())(images(8)), quantized(images(8)))


def test_its_state_fits_the_uncorrected_network(net: nn.Module) -> None:
    corrected = quantize(net, at(net, 3, 8), calibration=images(), correct=STEPS).eval()
    plain = quantize(net, at(net, 3, 8), calibration=images()).eval()
    plain.load_state_dict(corrected.state_dict())
    assert torch.equal(plain(images(8)), corrected(images(8)))


def test_corrections_repeat_and_keep_the_training_flags(net: nn.Module) -> None:
    net.norm.train()
    first, second = (quantize(net, at(net, 3), calibration=images(), correct=STEPS) for _ in range(2))
    assert all(torch.equal(first.state_dict()[name], second.state_dict()[name]) for name in first.state_dict())
    assert [module.training for module in first.modules()] == [module.training for module in second.modules()]
    assert first.norm.training
    assert not first.norm2.training


def test_a_corrected_network_beats_the_plain_one_on_images_it_was_not_fitted_to(net: nn.Module) -> None:
    fresh = images(512)[256:]
    plain, corrected = (quantize(net, at(net, 2, 8), calibration=images(), correct=steps) for steps in (("batchnorm",), STEPS))
    with torch.no_grad():
        before, after = (float(divergence(net(fresh), model.eval()(fresh))) for model in (plain, corrected))
    assert after < 0.7 * before


# ---- what cannot be


class Call(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def test_weights_whose_codes_cannot_be_chosen_are_refused_by_name(net: nn.Module) -> None:
    x = torch.randn(8, 6)
    model = nn.Sequential(Call())
    sites = trace(model, x).sites
    policy = Policy((site.name, Bits(3, 32)) for site in sites)
    with pytest.raises(SiteError, match=r"correct=\('rounding', …\): '0#0' is a functional call, .*; leave the step out"):
        quantize(model, policy, calibration=x, correct=("rounding",), sites=sites)
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    with pytest.raises(SiteError, match=r"correct=\('refine', …\): layers '0' and '1' share a weight; leave the step out, or skip one"):
        quantize(tied, Policy({"0": (3, 32), "1": (3, 32)}), calibration=x, correct=("refine",))
    for options, found in ((QuantOptions(entropy=True), "entropy=True"), (QuantOptions("dorefa"), "DoReFaWeight")):
        with pytest.raises(SiteError, match=rf"needs quantizer='lsq' without entropy, and 'first' has {found}; leave the step out"):
            quantize(net, at(net, 3), calibration=images(), correct=("compensate",), options=options)
    quantize(net, at(net, 3), calibration=images(), correct=("bias", "batchnorm"), options=QuantOptions("dorefa"))  # these can be


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x)
        return out


def test_a_layer_that_does_not_run_is_refused_by_name() -> None:
    model = Idle()
    with pytest.raises(BitwrightError, match=r"layer 'idle' did not run as a module .*; name it in skip="):
        quantize(model, Policy({"used": (3, 32), "idle": (3, 32)}), calibration=torch.randn(8, 6), correct=("rounding",))
    quantize(model, Policy({"used": (3, 32)}), calibration=torch.randn(8, 6), correct=("rounding",), skip=("idle",))
