"""What an ONNX graph is written with: nodes, initializers, and the operators that torch's calls become.

Operators here are those without weights on a grid; `bitwright.exporters._emission` adds quantizers, convolutions and products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from bitwright.errors import ExportError
from bitwright.exporters._graph import averaged_axes, kind_of, module_of

Array = NDArray[Any]


class Writer:
    """Collects the nodes and initializers of an ONNX graph; every tensor has one name."""

    def __init__(self, onnx: Any, batch_of: str):
        self.onnx, self.batch_of = onnx, batch_of
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.taken: set[str] = set()

    def name(self, wanted: str) -> str:
        """Return a name that nothing has yet."""
        found, k = wanted, 1
        while found in self.taken:
            k += 1
            found = f"{wanted}_{k}"
        self.taken.add(found)
        return found

    def constant(self, value: Any, hint: str = "constant", dtype: Any = None) -> str:
        """Write an initializer and return its name."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value, dtype=dtype)
        name = self.name(hint)
        self.initializers.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name

    def node(self, kind: str, inputs: Sequence[str], *, name: str = "", outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Write a node and return the name of its output, or the names of several."""
        own = self.name(name or kind.lower())
        made = [own if outputs == 1 else f"{own}.{k}" for k in range(outputs)]
        self.taken.update(made)
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), made, own, domain=domain, **attributes))
        return made[0] if outputs == 1 else made

    def reshape(self, x: str, shape: Sequence[Any]) -> str:
        """Write a reshape; one size may be open."""
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        if sizes.count(-1) > 1:
            raise ExportError(f"export: a reshape to {list(map(str, shape))} has more than one open size; export with a fixed batch")
        return str(self.node("Reshape", [x, self.constant(sizes, "shape", np.int64)]))

    def batch(self) -> str:
        """Write the size of the batch, as a vector of one."""
        return str(self.node("Shape", [self.batch_of], start=0, end=1))


Values = Sequence[Any]
Operator = Callable[[Writer, fx.Node, Values], Any]


def shape_of(node: Any) -> list[Any]:
    """Return the sizes of a node's result; an open one is no int."""
    return list(node.meta["val"].shape)


def pairs(value: Any, count: int) -> list[int]:
    """Return one number for each of ``count`` axes."""
    values = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return values * count if len(values) == 1 else values


def text(writer: Writer, value: Any) -> str:
    """Return the name of a tensor; constants and numbers become initializers."""
    if isinstance(value, str):
        return value
    if isinstance(value, Tensor):
        return writer.constant(value.float() if value.is_floating_point() else value)
    return writer.constant(np.float32(value))


def operate(writer: Writer, node: fx.Node, values: Values, name: str = "") -> Any:
    """Write a call without a weight on a grid, its node under a name if one is given.

    Raises:
        ExportError: the call is unknown, or has an argument that nothing here writes; the message names it and its module.
    """
    kind, where = kind_of(node), module_of(node)
    call = f"the call '{kind}' in {repr(where) if where else 'the network itself'}"
    extra = _unwritten(node, kind, values)
    if extra:
        raise ExportError(f"export: {call} has {', '.join(extra)}, which has no ONNX form here; leave that out, or write it as other calls")
    try:
        written = _operated(writer, node, kind, values, name)
    except (IndexError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {str(error)[:80]}"
        raise ExportError(f"export: {call} has arguments that have no ONNX form here ({found}); write it as other calls") from error
    if written is None:
        raise ExportError(f"export: {call} has no ONNX form here; replace it, or leave it out of the network that is exported")
    return written


def _unwritten(node: fx.Node, kind: str, values: Values) -> list[str]:
    """Return the arguments of a call, as ``name=value``, that change its result and that nothing here writes."""
    schema = getattr(node.target, "_schema", None)
    most = 1 if kind in _UNARY else 2 if kind in _BINARY else len(values)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    found = list(zip(names[most:], values[most:], strict=False))
    found += [(key, value) for key, value in node.kwargs.items() if key not in _KEYWORDS.get(kind, ()) and value not in (None, False)]
    return [f"{key}={value!r}" for key, value in found if key != "dtype" or not _same_type(node)]


def _same_type(node: fx.Node) -> bool:
    """Return whether a result has the type of the first operand."""
    before, after = (getattr(part.meta.get("val"), "dtype", None) for part in (node.args[0], node))  # type: ignore[union-attr]
    return before == after


def _operated(writer: Writer, node: fx.Node, kind: str, values: Values, name: str) -> Any:
    """Write a call; return None for an unknown one."""
    if kind in _UNARY:
        return writer.node(_UNARY[kind], [text(writer, values[0])])
    if kind in _BINARY:
        right = values[1]
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            right = writer.node("Mul", [text(writer, right), text(writer, alpha)])
        return writer.node(_BINARY[kind], [text(writer, values[0]), text(writer, right)], name=name)
    if kind == "batch_norm":
        return _batch_norm(writer, values, name)
    if kind in _OPERATORS:
        return _OPERATORS[kind](writer, node, values)
    return None


_UNARY = {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "sqrt": "Sqrt",
    "exp": "Exp",
    "neg": "Neg",
    "abs": "Abs",
    "erf": "Erf",
    "log": "Log",
    "floor": "Floor",
    "hardswish": "HardSwish",
    "reciprocal": "Reciprocal",
    "softplus": "Softplus",
}
_BINARY = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "pow": "Pow",
    "maximum": "Max",
    "minimum": "Min",
    "matmul": "MatMul",
    "bmm": "MatMul",
    "mm": "MatMul",
}
_KEYWORDS = {"add": ("alpha",), "sub": ("alpha",), "gelu": ("approximate",), "scaled_dot_product_attention": ("scale",)}
"""Arguments given by keyword that are written."""


def _argument(node: fx.Node, values: Values, place: int, name: str, default: Any = None) -> Any:
    if place < len(values):
        return values[place]
    return node.kwargs.get(name, default)


def _reshaped(writer: Writer, node: fx.Node, values: Values) -> str:
    return writer.reshape(values[0], shape_of(node))


def _clip(writer: Writer, node: fx.Node, values: Values) -> str:
    low, high = clip_bounds(node)
    limits = ["" if math.isinf(bound) else writer.constant(np.float32(bound)) for bound in (low, high)]
    return str(writer.node("Clip", [values[0], *limits]))


def clip_bounds(node: fx.Node) -> tuple[float, float]:
    """Return what a ReLU, a clamp or a hardtanh keeps values between."""
    kind = kind_of(node)
    if kind in ("relu", "relu6"):
        return 0.0, 6.0 if kind == "relu6" else math.inf
    default = (-1.0, 1.0) if kind == "hardtanh" else (None, None)
    names = ("min_val", "max_val") if kind == "hardtanh" else ("min", "max")
    low, high = (_argument(node, node.args, k + 1, name, default[k]) for k, name in enumerate(names))
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def _permuted(writer: Writer, node: fx.Node, values: Values) -> str:
    dims = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    order = list(range(dims))
    if kind_of(node) == "permute":
        order = [int(k) % dims for k in values[1]]
    elif dims > 1:
        a, b = (0, 1) if kind_of(node) == "t" else (int(values[1]) % dims, int(values[2]) % dims)
        order[a], order[b] = order[b], order[a]
    return str(writer.node("Transpose", [values[0]], perm=order))


def _slice(writer: Writer, node: fx.Node, values: Values) -> str:
    axis, start, end, step = (_argument(node, values, k, name) for k, name in enumerate(("dim", "start", "end", "step"), 1))
    bounds = [0 if start is None else start, np.iinfo(np.int64).max if not isinstance(end, int) else end]
    if not isinstance(bounds[0], int):
        raise ExportError("export: a slice that begins at a size of the batch cannot be written; export with a fixed batch")
    numbers = [bounds[0], bounds[1], axis or 0, step or 1]
    starts, ends, axes, steps = (
        writer.constant([n], name, np.int64) for n, name in zip(numbers, ("start", "end", "axis", "step"), strict=True)
    )
    return str(writer.node("Slice", [values[0], starts, ends, axes, steps]))


def _select(writer: Writer, node: fx.Node, values: Values) -> str:
    return str(writer.node("Gather", [values[0], writer.constant(values[2], "index", np.int64)], axis=int(values[1])))


def _pad(writer: Writer, node: fx.Node, values: Values) -> str:
    dims = len(shape_of(node))
    around = [int(n) for n in values[1]]
    before, after = [0] * dims, [0] * dims
    for k in range(len(around) // 2):
        before[dims - 1 - k], after[dims - 1 - k] = around[2 * k], around[2 * k + 1]
    mode = "constant" if kind_of(node) == "constant_pad_nd" else str(_argument(node, values, 2, "mode", "constant"))
    fill = _argument(node, values, 2 if kind_of(node) == "constant_pad_nd" else 3, "value")
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    inputs = [values[0], writer.constant(before + after, "pads", np.int64)]
    inputs += [writer.constant(np.float32(fill or 0.0))] if mode == "constant" else []
    return str(writer.node("Pad", inputs, mode=modes[mode]))


def _concat(writer: Writer, node: fx.Node, values: Values) -> str:
    return str(writer.node("Concat", [text(writer, x) for x in values[0]], axis=int(_argument(node, values, 1, "dim", 0))))


def _split(writer: Writer, node: fx.Node, values: Values) -> list[str]:
    sizes = [part.shape[int(_argument(node, values, 2, "dim", 0))] for part in node.meta["val"]]
    axis = int(_argument(node, values, 2, "dim", 0))
    made = writer.node("Split", [values[0], writer.constant(sizes, "sizes", np.int64)], outputs=len(sizes), axis=axis)
    return [made] if isinstance(made, str) else list(made)


def _expand(writer: Writer, node: fx.Node, values: Values) -> str:
    source = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    wanted = shape_of(node)
    padded = [1] * (len(wanted) - len(source)) + list(source)
    if all(isinstance(size, int) or not isinstance(old, int) for size, old in zip(wanted, padded, strict=True)):
        sizes = writer.constant([size if isinstance(size, int) else 1 for size in wanted], "shape", np.int64)
    else:
        parts = [writer.constant([size], "size", np.int64) if isinstance(size, int) else writer.batch() for size in wanted]
        sizes = writer.node("Concat", parts, axis=0)
    return str(writer.node("Expand", [text(writer, values[0]), sizes]))


def _pool(writer: Writer, node: fx.Node, values: Values) -> str:
    kind = kind_of(node)
    dims = int(kind[-2])
    kernel = pairs(values[1], dims)
    stride = pairs(_argument(node, values, 2, "stride") or kernel, dims)
    padding = pairs(_argument(node, values, 3, "padding", 0), dims)
    shape: dict[str, Any] = {"kernel_shape": kernel, "strides": stride, "pads": padding * 2}
    if kind.startswith("max"):
        dilation, ceil = _argument(node, values, 4, "dilation", 1), _argument(node, values, 5, "ceil_mode", False)
        return str(writer.node("MaxPool", [values[0]], **shape, dilations=pairs(dilation, dims), ceil_mode=int(bool(ceil))))
    if _argument(node, values, 6, "divisor_override") is not None:
        raise ExportError(f"export: average pooling with divisor_override in '{module_of(node)}' has no ONNX form; leave that argument out")
    ceil, include = _argument(node, values, 4, "ceil_mode", False), _argument(node, values, 5, "count_include_pad", True)
    return str(writer.node("AveragePool", [values[0]], **shape, ceil_mode=int(bool(ceil)), count_include_pad=int(bool(include))))


def _adaptive(writer: Writer, node: fx.Node, values: Values) -> str:
    dims = int(kind_of(node)[-2])
    sizes = node.args[0].meta["val"].shape[-dims:]  # type: ignore[union-attr]
    wanted = pairs(values[1], dims)
    if wanted == [1] * dims:
        return str(writer.node("GlobalAveragePool", [values[0]]))
    if any(not isinstance(n, int) or n % k for n, k in zip(sizes, wanted, strict=True)):
        raise ExportError(f"export: adaptive pooling from {list(sizes)} to {wanted} has windows of several sizes; use sizes that divide")
    kernel = [n // k for n, k in zip(sizes, wanted, strict=True)]
    return str(writer.node("AveragePool", [values[0]], kernel_shape=kernel, strides=kernel))


def _mean(writer: Writer, node: fx.Node, values: Values) -> str:
    value, axes = node.args[0].meta["val"], averaged_axes(node)  # type: ignore[union-attr]
    keep = bool(_argument(node, values, 2, "keepdim", False))
    if kind_of(node) == "mean" and keep and value.dim() > 2 and axes == list(range(2, value.dim())):
        return str(writer.node("GlobalAveragePool", [values[0]]))
    kind = "ReduceMean" if kind_of(node) == "mean" else "ReduceSum"
    return str(writer.node(kind, [values[0], writer.constant(axes, "axes", np.int64)], keepdims=int(keep)))


def _normalised(writer: Writer, node: fx.Node, values: Values) -> str:
    axes = len(values[1])
    weight = values[2] if len(values) > 2 and values[2] is not None else torch.ones(*values[1])
    bias = [] if len(values) < 4 or values[3] is None else [text(writer, values[3])]
    epsilon = float(_argument(node, values, 4, "eps", 1e-5))
    return str(writer.node("LayerNormalization", [values[0], text(writer, weight), *bias], axis=-axes, epsilon=epsilon))


def _batch_norm(writer: Writer, values: Values, name: str) -> str:
    x, weight, bias, mean, var = values[:5]
    weight, bias = (torch.ones_like(mean) if weight is None else weight), (torch.zeros_like(mean) if bias is None else bias)
    inputs = [x, *(text(writer, v) for v in (weight, bias, mean, var))]
    return str(writer.node("BatchNormalization", inputs, name=name, epsilon=float(values[7])))


def _group_norm(writer: Writer, node: fx.Node, values: Values) -> str:
    x, groups, weight, bias = values[:4]
    channels = shape_of(node)[1]
    weight, bias = (torch.ones(channels) if weight is None else weight), (torch.zeros(channels) if bias is None else bias)
    epsilon = float(_argument(node, values, 4, "eps", 1e-5))
    return str(writer.node("GroupNormalization", [x, text(writer, weight), text(writer, bias)], num_groups=int(groups), epsilon=epsilon))


def _softmax(writer: Writer, node: fx.Node, values: Values) -> str:
    return str(writer.node("Softmax", [values[0]], axis=int(values[1])))


def _gelu(writer: Writer, node: fx.Node, values: Values) -> str:
    return str(writer.node("Gelu", [values[0]], approximate=str(node.kwargs.get("approximate", "none"))))


def _silu(writer: Writer, node: fx.Node, values: Values) -> str:
    return str(writer.node("Mul", [values[0], writer.node("Sigmoid", [values[0]])]))


def _embedding(writer: Writer, node: fx.Node, values: Values) -> str:
    return str(writer.node("Gather", [text(writer, values[0]), text(writer, values[1])], axis=0))


def _nearest(writer: Writer, node: fx.Node, values: Values) -> str:
    before, after = node.args[0].meta["val"].shape[2:], shape_of(node)[2:]  # type: ignore[union-attr]
    scales = [1.0, 1.0, *(float(new) / float(old) for new, old in zip(after, before, strict=True))]
    modes: dict[str, Any] = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    return str(writer.node("Resize", [values[0], "", writer.constant(scales, "scales", np.float32)], **modes))


def _attention(writer: Writer, node: fx.Node, values: Values) -> str:
    query, key, value = values[:3]
    mask = _argument(node, values, 3, "attn_mask")
    width = shape_of(node.args[0])[-1]
    scale = node.kwargs.get("scale") or 1 / math.sqrt(width)
    dims = len(shape_of(node.args[1]))
    order = [*range(dims - 2), dims - 1, dims - 2]
    scores = writer.node("MatMul", [writer.node("Mul", [query, text(writer, scale)]), writer.node("Transpose", [key], perm=order)])
    if bool(_argument(node, values, 5, "is_causal", False)):
        rows, columns = shape_of(node.args[0])[-2], shape_of(node.args[1])[-2]
        mask = torch.zeros(rows, columns).masked_fill(torch.ones(rows, columns).tril() == 0, -math.inf)
    if mask is not None:
        if isinstance(mask, str) or mask.dtype == torch.bool:
            raise ExportError("export: an attention mask that is computed or boolean has no ONNX form here; pass a float constant")
        scores = writer.node("Add", [scores, text(writer, mask)])
    return str(writer.node("MatMul", [writer.node("Softmax", [scores], axis=-1), value]))


_OPERATORS: dict[str, Operator] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshaped),
    **dict.fromkeys(("hardtanh", "clamp", "relu6", "clip"), _clip),
    **dict.fromkeys(("permute", "transpose", "t"), _permuted),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("cat", "concat"), _concat),
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), _split),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"), _pool),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), _adaptive),
    **dict.fromkeys(("mean", "sum"), _mean),
    "slice": _slice,
    "select": _select,
    "expand": _expand,
    "layer_norm": _normalised,
    "group_norm": _group_norm,
    "softmax": _softmax,
    "gelu": _gelu,
    "silu": _silu,
    "hardsigmoid": lambda writer, node, values: writer.node("HardSigmoid", [values[0]], alpha=1 / 6, beta=0.5),
    "leaky_relu": lambda writer, node, values: writer.node(
        "LeakyRelu", [values[0]], alpha=float(_argument(node, values, 1, "slope", 0.01))
    ),
    "elu": lambda writer, node, values: writer.node("Elu", [values[0]], alpha=float(_argument(node, values, 1, "alpha", 1.0))),
    "embedding": _embedding,
    "upsample_nearest2d": _nearest,
    "scaled_dot_product_attention": _attention,
}
