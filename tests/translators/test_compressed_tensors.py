"""compressed-tensors itself takes the configuration, and its schemes have the policy's widths."""

import json

import pytest
import torch
from torch import nn
from translated import perceptron, policy_of

from bitwright.errors import PolicyError
from bitwright.policy import Bits
from bitwright.sites import trace
from bitwright.translators import FLOAT, Subject, translate, understand

MIXED = ((3, 8), (4, 32), (32, 8), (32, 32))


def test_a_mixed_policy_comes_back():
    _, subject = perceptron()
    policy = policy_of(subject, *MIXED)
    text = translate(policy, "compressed-tensors", subject)
    assert understand(text, "compressed-tensors", subject) == policy
    assert understand(json.dumps({"quantization_config": json.loads(text)}), "compressed-tensors", subject) == policy  # as in config.json


def test_compressed_tensors_applies_the_file():
    tool = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    net, subject = perceptron()
    policy = policy_of(subject, *MIXED)
    tool.apply_quantization_config(net, tool.QuantizationConfig(**json.loads(translate(policy, "compressed-tensors", subject))))
    applied = {}
    for site in subject.sites:
        scheme = getattr(net.get_submodule(site.name), "quantization_scheme", None)
        widths = [32 if args is None else args.num_bits for args in (scheme.weights, scheme.input_activations)] if scheme else FLOAT
        applied[site.name] = Bits(*widths)
    assert applied == dict(policy)
    assert net(torch.randn(2, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ["Linear"]}, "has the pattern 'Linear'; a policy names layers one by one"),
        ({"targets": ["re:fc.*"]}, "has the pattern 're:fc"),
        ({"weights": {"num_bits": 8, "type": "float"}}, "has 'float' numbers, and a policy has integers"),
        ({"output_activations": {"num_bits": 8}}, "quantizes outputs, which a policy does not"),
        ({"weights": {"num_bits": 16, "type": "int"}}, "gives the weights of 'group_0' 16 bits, and a policy has integers of 1 to 8"),
        ({"weights": {"num_bits": 32}}, "gives the weights of 'group_0' 32 bits"),
        ({"weights": {"num_bits": 8.7}}, "gives the weights of 'group_0' 8.7 bits"),
        ({"weights": {"num_bits": 8, "strategy": "group", "group_size": 16}}, "has scales by 'group' in the weights of 'group_0'"),
        (
            {"weights": {"num_bits": 8, "group_size": 16}},
            "has 'group_size' in the weights of 'group_0', which a policy cannot say; remove it",
        ),
        ({"targets": ["fc1", "block.fc"]}, "gives 'block.fc' W3A8 and ignores it; leave one of them out"),
        ({"targets": ["fc1", "fc10"]}, "gives 'fc10' W3A8 and W4A32; keep one"),
    ],
)
def test_what_a_policy_cannot_say_is_refused(change, message):
    _, subject = perceptron()
    data = json.loads(translate(policy_of(subject, *MIXED), "compressed-tensors", subject))
    data["config_groups"]["group_0"].update(change)
    with pytest.raises(PolicyError, match=message):
        understand(json.dumps(data), "compressed-tensors", subject)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "has 'kv_cache_scheme' in the file, which a policy cannot say; remove it"),
        ({"sparsity_config": {"format": "sparse"}}, "has 'sparsity_config' in the file"),
        ({"quant_method": "gptq"}, "the file is one of 'gptq', not of compressed-tensors"),
    ],
)
def test_what_is_said_beside_the_groups_is_refused(change, message):
    _, subject = perceptron()
    data = json.loads(translate(policy_of(subject, *MIXED), "compressed-tensors", subject))
    empty = {**data, "kv_cache_scheme": None, "sparsity_config": {}, "version": "0.20"}
    assert understand(json.dumps(empty), "compressed-tensors", subject) == policy_of(subject, *MIXED)
    with pytest.raises(PolicyError, match=message):
        understand(json.dumps({**data, **change}), "compressed-tensors", subject)


def test_a_name_that_is_a_class_is_refused():
    net = nn.Sequential()
    net.add_module("Linear", nn.Linear(4, 4))
    subject = Subject(trace(net, torch.zeros(1, 4)).sites)
    with pytest.raises(PolicyError, match="the name 'Linear' would match more than one layer"):
        translate(policy_of(subject, (8, 8)), "compressed-tensors", subject)
