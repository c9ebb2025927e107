"""Two files whose checksum somebody has mended are refused unless their operations bear out what they say of themselves."""

from __future__ import annotations

import html
import json
import re

import pytest
from deployed import deployed

from bitwright.errors import ExportError
from bitwright.exporters import export, verify

pytest.importorskip("openvino", reason="the extra [openvino] is not installed")
pytest.importorskip("onnx", reason="the extra [openvino] is not installed")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Layers '0', '4' and '5' at W8A8, W16A16 and W4A8."""
    model, x, policy = deployed("tiny", [(8, 8), (16, 16), (4, 8)])
    path = tmp_path_factory.mktemp("good") / "m.xml"
    export(model, "openvino", path, example=x, policy=policy)
    return path


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """All layers at W4A4."""
    model, x, policy = deployed("tiny", [(4, 4)], points=())
    path = tmp_path_factory.mktemp("few") / "m.xml"
    export(model, "openvino", path, example=x, policy=policy)
    return path


def resealed(good, target, change):
    """Change the graph, the weights and what both say of themselves, and mend their checksum."""
    from bitwright.exporters.openvino import BLANK, checksum

    text, data = good.read_text(), good.with_suffix(".bin").read_bytes()
    text = re.sub('<sha256 value="[0-9a-f]{64}"', f'<sha256 value="{BLANK}"', text)
    told = re.search('<content value="([^"]*)"', text)[1]
    content = json.loads(html.unescape(told))
    text, data = change(text, data, content) or (text, data)
    sealed = text.replace(told, html.escape(json.dumps(content))).encode()
    target.with_suffix(".bin").write_bytes(data)
    target.write_bytes(sealed.replace(BLANK.encode(), checksum(sealed, data).encode()))
    return target


def claim(layer, place, bits):
    """Return what claims another width of a layer, everywhere but in the graph."""

    def change(text, data, content):
        content["layers"][layer][place] = bits
        content["policy"]["sites"][layer]["wa"[place]] = bits
        for entry in content["weights"]:
            if entry[0] == layer:
                entry[1][place] = bits

    return change


def floats(text, data, content):
    """Claim 32 bits of a layer that has 16."""
    claim("4", 0, 32)(text, data, content)
    claim("4", 1, 32)(text, data, content)


def put(key, value):
    """Return what puts a value into what the files say of themselves."""
    return lambda text, data, content: content.update({key: value})


def sampled(text, data, content):
    """Ask for an input of other channels."""
    content["sample"]["inputs"] = [[[2, 4, 8, 8], "float32"]]


def without_answer(text, data, content):
    """Leave the answer to the sample out."""
    content["sample"]["answer"] = None


def test_what_is_sealed_again_unchanged_passes(good, few, tmp_path):
    for source in (good, few):
        found = verify(resealed(source, tmp_path / "m.xml", lambda text, data, content: None))
        assert {row.name for row in found.tensors} >= {"0", "4", "5", "0.input", "5.input"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (claim("0", 1, 4), "the policy says 4 bits for the input of '0', which has 256 levels in its graph"),
        (claim("0", 0, 4), "the policy says 4 bits for the weight of '0', which has 8 in its graph"),
        (claim("5", 0, 8), "the policy says 8 bits for the weight of '5', which has 4 in its graph"),
        (floats, "the policy says 32 bits for the weight of '4', which has 16 in its graph"),
        (put("weights", []), "the layer '0.*' has a quantized weight that the file does not list"),
        (put("allowed", 1e9), "allows outputs to differ by 1000000000.0 of the largest"),
        (without_answer, "it has no answer to its sample"),
        (sampled, "metadata do not fit its graph"),
        (lambda text, data, content: (text, data[:-500]), "metadata do not fit its graph"),
        (lambda text, data, content: (text, b""), "metadata do not fit its graph"),
        (lambda text, data, content: (text.replace('"Convolution"', '"Konvolution"'), data), "metadata do not fit its graph"),
        (lambda text, data, content: (text.replace("bf16&quot;}", "f32&quot;}"), data), "it asks to be compiled with"),
    ],
)
def test_what_a_graph_does_not_bear_out_is_refused_though_the_checksum_fits(good, tmp_path, change, message):
    with pytest.raises(ExportError, match=rf"^m\.xml: .*{message}.*; export it again$"):
        verify(resealed(good, tmp_path / "m.xml", change))


def test_levels_and_bounds_of_few_bits_are_read_from_the_graph(few, tmp_path):
    def widened(text, data, content):
        content["allowed"] = 1
        return text.replace('levels="16"', 'levels="64"', 1), data

    with pytest.raises(ExportError, match="the policy says 4 bits for the input of '0', which has 64 levels in its graph"):
        verify(resealed(few, tmp_path / "wide.xml", widened))
    with pytest.raises(ExportError, match="the policy says 2 bits for the input of '4', which has 16 levels in its graph"):
        verify(resealed(few, tmp_path / "claimed.xml", claim("4", 1, 2)))


def test_the_precision_that_is_executed_is_compared(good, monkeypatch):
    from bitwright.exporters import openvino

    monkeypatch.setattr(openvino, "executed_precision", lambda compiled, layers: {"0": "float32", "4": "bf16", "5": "int8"})
    with pytest.raises(ExportError, match=r"^m\.xml: OpenVINO does not run 1 layers as the policy says: '0' is W8A8 and runs in float32"):
        verify(good)
