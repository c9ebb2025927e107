"""Class margins: how far a classifier's features lie from its decision boundaries."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bitwright.data.splits import Split
from bitwright.errors import SiteError
from bitwright.quant.modules import evaluating


def class_margins(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Return every sample's distance to the nearest decision boundary of a linear classifier, negative where it is wrong.

    :math:`m_i = \min_{j \neq y_i} \frac{(W_{y_i} - W_j) z_i + c_{y_i} - c_j}{\|W_{y_i} - W_j\|}`
    (Elsayed et al., "Large margin deep networks for classification", 2018, eq. 4, at the last layer, where it is exact).

    Args:
        features: ``[N, D]``.
        labels: int64 ``[N]``.
        weight: ``[classes, D]``.
        bias: ``[classes]`` or None.

    Returns:
        Margins ``[N]``, in the units of the features; infinite where there is only one class, and so no boundary.

    >>> class_margins(torch.tensor([[3.0, 0.0]]), torch.tensor([0]), torch.eye(2))
    tensor([2.1213])
    """
    logits = features @ weight.T if bias is None else features @ weight.T + bias
    gaps = logits.gather(1, labels[:, None]) - logits
    away = torch.cdist(weight, weight)[labels].clamp_min(1e-12)
    distances = (gaps / away).scatter(1, labels[:, None], math.inf)
    return distances.min(1).values


def features_of(network: nn.Module, layer: str, split: Split) -> tuple[Tensor, Tensor]:
    """Return what enters a layer on the images of a split, ``[N, features]``, and the labels, both on the CPU.

    Raises:
        SiteError: the layer sees more than one vector an image, such as one a token.
    """
    device = next(network.parameters()).device
    seen: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().float().cpu()))
    labels = []
    try:
        with torch.no_grad(), evaluating(network):
            for x, y in split.batches(256):
                network(x.to(device))
                labels.append(y.cpu())
    finally:
        handle.remove()
    if seen[0].dim() != 2:
        shape = tuple(seen[0].shape[1:])
        raise SiteError(f"layer '{layer}' sees features of shape {shape} for an image; pool them to one vector before the classifier")
    return torch.cat(seen), torch.cat(labels)


def margins_of(network: nn.Module, layer: str, split: Split) -> Tensor:
    """Return the class margin of every image of a split, ``[N]``, over the spread of the features, so that networks compare.

    Args:
        network: any network, quantized or not.
        layer: path of its linear classifier.
        split: labelled images.
    """
    z, y = features_of(network, layer, split)
    head = network.get_submodule(layer)
    bias = head.bias.detach().float().cpu() if isinstance(head.bias, Tensor) else None
    spread = (z - z.mean(0)).square().sum(1).mean().sqrt().clamp_min(1e-12)
    return class_margins(z, y, head.get_parameter("weight").detach().float().cpu(), bias) / spread
