"""AIMET's encodings, against a file written after its encoding specification (AIMET itself does not import with the CPU build of torch)."""

import json

import pytest
import torch
from translated import convolutional, onnx_graph, policy_of

from bitwright.errors import PolicyError
from bitwright.policy import Bits, Policy
from bitwright.quant import quantize
from bitwright.translators import Subject, translate, understand

PAIRS = ((4, 8), (3, 6), (8, 32))
DOCUMENTED = {
    "version": "1.0.0",
    "activation_encodings": [
        {"name": "x", "dtype": "INT", "enc_type": "PER_TENSOR", "bw": 8, "is_sym": True, "scale": [0.02], "offset": [-128]},
        {"name": "b", "dtype": "INT", "enc_type": "PER_TENSOR", "bw": 6, "is_sym": False, "scale": [0.1], "offset": [0]},
    ],
    "param_encodings": [
        {
            "name": "conv1.weight",
            "dtype": "INT",
            "enc_type": "PER_CHANNEL",
            "bw": 4,
            "is_sym": True,
            "scale": [0.1] * 8,
            "offset": [-8] * 8,
        },
        {
            "name": "layer.0.weight",
            "dtype": "INT",
            "enc_type": "PER_CHANNEL",
            "bw": 3,
            "is_sym": True,
            "scale": [0.1] * 8,
            "offset": [-4] * 8,
        },
        {"name": "fc.weight", "dtype": "INT", "enc_type": "PER_TENSOR", "bw": 8, "is_sym": True, "scale": [0.1], "offset": [-128]},
        {"name": "fc.bias", "dtype": "INT", "enc_type": "PER_TENSOR", "bw": 32, "is_sym": True, "scale": [0.1], "offset": [0]},
    ],
    "quantizer_args": {"activation_bitwidth": 8, "param_bitwidth": 8, "dtype": "int", "is_symmetric": True},
    "excluded_layers": [],
}


@pytest.fixture
def graph(tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    return onnx_graph(tmp_path / "float.onnx")


def quantized(pairs=PAIRS, quantizer="lsq"):
    net, subject = convolutional()
    policy = policy_of(subject, *pairs)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return policy, Subject(subject.sites, quantize(net, policy, calibration=images, quantizer=quantizer))


def test_a_documented_file_is_read(graph):
    _, subject = convolutional()
    assert understand(json.dumps(DOCUMENTED), "aimet", subject, graph=graph) == policy_of(subject, *PAIRS)


def test_what_is_written_has_the_documented_keys_and_the_networks_scales(graph):
    policy, subject = quantized()
    data = json.loads(translate(policy, "aimet", subject, graph=graph))
    assert understand(json.dumps(data), "aimet", subject, graph=graph) == policy
    for ours, documented in ((data, DOCUMENTED), *zip(data["param_encodings"], DOCUMENTED["param_encodings"], strict=False)):
        assert set(ours) <= set(documented)
    first = data["param_encodings"][0]
    layer = subject.network.get_submodule("conv1")
    assert first["name"] == "conv1.weight"
    assert first["scale"] == layer.weight_quantizer.encode(layer.weight).scale.flatten().tolist()
    assert first["offset"] == [-8] * 8
    image = next(entry for entry in data["activation_encodings"] if entry["name"] == "x")
    assert image == {
        "name": "x",
        "dtype": "INT",
        "enc_type": "PER_TENSOR",
        "bw": 8,
        "is_sym": True,
        "scale": [float(layer.input_quantizer.step().detach())],
        "offset": [-128],
    }


def test_an_encoding_of_a_tensor_that_is_not_there_is_refused(graph):
    _, subject = convolutional()
    entries = [{**entry, "name": entry["name"] + "b"} for entry in DOCUMENTED["activation_encodings"]]
    with pytest.raises(PolicyError, match="which is no tensor of the graph; give its own graph"):
        understand(json.dumps({**DOCUMENTED, "activation_encodings": entries}), "aimet", subject, graph=graph)


def test_without_quantized_inputs_no_graph_is_needed():
    policy, subject = quantized(((4, 32), (32, 32), (2, 32)))
    data = json.loads(translate(policy, "aimet", subject))
    assert data["excluded_layers"] == ["layer.0"]
    assert understand(json.dumps(data), "aimet", subject) == policy


def test_messages(graph):
    policy, subject = quantized()
    with pytest.raises(PolicyError, match="encodings of aimet hold scales; give a run that has its fine-tuned network"):
        translate(policy, "aimet", Subject(subject.sites), graph=graph)
    with pytest.raises(PolicyError, match="has no quantized layer 'conv1'; give the network of this policy"):
        translate(policy, "aimet", Subject(subject.sites, convolutional()[0]), graph=graph)
    floating, floats = quantized(((4, 32), (4, 32), (4, 32)))
    with pytest.raises(PolicyError, match="does not quantize the input of 'conv1'; give the network of this policy"):
        translate(policy, "aimet", floats, graph=graph)
    with pytest.raises(PolicyError, match=r"cannot say site 'conv1'.*no integer zero point.*quantize with 'lsq'"):
        translate(floating, "aimet", quantized(((4, 32), (4, 32), (4, 32)), "dorefa")[1])
    for change, message in (
        ({"version": "2.0.0"}, "encodings of version '2.0.0'; export version '1.0.0'"),
        ({"param_encodings": [{**DOCUMENTED["param_encodings"][0], "dtype": "FLOAT"}]}, "have 'FLOAT' numbers for 'conv1.weight'"),
        (
            {"param_encodings": [{**DOCUMENTED["param_encodings"][0], "name": "scale"}]},
            "name the parameter 'scale', which is no layer's weight",
        ),
        ({"excluded_layers": ["relu", "fc"]}, "give 'fc' a weight and exclude it from quantization; leave one of them out"),
    ):
        with pytest.raises(PolicyError, match=message):
            understand(json.dumps({**DOCUMENTED, **change}), "aimet", subject, graph=graph)


def changed(entry, **values):
    return {**entry, **values}


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        ("activation_encodings", lambda old: [*old, changed(old[0], name="a")], "quantize 'a', which no layer of a site reads"),
        ("activation_encodings", lambda old: [*old, changed(old[0], name="y", bw=4)], "quantize 'y', which no layer of a site reads"),
        ("activation_encodings", lambda old: [*old, changed(old[0], bw=4)], "the file of aimet has 'x' twice; keep one"),
        ("param_encodings", lambda old: [*old, changed(old[0], bw=3)], "the file of aimet has 'conv1.weight' twice; keep one"),
        ("param_encodings", lambda old: [*old[:3], changed(old[3], bw=4)], "give 'fc.bias' 4 bits, and a policy leaves biases as they are"),
        (
            "param_encodings",
            lambda old: [changed(old[0], bw=16), *old[1:]],
            "gives conv1.weight 16 bits, and a policy has integers of 1 to 8",
        ),
        ("param_encodings", lambda old: [changed(old[0], bw=4.5), *old[1:]], "gives conv1.weight 4.5 bits"),
        ("param_encodings", lambda old: [changed(old[0], enc_type="PER_BLOCK"), *old[1:]], "have 'PER_BLOCK' scales for 'conv1.weight'"),
        ("param_encodings", lambda old: [changed(old[0], block_size=16), *old[1:]], "has 'block_size' in the encoding of 'conv1.weight'"),
    ],
)
def test_what_a_policy_cannot_say_is_refused(graph, part, entries, message):
    _, subject = convolutional()
    with pytest.raises(PolicyError, match=message):
        understand(json.dumps({**DOCUMENTED, part: entries(DOCUMENTED[part])}), "aimet", subject, graph=graph)


def test_policies_hold_what_encodings_hold():
    assert Policy({"a": (2, 8)})["a"] == Bits(2, 8)
