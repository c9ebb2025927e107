"""NNCF itself makes the call in the file, and its quantizers stand where the policy says."""

import json
import os

import pytest
import torch
from translated import convolutional, perceptron, policy_of

from bitwright.errors import PolicyError
from bitwright.translators import Subject, translate, understand

SLOW = "NNCF compiles an extension when it first quantizes; set BITWRIGHT_TEST_NNCF=1 to run this"


def hooked(network, kind):
    """Return what NNCF has put on weights, by the layer's path: at the parameter itself, or at operand 1 of the layer's call."""
    found = {name.split(".")[-2]: type(module).__name__ for name, module in network.named_modules() if kind in type(module).__name__}
    weights = {at.removesuffix(":weight__0").replace(":", "."): made for at, made in found.items() if at.endswith(":weight__0")}
    calls = {at.rsplit("/", 2)[0].replace("/", "."): made for at, made in found.items() if at.endswith("/0__1")}
    return weights | calls


def called(nncf, net, text, x):
    data = json.loads(text)
    arguments = dict(data["arguments"])
    scope = nncf.IgnoredScope(**arguments.pop("ignored_scope"))
    if "mode" in arguments:
        arguments["mode"] = nncf.CompressWeightsMode(arguments["mode"])
        return nncf.compress_weights(net, ignored_scope=scope, dataset=nncf.Dataset([x]), **arguments)
    return nncf.quantize(net, nncf.Dataset([x]), ignored_scope=scope, subset_size=1, **arguments)


@pytest.mark.skipif("BITWRIGHT_TEST_NNCF" not in os.environ, reason=SLOW)
def test_nncf_quantizes_what_the_file_does_not_ignore():
    nncf = pytest.importorskip("nncf", reason="nncf is not installed")
    net, subject = convolutional()
    policy = policy_of(subject, (8, 8), (32, 32), (8, 8))
    quantized = called(nncf, net, translate(policy, "nncf", subject), torch.randn(2, 3, 8, 8))
    assert set(hooked(quantized, "Quantizer")) == {"conv1", "fc"}


@pytest.mark.parametrize(("pair", "kind"), [((8, 32), "INT8Symmetric"), ((4, 32), "INT4Symmetric")])
def test_nncf_compresses_what_the_file_does_not_ignore(pair, kind):
    nncf = pytest.importorskip("nncf", reason="nncf is not installed")
    net, subject = perceptron()
    policy = policy_of(subject, pair, (32, 32), pair, pair)
    result = hooked(called(nncf, net, translate(policy, "nncf", subject), torch.randn(2, 32)), "Decompressor")
    assert set(result) == {"fc1", "fc", "block.fc"}
    assert all(name.startswith(kind) for name in result.values())


def test_nodes_are_named_as_nncf_names_them():
    _, subject = convolutional()
    data = json.loads(translate(policy_of(subject, (32, 32), (8, 8), (32, 32)), "nncf", subject))
    assert data == {"call": "quantize", "arguments": {"ignored_scope": {"names": ["conv1/conv2d/0", "fc/linear/0"], "validate": True}}}


@pytest.mark.parametrize("pair", [(8, 8), (8, 32), (4, 32)])
def test_each_call_comes_back(pair):
    _, subject = perceptron()
    policy = policy_of(subject, pair, (32, 32), pair, pair)
    assert understand(translate(policy, "nncf", subject), "nncf", subject) == policy


def test_two_pairs_at_once_cannot_be_said():
    _, subject = perceptron()
    with pytest.raises(PolicyError, match="cannot say W8A32 and another pair at once: 'fc' at W4A32; NNCF knows one pair"):
        translate(policy_of(subject, (8, 32), (8, 32), (4, 32), (32, 32)), "nncf", subject)
    with pytest.raises(PolicyError, match="nncf has nothing to do where every site is float"):
        translate(policy_of(subject, *[(32, 32)] * 4), "nncf", subject)


def test_a_layer_in_a_list_cannot_be_left_out():
    net, subject = perceptron()
    with pytest.raises(PolicyError, match=r"nncf has no name for 'block.fc', which is in the list 'block'; quantize it as well"):
        translate(policy_of(subject, (8, 8), (8, 8), (8, 8), (32, 32)), "nncf", Subject(subject.sites, net))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ignored_scope": {"names": [], "patterns": [".*"]}}, "ignores by patterns or types"),
        ({"ignored_scope": {"names": ["fc2/linear/0"]}}, "ignores 'fc2/linear/0', which is no layer of a site"),
        ({"mode": "nf4", "ignored_scope": {"names": []}}, "asks for quantize.*which gives no width that a policy knows"),
    ],
)
def test_what_a_policy_cannot_say_is_refused(change, message):
    _, subject = perceptron()
    with pytest.raises(PolicyError, match=message):
        understand(json.dumps({"call": "quantize", "arguments": change}), "nncf", subject)
