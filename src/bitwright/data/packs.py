"""Readers of image files that hold a whole set: lossless WebP packs, encoded images, and the standard binary layouts."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitwright.errors import DataError

Bytes = NDArray[np.uint8]
LARGEST = 1 << 33  # bytes of decoded pixels that a pack may claim: a damaged shape must not take the machine down


def damaged(path: Path, reason: object) -> DataError:
    """Return the error for a file that does not hold what it should."""
    first = (str(reason).splitlines() or [type(reason).__name__])[0]
    return DataError(f"{path}: damaged ({first}); restore it from where it came")


def require_pillow() -> None:
    """Raise `DataError` unless Pillow, which decodes images, is installed."""
    if importlib.util.find_spec("PIL") is None:
        raise DataError("data: decoding images needs Pillow, which is not installed; type `pip install 'bitwright[images]'`")


def read_pack(path: Path) -> tuple[Tensor, Tensor]:
    """Read a lossless pack: (images, uint8 [N, 3 or 1, H, W]; labels, int64 [N]), checked against its own SHA-256.

    An npz with ``webp`` (streams end to end), ``offsets``, ``shape`` of the whole array ((N,H,W,3) or (N,H,W)), ``labels``
    and ``sha256`` of the pixels; each stream is a strip of images one under the other.

    Raises:
        DataError: the file is missing, damaged, or its pixels are not those it was made from.
    """
    require_pillow()
    arrays = _arrays(path, ("webp", "offsets", "shape", "labels", "sha256"))
    shape = tuple(int(n) for n in arrays["shape"].reshape(-1))
    if len(shape) not in (3, 4) or min(shape) < 1 or math.prod(shape) > LARGEST or (len(shape) == 4 and shape[3] != 3):
        raise damaged(path, f"its shape is {shape}")
    strips = [_strip(path, code, shape) for code in _streams(path, arrays["webp"], arrays["offsets"])]
    images = np.concatenate(strips)
    if images.shape != shape or hashlib.sha256(images.data).hexdigest() != str(arrays["sha256"]):
        raise damaged(path, "its pixels differ from the SHA-256 recorded in it")
    if arrays["labels"].shape != shape[:1]:
        raise damaged(path, f"{arrays['labels'].size} labels for {shape[0]} images")
    channels_last = images if images.ndim == 4 else images[..., None]
    pixels = np.ascontiguousarray(channels_last.transpose(0, 3, 1, 2))
    return torch.from_numpy(pixels), torch.from_numpy(arrays["labels"].astype(np.int64))


def _strip(path: Path, code: bytes, shape: tuple[int, ...]) -> Bytes:
    from PIL import Image  # noqa: PLC0415  (an extra)

    try:
        with Image.open(io.BytesIO(code), formats=("WEBP", "PNG")) as file:
            if file.width != shape[2] or file.height % shape[1]:
                raise damaged(path, f"a strip of {file.width}x{file.height} pixels for images of {shape[2]}x{shape[1]}")
            pixels = np.asarray(file.convert("RGB"), dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise damaged(path, error) from None
    pixels = pixels.reshape(-1, shape[1], shape[2], 3)
    return pixels if len(shape) == 4 else np.ascontiguousarray(pixels[..., 0])


def read_encoded(path: Path, labels: str = "labels") -> tuple[list[bytes], Tensor]:
    """Read a file of encoded images: their bytes (JPEG, say), and the labels, int64 [N], of the array so named.

    An npz with ``data`` (the files end to end), ``offsets`` and one or more arrays of labels. Raises `DataError`.
    """
    arrays = _arrays(path, ("data", "offsets", labels))
    files = _streams(path, arrays["data"], arrays["offsets"])
    if arrays[labels].shape != (len(files),):
        raise damaged(path, f"{arrays[labels].size} labels for {len(files)} images")
    return files, torch.from_numpy(arrays[labels].astype(np.int64))


def _arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return the named arrays of an npz, never unpickling."""
    try:
        with np.load(path, allow_pickle=False) as file:
            absent = [name for name in names if name not in file.files]
            if absent:
                raise damaged(path, f"no array '{absent[0]}' in it")
            return {name: file[name] for name in names}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError, KeyError, AttributeError, TypeError) as error:
        raise damaged(path, error) from None


def _streams(path: Path, blob: NDArray[Any], offsets: NDArray[Any]) -> list[bytes]:
    places = [int(n) for n in offsets.reshape(-1)]
    ordered = all(a < b for a, b in pairwise(places))
    if blob.dtype != np.uint8 or len(places) < 2 or not ordered or places[0] < 0 or places[-1] > blob.size:
        raise damaged(path, "its offsets do not fit its bytes")
    code = blob.tobytes()
    return [code[a:b] for a, b in pairwise(places)]


def read_records(paths: Sequence[Path], shape: tuple[int, int, int], label_bytes: int) -> tuple[Tensor, Tensor]:
    """Read the binary version of CIFAR: records of ``label_bytes`` labels (the last is taken) and pixels [C, H, W]."""
    size = label_bytes + math.prod(shape)
    parts: list[Bytes] = []
    for path in paths:
        data = np.frombuffer(_contents(path), dtype=np.uint8)
        if data.size == 0 or data.size % size:
            raise damaged(path, f"{data.size} bytes is no whole number of records of {size}")
        parts.append(data.reshape(-1, size))
    records = np.concatenate(parts)
    labels = torch.from_numpy(records[:, label_bytes - 1].astype(np.int64))
    return torch.from_numpy(records[:, label_bytes:].reshape(-1, *shape).copy()), labels


def read_idx(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    """Read a pair of IDX files (MNIST's layout), gzipped or not: uint8 [N, 1, H, W] and int64 [N]."""
    x, y = _idx(images, 3), _idx(labels, 1)
    if len(x) != len(y):
        raise damaged(labels, f"{len(y)} labels for {len(x)} images")
    return torch.from_numpy(x[:, None].copy()), torch.from_numpy(y.astype(np.int64))


def _idx(path: Path, rank: int) -> Bytes:
    data = _contents(path)
    start = 4 + 4 * rank
    if len(data) < start or data[:4] != bytes([0, 0, 8, rank]):
        raise damaged(path, f"not an IDX file of {rank} dimensions")
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank))
    if math.prod(shape) != len(data) - start:
        raise damaged(path, f"{len(data) - start} bytes for the shape {shape}")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def _contents(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(path, error) from None
