"""Changes of a captured graph that leave every value as it is, and put quantizers where runtimes look for them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from bitwright.exporters._graph import Program, averaged_axes, is_binary, kind_of
from bitwright.quant.quantizers import ActivationQuantizer

NOTHING = frozenset({"dropout", "contiguous", "clone", "alias", "detach", "lift_fresh_copy", "lift_fresh", "feature_dropout"})
"""Calls that change no value in evaluation."""
MOVES = frozenset(
    {"view", "reshape", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "slice", "max_pool1d", "max_pool2d"}
    | {"pad", "constant_pad_nd"}
)
"""Calls of one tensor that a quantizer may be taken through: they only move values, or choose the largest."""


def rewrite(program: Program) -> None:
    """Apply all changes, in place."""
    _settle_in_place(program.graph)
    _drop_nothing(program.graph)
    _split_means(program.graph)
    _scale_products(program.graph)
    _hoist_marks(program)
    program.graph.eliminate_dead_code()
    program.graph.lint()


def _settle_in_place(graph: fx.Graph) -> None:
    """Let what reads a tensor after it was changed in place read the result of that change."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.name.endswith("_") and isinstance(node.args[0], fx.Node):
            changed = node.args[0]
            for user in list(changed.users):
                if user > node:
                    user.replace_input_with(changed, node)


def _drop_nothing(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        kind = kind_of(node)
        if kind in NOTHING or (kind == "to" and _same_type(node)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif kind.startswith(("_assert", "sym_constrain", "_guards")):
            graph.erase_node(node)


def _same_type(node: fx.Node) -> bool:
    before, after = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype


def _read_instead(node: fx.Node, new: fx.Node) -> None:
    """Let all that reads a node read another one, which itself goes on reading the node."""
    for user in list(node.users):
        if user is not new:
            user.replace_input_with(node, new)


def spatial_mean(node: fx.Node) -> bool:
    """Return whether a node averages all that follows the channels."""
    if kind_of(node) != "mean":
        return False
    dims = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    return dims > 2 and averaged_axes(node) == list(range(2, dims))


def _split_means(graph: fx.Graph) -> None:
    """Write a global average as pooling that keeps its axes, then a flattening: runtimes have integers for the former."""
    for node in list(graph.nodes):
        if spatial_mean(node) and not (len(node.args) > 2 and node.args[2]):
            with graph.inserting_after(node):
                flat = graph.call_function(torch.ops.aten.flatten.using_ints, (node, 1))
            flat.meta = dict(node.meta)
            _read_instead(node, flat)
            kept = node.meta["val"].shape + (1,) * (node.args[0].meta["val"].dim() - 2)
            node.args = (node.args[0], node.args[1], True)
            node.meta = {**node.meta, "val": node.meta["val"].reshape(kept)}


def _scale_products(graph: fx.Graph) -> None:
    """Multiply a product by a number after it and not before: both its operands then are integers."""
    for node in list(graph.nodes):
        if kind_of(node) not in ("matmul", "bmm"):
            continue
        left, right = node.args
        scaled = left if kind_of(left) == "mul" else right
        if kind_of(scaled) != "mul" or len(scaled.users) != 1 or not isinstance(scaled.args[1], (int, float)):
            continue
        if kind_of(scaled.args[0]) == "mark":
            node.replace_input_with(scaled, scaled.args[0])
            with graph.inserting_after(node):
                after = graph.call_function(torch.ops.aten.mul.Tensor, (node, scaled.args[1]))
            after.meta = dict(node.meta)
            _read_instead(node, after)
            graph.erase_node(scaled)


def _hoist_marks(program: Program) -> None:
    """Quantize a tensor before it is moved, too: the integers are moved then, and the layer that made the tensor gives integers."""
    graph = program.graph
    for node in list(graph.nodes):
        if kind_of(node) != "mark":
            continue
        quantizer = program.marks[node.args[1]].quantizer
        source = node.args[0]
        chain: list[fx.Node] = []
        while kind_of(source) in MOVES and len(source.users) == 1 and not _fills(source):
            chain.append(source)
            source = source.args[0]
        if not chain or not isinstance(quantizer, ActivationQuantizer) or is_binary(quantizer) or not _is_activation(program, source):
            continue
        if kind_of(source) == "mark":
            continue
        with graph.inserting_after(source):
            early = graph.call_function(node.target, (source, node.args[1]))
        early.meta = {**source.meta}
        chain[-1].replace_input_with(source, early)


def _fills(node: fx.Node) -> bool:
    """Return whether padding puts in something else than zeros."""
    if kind_of(node) == "pad":
        mode, value = (*node.args[2:], "constant")[0], node.args[3] if len(node.args) > 3 else None
        return mode == "constant" and bool(value)
    return kind_of(node) == "constant_pad_nd" and len(node.args) > 2 and bool(node.args[2])


def _is_activation(program: Program, node: fx.Node) -> bool:
    return node.op == "call_function" or node.name in program.inputs
