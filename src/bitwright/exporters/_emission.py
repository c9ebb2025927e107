r"""From a captured graph to an ONNX graph: quantizers as integers between a quantization and a dequantization, weights as codes.

A layer computes :math:`s_x s_w \alpha \sum x_q w_q + \beta` where a BatchNorm (alpha, beta) follows it: alpha goes into the scales of
the output channels, and beta becomes an integer of the accumulator's step :math:`s_x s_w \alpha`, as integer runtimes want it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from bitwright.errors import ExportError
from bitwright.exporters._graph import Mark, Program, is_binary, kind_of, module_of
from bitwright.exporters._writing import Writer, clip_bounds, operate, pairs, text
from bitwright.policy import Bits
from bitwright.quant.quantizers import WeightQuantizer

CONVOLUTIONS = {f"conv{k}d": ("Conv", k) for k in (1, 2, 3)} | {f"conv_transpose{k}d": ("ConvTranspose", k) for k in (1, 2, 3)}
CLIPS = frozenset({"relu", "relu6", "hardtanh", "clamp", "clip"})
Floats = NDArray[np.float64]


class Coded(NamedTuple):
    """A weight as codes: ``codes · scale``, both of one shape (the scale expanded), of a layer."""

    codes: Tensor
    scale: Tensor
    address: str
    bits: Bits


class Grid(NamedTuple):
    """What an activation is rounded to: step, and lowest and highest code."""

    step: float
    low: int
    high: int
    signed: bool


@dataclass(frozen=True)
class WeightRecord:
    """A weight in the file: its layer, its widths and the initializer that holds it; ``axis`` has the scales, None for one."""

    address: str
    bits: Bits
    initializer: str
    axis: int | None = None


@dataclass(frozen=True)
class PointRecord:
    """An activation on a grid: its name, its widths, the node of the graph, and the tensor of codes with its zero point."""

    name: str
    bits: int
    node: str
    codes: str
    zero: int
    step: float
    low: int
    high: int


class ActivationForm(ABC):
    """How a format writes the rounding of an activation."""

    @abstractmethod
    def write(self, writer: Writer, x: str, grid: Grid, name: str, readers: Sequence[fx.Node]) -> tuple[str, str, int]:
        """Write it for the calls that read it; return the rounded tensor, the tensor of codes ('' for none), and the code of zero."""


@dataclass(frozen=True)
class Form:
    """What differs between formats.

    Attributes:
        activations: how activations are rounded.
        native: widths, of 2 and 4, whose own types hold the weights of layers with float activations.
        round_biases: whether biases become integers of the accumulator.
        clip_codes: whether a clip before a quantizer becomes a clip of its codes; else it stays as it is.
    """

    activations: ActivationForm
    native: tuple[int, ...] = ()
    round_biases: bool = True
    clip_codes: bool = True


@dataclass
class Emitted:
    """What was written, for checks: weights and activations on grids, and the number of layers."""

    weights: list[WeightRecord] = field(default_factory=list)
    points: list[PointRecord] = field(default_factory=list)
    layers: dict[str, Bits] = field(default_factory=dict)


class Emission:
    """Writes one program."""

    def __init__(self, writer: Writer, program: Program, form: Form):
        self.writer, self.program, self.form = writer, program, form
        self.env: dict[fx.Node, Any] = {}
        self.steps: dict[str, float] = {}
        self.names: dict[fx.Node, str] = {}
        self.emitted = Emitted()
        self.outputs: list[str] = []

    def write(self) -> Emitted:
        """Write all nodes; `outputs` then names the results."""
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = node.name if node.name in self.program.inputs else self.program.constants[node.name]
            elif node.op == "output":
                leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(node.args) if isinstance(leaf, fx.Node)]
                self.outputs = [text(self.writer, self._plain(self.env[leaf])) for leaf in leaves]
            elif node not in self.env:
                self.env[node] = self._call(node)
        return self.emitted

    def _values(self, node: fx.Node) -> list[Any]:
        return [fx.node.map_arg(argument, self.env.__getitem__) for argument in node.args]

    def _call(self, node: fx.Node) -> Any:
        kind = kind_of(node)
        if isinstance(node.meta.get("val"), (torch.SymInt, int)):
            return None  # sizes are read from the shapes of results
        if kind == "mark":
            return self._mark(node)
        if kind in CLIPS and self._only_quantized(node):
            return self.env[cast(fx.Node, node.args[0])]  # the codes are clipped instead
        values = self._values(node)
        if kind in CONVOLUTIONS or kind in ("linear", "addmm"):
            return self._layer(node, kind, values)
        leaves = torch.utils._pytree.tree_leaves([values, list(node.kwargs.values())])
        if any(isinstance(leaf, Coded) or type(leaf).__name__ == "Coded" for leaf in values):
            return self._moved(node, values)
        if kind == "getitem":
            return values[0][values[1]]
        if not any(isinstance(leaf, str) and leaf in self.writer.taken for leaf in leaves):
            return cast(Any, node.target)(*values, **node.kwargs)
        return operate(self.writer, node, values, self._name(node, kind))

    def _name(self, node: fx.Node, kind: str) -> str:
        """Return a name for the node of a product, or of a BatchNorm that stays beside its layer; empty for any other."""
        if kind == "batch_norm":
            layer = self.names.get(cast(fx.Node, node.args[0]))
            return "" if layer is None else f"{layer}/norm"
        return self._product(node) if kind in ("matmul", "bmm") else ""

    def _product(self, node: fx.Node) -> str:
        """Return the address of a product of two activations on grids, for the name of its node."""
        for operand in node.all_input_nodes:
            source = operand
            while kind_of(source) in ("transpose", "permute", "expand", "view", "reshape"):
                source = cast(fx.Node, source.args[0])
            if kind_of(source) == "mark" and self.program.marks[cast(int, source.args[1])].role in ("left", "right"):
                return self.program.marks[cast(int, source.args[1])].address
        return ""

    def _only_quantized(self, node: fx.Node) -> bool:
        """Return whether one quantizer, with zero on its grid, is all that reads a node."""
        users, source = list(node.users), self.env[cast(fx.Node, node.args[0])]
        if not self.form.clip_codes or len(users) != 1 or kind_of(users[0]) != "mark" or not isinstance(source, str):
            return False
        return not is_binary(self.program.marks[cast(int, users[0].args[1])].quantizer)

    def _plain(self, value: Any) -> Any:
        """Return a value as a tensor of the graph: codes are dequantized."""
        return self._dequantized(value) if isinstance(value, Coded) else value

    def _moved(self, node: fx.Node, values: list[Any]) -> Any:
        """Return a coded weight after a call that moves values; any other call reads the dequantized weight."""
        kind, coded = kind_of(node), values[0]
        if isinstance(coded, Coded) and kind in (
            "t",
            "transpose",
            "permute",
            "chunk",
            "split",
            "split_with_sizes",
            "slice",
            "view",
            "select",
        ):
            moved = [cast(Any, node.target)(x, *values[1:], **node.kwargs) for x in (coded.codes, coded.scale)]
            if isinstance(moved[0], (list, tuple)):
                return [coded._replace(codes=codes, scale=scale) for codes, scale in zip(*moved, strict=True)]
            return coded._replace(codes=moved[0], scale=moved[1])
        return operate(self.writer, node, [self._plain(value) for value in values])

    # ---- quantizers

    def _mark(self, node: fx.Node) -> Any:
        mark, value = self.program.marks[cast(int, node.args[1])], self.env[cast(fx.Node, node.args[0])]
        if isinstance(mark.quantizer, WeightQuantizer):
            return _coded(mark, value)
        quantizer = mark.quantizer
        grid = Grid(float(quantizer.step().detach()), *quantizer.codes, quantizer.codes[0] < 0)
        x = text(self.writer, value)
        if is_binary(quantizer):
            x = self._signs(x, grid.step)
        clipped = self._clipped(cast(fx.Node, node.args[0]), grid)
        if self.steps.get(x) == grid.step and kind_of(cast(fx.Node, node.args[0])) == "mark":
            return x  # on this grid already
        out, codes, zero = self.form.activations.write(self.writer, x, clipped, mark.name, list(node.users))
        self.steps[out] = grid.step
        bits = 8 if mark.role == "point" else mark.bits.a
        self.emitted.points.append(PointRecord(mark.name, bits, node.name, codes, zero, grid.step, clipped.low, clipped.high))
        if mark.role in ("left", "right"):
            self.emitted.layers[mark.address] = mark.bits
        return out

    def _signs(self, x: str, step: float) -> str:
        writer = self.writer
        positive = writer.node("GreaterOrEqual", [x, writer.constant(np.float32(0))])
        return str(writer.node("Where", [positive, writer.constant(np.float32(step)), writer.constant(np.float32(-step))]))

    def _clipped(self, source: fx.Node, grid: Grid) -> Grid:
        """Return a grid within what the clip before it lets through: rounding keeps the order of values."""
        if kind_of(source) not in CLIPS or not self._only_quantized(source):
            return grid
        low, high = (np.rint(np.float32(bound) / np.float32(grid.step)) for bound in clip_bounds(source))
        return grid._replace(low=int(max(grid.low, low)), high=int(min(grid.high, high)))

    def _dequantized(self, coded: Coded) -> str:
        return self._write_codes(coded, coded.scale.double().numpy(), coded.codes.numpy())[0]

    # ---- layers

    def _layer(self, node: fx.Node, kind: str, values: list[Any]) -> str:
        if kind == "addmm":
            values = [values[1], values[2].t() if isinstance(values[2], Tensor) else self._transposed(values[2]), values[0]]
        x, weight = text(self.writer, self._plain(values[0])), values[1]
        bias = values[2] if len(values) > 2 else None
        if isinstance(weight, str) or isinstance(bias, str):
            raise ExportError(f"export: a {kind} in '{module_of(node)}' has a weight that is computed; make it a parameter of its own")
        affine, last = self._affine(node, kind, values)
        name, layer_bits = self._which(node, weight)
        if isinstance(weight, Coded) and self.form.round_biases:
            weight = _finer(weight, bias, affine, self.steps.get(x), 1 if kind.startswith("conv_transpose") else 0)
        w, step = self._weight(weight, affine, node, name, layer_bits)
        b = self._bias(bias, affine, self.steps.get(x), step, name)
        out = self._linear(node, x, w, b, name) if kind in ("linear", "addmm") else self._convolution(kind, values, x, w, b, name)
        self.env[last], self.names[node] = out, name
        return out

    def _transposed(self, coded: Coded) -> Coded:
        return coded._replace(codes=coded.codes.t(), scale=coded.scale.t())

    def _which(self, node: fx.Node, weight: Any) -> tuple[str, Bits]:
        if isinstance(weight, Coded):
            self.emitted.layers[weight.address] = weight.bits
            return weight.address, weight.bits
        source = node.args[1]
        path = self.program.paths.get(source.name) if isinstance(source, fx.Node) else None
        address, bits = self.program.layers.get(path or "", (module_of(node) or path or "layer", Bits(32, 32)))
        if path in self.program.layers:
            self.emitted.layers[address] = bits
        return address, bits

    def _affine(self, node: fx.Node, kind: str, values: list[Any]) -> tuple[tuple[Floats, Floats] | None, fx.Node]:
        """Return the BatchNorm that alone reads a layer, as (alpha, beta), and the last node that the layer stands for."""
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is None or kind_of(user) != "batch_norm" or user.args[0] is not node:
            return None, node
        if not isinstance(values[1], Coded) and self._which(node, values[1])[1].w == 16:
            return None, node  # alpha would take the weight off the bfloat16 grid
        if kind.startswith("conv_transpose") and len(values) > 6 and values[6] != 1:
            return None, node
        return self._gain_and_shift(user), user

    def _gain_and_shift(self, norm: fx.Node) -> tuple[Floats, Floats]:
        """Return alpha and beta of a BatchNorm."""
        read = [None if v is None else self.env[v].double().numpy() for v in cast("tuple[fx.Node | None, ...]", norm.args[1:5])]
        weight, bias, mean, var = cast("tuple[Floats | None, Floats | None, Floats, Floats]", tuple(read))
        alpha = (1.0 if weight is None else weight) / np.sqrt(var + float(cast(float, norm.args[7])))
        return alpha, (0.0 if bias is None else bias) - mean * alpha

    def _weight(self, weight: Any, affine: Any, node: fx.Node, name: str, bits: Bits) -> tuple[str, Floats | None]:
        """Write a weight; return its name and, for codes, the step of each output channel."""
        kind = kind_of(node)
        axis = 1 if kind.startswith("conv_transpose") else 0
        gain = (
            None
            if affine is None
            else affine[0].reshape(
                [-1 if k == axis else 1 for k in range(weight.codes.dim() if isinstance(weight, Coded) else weight.dim())]
            )
        )
        flip = self._turns(node)
        if isinstance(weight, Coded):
            scale = np.array(weight.scale.double().numpy() * (1.0 if gain is None else gain))
            low = -(2 ** (self._type(weight, weight.codes.numpy())[1] - 1))
            codes, scale = _positive(weight.codes.numpy().copy(), np.broadcast_to(scale, weight.codes.shape).copy(), axis, low)
            written, _ = self._write_codes(weight, scale.T if flip else scale, codes.T if flip else codes)
            return written, _by_channel(scale, axis)
        values = weight.double().numpy() * (1.0 if gain is None else gain)
        return self._write_float(values.T if flip else values, name, bits), None

    def _turns(self, node: fx.Node) -> bool:
        """Return whether a linear layer multiplies more than a matrix: its weight is then stored the other way round."""
        return kind_of(node) == "linear" and cast(fx.Node, node.args[0]).meta["val"].dim() != 2

    def _write_float(self, values: Any, name: str, bits: Bits) -> str:
        writer = self.writer
        initializer = writer.name(f"{name}.weight")
        if bits.w == 16:
            rounded = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16).contiguous()
            raw = rounded.view(torch.int16).numpy().tobytes()
            onnx = writer.onnx
            writer.initializers.append(onnx.helper.make_tensor(initializer, onnx.TensorProto.BFLOAT16, values.shape, raw, raw=True))
            out = writer.node("Cast", [initializer], to=onnx.TensorProto.FLOAT)
        else:
            array = np.ascontiguousarray(values, dtype=np.float32)
            writer.initializers.append(writer.onnx.numpy_helper.from_array(array, initializer))
            out = initializer
        if bits != (32, 32):
            self.emitted.weights.append(WeightRecord(name, bits, initializer))
        return str(out)

    def _write_codes(self, coded: Coded, scale: Floats, codes: Any) -> tuple[str, Any]:
        """Write codes and scales, and what multiplies them."""
        writer, helper, types = self.writer, self.writer.onnx.helper, self.writer.onnx.TensorProto
        axis = _scale_axis(scale, coded.address)
        steps = np.float32(scale.flat[0]) if axis is None else _by_channel(scale, axis).astype(np.float32)
        kind, width = self._type(coded, codes)
        initializer = writer.name(f"{coded.address}.weight")
        raw = _packed(codes, width)
        writer.initializers.append(helper.make_tensor(initializer, getattr(types, kind), codes.shape, raw, raw=True))
        scales = writer.constant(steps, f"{coded.address}.weight_scale")
        attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
        zero = [] if kind != "INT8" else [writer.constant(np.zeros(np.shape(steps), np.int8), f"{coded.address}.weight_zero")]
        self.emitted.weights.append(WeightRecord(coded.address, coded.bits, initializer, axis))
        return writer.node("DequantizeLinear", [initializer, scales, *zero], name=f"{coded.address}.weight_dq", **attributes), steps

    def _type(self, coded: Coded, codes: Any) -> tuple[str, int]:
        """Return the type of a weight's codes: of its own width only where no integer kernel is lost by that."""
        low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
        if low < -128 or high > 127:
            found = f"codes from {low} to {high}, as 8-bit half-integer grids have"
            raise ExportError(
                f"export: the weight of '{coded.address}' has {found}, which are no 8-bit integers; use quantizer='lsq', or 7 bits"
            )
        for width in self.form.native if coded.bits.a >= 16 else ():
            if low >= -(2 ** (width - 1)) and high < 2 ** (width - 1):
                return f"INT{width}", width
        return "INT8", 8

    def _bias(self, bias: Tensor | None, affine: Any, step: float | None, weight_step: Floats | None, name: str) -> str:
        if bias is None and affine is None:
            return ""
        value = np.zeros(1) if bias is None else bias.double().numpy()
        if affine is not None:
            value = affine[0] * value + affine[1]
        if step is not None and weight_step is not None and self.form.round_biases:
            product = np.float32(step) * for_outputs(weight_step.astype(np.float32), len(value))
            codes = np.rint(value / product.astype(np.float64))
            if np.abs(codes).max(initial=0) < 2**31:
                written = self.writer.constant(codes.astype(np.int32), f"{name}.bias")
                scales = self.writer.constant(product.astype(np.float32), f"{name}.bias_scale")
                return str(self.writer.node("DequantizeLinear", [written, scales], name=f"{name}.bias_dq", axis=0))
        return self.writer.constant(value.astype(np.float32), f"{name}.bias")

    def _convolution(self, kind: str, values: list[Any], x: str, w: str, b: str, name: str) -> str:
        operator, dims = CONVOLUTIONS[kind]
        rest = [*values[3:], None, None, None, None, None][:5]
        attributes: dict[str, Any] = {"strides": pairs(rest[0] or 1, dims)}
        if operator == "Conv":
            padding, dilation, groups = rest[1], rest[2] or 1, rest[3] or 1
        else:
            padding, extra, groups, dilation = rest[1], rest[2] or 0, rest[3] or 1, rest[4] or 1
            attributes["output_padding"] = pairs(extra, dims)
        if isinstance(padding, str):
            attributes["auto_pad"] = "VALID" if padding == "valid" else "SAME_LOWER"
            if padding == "same":  # torch puts the odd zero at the end
                attributes["auto_pad"] = "SAME_UPPER"
        else:
            attributes["pads"] = pairs(padding or 0, dims) * 2
        attributes |= {"dilations": pairs(dilation, dims), "group": int(groups)}
        return str(self.writer.node(operator, [x, w, b] if b else [x, w], name=name, **attributes))

    def _linear(self, node: fx.Node, x: str, w: str, b: str, name: str) -> str:
        if not self._turns(node):
            return str(self.writer.node("Gemm", [x, w, b] if b else [x, w], name=name, transB=1))
        out = str(self.writer.node("MatMul", [x, w], name=name))
        return str(self.writer.node("Add", [out, b], name=f"{name}/bias")) if b else out


def _coded(mark: Mark, weight: Tensor) -> Coded:
    """Return a weight as codes around zero; those of half-integer grids count half steps."""
    assert isinstance(mark.quantizer, WeightQuantizer)
    found = mark.quantizer.encode(weight)
    codes, scale = found.codes.double() + found.origin, found.scale
    if codes.numel() and not torch.equal(codes, codes.round()):
        codes, scale = codes * 2, scale / 2
    return Coded(codes.to(torch.int32), scale.expand(weight.shape), mark.address, mark.bits)


def _positive(codes: Any, scale: Floats, axis: int, low: int) -> tuple[Any, Floats]:
    """Return codes and scales with scales above zero wherever the type has the negated codes; a channel of zeros gets any scale."""
    moved, steps = np.moveaxis(codes, axis, 0), np.moveaxis(scale, axis, 0)
    largest = float(np.abs(scale).max(initial=0.0)) or 1.0
    for channel in range(len(moved)):
        if not moved[channel].any() or not steps[channel].any():
            moved[channel], steps[channel] = 0, largest
        elif steps[channel].flat[0] < 0 and moved[channel].min() > low:
            moved[channel], steps[channel] = -moved[channel], -steps[channel]
    return codes, scale


def _finer(weight: Coded, bias: Tensor | None, affine: Any, step: float | None, axis: int) -> Coded:
    """Return a weight of few bits with larger codes and a smaller scale, where its bias is no multiple of the accumulator's step.

    A bias is rounded to that step, which is coarse where weights have few bits; 8-bit integers have room to make it finer, and the
    weights stay what they are.
    """
    if step is None or (bias is None and affine is None) or weight.codes.numel() == 0:
        return weight
    value = np.zeros(1) if bias is None else bias.double().numpy()
    scale = _by_channel(weight.scale.double().numpy(), axis)
    if affine is not None:
        value, scale = affine[0] * value + affine[1], scale * affine[0]
    units = value / (for_outputs(scale, len(value)) * np.float32(step))
    if np.array_equal(units, np.rint(units)):
        return weight
    factor = 1
    while int(weight.codes.abs().max()) * factor * 2 <= 127:
        factor *= 2
    return weight._replace(codes=weight.codes * factor, scale=weight.scale / factor)


def _by_channel(scale: Floats, axis: int) -> Floats:
    return np.moveaxis(scale, axis, 0).reshape(scale.shape[axis], -1)[:, 0].copy()


def for_outputs(steps: NDArray[Any], count: int) -> NDArray[Any]:
    """Return a weight's steps for each of so many output channels: the groups of a transposed convolution share theirs.

    >>> for_outputs(np.array([0.5, 0.25]), 4).tolist()
    [0.5, 0.25, 0.5, 0.25]
    """
    return np.tile(steps, count // len(steps))


def _scale_axis(scale: Floats, address: str) -> int | None:
    """Return the axis along which scales differ, None where they are all one."""
    if scale.size == 0 or np.all(scale == scale.flat[0]):
        return None
    for axis in range(scale.ndim):
        rows = np.moveaxis(scale, axis, 0).reshape(scale.shape[axis], -1)
        if np.all(rows == rows[:, :1]):
            return axis
    raise ExportError(f"export: the scales of '{address}' differ along two axes, which ONNX cannot say; use one for each output channel")


def _packed(codes: Any, width: int) -> bytes:
    """Return codes in two's complement, ``width`` bits each, the first ones lowest."""
    flat = np.ascontiguousarray(codes).reshape(-1).astype(np.int8).view(np.uint8)
    if width == 8:
        return bytes(flat.tobytes())
    per = 8 // width
    padded = np.zeros(-(-len(flat) // per) * per, np.uint8)
    padded[: len(flat)] = flat & (2**width - 1)
    shifts = np.arange(per, dtype=np.uint8) * width
    return bytes((padded.reshape(-1, per) << shifts).sum(1, dtype=np.uint16).astype(np.uint8).tobytes())


def float_layers(bits: Mapping[str, Bits]) -> list[str]:
    """Return the addresses of layers that no integer kernel is expected for."""
    return [address for address, pair in bits.items() if pair.w > 8 or pair.a > 8]


__all__ = ["ActivationForm", "Emission", "Emitted", "Form", "Grid", "PointRecord", "WeightRecord", "float_layers", "replace"]
