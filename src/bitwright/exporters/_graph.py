"""A quantized network as a graph of calls: what exporters of graph formats write from.

`capture` runs `torch.export` (without Dynamo: any eager code it can follow) on a copy whose quantizers are replaced by one opaque
call, ``bitwright::mark(x, key)``. The graph then holds the network's own operations, and a mark wherever a tensor meets a quantizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from bitwright.errors import ExportError
from bitwright.exporters import Example
from bitwright.policy import Bits
from bitwright.quant.functional_calls import ProductCall
from bitwright.quant.modules import QuantLayer, call_address
from bitwright.quant.points import OnPoint, PointOwner, named_points
from bitwright.quant.quantizers import ActivationQuantizer, LSQActivation, WeightQuantizer

Quantizer = ActivationQuantizer | WeightQuantizer


def _same(x: Tensor, key: int) -> Tensor:
    return x.clone()


MARK: Any = torch.library.custom_op("bitwright::mark", _same, mutates_args=(), schema="(Tensor x, int key) -> Tensor")
MARK.register_fake(lambda x, key: torch.empty_like(x))


class _Marked(nn.Module):
    """Takes a quantizer's place while the graph is captured."""

    def __init__(self, key: int):
        super().__init__()
        self.key = key

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.bitwright.mark(x, self.key))


@dataclass(frozen=True)
class Mark:
    """A quantizer in the graph: what it is, the address of its layer, and what it is to it: weight, input, left, right or point."""

    quantizer: Quantizer
    address: str
    role: str
    bits: Bits

    @property
    def name(self) -> str:
        """A name for people."""
        return self.address if self.role == "point" else f"{self.address}.{self.role}"


@dataclass(frozen=True)
class Program:
    """A captured network.

    Attributes:
        graph: its calls; placeholders are inputs and constants.
        inputs: names of the placeholders that are inputs.
        constants: parameters and buffers by placeholder.
        paths: what each of them is called in the network.
        marks: the quantizers; a call of ``bitwright::mark`` names one by its place.
        layers: by the path of a parameter, the address and widths of the layer whose weight it is.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    constants: dict[str, Tensor]
    paths: dict[str, str]
    marks: tuple[Mark, ...]
    layers: dict[str, tuple[str, Bits]]


def capture(model: nn.Module, example: Example) -> Program:
    """Return the graph of a quantized network; raises `ExportError` where it cannot be followed."""
    plain = copy.deepcopy(model).eval()
    layers = _layers(plain)
    marks = _replace_quantizers(plain)
    placed, named = _arguments(example)
    for dynamic in (True, False):
        args, kwargs = ((_widened(x) for x in placed), {k: _widened(x) for k, x in named.items()}) if dynamic else (placed, named)
        shapes = _dynamic(tuple(placed), named) if dynamic else None
        try:
            with torch.no_grad():
                exported = torch.export.export(plain, tuple(args), dict(kwargs), dynamic_shapes=shapes, strict=False)
            return _program(exported, marks, layers)
        except Exception as error:  # whatever torch.export meets in the network's own code
            failed = error
    reason = (str(failed).strip().splitlines() or [type(failed).__name__])[0]
    raise ExportError(
        f"export: {type(model).__name__} cannot be followed as a graph ({reason[:160]}); make its forward free of branches on data"
    )


def _arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def _widened(x: Any) -> Any:
    """Return a batch of at least two: torch.export would take a batch of one for a constant."""
    return torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() and len(x) == 1 else x


def _dynamic(placed: Sequence[Any], named: Mapping[str, Any]) -> Any:
    batch = torch.export.Dim.DYNAMIC

    def shape(x: Any) -> Any:
        return {0: batch} if isinstance(x, Tensor) and x.dim() else None

    return {k: shape(x) for k, x in named.items()} if named else tuple(shape(x) for x in placed)


def _layers(model: nn.Module) -> dict[str, tuple[str, Bits]]:
    """Return the layer of each weight, and put biases and bfloat16 weights to the values that are used, in place."""
    found = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        if not isinstance(module, QuantLayer):
            continue
        found[names[id(module.weight)]] = (call_address(path), module.bits)
        with torch.no_grad():
            bias = module.quantized_bias()
            if module.bias is not None and bias is not None:
                module.bias.copy_(bias)
            module.round_bias = False
            if module.weight_quantizer is None and module.bits.w == 16:
                module.weight.copy_(module.quantized_weight())
                module.bits = Bits(32, module.bits.a)
    return found


def _replace_quantizers(model: nn.Module) -> tuple[Mark, ...]:
    marks: list[Mark] = []
    keys: dict[int, int] = {}
    points = {id(point): name for name, point in named_points(model)}

    def place(owner: nn.Module, child: str, quantizer: nn.Module, address: str, bits: Bits) -> None:
        kept = quantizer.point if isinstance(quantizer, OnPoint) else quantizer
        if id(kept) not in keys:
            keys[id(kept)] = len(marks)
            role = "point" if id(kept) in points else child.removesuffix("_quantizer")
            marks.append(Mark(cast(Quantizer, kept), points.get(id(kept), address), role, bits))
        owner._modules[child] = _Marked(keys[id(kept)])

    if isinstance(model, PointOwner):
        for child, point in list(model.quantized_points.items()):
            place(model.quantized_points, child, point, "", Bits(8, 8))
    for path, module in list(model.named_modules()):
        if isinstance(module, (QuantLayer, ProductCall)):
            for child, quantizer in list(module._modules.items()):
                if isinstance(quantizer, (ActivationQuantizer, WeightQuantizer)):
                    place(module, child, quantizer, call_address(path), module.bits)
    return tuple(marks)


def _program(exported: Any, marks: tuple[Mark, ...], layers: dict[str, tuple[str, Bits]]) -> Program:
    graph = fx.Graph()
    graph.output(graph.graph_copy(exported.graph, {}))
    copied = [node.name for node in graph.nodes if node.op == "placeholder"]  # a name such as "input" is changed by the copy
    constants, paths, inputs = {}, {}, []
    for name, spec in zip(copied, exported.graph_signature.input_specs, strict=True):
        if spec.kind.name == "USER_INPUT":
            inputs.append(name)
        else:
            held = exported.state_dict if spec.target in exported.state_dict else exported.constants
            constants[name], paths[name] = held[spec.target].detach(), spec.target
    return Program(graph, tuple(inputs), constants, paths, marks, layers)


def kind_of(node: fx.Node) -> str:
    """Return what a node calls: ``conv2d``, ``mark``, ``getitem``, …; in-place forms under the plain name; empty for no call."""
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[1] if schema is not None else getattr(node.target, "__name__", str(node.target))
    return str(name[:-1] if name.endswith("_") and not name.endswith("__") else name)


def averaged_axes(node: fx.Node) -> list[int]:
    """Return the axes that a mean or a sum is over, in order: all of them where it names none."""
    dims = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    asked = node.args[1] if len(node.args) > 1 else None
    return sorted(int(k) % dims for k in asked) if asked else list(range(dims))  # type: ignore[union-attr, arg-type]


def module_of(node: fx.Node) -> str:
    """Return the path of the module whose forward makes a node's call."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(list(stack.values()))), "")


class _Run(fx.Interpreter):
    """Runs a program with its quantizers and keeps what every mark gives."""

    def __init__(self, program: Program, jitter: Callable[[Tensor], Tensor] | None):
        super().__init__(fx.GraphModule(nn.Module(), program.graph))
        self.program, self.jitter = program, jitter
        self.marked: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if kind_of(n) != "mark":
            return super().run_node(n)
        (x, key), _ = self.fetch_args_kwargs_from_env(n)
        quantizer = self.program.marks[key].quantizer
        out = quantizer(x if self.jitter is None or isinstance(quantizer, WeightQuantizer) else self.jitter(x))
        self.marked[n.name] = out.clone()  # a later call may change the tensor in place
        return out


def run(program: Program, example: Example, jitter: Callable[[Tensor], Tensor] | None = None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return a program's outputs on an example, and what every mark gives, by node; ``jitter`` changes what is rounded to a grid."""
    placed, named = _arguments(example)
    given = dict(zip(program.inputs, [*placed, *named.values()], strict=True))
    values = [{**program.constants, **given}[node.name] for node in program.graph.nodes if node.op == "placeholder"]
    running = _Run(program, jitter)
    with torch.no_grad():
        out = running.run(*values)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)], running.marked


def is_binary(quantizer: Quantizer) -> bool:
    """Return whether a grid holds -1 and 1 alone, without zero."""
    return isinstance(quantizer, LSQActivation) and quantizer.signed and int(quantizer.bits) == 1
