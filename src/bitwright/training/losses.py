"""Losses of the fine-tuning: distillation and entropy-aware bin regularization."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bitwright.quant.modules import QuantLayer, named_quant_layers
from bitwright.quant.quantizers import WeightQuantizer

Reduction = Literal["sum", "mean"]


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Return the soft cross-entropy :math:`-\sum_k p_k^T \log p_k^S`, averaged over the batch, at temperature 1.

    SDQ (Huang et al., 2022) fine-tunes with a teacher's soft labels; that there is no hard-label term is read from the
    same group's later code (reconstructed).

    Args:
        student: logits ``[N, classes]``.
        teacher: logits ``[N, classes]``; no gradient flows into them.

    >>> distillation(torch.zeros(1, 2), torch.zeros(1, 2))
    tensor(0.6931)
    """
    return -(teacher.detach().softmax(1) * student.log_softmax(1)).sum(1).mean()


def bin_regularization(weight: Tensor, quantizer: WeightQuantizer, *, reduction: Reduction = "sum") -> Tensor:
    r"""Pull the latent weights of each quantization bin to their level.

    :math:`\mathrm{MSE}(w^q, \mathrm{clip}(w)) + \sum_n \mathrm{Var}(w_n)`, the variance over the bins n with at least two
    members (Han et al., "Improving low-precision network quantization via bin regularization", 2021, eq. 5, in the form of
    the SDQ authors' later code). A weight counts by its distance from its level, so that channels with step sizes of their
    own can share the bins of their layer; with one step size for all, that is the published variance.

    Args:
        weight: latent weights.
        quantizer: gives the levels.
        reduction: ``"mean"`` as published; ``"sum"`` weighs the error and each variance by the number of weights, halved,
            so that a weight's pull does not shrink with the size of its layer (as for weight decay). Ours.

    Returns:
        0-dimensional tensor; the levels get no gradient.

    >>> from bitwright.quant.quantizers import LSQWeight
    >>> on_grid = torch.tensor([[-2.0, -1.0, 0.0, 1.0]])
    >>> float(bin_regularization(on_grid, LSQWeight(on_grid, 2, rule="minmax")))
    0.0
    """
    with torch.no_grad():
        value, step = quantizer(weight), quantizer.step(weight)
        bins = torch.round(value / step * 2).to(torch.int64)
        bins = (bins - bins.min()).flatten()
    off = (quantizer.clip(weight) - value).flatten()
    count, total, squares = (torch.zeros(1024, dtype=off.dtype, device=off.device) for _ in range(3))
    count = count.index_add(0, bins, torch.ones_like(off))
    total, squares = total.index_add(0, bins, off), squares.index_add(0, bins, off.square())
    members = count.clamp_min(1)
    variance = (squares - total.square() / members) / (count - 1).clamp_min(1)
    mean: Tensor = off.square().mean() + torch.where(count > 1, variance, 0.0).sum()
    weighed: Tensor = 0.5 * (off.square().sum() + torch.where(count > 1, variance * count, 0.0).sum())
    return mean if reduction == "mean" else weighed


def bins_weight(progress: float, most: float, start: float) -> float:
    """Return the weight of the bin regularization: none before ``start``, then a cosine rise to ``most``.

    The schedule is that of the SDQ authors' later code (start 0.25); progress is the share of training done.

    >>> [round(bins_weight(p, 1.0, 0.25), 2) for p in (0.0, 0.25, 0.625, 1.0)]
    [0.0, 0.0, 0.5, 1.0]
    """
    if progress <= start:
        return 0.0
    return most * 0.5 * (1 - math.cos(math.pi * (progress - start) / (1 - start)))


class BinStatistics(NamedTuple):
    """How the latent weights of a layer lie in their bins.

    Attributes:
        bits: weight width.
        variance: mean squared distance to the level, in squared steps (1/12 if spread evenly).
        entropy: entropy of how the levels are used, in bits; at most ``bits``.
    """

    bits: int
    variance: float
    entropy: float


def bin_statistics(model: nn.Module) -> dict[str, BinStatistics]:
    """Return the in-bin variance and the entropy of bin occupancy of every quantized layer.

    >>> from bitwright.policy import Policy
    >>> from bitwright.quant import quantize
    >>> bin_statistics(quantize(nn.Sequential(nn.Linear(64, 8)), Policy({"0": (2, 32)})))["0"].entropy <= 2
    True
    """
    layers = ((name, layer, layer.weight_quantizer) for name, layer in named_quant_layers(model))
    return {name: _statistics(layer, quantizer) for name, layer, quantizer in layers if quantizer is not None}


def _statistics(layer: QuantLayer, quantizer: WeightQuantizer) -> BinStatistics:
    """Return the statistics of one layer."""
    with torch.no_grad():
        value, step = quantizer(layer.weight), quantizer.step(layer.weight)
        variance = float(((quantizer.clip(layer.weight) - value) / step).square().mean())
        _, counts = torch.unique(torch.round(value / step * 2), return_counts=True)
        share = counts / counts.sum()
        return BinStatistics(layer.bits.w, variance, float(-(share * share.log2()).sum()))


def margin_ratio(features: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    r"""Return how large classes are against how far apart: the large-margin regularizer of SEAM, reconstructed.

    :math:`L_M = \frac{\mathrm{mean}_i \|z_i - \mu_{y_i}\|^2}{\mathrm{mean}_i\,\mathrm{mean}_{j \neq y_i} \|z_i - \mu_j\|^2}`:
    intra-class compactness over inter-class separation, a Fisher-type ratio, which does not change with the scale of the
    features and so needs no weight of its own. That SEAM (Tang et al., 2023) keeps both is published; their form is not.

    Args:
        features: ``[N, D]``, what enters the classifier.
        labels: int64 ``[N]``.
        centres: of the classes, ``[classes, D]``; no gradient enters them.

    Returns:
        0-dimensional: 0 where every sample lies on its class's centre, about 1 where classes do not differ. Of fewer than two classes it
        says nothing, and is 0.

    >>> margin_ratio(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.tensor([[0.0, 0.0], [3.0, 0.0]]))
    tensor(0.2500)
    """
    if len(centres) < 2:
        return features.new_zeros(())
    distances = (features[:, None] - centres.detach()[None]).square().sum(2)
    own = distances.gather(1, labels[:, None])[:, 0]
    others = (distances.sum(1) - own) / (len(centres) - 1)
    return own.mean() / others.mean().clamp_min(1e-12)
