"""Mixed widths as a circuit: hls4ml's C++ is compiled and its answers are the network's, bit for bit."""

import faulthandler
import os
import shutil
import signal

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


class Averaging(nn.Module):
    """Convolutions whose pixels are averaged; as many channels as pixels in a row, or not."""

    def __init__(self, channels, *, named):
        super().__init__()
        self.named, self.pool = named, nn.AdaptiveAvgPool2d(1)
        self.a, self.b, self.fc = nn.Conv2d(1, 4, 3), nn.Conv2d(4, channels, 3, padding=1), nn.Linear(channels, 3)

    def forward(self, x):
        y = self.b(self.a(x).relu()).relu()
        return self.fc(self.pool(y).flatten(1) if self.named else y.mean((2, 3)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize(("channels", "side", "named"), [(4, 6, False), (6, 5, True)])
def test_a_global_average_is_bit_exact_in_c(tmp_path, channels, side, named):
    pytest.importorskip("hls4ml", reason=ABSENT)
    from bitwright.fpga import compare

    torch.manual_seed(0)
    images = torch.randint(0, 17, (32, 1, side, side)).float() / 16
    net = Averaging(channels, named=named).eval()
    quantized, circuit = circuit_of(tmp_path, net, images, [(8, 5), (3, 4), (4, 6)], points=["pool"])
    assert compare(circuit, quantized, images).exact


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize("width", [1, 8])
def test_a_layer_without_a_bias_and_one_of_one_bit_are_bit_exact_in_c(tmp_path, width):
    pytest.importorskip("hls4ml", reason=ABSENT)
    from bitwright.fpga import compare

    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 8, bias=width == 1), nn.ReLU(), nn.Linear(8, 5)).eval(), torch.randn(64, 16)
    quantized, circuit = circuit_of(tmp_path, net, x, [(width, 8), (3, 5)])
    assert compare(circuit, quantized, x).exact


def test_a_convolution_of_one_bit_is_refused(tmp_path):
    pytest.importorskip("hls4ml", reason=ABSENT)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    with pytest.raises(ExportError, match=r"net.qonnx: the weight of the convolution '0' has one bit, .*; give it 2 bits or more"):
        circuit_of(tmp_path, net, torch.rand(4, 1, 8, 8), [(1, 8), (4, 4)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; give what the exporter qonnx wrote"),
        (b"{}", "is no ONNX model"),
        ("plain", "has no Quant node; give what the exporter qonnx wrote"),
    ],
)
def test_other_files_are_one_message(tmp_path, content, message):
    pytest.importorskip("hls4ml", reason=ABSENT)
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    from bitwright.fpga import to_hls4ml

    file = tmp_path / "net.qonnx"
    if content == "plain":
        ends = [[onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4])] for name in ("x", "y")]
        graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "plain", *ends)
        content = onnx.helper.make_model(graph).SerializeToString()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ExportError, match=message):
        to_hls4ml(file, tmp_path / "project")


class Dying:
    """A circuit whose code ends its process."""

    def __init__(self, end):
        self.end = end

    def predict(self, images):
        faulthandler.disable()  # pytest's, which would print where
        self.end()


@pytest.mark.parametrize(
    ("end", "message"), [(lambda: os.kill(os.getpid(), signal.SIGILL), "died of SIGILL"), (lambda: os._exit(3), "status 3")]
)
def test_a_simulation_that_dies_is_an_error(end, message):
    from bitwright.fpga import simulate

    with pytest.raises(ExportError, match=rf"the C simulation .*{message}; hls4ml wrote code that cannot run"):
        simulate(Dying(end), torch.zeros(1, 4))


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
