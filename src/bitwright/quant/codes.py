"""Codes of a quantized layer's weight, chosen by second order: put into the layer, or only looked at."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from bitwright.errors import SiteError
from bitwright.quant.functional_calls import WeightCall
from bitwright.quant.modules import QuantLayer
from bitwright.quant.products import Product
from bitwright.quant.quantizers import LSQWeight, WeightQuantizer
from bitwright.quant.rounding import Grid, fit

POSITIONS = 16384
"""Output positions of a layer, drawn over all calibration images, that its second moments are taken from."""


def product_of(path: str, layer: QuantLayer, what: str) -> Product:
    """Return the matrix product of a layer whose codes are to be chosen.

    Raises:
        SiteError: the layer is a functional call.
    """
    if isinstance(layer, WeightCall):
        raise SiteError(f"{what}: '{path}' is a functional call, whose codes cannot be chosen by second order; leave the step out")
    return Product(layer.op, tuple(layer.weight.shape))


def lsq_of(path: str, quantizer: WeightQuantizer | None, what: str) -> LSQWeight:
    """Return a weight quantizer whose grid does not move with the weight; raises `SiteError` for any other."""
    if not isinstance(quantizer, LSQWeight) or quantizer.entropy:
        found = "entropy=True" if isinstance(quantizer, LSQWeight) else type(quantizer).__name__
        raise SiteError(f"{what}: needs quantizer='lsq' without entropy, and '{path}' has {found}; leave the step out")
    return quantizer


def columns_of(product: Product, quantizer: LSQWeight, weight: Tensor) -> tuple[Tensor, Tensor, Grid]:
    """Return a quantizer's step sizes and which of them each output has, both ``[G, 1, R]``, and its grid."""
    owner = torch.arange(quantizer.scale.numel(), device=weight.device).view(quantizer.scale.shape).expand(weight.shape)
    step = quantizer.step(weight).detach().expand(weight.shape)
    columns, owners = product.columns(step)[:, :1], product.columns(owner)[:, :1]
    grid = Grid(*(bound.expand(columns.shape) for bound in (quantizer.low, quantizer.high, quantizer.bits == 1)))
    return columns, owners, grid


def set_codes(path: str, layer: QuantLayer, target: Tensor, gram: Tensor, *, second_order: bool, refine: bool) -> None:
    """Choose codes and step sizes for target weights, and put the layer's latent weight on those grid points, in place.

    Args:
        path: where the layer is, for messages.
        layer: a layer with an `LSQWeight`.
        target: weights to come close to, ``[G, K, R]``.
        gram: second moments of the layer's inputs, ``[G, K, K]``.
        second_order: see `bitwright.quant.rounding.fit`.
        refine: likewise.
    """
    product = product_of(path, layer, "codes")
    quantizer = lsq_of(path, layer.weight_quantizer, "codes")
    step, owner, grid = columns_of(product, quantizer, layer.weight)
    codes, steps = fit(target, gram, step, grid, owner, second_order=second_order, refine=refine)
    with torch.no_grad():
        quantizer.scale.view(-1)[owner.flatten()] = steps.flatten()
        layer.weight.copy_(product.weight(codes * steps))


def rounded_errors(
    network: nn.Module, layers: Mapping[str, QuantLayer], quantizers: Mapping[str, Mapping[int, WeightQuantizer]], images: Tensor
) -> dict[str, dict[int, Tensor]]:
    """Return what second-order rounding, refined, would change in each layer's weight at each of several widths.

    The inputs are those of the network as it is; nothing in it changes.

    Args:
        network: network that holds the layers, in evaluation mode.
        layers: layers by address.
        quantizers: calibrated weight quantizers by address and width.
        images: calibration inputs ``[N, …]``.

    Raises:
        SiteError: a layer is a functional call, or a quantizer is not ``lsq``.
    """
    errors: dict[str, dict[int, Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack, torch.no_grad():
        for address, layer in layers.items():
            product = product_of(address, layer, "rounded errors")
            grids = {width: lsq_of(address, quantizer, "rounded errors") for width, quantizer in quantizers[address].items()}

            see = partial(_see, errors, generator, address, product, grids)
            stack.callback(layer.register_forward_hook(see).remove)
        network(images)
    return errors


def _see(
    errors: dict[str, dict[int, Tensor]],
    generator: torch.Generator,
    address: str,
    product: Product,
    grids: Mapping[int, LSQWeight],
    layer: QuantLayer,
    args: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    """Note a layer's errors when it first runs."""
    if address not in errors:
        gram, _ = product.moments(args[0], output.shape, product.positions(output, POSITIONS, generator), None)
        errors[address] = _errors_by_width(product, layer.weight, grids, gram)


def _errors_by_width(product: Product, weight: Tensor, grids: Mapping[int, LSQWeight], gram: Tensor) -> dict[int, Tensor]:
    """Return the weight's change at every width: the widths are outputs side by side, for the work of one."""
    parts = [columns_of(product, quantizer, weight) for quantizer in grids.values()]
    step = torch.cat([part[0] for part in parts], 2)
    count = int(parts[0][1].max()) + 1
    owner = torch.cat([part[1] + k * count for k, part in enumerate(parts)], 2)
    grid = Grid(*(torch.cat(bounds, 2) for bounds in zip(*(part[2] for part in parts), strict=True)))
    target = product.columns(weight).repeat(1, 1, len(parts))
    codes, steps = fit(target, gram, step, grid, owner, second_order=True, refine=True)
    changes = (codes * steps - target).chunk(len(parts), 2)
    return {width: product.weight(change) for width, change in zip(grids, changes, strict=True)}
