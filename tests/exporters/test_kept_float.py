"""Layers with float weights stay in float in a default session of ONNX Runtime, whatever grids are around them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from deployed import IMAGES, deployed
from torch import nn

from bitwright.errors import ExportError
from bitwright.exporters import export
from bitwright.policy import Policy
from bitwright.quant import QuantOptions, quantize
from bitwright.sites import trace

onnx = pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")


class Residual(nn.Module):
    """Layers whose results and inputs are added, so that a target's points are around them."""

    def __init__(self, middle=None, move=None):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), middle or nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.move, self.fc = move or nn.Identity(), nn.Linear(8, 4)

    def forward(self, x):
        y = F.relu(self.a(x))
        y = y + F.relu(self.c(y))
        z = self.move(y)
        return self.fc(F.relu(self.b(z) + z).flatten(2).mean(2))


class Tokens(nn.Module):
    """The same of linear layers over tokens, which the runtime may turn into a ``Gemm``."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.fc = (nn.Linear(k, n) for k, n in ((16, 8), (8, 8), (8, 8), (8, 4)))

    def forward(self, x):
        y = self.a(x)
        y = y + self.c(y)
        return self.fc((self.b(y) + y).mean(1))


def exported(path, net, x, wide, points=("add", "concat", "pool", "shared")):
    """Export a network whose layer b has so many bits, and all others 8."""
    sites = trace(net, x).sites
    policy = Policy((site.name, (wide, wide) if site.name == "b" else (8, 8)) for site in sites)
    model = quantize(net, policy, calibration=x, sites=sites, options=QuantOptions(points=points))
    return export(model, "onnx", path, example=x, policy=policy)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


@pytest.mark.parametrize("scales", ["free", "power_of_two"])
def test_every_mixture_of_a_residual_network_runs_in_float_where_its_policy_is_float(tmp_path, scales):
    net = seeded(Residual)
    sites = trace(net, IMAGES).sites
    for bits in itertools.product((8, 32), repeat=len(sites)):
        policy = Policy((site.name, (b, b)) for site, b in zip(sites, bits, strict=True))
        options = QuantOptions(points=("add", "shared"), scales=scales)
        model = quantize(net, policy, calibration=IMAGES, sites=sites, options=options)
        artefact = export(model, "onnx", tmp_path / "m.onnx", example=IMAGES, policy=policy)
        executed = artefact.parity["executed"]
        assert [name for name, (w, _) in policy.items() if w == 32 and executed[name].startswith("int")] == []
        assert artefact.parity["last"] < 1e-4


MIDDLES = {
    "a convolution": Residual,
    "without a bias": lambda: Residual(nn.Conv2d(8, 8, 1, bias=False)),
    "transposed": lambda: Residual(nn.ConvTranspose2d(8, 8, 3, padding=1)),
    "behind a pooling": lambda: Residual(move=nn.MaxPool2d(2)),
    "behind a transposition": lambda: Residual(nn.Conv2d(8, 8, 1), move=Transposed()),
}


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(2, 3)


@pytest.mark.parametrize("wide", [16, 32])
@pytest.mark.parametrize("points", [("add",), ("add", "concat", "pool", "shared")])
@pytest.mark.parametrize("name", sorted(MIDDLES))
def test_no_kind_of_layer_with_float_weights_is_taken(tmp_path, name, points, wide):
    artefact = exported(tmp_path / "m.onnx", seeded(MIDDLES[name]), IMAGES, wide, points)
    assert artefact.parity["executed"]["b"].startswith("float32")
    assert artefact.parity["last"] < 1e-4


def test_a_linear_layer_over_tokens_is_not_taken(tmp_path):
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(2))
    artefact = exported(tmp_path / "m.onnx", seeded(Tokens), x, 32)
    assert artefact.parity["executed"]["b"].startswith("float32")
    assert artefact.parity["last"] < 1e-4


def test_integer_layers_beside_it_keep_their_kernels_and_nothing_is_left_unread(tmp_path):
    exported(tmp_path / "m.onnx", seeded(lambda: Residual(move=nn.MaxPool2d(2))), IMAGES, 32, ("add",))
    graph = onnx.load(str(tmp_path / "m.onnx")).graph
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    assert [node.name for node in graph.node if not read & set(node.output)] == []
    assert [node.op_type for node in graph.node if node.name.endswith("_float")] == ["DequantizeLinear", "MaxPool"]


def test_a_float_layer_that_runs_in_integers_is_refused_before_its_codes_are_compared(tmp_path, monkeypatch):
    from bitwright.exporters import onnx as exporter

    model, x, policy = deployed("tiny", [(8, 8), (32, 32)])
    floats = [site for site, (w, _) in policy.items() if w == 32]
    right = exporter.executed_precision
    monkeypatch.setattr(exporter, "executed_precision", lambda *given: {**right(*given), floats[0]: "int8: QLinearConv"})
    message = rf"rounds the float weights of these and runs them in integers: '{floats[0]}' \(int8: QLinearConv\); give them 8 bits"
    with pytest.raises(ExportError, match=message):
        export(model, "onnx", tmp_path / "m.onnx", example=x, policy=policy)
    assert list(tmp_path.iterdir()) == []


def test_a_stopwatch_times_float_layers_in_float_and_no_others_for_them(monkeypatch):
    from bitwright import timing
    from bitwright.targets import get_target

    net = seeded(Residual)
    found = trace(net, IMAGES)
    policy = Policy((site.name, (32, 32) if site.name == "b" else (8, 8)) for site in found.sites)
    seen, right = [], timing.executed_precision
    monkeypatch.setattr(timing, "executed_precision", lambda *given: seen.append(right(*given)) or seen[-1])
    watch = timing.Stopwatch(net, found, IMAGES, get_target("onnxruntime-x86"))
    watch.prepare(policy)
    assert seen[0]["b"].startswith("float32")
    assert seen[0]["a"].startswith("int8")
    monkeypatch.setattr(timing, "executed_precision", lambda *given: {**right(*given), "b": "int8: QLinearConv"})
    with pytest.raises(ExportError, match=r"runs them in integers: 'b' \(int8: QLinearConv\)"):
        watch.prepare(policy)
