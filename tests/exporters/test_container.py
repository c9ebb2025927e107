"""Bit-packing and the container: against plain arithmetic, and against the safetensors library."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors

from bitwright.errors import ExportError
from bitwright.exporters import _container as container


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=40))
def test_bits_are_packed_end_to_end_lowest_first(width, values):
    values = [value % 2**width for value in values]
    data = container.pack_bits(torch.tensor(values, dtype=torch.uint8), width)
    plain = sum(value << (width * i) for i, value in enumerate(values))
    assert data == plain.to_bytes((len(values) * width + 7) // 8, "little")
    assert container.unpack_bits(data, width, len(values)).tolist() == values


@pytest.mark.parametrize("dtype", list(container.DTYPES))
def test_raw_bytes_and_back(dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    assert torch.equal(container.from_raw(container.raw(tensor.t()), dtype, (3, 2)), tensor.t())
    assert container.from_raw(b"", dtype, (0, 2)).shape == (0, 2)
    assert container.from_raw(container.raw(tensor[0, 0]), dtype, ()).shape == ()


METADATA = dict.fromkeys(container.SIGNED, "x")


def test_the_file_is_plain_safetensors():
    blobs = {"float32": (torch.float32, container.raw(torch.tensor([1.5, -2.0]))), "codes": (torch.uint8, b"abc")}
    data = container.to_bytes(METADATA, blobs)
    tensors = load_safetensors(data)
    assert tensors["float32"].tolist() == [1.5, -2.0]
    assert bytes(tensors["codes"].tolist()) == b"abc"
    assert len(data) == container.header_room(METADATA, 2) + 11
    metadata, found = container.from_bytes(data)
    assert found == {"float32": blobs["float32"][1], "codes": b"abc"}
    assert all(metadata[key] == "x" for key in METADATA)


def test_the_header_has_room_for_long_offsets():
    blobs = {name: (dtype, bytes(8)) for name, dtype in container.BY_NAME.items()} | {"codes": (torch.uint8, b"")}
    small = container.to_bytes(METADATA, blobs)
    large = container.to_bytes(METADATA, blobs | {"codes": (torch.uint8, bytes(10**6))})
    assert len(large) - len(small) == 10**6


def test_a_layout_is_deflated_where_that_is_shorter():
    for layout in ([1], {"layers": [[f"layer{i}.conv", [16, 16, 3, 3]] for i in range(30)]}):
        assert container.unsqueeze(container.squeeze(layout)) == layout
    assert container.squeeze([1]) == "[1]"
    assert len(container.squeeze(["abc"] * 1000)) < 100


def test_a_layout_that_would_fill_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(container, "LARGEST_LAYOUT", 1000)
    with pytest.raises(ValueError, match="too long"):
        container.unsqueeze(container.squeeze(["abc"] * 1000))


@pytest.mark.parametrize("data", [b"", b"short", bytes(8), b"\xff" * 8 + b"{}", b"\2" + bytes(7) + b"[]", b"\5" + bytes(7) + b'{"a":'])
def test_what_is_no_such_file(data):
    with pytest.raises(ExportError, match=r"truncated|not a packed file"):
        container.from_bytes(data)
