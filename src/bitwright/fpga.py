"""From a QONNX file to a dataflow accelerator by hls4ml, emulated: its C++ is compiled and its answers compared with the network's.

hls4ml makes a circuit of a network: each layer is its own piece of hardware with the types of its ``Quant`` nodes, so mixed widths cost
nothing to control. Its C simulation computes with the circuit's very fixed-point types, so with power-of-two scales
(``quantize.scales: power_of_two``) and one scale a tensor (``quantize.per_channel: false``) it equals the network bit for bit, on inputs
that its input type holds. Needs ``pip install 'bitwright[fpga]'`` and g++; a vendor's tools only to go on to a bitstream.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
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
        ExportError: hls4ml is missing, refuses the network, or would meet scales of channels, which it cannot convert.
    """
    hls4ml = _hls4ml()
    model, convolutions = _prepared(file)
    style = style or ("io_stream" if convolutions else "io_parallel")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            config = hls4ml.utils.config.config_from_onnx_model(model, granularity="name", backend=backend, default_precision=precision)
            place = {"output_dir": str(folder), "backend": backend, "io_type": style}
            return hls4ml.converters.convert_from_onnx_model(model, hls_config=config, **place, **dict(options or {}))
    except Exception as error:  # whatever hls4ml meets in a network that it does not know
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(f"fpga: hls4ml cannot convert {Path(file).name} ({type(error).__name__}: {reason[:160]})") from error


def _hls4ml() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import hls4ml  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise ExportError(f"fpga: hls4ml is not installed ({error}); type pip install 'bitwright[fpga]'") from None
    return hls4ml


def _prepared(file: str | Path) -> tuple[Any, bool]:
    """Return a file as hls4ml wants it (shapes known, channels last, matrix products), and whether it has convolutions."""
    tools()
    from qonnx.core.modelwrapper import ModelWrapper  # noqa: PLC0415
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean  # noqa: PLC0415
    from qonnx.transformation.gemm_to_matmul import GemmToMatMul  # noqa: PLC0415
    from qonnx.util.cleanup import cleanup_model  # noqa: PLC0415

    model = ModelWrapper(str(file))
    _check_scales(model, Path(file).name)
    convolutions = any(node.op_type == "Conv" for node in model.graph.node)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        model = cleanup_model(model)
        if convolutions:
            model = model.transform(ConvertToChannelsLastAndClean())
        return cleanup_model(model.transform(GemmToMatMul())), convolutions


def _check_scales(model: Any, name: str) -> None:
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.domain == QONNX_DOMAIN and int(np.prod(known[node.input[1]].dims or [1])) > 1:
            layer = node.name.removesuffix(".weight_quant")
            ask = "quantize with quantize.per_channel=false"
            raise ExportError(f"fpga: {name}: the weight of '{layer}' has a scale for each channel, which hls4ml cannot convert; {ask}")


def simulate(circuit: Any, images: Tensor) -> Tensor:
    """Return the outputs of a circuit's C simulation; ``compile()`` was called before.

    Args:
        circuit: what `to_hls4ml` returned.
        images: ``[n, …]``, channels first, on the grid of the input type if bits are to be compared.
    """
    moved = images.movedim(1, -1) if images.dim() > 2 else images
    with contextlib.redirect_stdout(io.StringIO()):
        found = circuit.predict(np.ascontiguousarray(moved.numpy().astype(np.float32)))
    return torch.from_numpy(np.asarray(found, np.float32).reshape(len(images), -1))


def on_input_grid(images: Tensor) -> Tensor:
    """Return inputs rounded to what `PRECISION` holds: hls4ml cuts off the rest, which may change a code by one."""
    scale = float(2**FRACTION)
    return torch.round(images * scale) / scale


def compare(circuit: Any, model: nn.Module, images: Tensor) -> Simulation:
    """Compile a circuit's C++ with g++, run it, and compare with the quantized network.

    Raises:
        ExportError: it does not compile.
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
