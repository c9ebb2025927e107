"""Every corruption beside an independent one: pixel by pixel where nothing is drawn, by the error it makes where something is."""

import csv
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import twins

from bitwright.data.corruptions import CORRUPTIONS, DETERMINISTIC, SEVERITIES, corrupt

RESULTS = Path(__file__).parents[2] / "results" / "corruptions-parity.csv"
RANDOM = [name for name in CORRUPTIONS if name not in DETERMINISTIC and name != "frost"]
MANY, FEW = 500, 100
SLOW = ("elastic_transform", "fog", "glass_blur", "motion_blur", "snow", "spatter")


@lru_cache
def photographs(n, size, channels=3):
    """Return coloured noise whose power falls with the square of frequency, as that of photographs does; whole 255ths."""
    generator = torch.Generator().manual_seed(size)
    waves = torch.fft.fftfreq(size).square()
    fall = (waves[:, None] + waves[None]).sqrt().clamp_min(1 / size)
    field = torch.fft.ifft2(torch.fft.fft2(torch.randn(n, channels, size, size, generator=generator)) / fall).real
    field = field + field.mean(1, keepdim=True)
    field = (field - field.mean((2, 3), keepdim=True)) / field.std((2, 3), keepdim=True)
    middle = torch.rand(n, 1, 1, 1, generator=generator) * 0.4 + 0.3
    return ((middle + 0.18 * field).clamp(0, 1) * 255).round() / 255


def twin(name, images, severity, scale):
    rng = np.random.default_rng(severity)
    rows = [getattr(twins, name)(x, severity, scale, rng) for x in images.permute(0, 2, 3, 1).double().numpy()]
    return torch.from_numpy(np.stack(rows)).clamp(0, 1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", sorted(DETERMINISTIC))
@pytest.mark.parametrize(("scale", "size", "channels"), [("small", 32, 3), ("small", 28, 1), ("large", 90, 3)])
def test_what_draws_nothing_gives_the_same_pixels(name, severity, scale, size, channels):
    images = photographs(1, size, channels)
    ours = corrupt(images, name, severity, seeds=[0])
    difference = (ours - twin(name, images, severity, scale)).abs()
    rounded = name == "pixelate"  # Pillow rounds to 8 bits twice
    assert 255 * difference.mean() < (0.6 if rounded else 0.01)
    assert 255 * difference.max() < (1.6 if rounded else 0.1)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", RANDOM)
def test_what_is_drawn_makes_the_same_error(name, severity):
    images = photographs(FEW if name in SLOW else MANY, 32)
    ours, theirs = corrupt(images, name, severity, seeds=range(len(images))), twin(name, images, severity, "small")
    own, other = ((x - images).square().mean() for x in (ours, theirs))
    assert own / other == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur"])
def test_large_images_too(name, severity):
    images = photographs(4, 90)
    ours, theirs = corrupt(images, name, severity, seeds=range(len(images))), twin(name, images, severity, "large")
    own, other = ((x - images).square().mean() for x in (ours, theirs))
    assert own / other == pytest.approx(1, abs=0.05)


def test_the_published_program_was_matched():
    """benchmarks/corruptions_parity.py compared all 19, at both sizes and every severity, with it on real images."""
    rows = list(csv.DictReader(RESULTS.open()))
    assert len(rows) == len({(row["corruption"], row["scale"], row["severity"]) for row in rows}) == len(CORRUPTIONS) * 2 * len(SEVERITIES)
    for row in rows:
        if row["kind"] == "deterministic":
            assert float(row["mean_absolute_difference_255"]) <= 2, row
        else:
            assert int(row["n"]) == 500
            assert 0.9 <= float(row["ratio"]) <= 1.1, row
