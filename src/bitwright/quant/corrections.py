"""Post-training corrections: what a network that nobody fine-tunes gets after its widths are chosen. No label is used.

==============  =====================================================================================================
step            what it does
==============  =====================================================================================================
``equalize``    rescales channels between layers before anything is quantized (`bitwright.quant.equalization`)
``compensate``  moves each weight to where it undoes the errors of the layers before it (`bitwright.quant.rounding`)
``rounding``    second-order rounding (`bitwright.quant.rounding`)
``refine``      coordinate descent on codes, and the best step sizes for them (`bitwright.quant.rounding`)
``bias``        takes the mean error of each output channel out of the bias (Nagel et al., 2019, §4.2)
``batchnorm``   shifts BatchNorm statistics by what quantization changed (`bitwright.quant.batchnorm`)
==============  =====================================================================================================

The steps are applied in this order whatever the order they are named in, and the last five layer by layer in one pass of the
calibration images through the quantized network: when a layer runs, its inputs are those that the layers before it, already
corrected, really give. ``batchnorm`` alone corrects all statistics at once (`correct_batchnorm`), as the loss of a policy does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from bitwright.errors import BitwrightError, SiteError, nearest
from bitwright.quant.batchnorm import Statistics, batchnorms, correct_batchnorm, shift, statistics
from bitwright.quant.codes import POSITIONS, lsq_of, product_of, set_codes
from bitwright.quant.modules import QuantLayer, evaluating, named_quant_layers
from bitwright.quant.products import Product
from bitwright.quant.rounding import compensated

Step = Literal["equalize", "compensate", "rounding", "refine", "bias", "batchnorm"]
STEPS: tuple[Step, ...] = get_args(Step)
CODES = frozenset({"compensate", "rounding", "refine"})
"""The steps that choose codes."""

TRUST = 0.05
"""How far compensation trusts the float weights: the ridge, as a share of the inputs' mean second moment."""


def check_steps(steps: Iterable[str]) -> tuple[Step, ...]:
    """Return correction steps in the order in which they are applied.

    Raises:
        BitwrightError: a step is unknown.

    >>> check_steps(["batchnorm", "rounding"])
    ('rounding', 'batchnorm')
    """
    wanted = tuple(steps)
    for step in wanted:
        if step not in STEPS:
            raise BitwrightError(f"correction '{step}' is unknown; {nearest(step, STEPS)}")
    return tuple(step for step in STEPS if step in wanted)


def apply_steps(quantized: nn.Module, reference: nn.Module, images: Tensor, steps: Sequence[Step], known: Statistics | None = None) -> None:
    """Apply corrections to a quantized network in place.

    Args:
        quantized: what `quantize` made of ``reference``.
        reference: float network, equalised if that was asked for; in evaluation mode.
        images: one batch of inputs.
        steps: from `check_steps`; ``equalize`` has been done.
        known: the reference's own BatchNorm statistics on the images, where they are at hand.

    Raises:
        SiteError: a weight that a step should round cannot be.
        BitwrightError: a layer does not run on the images.
    """
    rest = [step for step in steps if step != "equalize"]
    if rest == ["batchnorm"]:
        with evaluating(quantized):
            correct_batchnorm(quantized, reference, images, known)
    elif rest:
        layers = _corrected_layers(quantized, rest)
        float_pass = _FloatPass(reference, layers, compensate="compensate" in rest, bias="bias" in rest)
        float_pass.run(images)
        _QuantizedPass(quantized, layers, float_pass, frozenset(rest)).run(images)


@dataclass(frozen=True)
class _Layer:
    """A layer to correct: where it is, its matrix product where codes are chosen, and whether its bias is shifted."""

    module: QuantLayer
    product: Product | None
    bias: bool


def _corrected_layers(quantized: nn.Module, steps: Sequence[str]) -> dict[str, _Layer]:
    """Return the layers to correct by path; raises `SiteError` for a weight whose codes cannot be chosen."""
    chooses = next((f"correct=('{step}', …)" for step in steps if step in CODES), None)
    found: dict[str, _Layer] = {}
    owners: dict[int, str] = {}
    for path, module in named_quant_layers(quantized):
        product = None
        if chooses is not None and module.weight_quantizer is not None:
            product = product_of(path, module, chooses)
            lsq_of(path, module.weight_quantizer, chooses)
            twin = owners.setdefault(id(module.weight), path)
            if twin != path:
                raise SiteError(f"{chooses}: layers '{twin}' and '{path}' share a weight; leave the step out, or skip one of them")
        found[path] = _Layer(module, product, "bias" in steps and module.bias is not None)
    return {path: layer for path, layer in found.items() if layer.product is not None or layer.bias}


class _FloatPass:
    """What the float network gives on the calibration images: statistics, and outputs at the positions that are drawn.

    Args:
        reference: the float network.
        layers: the layers to look at, by path.
        compensate: keep the layers' outputs at the drawn positions.
        bias: keep the layers' mean outputs.
    """

    def __init__(self, reference: nn.Module, layers: dict[str, _Layer], *, compensate: bool, bias: bool):
        self.reference, self.layers, self.compensate, self.bias = reference, layers, compensate, bias
        self.generator = torch.Generator().manual_seed(0)
        self.shapes: dict[str, torch.Size] = {}
        self.positions: dict[str, Tensor] = {}
        self.targets: dict[str, Tensor] = {}
        self.means: dict[str, Tensor] = {}
        self.statistics: Statistics = {}

    def run(self, images: Tensor) -> None:
        """Pass the images through the float network.

        Raises:
            BitwrightError: a layer does not run.
        """
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(evaluating(self.reference))
            for path in self.layers:
                stack.callback(self.reference.get_submodule(path).register_forward_hook(partial(self._see, path)).remove)
            for path, module in batchnorms(self.reference).items():
                stack.callback(module.register_forward_pre_hook(partial(self._see_statistics, path)).remove)
            self.reference(images)
        for path in self.layers:
            if path not in self.shapes:
                found = f"layer '{path}' did not run as a module on the calibration data"
                raise BitwrightError(f"{found}, so it cannot be corrected; name it in skip=")

    def _see(self, path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if path in self.shapes:  # a layer that runs several times is corrected by its first run
            return
        layer, self.shapes[path] = self.layers[path], output.shape
        if layer.bias:
            self.means[path] = channel_mean(layer.module, output)
        if layer.product is None:
            return
        self.positions[path] = layer.product.positions(output, POSITIONS, self.generator)
        if self.compensate:
            values = layer.product.outputs(output, self.positions[path])
            bias = cast("Tensor | None", module.bias)
            self.targets[path] = values if bias is None else values - bias.detach().view(values.shape[0], 1, -1)

    def _see_statistics(self, path: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.statistics.setdefault(path, statistics(args[0]))


def channel_mean(layer: QuantLayer, output: Tensor) -> Tensor:
    """Return the mean of each output channel."""
    channels = -1 if layer.op.kind == "linear" else -1 - layer.op.dims
    return output.movedim(channels, -1).flatten(0, -2).mean(0)


class _QuantizedPass:
    """Corrects the quantized network while the calibration images run through it: each layer when it first runs."""

    def __init__(self, quantized: nn.Module, layers: dict[str, _Layer], seen: _FloatPass, steps: frozenset[str]):
        self.quantized, self.layers, self.seen, self.steps = quantized, layers, seen, steps
        self.done: set[str] = set()

    def run(self, images: Tensor) -> None:
        """Pass the images through the network; what comes after a layer sees it corrected."""
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(evaluating(self.quantized))
            for path, layer in self.layers.items():
                if layer.product is not None:
                    stack.callback(layer.module.register_forward_pre_hook(partial(self._choose_codes, path)).remove)
                if layer.bias:
                    stack.callback(layer.module.register_forward_hook(partial(self._shift_bias, path)).remove)
            for path, module in batchnorms(self.quantized).items() if "batchnorm" in self.steps else ():
                stack.callback(module.register_forward_pre_hook(partial(self._shift_statistics, path)).remove)
            self.quantized(images)

    def _first(self, what: str, path: str) -> bool:
        """Say whether this is the first time for a part of a layer."""
        key = f"{what} of {path}"
        new = key not in self.done
        self.done.add(key)
        return new

    def _choose_codes(self, path: str, layer: QuantLayer, args: tuple[Tensor, ...]) -> None:
        """Put the weight on the codes and step sizes that fit the inputs at hand."""
        product = self.layers[path].product
        if product is None or not self._first("codes", path):
            return
        x = args[0] if layer.input_quantizer is None else layer.input_quantizer(args[0])
        target = self.seen.targets.pop(path, None)
        gram, cross = product.moments(x, self.seen.shapes[path], self.seen.positions[path], target)
        weight = product.columns(layer.weight)
        if cross is not None:
            weight = compensated(weight, gram, cross, TRUST)
        set_codes(path, layer, weight, gram, second_order="rounding" in self.steps, refine="refine" in self.steps)

    def _shift_bias(self, path: str, layer: QuantLayer, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Take the mean error of each output channel out of the bias, and out of the output at hand."""
        if layer.bias is None or not self._first("bias", path):
            return None
        error = channel_mean(layer, output) - self.seen.means[path]
        layer.bias.sub_(error)
        return output - (error if layer.op.kind == "linear" else error.view(-1, *[1] * layer.op.dims))

    def _shift_statistics(self, path: str, module: BatchNorm, args: tuple[Tensor, ...]) -> None:
        if path in self.seen.statistics and self._first("statistics", path):
            shift(module, self.seen.statistics[path], statistics(args[0]))
