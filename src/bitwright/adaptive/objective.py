"""What an adaptive network's training asks of a batch: each sample's loss and cost at drawn decisions, and its loss at given ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.adaptive.network import AdaptiveNet
from bitwright.adaptive.relaxations import Draw
from bitwright.training.finetune import FinetuneOptions

Asked = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def sample_losses(net: AdaptiveNet, training: FinetuneOptions) -> Callable[..., Asked]:
    """Return a function of a batch and its draws.

    It gives each sample's loss, its share of the budget, the size of its scores, the log-probability of its choices (zero unless widths are
    drawn), and in the mode ``probing`` the choices with one neighbour and that neighbour's gate.
    """
    half, kind = training.precision == "bfloat16", next(net.parameters()).device.type

    def losses(x: Tensor, y: Tensor, draw: Draw, condition: Tensor | None, site: Tensor) -> Asked:
        with torch.autocast(kind, torch.bfloat16, enabled=half):
            logits = net(x, draw=draw, condition=condition).float()
        task = F.cross_entropy(logits, y, label_smoothing=training.label_smoothing, reduction="none")
        logp = net.log_probability() if net.mode == "drawn" else torch.zeros_like(task)
        other, gate = net.changed(site) if net.mode == "probing" else (net.taken(), torch.zeros_like(task))
        return task, net.spent(), net.score_size(), logp, other, gate

    return losses


def forced_losses(net: AdaptiveNet, training: FinetuneOptions) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a function that gives each sample's loss at the choices it is told."""
    half, kind = training.precision == "bfloat16", next(net.parameters()).device.type

    def losses(x: Tensor, y: Tensor, forced: Tensor) -> Tensor:
        with torch.autocast(kind, torch.bfloat16, enabled=half):
            logits = net(x, forced=forced).float()
        return F.cross_entropy(logits, y, label_smoothing=training.label_smoothing, reduction="none")

    return losses


__all__ = ["forced_losses", "sample_losses"]
