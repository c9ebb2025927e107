"""Corruptions: seeded by sample, within 0 … 1, for images of every size; and what is said of bad input."""

import importlib.util

import pytest
import torch

from bitwright.data import CORRUPTIONS, corrupt
from bitwright.data.corruptions import COMMON, DETERMINISTIC
from bitwright.data.corruptions.draws import Draws
from bitwright.data.corruptions.ice import KINDS, ice
from bitwright.data.corruptions.noise import _quantiles
from bitwright.data.corruptions.spatter import distances, equalized
from bitwright.errors import DataError

IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SEEDS = torch.tensor([0, 1, 2, 2**62, -5, 1])
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])


def smooth(size, channels=3, n=2):
    generator = torch.Generator().manual_seed(size)
    coarse = torch.rand(n, channels, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")


def test_there_are_nineteen():
    assert len(CORRUPTIONS) == len(set(CORRUPTIONS)) == 19
    assert len(COMMON) == 15
    assert set(CORRUPTIONS) - set(COMMON) == {"speckle_noise", "gaussian_blur", "spatter", "saturate"}


@pytest.mark.parametrize("severity", [1, 5])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_sample_does_not_depend_on_its_batch(name, severity):
    whole = corrupt(IMAGES, name, severity, seeds=SEEDS)
    for index in ([0], [5], [4, 2, 1]):
        assert torch.equal(corrupt(IMAGES[index], name, severity, seeds=SEEDS[index]), whole[index])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_seed_repeats_and_another_differs(name):
    same = IMAGES[:1].expand(2, -1, -1, -1)
    one, other = corrupt(same, name, 5, seeds=[7, 8])
    assert torch.equal(one, corrupt(same, name, 5, seeds=[7, 7])[1])
    assert torch.equal(one, other) == (name in DETERMINISTIC)


@pytest.mark.parametrize(("size", "channels"), [((8, 8), 1), ((28, 28), 1), ((20, 37), 3), ((100, 90), 3), ((1, 5), 1)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_size(name, size, channels):
    images = torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(1))
    for severity in (1, 4, 5):  # 4 and 5 are mud, the others water
        result = corrupt(images, name, severity, seeds=[3, 4])
        assert result.shape == images.shape
        assert result.isfinite().all()
        assert 0 <= result.min() <= result.max() <= 1


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"saturate", "glass_blur", "elastic_transform", "spatter", "frost", "snow"}))
def test_a_higher_severity_is_worse(name, size):
    images = smooth(size, n=1)
    images = (images + 0.2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    errors = [float((corrupt(images, name, severity, seeds=[1]) - images).square().mean()) for severity in (1, 3, 5)]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1]


def test_the_images_are_left_alone():
    before = IMAGES.clone()
    for name in CORRUPTIONS:
        result = corrupt(IMAGES, name, 3, seeds=SEEDS)
        assert result.data_ptr() != IMAGES.data_ptr()
    assert torch.equal(before, IMAGES)
    assert corrupt(IMAGES.double(), "fog", 1, seeds=SEEDS).dtype == torch.float64


def test_black_white_and_flat_images():
    for level in (0.0, 1.0, 0.5):
        images = torch.full((1, 3, 32, 32), level)
        for name in CORRUPTIONS:
            assert corrupt(images, name, 5, seeds=[0]).isfinite().all()
    assert corrupt(torch.zeros(1, 3, 4, 4), "brightness", 1, seeds=[0]).unique().tolist() == pytest.approx([0.05])


@pytest.mark.parametrize("device", [GPU])
def test_a_gpu_draws_the_same(device):
    images = smooth(32, n=4)
    for name in CORRUPTIONS:
        here, there = (corrupt(images.to(place), name, 4, seeds=range(4)).cpu() for place in ("cpu", device))
        assert (here - there).abs().mean() < 1e-3


@pytest.mark.parametrize(
    ("images", "name", "severity", "seeds", "message"),
    [
        (IMAGES * 2, "fog", 1, SEEDS, r"image 0 has the value 1\.\d+; give pixels in 0 … 1, before they are normalised"),
        (IMAGES - 1, "fog", 1, SEEDS, r"image 0 has the value -0\.\d+; give pixels in 0 … 1"),
        (IMAGES.where(IMAGES < 0.9999, torch.nan), "fog", 1, SEEDS, r"image \d has values that are nan; mend or leave out that image"),
        ((IMAGES * 255).byte(), "fog", 1, SEEDS, r"a tensor of torch.uint8; give a float tensor .* \(divide bytes by 255\)"),
        (IMAGES.numpy(), "fog", 1, SEEDS, "images are a ndarray; give a float tensor"),
        (IMAGES[0], "fog", 1, SEEDS, "images have shape 3x32x32; give N x channels x height x width with 1 or 3 channels"),
        (IMAGES.permute(0, 2, 3, 1), "fog", 1, SEEDS, "images have shape 6x32x32x3"),
        (IMAGES[:0], "fog", 1, SEEDS[:0], "images have shape 0x3x32x32"),
        (IMAGES, "fog", 6, SEEDS, r"severity 6 of fog; severities are the whole numbers 1 \(mild\) to 5"),
        (IMAGES, "fog", 0, SEEDS, "severity 0 of fog"),
        (IMAGES, "fog", True, SEEDS, "severity True of fog"),
        (IMAGES, "fog", 1.5, SEEDS, "severity 1.5 of fog"),
        (IMAGES, "gausian_noise", 1, SEEDS, "no corruption 'gausian_noise'; did you mean 'gaussian_noise'?"),
        (IMAGES, "fog", 1, [1, 2], r"seeds are torch.int64 of shape \(2,\) for 6 images; give one integer for each image"),
        (IMAGES, "fog", 1, SEEDS.float(), "seeds are torch.float32"),
    ],
)
def test_bad_input(images, name, severity, seeds, message):
    with pytest.raises(DataError, match=message):
        corrupt(images, name, severity, seeds=seeds)


def test_jpeg_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs Pillow, which is not installed; type `pip install 'bitwright\[images\]'`"):
        corrupt(IMAGES, "jpeg_compression", 1, seeds=SEEDS)


def test_draws_are_spread_evenly_and_do_not_hang_together():
    draws = Draws.of(torch.arange(200))
    uniform, normal = draws.uniform(3, (500,)), draws.normal(4, (500,))
    assert 0 < uniform.min() < uniform.max() < 1
    counts = torch.histc(uniform, 20, 0, 1)
    assert ((counts - 5000).square() / 5000).sum() < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001
    assert normal.mean().abs() < 0.02
    assert normal.var() == pytest.approx(1, abs=0.02)
    assert normal.pow(4).mean() == pytest.approx(3, abs=0.15)
    for field in (uniform - 0.5, normal):  # neither do neighbours, nor one seed with the next, nor one stream with another
        scaled = field / field.std()
        assert (scaled[:, 1:] * scaled[:, :-1]).mean().abs() < 0.02
        assert (scaled[1:] * scaled[:-1]).mean().abs() < 0.02
        assert (scaled * draws.normal(5, (500,))).mean().abs() < 0.02
    assert sorted(draws.integers(6, (50,), -2, 2).unique().tolist()) == [-2, -1, 0, 1]


def test_seeds_that_differ_above_32_bits_differ():
    low, high = (Draws.of(torch.tensor([seed])).words(0, (8,)) for seed in (5, 5 + 2**40))
    assert not torch.equal(low, high)


@pytest.mark.parametrize("photons", [3, 60, 500])
def test_photon_counts_are_quantiles_of_poisson(photons):
    from scipy.stats import poisson

    level = torch.tensor([0, 1, 7, 40, 128, 255]).repeat_interleave(200)
    share = torch.rand(len(level), generator=torch.Generator().manual_seed(photons)).clamp(1e-6, 1 - 1e-6)
    expected = poisson.ppf(share.double().numpy(), level.numpy() * photons / 255)
    assert (_quantiles(photons, level, share).numpy() == expected).mean() > 0.999


def test_shot_noise_between_grey_levels_keeps_mean_and_variance():
    images = torch.full((40, 1, 32, 32), 0.3 / 255 + 0.5)
    noisy = corrupt(images, "shot_noise", 5, seeds=range(40))
    assert noisy.mean() == pytest.approx(images.mean().item(), rel=0.005)
    assert noisy.var() == pytest.approx(images.mean().item() / 50, rel=0.03)


@pytest.mark.parametrize("scale", ["small", "large"])
def test_ice_has_the_colours_of_the_photographs(scale):
    draws = Draws.of(torch.arange(12))
    frozen = ice(draws, (90, 90), scale)
    kinds = torch.tensor(KINDS[scale])[draws.integers(33, (), 0, 5)]
    assert len(kinds.unique(dim=0)) > 2
    assert (frozen.mean((2, 3)) - kinds[:, :3]).abs().max() < 0.02
    assert (frozen.std((2, 3)) - kinds[:, 3:]).abs().max() < 0.02


def test_distances_and_equalization():
    points = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    points[..., 4, 4] = True
    far = distances(points, 3)[0, 0]
    assert far[4, 4:].tolist() == pytest.approx([0, 1, 2, 3, 3])
    assert far[5, 5] == pytest.approx(2**0.5)
    assert distances(torch.zeros_like(points), 3).unique().tolist() == [3]
    levels = torch.tensor([[0.0, 0.0, 1.0, 3.0]]).view(1, 1, 2, 2)
    assert equalized(levels).flatten().tolist() == [0, 0, 128, 255]
    assert equalized(torch.full((1, 1, 2, 2), 9.0)).unique().tolist() == [9]
