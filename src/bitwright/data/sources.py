"""The named data sets: where each is looked for, and how its three splits are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from bitwright.data.digits import MEAN, STD, digits_test_index, read_digits
from bitwright.data.folders import IMAGENET_MEAN, IMAGENET_STD, FolderSplit, scan_folder
from bitwright.data.packs import read_encoded, read_idx, read_pack, read_records
from bitwright.data.splits import Augment, Split, TensorSplit
from bitwright.errors import DataError, RecipeError, nearest

WHERE = "type `--data-root DIR` or set BITWRIGHT_DATA"


@dataclass(frozen=True)
class Data:
    """A data set in three parts.

    ``fit`` and ``selection`` are carved out of the training images (`fit` trains and calibrates, `selection` chooses);
    ``test`` is only for the final figure. ``shape`` is that of one image, (C, H, W).
    """

    name: str
    fit: Split
    selection: Split
    test: Split
    classes: int
    shape: tuple[int, ...]

    def example(self, n: int = 1) -> Tensor:
        """Return the first ``n`` images of ``fit`` in the evaluation view, [n, C, H, W]: what `trace` and `export` run."""
        return self.fit.batch(torch.arange(min(n, len(self.fit))))[0]


def load_data(name: str, root: str | Path | None = None, *, held_out: int, seed: int, **options: object) -> Data:
    """Load a data set by name.

    Args:
        name: one of `available_data`.
        root: the folder that holds the data sets (not needed for ``digits``).
        held_out: how many training images the selection split gets.
        seed: chooses which; the test split never depends on it.
        options: those of the data set; an unknown one is an error.

    Raises:
        DataError: the data is missing, damaged or empty, or ``held_out`` leaves no image to fit on.
        RecipeError: an unknown name or option.

    >>> data = load_data("digits", held_out=200, seed=0)
    >>> len(data.fit), len(data.selection), len(data.test), data.classes, data.shape
    (1147, 200, 450, 10, (1, 8, 8))
    """
    if name not in SOURCES:
        raise RecipeError(f"data.name: no data set '{name}'; {nearest(name, SOURCES)}")
    source, defaults = SOURCES[name]
    train, test = source(None if root is None else Path(root), _checked(name, defaults, options))
    if not 0 < held_out < len(train):
        raise DataError(f"data.held_out: {held_out} of {len(train)} training images of {name}; give 1 to {len(train) - 1}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    fit, selection = train.subset(order[held_out:]), train.subset(order[:held_out])
    shape = tuple(fit.batch(torch.tensor([0]))[0].shape[1:])
    return Data(name, fit, selection, test, train.classes, shape)


def available_data() -> tuple[str, ...]:
    """Return the names that `load_data` knows.

    >>> available_data()
    ('digits', 'cifar10', 'cifar100', 'fashion_mnist', 'imagenette224', 'folder')
    """
    return tuple(SOURCES)


def check_model(model: nn.Module, data: Data) -> None:
    """Run two images through a classifier; raises `DataError` unless it takes their shape and has an output for every label.

    The model's training flags, buffers and parameters are left as they were.
    """
    x = data.example(2)
    shape = "x".join(map(str, data.shape))
    parameter = next(model.parameters(), x)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            logits = model(x.to(parameter.device))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"model: does not run on the {shape} images of {data.name} ({reason}); choose a model for that shape") from None
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"model: gives {found} for 2 images; a classifier gives one row of logits an image")
    if logits.shape[1] < data.classes:
        found = f"has {logits.shape[1]} outputs and the labels of {data.name} run to {data.classes - 1}"
        raise DataError(f"model: {found}; give it {data.classes} outputs (model.arguments)")


def _folder(root: Path | None, name: str, wanted: str) -> Path:
    """Return the root, checked to exist; ``wanted`` says what should be in it."""
    if root is None:
        raise DataError(f"data: {name} needs a data root, the folder that has {wanted}; {WHERE}")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (the data root of {name}); {WHERE}")
    return root


@dataclass(frozen=True)
class ImageOptions:
    """How images held in memory are normalised and augmented: the arguments of `TensorSplit`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = "none"
    pad: int = 4


@dataclass(frozen=True)
class FileOptions:
    """How image files are decoded: the arguments of `FolderSplit`."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: int = 224
    resize: int = 256
    area: float = 0.08
    workers: int = 1


@dataclass(frozen=True)
class EncodedOptions(FileOptions):
    """Those, and which labels: the 10 of Imagenette ("own") or the 1,000 of ImageNet."""

    resize: int = 224
    labels: Literal["own", "imagenet"] = "own"


@dataclass(frozen=True)
class TreeOptions(FileOptions):
    """Those, and the folder under the data root that has train/ and val/."""

    path: str = "."


def _tensors(parts: Sequence[tuple[Tensor, Tensor]], classes: int, options: ImageOptions) -> TensorSplit:
    images, labels = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    look = options
    return TensorSplit(images, labels, classes=classes, mean=look.mean, std=look.std, augment=look.augment, pad=look.pad)


def _files(files: Sequence[Path | bytes], labels: Tensor, classes: int, options: FileOptions) -> FolderSplit:
    sizes = {"crop": options.crop, "resize": options.resize, "workers": options.workers}
    return FolderSplit(files, labels, classes=classes, mean=options.mean, std=options.std, area=options.area, **sizes)


def _digits(root: Path | None, options: ImageOptions) -> tuple[Split, Split]:
    split = _tensors([read_digits()], 10, options)
    train, test = digits_test_index()
    return split.subset(train), split.subset(test)


def _packs(folder: Path) -> tuple[list[Path], Path]:
    """Return the train packs in order and the test pack."""
    return sorted(folder.glob("train-*.npz"), key=lambda path: (len(path.name), path.name)), folder / "test.npz"


def _cifar10(root: Path | None, options: ImageOptions) -> tuple[Split, Split]:
    root = _folder(root, "cifar10", "cifar10/ or cifar-10-batches-bin/")
    train, test = _packs(root / "cifar10")
    binary = root / "cifar-10-batches-bin"
    if train:
        parts, last = [read_pack(path) for path in train], read_pack(test)
    elif binary.is_dir():
        parts = [read_records([binary / f"data_batch_{i}.bin" for i in range(1, 6)], (3, 32, 32), 1)]
        last = read_records([binary / "test_batch.bin"], (3, 32, 32), 1)
    else:
        raise _no_cifar(root, "cifar10", "cifar-10-batches-py", "cifar-10-batches-bin", "cifar-10-binary.tar.gz")
    return _tensors(parts, 10, options), _tensors([last], 10, options)


def _cifar100(root: Path | None, options: ImageOptions) -> tuple[Split, Split]:
    root = _folder(root, "cifar100", "cifar100/ or cifar-100-binary/")
    train, test = _packs(root / "cifar100")
    binary = root / "cifar-100-binary"
    if train:
        parts, last = [read_pack(path) for path in train], read_pack(test)
    elif binary.is_dir():
        parts = [read_records([binary / "train.bin"], (3, 32, 32), 2)]
        last = read_records([binary / "test.bin"], (3, 32, 32), 2)
    else:
        raise _no_cifar(root, "cifar100", "cifar-100-python", "cifar-100-binary", "cifar-100-binary.tar.gz")
    return _tensors(parts, 100, options), _tensors([last], 100, options)


def _no_cifar(root: Path, name: str, pickled: str, binary: str, archive: str) -> DataError:
    if (root / pickled).exists():
        why = f"{root / pickled}: holds Python pickles, which can run code and are not read"
        return DataError(f"{why}; unpack {archive} (the binary version, from the same page) so that {root / binary} is there")
    return DataError(f"{root}: has no {name}/train-*.npz and no {binary}/; {WHERE} naming the folder that has one of them")


def _fashion_mnist(root: Path | None, options: ImageOptions) -> tuple[Split, Split]:
    root = _folder(root, "fashion_mnist", "fashion_mnist/ or FashionMNIST/raw/")
    train, test = _packs(root / "fashion_mnist")
    if train:
        parts, last = [read_pack(path) for path in train], read_pack(test)
    else:
        parts, last = [_idx_pair(root, "train")], _idx_pair(root, "t10k")
    return _tensors(parts, 10, options), _tensors([last], 10, options)


def _idx_pair(root: Path, part: str) -> tuple[Tensor, Tensor]:
    for folder in (root / "fashion_mnist", root / "FashionMNIST" / "raw"):
        for suffix in ("", ".gz"):
            images, labels = (folder / f"{part}-{what}-ubyte{suffix}" for what in ("images-idx3", "labels-idx1"))
            if images.exists():
                return read_idx(images, labels)
    raise DataError(f"{root}: has no fashion_mnist/train-*.npz and no {part}-images-idx3-ubyte; {WHERE} naming the folder that has them")


def _imagenette224(root: Path | None, options: EncodedOptions) -> tuple[Split, Split]:
    root = _folder(root, "imagenette224", "imagenette224/")
    arrays = {"own": ("labels", 10), "imagenet": ("imagenet_labels", 1000)}
    if options.labels not in arrays:
        raise RecipeError(f"data.options.labels: '{options.labels}'; type 'own' (0 to 9) or 'imagenet' (0 to 999)")
    column, classes = arrays[options.labels]
    if not (root / "imagenette224").is_dir():
        raise DataError(f"{root}: has no imagenette224/; {WHERE} naming the folder that has it")
    train, test = (read_encoded(root / "imagenette224" / name, column) for name in ("train500.npz", "val500.npz"))
    return _files(*train, classes, options), _files(*test, classes, options)


def _image_folder(root: Path | None, options: TreeOptions) -> tuple[Split, Split]:
    top = _folder(root, "folder", "train/<class>/ and val/<class>/") / options.path
    files, labels, names = scan_folder(top / "train")
    test_files, test_labels, _ = scan_folder(top / "val", names)
    return _files(files, labels, len(names), options), _files(test_files, test_labels, len(names), options)


def _checked(name: str, defaults: ImageOptions | FileOptions, options: Mapping[str, object]) -> ImageOptions | FileOptions:
    """Return the options with the given ones in place; raises `RecipeError` for an unknown name or a value of another kind."""
    known = [field.name for field in fields(defaults)]
    for key, value in options.items():
        if key not in known:
            raise RecipeError(f"data.options: no option '{key}' for {name}; {nearest(key, known)}")
        default = getattr(defaults, key)
        if not _alike(value, default):
            raise RecipeError(f"data.options.{key}: {value!r}; give something like {default!r}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return replace(defaults, **values)  # type: ignore[arg-type]


def _alike(value: object, default: object) -> bool:
    """Return whether a value is of its default's kind: numbers, text, or a list of numbers."""
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and all(_alike(item, 0.0) for item in value)
    if isinstance(value, bool) or isinstance(default, bool):
        return type(value) is type(default)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


SOURCES: dict[str, tuple[Callable[..., tuple[Split, Split]], ImageOptions | FileOptions]] = {
    "digits": (_digits, ImageOptions(MEAN, STD, pad=1)),
    "cifar10": (_cifar10, ImageOptions(IMAGENET_MEAN, IMAGENET_STD, "crop-flip")),
    "cifar100": (_cifar100, ImageOptions(IMAGENET_MEAN, IMAGENET_STD, "crop-flip")),
    "fashion_mnist": (_fashion_mnist, ImageOptions((0.286,), (0.353,), pad=2)),
    "imagenette224": (_imagenette224, EncodedOptions()),
    "folder": (_image_folder, TreeOptions()),
}
"""Each data set: what reads its train and test images, and the options it has with their defaults."""
