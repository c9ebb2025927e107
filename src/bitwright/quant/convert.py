"""From a float network and a policy to a quantized copy of it."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError, PolicyError, nearest
from bitwright.policy import Bits, Policy
from bitwright.quant.batchnorm import Statistics
from bitwright.quant.calibration import Rule
from bitwright.quant.corrections import apply_steps, check_steps
from bitwright.quant.equalization import equalize
from bitwright.quant.folding import fold_batchnorms
from bitwright.quant.functional import UNTOUCHED
from bitwright.quant.functional_calls import disable_fast_paths, install_calls, observe_calls, plan_calls, sites_of_calls
from bitwright.quant.modules import QUANTIZABLE, Op, QuantLayer, evaluating, named_quant_layers, replace_module
from bitwright.quant.points import PointKind, add_points, check_kinds
from bitwright.quant.quantizers import SCHEMES, ActivationQuantizer, Scheme, activation_quantizer, weight_quantizer

if TYPE_CHECKING:
    from bitwright.data import Split
    from bitwright.sites import Site

Scales = Literal["free", "power_of_two"]

CALIBRATION_IMAGES = 256
"""Images of a calibration split that are looked at."""


@dataclass(frozen=True)
class QuantOptions:
    """How layers are quantized once their widths are known.

    Attributes:
        quantizer: ``lsq``, ``entropy``, ``dorefa`` or ``pact``; see `bitwright.quant.quantizers`.
        per_channel: one weight step size for each output channel (``lsq``).
        narrow: symmetric weight grids (``lsq``).
        entropy: step sizes in units of the filter's mean magnitude (``lsq``).
        rule: calibration of step sizes: ``mse``, ``minmax`` or ``percentile``.
        scales: ``power_of_two`` rounds every step size to a power of two, folds each BatchNorm into the layer before it and rounds
            biases to 32-bit integers: then integer arithmetic gives the network's outputs bit for bit (``lsq``).
        points: what else is put on 8-bit grids because the target needs it: ``add``, ``concat``, ``pool``, ``shared``
            (`bitwright.quant.points`); None is what the recipe's target says, nothing without one.
    """

    quantizer: Scheme = "lsq"
    per_channel: bool = True
    narrow: bool = False
    entropy: bool = False
    rule: Rule = "mse"
    scales: Scales = "free"
    points: tuple[PointKind, ...] | None = None

    def __post_init__(self) -> None:
        if self.quantizer not in SCHEMES:
            raise BitwrightError(f"quantizer '{self.quantizer}' is unknown; {nearest(self.quantizer, SCHEMES)}")
        if self.scales not in get_args(Scales):
            raise BitwrightError(f"scales '{self.scales}' are unknown; {nearest(self.scales, get_args(Scales))}")
        if self.integer and self.quantizer != "lsq":
            raise BitwrightError(f"scales 'power_of_two' need quantizer 'lsq', and it is '{self.quantizer}'; change one of them")
        check_kinds(self.points or ())

    @property
    def integer(self) -> bool:
        """Whether integer arithmetic is to give the network's outputs bit for bit."""
        return self.scales == "power_of_two"


def calibration_images(calibration: Tensor | Split | None) -> Tensor | None:
    """Return a batch of inputs from a tensor or the first images of a split's evaluation view."""
    if calibration is None or isinstance(calibration, Tensor):
        return calibration
    count = min(len(calibration), CALIBRATION_IMAGES)
    return calibration.batch(torch.arange(count), None)[0]


def quantize(
    model: nn.Module,
    policy: Policy,
    *,
    quantizer: Scheme = "lsq",
    calibration: Tensor | Split | None = None,
    correct: Iterable[str] = (),
    sites: Sequence[Site] | None = None,
    skip: Iterable[str] = (),
    options: QuantOptions | None = None,
    float_statistics: Statistics | None = None,
) -> nn.Module:
    """Return a quantized copy of a model; the model itself is untouched.

    Args:
        model: float network.
        policy: bits of every quantizable layer, by module path; or by site name where ``sites`` is given.
        quantizer: scheme, see `bitwright.quant.quantizers`; ``options`` says more and takes its place.
        calibration: inputs ``[N, …]``, or a split; needed where an activation has fewer than 16 bits.
        correct: post-training corrections by name, see `bitwright.quant.corrections`; such as ``("batchnorm",)``.
        sites: the trace's sites; needed where a site has several layers or is a functional call (``owner#k``).
        skip: paths, or patterns, of layers that stay float and need no entry in the policy.
        options: all options of the quantizers.
        float_statistics: the model's own BatchNorm statistics on the calibration images (`batchnorm.collect`): they save a pass where
            ``batchnorm`` is the only correction.

    Raises:
        PolicyError: a policy names an unknown site, or a quantizable layer has no entry.
        SiteError: a functional call cannot be quantized where it is.
        BitwrightError: calibration data is missing, or a correction is unknown.

    >>> net = quantize(nn.Sequential(nn.Linear(4, 2)), Policy({"0": (2, 32)}))
    >>> len(net[0].quantized_weight().unique()) <= 8
    True
    """
    options = options or QuantOptions(quantizer=quantizer)
    steps = check_steps(correct)
    images = calibration_images(calibration)
    if steps and images is None:
        raise BitwrightError(f"correct={steps} needs calibration=; give a batch of inputs or a split")
    if "equalize" in steps and images is not None:
        model = equalize(model, images)
    if options.integer:
        model = _folded(model, images, steps)
    site_of = sites_of_calls(sites or ())
    widths = _widths_by_layer(model, policy, sites, tuple(skip))
    result = copy.deepcopy(model)
    disable_fast_paths(result)
    calls = plan_calls(result, widths, site_of)
    operands = observe_calls(result, calls, images)
    layers = {path: bits for path, bits in widths.items() if "#" not in path}
    inputs = _activation_quantizers(result, layers, options, images)
    for path, bits in layers.items():
        replace_module(result, path, _shell(result.get_submodule(path), bits, inputs.get(path), options))
    install_calls(result, calls, operands, options)
    if steps and images is not None:
        apply_steps(result, copy.deepcopy(model).eval(), images, steps, float_statistics)
    add_points(result, options.points or (), images, rule=options.rule, power_of_two=options.integer)
    return result


def _folded(model: nn.Module, images: Tensor | None, steps: Sequence[str]) -> nn.Module:
    """Return the network with each BatchNorm in the layer before it."""
    for step, instead in (("batchnorm", "correct=('bias',)"), ("refine", "correct=('rounding',)")):
        if step in steps:
            what = "the BatchNorms are folded away" if step == "batchnorm" else "it chooses step sizes of its own"
            raise BitwrightError(f"scales='power_of_two' and correct=('{step}', …) do not go together: {what}; give {instead}")
    if images is None:
        raise BitwrightError("scales='power_of_two' needs calibration=, to see which BatchNorm follows which layer; give inputs or a split")
    return fold_batchnorms(model, images)


def _widths_by_layer(model: nn.Module, policy: Policy, sites: Sequence[Site] | None, skip: tuple[str, ...]) -> dict[str, Bits]:
    """Return the bits of each layer by path, after checking that policy and model name the same layers."""
    paths = [name for name, m in model.named_modules() if isinstance(m, QUANTIZABLE)]
    owner = {path: path for path in paths}
    if sites is not None:
        owner = {layer: site.name for site in sites for layer in site.layers}
    known = dict.fromkeys(owner.values())
    for name in policy:
        if name not in known:
            raise PolicyError(f"policy: the model has no site '{name}'; {nearest(name, known)}")
    widths = {}
    for path, site in owner.items():
        if any(fnmatch.fnmatch(path, pattern) for pattern in skip):
            continue
        if site not in policy:
            raise PolicyError(f"policy: site '{site}' has no entry; add it, or name it in skip=")
        widths[path] = policy[site]
    return widths


def _activation_quantizers(
    model: nn.Module, widths: dict[str, Bits], options: QuantOptions, images: Tensor | None
) -> dict[str, ActivationQuantizer]:
    """Return calibrated input quantizers for the layers that need one."""
    wanted = {path: bits for path, bits in widths.items() if bits.a < UNTOUCHED}
    if not wanted:
        return {}
    if images is None:
        raise BitwrightError("activations below 16 bits need calibration=; give a batch of inputs or a split")
    seen = layer_inputs(model, wanted, images)
    quantizers = {}
    for path, bits in wanted.items():
        if path not in seen:
            raise BitwrightError(f"layer '{path}' did not run on the calibration data, so its activations have no range; name it in skip=")
        quantizers[path] = activation_quantizer(options.quantizer, bits.a, rule=options.rule, power_of_two=options.integer)
        quantizers[path].calibrate(seen[path])
        quantizers[path].to(images.device)
    return quantizers


def layer_inputs(model: nn.Module, paths: Iterable[str], images: Tensor) -> dict[str, Tensor]:
    """Return what enters each layer on some inputs, ``[N, …]``; calls of one layer are put side by side."""
    seen = layer_calls(model, paths, images)
    return {path: calls[0] if len(calls) == 1 else torch.cat([c.flatten(1) for c in calls], 1) for path, calls in seen.items()}


def layer_calls(model: nn.Module, paths: Iterable[str], images: Tensor) -> dict[str, list[Tensor]]:
    """Return what enters each layer on some inputs at each of its calls, ``[N, …]`` each, in the order of the calls."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for path in paths:

        def record(_: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
            seen.setdefault(path, []).append(args[0].detach())

        handles.append(model.get_submodule(path).register_forward_pre_hook(record))
    try:
        with torch.no_grad(), evaluating(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _shell(layer: nn.Module, bits: Bits, inputs: ActivationQuantizer | None, options: QuantOptions) -> QuantLayer:
    """Return the quantized layer that takes a float layer's place."""
    op = Op.of(layer)
    weight, bias = cast(nn.Parameter, layer.weight), cast("nn.Parameter | None", layer.bias)
    weights = None
    if bits.w < UNTOUCHED:
        axis = op.channel_axis if options.per_channel else None
        weights = weight_quantizer(
            options.quantizer,
            weight.detach(),
            bits.w,
            axis=axis,
            narrow=options.narrow,
            entropy=options.entropy,
            rule=options.rule,
            power_of_two=options.integer,
        ).to(weight.device)
    shell = QuantLayer(op, weight, bias, bits, weights, inputs, round_bias=options.integer)
    return shell.train(layer.training)


def verify_widths(model: nn.Module) -> dict[str, int]:
    """Return the largest number of distinct weight levels in a scale group of each layer, counted from the values.

    Raises:
        BitwrightError: a layer holds more levels than its width has.

    >>> _ = torch.manual_seed(0)
    >>> verify_widths(quantize(nn.Sequential(nn.Linear(64, 2)), Policy({"0": (2, 32)})))
    {'0': 4}
    """
    counts = {}
    for name, layer in named_quant_layers(model):
        if layer.weight_quantizer is None:
            continue
        with torch.no_grad():
            value, step = layer.quantized_weight(), layer.weight_quantizer.step(layer.weight)
        group = step.dim() > 0 and step.numel() > 1
        rows = value.movedim(layer.op.channel_axis, 0).flatten(1) if group else value.reshape(1, -1)
        counts[name] = max(len(row.unique()) for row in rows)
        if counts[name] > 2**layer.bits.w:
            raise BitwrightError(f"layer '{name}' holds {counts[name]} distinct weights, but its policy says {layer.bits.w} bits")
    return counts


__all__ = ["QuantOptions", "calibration_images", "evaluating", "layer_calls", "layer_inputs", "quantize", "verify_widths"]
