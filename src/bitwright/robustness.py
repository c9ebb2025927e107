"""Accuracy under conditions: clean, corrupted, mixed; and such an accuracy as a goal at which a training or a search stops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.data.corruptions import COMMON, DETERMINISTIC, SEVERITIES
from bitwright.data.quality import TEST_SEED, Condition, Mix, MixedSplit, parse_conditions
from bitwright.data.splits import Split
from bitwright.errors import DataError, TrainingError
from bitwright.evaluation import BATCH, evaluate, wilson


@dataclass(frozen=True)
class Accuracy:
    """An accuracy over images and, of each, over draws or conditions.

    Attributes:
        top1: the mean, a fraction.
        interval: 95 %, over images: what is drawn for an image belongs to it and makes no further one.
        n: images.
    """

    top1: float
    interval: tuple[float, float]
    n: int

    @classmethod
    def of(cls, shares: Tensor) -> Accuracy:
        """Take the mean over images [n], each right in a share of its draws or conditions.

        Wilson's interval for as many images as would vary as much as these do: right or wrong throughout, those are all of
        them; right now and then, more.

        >>> Accuracy.of(torch.arange(100) % 10 != 0).interval == wilson(90, 100)
        True
        """
        n, top1 = len(shares), float(shares.double().mean())
        variance = float(shares.double().var(correction=0))
        once = bool(((shares == 0) | (shares == 1)).all())
        worth = n if once or variance == 0 else n * top1 * (1 - top1) / variance
        return cls(top1, wilson(top1 * worth, worth), n)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return {"top1": self.top1, "interval": list(self.interval), "n": self.n}


@dataclass(frozen=True, eq=False)
class Measured:
    """A network under one condition.

    Attributes:
        condition: which.
        accuracy: over all images and seeds.
        by_severity: the same of a mix by the severity that an image had, 0 for clean; empty for any other condition.
        seeds: how many draws of the corruption there were.
        correct: bool [seeds, images], in the order of the split.
    """

    condition: Condition
    accuracy: Accuracy
    by_severity: Mapping[int, Accuracy]
    seeds: int
    correct: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Return all but ``correct`` as JSON-able values."""
        severities = {str(severity): accuracy.to_dict() for severity, accuracy in self.by_severity.items()}
        named = {"condition": str(self.condition), **self.accuracy.to_dict(), "seeds": self.seeds}
        return {**named, "by_severity": severities} if severities else named


@dataclass(frozen=True, eq=False)
class Robustness:
    """A network under several conditions, and what they come to.

    Attributes:
        measured: one for each condition, in the order they were asked for.
    """

    measured: tuple[Measured, ...]

    @property
    def corrupted(self) -> tuple[Measured, ...]:
        """Those of one corruption and severity."""
        return tuple(one for one in self.measured if one.condition.severity is not None)

    @property
    def mean_corruption(self) -> Accuracy | None:
        """The mean over corruptions of the mean over their severities; None if no corruption was measured.

        Its interval is over images, for these corruptions; Hendrycks and Dietterich (2019) divide errors by AlexNet's, which
        is not done here: this is the plain accuracy, as it is usually told for CIFAR-10-C.
        """
        groups: dict[str, list[Tensor]] = {}
        for one in self.corrupted:
            groups.setdefault(one.condition.name, []).append(one.correct.double().mean(0))
        if not groups:
            return None
        return Accuracy.of(torch.stack([torch.stack(rows).mean(0) for rows in groups.values()]).mean(0))

    @property
    def severities(self) -> dict[int, Accuracy]:
        """The mean over the corruptions that were measured at each severity."""
        found: dict[int, list[Tensor]] = {}
        for one in self.corrupted:
            found.setdefault(one.condition.severity or 0, []).append(one.correct.double().mean(0))
        return {severity: Accuracy.of(torch.stack(rows).mean(0)) for severity, rows in sorted(found.items())}

    @property
    def worst_severity(self) -> int | None:
        """The severity of the lowest mean accuracy; None if no corruption was measured."""
        table = self.severities
        return min(table, key=lambda severity: table[severity].top1, default=None)

    @property
    def worst(self) -> Measured | None:
        """The corruption and severity of the lowest accuracy."""
        return min(self.corrupted, key=lambda one: one.accuracy.top1, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values: what evaluation.json holds of each network under ``quality``."""
        mean, worst = self.mean_corruption, self.worst
        conditions = {(one.condition.name, one.condition.severity) for one in self.corrupted}
        names = {name for name, _ in conditions}
        whole = names == set(COMMON) and len(conditions) == len(COMMON) * len(SEVERITIES)
        summary = None if mean is None else {**mean.to_dict(), "corruptions": len(names), "all_common": whole}
        return {
            "conditions": [one.to_dict() for one in self.measured],
            "mean_corruption_accuracy": summary,
            "severities": {str(severity): accuracy.to_dict() for severity, accuracy in self.severities.items()},
            "worst_severity": self.worst_severity,
            "worst_condition": None if worst is None else str(worst.condition),
        }


def measure(
    model: nn.Module,
    split: Split,
    conditions: str | Sequence[str | Condition],
    *,
    seeds: Sequence[int] = (0,),
    mix: Mix | None = None,
    batch_size: int = BATCH,
) -> Robustness:
    """Evaluate a classifier under conditions, each image corrupted before it is normalised.

    Args:
        model: static or input-adaptive; it sees images alone.
        split: images; of a split of mixed quality, those that it was made of.
        conditions: ``clean``, ``mixed``, ``held_out``, ``NAME:SEVERITY``, or ``NAME`` for all five severities.
        seeds: each draws every corruption anew; conditions that draw nothing are evaluated once.
        mix: of ``mixed`` and ``held_out``; by default that of the split, else `Mix` as it stands.
        batch_size: images at once.

    Raises:
        DataError: an unknown condition, no seed, or pixels outside 0 … 1.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise DataError(f"conditions: seeds are {list(seeds)}; give at least one, each once")
    chosen = mix or (split.mix if isinstance(split, MixedSplit) else Mix())
    asked = _conditions(conditions)
    return Robustness(tuple(_measured(model, split, condition, seeds, chosen, batch_size) for condition in asked))


def _conditions(conditions: str | Sequence[str | Condition]) -> tuple[Condition, ...]:
    """Return conditions, of which some may be text."""
    return parse_conditions(conditions if isinstance(conditions, str) else [str(condition) for condition in conditions])


def _measured(model: nn.Module, split: Split, condition: Condition, seeds: Sequence[int], mix: Mix, size: int) -> Measured:
    if condition.name == "clean" or condition.name in DETERMINISTIC:
        seeds = seeds[:1]
    views = [condition.split(split, mix, TEST_SEED + seed) for seed in seeds]
    correct = torch.stack([evaluate(model, view, batch_size=size).correct for view in views])
    return Measured(condition, Accuracy.of(correct.double().mean(0)), dict(_by_severity(condition, views, correct)), len(seeds), correct)


def _by_severity(condition: Condition, views: Sequence[Split], correct: Tensor) -> Iterator[tuple[int, Accuracy]]:
    """Yield, of a mix, the accuracy of the images that had each severity, each judged by the draws in which it did."""
    if condition.severity is not None:
        return
    found = [view.quality.severity for view in views if isinstance(view, MixedSplit)]
    if not found:
        return
    severity = torch.stack(found)
    for value in sorted(set(severity.flatten().tolist())):
        had = severity == value
        some = had.any(0)
        yield int(value), Accuracy.of((correct & had).sum(0)[some] / had.sum(0)[some])


@dataclass(frozen=True)
class Goal:
    """An accuracy at a quality that is to be reached: read from ``CONDITION>=ACCURACY``.

    Attributes:
        condition: under which the accuracy is taken.
        accuracy: a fraction.
        mix: of ``mixed`` and ``held_out``.

    >>> goal = Goal.parse("gaussian_noise:3>=0.8")
    >>> str(goal.condition), goal.accuracy
    ('gaussian_noise:3', 0.8)
    """

    condition: Condition
    accuracy: float
    mix: Mix = field(default_factory=Mix)

    @classmethod
    def parse(cls, text: str, mix: Mix | None = None) -> Goal:
        """Read a goal; raises `TrainingError` for one that cannot be read, `DataError` for an unknown condition."""
        left, sign, right = text.partition(">=")
        try:
            accuracy = float(right)
        except ValueError:
            accuracy = math.nan
        if not sign or not 0 < accuracy <= 1:
            raise TrainingError(f"stop_at is '{text}'; give a condition and a fraction, for example gaussian_noise:3>=0.80 or clean>=0.9")
        conditions = parse_conditions(left)
        if len(conditions) != 1:
            raise TrainingError(f"stop_at is '{text}'; give the one severity of '{left.strip()}' that counts, for example {left.strip()}:3")
        return cls(conditions[0], accuracy, mix or Mix())

    def measure(self, model: nn.Module, split: Split) -> float:
        """Return the accuracy of a classifier on a split under the condition."""
        mix = split.mix if isinstance(split, MixedSplit) else self.mix
        return measure(model, split, [self.condition], mix=mix).measured[0].accuracy.top1


__all__ = ["Accuracy", "Goal", "Measured", "Robustness", "measure"]
