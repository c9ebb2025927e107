"""From a QONNX file to a dataflow accelerator by hls4ml, emulated: its C++ is compiled and its answers compared with the network's.

hls4ml makes a circuit of a network: each layer is its own piece of hardware with the types of its ``Quant`` nodes, so mixed widths cost
nothing to control. Its C simulation computes with the circuit's very fixed-point types, so with power-of-two scales
(``quantize.scales: power_of_two``) and one scale a tensor (``quantize.per_channel: false``) it equals the network bit for bit, on inputs
that its input type holds; biases are cut off at 16 bits behind the point, and global averages at 24, which `compare` would show. One-bit
weights of convolutions are refused. Needs ``pip install 'bitwright[fpga]'`` and g++; a vendor's tools only to go on to a bitstream.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import signal
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bitwright.errors import ExportError
from bitwright.exporters.onnx import QONNX_DOMAIN
from bitwright.exporters.qonnx import tools

PRECISION = "fixed<32,16>"
"""Type of what no ``Quant`` node decides about: the input and the biases; sums get what they need."""
FRACTION = 16
"""Bits behind its point."""
AVERAGE = "fixed<40,16>"
"""Type of a global average and its sum, which hls4ml would cut off at the grid of what is averaged."""
_LAST = "qonnx.custom_op.channels_last"
_THROUGH = ("Quant", "Relu")
"""What may stand between a global average and the reshape after it."""


@dataclass(frozen=True)
class Simulation:
    """What a C simulation showed: samples, how many gave other outputs than the network, and the largest difference."""

    samples: int
    differing: int
    largest: float

    @property
    def exact(self) -> bool:
        """Whether all outputs are equal bit for bit."""
        return self.differing == 0


def to_hls4ml(
    file: str | Path,
    folder: str | Path,
    *,
    backend: str = "Vitis",
    style: Literal["io_parallel", "io_stream"] | None = None,
    precision: str = PRECISION,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Return hls4ml's model of a QONNX file, its project written below a folder; ``compile()`` and ``predict(x)`` run it.

    Args:
        file: what the exporter ``qonnx`` wrote.
        folder: for hls4ml's project.
        backend: of hls4ml.
        style: how data moves; by default streams where there are convolutions.
        precision: hls4ml's default type.
        options: further arguments of ``hls4ml.converters.convert_from_onnx_model``, such as ``part``.

    Raises:
        ExportError: the file is missing or not such a file; hls4ml is missing, refuses the network, or would meet what it cannot convert:
            scales of channels, convolutions of one bit, or a global pool that is not over the pixels of a convolution.
    """
    hls4ml = _hls4ml()
    model, convolutions = _prepared(Path(file))
    style = style or ("io_stream" if convolutions else "io_parallel")
    averages = [node.name for node in model.graph.node if node.op_type == "AveragePool"]
    with _one_message(Path(file)):
        config = hls4ml.utils.config.config_from_onnx_model(model, granularity="name", backend=backend, default_precision=precision)
        for name in averages:
            config["LayerName"][name]["Precision"] = {"accum": AVERAGE, "result": AVERAGE}
        place = {"output_dir": str(folder), "backend": backend, "io_type": style}
        return hls4ml.converters.convert_from_onnx_model(model, hls_config=config, **place, **dict(options or {}))


@contextlib.contextmanager
def _one_message(file: Path) -> Iterator[None]:
    """Silence a conversion, and raise `ExportError` for whatever it meets in a network that it does not know."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except ExportError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(f"fpga: hls4ml cannot convert {file.name} ({type(error).__name__}: {reason[:160]})") from error


def _hls4ml() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import hls4ml  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise ExportError(f"fpga: hls4ml is not installed ({error}); type pip install 'bitwright[fpga]'") from None
    return hls4ml


def _prepared(file: Path) -> tuple[Any, bool]:
    """Return a file as hls4ml wants it (shapes known, channels last, matrix products), and whether it has convolutions."""
    tools()
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean  # noqa: PLC0415
    from qonnx.transformation.gemm_to_matmul import GemmToMatMul  # noqa: PLC0415
    from qonnx.util.cleanup import cleanup_model  # noqa: PLC0415

    model = _read(file)
    convolutions = any(node.op_type == "Conv" for node in model.graph.node)
    with _one_message(file):
        _check_scales(model, file.name)
        model = cleanup_model(model)
        _add_biases(model)
        if convolutions:
            model = model.transform(ConvertToChannelsLastAndClean())
        model = cleanup_model(model.transform(GemmToMatMul()))
        _average_last(model, file.name)
    return model, convolutions


def _read(file: Path) -> Any:
    from qonnx.core.modelwrapper import ModelWrapper  # noqa: PLC0415

    ask = "give what the exporter qonnx wrote: bitwright export RUN --to qonnx --file FILE"
    if not file.is_file():
        raise ExportError(f"fpga: {file}: no such file; {ask}")
    try:
        model = ModelWrapper(str(file))
    except Exception as error:  # whatever protobuf raises on what is no model
        raise ExportError(f"fpga: {file.name} is no ONNX model ({type(error).__name__}); {ask}") from None
    if not any(node.domain == QONNX_DOMAIN for node in model.graph.node):
        raise ExportError(f"fpga: {file.name} has no Quant node; {ask}")
    return model


def _check_scales(model: Any, name: str) -> None:
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.domain != QONNX_DOMAIN:
            continue
        layer = node.name.removesuffix(".weight_quant")
        if node.op_type == "BipolarQuant" and any(after.op_type == "Conv" for after in model.find_consumers(node.output[0]) or []):
            found = f"the weight of the convolution '{layer}' has one bit, which qonnx cannot put channels last"
            raise ExportError(f"fpga: {name}: {found}; give it 2 bits or more")
        if int(np.prod(known[node.input[1]].dims or [1])) > 1:
            ask = "quantize with quantize.per_channel=false"
            raise ExportError(f"fpga: {name}: the weight of '{layer}' has a scale for each channel, which hls4ml cannot convert; {ask}")


def _add_biases(model: Any) -> None:
    """Give products without a bias one of zeros: qonnx's conversion to `MatMul` asks for it."""
    for number, node in enumerate(node for node in model.graph.node if node.op_type == "Gemm"):
        if len(node.input) == 2:
            zeros = f"{node.name or 'gemm'}_{number}_no_bias"
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            shape = model.get_tensor_shape(node.input[1])
            model.set_initializer(zeros, np.zeros(shape[0 if transposed else 1], np.float32))
            node.input.append(zeros)


def _average_last(model: Any, name: str) -> None:
    """Make global averages pools over channels-last pixels, in place.

    hls4ml gives a global pool the shapes of channels first and C++ of channels last, which reads other values, or past its stream.
    """
    from onnx import helper  # noqa: PLC0415  (comes with qonnx)

    for node in [node for node in model.graph.node if node.op_type in {"GlobalAveragePool", "GlobalMaxPool"}]:
        before = model.find_producer(node.input[0])
        if node.op_type != "GlobalAveragePool" or before is None or before.op_type != "Transpose":
            raise ExportError(f"fpga: {name}: hls4ml cannot convert the {node.op_type} '{node.name}'; average the pixels of a convolution")
        n, high, wide, channels = model.get_tensor_shape(before.input[0])
        window: dict[str, Any] = {"kernel_shape": [high, wide], "strides": [high, wide], "pads": [0] * 4}
        name_of = node.name.replace("Global", "")
        pool = helper.make_node("AveragePool", [before.input[0]], [node.output[0]], name=name_of, domain=_LAST, **window)
        model.graph.node.insert(list(model.graph.node).index(node), pool)
        model.graph.node.remove(node)
        if not model.find_consumers(before.output[0]):
            model.graph.node.remove(before)
        _flatten_after(model, pool, [n, 1, 1, channels], name)


def _flatten_after(model: Any, node: Any, shape: list[int], name: str) -> None:
    """Put channels last behind a pool, up to the reshape that makes a vector of them."""
    while True:
        model.set_tensor_shape(node.output[0], shape)
        following = model.find_consumers(node.output[0]) or []
        if len(following) != 1 or following[0].op_type not in (*_THROUGH, "Reshape"):
            found = ", ".join(after.op_type for after in following) or "nothing"
            raise ExportError(f"fpga: {name}: a global average goes to {found}; hls4ml needs a flatten and a linear layer behind it")
        if following[0].op_type == "Reshape":
            return
        node = following[0]


def simulate(circuit: Any, images: Tensor) -> Tensor:
    """Return the outputs of a circuit's C simulation; ``compile()`` was called before.

    The compiled code runs in a process of its own, since what is wrong in it ends the process that it is in.

    Args:
        circuit: what `to_hls4ml` returned.
        images: ``[n, …]``, channels first, on the grid of the input type if bits are to be compared.

    Raises:
        ExportError: the simulation died or failed.
    """
    moved = images.movedim(1, -1) if images.dim() > 2 else images
    context = multiprocessing.get_context("fork")  # the library and its types are there already
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_predict, args=(circuit, np.ascontiguousarray(moved.numpy().astype(np.float32)), sender), daemon=True)
    child.start()
    sender.close()
    with contextlib.suppress(EOFError), receiver:
        found = receiver.recv_bytes()
        child.join()
        return torch.from_numpy(np.frombuffer(found, np.float32).copy().reshape(len(images), -1))
    child.join()
    raise ExportError(f"fpga: the C simulation {_death(child.exitcode)}; hls4ml wrote code that cannot run: try parts of the network")


def _predict(circuit: Any, images: Any, sender: Connection) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        found = circuit.predict(images)
    sender.send_bytes(np.asarray(found, np.float32).tobytes())


def _death(code: int | None) -> str:
    """Return how a process ended.

    >>> _death(-4), _death(1)
    ('died of SIGILL', 'failed with status 1')
    """
    return f"died of {signal.Signals(-code).name}" if code is not None and code < 0 else f"failed with status {code}"


def on_input_grid(images: Tensor) -> Tensor:
    """Return inputs rounded to what `PRECISION` holds: hls4ml cuts off the rest, which may change a code by one."""
    scale = float(2**FRACTION)
    return torch.round(images * scale) / scale


def compare(circuit: Any, model: nn.Module, images: Tensor) -> Simulation:
    """Compile a circuit's C++ with g++, run it, and compare with the quantized network.

    Raises:
        ExportError: it does not compile, or its simulation dies.
    """
    images = on_input_grid(images)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            circuit.compile()
    except Exception as error:
        raise ExportError(f"fpga: the C++ of hls4ml does not compile ({str(error).splitlines()[0][:160]}); is g++ installed?") from error
    with torch.no_grad():
        wanted = model.eval()(images).flatten(1)
    found = simulate(circuit, images)
    return Simulation(len(images), int((found != wanted).any(1).sum()), float((found - wanted).abs().max()))


__all__ = ["Simulation", "compare", "on_input_grid", "simulate", "to_hls4ml"]
