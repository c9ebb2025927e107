"""A file whose checksum somebody has mended is refused unless its graph bears out what it says of itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
from deployed import deployed

from bitwright.errors import ExportError
from bitwright.exporters import export, verify

onnx = pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Layers '0', '4' and '5' at W2A4, W16A16 and W4A8."""
    model, x, policy = deployed("tiny", [(2, 4), (16, 16), (4, 8)])
    path = tmp_path_factory.mktemp("good") / "m.onnx"
    export(model, "onnx", path, example=x, policy=policy)
    return path


def resealed(good, target, change):
    """Change a model and what it says of itself, and mend its checksum."""
    from bitwright.exporters._onnx_file import KEY, SUM, checksum

    model = onnx.load(str(good))
    content = json.loads({entry.key: entry.value for entry in model.metadata_props}[KEY])
    change(model, content)
    onnx.helper.set_model_props(model, {KEY: json.dumps(content)})
    onnx.helper.set_model_props(model, {KEY: json.dumps(content), SUM: checksum(model)})
    target.write_bytes(model.SerializeToString(deterministic=True))
    return target


def claim(layer, place, bits):
    """Return what claims another width of a layer, everywhere but in the graph."""

    def change(model, content):
        content["layers"][layer][place] = bits
        content["policy"]["sites"][layer]["wa"[place]] = bits
        next(entry for entry in content["weights"] if entry[0] == layer)[1][place] = bits

    return change


def put(path, value):
    """Return what puts a value into what a file says of itself."""

    def change(model, content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def unlist(kind, name):
    """Return what leaves a tensor out of a file's list."""

    def change(model, content):
        content[kind] = [entry for entry in content[kind] if entry[0] != name]

    return change


def widened_and_unlisted(model, content):
    """Give a weight of 2 bits more levels and leave it out of the list."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "0.weight")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.arange(162, dtype=np.int8).reshape(6, 3, 3, 3), tensor.name))
    unlist("weights", "0")(model, content)
    content["allowed"] = 1


def wider_clip(model, content):
    """Let codes of 4 bits through a clip of 6."""
    node = next(node for node in model.graph.node if node.op_type == "Clip")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[2])
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.uint8(63), tensor.name))


def backward_clip(model, content):
    """Swap the bounds of a clip."""
    node = next(node for node in model.graph.node if node.op_type == "Clip")
    node.input[1], node.input[2] = node.input[2], node.input[1]
    content["allowed"] = 1


def without_rounding(model, content):
    """Read a tensor as it was before it was rounded to 8 bits."""
    layer = next(node for node in model.graph.node if node.name == "5")
    made = {name: node for node in model.graph.node for name in node.output}
    layer.input[0] = made[made[layer.input[0]].input[0]].input[0]


def test_what_is_sealed_again_unchanged_passes(good, tmp_path):
    found = verify(resealed(good, tmp_path / "m.onnx", lambda model, content: None))
    assert {row.name for row in found.tensors} >= {"0", "4", "5", "0.input", "5.input"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(["weights"], []), "'0' has a quantized weight that the file does not list"),
        (put(["activations"], []), r"the file says of '.*input_.*': no grid; its graph has . bits, codes 0 to "),
        (widened_and_unlisted, "'0' has a quantized weight that the file does not list"),
        (claim("0", 0, 8), "the policy says 8 bits for the weight of '0', which has 2 in its graph"),
        (claim("0", 1, 2), "the policy says 2 bits for the input of '0', which has 4 in its graph"),
        (claim("5", 1, 16), "the policy says 16 bits for the input of '5', which has 8 in its graph"),
        (claim("4", 0, 32), "the policy says 32 bits for the weight of '4', which is stored as BFLOAT16"),
        (wider_clip, "the grid of '0.input_q' has codes from .* to 63 by steps of .*, and 4 bits allow"),
        (backward_clip, r"'0\.input' gives codes from 0 to 0|the grid of '0\.input_q' has codes from 15 to 0"),
        (without_rounding, "the policy says 8 bits for the input of '5', which has None in its graph"),
        (put(["allowed"], 1e9), "allows outputs to differ by 1000000000.0 of the largest, and a share is from 0 to 1"),
        (put(["allowed"], "nan"), "allows outputs to differ by 'nan'"),
        (put(["sample", "answer"], None), "it has no answer to its sample"),
        (put(["sample", "answer"], [[1], "AAAAAA=="]), r"output on the sample has shape \[2, 5\], and the answer in it \[1\]"),
        (put(["sample", "inputs"], [[[10**6, 10**6], "float32"]]), r"its sample has shape \[1000000, 1000000\], and sizes from 1 and"),
        (put(["sample", "inputs"], [[[2, 4, 8, 8], "float32"]]), "metadata do not fit its graph .*INVALID_ARGUMENT|InvalidArgument"),
        (put(["sample", "inputs"], [[[-1, 3, 8, 8], "float32"]]), r"its sample has shape \[-1, 3, 8, 8\]"),
        (put(["weights", 0, 2], "nope"), "metadata do not fit its graph .*KeyError: 'nope'"),
        (put(["weights", 0, 3], 9), "metadata do not fit its graph"),
    ],
)
def test_what_a_graph_does_not_bear_out_is_refused_though_the_checksum_fits(good, tmp_path, change, message):
    with pytest.raises(ExportError, match=rf"^m\.onnx: .*{message}.*; export it again$"):
        verify(resealed(good, tmp_path / "m.onnx", change))


def test_a_product_of_two_activations_is_compared_too(tmp_path):
    model, x, policy = deployed("block", [(8, 8)])
    export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy)

    def claimed(model, content):
        content["layers"]["attention#qk"] = [4, 4]
        content["policy"]["sites"]["attention#qk"] = {"w": 4, "a": 4}

    with pytest.raises(ExportError, match="the policy says 4 bits for the left operand of 'attention#qk', which has 8 in its graph"):
        verify(resealed(tmp_path / "m.onnx", tmp_path / "claimed.onnx", claimed))
