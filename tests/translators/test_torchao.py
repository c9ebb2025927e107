"""torchao itself takes the file, and what it then holds has the policy's widths."""

import json

import pytest
import torch
from translated import perceptron, policy_of

from bitwright.errors import PolicyError
from bitwright.policy import Bits
from bitwright.translators import translate, understand


def test_torchao_applies_the_file():
    config = pytest.importorskip("torchao.core.config", reason="torchao is not installed")
    from torchao.quantization import quantize_

    net, subject = perceptron()
    policy = policy_of(subject, (3, 32), (4, 8), (1, 32), (32, 32))
    read = config.config_from_dict(json.loads(translate(policy, "torchao", subject)))
    quantize_(net, read, filter_fn=None)
    applied = {}
    for site in subject.sites:
        weight = net.get_submodule(site.name).weight
        width = getattr(weight, "target_dtype", None)
        inputs = 8 if str(getattr(weight, "activation_quantization", None)).startswith("int8") else 32
        applied[site.name] = Bits(32 if width is None else int(str(width).removeprefix("torch.int")), inputs)
    assert applied == dict(policy)
    assert net(torch.randn(2, 32)).shape == (2, 10)
    # and what torchao writes itself is read
    assert understand(json.dumps(config.config_to_dict(read)), "torchao", subject) == policy


@pytest.mark.parametrize(
    ("entry", "bits"),
    [
        ({"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}, Bits(8, 32)),
        ({"_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2, "_data": {}}, Bits(8, 8)),
        ({"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": {}}, Bits(8, 32)),
    ],
)
def test_other_configurations_are_read(entry, bits):
    _, subject = perceptron()
    text = json.dumps({"_type": "FqnToConfig", "_version": 1, "_data": {"module_fqn_to_config": {"fc1": entry}}})
    assert list(understand(text, "torchao", subject).values()) == [bits, *[Bits(32, 32)] * 3]


@pytest.mark.parametrize(
    ("key", "entry", "message"),
    [
        ("re:fc.*", None, "has the pattern 're:fc"),
        ("_default", None, "has the pattern '_default'"),
        ("fc1", {"_type": "Int4WeightOnlyConfig", "_data": {}}, "'Int4WeightOnlyConfig' of 'fc1' .* has scales for groups of weights"),
        (
            "fc1",
            {"_type": "IntxWeightOnlyConfig", "_data": {"granularity": {"_type": "PerGroup", "_data": {"group_size": 32}}}},
            "'IntxWeightOnlyConfig' of 'fc1' has the granularity 'PerGroup'; a policy cannot say groups",
        ),
        (
            "fc1",
            {"_type": "Int8DynamicActivationIntxWeightConfig", "_data": {}},
            "'fc1' has the granularity 'PerGroup', which it has by default",
        ),
        (
            "fc1",
            {"_type": "Int8WeightOnlyConfig", "_data": {"group_size": 64}},
            "has 'group_size' in Int8WeightOnlyConfig of 'fc1', which a policy cannot say; remove it",
        ),
        (
            "fc1",
            {"_type": "IntxWeightOnlyConfig", "_data": {"weight_dtype": {"_data": "uint4"}}},
            "weights of 'fc1' are 'uint4', which a policy cannot say; it has int1, int2",
        ),
        ("fc1", {"_type": "Float8WeightOnlyConfig", "_data": {}}, "torchao's 'Float8WeightOnlyConfig' of 'fc1' has no integer widths"),
    ],
)
def test_patterns_and_floats_are_refused(key, entry, message):
    _, subject = perceptron()
    with pytest.raises(PolicyError, match=message):
        understand(json.dumps({"_type": "FqnToConfig", "_data": {"fqn_to_config": {key: entry}}}), "torchao", subject)


def test_another_configuration_is_no_fqn_to_config():
    _, subject = perceptron()
    with pytest.raises(PolicyError, match="holds a 'Int8WeightOnlyConfig', expected a FqnToConfig of torchao"):
        understand(json.dumps({"_type": "Int8WeightOnlyConfig", "_data": {}}), "torchao", subject)


def test_two_maps_of_layers_must_be_one():
    _, subject = perceptron()
    entry = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}
    data = {"fqn_to_config": {"fc1": entry}, "module_fqn_to_config": {"fc1": entry}}
    assert understand(json.dumps({"_type": "FqnToConfig", "_data": data}), "torchao", subject)["fc1"] == Bits(8, 32)
    data["module_fqn_to_config"] = {"fc1": entry, "fc": entry}
    with pytest.raises(PolicyError, match="fqn_to_config and module_fqn_to_config differ at 'fc'; keep one of them"):
        understand(json.dumps({"_type": "FqnToConfig", "_data": data}), "torchao", subject)
