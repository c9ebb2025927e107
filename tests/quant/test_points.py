"""Points: 8-bit grids where a runtime adds, joins and averages; and the power-of-two scales and folded BatchNorms beside them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bitwright import models
from bitwright.errors import BitwrightError
from bitwright.policy import Policy
from bitwright.quant import QuantOptions, named_quant_layers, quantize
from bitwright.quant.folding import Folded, find_norms, fold_batchnorms
from bitwright.quant.points import OnPoint, named_points
from bitwright.sites import trace

ALL = ("add", "concat", "pool", "shared")


class Net(nn.Module):
    """A residual, a concatenation, an average; everything a point can be at."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        y = torch.relu(self.norm(self.stem(x)))
        z = torch.relu(self.left(y) + y)
        return self.head(torch.cat([z, self.right(z)], 1).mean((2, 3)))


def net(kind=Net, seed=0):
    torch.manual_seed(seed)
    model = kind()
    with torch.no_grad():
        for _ in range(5):
            model(torch.rand(8, 3, 8, 8))
    return model.eval()


def made(model, x, bits=(8, 8), **options):
    sites = trace(model, x).sites
    policy = Policy({site.name: bits for site in sites})
    return quantize(model, policy, calibration=x, sites=sites, options=QuantOptions(**options)).eval()


X = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_points_are_where_tensors_are_added_joined_averaged_and_shared():
    names = [name.split(":")[2] for name, _ in named_points(made(net(), X, points=ALL))]
    assert names == ["relu", "layer", "relu", "layer", "cat"]
    assert [name.split(":")[2] for name, _ in named_points(made(net(), X, points=("add",)))] == ["relu", "layer"]
    assert list(named_points(made(net(), X))) == []
    assert list(named_points(made(net(), X, bits=(8, 32), points=ALL))) == []  # nothing is on a grid that a neighbour could fall from


def test_a_layer_of_8_bits_reads_its_point_and_one_of_fewer_keeps_a_grid_of_its_own():
    layers = dict(named_quant_layers(made(net(), X, points=ALL)))
    assert isinstance(layers["left"].input_quantizer, OnPoint)
    assert not isinstance(layers["stem"].input_quantizer, OnPoint)
    assert not any(isinstance(layer.input_quantizer, OnPoint) for _, layer in named_quant_layers(made(net(), X, (4, 4), points=ALL)))


def test_what_a_point_gives_is_on_its_grid_and_goes_on_being_so_after_training():
    model = made(net(), X, points=ALL)
    model.train()
    model(X).sum().backward()
    assert all(point.scale.grad is not None for _, point in named_points(model))
    seen = []
    for _, point in named_points(model):
        point.register_forward_hook(lambda module, args, out: seen.append((module, out.detach())))
    model.eval()(X)
    seen = [values / module.step().detach() for module, values in seen]
    assert len(seen) == 5
    assert all(float((codes - codes.round()).abs().max()) < 1e-3 and codes.unique().numel() <= 256 for codes in seen)


def test_copies_and_state_dicts_compute_the_same():
    model = made(net(), X, points=ALL)
    other = made(net(seed=3), X, points=ALL)
    other.load_state_dict(model.state_dict())
    assert torch.equal(copy.deepcopy(model)(X), model(X))
    assert torch.equal(other(X), model(X))


def test_points_in_a_sequential_do_not_run_as_its_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 4, 1)).eval()
    pointed = made(model, X, points=ALL)
    assert [name for name, _ in named_points(pointed)] == ["point:1:relu"]
    assert pointed(X).shape == model(X).shape


def test_a_network_that_makes_other_calls_than_it_did_is_an_error():
    class Fickle(Net):
        extra = False

        def forward(self, x):
            return super().forward(torch.sigmoid(x) if self.extra else x)

    model = made(net(Fickle), X, points=ALL)
    model.extra = True
    with pytest.raises(BitwrightError, match="must make the same calls each time"):
        model(X)


def test_an_unknown_kind_and_missing_images_are_errors():
    with pytest.raises(BitwrightError, match="no kind 'adds'; did you mean 'add'"):
        QuantOptions(points=("adds",))
    with pytest.raises(BitwrightError, match="scales 'power-of-two' are unknown; did you mean 'power_of_two'"):
        QuantOptions(scales="power-of-two")
    with pytest.raises(BitwrightError, match="need quantizer 'lsq'"):
        QuantOptions(scales="power_of_two", quantizer="dorefa")
    with pytest.raises(BitwrightError, match="needs calibration="):
        quantize(nn.Sequential(nn.Linear(4, 2)), Policy({"0": (4, 32)}), options=QuantOptions(scales="power_of_two"))


@pytest.mark.parametrize(("step", "instead"), [("batchnorm", "bias"), ("refine", "rounding")])
def test_corrections_that_do_not_fit_integer_arithmetic_name_another(step, instead):
    model = net()
    policy = Policy(dict.fromkeys(trace(model, X).names, (8, 8)))
    with pytest.raises(BitwrightError, match=f"give correct=\\('{instead}',\\)"):
        quantize(model, policy, calibration=X, correct=(step,), options=QuantOptions(scales="power_of_two"))


def test_power_of_two_steps_stay_so_and_sums_of_codes_are_exact():
    model = made(net(), X, (4, 4), points=ALL, scales="power_of_two")
    for _, layer in named_quant_layers(model):
        for step in (layer.weight_quantizer.step(layer.weight), layer.input_quantizer.step()):
            assert torch.equal(step.frexp().mantissa, torch.full_like(step, 0.5))
        bias = layer.quantized_bias() / (layer.weight_quantizer.step(layer.weight).flatten() * layer.input_quantizer.step())
        assert torch.equal(bias, bias.round())
    assert torch.equal(model(X), model.double()(X.double()).float())  # no sum of float32 was rounded


def test_a_folded_batchnorm_computes_what_it_did_and_one_that_is_not_alone_stays():
    model = net()
    folded = fold_batchnorms(model, X)
    assert find_norms(model, X) == [("stem", "norm")]
    assert isinstance(folded.norm, Folded)
    torch.testing.assert_close(folded(X), model(X), rtol=1e-4, atol=1e-5)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    assert find_norms(Twice().eval(), X) == []


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3)])
def test_grouped_and_transposed_layers_fold(layer):
    model = nn.Sequential(layer, nn.BatchNorm2d(6))
    x = torch.rand(8, 4, 8, 8)
    for _ in range(3):
        model(x)
    model.eval()
    torch.testing.assert_close(fold_batchnorms(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_residual_network_with_slices_and_padding_has_points_at_every_addition():
    model = models.build("cifar_resnet20").eval()
    names = [name for name, _ in named_points(made(model, torch.rand(2, 3, 32, 32), points=("add",)))]
    assert len(names) == 18  # nine branches and nine shortcuts, the slices' sources among them
