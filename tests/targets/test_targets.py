"""Targets say what runs; choices are restricted before a search, and a policy is checked against them by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitwright import models
from bitwright.errors import TargetError
from bitwright.exporters import export
from bitwright.policy import Bits, Policy
from bitwright.problem import build_choices
from bitwright.quant import quantize
from bitwright.sites import trace
from bitwright.targets import available, get_target, kind_of

NAMES = ("bitfusion", "generic", "nvidia-gpu", "onnxruntime-x86", "openvino-x86", "qonnx-fpga", "size-only")


@pytest.fixture(scope="module")
def digits():
    return trace(models.build("digits_cnn"), torch.zeros(1, 1, 8, 8))


def test_every_bundled_target_is_read_and_says_what_it_is_called():
    assert available() == NAMES
    for name in NAMES:
        target = get_target(name)
        assert (target.name, target.version >= 1) == (name, True)
        assert all(rule.runs for rules in target.layers.values() for rule in rules)


@pytest.mark.parametrize("name", NAMES)
def test_a_restricted_choice_is_legal_and_one_outside_is_named_with_its_nearest(name, digits):
    target = get_target(name)
    weights, activations = target.widths()
    choices = target.restrict(digits, build_choices(digits, weights, activations))
    for site in digits.sites:
        assert choices[site.name]
        assert set(choices[site.name]) <= set(target.legal(site))
        for bits in target.legal(site):
            assert target.nearest(site, bits) == bits
            assert target.runs(site, bits)
    policy = Policy({site.name: choices[site.name][0] for site in digits.sites})
    target.check(digits, policy)
    assert target.violations(digits, policy) == ()


def test_violations_name_each_site_and_the_nearest_widths_that_run(digits):
    target = get_target("openvino-x86")
    policy = Policy(dict.fromkeys(digits.names, (8, 8))).replace({"conv2": Bits(4, 4), "fc": Bits(1, 8)})
    with pytest.raises(TargetError, match=r"2 of 6 sites .*'conv2' \(convolution\) has W4A4, nearest W4A8; 'fc' \(linear\) has W1A8"):
        target.check(digits, policy)


def test_a_network_with_one_float_type_has_no_32_beside_16(digits):
    target = get_target("openvino-x86")
    choices = target.restrict(digits, build_choices(digits, (8, 16, 32), (8, 16, 32), pin_first="free", pin_last="free"))
    assert {bits for allowed in choices.values() for bits in allowed if 16 in bits or 32 in bits} == {Bits(16, 16), Bits(8, 16)}
    only = target.restrict(digits, build_choices(digits, (8, 32), (8, 32), pin_first="free", pin_last="free"))
    assert all(Bits(32, 32) in allowed for allowed in only.values())
    policy = Policy(dict.fromkeys(digits.names, (16, 16))).replace({"conv2": Bits(32, 32)})
    with pytest.raises(TargetError, match=r"1 of 6 sites .*'conv2' \(convolution\) has W32A32, nearest W16A16"):
        target.check(digits, policy)


def test_pinned_ends_are_checked_and_their_widths_too(digits, tmp_path):
    file = tmp_path / "mine.yaml"
    text = HEAD + "pinned: {first: %s}, layers: {convolution: [{w: [4, 8], a: [8], runs: i}], linear: [{w: [8], a: [8], runs: i}]}}"
    file.write_text(text % "[8, 8]")
    policy = Policy(dict.fromkeys(digits.names, (8, 8))).replace({digits.first: Bits(4, 8)})
    with pytest.raises(TargetError, match="has W4A8, nearest W8A8"):
        get_target(file).check(digits, policy)
    file.write_text(text % "[0, 8]")
    with pytest.raises(TargetError, match="width 0 is not one of"):
        get_target(file)


def test_a_kind_that_does_not_run_hides_no_other_violation():
    attention = trace(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)), torch.zeros(1, 3, 8))
    policy = Policy(dict.fromkeys(attention.names, (3, 16)))
    found = get_target("qonnx-fpga").violations(attention, policy)
    assert [v.site for v in found] == list(attention.names)
    assert {v.nearest is None for v in found} == {True, False}


def test_what_the_target_does_not_run_at_all_is_an_error_before_the_search(digits):
    with pytest.raises(TargetError, match="site 'conv2' may be W3A3, W3A5, W5A3, W5A5, and W1A1"):
        get_target("bitfusion").restrict(digits, build_choices(digits, (3, 5), (3, 5)))


def test_kinds_of_layers_are_told_apart(digits):
    assert [kind_of(site) for site in digits.sites] == ["convolution", "convolution", "depthwise", "convolution", "convolution", "linear"]
    up = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 2, 2)), torch.zeros(1, 3, 8, 8))
    assert kind_of(up.sites[1]) == "transposed"
    attention = trace(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)), torch.zeros(1, 3, 8))
    products = [site for site in attention.sites if site.operands == 2]
    assert {kind_of(site) for site in products} == {"product"}
    assert all(bits.w == bits.a for site in products for bits in get_target("generic").legal(site))
    with pytest.raises(TargetError, match="runs no product"):
        get_target("qonnx-fpga").nearest(products[0], Bits(8, 8))


class Bilinear(nn.Module):
    """A layer, a weight that is used without one, and a product of two activations."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Parameter(torch.randn(5, 6))

    def forward(self, x):
        y = self.layer(x)
        return nn.functional.linear(torch.matmul(x.unsqueeze(2) * 0.1, y.unsqueeze(1)).mean(2), self.head)


@pytest.mark.parametrize("name", ["generic", "size-only"])
def test_what_a_packed_file_cannot_hold_does_not_run_on_its_targets(name, tmp_path):
    torch.manual_seed(0)
    net, x = Bilinear().eval(), torch.randn(4, 6)
    target, traced = get_target(name), trace(net, x)
    assert target.legal(traced["head"]) == ()
    assert min(min(bits) for bits in target.legal(traced["#0"])) >= 16
    with pytest.raises(TargetError, match=r"'head' \(functional call with a weight\) has W4A8, which runs at no widths: skip it"):
        target.check(traced, Policy(dict.fromkeys(traced.names, (32, 32))).replace({"head": Bits(4, 8)}))
    with pytest.raises(TargetError, match="runs no functional call with a weight, such as 'head'; skip it"):
        target.restrict(traced, build_choices(traced, (4, 32), (8, 32), pin_first="free", pin_last="free"))
    some = trace(net, x, skip=["head"])
    choices = target.restrict(some, build_choices(some, (4, 32), (8, 32), pin_first="free", pin_last="free"))
    assert choices["#0"] == (Bits(32, 32),)
    policy = Policy({site: allowed[0] for site, allowed in choices.items()})
    quantized = quantize(net, policy, calibration=x, sites=some.sites, skip=some.skipped)
    export(quantized, target.exporter, tmp_path / "m", example=x, policy=policy)


def test_attention_that_a_packed_file_cannot_hold_is_named_by_its_module():
    attention = trace(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)), torch.zeros(1, 3, 8))
    policy = Policy(dict.fromkeys(attention.names, (4, 4)))
    with pytest.raises(TargetError, match=r"'0.self_attn.in_proj_weight' \(functional call .*\) has W4A4, .*: skip '0.self_attn'"):
        get_target("generic").check(attention, policy)


def test_a_file_of_ones_own_is_a_target(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("{format: bitwright-target-1, name: mine, version: 2, about: a chip, layers: {linear: [{w: [2], a: [8], runs: int}]}}")
    assert get_target(file).widths() == ([2], [8])


HEAD = "{format: bitwright-target-1, name: m, version: 1, about: a, "
LINEAR = "layers: {linear: [{w: [8], a: [8], runs: i}]}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{name: mine}", "format"),
        (
            HEAD + "layers: {}, pints: []}",
            "unknown key 'pints'; did you mean 'points'",
        ),
        (
            HEAD + "layers: {linear: [{w: [9], a: [8], runs: i}]}}",
            "width 9 is not one of",
        ),
        (HEAD + "layers: {conv: []}}", "layers.conv"),
        ("!!python/object/apply:os.system [echo]", "not valid YAML"),
        (HEAD + "layers: {}, points: [adds]}", "points.0"),
        ("[1]", "target .*mine.yaml: expected a valid dictionary"),
        (HEAD + "layers: {}}", "layers: no rule, so nothing runs; give one"),
        (HEAD + "layers: {linear: []}}", "layers: no rule, so nothing runs; give one"),
        (HEAD + LINEAR + ", exporter: onxx}", "exporter: no format 'onxx'; did you mean 'onnx'"),
        (HEAD + LINEAR + ", exporter: ../x}", "exporter: no format '../x'; known: onnx, openvino, packed, qonnx"),
        (HEAD + LINEAR + ", exporter: onnx, latency: openvino}", "latency: openvino goes with exporter onnx; give exporter: openvino, or"),
        (
            HEAD + LINEAR + ", latency: onnxruntime}",
            "latency: onnxruntime goes with no exporter; give exporter: onnx, or leave latency out",
        ),
        (HEAD + LINEAR + ", pinned: {first: [2, 2]}}", "pinned.first: no rule runs W2A2; give widths that a rule has, or add a rule"),
        (HEAD + LINEAR + ", pinned: {last: [8, 4]}}", "pinned.last: no rule runs W8A4"),
    ],
)
def test_a_malformed_target_is_refused_by_what_is_wrong(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(Exception, match=message):
        get_target(file)


def test_an_unknown_target_names_the_nearest():
    with pytest.raises(TargetError, match="did you mean 'openvino-x86'"):
        get_target("openvino-x68")


def test_an_endless_file_is_not_read(tmp_path):
    file = tmp_path / "large.yaml"
    file.write_bytes(b" " * (1 << 21))
    with pytest.raises(TargetError, match="larger than 1048576 bytes"):
        get_target(file)
