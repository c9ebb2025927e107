r"""Cross-layer equalisation: channels between two layers are rescaled so that quantization treats them alike.

Where a layer's output channel i reaches one other layer through nothing but functions f with :math:`f(sx) = s f(x)` for s > 0
(ReLU, pooling, a BatchNorm in evaluation mode whose two parameters are divided as well), dividing the channel by :math:`s_i` and
multiplying the second layer's weights for it by :math:`s_i` changes nothing in float (Nagel et al., "Data-free quantization",
2019, §4.1). With :math:`r_i` the range of the channel and :math:`r'_i` that of the second layer's weights for it,

.. math:: s_i = \sqrt{r_i / r'_i}

makes the two equal (their eq. 11).

Differs: :math:`r_i` is the range of the activations on calibration images; theirs is that of the first layer's weights, which
matters only where a weight has one step size for all channels. The scales of a pair are centred: their geometric mean is 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bitwright.quant.modules import CONVOLUTIONS, QUANTIZABLE, TRANSPOSED, evaluating

WEIGHTED: tuple[Callable[..., Any], ...] = (*CONVOLUTIONS.values(), *TRANSPOSED.values(), F.linear, F.batch_norm)
"""The functions of layers and BatchNorms."""
HOMOGENEOUS: tuple[Callable[..., Any], ...] = (
    F.relu,
    torch.relu,
    torch.relu_,
    Tensor.relu,
    Tensor.relu_,
    F.max_pool1d,
    F.max_pool2d,
    F.max_pool3d,
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    F.dropout,
)
"""Functions of one tensor that keep channels apart and commute with positive factors; dropout does nothing in evaluation."""
LOOKS = ("__get__", "dim", "size", "numel", "is_floating_point", "stride", "is_contiguous")
"""What reads a tensor's form and not its values."""
WIDEST = 10.0
"""The largest scale, and one over the smallest."""


@dataclass(frozen=True)
class Pair:
    """A layer, and what gives its input channels their scale: a layer or a BatchNorm whose output reaches nothing else. By path."""

    source: str
    layer: str


def equalize(model: nn.Module, images: Tensor) -> nn.Module:
    """Return an equalised copy of a float network: in evaluation mode it computes what the network computes.

    Args:
        model: float network; where no two layers allow it, the copy is the same.
        images: inputs ``[N, …]`` on which channels show their ranges.
    """
    result = copy.deepcopy(model)
    pairs = find_pairs(result, images[:1])
    ranges = _channel_ranges(result, [pair.layer for pair in pairs], images)
    with torch.no_grad():
        for pair in pairs:
            source, layer = result.get_submodule(pair.source), result.get_submodule(pair.layer)
            scales = _scales(ranges[pair.layer], input_ranges(layer))
            _divide_outputs(source, scales)
            _multiply_inputs(layer, scales)
    return result


def find_pairs(model: nn.Module, example: Tensor) -> list[Pair]:
    """Return the pairs of a network in the order in which they run, found by running it once on an example.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Sigmoid(), nn.Conv2d(2, 2, 1))
    >>> find_pairs(net, torch.zeros(1, 3, 2, 2))
    [Pair(source='1', layer='3')]
    """
    follower = _Follower(model)
    with torch.no_grad(), evaluating(model), follower:
        outputs = model(example)
    follower.use(outputs, None)
    return follower.pairs()


def input_ranges(layer: nn.Module) -> Tensor:
    """Return the largest magnitude of a layer's weights for each of its input channels."""
    return _by_input(layer).detach().abs().amax((1, 3)).flatten()


def _by_input(layer: nn.Module) -> Tensor:
    """Return a view of a layer's weight, ``[groups, outputs, inputs, kernel]``."""
    weight, groups = cast(Tensor, layer.weight), int(getattr(layer, "groups", 1))
    if getattr(layer, "transposed", False):
        return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1).transpose(1, 2)
    return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _scales(activations: Tensor, weights: Tensor) -> Tensor:
    """Return what each channel is divided by; 1 for a channel that is never seen or never used."""
    live = (activations > 0) & (weights > 0)
    raw = torch.where(live, (activations / weights.clamp_min(1e-30)).sqrt(), 1.0)
    centre = raw[live].log().mean().exp() if bool(live.any()) else 1.0
    return torch.where(live, (raw / centre).clamp(1 / WIDEST, WIDEST), 1.0)


def _divide_outputs(source: nn.Module, scales: Tensor) -> None:
    """Divide the output channels of a layer or a BatchNorm, in place."""
    weight, bias = cast(Tensor, source.weight), cast("Tensor | None", source.bias)
    if getattr(source, "transposed", False):
        outputs = _by_input(source)  # [groups, outputs, inputs, kernel]
        outputs /= scales.view(outputs.shape[0], outputs.shape[1], 1, 1)
    else:
        weight /= scales.view(-1, *[1] * (weight.dim() - 1))
    if bias is not None:
        bias /= scales


def _multiply_inputs(layer: nn.Module, scales: Tensor) -> None:
    """Multiply a layer's weights for each input channel, in place."""
    inputs = _by_input(layer)
    inputs *= scales.view(inputs.shape[0], 1, inputs.shape[2], 1)


def _channel_ranges(model: nn.Module, paths: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """Return the largest magnitude of each channel that enters each layer."""
    ranges: dict[str, Tensor] = {}

    def see(path: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        axis = _channel_axis(layer, args[0])
        ranges[path] = args[0].detach().abs().movedim(axis, -1).flatten(0, -2).amax(0)

    with ExitStack() as stack, torch.no_grad(), evaluating(model):
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(partial(see, path)).remove)
        model(images)
    return ranges


def _channel_axis(module: nn.Module, x: Tensor) -> int:
    """Return the axis of the channels in what enters or leaves a layer or a BatchNorm."""
    if isinstance(module, nn.Linear):
        return x.dim() - 1
    return 1 if isinstance(module, BatchNorm) else x.dim() - 1 - len(cast(nn.Conv2d, module).kernel_size)


@dataclass
class _Use:
    """What a tensor is given to: the path of a layer or a BatchNorm, or a function, and the tensor that comes out."""

    path: str | None
    passes: bool
    input_axis: int
    out: int | None
    output_axis: int


class _Follower(TorchFunctionMode):
    """Follows every tensor of one run to what it is given to."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.paths, self.shared = _owners(model)
        self.constants = {id(x) for x in (*model.parameters(), *model.buffers())}
        self.numbers: dict[int, int] = {}  # tensor to its number; a tensor that is written to gets a new one
        self.uses: dict[int | None, list[_Use]] = {}
        self.kept: list[Tensor] = []  # so that no id comes twice

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if outputs or getattr(func, "__name__", "") not in LOOKS:
            self.use((args, kwargs), func, outputs)
        return out

    def use(self, given: Any, func: Callable[..., Any] | None, outputs: Sequence[Tensor] = ()) -> None:
        """Note that the tensors in ``given`` are used by a function, or, with None, outside the network."""
        leaves = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        inputs = [x for x in leaves if id(x) not in self.constants]
        path = next((self.paths[id(x)] for x in leaves if id(x) in self.paths), None) if func in WEIGHTED else None
        number = len(self.kept) if len(outputs) == 1 else None
        module = None if path is None else self.model.get_submodule(path)
        axes = [-1 if module is None else _channel_axis(module, x) for x in (*inputs[:1], *outputs[:1])]
        use = _Use(path, func in HOMOGENEOUS and len(inputs) == 1, axes[0] if axes else -1, number, axes[-1] if axes else -1)
        for x in inputs:
            self.uses.setdefault(self.numbers.get(id(x)), []).append(use)
        for x in outputs:
            self.numbers[id(x)] = len(self.kept)
            self.kept.append(x)

    def pairs(self) -> list[Pair]:
        """Return the pairs found."""
        runs = [use for uses in self.uses.values() for use in uses if use.path is not None]
        once = {use.path for use in runs if sum(other.path == use.path for other in runs) == 1} - self.shared
        found = []
        for use in runs:
            if use.path not in once or not _scalable(self.model.get_submodule(str(use.path))):
                continue
            end = use
            while (end is use or end.passes) and end.out is not None and len(self.uses.get(end.out, [])) == 1:
                end = self.uses[end.out][0]
            if end is not use and end.path in once and isinstance(self.model.get_submodule(str(end.path)), QUANTIZABLE):
                found += [Pair(str(use.path), str(end.path))] if end.input_axis == use.output_axis else []
        return found


def _owners(model: nn.Module) -> tuple[dict[int, str], set[str]]:
    """Return the path of each layer and BatchNorm by the id of its weight, and the paths that share one."""
    paths: dict[int, str] = {}
    shared: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, (*QUANTIZABLE, BatchNorm)) and isinstance(module.weight, nn.Parameter):
            if id(module.weight) in paths:
                shared |= {path, paths[id(module.weight)]}
            paths[id(module.weight)] = path
    return paths, shared


def _scalable(source: nn.Module) -> bool:
    """Say whether a layer's or a BatchNorm's output channels can be divided by changing its parameters."""
    return isinstance(source, QUANTIZABLE) or (isinstance(source, BatchNorm) and source.affine)
