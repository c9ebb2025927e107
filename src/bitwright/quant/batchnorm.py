"""BatchNorm statistics of a quantized network, corrected with the float network as control variate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

Statistics = dict[str, tuple[Tensor, Tensor]]


def batchnorms(model: nn.Module) -> dict[str, BatchNorm]:
    """Return the BatchNorm modules that keep running statistics, by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BatchNorm) and m.running_mean is not None}


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of each channel of a batch ``[N, C, …]``.

    >>> statistics(torch.tensor([[1.0], [3.0]]))
    (tensor([2.]), tensor([1.]))
    """
    axes = [k for k in range(x.dim()) if k != 1]
    mean = x.mean(axes, keepdim=True)
    return mean.flatten(), (x - mean).square_().mean(axes)  # Tensor.var costs as much as the convolution before it


def shift(module: BatchNorm, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> None:
    """Shift running statistics by what changed between two batches' mean and variance; see `correct_batchnorm`."""
    if module.running_mean is None or module.running_var is None:
        return
    with torch.no_grad():
        module.running_mean += after[0] - before[0]
        module.running_var *= after[1].clamp_min(1e-12) / before[1].clamp_min(1e-12)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[Statistics]:
    """Normalise by the batch and record each BatchNorm's input mean and variance; running statistics stay as they are."""
    seen: Statistics = {}
    modules = batchnorms(model)
    saved = {name: (m.training, m.momentum, m.num_batches_tracked) for name, m in modules.items()}
    handles = []
    for name, module in modules.items():

        def record(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            seen[name] = statistics(args[0])

        handles.append(module.register_forward_pre_hook(record))
        module.training, module.momentum, module.num_batches_tracked = True, 0.0, None
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for name, module in modules.items():
            module.training, module.momentum, module.num_batches_tracked = saved[name]


def collect(model: nn.Module, images: Tensor) -> Statistics:
    """Return the statistics of one forward pass in which every BatchNorm normalises by the batch."""
    with torch.no_grad(), batch_statistics(model) as seen:
        model(images)
    return seen


def correct_batchnorm(quantized: nn.Module, reference: nn.Module, images: Tensor, known: Statistics | None = None) -> None:
    r"""Shift the running statistics of a quantized network by what quantization changed on the same images.

    :math:`\mu \leftarrow \mu + \mu_q - \mu_f`, :math:`\sigma^2 \leftarrow \sigma^2\,\sigma_q^2/\sigma_f^2`, where q and f
    are the quantized and the float network on one batch: the batch's own sampling error cancels, which plain
    re-estimation does not do (control variates, e.g. Glasserman, 2003, §4.1).

    Args:
        quantized: network to correct in place; both networks in evaluation mode.
        reference: float network with BatchNorm modules at the same paths.
        images: one batch of inputs.
        known: the reference's statistics on these images, where they are at hand.
    """
    before = known if known is not None else collect(reference, images)
    after = collect(quantized, images)
    for name, module in batchnorms(quantized).items():
        if name in before and name in after:
            shift(module, before[name], after[name])
