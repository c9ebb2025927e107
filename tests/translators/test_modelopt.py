"""ModelOpt itself takes the configuration, and its quantizers have the policy's widths."""

import json

import pytest
import torch
from torch import nn
from translated import convolutional, perceptron, policy_of

from bitwright.errors import PolicyError
from bitwright.policy import Bits
from bitwright.sites import trace
from bitwright.translators import Subject, translate, understand


@pytest.mark.parametrize("build", [perceptron, convolutional])
def test_modelopt_applies_the_file(build):
    tool = pytest.importorskip("modelopt.torch.quantization", reason="modelopt is not installed", exc_type=ImportError)
    net, subject = build()
    x = torch.randn(4, 32) if build is perceptron else torch.randn(4, 3, 8, 8)
    pairs = ((3, 4), (4, 32), (32, 8), (32, 32)) if build is perceptron else ((4, 3), (2, 8), (32, 32))
    policy = policy_of(subject, *pairs)
    quantized = tool.quantize(net, json.loads(translate(policy, "modelopt", subject)), lambda model: model(x))
    applied = {}
    for site in subject.sites:
        layer = quantized.get_submodule(site.name)
        parts = [getattr(layer, f"{part}_quantizer") for part in ("weight", "input")]
        applied[site.name] = Bits(*(part.num_bits if part.is_enabled else 32 for part in parts))
    assert applied == dict(policy)
    assert quantized(x).shape == (4, 10)


def test_wildcards_in_names_are_escaped():
    net = nn.Sequential()
    for name in ("a[0]", "a*", "ab"):
        net.add_module(name, nn.Linear(4, 4))
    subject = Subject(trace(net, torch.zeros(1, 4)).sites)
    policy = policy_of(subject, (2, 8), (3, 8), (4, 8))
    text = translate(policy, "modelopt", subject)
    assert [entry["quantizer_name"] for entry in json.loads(text)["quant_cfg"][1::2]] == [
        "a[[]0].weight_quantizer",
        "a[*].weight_quantizer",
        "ab.weight_quantizer",
    ]
    assert understand(text, "modelopt", subject) == policy


def test_an_unknown_algorithm_is_refused():
    _, subject = perceptron()
    policy = policy_of(subject, *[(8, 8)] * 4)
    assert json.loads(translate(policy, "modelopt", subject, algorithm="mse"))["algorithm"] == "mse"
    with pytest.raises(PolicyError, match="modelopt has no algorithm 'nonsense'; known: max, mse, smoothquant, awq_lite"):
        translate(policy, "modelopt", subject, algorithm="nonsense")
    with pytest.raises(PolicyError, match=r"modelopt has no algorithm 'awq-lite'; did you mean 'awq_lite'\?"):
        translate(policy, "modelopt", subject, algorithm="awq-lite")


def test_a_transposed_convolution_has_its_channels_on_the_other_axis():
    subject = Subject(trace(nn.Sequential(nn.ConvTranspose2d(2, 3, 2)), torch.zeros(1, 2, 4, 4)).sites)
    (_, entry, _) = json.loads(translate(policy_of(subject, (4, 8)), "modelopt", subject))["quant_cfg"]
    assert entry["cfg"] == {"num_bits": 4, "axis": 1}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8}}], "does not begin by switching all quantizers off"),
        ([{"quantizer_name": "*", "enable": False}, {"quantizer_name": "fc*.weight_quantizer", "cfg": {"num_bits": 8}}], "the pattern"),
        (
            [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "fc.output_quantizer", "cfg": {}}],
            "sets fc.output_quantizer, which",
        ),
        (
            [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "fc.weight_quantizer", "cfg": {"num_bits": [4, 3]}}],
            r"gives fc.weight_quantizer \[4, 3\] bits, and a policy has integers",
        ),
        (
            [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "fc.weight_quantizer", "cfg": {"num_bits": 16}}],
            r"gives fc.weight_quantizer 16 bits, and a policy has integers of 1 to 8 \(its 16 is bfloat16, its 32 float32\)",
        ),
        (
            [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "fc.weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {"-1": 16}}},
            ],
            "has 'block_sizes' in fc.weight_quantizer, which a policy cannot say; remove it",
        ),
        (
            [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "fc.weight_quantizer", "parent_class": "nn.Conv2d", "cfg": {"num_bits": 4}},
            ],
            "has 'parent_class' in the entry of fc.weight_quantizer",
        ),
    ],
)
def test_what_a_policy_cannot_say_is_refused(entries, message):
    _, subject = perceptron()
    with pytest.raises(PolicyError, match=message):
        understand(json.dumps({"quant_cfg": entries, "algorithm": "max"}), "modelopt", subject)
