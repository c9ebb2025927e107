r"""BatchNorm folded into the layer before it: evaluation computes the same, and a runtime has one layer to run instead of two.

With :math:`\alpha = \gamma/\sqrt{\sigma^2+\epsilon}`, a layer of weight W and bias b followed by a BatchNorm is a layer of weight
:math:`\alpha W` and bias :math:`\alpha(b-\mu)+\beta` (Jacob et al., 2018, eq. 14).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bitwright.quant.modules import CONVOLUTIONS, QUANTIZABLE, TRANSPOSED, evaluating, replace_module

WEIGHTED = (*CONVOLUTIONS.values(), *TRANSPOSED.values(), F.linear)
LOOKS = ("__get__", "dim", "size", "numel", "is_floating_point", "stride", "is_contiguous")
"""What reads a tensor's form and not its values."""


class Folded(nn.Identity):
    """Stands where a BatchNorm was that is now part of the layer before it."""


def fold_batchnorms(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy in which each BatchNorm that follows a layer, and nothing else reads that layer, is part of it.

    Args:
        model: float network.
        example: an input; the network runs on it once, to see what follows what.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
    >>> fold_batchnorms(net, torch.zeros(1, 1, 2, 2))
    Sequential(
      (0): Conv2d(1, 2, kernel_size=(1, 1), stride=(1, 1))
      (1): Folded()
    )
    """
    result = copy.deepcopy(model)
    for layer, norm in find_norms(result, example):
        _fold(cast(nn.Conv2d, result.get_submodule(layer)), cast(BatchNorm, result.get_submodule(norm)))
        replace_module(result, norm, Folded())
    return result


def find_norms(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Return (layer, BatchNorm) of each pair that can be folded, by path."""
    readers = _Readers()
    norms: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, BatchNorm) and module.running_mean is not None:
                stack.callback(module.register_forward_pre_hook(partial(_enter, readers, norms, path)).remove)
            elif isinstance(module, QUANTIZABLE):
                stack.callback(module.register_forward_hook(partial(_leave, readers, path)).remove)
        with torch.no_grad(), evaluating(model), readers:
            outputs = model(example[:2])
    last = {id(x) for x in tree_leaves(outputs)}
    pairs = []
    for norm, inputs in norms.items():
        found = {readers.made.get(id(x)) for x in inputs}
        layer = found.pop() if len(found) == 1 and len(inputs) == 1 else None
        alone = layer is not None and readers.calls[layer] == 1 and readers.reads[id(inputs[0])] == 1
        if layer is not None and alone and id(inputs[0]) not in last:
            pairs.append((layer, norm))
    return pairs


def _enter(readers: _Readers, norms: dict[str, list[Tensor]], path: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    norms.setdefault(path, []).append(args[0])


def _leave(readers: _Readers, path: str, _: nn.Module, args: Any, output: Tensor) -> None:
    readers.made[id(output)] = path
    readers.calls[path] = readers.calls.get(path, 0) + 1


class _Readers(TorchFunctionMode):
    """Counts the functions that read each tensor, and keeps all tensors alive so that none takes another's place."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[int, int] = {}
        self.made: dict[int, str] = {}
        self.calls: dict[str, int] = {}
        self.alive: list[object] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in LOOKS:
            for x in tree_leaves((args, kwargs or {})):
                if isinstance(x, Tensor):
                    self.reads[id(x)] = self.reads.get(id(x), 0) + 1
        self.alive.append(out)
        return out


def _fold(layer: nn.Conv2d, norm: BatchNorm) -> None:
    """Put a BatchNorm into a layer, in place; in double precision, rounded once."""
    alpha, beta = affine_of(norm)
    weight, bias = layer.weight, layer.bias
    axis = 1 if getattr(layer, "transposed", False) else 0
    groups = int(getattr(layer, "groups", 1))
    with torch.no_grad():
        if axis == 0:
            scaled = weight.double() * alpha.view(-1, *[1] * (weight.dim() - 1))
        else:  # [inputs, outputs of a group, …]: the groups lie along the inputs
            split = weight.double().view(groups, weight.shape[0] // groups, *weight.shape[1:])
            scaled = (split * alpha.view(groups, 1, -1, *[1] * (weight.dim() - 2))).view(weight.shape)
        weight.copy_(scaled)
        before = torch.zeros_like(beta) if bias is None else bias.double()
        layer.bias = nn.Parameter((alpha * before + beta).to(weight.dtype))


def affine_of(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return (alpha, beta) in double precision, so that evaluation is x·alpha + beta."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean.detach().double(), norm.running_var.detach().double()
    gain = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double()
    shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    alpha = gain / (var + norm.eps).sqrt()
    return alpha, shift - mean * alpha
