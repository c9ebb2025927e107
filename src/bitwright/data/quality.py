"""Images of mixed quality: which corruptions, at which severities and how often, and splits whose samples carry them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bitwright.data.corruptions import CORRUPTIONS, SEVERITIES, check_corruption, check_images, corrupt, is_severity
from bitwright.data.sources import Data
from bitwright.data.splits import Split, check_index
from bitwright.errors import DataError, nearest

TEST_SEED = 0
"""The test images of a mix are corrupted by this seed, whatever the seed of a run."""
HELD_OUT = ("shot_noise", "motion_blur", "fog", "elastic_transform")
"""Corruptions held out where a mix names none."""
WHOLE = ("clean", "mixed", "held_out")
"""The conditions that name no corruption."""


@dataclass(frozen=True)
class Mix:
    """How often an image is clean, and which corruption and severity it has otherwise.

    The default is our reconstruction of mixed-quality data for DQMQ, whose own is not public: a quarter each clean and of
    severities 1, 3 and 5, over five families of corruptions (two have two members).

    Attributes:
        corruptions: names and how often each comes, relative to the others; a sequence of names means equally often.
        severities: the same of severities 1 … 5.
        clean: share of the images left alone, 0 … 1.
        held_out: corruptions that come in the test condition ``held_out`` alone; none of them may be trained on. By default a noise, a
            blur, a weather and a digital one (`HELD_OUT`), less those that are trained on.

    Raises:
        DataError: an unknown corruption or severity, a share that is none, or a held-out corruption that is trained on.
    """

    corruptions: Mapping[str, float] | Sequence[str] = field(
        default_factory=lambda: {
            "gaussian_noise": 1.0,
            "gaussian_blur": 0.5,
            "defocus_blur": 0.5,
            "jpeg_compression": 1.0,
            "pixelate": 1.0,
            "contrast": 0.5,
            "brightness": 0.5,
        }
    )
    severities: Mapping[int, float] | Sequence[int] = field(default_factory=lambda: {1: 1.0, 3: 1.0, 5: 1.0})
    clean: float = 0.25
    held_out: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        corruptions, severities = shares_of("corruptions", self.corruptions), shares_of("severities", self.severities)
        free = [name for name in HELD_OUT if name not in corruptions]
        held_out = tuple(shares_of("held_out", free if self.held_out is None else self.held_out))
        for name, value in (("corruptions", corruptions), ("severities", severities), ("held_out", held_out)):
            object.__setattr__(self, name, value)
        for name in (*corruptions, *held_out):
            check_corruption(name, 1)
        wrong = [severity for severity in severities if not is_severity(severity)]
        if wrong:
            raise DataError(f"quality: severity {wrong[0]!r}; severities are the whole numbers 1 (mild) to 5")
        both = [name for name in held_out if name in corruptions]
        if both:
            raise DataError(f"quality: '{both[0]}' is held out and among the corruptions; leave it out of one of them")
        if not isinstance(self.clean, (int, float)) or not 0 <= self.clean <= 1:
            raise DataError(f"quality: clean is {self.clean!r}; give the share of images left as they are, 0 to 1")
        for what, shares in (("corruptions", corruptions), ("severities", severities)):
            if not shares or not all(isinstance(share, (int, float)) and 0 < share < float("inf") for share in shares.values()):
                raise DataError(f"quality: {what} are {shares}; give at least one, each with a share above 0")

    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what may come: corruption (its place in `CORRUPTIONS`, -1 for clean), severity (0) and probability, [K] each."""
        kinds = [(-1, 0, self.clean)]
        corruptions, severities = shares_of("corruptions", self.corruptions), shares_of("severities", self.severities)
        most = sum(corruptions.values()) * sum(severities.values())
        for name, often in corruptions.items():
            for severity, share in severities.items():
                kinds.append((CORRUPTIONS.index(name), severity, (1 - self.clean) * often * share / most))
        places, levels, chances = zip(*kinds, strict=True)
        return torch.tensor(places), torch.tensor(levels), torch.tensor(chances, dtype=torch.float64)

    def held(self) -> Mix:
        """Return the mix of the held-out corruptions, at the same severities and none clean; raises `DataError` if there are none."""
        if not self.held_out:
            raise DataError("conditions: held_out was asked for and the mix holds out no corruption; name some in data.quality.held_out")
        return Mix(self.held_out, self.severities, 0.0, ())


def shares_of(what: str, given: object) -> dict[Any, float]:
    """Return how often each of some corruptions or severities comes; those of a sequence come equally often.

    Raises:
        DataError: it is neither a mapping nor a sequence of names or numbers, or one is given twice.

    >>> shares_of("corruptions", ["fog", "snow"]), shares_of("severities", {3: 0.5})
    ({'fog': 1.0, 'snow': 1.0}, {3: 0.5})
    """
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, (list, tuple)) or not all(isinstance(one, (str, int, float)) for one in given):
        raise DataError(f"quality: {what} are {given!r}; give a list, all equally often, or a mapping to how often each comes")
    if len(set(map(str, given))) < len(given):
        raise DataError(f"quality: {what} are {list(given)} and one is given twice; give each once, or a mapping to how often each comes")
    return dict.fromkeys(given, 1.0)


@dataclass(frozen=True, eq=False)
class Quality:
    """What was done to samples: for whoever evaluates; a network never sees it.

    Attributes:
        corruption: int64 [n], the place in `CORRUPTIONS`, -1 for a clean image.
        severity: int64 [n], 0 for a clean image.
        seeds: int64 [n], what each was drawn from.
    """

    corruption: Tensor
    severity: Tensor
    seeds: Tensor

    def __getitem__(self, index: Tensor) -> Quality:
        """Return the quality of some samples (int64 [m])."""
        return Quality(self.corruption[index], self.severity[index], self.seeds[index])

    @property
    def names(self) -> list[str]:
        """The corruption of each sample by name, or ``clean``."""
        return ["clean" if place < 0 else CORRUPTIONS[place] for place in self.corruption.tolist()]

    @classmethod
    def draw(cls, mix: Mix, count: int, generator: torch.Generator) -> Quality:
        """Return what ``count`` samples get.

        >>> Quality.draw(Mix({"fog": 1}, {2: 1}, clean=0), 3, torch.Generator()).names
        ['fog', 'fog', 'fog']
        """
        device = generator.device
        shares = torch.rand(count, generator=generator, device=device, dtype=torch.float64).cpu()
        seeds = torch.randint(2**62, (count,), generator=generator, device=device).cpu()
        corruption, severity, chance = mix.table()
        edges = (chance.cumsum(0) / chance.sum())[:-1]
        chosen = torch.searchsorted(edges, shares, right=True)
        return cls(corruption[chosen], severity[chosen], seeds)


def degrade(images: Tensor, quality: Quality) -> Tensor:
    """Return images, float [N, C, H, W] in 0 … 1, each corrupted as its quality says; clean ones are left bit for bit."""
    result = images.clone()
    codes = torch.where(quality.corruption < 0, -1, quality.corruption * 8 + quality.severity)
    for code in sorted(set(codes.tolist()) - {-1}):
        rows = (codes == code).nonzero().flatten()
        here = rows.to(images.device)
        result[here] = corrupt(images[here], CORRUPTIONS[code // 8], code % 8, seeds=quality.seeds[rows])
    return result


class MixedSplit(Split):
    """A split whose images are corrupted by a mix, before they are normalised.

    In the evaluation view each position has its quality for good; in the training view all of it is drawn afresh from the
    generator of the batch, so a training repeats, and resumes, bit for bit. Augmentation comes first.

    Args:
        base: the images.
        mix: what is done to them.
        seed: of the evaluation view.

    Attributes:
        base: the images as they were.
        quality: what each position has in the evaluation view.

    Raises:
        DataError: (at use) the pixels of the split are not in 0 … 1 before they are normalised.

    >>> from bitwright.data import TensorSplit
    >>> split = MixedSplit(TensorSplit(torch.rand(9, 1, 8, 8), torch.arange(9)), Mix({"contrast": 1}, {5: 1}, clean=0), seed=0)
    >>> x, y = split.batch(torch.arange(9))
    >>> split.quality.names[0], bool(x.std() < 0.1)
    ('contrast', True)
    """

    def __init__(self, base: Split, mix: Mix, seed: int, *, _quality: Quality | None = None):
        self.base, self.mix, self.seed, self.classes = base, mix, seed, base.classes
        self.quality = _quality or Quality.draw(mix, len(base), torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.base)

    def subset(self, index: Tensor) -> MixedSplit:
        """Return the split of some positions (int64 [n]), each as it was here."""
        chosen = self.quality[check_index(index, len(self)).cpu()]
        return MixedSplit(self.base.subset(index), self.mix, self.seed, _quality=chosen)

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return images [n, C, H, W] and labels [n]; see `Split.batch`."""
        x, y, _ = self.labelled(index, generator)
        return x, y

    def labelled(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Quality]:
        """Return images, labels and the quality of each."""
        pixels, y = self.base.pixels(index, generator)
        check_images(pixels)
        quality = self.quality[index.cpu()] if generator is None else Quality.draw(self.mix, len(index), generator)
        return self.base.normalise(degrade(pixels, quality)), y, quality

    def pixels(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return the images before they are normalised, corrupted."""
        raise DataError("quality: a split of mixed quality cannot be corrupted once more; take its `base`")


def mixed(data: Data, mix: Mix, seed: int) -> Data:
    """Return a data set of mixed quality; ``seed`` decides that of fit and selection, that of test is always the same."""
    fit, selection = (MixedSplit(split, mix, 2 * seed + k) for k, split in enumerate((data.fit, data.selection)))
    return replace(data, fit=fit, selection=selection, test=MixedSplit(data.test, mix, TEST_SEED))


@dataclass(frozen=True)
class Condition:
    """What images are evaluated under: ``clean``, ``mixed``, ``held_out``, or a corruption at a severity.

    >>> str(Condition("fog", 3)), str(Condition("clean"))
    ('fog:3', 'clean')
    """

    name: str
    severity: int | None = None

    def __str__(self) -> str:
        return self.name if self.severity is None else f"{self.name}:{self.severity}"

    def split(self, split: Split, mix: Mix, seed: int) -> Split:
        """Return a split under this condition: images that were mixed already are taken as they were before."""
        base = split.base if isinstance(split, MixedSplit) else split
        if self.name == "clean":
            return base
        if self.name == "mixed":
            return MixedSplit(base, mix, seed)
        if self.name == "held_out":
            return MixedSplit(base, mix.held(), seed)
        assert self.severity is not None
        return MixedSplit(base, Mix({self.name: 1.0}, {self.severity: 1.0}, 0.0, ()), seed)


def parse_conditions(texts: str | Sequence[str]) -> tuple[Condition, ...]:
    """Read conditions: ``clean``, ``mixed``, ``held_out``, ``NAME:SEVERITY``, or ``NAME`` for all five severities.

    Raises:
        DataError: an unknown name, a severity that is none, or nothing at all.

    >>> [str(condition) for condition in parse_conditions("clean,gaussian_noise:3,mixed")]
    ['clean', 'gaussian_noise:3', 'mixed']
    """
    parts = texts.split(",") if isinstance(texts, str) else texts
    if not any(part.strip() for part in parts):
        raise DataError("conditions: none given; give for example clean,gaussian_noise:3,mixed")
    found: list[Condition] = []
    for text in parts:
        name, colon, severity = text.strip().partition(":")
        if name in WHOLE and not colon:
            found.append(Condition(name))
            continue
        if name not in CORRUPTIONS:
            raise DataError(f"conditions: no condition '{text.strip()}'; {nearest(name, (*WHOLE, *CORRUPTIONS))}")
        if colon and severity not in map(str, SEVERITIES):
            raise DataError(f"conditions: severity '{severity}' of {name}; give {name}:1 to {name}:5, or {name} for all five")
        found += [Condition(name, int(severity))] if colon else [Condition(name, each) for each in SEVERITIES]
    return tuple(dict.fromkeys(found))


__all__ = ["Condition", "Mix", "MixedSplit", "Quality", "degrade", "mixed", "parse_conditions", "shares_of"]
