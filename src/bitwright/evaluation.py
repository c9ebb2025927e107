"""How good a network is: accuracy with its interval, per class, and paired comparisons of two networks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bitwright.data.splits import Split, check_labels
from bitwright.errors import DataError, TrainingError

Z95 = 1.959963984540054


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a classifier does on a split; every accuracy is a fraction in 0 … 1.

    ``interval`` is Wilson's 95 % for top1; ``loss`` the mean cross-entropy in nats; ``per_class`` the accuracy of each
    class (None where the split has no image of it); ``top5`` None for 5 outputs or fewer; ``correct`` bool [n], in the
    order of the split, for `paired_difference`.
    """

    top1: float
    top5: float | None
    n: int
    loss: float
    interval: tuple[float, float]
    per_class: tuple[float | None, ...]
    correct: Tensor

    def to_dict(self) -> dict[str, object]:
        """Return all but ``correct`` as JSON-able values."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "n": self.n,
            "loss": self.loss,
            "interval": list(self.interval),
            "per_class": list(self.per_class),
        }


def evaluate(model: nn.Module, split: Split, *, batch_size: int = 500) -> Evaluation:
    """Run a classifier over a split, in the evaluation view and on the device the model is on.

    The model runs in eval mode and every training flag is put back.

    Raises:
        DataError: labels that the model has no output for, or outputs that are not one row of logits an image.
        TrainingError: logits that are not finite.
    """
    anchor = next(model.parameters(), torch.empty(0))
    logits, labels = [], []
    with _evaluating(model):
        for x, y in split.batches(batch_size):
            out = model(x.to(anchor.device))
            if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(y):
                found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
                raise DataError(f"evaluation: the model gives {found} for {len(y)} images; a classifier gives one row of logits an image")
            logits.append(out.float().cpu())
            labels.append(y.cpu())
    return score(torch.cat(logits), torch.cat(labels), split.classes)


def score(logits: Tensor, labels: Tensor, classes: int) -> Evaluation:
    """Turn logits [n, k] and labels int64 [n] into an `Evaluation`; raises as `evaluate` does.

    >>> score(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]), 2).per_class
    (1.0, 0.0)
    """
    wrong = (~torch.isfinite(logits)).any(1).nonzero().flatten()
    if len(wrong):
        found = f"the logits of image {int(wrong[0])} (and {len(wrong) - 1} more of {len(logits)}) are nan or infinite"
        raise TrainingError(f"evaluation: {found}; the network's weights or scales have diverged: lower the learning rate")
    check_labels(labels, logits.shape[1], "evaluation")
    n, outputs = logits.shape
    correct = logits.argmax(1) == labels
    counts, hits = (torch.bincount(y, minlength=classes).tolist() for y in (labels, labels[correct]))
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item() if outputs > 5 else None
    return Evaluation(
        top1=int(correct.sum()) / n,
        top5=top5,
        n=n,
        loss=float(nn.functional.cross_entropy(logits.double(), labels)),
        interval=wilson(int(correct.sum()), n),
        per_class=tuple(hit / count if count else None for hit, count in zip(hits, counts, strict=True)),
        correct=correct,
    )


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927); it stays in 0 … 1 and is right for few trials too.

    centre ± z/(1+z²/n) · √(p(1-p)/n + z²/4n²), centre = (p + z²/2n)/(1+z²/n).

    >>> [round(bound, 4) for bound in wilson(9, 10)]
    [0.5958, 0.9821]
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} trials; need 0 ≤ successes ≤ trials and at least one trial")
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class PairedDifference:
    """The accuracy of one network minus another's on the same images, as fractions, with its 95 % bootstrap interval."""

    difference: float
    interval: tuple[float, float]
    n: int

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval[0] > 0 or self.interval[1] < 0


def paired_difference(a: Evaluation, b: Evaluation, *, seed: int = 0, samples: int = 10_000) -> PairedDifference:
    """Compare two networks on the same images, by bootstrap over the images.

    Resampling images with replacement only changes how often each of the three outcomes (only a right, only b right, the
    same) comes up, so it is drawn as a multinomial, which is the same distribution and costs nothing.

    Raises:
        DataError: the two were evaluated on different numbers of images.
    """
    if a.n != b.n:
        raise DataError(f"compare: one evaluation has {a.n} images and the other {b.n}; evaluate both on the same split")
    gains, losses = int((a.correct & ~b.correct).sum()), int((~a.correct & b.correct).sum())
    outcomes = [gains / a.n, losses / a.n, (a.n - gains - losses) / a.n]
    draws = np.random.default_rng(seed).multinomial(a.n, outcomes, size=samples)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / a.n, [0.025, 0.975])
    return PairedDifference((gains - losses) / a.n, (float(low), float(high)), a.n)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without gradients for a while, and every module's flag back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
