"""What one functional call computes: its operands, its multiply-accumulates, its output-channel axis.

`trace` reads calls with this module while the model runs once. Code that quantizes functional calls later can number
them the same way: `slots` says how many addresses ``owner#k`` a call takes, whether or not it became a site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.errors import SiteError

Function = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of two operands: ``kind`` is its site kind, ``macs`` counts the whole batch.

    ``axes`` is the output-channel axis of each operand, were it the weight. ``role`` says where a weight can be: the
    second operand is one (convolutions, ``F.linear``), either may be (matrix products), or none is (attention).
    """

    kind: str
    operands: tuple[Tensor, Tensor]
    macs: int
    axes: tuple[int, int]
    role: Literal["second", "either", "none"] = "either"
    groups: int = 1


_CONVOLUTIONS: Mapping[Function, str] = {
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    F.conv3d: "conv3d",
    F.conv_transpose1d: "conv_transpose1d",
    F.conv_transpose2d: "conv_transpose2d",
    F.conv_transpose3d: "conv_transpose3d",
}

# Position and keyword of the two factors in each product; an added term (addmm and its kin) comes before them.
_PLAIN = ((0, ("input", "self", "tensor")), (1, ("other", "mat2", "vec", "tensor", "tensor2")))
_ADDED = ((1, ("mat1", "batch1", "mat")), (2, ("mat2", "batch2", "vec")))
_PRODUCTS: Mapping[Function, tuple[tuple[int, tuple[str, ...]], ...]] = {
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv, torch.dot, torch.vdot, torch.linalg.matmul), _PLAIN),
    **dict.fromkeys((torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm), _PLAIN),
    **dict.fromkeys((torch.Tensor.mv, torch.Tensor.dot, torch.Tensor.vdot), _PLAIN),
    torch.Tensor.__rmatmul__: (_PLAIN[1], _PLAIN[0]),
    **dict.fromkeys((torch.addmm, torch.addbmm, torch.baddbmm, torch.addmv), _ADDED),
    **dict.fromkeys((torch.Tensor.addmm, torch.Tensor.addbmm, torch.Tensor.baddbmm, torch.Tensor.addmv), _ADDED),
    **dict.fromkeys((torch.Tensor.addmm_, torch.Tensor.addbmm_, torch.Tensor.baddbmm_, torch.Tensor.addmv_), _ADDED),
}

# Calls that hold weights but no rule for quantizing them here: an error unless skipped.
UNSUPPORTED: Mapping[Function, str] = {
    torch.lstm: "LSTM",
    torch.gru: "GRU",
    torch.rnn_tanh: "RNN",
    torch.rnn_relu: "RNN",
    torch.lstm_cell: "LSTMCell",
    torch.gru_cell: "GRUCell",
    torch.rnn_tanh_cell: "RNNCell",
    torch.rnn_relu_cell: "RNNCell",
    F.multi_head_attention_forward: "F.multi_head_attention_forward (use nn.MultiheadAttention)",
    F.bilinear: "Bilinear",
    F.embedding: "Embedding",
    F.embedding_bag: "EmbeddingBag",
    torch.embedding: "Embedding",
    torch.convolution: "torch.convolution (write F.conv2d and its kin)",
    torch.conv_tbc: "torch.conv_tbc (write F.conv1d)",
    torch.tensordot: "torch.tensordot (write torch.einsum)",
    torch.inner: "torch.inner (write F.linear)",
    torch.Tensor.inner: "Tensor.inner (write F.linear)",
    torch.chain_matmul: "torch.chain_matmul (write @)",
    torch.linalg.multi_dot: "torch.linalg.multi_dot (write @)",
}


def slots(func: Function) -> int:
    """Return how many addresses ``owner#k`` a call of ``func`` takes: attention two (q·k, then weights·v), most none.

    The call that `nn.MultiheadAttention` makes inside has addresses of its own (`bitwright.sites`) and is not counted.

    >>> slots(F.linear), slots(torch.relu), slots(F.scaled_dot_product_attention)
    (1, 0, 2)
    """
    if func is F.scaled_dot_product_attention:
        return 2
    known = func is F.linear or func is torch.einsum or func in _CONVOLUTIONS or func in _PRODUCTS or func in UNSUPPORTED
    return 1 if known else 0


def read_call(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> tuple[Call, ...]:
    """Return what a call computes, one `Call` per slot; empty for a call that multiplies no two tensors.

    Raises:
        SiteError: an einsum of three or more operands.

    >>> x, w = torch.zeros(2, 6, 5, 5), torch.zeros(8, 3, 1, 1)
    >>> call, = read_call(F.conv2d, (x, w, None, 1, 0, 1, 2), {}, F.conv2d(x, w, groups=2))
    >>> call.kind, call.macs == 2 * 8 * 3 * 25, call.groups
    ('conv2d', True, 2)
    """
    if func in _CONVOLUTIONS:
        return (_convolution(_CONVOLUTIONS[func], args, kwargs, out),)
    if func is F.linear:
        x, weight = _argument(args, kwargs, 0, ("input",)), _argument(args, kwargs, 1, ("weight",))
        return (Call("linear", (x, weight), out.numel() * weight.shape[-1], (0, 0), "second"),)
    if func is F.scaled_dot_product_attention:
        return _attention(args, kwargs, out)
    if func is torch.einsum:
        return _einsum(args)
    if func in _PRODUCTS:
        (i, names_i), (j, names_j) = _PRODUCTS[func]
        return (_product(_argument(args, kwargs, i, names_i), _argument(args, kwargs, j, names_j)),)
    return ()


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, names: tuple[str, ...]) -> Any:
    if position < len(args):
        return args[position]
    return next(kwargs[name] for name in names if name in kwargs)


def _convolution(kind: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Call:
    x, weight = _argument(args, kwargs, 0, ("input",)), _argument(args, kwargs, 1, ("weight",))
    groups = int(args[6] if len(args) > 6 else kwargs.get("groups", 1))
    transposed = kind.startswith("conv_transpose")
    # A transposed convolution spreads every input element over one kernel per output channel of its group.
    macs = (x if transposed else out).numel() * math.prod(weight.shape[1:])
    axis = 1 if transposed else 0
    return Call(kind, (x, weight), macs, (axis, axis), "second", groups)


def _product(left: Tensor, right: Tensor) -> Call:
    rows = 1 if left.dim() == 1 else left.shape[-2]
    columns = 1 if right.dim() == 1 else right.shape[-1]
    ones, batches = max(left.dim(), right.dim()), (left.shape[:-2], right.shape[:-2])
    padded = [(1,) * (ones - len(shape)) + tuple(shape) for shape in batches]
    batch = math.prod(max(a, b) for a, b in zip(*padded, strict=True))
    macs = batch * rows * left.shape[-1] * columns
    return Call("matmul", (left, right), macs, (max(left.dim() - 2, 0), right.dim() - 1))


def _attention(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> tuple[Call, Call]:
    query, key, value = (_argument(args, kwargs, i, (name,)) for i, name in enumerate(("query", "key", "value")))
    rows, tokens = out.numel() // out.shape[-1], key.shape[-2]
    weights = torch.empty((*query.shape[:-1], tokens), device="meta")
    return (
        Call("matmul", (query, key), rows * tokens * query.shape[-1], (0, 0), "none"),
        Call("matmul", (weights, value), rows * tokens * out.shape[-1], (0, 0), "none"),
    )


def _einsum(args: tuple[Any, ...]) -> tuple[Call, ...]:
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if len(operands) > 2:
        raise SiteError(f"einsum '{args[0]}': {len(operands)} operands; write it as products of two")
    if len(operands) < 2:
        return ()
    return _einsum_of_two(args[0].replace(" ", ""), operands[0], operands[1])


def _einsum_of_two(equation: str, left: Tensor, right: Tensor) -> tuple[Call, ...]:
    terms, _, result = equation.partition("->")
    labels = [_spell(term, x.dim()) for term, x in zip(terms.split(","), (left, right), strict=True)]
    both = labels[0] + labels[1]
    if "->" not in equation:
        result = "".join(label for label in both if both.count(label) == 1 or not label.isalpha())
    else:
        result = result.replace("...", "".join(label for label in both if not label.isalpha()))
    if not any(label in labels[1] and label not in result for label in labels[0]):
        return ()  # nothing is contracted: an outer or elementwise product, no matrix product
    sizes: dict[str, int] = {}
    for label, size in zip(both, (*left.shape, *right.shape), strict=True):
        sizes[label] = max(size, sizes.get(label, 1))
    axes = tuple(_channel_axis(labels[i], labels[1 - i], result) for i in (0, 1))
    return (Call("matmul", (left, right), math.prod(sizes.values()), (axes[0], axes[1])),)


def _spell(term: str, dims: int) -> str:
    """Replace the ellipsis by one digit per axis, counted from the right as broadcasting does."""
    count = dims - len(term.replace("...", ""))
    return term.replace("...", "".join(str(i) for i in range(count - 1, -1, -1)))


def _channel_axis(own: str, other: str, result: str) -> int:
    kept = [i for i, label in enumerate(own) if label in result and label not in other]
    return kept[-1] if kept else 0
