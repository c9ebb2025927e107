"""QONNX files: run by qonnx itself, equal to the network, and their cost counted by qonnx as by us."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deployed import ALL, IMAGES, InPlace, into_result, network
from torch import nn

from bitwright.costs import BitOps
from bitwright.errors import ExportError
from bitwright.exporters import export, verify
from bitwright.policy import Bits, Policy
from bitwright.quant import quantize
from bitwright.quant.convert import QuantOptions
from bitwright.sites import trace

ABSENT = "qonnx is not installed"
EVERY = [(w, a) for w, a in zip(range(1, 9), (8, 7, 6, 5, 4, 3, 2, 8), strict=True)]


class Residual(nn.Module):
    """BatchNorm, a residual addition, groups, a stride, pooling and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 12, 3, stride=2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(F.max_pool2d(F.relu(self.conv3(x)), 2).mean((2, 3)))


def residual(seed=0):
    torch.manual_seed(seed)
    net = Residual()
    with torch.no_grad():
        for norm in (net.bn1, net.bn2):
            norm.weight.uniform_(-1.5, 1.5)
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return net.eval(), torch.randn(6, 3, 9, 9)


def written(tmp_path, pairs, *, to="qonnx", net=None, images=None, **options):
    pytest.importorskip("qonnx", reason=ABSENT)
    if net is None:
        net, images = residual()
    traced = trace(net, images)
    policy = Policy((site.name, Bits(*pair)) for site, pair in zip(traced.sites, pairs, strict=True))
    quantized = quantize(net, policy, calibration=images, options=QuantOptions(**options))
    return export(quantized, to, tmp_path / "net.qonnx", example=images, policy=policy), quantized, traced, policy


@pytest.mark.parametrize("w", range(1, 9))
def test_every_width_is_reproduced(tmp_path, w):
    a = 9 - w
    artefact, _, _, _ = written(tmp_path, [(8, 8), (w, max(2, a)), (w, a), (8, 8)])
    assert artefact.parity["agreement"] == 1
    assert sum(row["differing"] for row in artefact.parity["alone"]) <= 2
    assert artefact.largest_difference < 1e-4
    assert artefact.levels["conv2"] <= 2**w


def test_power_of_two_scales_are_bit_exact(tmp_path):
    artefact, _, _, _ = written(tmp_path, [(8, 8), (3, 5), (1, 4), (5, 7)], scales="power_of_two", points=("add", "pool"))
    assert artefact.largest_difference < 1e-6
    assert sum(row["differing"] for row in artefact.parity["chained"]) == 0


@pytest.mark.parametrize("pairs", [[(8, 8), (3, 5), (1, 4), (5, 7)], [(1, 8), (2, 2), (6, 3), (7, 1)], EVERY[1:5]])
def test_qonnx_counts_bit_operations_as_we_do(tmp_path, pairs):
    artefact, _, traced, policy = written(tmp_path, pairs)
    from bitwright.exporters.qonnx import costs_by_site, inference_costs

    counted = inference_costs(artefact.path)
    assert costs_by_site(counted, traced.sites) == {site.name: BitOps()(site, policy[site.name]) for site in traced.sites}
    assert {name: cost["macs"] for name, cost in counted.items()} == {site.name: site.macs for site in traced.sites}


@pytest.mark.parametrize("w", [1, 4])
def test_groups_of_a_transposed_convolution_share_the_scales_of_their_channels(tmp_path, w):
    net, images = network("grouped")
    artefact, _, _, _ = written(tmp_path, [(8, 8), (w, 6), (8, 8)], net=net, images=images)
    assert artefact.parity["outputs"] < 1e-4


def test_what_is_changed_in_place_after_it_was_quantized_is_compared_as_it_was(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = InPlace(into_result).eval()
    artefact, _, _, _ = written(tmp_path, [(8, 8)] * 4, net=net, images=IMAGES, points=ALL)
    assert artefact.parity["outputs"] < 0.01


def test_one_bit_is_a_bipolar_quant_of_ones(tmp_path):
    artefact, _, _, _ = written(tmp_path, [(8, 8), (1, 4), (2, 4), (1, 8)])
    import onnx

    graph = onnx.load(str(artefact.path)).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    bipolar = [node for node in graph.node if node.op_type == "BipolarQuant"]
    assert [node.name for node in bipolar] == ["conv2.weight_quant", "fc.weight_quant"]
    for node in bipolar:
        assert np.unique(values[node.input[0]]).tolist() == [-1, 1]
        assert values[node.input[1]] == 1
    widths = {node.name: float(values[node.input[3]]) for node in graph.node if node.op_type == "Quant" and "weight" in node.name}
    assert widths == {"conv1.weight_quant": 8, "conv3.weight_quant": 2}


def test_qonnx_runs_the_file_from_its_own_function(tmp_path):
    artefact, quantized, _, _ = written(tmp_path, [(8, 8), (3, 5), (2, 4), (5, 7)])
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    from bitwright.exporters.qonnx import _runnable_nodes

    image = torch.randn(1, 3, 9, 9)
    with warnings.catch_warnings(), _runnable_nodes(10):
        warnings.simplefilter("ignore")
        model = ModelWrapper(str(artefact.path)).transform(InferShapes())
        assert model.get_tensor_shape(model.graph.input[0].name) == [1, 3, 9, 9]
        (found,) = execute_onnx(model, {model.graph.input[0].name: image.numpy()}).values()
    with torch.no_grad():
        assert np.allclose(found, quantized(image).numpy(), atol=1e-4)


def test_products_of_activations(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 4)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)

    pytest.importorskip("qonnx", reason=ABSENT)
    torch.manual_seed(0)
    net, x = Attention().eval(), torch.randn(4, 5, 8)
    traced = trace(net, x)
    policy = Policy(zip(traced.names, [(4, 8), (6, 6), (5, 5), (3, 4)], strict=True))
    quantized = quantize(net, policy, calibration=x, sites=traced.sites)
    artefact = export(quantized, "qonnx", tmp_path / "attention.qonnx", example=x, policy=policy)
    assert artefact.parity["outputs"] < 1e-5
    found = {row.name: row.bits for row in verify(artefact.path).tensors if row.kind == "activation"}
    assert found == {"qkv.input": 8, "#0.left": 6, "#0.right": 6, "#1.left": 5, "#1.right": 5, "out.input": 4}
    with pytest.raises(ExportError, match="the policy says 6 bits for the left operand of '#0', which has 3 bits"):
        verify(edited(artefact.path, set_bits("#0.left_quant", 3)))


def test_one_bit_of_a_signed_activation(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    artefact, _, _, _ = written(tmp_path, [(1, 1), (2, 1), (3, 1)], net=net, images=torch.randn(32, 8), scales="power_of_two")
    assert artefact.largest_difference == 0
    assert sum(row["differing"] for row in artefact.parity["chained"]) == 0


def test_a_file_is_verified_and_a_damaged_one_refused(tmp_path):
    artefact, _, _, policy = written(tmp_path, [(8, 8), (3, 5), (1, 4), (5, 7)])
    seen = verify(artefact.path)
    assert (seen.to, seen.policy) == ("qonnx", policy)
    assert {row.name: row.levels for row in seen.tensors if row.kind == "weight"} == dict(artefact.levels)
    (tmp_path / "copy.onnx").write_bytes(artefact.path.read_bytes())
    assert verify(tmp_path / "copy.onnx").policy == policy  # by its operators, whatever its name
    data = bytearray(artefact.path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.qonnx").write_bytes(data)
    with pytest.raises(ExportError, match=r"tampered|truncated|damaged|refused|cut off"):
        verify(tmp_path / "bad.qonnx", to="qonnx")


def edited(path, change, *, metadata=None):
    """Write a file anew after a change of its graph or of what it says of itself, with a right checksum."""
    import json

    import onnx

    from bitwright.exporters._onnx_file import KEY, SUM, checksum

    model = onnx.load(str(path))
    change({node.name: node for node in model.graph.node}, {tensor.name: tensor for tensor in model.graph.initializer})
    said = json.loads({entry.key: entry.value for entry in model.metadata_props}[KEY])
    for key, value in (metadata(said) if metadata else {}).items():
        said[key] = value
    onnx.helper.set_model_props(model, {KEY: json.dumps(said)})
    onnx.helper.set_model_props(model, {KEY: json.dumps(said), SUM: checksum(model)})
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def set_bits(node_name, width):
    def change(nodes, tensors):
        import onnx

        bits = tensors[nodes[node_name].input[3]]
        bits.CopyFrom(onnx.numpy_helper.from_array(np.asarray(width, np.float32), bits.name))

    return change


@pytest.mark.parametrize(
    ("node", "width", "message"),
    [
        ("conv3.weight_quant", 4, "the policy says 2 bits for the weight of 'conv3', which has 4 bits in its Quant node"),
        ("fc.weight_quant", 7, "the policy says 5 bits for the weight of 'fc', which has 7 bits"),
        ("conv2.input_quant", 8, "the policy says 5 bits for the input of 'conv2', which has 8 bits"),
        ("fc.input_quant", 1, "the policy says 7 bits for the input of 'fc', which has 1 bit in its Quant node"),
        ("fc.input_quant", 6.5, "its metadata do not fit its graph .*'fc.input_quant' has .6.5. bits"),
    ],
)
def test_a_width_in_a_node_that_is_not_the_policys_is_refused_by_site(tmp_path, node, width, message):
    artefact, _, _, _ = written(tmp_path, [(8, 8), (3, 5), (2, 4), (5, 7)])
    assert {(row.name, row.bits) for row in verify(artefact.path).tensors if row.kind == "activation"} == {
        ("conv1.input", 8),
        ("conv2.input", 5),
        ("conv3.input", 4),
        ("fc.input", 7),
    }
    with pytest.raises(ExportError, match=message):
        verify(edited(artefact.path, set_bits(node, width)))


def test_a_policy_that_promises_more_than_the_nodes_have_is_refused_by_site(tmp_path):
    artefact, _, _, _ = written(tmp_path, [(8, 8), (3, 5), (1, 4), (5, 7)])

    def promise(said):
        said["policy"]["sites"]["conv3"] = {"w": 2, "a": 4}
        weights = [[name, [2, 4] if name == "conv3" else bits, *rest] for name, bits, *rest in said["weights"]]
        return {"policy": said["policy"], "layers": {**said["layers"], "conv3": [2, 4]}, "weights": weights}

    with pytest.raises(ExportError, match="says 2 bits for the weight of 'conv3', which has 1 bit in its BipolarQuant node"):
        verify(edited(artefact.path, lambda nodes, tensors: None, metadata=promise))


def test_a_layer_without_a_grid_is_refused_by_site(tmp_path):
    artefact, _, _, _ = written(tmp_path, [(8, 8), (3, 5), (2, 4), (5, 7)])

    def bypass(nodes, _):
        nodes["conv2"].input[0] = nodes["conv2.input_quant"].input[0]

    with pytest.raises(ExportError, match="the policy says 5 bits for the input of 'conv2', which has no Quant node"):
        verify(edited(artefact.path, bypass))


def test_what_cannot_be_said_is_an_error(tmp_path):
    with pytest.raises(ExportError, match=r"the weight of 'conv1' is on a grid without zero .*quantize with quantizer='lsq'"):
        written(tmp_path, [(3, 8)] * 4, quantizer="dorefa")
    net, images = residual()
    with pytest.raises(ExportError, match="the model has no quantized layer; pass what quantize"):
        export(net, "qonnx", tmp_path / "float.qonnx", example=images)
    assert not list(tmp_path.iterdir())


def test_a_network_that_the_file_does_not_reproduce_leaves_no_file(tmp_path, monkeypatch):
    pytest.importorskip("qonnx", reason=ABSENT)
    from bitwright.exporters import qonnx

    right = qonnx._quant
    monkeypatch.setattr(qonnx, "_quant", lambda writer, x, scale, width, name, **kind: right(writer, x, scale * 1.5, width, name, **kind))
    with pytest.raises(ExportError, match="qonnx does not reproduce the network"):
        written(tmp_path, [(8, 8)] * 4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("activations", [1, 2, 3])
@pytest.mark.parametrize("sites", [("0",), ("0", "2", "4"), ("4",)])
def test_negated_weights_leave_no_file_whatever_the_width_of_activations(tmp_path, monkeypatch, activations, sites):
    pytest.importorskip("qonnx", reason=ABSENT)
    from bitwright.exporters.qonnx import QuantEmission

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    images = torch.rand(32, 12)
    artefact, _, _, _ = written(tmp_path, [(4, activations)] * 3, net=net, images=images)
    artefact.path.unlink()
    right = QuantEmission._write_codes

    def negated(self, coded, scale, codes):
        return right(self, coded, scale, (-codes).clip(-8, 7) if coded.address in sites else codes)

    monkeypatch.setattr(QuantEmission, "_write_codes", negated)
    found = r"given the network's own codes, its outputs differ" if sites == ("4",) else "does not reproduce the network"
    with pytest.raises(ExportError, match=found):
        written(tmp_path, [(4, activations)] * 3, net=net, images=images)
    assert not (tmp_path / "net.qonnx").exists()


def test_a_node_of_no_site_is_named():
    pytest.importorskip("qonnx", reason=ABSENT)
    from bitwright.exporters.qonnx import costs_by_site

    net, images = residual()
    with pytest.raises(ExportError, match="qonnx counts a node 'other' that belongs to no site"):
        costs_by_site({"other": {"bitops": 1.0}}, trace(net, images).sites)


def test_without_qonnx_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qonnx", None)
    net, images = residual()
    quantized = quantize(net, Policy(dict.fromkeys(trace(net, images).names, Bits(8, 8))), calibration=images)
    with pytest.raises(ExportError, match=r"qonnx is not installed .*pip install 'bitwright\[qonnx\]'"):
        export(quantized, "qonnx", tmp_path / "net.qonnx", example=images)
