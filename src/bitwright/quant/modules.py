"""Quantized layers: thin shells that keep the names of the layer they replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.errors import SiteError
from bitwright.policy import Bits
from bitwright.quant.functional import round_ste
from bitwright.quant.quantizers import ActivationQuantizer, WeightQuantizer

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CALLS = "quantized_calls"
"""Name under which a module holds the quantizers of its functional calls."""
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Op:
    """What a layer computes from input, weight and bias."""

    kind: str
    dims: int = 0
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    output_padding: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    padding_both: tuple[int, ...] = ()
    axis: int | None = None  # output-channel axis of a functional call's weight

    @classmethod
    def of(cls, layer: nn.Module) -> Op:
        """Return the operation of a layer that torch provides; raises `SiteError` for any other."""
        if isinstance(layer, nn.Linear):
            return cls("linear")
        if not isinstance(layer, QUANTIZABLE):
            raise SiteError(f"a {type(layer).__name__} cannot be quantized; name it in skip=")
        conv = cast(nn.Conv2d, layer)
        kind = "transposed" if conv.transposed else "convolution"
        both = tuple(getattr(conv, "_reversed_padding_repeated_twice", ()))
        dims = len(conv.kernel_size)
        return cls(kind, dims, conv.stride, conv.padding, conv.dilation, conv.groups, conv.output_padding, conv.padding_mode, both)

    @property
    def channel_axis(self) -> int:
        """Return the output-channel axis of the weight."""
        if self.axis is not None:
            return self.axis
        return 1 if self.kind == "transposed" else 0

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Sequence[int] | None = None) -> Tensor:
        """Return the layer's output; a transposed convolution can be asked for one of the sizes that its stride leaves open."""
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        if self.kind == "transposed":
            transposed = TRANSPOSED[self.dims]
            padding = cast("tuple[int, ...]", self.padding)
            extra = self.output_padding if output_size is None else self._output_padding(x, weight, output_size)
            return transposed(x, weight, bias, self.stride, padding, extra, self.groups, self.dilation)
        around = self.padding
        if self.padding_mode != "zeros":
            x, around = F.pad(x, self.padding_both, mode=self.padding_mode), (0,) * self.dims
        convolution = cast("Callable[..., Tensor]", CONVOLUTIONS[self.dims])
        return convolution(x, weight, bias, self.stride, around, self.dilation, self.groups)

    def _output_padding(self, x: Tensor, weight: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        """Return the padding at the end of each dimension that gives the asked size; raises `ValueError` where none does."""
        sizes = tuple(output_size)[-self.dims :]
        padding = cast("tuple[int, ...]", self.padding)
        extents = zip(x.shape[-self.dims :], self.stride, padding, self.dilation, weight.shape[2:], strict=True)
        least = [(n - 1) * step - 2 * pad + dilation * (kernel - 1) + 1 for n, step, pad, dilation, kernel in extents]
        found = tuple(size - low for size, low in zip(sizes, least, strict=True))
        if not all(0 <= extra < step for extra, step in zip(found, self.stride, strict=True)):
            most = [low + step - 1 for low, step in zip(least, self.stride, strict=True)]
            raise ValueError(f"output_size={list(sizes)}: this input gives {least} to {most}; ask for a size in between")
        return found


class QuantLayer(nn.Module):
    """A convolution or linear layer whose weight and input pass through quantizers.

    Parameters keep the names ``weight`` and ``bias``, so a float network's state dict loads into it.

    Args:
        op: what the layer computes.
        weight: latent float weight, shared with nobody.
        bias: float bias or None.
        bits: the widths.
        weight_quantizer: None leaves the weight as it is (32), or rounded to bfloat16 (16).
        input_quantizer: None leaves the input as it is.
        round_bias: round the bias to a multiple of both step sizes' product, as integer arithmetic has it.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        op: Op,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        bits: Bits,
        weight_quantizer: WeightQuantizer | None,
        input_quantizer: ActivationQuantizer | None,
        *,
        round_bias: bool = False,
    ):
        super().__init__()
        self.op, self.bits, self.round_bias = op, bits, round_bias
        self.weight = weight
        self.register_parameter("bias", bias)
        self.weight_quantizer, self.input_quantizer = weight_quantizer, input_quantizer

    def quantized_weight(self) -> Tensor:
        """Return the weight as the forward pass uses it."""
        if self.weight_quantizer is not None:
            return cast(Tensor, self.weight_quantizer(self.weight))
        if self.bits.w == 16:
            rounded = self.weight.to(torch.bfloat16).to(self.weight.dtype).detach()
            return rounded + (self.weight - self.weight.detach())
        return self.weight

    def quantized_bias(self) -> Tensor | None:
        """Return the bias as the forward pass uses it."""
        if self.bias is None or not self.round_bias or self.weight_quantizer is None or self.input_quantizer is None:
            return self.bias
        step = (self.weight_quantizer.step(self.weight) * self.input_quantizer.step()).detach().flatten()
        if step.numel() > 1 and step.numel() != self.bias.numel():  # a transposed convolution's groups share their steps
            step = step.repeat(self.bias.numel() // step.numel())
        return round_ste(self.bias / step) * step

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Return the layer's output on quantized weight and input; ``output_size`` as of torch's transposed convolutions."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return self.op(x, self.quantized_weight(), self.quantized_bias(), output_size)

    def extra_repr(self) -> str:
        """Return the widths."""
        return f"{self.op.kind}, {tuple(self.weight.shape)}, {self.bits!r}"


def named_quant_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Yield each quantized layer once, with its path; a functional call with a weight has its address ``owner#k``."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            yield call_address(name), module


def call_address(path: str) -> str:
    """Return the address of a functional call from the path of its quantizers; other paths are returned as they are.

    >>> call_address("attn.quantized_calls.0"), call_address("quantized_calls.0"), call_address("conv1")
    ('attn#0', '#0', 'conv1')
    """
    parent, _, key = path.rpartition(".")
    owner, _, last = parent.rpartition(".")
    return f"{owner}#{key}" if last == CALLS else path


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put ``new`` at every place where the module at ``path`` is registered."""
    old = model.get_submodule(path)
    if old is model:
        raise SiteError("the model is itself the layer to quantize, so it has no place of its own; wrap it in nn.Sequential(model)")
    for parent in list(model.modules()):
        # named_children() would show a module registered twice in one parent only once
        for name in [name for name, child in parent._modules.items() if child is old]:
            setattr(parent, name, new)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
