"""The grouped convolution: one operator for samples of several widths, so that a compiled step keeps its shapes whatever the widths are."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bitwright.errors import SiteError
from bitwright.quant.modules import Op


def geometry_of(name: str, op: Op) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    """Return what aten's convolution wants to know of a layer; nothing of it matters to a linear one."""
    if op.kind == "linear":
        return [1], [0], [1], False, [0], 1
    padding = op.padding
    if op.padding_mode != "zeros":
        padding = (0,) * op.dims
    if isinstance(padding, str):
        both = op.padding_both or (0,) * (2 * op.dims)
        if padding == "same" and any(both[2 * d] != both[2 * d + 1] for d in range(op.dims)):
            raise SiteError(
                f"layer '{name}' pads unevenly (padding='same' of an even kernel), which adaptive layers cannot; name it in skip="
            )
        padding = tuple(both[2 * d] for d in range(op.dims))[::-1] if padding == "same" else (0,) * op.dims
    extra = list(op.output_padding) or [0] * op.dims
    return list(op.stride), list(padding), list(op.dilation), op.kind == "transposed", extra, op.groups


def _groups(index: Tensor, count: int) -> list[tuple[int, Tensor]]:
    """Return each width that some sample has, with the positions of its samples."""
    sizes: list[int] = torch.bincount(index, minlength=count).tolist()
    parts = torch.split(index.argsort(stable=True), sizes)
    return [(k, part) for k, part in enumerate(parts) if len(part)]


def _order(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Return some samples in the memory order of all of them; whole rows are copied."""
    if _order(x) == torch.channels_last:
        return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return x.index_select(0, rows)


def _put(target: Tensor, rows: Tensor, values: Tensor) -> None:
    if _order(target) == torch.channels_last:
        target.permute(0, 2, 3, 1).index_copy_(0, rows, values.permute(0, 2, 3, 1))
    else:
        target.index_copy_(0, rows, values)


@torch.library.custom_op("bitwright::grouped_convolution", mutates_args=())
def grouped_convolution(
    x: Tensor,
    weights: Tensor,
    index: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    """Convolve sample n with ``weights[index[n]]``; samples of one weight run together, each once.

    >>> x, w = torch.ones(2, 1, 3), torch.tensor([[[[1.0]]], [[[2.0]]]])
    >>> grouped_convolution(x, w, torch.tensor([1, 0]), [1], [0], [1], False, [0], 1)[:, 0, 0]
    tensor([2., 1.])
    """
    rest = (stride, padding, dilation, transposed, output_padding, groups)
    y = x.new_empty(0)
    for k, rows in _groups(index, len(weights)):
        whole = len(rows) == len(x)
        part = torch.ops.aten.convolution(x if whole else _take(x, rows), weights[k], None, *rest)
        if whole:
            return cast(Tensor, part.contiguous(memory_format=_order(x)))
        if not y.numel():
            y = torch.empty((len(x), *part.shape[1:]), dtype=x.dtype, device=x.device, memory_format=_order(x))
        _put(y, rows, part)
    return y


@grouped_convolution.register_fake
def _(x: Tensor, weights: Tensor, index: Tensor, *rest: Any) -> Tensor:
    y = torch.ops.aten.convolution(x, weights[0], None, *rest)
    return torch.empty(y.shape, dtype=x.dtype, device=x.device, memory_format=_order(x))


@torch.library.custom_op("bitwright::grouped_convolution_backward", mutates_args=())
def grouped_convolution_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    index: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of input and weights."""
    rest = (stride, padding, dilation, transposed, output_padding, groups)
    grad = grad.contiguous(memory_format=_order(x))
    by_input = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_order(x))
    by_weight = torch.zeros(weights.shape, dtype=weights.dtype, device=x.device)
    for k, rows in _groups(index, len(weights)):
        parts = (grad, x) if len(rows) == len(x) else (_take(grad, rows), _take(x, rows))
        one, other, _ = torch.ops.aten.convolution_backward(*parts, weights[k], None, *rest, [True, True, False])
        _put(by_input, rows, one)
        by_weight[k] = other
    return by_input, by_weight


@grouped_convolution_backward.register_fake
def _(grad: Tensor, x: Tensor, weights: Tensor, index: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    by_input = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_order(x))
    return by_input, torch.empty(weights.shape, dtype=weights.dtype, device=x.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    by_input, by_weight = grouped_convolution_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return by_input, by_weight, None, None, None, None, None, None, None


grouped_convolution.register_autograd(_backward, setup_context=_keep)


def grouped_linear(x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Apply ``weights[index[n]]`` to sample n of ``[N, …, in]``: a convolution of width one over the places between."""
    places = x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2).contiguous()
    y: Tensor = grouped_convolution(places, weights.unsqueeze(-1), index, [1], [0], [1], False, [0], 1)
    return y.transpose(1, 2).reshape(*x.shape[:-1], weights.shape[1])
