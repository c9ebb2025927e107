"""Mixed widths as a circuit: hls4ml's C++ is compiled and its answers are the network's, bit for bit."""

import shutil

import pytest
import torch
from torch import nn

from bitwright.errors import ExportError
from bitwright.exporters import export
from bitwright.policy import Bits, Policy
from bitwright.quant import quantize
from bitwright.quant.convert import QuantOptions
from bitwright.sites import trace

ABSENT = "hls4ml is not installed"


def circuit_of(tmp_path, net, images, pairs, **options):
    pytest.importorskip("qonnx", reason="qonnx is not installed")
    traced = trace(net, images)
    policy = Policy((site.name, Bits(*pair)) for site, pair in zip(traced.sites, pairs, strict=True))
    options = {"scales": "power_of_two", "per_channel": False, **options}
    quantized = quantize(net, policy, calibration=images, options=QuantOptions(**options))
    export(quantized, "qonnx", tmp_path / "net.qonnx", example=images, policy=policy)
    from bitwright.fpga import to_hls4ml

    return quantized, to_hls4ml(tmp_path / "net.qonnx", tmp_path / "project")


def perceptron():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5))
    return net.eval(), torch.randn(64, 16)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_a_perceptron_of_mixed_widths_is_bit_exact_in_c(tmp_path):
    pytest.importorskip("hls4ml", reason=ABSENT)
    from bitwright.fpga import compare

    net, x = perceptron()
    quantized, circuit = circuit_of(tmp_path, net, x, [(8, 8), (3, 5), (6, 7)])
    weights = [str(layer.weights["weight"].type.precision) for layer in circuit.get_layers() if "weight" in layer.weights]
    assert [text.partition("<")[2].split(",")[0] for text in weights] == ["8", "3", "6"]  # the circuit's own types
    seen = compare(circuit, quantized, x)
    assert (seen.samples, seen.differing, seen.largest) == (64, 0, 0.0)
    assert seen.exact


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_a_convolutional_network_of_mixed_widths_is_bit_exact_in_c(tmp_path):
    pytest.importorskip("hls4ml", reason=ABSENT)
    from bitwright.fpga import compare

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 10)
    ).eval()
    images = torch.randint(0, 17, (32, 1, 8, 8)).float() / 16
    quantized, circuit = circuit_of(tmp_path, net, images, [(8, 5), (3, 4), (4, 6)])
    assert compare(circuit, quantized, images).exact


def test_scales_of_channels_are_refused(tmp_path):
    pytest.importorskip("hls4ml", reason=ABSENT)
    net, x = perceptron()
    with torch.no_grad():
        net[2].weight[0] *= 64
    with pytest.raises(ExportError, match=r"the weight of '2' has a scale for each channel, which hls4ml cannot convert; quantize with"):
        circuit_of(tmp_path, net, x, [(8, 8)] * 3, per_channel=True)


def test_what_hls4ml_does_not_know_is_one_message(tmp_path):
    pytest.importorskip("hls4ml", reason=ABSENT)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x).erf()

    with pytest.raises(ExportError, match=r"hls4ml cannot convert net.qonnx \("):
        circuit_of(tmp_path, Odd().eval(), torch.randn(8, 4), [(8, 8)])


def test_without_hls4ml_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "hls4ml", None)
    from bitwright.fpga import to_hls4ml

    with pytest.raises(ExportError, match=r"hls4ml is not installed .*pip install 'bitwright\[fpga\]'"):
        to_hls4ml(tmp_path / "net.qonnx", tmp_path)


def test_c_that_does_not_compile_is_an_error():
    from bitwright.fpga import compare

    class Broken:
        def compile(self):
            raise RuntimeError("Failed to compile project")

    net, x = perceptron()
    with pytest.raises(ExportError, match=r"the C\+\+ of hls4ml does not compile \(Failed to compile project\); is g\+\+ installed"):
        compare(Broken(), net, x)


def test_inputs_are_put_on_the_grid_of_the_input_type():
    from bitwright.fpga import on_input_grid

    assert on_input_grid(torch.tensor([0.3 + 2**-18])).item() == round(0.3 * 2**16) / 2**16
