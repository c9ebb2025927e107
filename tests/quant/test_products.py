"""A layer's output, computed again from the columns of its weight and the rows of its input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitwright.quant.modules import Op
from bitwright.quant.products import Product

LAYERS = {
    "linear": (nn.Linear(5, 3), (4, 5)),
    "linear over tokens": (nn.Linear(5, 3), (2, 7, 5)),
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 6)),
    "2d, uneven": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (2, 4, 7, 6)),
    "2d, grouped": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 5, 6)),
    "2d, depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 5, 6)),
    "2d, unbatched": (nn.Conv2d(4, 6, 3, padding=1), (4, 5, 6)),
    "2d, same": (nn.Conv2d(4, 6, (5, 3), padding="same"), (2, 4, 5, 6)),
    "2d, reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 6)),
    "3d": (nn.Conv3d(2, 3, 2, stride=2), (2, 2, 4, 4, 5)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 3, stride=(2, 1), padding=1, dilation=(1, 2)), (2, 4, 5, 6)),
    "transposed 2d, grouped": (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (2, 4, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_columns_times_rows_are_the_output(name: str) -> None:
    layer, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    weight = layer.weight.detach()
    product = Product(Op.of(layer), tuple(weight.shape))
    columns = product.columns(weight)
    assert torch.equal(product.weight(columns), weight)
    output = layer(x).detach()
    plain = output - layer.bias.detach().view(-1, *[1] * (0 if isinstance(layer, nn.Linear) else product.op.dims))
    positions = product.positions(output, 10_000, generator)
    values = product.outputs(plain, positions)
    gram, cross = product.moments(x, output.shape, positions, values)
    # E[x y] = E[x x'] w wherever y = w'x, and E[y y'] = w' E[x x'] w: both fail if any input, weight or output is out of place.
    torch.testing.assert_close(cross, gram @ columns, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(values.mT @ values / len(positions), columns.mT @ gram @ columns, atol=1e-5, rtol=1e-4)
    assert gram.shape[1] == product.inputs
    assert len(positions) * values.shape[0] * values.shape[2] == output.numel()


def test_positions_are_drawn_once_each_and_repeat() -> None:
    layer = nn.Conv2d(1, 2, 1)
    product = Product(Op.of(layer), (2, 1, 1, 1))
    output = torch.zeros(3, 2, 4, 4)
    first, second = (product.positions(output, 20, torch.Generator().manual_seed(seed)) for seed in (1, 1))
    assert torch.equal(first, second)
    assert len(first.unique()) == 20
    assert int(first.max()) < 48
    assert torch.equal(product.positions(output, 48, torch.Generator()), torch.arange(48))


def test_moments_of_many_positions_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1)
    product = Product(Op.of(layer), tuple(layer.weight.shape))
    x = torch.randn(2, 2, 6, 6)
    output = layer(x).detach()
    positions = product.positions(output, 50, torch.Generator())
    whole = product.moments(x, output.shape, positions, None)[0]
    monkeypatch.setattr("bitwright.quant.products.ROWS", 7)
    torch.testing.assert_close(product.moments(x, output.shape, positions, None)[0], whole)
