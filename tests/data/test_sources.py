"""The named data sets: splits, layouts, and what to type when something is missing."""

import os

import numpy as np
import pytest
import torch
from test_folders import tree
from test_packs import idx, pixels, write_pack
from torch import nn

from bitwright.data import TensorSplit, available_data, check_model, load_data
from bitwright.data.sources import Data
from bitwright.errors import DataError, RecipeError


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", held_out=300, seed=1)


def rows(split):
    return {x.numpy().tobytes() for x, _ in split.batches(1)}


def test_the_parts_of_digits_do_not_overlap(digits):
    fit, selection, test = rows(digits.fit), rows(digits.selection), rows(digits.test)
    assert len(fit | selection | test) == len(fit) + len(selection) + len(test)
    assert digits.example(3).shape == (3, 1, 8, 8)


def test_the_test_split_does_not_depend_on_the_seed(digits):
    other = load_data("digits", held_out=300, seed=2)
    assert torch.equal(next(other.test.batches(450))[0], next(digits.test.batches(450))[0])
    assert not torch.equal(next(other.selection.batches(300))[0], next(digits.selection.batches(300))[0])
    again = load_data("digits", held_out=300, seed=1, augment="crop", mean=[0.5])
    assert torch.equal(next(again.selection.batches(300))[1], next(digits.selection.batches(300))[1])


def test_the_first_images_of_a_part_are_a_random_sample(digits):
    assert len(set(next(digits.selection.take(60).batches(60))[1].tolist())) == 10


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("digit", {}, RecipeError, "data.name: no data set 'digit'; did you mean 'digits'"),
        ("digits", {"agument": "crop"}, RecipeError, "no option 'agument' for digits; did you mean 'augment'"),
        ("digits", {"mean": "x"}, RecipeError, r"data.options.mean: 'x'; give something like \(0.305,\)"),
        ("digits", {"pad": 1.5}, RecipeError, "data.options.pad: 1.5; give something like 1"),
        ("digits", {"pad": True}, RecipeError, "data.options.pad: True"),
        ("digits", {"held_out": 0}, DataError, "data.held_out: 0 of 1347 training images of digits; give 1 to 1346"),
        ("digits", {"held_out": 1347}, DataError, "give 1 to 1346"),
        ("cifar10", {}, DataError, "cifar10 needs a data root, .*; type `--data-root DIR` or set BITWRIGHT_DATA"),
        ("folder", {}, DataError, "--data-root DIR"),
    ],
)
def test_what_to_type_instead(name, options, error, message):
    with pytest.raises(error, match=message) as caught:
        load_data(name, **({"held_out": 10, "seed": 0} | options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "imagenette224", "folder"])
def test_a_missing_root_and_an_empty_one(tmp_path, name):
    with pytest.raises(DataError, match=r"none: no such folder.*--data-root DIR.*BITWRIGHT_DATA"):
        load_data(name, tmp_path / "none", held_out=10, seed=0)
    with pytest.raises(DataError, match=f"{tmp_path}.*(--data-root DIR|images are expected as)"):
        load_data(name, tmp_path, held_out=10, seed=0)


def test_cifar_packs(tmp_path):
    (tmp_path / "cifar10").mkdir()
    for i, name in enumerate(["train-0", "train-1", "train-10", "train-2", "test"]):
        write_pack(tmp_path / "cifar10" / f"{name}.npz", pixels(6, 32, 32, 3, seed=i))
    data = load_data("cifar10", tmp_path, held_out=4, seed=0, mean=[0.0] * 3, std=[1.0] * 3)
    assert (len(data.fit), len(data.selection), len(data.test)) == (20, 4, 6)
    assert data.shape == (3, 32, 32)
    assert isinstance(data.fit, TensorSplit)
    assert data.fit.augment == "crop-flip"
    assert np.array_equal(data.fit.images[18:].permute(0, 2, 3, 1).numpy(), pixels(6, 32, 32, 3, seed=2))  # train-10 is after train-2
    write_pack(tmp_path / "cifar10" / "test.npz", pixels(6, 32, 32, 3), labels=np.full(6, 10, np.uint8))
    with pytest.raises(DataError, match="label 10 and there are 10 classes"):
        load_data("cifar10", tmp_path, held_out=4, seed=0)
    (tmp_path / "cifar10" / "test.npz").unlink()
    with pytest.raises(DataError, match=r"test\.npz: no such file"):
        load_data("cifar10", tmp_path, held_out=4, seed=0)


def test_the_binary_layouts_of_cifar(tmp_path):
    for folder, names, label_bytes, name in (
        ("cifar-10-batches-bin", [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"], 1, "cifar10"),
        ("cifar-100-binary", ["train.bin", "test.bin"], 2, "cifar100"),
    ):
        (tmp_path / folder).mkdir()
        for file in names:
            records = pixels(4, label_bytes + 3072)
            records[:, :label_bytes] = 7
            (tmp_path / folder / file).write_bytes(records.tobytes())
        data = load_data(name, tmp_path, held_out=2, seed=0)
        assert len(data.test) == 4
        assert next(data.test.batches(4))[1].tolist() == [7] * 4


@pytest.mark.parametrize(("name", "pickled"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_pickled_cifar_is_refused(tmp_path, name, pickled):
    (tmp_path / pickled).mkdir()
    with pytest.raises(DataError, match=r"holds Python pickles.*binary version"):
        load_data(name, tmp_path, held_out=2, seed=0)


def test_fashion_mnist_in_both_layouts(tmp_path):
    (tmp_path / "fashion_mnist").mkdir()
    for part in ("train", "t10k"):
        (tmp_path / "fashion_mnist" / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels(5, 28, 28)))
        (tmp_path / "fashion_mnist" / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(5, dtype=np.uint8)))
    data = load_data("fashion_mnist", tmp_path, held_out=2, seed=0)
    assert data.shape == (1, 28, 28)
    for name in ("train-0", "test"):
        write_pack(tmp_path / "fashion_mnist" / f"{name}.npz", pixels(5, 28, 28))
    packed = load_data("fashion_mnist", tmp_path, held_out=2, seed=0)
    assert torch.equal(packed.test.batch(torch.arange(5))[0], data.test.batch(torch.arange(5))[0])


def test_a_folder_of_images(tmp_path):
    tree(tmp_path / "set" / "train", ant=4, bee=4)
    tree(tmp_path / "set" / "val", ant=1, bee=2)
    data = load_data("folder", tmp_path, held_out=3, seed=0, path="set", crop=8, resize=10)
    assert (len(data.fit), len(data.selection), len(data.test), data.classes, data.shape) == (5, 3, 3, 2, (3, 8, 8))


class Stub(nn.Module):
    def __init__(self, outputs, features=64):
        super().__init__()
        self.drop, self.linear = nn.Dropout(), nn.Linear(features, outputs)

    def forward(self, x):
        return self.linear(self.drop(x.flatten(1)))


def test_a_model_is_checked_against_the_data(digits):
    model = Stub(10)
    model.drop.eval()
    check_model(model, digits)
    assert model.training
    assert not model.drop.training
    with pytest.raises(DataError, match="has 9 outputs and the labels of digits run to 9; give it 10 outputs"):
        check_model(Stub(9), digits)
    with pytest.raises(DataError, match=r"does not run on the 1x8x8 images of digits \(mat1.*choose a model for that shape"):
        check_model(Stub(10, 65), digits)
    with pytest.raises(DataError, match=r"gives shape \(2, 1, 8, 8\) for 2 images"):
        check_model(nn.Identity(), digits)


def test_a_data_set_of_ones_own():
    split = TensorSplit(torch.zeros(4, 1, 8, 8), torch.arange(4))
    check_model(Stub(4), Data("mine", split.take(2), split.subset(torch.tensor([2])), split.subset(torch.tensor([3])), 4, (1, 8, 8)))


@pytest.mark.data
@pytest.mark.skipif("BITWRIGHT_DATA" not in os.environ, reason="BITWRIGHT_DATA does not name the real data sets")
@pytest.mark.parametrize(
    ("name", "sizes", "shape"),
    [
        ("cifar10", (50000, 10000), (3, 32, 32)),
        ("cifar100", (20000, 10000), (3, 32, 32)),
        ("fashion_mnist", (20000, 10000), (1, 28, 28)),
        ("imagenette224", (500, 500), (3, 224, 224)),
    ],
)
def test_real_data(name, sizes, shape):
    data = load_data(name, os.environ["BITWRIGHT_DATA"], held_out=100, seed=0)
    assert (len(data.fit) + 100, len(data.test)) == sizes
    assert data.shape == shape
    x, y = data.fit.batch(torch.arange(32), torch.Generator().manual_seed(0))
    assert x.shape == (32, *shape)
    assert bool(torch.isfinite(x).all())
    assert len(y.unique()) > 4


def test_every_name_is_listed():
    assert available_data()[0] == "digits"
