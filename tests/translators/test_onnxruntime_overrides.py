"""ONNX Runtime's quantizer takes the overrides, and the graph it writes has the policy's widths."""

import json

import numpy as np
import pytest
from translated import convolutional, onnx_graph, policy_of, upsampling, upsampling_graph

from bitwright.errors import PolicyError
from bitwright.policy import Bits
from bitwright.translators import FLOAT, translate, understand

PAIRS = ((4, 8), (32, 32), (8, 8))


@pytest.fixture
def graph(tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    return onnx_graph(tmp_path / "float.onnx")


def test_a_policy_comes_back(graph):
    _, subject = convolutional()
    policy = policy_of(subject, *PAIRS)
    text = translate(policy, "onnxruntime-overrides", subject, graph=graph)
    data = json.loads(text)
    assert data["nodes_to_exclude"] == ["layer_0"]
    assert data["op_types_to_quantize"] == data["OpTypesToExcludeOutputQuantization"] == ["Conv", "Gemm"]
    assert understand(text, "onnxruntime-overrides", subject, graph=graph) == policy
    with pytest.raises(PolicyError, match=r"overrides 'fc.weight', which no layer of a site reads"):  # a Gemm is left in float
        understand(json.dumps({**data, "op_types_to_quantize": ["Conv"]}), "onnxruntime-overrides", subject, graph=graph)
    del data["op_types_to_quantize"]  # as files of earlier versions
    assert understand(json.dumps(data), "onnxruntime-overrides", subject, graph=graph) == policy


def test_a_layer_that_is_left_out_in_part_is_refused(graph, tmp_path):
    import onnx

    model = onnx.load(graph)
    again = onnx.helper.make_node("Conv", ["x", "conv1.weight", "conv1.bias"], ["again"], name="conv1_again", pads=[1] * 4)
    model.graph.node.append(again)
    onnx.save(model, tmp_path / "twice.onnx")
    _, subject = convolutional()
    text = translate(policy_of(subject, *PAIRS), "onnxruntime-overrides", subject, graph=str(tmp_path / "twice.onnx"))
    data = json.loads(text)
    data["nodes_to_exclude"].append("conv1_again")
    with pytest.raises(PolicyError, match="leaves out some nodes of 'conv1', and a policy all or none"):
        understand(json.dumps(data), "onnxruntime-overrides", subject, graph=str(tmp_path / "twice.onnx"))


ORDERS = [PAIRS, ((4, 8), (8, 8), (32, 32)), ((8, 8), (32, 32), (32, 32)), ((32, 32), (4, 4), (8, 8))]


@pytest.mark.parametrize("pairs", ORDERS)
def test_onnxruntime_applies_the_file(graph, tmp_path, pairs):
    _, subject = convolutional()
    policy = policy_of(subject, *pairs)
    model = quantized(tmp_path / "quantized.onnx", graph, translate(policy, "onnxruntime-overrides", subject, graph=graph))
    assert applied(model, {"conv1": "conv1", "layer.0": "layer_0", "fc": "fc"}) == dict(policy)


def test_onnxruntime_applies_the_file_to_a_transposed_convolution(tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    _, subject = upsampling()
    graph, policy = upsampling_graph(tmp_path / "up.onnx"), policy_of(subject, (8, 8), (4, 8))
    model = quantized(tmp_path / "quantized.onnx", graph, translate(policy, "onnxruntime-overrides", subject, graph=graph))
    assert applied(model, {"conv": "conv", "up": "up_1"}) == dict(policy)


def quantized(path, graph, text):
    """Return the model that ONNX Runtime writes of a graph with the overrides in a file."""
    ort = pytest.importorskip("onnxruntime.quantization", reason="onnxruntime is not installed")
    import onnx

    class Reader(ort.CalibrationDataReader):
        def __init__(self):
            self.left = [{"x": np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)}]

        def get_next(self):
            return self.left.pop() if self.left else None

    data = json.loads(text)
    overrides = {
        tensor: [{**entry, "quant_type": ort.QuantType.from_string(entry["quant_type"])} for entry in entries]
        for tensor, entries in data["TensorQuantOverrides"].items()
    }
    excluded = data["OpTypesToExcludeOutputQuantization"]
    ort.quantize_static(
        graph,
        path,
        Reader(),
        op_types_to_quantize=data["op_types_to_quantize"],
        nodes_to_exclude=data["nodes_to_exclude"],
        extra_options={"TensorQuantOverrides": overrides, "OpTypesToExcludeOutputQuantization": excluded},
    )
    return onnx.load(path)


def applied(model, nodes):
    """Return the bits of each layer from the types that its node reads through DequantizeLinear, whatever of one operand is between."""
    from onnx import TensorProto

    widths = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT8: 8, TensorProto.UINT8: 8}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}

    def width(tensor):
        node = makers.get(tensor)
        while node is not None and node.op_type in ("Relu", "ReduceMean"):
            node = makers.get(node.input[0])
        return widths[types[node.input[2]]] if node is not None and node.op_type == "DequantizeLinear" else 32

    of_name = {node.name: node for node in model.graph.node}
    return {layer: Bits(*(width(tensor) for tensor in reversed(of_name[node].input[:2]))) for layer, node in nodes.items()}


@pytest.mark.parametrize("between", [False, True])
def test_a_float_layer_that_reads_what_is_rounded_for_another_is_refused(graph, tmp_path, between):
    import onnx

    model = onnx.load(graph)
    next(node for node in model.graph.node if node.name == "layer_0").input[0] = "relu_of_x" if between else "x"
    if between:
        model.graph.node.insert(0, onnx.helper.make_node("Relu", ["x"], ["relu_of_x"], name="relu0"))
    onnx.save(model, tmp_path / "shared.onnx")
    _, subject = convolutional()
    policy = policy_of(subject, (8, 8), FLOAT, FLOAT)
    with pytest.raises(PolicyError, match=r"site 'layer.0' reads the tensor 'x' in float and another layer at 8 bits; tie them"):
        translate(policy, "onnxruntime-overrides", subject, graph=str(tmp_path / "shared.onnx"))


def test_messages_of_graphs(graph, tmp_path):
    _, subject = convolutional()
    policy = policy_of(subject, *PAIRS)
    with pytest.raises(PolicyError, match=r"speaks of tensors of an ONNX graph; give it as --option graph=FILE.onnx"):
        translate(policy, "onnxruntime-overrides", subject)
    (tmp_path / "junk.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(PolicyError, match=r"junk.onnx: no ONNX graph"):
        translate(policy, "onnxruntime-overrides", subject, graph=str(tmp_path / "junk.onnx"))
    import onnx

    model = onnx.load(graph)
    for node in model.graph.node:
        if node.name == "fc":
            node.op_type, node.input[1] = "Identity", "conv1.bias"
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(PolicyError, match=r"no convolution or matrix product reads 'fc.weight'"):
        translate(policy, "onnxruntime-overrides", subject, graph=str(tmp_path / "other.onnx"))
    model.graph.initializer[0].name = "conv2.weight"
    onnx.save(model, tmp_path / "renamed.onnx")
    with pytest.raises(PolicyError, match=r"no initializer 'conv1.weight' for a layer .*; did you mean 'conv2.weight'"):
        translate(policy, "onnxruntime-overrides", subject, graph=str(tmp_path / "renamed.onnx"))


def test_one_tensor_has_one_width(graph, tmp_path):
    import onnx

    model = onnx.load(graph)
    next(node for node in model.graph.node if node.name == "layer_0").input[0] = "x"
    onnx.save(model, tmp_path / "shared.onnx")
    _, subject = convolutional()
    policy = policy_of(subject, (8, 8), (8, 4), FLOAT)
    with pytest.raises(PolicyError, match=r"sites 'conv1' and 'layer.0' read the tensor 'x' at 8 and 4 bits; tie them"):
        translate(policy, "onnxruntime-overrides", subject, graph=str(tmp_path / "shared.onnx"))


def test_an_override_of_no_layer_is_refused(graph):
    _, subject = convolutional()
    data = json.loads(translate(policy_of(subject, *PAIRS), "onnxruntime-overrides", subject, graph=graph))
    data["TensorQuantOverrides"]["e2"] = [{"quant_type": "QInt8"}]
    with pytest.raises(PolicyError, match="overrides 'e2', which no layer of a site reads"):
        understand(json.dumps(data), "onnxruntime-overrides", subject, graph=graph)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes_to_exclude": ["fc1"]}, "excludes 'fc1', which is no node of the graph; did you mean 'fc'"),
        ({"op_types_to_quantize": ["Conv", "Gemm", "Add"]}, "quantizes 'Add', for which a policy has no sites"),
        ({"extra": {"a": 1}}, "has 'extra' in the file, which a policy cannot say"),
    ],
)
def test_what_is_said_beside_the_overrides_is_refused(graph, change, message):
    _, subject = convolutional()
    data = json.loads(translate(policy_of(subject, *PAIRS), "onnxruntime-overrides", subject, graph=graph))
    data["nodes_to_exclude"] += ["relu1"]  # a node that nothing quantizes anyway
    assert understand(json.dumps(data), "onnxruntime-overrides", subject, graph=graph) == policy_of(subject, *PAIRS)
    with pytest.raises(PolicyError, match=message):
        understand(json.dumps({**data, **change}), "onnxruntime-overrides", subject, graph=graph)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"quant_type": "QInt8"}, {"quant_type": "QInt4"}], "gives channels of 'conv1.weight' QInt8 and QInt4"),
        ([{"quant_type": "QUInt16"}], "gives 'conv1.weight' 'QUInt16', which a policy cannot say; it has QInt4"),
        ([{"quant_type": "QInt8", "reduce_range": True}], "has 'reduce_range' in the override of 'conv1.weight'"),
    ],
)
def test_an_override_that_a_policy_cannot_say_is_refused(graph, entries, message):
    _, subject = convolutional()
    data = json.loads(translate(policy_of(subject, *PAIRS), "onnxruntime-overrides", subject, graph=graph))
    data["TensorQuantOverrides"]["conv1.weight"] = entries
    with pytest.raises(PolicyError, match=message):
        understand(json.dumps(data), "onnxruntime-overrides", subject, graph=graph)


def test_a_layer_of_two_inputs_has_one_width(graph, tmp_path):
    import onnx

    model = onnx.load(graph)
    model.graph.node.append(onnx.helper.make_node("Conv", ["b", "conv1.weight", "conv1.bias"], ["again"], name="conv1_again"))
    onnx.save(model, tmp_path / "twice.onnx")
    _, subject = convolutional()
    place = {"graph": str(tmp_path / "twice.onnx")}
    data = json.loads(translate(policy_of(subject, (8, 8), (8, 8), FLOAT), "onnxruntime-overrides", subject, **place))
    data["TensorQuantOverrides"]["x"] = [{"quant_type": "QUInt4"}]
    with pytest.raises(PolicyError, match="gives the inputs of 'conv1' 4, 8 bits; a policy has one width"):
        understand(json.dumps(data), "onnxruntime-overrides", subject, **place)
