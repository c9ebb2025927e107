"""Packs and binary layouts: what was written is read, and damage is one clear line."""

import gzip
import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from bitwright.data.packs import read_encoded, read_idx, read_pack, read_records
from bitwright.errors import DataError


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def webp(strip):
    out = io.BytesIO()
    Image.fromarray(strip).save(out, "WEBP", lossless=True)
    return out.getvalue()


def write_pack(path, images, labels=None, **changes):
    streams = [webp(np.ascontiguousarray(part.reshape(-1, *part.shape[2:]))) for part in np.array_split(images, 2)]
    arrays = {
        "webp": np.frombuffer(b"".join(streams), np.uint8),
        "offsets": np.cumsum([0, *map(len, streams)]),
        "shape": np.array(images.shape),
        "labels": np.arange(len(images), dtype=np.uint8) % 3 if labels is None else labels,
        "sha256": np.array(hashlib.sha256(images.tobytes()).hexdigest()),
    }
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return path


@pytest.mark.parametrize("shape", [(5, 6, 4, 3), (5, 6, 4)])
def test_a_pack_is_read_as_it_was_written(tmp_path, shape):
    images = pixels(*shape)
    x, y = read_pack(write_pack(tmp_path / "a.npz", images))
    wanted = images if images.ndim == 4 else images[..., None]
    assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), wanted)
    assert x.dtype == torch.uint8
    assert y.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": np.array("0" * 64)}, "its pixels differ from the SHA-256"),
        ({"labels": np.zeros(4, np.uint8)}, "4 labels for 5 images"),
        ({"shape": np.array([6, 6, 4, 3])}, "its pixels differ"),
        ({"shape": np.array([5, 6, 5, 3])}, "a strip of 4x18 pixels for images of 5x6"),
        ({"shape": np.array([10**6, 10**6, 4, 3])}, "its shape is"),
        ({"shape": np.array([5, 0, 4, 3])}, "its shape is"),
        ({"shape": np.array([5])}, "its shape is"),
        ({"offsets": np.array([0, 10**9])}, "its offsets do not fit"),
        ({"offsets": np.array([50, 20, 60])}, "its offsets do not fit"),
        ({"offsets": np.array([0, 20])}, "damaged"),
        ({"webp": None}, "no array 'webp' in it"),
        ({"labels": np.array([{}], dtype=object)}, "damaged"),
    ],
)
def test_a_damaged_pack_says_how(tmp_path, changes, message):
    path = write_pack(tmp_path / "bad.npz", pixels(5, 6, 4, 3), **changes)
    with pytest.raises(DataError, match=rf"bad\.npz: damaged \(.*{message}|bad\.npz: {message}") as caught:
        read_pack(path)
    assert "restore it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_pack_and_a_missing_one(tmp_path):
    path = write_pack(tmp_path / "bad.npz", pixels(5, 6, 4, 3))
    good = path.read_bytes()
    for length in range(0, len(good), len(good) // 40):
        path.write_bytes(good[:length])
        with pytest.raises(DataError, match=r"bad\.npz: damaged"):
            read_pack(path)
    with pytest.raises(DataError, match="no such file"):
        read_pack(tmp_path / "none.npz")


def test_a_pickle_is_not_opened(tmp_path):
    import pickle

    (tmp_path / "a.npz").write_bytes(pickle.dumps({"webp": 1}))
    with pytest.raises(DataError, match="damaged"):
        read_pack(tmp_path / "a.npz")


def test_encoded_images_are_handed_over_as_they_are(tmp_path):
    files = [b"one", b"three", b"x"]
    offsets = np.cumsum([0, *map(len, files)])
    path = tmp_path / "a.npz"
    np.savez(path, data=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=np.array([2, 0, 1]), far=np.array([9, 8, 7]))
    assert read_encoded(path)[0] == files
    assert read_encoded(path, "far")[1].tolist() == [9, 8, 7]
    with pytest.raises(DataError, match="no array 'other'"):
        read_encoded(path, "other")
    np.savez(path, data=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=np.array([2, 0]))
    with pytest.raises(DataError, match="2 labels for 3 images"):
        read_encoded(path)


def test_cifar_records(tmp_path):
    x = pixels(7, 3, 4, 4)
    for label_bytes in (1, 2):
        labels = pixels(7, label_bytes, seed=1)
        records = np.concatenate([labels, x.reshape(7, -1)], 1)
        (tmp_path / "a.bin").write_bytes(records[:4].tobytes())
        (tmp_path / "b.bin").write_bytes(records[4:].tobytes())
        images, y = read_records([tmp_path / "a.bin", tmp_path / "b.bin"], (3, 4, 4), label_bytes)
        assert np.array_equal(images.numpy(), x)
        assert y.tolist() == labels[:, -1].tolist()
    (tmp_path / "a.bin").write_bytes(records.tobytes()[:-1])
    with pytest.raises(DataError, match=r"a\.bin: damaged \(349 bytes is no whole number of records of 50\)"):
        read_records([tmp_path / "a.bin"], (3, 4, 4), 2)
    with pytest.raises(DataError, match="no such file"):
        read_records([tmp_path / "c.bin"], (3, 4, 4), 2)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path, suffix):
    x, y = pixels(5, 4, 3), np.array([1, 2, 3, 4, 0], np.uint8)
    pack = gzip.compress if suffix else bytes
    (tmp_path / f"x{suffix}").write_bytes(pack(idx(x)))
    (tmp_path / f"y{suffix}").write_bytes(pack(idx(y)))
    images, labels = read_idx(tmp_path / f"x{suffix}", tmp_path / f"y{suffix}")
    assert np.array_equal(images[:, 0].numpy(), x)
    assert labels.tolist() == y.tolist()
    (tmp_path / f"y{suffix}").write_bytes(pack(idx(y[:4])))
    with pytest.raises(DataError, match="4 labels for 5 images"):
        read_idx(tmp_path / f"x{suffix}", tmp_path / f"y{suffix}")
    (tmp_path / f"y{suffix}").write_bytes(pack(idx(y))[:-2])
    with pytest.raises(DataError, match="damaged"):
        read_idx(tmp_path / f"x{suffix}", tmp_path / f"y{suffix}")
    (tmp_path / f"y{suffix}").write_bytes(pack(b"hello there"))
    with pytest.raises(DataError, match="not an IDX file"):
        read_idx(tmp_path / f"x{suffix}", tmp_path / f"y{suffix}")
