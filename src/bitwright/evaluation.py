"""How good a network is: accuracy with its interval, per class, and paired comparisons over images and seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitwright.data.splits import Split, check_labels
from bitwright.errors import DataError, TrainingError

if TYPE_CHECKING:
    from bitwright.robustness import Robustness

Z95 = 1.959963984540054
BATCH = 100
"""Images at once in an evaluation: small enough for what a small network computes to stay in a CPU's cache."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a classifier does on a split; every accuracy is a fraction in 0 … 1.

    ``interval`` is Wilson's 95 % for top1; ``loss`` the mean cross-entropy in nats; ``per_class`` the accuracy of each
    class (None where the split has no image of it); ``top5`` None for 5 outputs or fewer; ``correct`` bool [n], in the
    order of the split, for `paired_difference`; ``robustness`` what it does under the conditions that were asked for.
    """

    top1: float
    top5: float | None
    n: int
    loss: float
    interval: tuple[float, float]
    per_class: tuple[float | None, ...]
    correct: Tensor
    robustness: Robustness | None = None

    def to_dict(self) -> dict[str, object]:
        """Return all but ``correct`` as JSON-able values."""
        quality = {} if self.robustness is None else {"quality": self.robustness.to_dict()}
        return {
            "top1": self.top1,
            "top5": self.top5,
            "n": self.n,
            "loss": self.loss,
            "interval": list(self.interval),
            "per_class": list(self.per_class),
            **quality,
        }


def evaluate(
    model: nn.Module, split: Split, *, conditions: str | Sequence[str] = (), seeds: Sequence[int] = (0,), batch_size: int = BATCH
) -> Evaluation:
    """Run a classifier over a split, in the evaluation view and on the device the model is on.

    The model runs in eval mode and every training flag is put back. The figures are those of the split as it is; with
    conditions, ``robustness`` has those of the same images under each of them.

    Args:
        model: gives one row of logits an image.
        split: the images.
        conditions: such as ``"clean,gaussian_noise:3,mixed"``; see `bitwright.robustness.measure`.
        seeds: of the corruptions.
        batch_size: images at once.

    Raises:
        DataError: labels that the model has no output for, outputs that are not one row of logits an image, an unknown condition.
        TrainingError: logits that are not finite.
    """
    if conditions:
        from bitwright.robustness import measure  # noqa: PLC0415  (it evaluates by this very function)

        robustness = measure(model, split, conditions, seeds=seeds, batch_size=batch_size)
        return replace(evaluate(model, split, batch_size=batch_size), robustness=robustness)
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


def wilson(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
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


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and test images, with its standard error and the degrees of freedom that the error has.

    Attributes:
        mean: the mean, a fraction.
        error: its standard error, from `over_seeds`.
        freedom: degrees of freedom of that error, for Student's t; infinite with one seed.
        seeds: how many trainings it was taken over.
        n: how many test images.
    """

    mean: float
    error: float
    freedom: float
    seeds: int
    n: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return mean ± t · error, with Student's t at ``freedom``; ``level`` is its coverage.

        >>> [round(bound, 4) for bound in Estimate(0.01, 0.004, 2.0, 3, 1000).interval()]
        [-0.0072, 0.0272]
        """
        from scipy.special import stdtrit  # noqa: PLC0415  (scipy is slow to import)

        half = self.error * float(stdtrit(self.freedom, 0.5 + level / 2)) if self.error else 0.0
        return self.mean - half, self.mean + half

    @property
    def p_value(self) -> float:
        """The two-sided p-value of a mean of zero.

        >>> round(Estimate(0.01, 0.004, 2.0, 3, 1000).p_value, 4), Estimate(0.0, 0.0, 2.0, 3, 1000).p_value
        (0.1296, 1.0)
        """
        from scipy.special import stdtr  # noqa: PLC0415  (scipy is slow to import)

        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * stdtr(self.freedom, -abs(self.mean) / self.error))


def over_seeds(correct: Sequence[Tensor], minus: Sequence[Tensor] | None = None, *, seed: int = 0, samples: int = 10_000) -> Estimate:
    """Estimate an accuracy, or the difference of two, over seeds and test images, by the pigeonhole bootstrap (Owen, 2007).

    Every draw resamples the seeds, and then the images that all drawn seeds are judged on: they are the same images for every
    seed, so an image that is hard is hard in all of them, and drawing it anew for each seed would make the answer look surer than it is.
    The standard error is the deviation of the draws. Two things mend what few seeds do to a bootstrap: the deviation of the drawn
    seeds' mean from that of all S is stretched by √(S/(S-1)), for resampling S values shrinks their variance by (S-1)/S; and the
    error is taken to have (S-1)·V/V_seeds degrees of freedom, where V is its square and V_seeds = s²/S the part that the
    differences between seeds make of it. (The Welch-Satterthwaite formula would take the square of V/V_seeds and finds differences that are
    not there more often than it says.) Where the noise of seeds is small, the error is too large rather than too small, as
    Owen shows of this bootstrap.

    Args:
        correct: per seed bool [n], which images a network has right (`Evaluation.correct`).
        minus: the same of another network, seed by seed: the estimate is then of the difference.
        seed: of the draws.
        samples: how many.

    Returns:
        The estimate; with one seed its error knows nothing of what another training would give.

    Raises:
        DataError: the numbers of seeds or images differ.

    >>> right = torch.arange(1000) % 10 != 0
    >>> estimate = over_seeds([right, right, right])  # seeds that agree add nothing: the error is √(0.9 · 0.1 / 1000)
    >>> round(estimate.mean, 6), abs(estimate.error - 0.0094868) < 2e-4
    (0.9, True)
    """
    values = _matrix(correct)
    if minus is not None:
        other = _matrix(minus)
        if other.shape != values.shape:
            raise DataError(f"compare: {_shape(values)} against {_shape(other)}; compare the same seeds on the same images")
        values = values - other
    seeds, n = values.shape
    draws = _draws(values, np.random.default_rng(seed), samples)
    variance, of_seeds = float(draws.var(ddof=1)), float(values.mean(1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    freedom = (seeds - 1) * max(1.0, variance / of_seeds) if of_seeds > 0 else math.inf
    return Estimate(float(values.mean()), math.sqrt(variance), freedom, seeds, n)


def _matrix(correct: Sequence[Tensor]) -> NDArray[np.float64]:
    """Return which images are right as [seed, image]."""
    lengths = {len(row) for row in correct}
    if len(lengths) != 1 or lengths == {0}:
        raise DataError(f"compare: the seeds have {sorted(lengths)} images; evaluate every seed on the same split")
    return np.stack([row.numpy() for row in correct]).astype(np.float64)


def _shape(values: NDArray[np.float64]) -> str:
    return f"{values.shape[0]} seeds of {values.shape[1]} images"


def _draws(values: NDArray[np.float64], generator: np.random.Generator, samples: int) -> NDArray[np.float64]:
    """Return bootstrap draws of the mean of [seed, image].

    Resampling images only changes how often each pattern over the seeds comes up: that is drawn, as a multinomial.
    """
    seeds, n = values.shape
    patterns, counts = np.unique(values, axis=1, return_counts=True)
    means = generator.multinomial(n, counts / n, size=samples) @ patterns.T / n
    centre = means.mean(1)
    if seeds == 1:
        return np.asarray(centre)
    chosen = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=samples)
    return np.asarray(centre + math.sqrt(seeds / (seeds - 1)) * ((chosen * means).sum(1) / seeds - centre))


@dataclass(frozen=True)
class Corrected:
    """One of several comparisons after Holm's correction.

    Attributes:
        estimate: the difference.
        p_value: corrected; below ``alpha`` it is significant.
        interval: at the level at which Holm's procedure judged this comparison, so that it leaves out zero exactly where the
            difference is significant.
        significant: whether it is.
    """

    estimate: Estimate
    p_value: float
    interval: tuple[float, float]
    significant: bool


def holm(p_values: Sequence[float], alpha: float = 0.05) -> list[tuple[float, float]]:
    """Correct p-values for how many there are (Holm, 1979); the chance of any false positive is then at most ``alpha``.

    The k-th smallest of m is multiplied by m - k + 1 and may not be below the one before it. Returned with each is the share of
    ``alpha`` that it was held against: alpha/(m - k + 1), and for those after the first that failed, the share at which that one failed.

    >>> [(round(p, 3), round(share, 4)) for p, share in holm([0.04, 0.01, 0.03])]
    [(0.06, 0.025), (0.03, 0.0167), (0.06, 0.025)]
    """
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    found: list[tuple[float, float]] = [(1.0, alpha)] * len(p_values)
    least, failed = 0.0, None
    for rank, k in enumerate(order):
        left = len(p_values) - rank
        least = max(least, min(1.0, left * p_values[k]))
        found[k] = (least, alpha / left if failed is None else failed)
        if least > alpha and failed is None:
            failed = alpha / left
    return found


def corrected(estimates: Sequence[Estimate], alpha: float = 0.05) -> list[Corrected]:
    """Judge several differences together by Holm's correction.

    >>> near, far = Estimate(0.01, 0.01, 9.0, 5, 1000), Estimate(0.05, 0.01, 9.0, 5, 1000)
    >>> [judged.significant for judged in corrected([near, far])]
    [False, True]
    """
    pairs = zip(estimates, holm([estimate.p_value for estimate in estimates], alpha), strict=True)
    return [Corrected(estimate, p, estimate.interval(1 - share), p <= alpha) for estimate, (p, share) in pairs]


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
