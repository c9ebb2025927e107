"""The file of the packed format: bit-packing, and a safetensors file of a few blobs whose header has a length known beforehand."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.errors import ExportError

DTYPES: dict[torch.dtype, str] = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
DIGITS = 12  # of the longest offset that a header leaves room for
LARGEST_LAYOUT = 1 << 24  # characters: what a damaged file can make us decompress
SIGNED = ("format", "model", "layout", "bits", "layers", "sample")
"""Metadata that the checksum covers; files that were written before there were samples have none."""


def pack_bits(values: Tensor, width: int) -> bytes:
    """Pack integers 0 … 2^width - 1 (uint8, width 1 to 8) end to end, lowest bit first; the last byte is filled with zeros.

    >>> pack_bits(torch.tensor([1, 0, 3, 2], dtype=torch.uint8), 2).hex()
    'b1'
    """
    bits = np.unpackbits(values.reshape(-1, 1).numpy(), axis=1, count=width, bitorder="little")
    return np.packbits(bits.reshape(-1), bitorder="little").tobytes()


def unpack_bits(data: bytes, width: int, count: int) -> Tensor:
    """Return the ``count`` integers that `pack_bits` packed, uint8."""
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count * width, bitorder="little")
    return torch.from_numpy(np.packbits(bits.reshape(count, width), axis=1, bitorder="little").reshape(-1))


def raw(tensor: Tensor) -> bytes:
    """Return a tensor's elements as bytes, in order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def from_raw(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor that `raw` took apart, in memory of its own."""
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


def squeeze(layout: Any) -> str:
    """Return a layout as compact JSON, deflated and base85-coded where that is shorter."""
    text = json.dumps(layout, separators=(",", ":"))
    small = "z" + base64.b85encode(zlib.compress(text.encode(), 9)).decode()
    return min(text, small, key=len)


def unsqueeze(text: str) -> Any:
    """Return the layout that `squeeze` wrote; raises `ValueError` for anything else."""
    if text.startswith("z"):
        inflater = zlib.decompressobj()
        data = inflater.decompress(base64.b85decode(text[1:]), LARGEST_LAYOUT)
        if inflater.unconsumed_tail or not inflater.eof:
            raise ValueError("its layout is cut off or too long")
        text = data.decode()
    return json.loads(text)


def header_room(metadata: Mapping[str, str], blobs: int) -> int:
    """Return the bytes that a header takes, the 8 of its length included: known from the metadata and the number of blobs."""
    entry = len('"bfloat16":{"dtype":"BOOL","shape":[],"data_offsets":[,]},') + 3 * DIGITS
    text = json.dumps({"__metadata__": {**metadata, "sha256": "0" * 64}}, separators=(",", ":"))
    return 8 + -(-(len(text) + blobs * entry) // 8) * 8


def to_bytes(metadata: Mapping[str, str], blobs: Mapping[str, tuple[torch.dtype, bytes]]) -> bytes:
    """Return a safetensors file of one-dimensional blobs, with a SHA-256 of the metadata and of all bytes in it."""
    header: dict[str, Any] = {"__metadata__": {**metadata, "sha256": _checksum(metadata, (data for _, data in blobs.values()))}}
    end = 0
    for name, (dtype, data) in blobs.items():
        header[name] = {"dtype": DTYPES[dtype], "shape": [len(data) // dtype.itemsize], "data_offsets": [end, end + len(data)]}
        end += len(data)
    room = header_room(metadata, len(blobs)) - 8
    text = json.dumps(header, separators=(",", ":")).encode().ljust(room)
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, data in blobs.values())


def _checksum(metadata: Mapping[str, str], blobs: Any) -> str:
    digest = hashlib.sha256("\n".join(metadata[key] for key in SIGNED if key in metadata).encode())
    for data in blobs:
        digest.update(data)
    return digest.hexdigest()


def from_bytes(data: bytes) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return (metadata, blobs) of a file that `to_bytes` made; raises `ExportError` with the reason for anything else."""
    try:
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > len(data) - 8:
            raise ExportError(f"truncated: its header claims {length} bytes and {max(len(data) - 8, 0)} follow")
        header = json.loads(data[8 : 8 + length])
        metadata: dict[str, str] = header.pop("__metadata__")
        blobs, end = {}, 0
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            dtype = torch.uint8 if name == "codes" else BY_NAME[name]
            size = math.prod(entry["shape"]) * dtype.itemsize
            if start != end or stop - start != size or entry["dtype"] != DTYPES[dtype]:
                raise ExportError(f"damaged: blob '{name}' has offsets {start} to {stop} and claims {size} bytes")
            blobs[name], end = data[8 + length + start : 8 + length + stop], stop
        if end != len(data) - 8 - length:
            raise ExportError(f"truncated or extended: its header claims {end} bytes and {len(data) - 8 - length} follow")
        if metadata["sha256"] != _checksum(metadata, blobs.values()):
            raise ExportError("damaged: its content does not match the checksum in it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ExportError(f"not a packed file, or a damaged one ({type(error).__name__}: {str(error)[:80]})") from None
    return metadata, blobs
