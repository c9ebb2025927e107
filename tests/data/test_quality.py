"""Mixed quality: what comes how often, that it repeats, and that a network sees pixels alone."""

import pytest
import torch
from test_folders import tree

from bitwright.data import CORRUPTIONS, DatasetSplit, Mix, MixedSplit, Quality, TensorSplit, corrupt, load_data, mixed, parse_conditions
from bitwright.data.quality import Condition
from bitwright.errors import DataError
from bitwright.training.finetune import draw_batch

EASY = Mix({"gaussian_noise": 3, "contrast": 1}, {1: 1, 4: 3}, clean=0.5, held_out=("fog",))


def images(n=60, **look):
    pixels = torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TensorSplit(pixels, torch.arange(n) % 10, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2), **look)


def test_shares_are_kept():
    quality = Quality.draw(EASY, 20_000, torch.Generator().manual_seed(1))
    noisy = quality.corruption == CORRUPTIONS.index("gaussian_noise")
    assert (quality.severity == 0).double().mean() == pytest.approx(0.5, abs=0.01)
    assert noisy.double().mean() == pytest.approx(0.375, abs=0.01)
    assert (noisy & (quality.severity == 4)).double().mean() == pytest.approx(0.375 * 0.75, abs=0.01)
    assert ((quality.severity == 0) == (quality.corruption < 0)).all()


def test_the_default_is_four_levels_alike():
    _, severity, chance = Mix().table()
    assert [float(chance[severity == level].sum()) for level in (0, 1, 3, 5)] == pytest.approx([0.25] * 4)
    assert not set(Mix().held_out or ()) & set(Mix().corruptions)
    assert "fog" not in (Mix({"fog": 1}).held_out or ())


def test_clean_images_are_left_bit_for_bit_and_the_others_corrupted_before_they_are_normalised():
    base = images()
    split = MixedSplit(base, EASY, seed=3)
    everything = torch.arange(60)
    x, y, quality = split.labelled(everything)
    plain, labels = base.batch(everything)
    assert torch.equal(y, labels)
    assert quality.names == split.quality.names
    clean = quality.severity == 0
    assert 0 < clean.sum() < 60
    assert torch.equal(x[clean], plain[clean])
    k = int((~clean).nonzero()[0])
    pixels = base.pixels(torch.tensor([k]))[0]
    expected = corrupt(pixels, quality.names[k], int(quality.severity[k]), seeds=quality.seeds[k : k + 1])
    assert torch.equal(x[k : k + 1], base.normalise(expected))


def test_the_evaluation_view_is_fixed_and_subsets_keep_it():
    split = MixedSplit(images(), EASY, seed=3)
    x, _ = split.batch(torch.arange(60))
    assert torch.equal(x, torch.cat([part for part, _ in MixedSplit(images(), EASY, seed=3).batches(7)]))
    assert not torch.equal(x, MixedSplit(images(), EASY, seed=4).batch(torch.arange(60))[0])
    some = torch.tensor([50, 3, 17])
    part = split.subset(some)
    assert torch.equal(part.batch(torch.tensor([0, 2]))[0], x[[50, 17]])
    assert part.quality.names == [split.quality.names[k] for k in some]
    assert len(split.take(5)) == 5


def test_training_draws_afresh_and_repeats_step_by_step():
    split = MixedSplit(images(augment="crop-flip"), EASY, seed=0)
    first = draw_batch(split, 0, 6, 10, seed=1)[0]
    assert torch.equal(first, draw_batch(split, 0, 6, 10, seed=1)[0])
    generator = torch.Generator().manual_seed(0)
    drawn = [split.labelled(torch.arange(60), generator)[2].names for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_augmentation_is_that_of_the_split_below():
    base, mix = images(augment="crop-flip"), Mix({"fog": 1}, {1: 1}, clean=1.0)
    x, _ = MixedSplit(base, mix, seed=0).batch(torch.arange(20), torch.Generator().manual_seed(5))
    assert torch.equal(x, base.batch(torch.arange(20), torch.Generator().manual_seed(5))[0])


def test_data_of_mixed_quality():
    plain = load_data("digits", held_out=100, seed=0)
    one, other = mixed(plain, EASY, seed=0), mixed(plain, EASY, seed=1)
    assert one.test.quality.names == other.test.quality.names
    assert one.fit.quality.names != other.fit.quality.names
    assert one.fit.quality.names[:100] != one.selection.quality.names
    assert one.shape == plain.shape
    assert one.example(4).shape == (4, 1, 8, 8)


def test_folders_of_images(tmp_path):
    tree(tmp_path / "train", ant=3, cat=3)
    tree(tmp_path / "val", ant=1, cat=1)
    plain = load_data("folder", tmp_path, held_out=2, seed=0, crop=32, resize=32)
    data = mixed(plain, Mix({"jpeg_compression": 1}, {5: 1}, clean=0.0), seed=0)
    pixels, _ = plain.fit.pixels(torch.arange(4))
    assert torch.equal(plain.fit.normalise(pixels), plain.fit.batch(torch.arange(4))[0])
    expected = corrupt(pixels, "jpeg_compression", 5, seeds=range(4))
    assert torch.equal(data.fit.batch(torch.arange(4))[0], plain.fit.normalise(expected))
    assert data.fit.batch(torch.arange(4), torch.Generator().manual_seed(0))[0].shape == (4, 3, 32, 32)


def test_a_batch_has_no_third_part():
    assert len(MixedSplit(images(), EASY, seed=0).batch(torch.arange(2))) == 2


def test_a_dataset_gives_pixels_or_is_refused():
    items = [(torch.rand(3, 8, 8), k) for k in range(4)]
    split = MixedSplit(DatasetSplit(items, classes=4), Mix({"fog": 1}, {1: 1}, clean=0), seed=0)
    assert split.batch(torch.arange(4))[0].shape == (4, 3, 8, 8)
    normalised = MixedSplit(DatasetSplit([(x * 4 - 2, k) for x, k in items], classes=4), Mix({"fog": 1}, {1: 1}, clean=0), seed=0)
    with pytest.raises(DataError, match="give pixels in 0 … 1, before they are normalised"):
        normalised.batch(torch.arange(4))
    with pytest.raises(DataError, match="cannot be corrupted once more; take its `base`"):
        split.pixels(torch.arange(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corruptions": {"fgo": 1}}, "no corruption 'fgo'; did you mean 'fog'"),
        ({"held_out": ("frosty",)}, "no corruption 'frosty'; did you mean 'frost'"),
        ({"severities": {6: 1}}, r"quality: severity 6; severities are the whole numbers 1 \(mild\) to 5"),
        ({"clean": 1.5}, "clean is 1.5; give the share of images left as they are, 0 to 1"),
        ({"corruptions": {}}, "corruptions are {}; give at least one, each with a share above 0"),
        ({"severities": {1: 0}}, "severities are {1: 0}; give at least one"),
        ({"corruptions": {"fog": 1}, "held_out": ("fog",)}, "'fog' is held out and among the corruptions"),
        ({"corruptions": ["fog"], "clean": "a"}, "clean is 'a'; give the share of images left as they are, 0 to 1"),
        ({"corruptions": "fog"}, "corruptions are 'fog'; give a list, all equally often, or a mapping to how often each comes"),
        ({"corruptions": 3}, "corruptions are 3; give a list"),
        ({"corruptions": [["fog"]]}, r"corruptions are \[\['fog'\]\]; give a list"),
        ({"corruptions": [3]}, "no corruption '3'"),
        ({"severities": 3}, "severities are 3; give a list"),
        ({"severities": ["3"]}, "severity '3'; severities are the whole numbers 1"),
        ({"held_out": "fog"}, "held_out are 'fog'; give a list"),
        ({"corruptions": ("fog", "fog")}, r"corruptions are \['fog', 'fog'\] and one is given twice; give each once"),
    ],
)
def test_a_mix_that_cannot_be(arguments, message):
    with pytest.raises(DataError, match=message):
        Mix(**arguments)


def test_a_sequence_comes_equally_often():
    mix = Mix(["fog", "snow"], (2, 4), clean=0.5, held_out=["frost"])
    assert mix == Mix({"fog": 1.0, "snow": 1.0}, {2: 1.0, 4: 1.0}, clean=0.5, held_out=("frost",))
    assert mix.table()[2].tolist() == [0.5, 0.125, 0.125, 0.125, 0.125]
    assert "fog" not in Mix(["fog"]).held_out


def test_conditions():
    assert [str(c) for c in parse_conditions("clean, fog:3 ,mixed,held_out,clean")] == ["clean", "fog:3", "mixed", "held_out"]
    assert [c.severity for c in parse_conditions(["fog"])] == [1, 2, 3, 4, 5]
    split = MixedSplit(images(), EASY, seed=0)
    assert Condition("clean").split(split, EASY, 0) is split.base
    assert set(Condition("held_out").split(split, EASY, 0).quality.names) == {"fog"}
    assert set(Condition("fog", 2).split(split, EASY, 0).quality.severity.tolist()) == {2}
    assert Condition("mixed").split(split, EASY, 0).quality.names == split.quality.names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foggy", "no condition 'foggy'; did you mean 'fog'"),
        ("clean:2", "no condition 'clean:2'"),
        ("fog:6", "severity '6' of fog; give fog:1 to fog:5, or fog for all five"),
        ("fog:", "severity '' of fog"),
        ([], "conditions: none given; give for example clean,gaussian_noise:3,mixed"),
        (" ", "conditions: none given"),
        ([""], "conditions: none given"),
        ("clean,,mixed", "no condition ''"),
    ],
)
def test_conditions_that_are_none(text, message):
    with pytest.raises(DataError, match=message):
        parse_conditions(text)


def test_nothing_held_out_cannot_be_asked_for():
    with pytest.raises(DataError, match=r"holds out no corruption; name some in data\.quality\.held_out"):
        Mix(held_out=()).held()


def test_clean_images_out_of_range_and_broken_shares_are_named() -> None:
    split = MixedSplit(TensorSplit(torch.full((2, 1, 8, 8), 200.0), torch.zeros(2, dtype=torch.int64)), Mix(clean=1.0), seed=0)
    with pytest.raises(DataError, match="image 0 has the value 200; give pixels in 0 … 1"):
        split.batch(torch.arange(2))
    with pytest.raises(DataError, match=r"severity 3\.0"):
        Mix({"contrast": 1}, {3.0: 1})  # type: ignore[dict-item]
    with pytest.raises(DataError, match="give at least one, each with a share above 0"):
        Mix({"contrast": "x"}, {3: 1})  # type: ignore[dict-item]
    with pytest.raises(DataError, match=r"severity 3\.0"):
        corrupt(torch.zeros(1, 1, 8, 8), "contrast", 3.0, seeds=[0])  # type: ignore[arg-type]
