"""OpenVINO networks run each layer in what the policy says, and are refused where they do not or compute something else."""

from __future__ import annotations

import json

import pytest
import torch
from deployed import ALL, deployed
from torch import nn

from bitwright import models, trace
from bitwright.errors import ExportError
from bitwright.exporters import export, verify
from bitwright.policy import Policy
from bitwright.quant import QuantOptions, quantize

pytest.importorskip("openvino", reason="the extra [openvino] is not installed")
pytest.importorskip("onnx", reason="the extra [openvino] is not installed")


def residual(*, points):
    """Return a ResNet at W4A4 with settled BatchNorms and power-of-two scales, images and the policy."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = models.build("cifar_resnet20"), torch.rand(4, 3, 16, 16)
        with torch.no_grad():
            for _ in range(20):
                net(x)
    sites = trace(net.eval(), x).sites
    policy = Policy({site.name: (4, 4) for site in sites})
    options = QuantOptions(points=points, scales="power_of_two")
    return quantize(net, policy, calibration=x, sites=sites, options=options).eval(), x, policy


@pytest.mark.parametrize(
    ("name", "bits", "kinds"),
    [
        ("option-a", [(8, 8), (16, 16)], {"int8", "bf16"}),
        ("inverted", [(4, 8), (8, 8)], {"int8"}),
        ("tiny", [(8, 8), (32, 32)], {"int8", "float32"}),
        ("digits", [(16, 16)], {"bf16"}),
    ],
)
def test_every_layer_runs_in_what_the_policy_says(tmp_path, name, bits, kinds):
    model, x, policy = deployed(name, bits)
    artefact = export(model, "openvino", tmp_path / "m.xml", example=x, policy=policy)
    facts = json.loads((tmp_path / "m.xml.parity.json").read_text())
    assert set(facts["executed"].values()) == kinds
    assert facts["outputs"] <= 0.05
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "m.xml", "m.xml.parity.json"]
    verified = verify(tmp_path / "m.xml")
    assert (verified.policy, verified.levels) == (policy, artefact.levels)
    assert verified.answer <= 0.05


def test_weights_of_4_bits_stay_so_beside_bfloat16_activations(tmp_path):
    model, x, policy = deployed("tiny", [(16, 16), (4, 16), (8, 16)])
    artefact = export(model, "openvino", tmp_path / "m.xml", example=x, policy=policy)
    assert artefact.parity["executed"] == {"0": "bf16", "4": "bf16 by int4", "5": "bf16 by int8"}
    assert {row.name: row.stored for row in verify(tmp_path / "m.xml").tensors}["4"] == "i4"


def test_a_layer_before_a_batchnorm_that_shifts_nothing_is_seen_to_run_in_bfloat16(tmp_path):
    """OpenVINO leaves a sum with zero out, and would name the layer after a product that it makes itself."""
    x = torch.rand(2, 1, 8, 8)
    net = models.build("digits_cnn").eval()
    sites = trace(net, x).sites
    policy = Policy({site.name: (16, 16) for site in sites})
    model = quantize(net, policy, calibration=x, sites=sites).eval()
    artefact = export(model, "openvino", tmp_path / "m.xml", example=x, policy=policy)
    assert set(artefact.parity["executed"].values()) == {"bf16"}
    assert artefact.parity["executed"].keys() == policy.keys()


def test_few_bit_activations_that_come_out_wrong_are_refused_with_their_likely_cause(tmp_path):
    """Every step is a power of two, so a runtime that follows the file gives the network's outputs bit for bit: ONNX Runtime does."""
    model, x, policy = residual(points=ALL)
    right = export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy)
    assert (right.parity["exact"], right.largest_difference) == (True, 0.0)
    with pytest.raises(ExportError, match=r"OpenVINO computes other outputs .*, 0\.01 % allowed, .*fewer than 8 bits, as at 'conv1'"):
        export(model, "openvino", tmp_path / "m.xml", example=x, policy=policy)
    assert not (tmp_path / "m.xml").exists()


def test_few_bit_activations_that_come_out_right_pass_at_the_same_bound(tmp_path):
    """The same network at the same widths, without points: OpenVINO then has no rounding to move across an addition."""
    model, x, policy = residual(points=())
    assert export(model, "openvino", tmp_path / "m.xml", example=x, policy=policy).parity["outputs"] < 1e-4


@pytest.mark.parametrize(
    ("scales", "points", "found"),
    [
        ("power_of_two", ALL, r"off by 2\.\d* % of the largest, 0\.01 % allowed"),
        ("free", ALL, r"off by 1\.\d* % of the largest in half of the samples, 0\.1 % allowed"),
        ("power_of_two", (), None),
        ("free", (), None),
    ],
)
def test_few_bit_activations_that_come_out_wrong_by_less_than_was_asked_for_are_refused_too(tmp_path, scales, points, found):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = models.build("resnet8").eval(), torch.rand(16, 3, 32, 32)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.1, 0.1)
    sites = trace(net, x).sites
    policy = Policy({site.name: (4, 4) for site in sites})
    model = quantize(net, policy, calibration=x, sites=sites, options=QuantOptions(points=points, scales=scales)).eval()
    if found is None:
        assert export(model, "openvino", tmp_path / "m.xml", example=x, policy=policy).parity["outputs"] < 1e-6
    else:
        with pytest.raises(ExportError, match=found):
            export(model, "openvino", tmp_path / "m.xml", example=x, policy=policy)


class Tokens(nn.Module):
    """Two layers over tokens, and an average over these at the network's output, before a function, or between the layers."""

    def __init__(self, place):
        super().__init__()
        self.one, self.two, self.place = nn.Linear(6, 8), nn.Linear(8, 3), place

    def forward(self, x):
        if self.place == "between":
            return self.two(self.one(x).mean(1))
        x = self.two(self.one(x)).mean(1)
        return x if self.place == "output" else torch.relu(x)


@pytest.mark.parametrize("place", ["output", "function", "between"])
def test_an_average_over_tokens_behind_a_point_is_right(tmp_path, place):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = Tokens(place).eval(), torch.rand(8, 7, 6)
    sites = trace(net, x).sites
    policy = Policy({site.name: (8, 8) for site in sites})
    model = quantize(net, policy, calibration=x, sites=sites, options=QuantOptions(points=ALL)).eval()
    artefact = export(model, "openvino", tmp_path / "m.xml", example=x, policy=policy)
    assert set(artefact.parity["executed"].values()) == {"int8"}


def test_layers_that_run_otherwise_and_two_float_types_are_refused(tmp_path):
    model, x, policy = deployed("block", [(8, 8)])
    with pytest.raises(ExportError, match="does not run 2 layers as the policy says: 'attention#qk' is W8A8 and runs in"):
        export(model, "openvino", tmp_path / "m.xml", example=x, policy=policy)
    model, x, policy = deployed("tiny", [(16, 16), (32, 32)])
    with pytest.raises(ExportError, match="has 16 bits and '4' 32, and an OpenVINO network has one type"):
        export(model, "openvino", tmp_path / "m.xml", example=x, policy=policy)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    model, x, policy = deployed("tiny", [(8, 8)])
    path = tmp_path_factory.mktemp("good") / "m.xml"
    export(model, "openvino", path, example=x, policy=policy)
    return path


@pytest.mark.parametrize(("ending", "change"), [(".xml", "cut"), (".bin", "cut"), (".xml", "flip"), (".bin", "flip"), (".bin", "gone")])
def test_damaged_files_are_refused_with_the_reason(good, tmp_path, ending, change):
    for suffix in (".xml", ".bin"):
        (tmp_path / f"m{suffix}").write_bytes(good.with_suffix(suffix).read_bytes())
    file = tmp_path / f"m{ending}"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(file.read_bytes()[:-40] if change == "cut" else data)
    if change == "gone":
        file.unlink()
    with pytest.raises(ExportError, match="no such file" if change == "gone" else "tampered with or damaged|cut off"):
        verify(tmp_path / "m.xml", to="openvino")


def test_a_file_of_another_ending_would_overwrite_its_weights_and_is_refused(tmp_path):
    model, x, policy = deployed("tiny", [(8, 8)])
    with pytest.raises(ExportError, match=r"a file of openvino ends in \.xml; name it m\.xml"):
        export(model, "openvino", tmp_path / "m.bin", example=x, policy=policy)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_are_skipped_stay_in_float32(tmp_path):
    from openvino import Core

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 5)).eval()
    x = torch.rand(4, 3, 8, 8)
    found = trace(net, x, skip=["2"])
    policy = Policy(dict.fromkeys(found.names, (8, 8)))
    model = quantize(net, policy, calibration=x, sites=found.sites, skip=found.skipped).eval()
    artefact = export(model, "openvino", tmp_path / "m.xml", example=x, policy=policy)
    assert artefact.parity["runtime_options"] == {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = Core().compile_model(str(tmp_path / "m.xml"), "CPU", artefact.parity["runtime_options"])
    kinds = {str(port.get_element_type().get_type_name()) for op in compiled.get_runtime_model().get_ops() for port in op.inputs()}
    assert "bf16" not in kinds
