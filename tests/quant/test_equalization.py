"""Equalisation changes no float network, and finds the pairs that allow it and no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.models import build
from bitwright.quant.batchnorm import batchnorms
from bitwright.quant.equalization import Pair, equalize, find_pairs, input_ranges


class Functional(nn.Module):
    """Two convolutions with a function of the first one's output between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]):
        super().__init__()
        self.between = between
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.between(self.a(x)))
        return out


class Twice(nn.Module):
    """A convolution whose output is read again after the next layer."""

    def __init__(self, *, returned: bool):
        super().__init__()
        self.returned = returned
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = F.relu(self.a(x))
        return (self.b(y), y) if self.returned else self.b(y) + y


class Shared(nn.Module):
    """A layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(F.relu(self.b(F.relu(self.a(x)))))
        return out


ALLOWED = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "pooling": lambda x: F.avg_pool2d(F.max_pool2d(F.relu(x), 2), 2),
    "nothing": lambda x: x,
    "shape is read": lambda x: F.relu(x) if x.shape[0] and x.size(1) else x,
}
FORBIDDEN = {
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "sum": lambda x: x + 1,
    "reshape": lambda x: F.pixel_shuffle(F.pad(x, (1, 1)), 1),
    "written to": lambda x: x.mul_(2.0),
    "read twice": lambda x: F.relu(x) * x,
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_scales_lies_between_a_pair(name: str) -> None:
    net = Functional(ALLOWED[name])
    assert find_pairs(net, torch.ones(1, 3, 10, 10)) == [Pair("a", "b")]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_does_not_scale_parts_them(name: str) -> None:
    assert find_pairs(Functional(FORBIDDEN[name]), torch.ones(1, 3, 10, 10)) == []


def test_outputs_that_are_read_elsewhere_and_layers_that_run_twice_make_no_pair() -> None:
    x = torch.ones(1, 3, 4, 4)
    assert find_pairs(Twice(returned=False), x) == []
    assert find_pairs(Twice(returned=True), x) == []
    assert find_pairs(Shared(), x) == []
    tied = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    tied[1].weight = tied[0].weight
    assert find_pairs(tied, x) == []


NETWORKS = {
    "residual": lambda: (build("cifar_resnet20"), (4, 3, 32, 32)),
    "depthwise": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        (4, 3, 8, 8),
    ),
    "grouped and transposed": lambda: (
        nn.Sequential(
            nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2)
        ),
        (4, 4, 6, 6),
    ),
    "linear": lambda: (nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3)), (16, 5)),
    "tokens": lambda: (nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), (4, 7, 5)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_float_function_stays_and_the_ranges_become_equal(name: str) -> None:
    torch.manual_seed(0)
    net, shape = NETWORKS[name]()
    for norm in batchnorms(net).values():
        nn.init.uniform_(norm.weight, 0.1, 3.0)
        nn.init.normal_(norm.bias)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    net.eval()
    x = torch.randn(shape)
    equal, pairs = equalize(net, x), find_pairs(net, x[:1])
    assert len(pairs) == {"residual": 9, "depthwise": 2, "grouped and transposed": 2, "linear": 1, "tokens": 1}[name]
    torch.testing.assert_close(equal(x), net(x), atol=1e-4, rtol=1e-4)
    before, after = net.state_dict(), equal.state_dict()
    assert all(not torch.equal(before[f"{pair.layer}.weight"], after[f"{pair.layer}.weight"]) for pair in pairs)
    last = pairs[-1]  # nothing after it rescaled its weights again
    seen: list[Tensor] = []
    equal.get_submodule(last.layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    equal(x)
    layer = equal.get_submodule(last.layer)
    channels = -1 if isinstance(layer, nn.Linear) else 1
    ratio = seen[0].abs().movedim(channels, -1).flatten(0, -2).amax(0) / input_ranges(layer)
    inside = ratio[ratio > 0].detach()
    assert float(inside.std() / inside.mean()) < 1e-3


def test_dead_channels_keep_their_scale() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, -1.0], [4.0, 0.0]]))  # the second is never positive here
        net[0].bias.zero_()
    equal = equalize(net, torch.rand(8, 2))
    assert torch.equal(equal[0].weight[1], net[0].weight[1])
    assert bool(torch.isfinite(equal[2].weight).all())
