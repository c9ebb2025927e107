"""Image folders: views, determinism, and one clear line for each kind of bad folder."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bitwright.data import FolderSplit
from bitwright.data.folders import crop_box, scan_folder
from bitwright.errors import DataError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(width=20, height=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def make(n=4, **options):
    look = {"crop": 8, "resize": 8, "mean": (0.0,) * 3, "std": (1.0,) * 3} | options
    return FolderSplit([png(picture(seed=i)) for i in range(n)], torch.arange(n) % 2, classes=2, **look)


def test_the_evaluation_view_is_scaled_and_centred():
    square = picture(8, 8)
    look = {"crop": 8, "resize": 8, "mean": (0, 0, 0), "std": (1, 1, 1)}
    x, y = FolderSplit([png(square)], torch.tensor([1]), classes=2, **look).batch(torch.tensor([0]))
    assert torch.equal(x[0], torch.from_numpy(square).permute(2, 0, 1).float() / 255)
    assert y.tolist() == [1]
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 255
    cut = FolderSplit([png(wide)], torch.tensor([0]), classes=1, **look).batch(torch.tensor([0]))[0]
    assert cut.min() == 1
    scaled = FolderSplit([png(picture(40, 60))], torch.tensor([0]), classes=1, crop=16, resize=20).batch(torch.tensor([0]))[0]
    assert scaled.shape == (1, 3, 16, 16)


def test_the_training_view_depends_on_the_generator_alone():
    split, index = make(), torch.tensor([2, 0, 3])
    first = split.batch(index, generator(1))[0]
    assert first.shape == (3, 3, 8, 8)
    assert torch.equal(first, split.batch(index, generator(1))[0])
    assert torch.equal(first, make(workers=3).batch(index, generator(1))[0])
    assert not torch.equal(first, split.batch(index, generator(2))[0])


def test_half_of_the_training_images_are_mirrored():
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 64, 3)).copy()
    split = FolderSplit([png(ramp)], torch.tensor([0]), classes=1, crop=8, resize=8)
    x, _ = split.batch(torch.zeros(200, dtype=torch.long), generator())
    mirrored = (x[:, 0, 0, 0] > x[:, 0, 0, -1]).float().mean()
    assert 0.4 < mirrored < 0.6


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.lists(st.floats(0, 0.999999), min_size=40, max_size=40))
def test_a_crop_stays_in_the_image(width, height, draws):
    left, top, w, h = crop_box((width, height), draws, 0.08)
    assert 0 <= left <= left + w <= width
    assert 0 <= top <= top + h <= height
    assert min(w, h) >= 1


def test_grey_and_transparent_files_become_rgb():
    for mode in ("L", "RGBA", "P"):
        out = io.BytesIO()
        Image.fromarray(picture(8, 8)).convert(mode).save(out, "PNG")
        split = FolderSplit([out.getvalue()], torch.tensor([0]), classes=1, crop=8, resize=8)
        assert split.batch(torch.tensor([0]))[0].shape == (1, 3, 8, 8)


def test_subsets_nest():
    split = make(5).subset(torch.tensor([4, 1, 3])).subset(torch.tensor([2, 0]))
    assert torch.equal(split.batch(torch.arange(2))[0], make(5).batch(torch.tensor([3, 4]))[0])
    assert split.batch(torch.arange(2))[1].tolist() == [1, 0]
    with pytest.raises(DataError, match="in a split of 2"):
        split.subset(torch.tensor([2]))


def tree(root, **classes):
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(png(picture(seed=i)))


def test_a_folder_is_listed_in_order(tmp_path):
    tree(tmp_path / "train", cat=2, ant=1)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("x")
    (tmp_path / "train" / ".hidden").mkdir()
    tree(tmp_path / "val", cat=1)
    files, labels, names = scan_folder(tmp_path / "train")
    assert [file.parent.name for file in files] == ["ant", "cat", "cat"]
    assert labels.tolist() == [0, 1, 1]
    assert names == ["ant", "cat"]
    assert scan_folder(tmp_path / "val", names)[1].tolist() == [1]


def test_bad_folders_are_one_clear_line(tmp_path):
    with pytest.raises(DataError, match=r"none: no such folder; images are expected as .*none/<class>/<image>\.jpg"):
        scan_folder(tmp_path / "none")
    with pytest.raises(DataError, match="has no folders of images"):
        scan_folder(tmp_path)
    tree(tmp_path / "train", cat=1, dog=0)
    with pytest.raises(DataError, match=r"dog: has no images"):
        scan_folder(tmp_path / "train")
    with pytest.raises(DataError, match="cat: a class that the training images do not have; did you mean 'cats'"):
        scan_folder(tmp_path / "train", ["cats"])


def test_files_that_are_no_images_are_named(tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_text("hello")
    with pytest.raises(DataError, match=r"bad\.jpg: cannot be decoded \(not an image\); restore or remove it"):
        FolderSplit([bad], torch.tensor([0]), classes=1).batch(torch.tensor([0]))
    with pytest.raises(DataError, match="image 0 of the pack: cannot be decoded"):
        FolderSplit([png(picture())[:60]], torch.tensor([0]), classes=1).batch(torch.tensor([0]))
    with pytest.raises(DataError, match=r"none\.jpg: cannot be decoded \(.*No such file"):
        FolderSplit([tmp_path / "none.jpg"], torch.tensor([0]), classes=1).batch(torch.tensor([0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 9}, "crop 9, resize 8.*give 1 ≤ crop ≤ resize"),
        ({"area": 0.0}, "area 0.0"),
        ({"workers": 0}, "workers 0"),
        ({"mean": (0.5,)}, "1 and 3 numbers for 3 channels"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(DataError, match=message):
        make(**options)


def test_labels_must_fit():
    with pytest.raises(DataError, match="1 labels for 2 image files"):
        FolderSplit([b"", b""], torch.tensor([0]), classes=1)
    with pytest.raises(DataError, match="label 5 and there are 2 classes"):
        FolderSplit([b""], torch.tensor([5]), classes=2)
