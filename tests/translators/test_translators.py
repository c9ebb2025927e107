"""What all formats have in common: exact names, nothing lost in silence, hostile files refused."""

import json

import pytest
import torch
from torch import nn
from translated import convolutional, perceptron, policy_of

from bitwright.errors import PolicyError
from bitwright.policy import Bits, Policy
from bitwright.sites import trace
from bitwright.translators import FLOAT, Subject, available, get, translate, understand

PLAIN = ("torchao", "compressed-tensors", "modelopt", "nncf")
"""Formats that need nothing but names."""


def test_the_folder_is_the_registry():
    assert available() == ("aimet", "compressed-tensors", "llama.cpp", "modelopt", "nncf", "onnxruntime-overrides", "torchao")
    with pytest.raises(PolicyError, match="no format 'torcha0'; did you mean 'torchao'"):
        get("torcha0")
    with pytest.raises(PolicyError, match="torchao has no option 'graph'; it has none"):
        translate(Policy({}), "torchao", Subject(()), graph="x")
    with pytest.raises(PolicyError, match="modelopt has no option 'algorithms'; did you mean 'algorithm'"):
        translate(Policy({}), "modelopt", Subject(()), algorithms="x")


@pytest.mark.parametrize("name", PLAIN)
def test_a_policy_comes_back(name):
    _, subject = perceptron()
    policy = policy_of(subject, (8, 8), (32, 32), (8, 8), (32, 32))
    assert understand(translate(policy, name, subject), name, subject) == policy


@pytest.mark.parametrize(
    ("name", "pairs"), [("torchao", ((1, 8), (3, 32), (7, 8), (32, 32))), ("modelopt", ((1, 2), (3, 32), (32, 8), (5, 7)))]
)
def test_mixed_widths_come_back(name, pairs):
    _, subject = perceptron()
    policy = policy_of(subject, *pairs)
    assert understand(translate(policy, name, subject), name, subject) == policy


@pytest.mark.parametrize("name", PLAIN)
def test_functional_calls_have_no_name_and_are_said_so(name):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return (q @ k.transpose(1, 2)).softmax(-1) @ v

    subject = Subject(trace(Attention(), torch.zeros(1, 5, 8)).sites)
    with pytest.raises(PolicyError, match=r"cannot say 2 of 3 sites: '#0' at W8A8 \(it is a functional call.*'#1'"):
        translate(policy_of(subject, (8, 8), (8, 8), (8, 8)), name, subject)
    policy = policy_of(subject, (8, 8), (32, 32), (32, 32))
    if name == "nncf":  # quantize() would quantize the products too, and compress_weights() has none to compress
        with pytest.raises(PolicyError, match=r"nncf\.quantize also quantizes '#0', a functional call"):
            translate(policy, name, subject)
        policy = policy_of(subject, (8, 32), (32, 32), (32, 32))
    assert understand(translate(policy, name, subject), name, subject) == policy


@pytest.mark.parametrize(
    ("name", "bits", "reason"),
    [
        ("torchao", Bits(4, 8), "torchao quantizes linear layers, and this is a conv2d"),
        ("compressed-tensors", Bits(4, 8), "it quantizes linear layers, and this is a conv2d"),
        ("modelopt", Bits(16, 8), "it has no weights of 16 bits, only 1, 2, 3, 4, 5, 6, 7, 8, 32"),
        ("nncf", Bits(4, 8), "NNCF has W8A8, W8A32, W4A32 and float only"),
        ("nncf", Bits(4, 32), "NNCF has no W4A32 for a conv2d"),
        ("onnxruntime-overrides", Bits(3, 8), "it has no weights of 3 bits, only 4, 8"),
        ("onnxruntime-overrides", Bits(4, 32), "it has no inputs of 32 bits, only 4, 8"),
        ("aimet", Bits(1, 8), "it has no weights of 1 bits, only 2, 3"),
        ("llama.cpp", Bits(4, 32), "llama.cpp has no types for a conv2d"),
    ],
)
def test_what_a_format_cannot_say_names_the_sites(name, bits, reason):
    _, subject = convolutional()
    with pytest.raises(PolicyError, match=rf"{name} cannot say \d of 3 sites: 'conv1' at {bits!r} \({reason}") as caught:
        translate(Policy.from_json(policy_of(subject, bits, bits, FLOAT).to_json()), name, subject)
    assert "'layer.0' at" in str(caught.value)


class Attentive(nn.Module):
    """Attention whose output projection is never called, or, written out, is."""

    def __init__(self, *, stock):
        super().__init__()
        self.stock, self.fc = stock, nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True) if stock else WrittenOut()

    def forward(self, x):
        x = self.fc(x)
        return self.attention(x, x, x, need_weights=False)[0] if self.stock else self.attention(x)


class WrittenOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.out_proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.out_proj(torch.nn.functional.scaled_dot_product_attention(x, x, x))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("skip", [(), ("attention#qk", "attention#av", "attention.in_proj_weight")])
def test_a_projection_that_is_never_called_cannot_be_said(name, skip):
    traced = trace(Attentive(stock=True).eval(), torch.zeros(1, 5, 8), skip=skip)
    subject = Subject(traced.sites, skipped=tuple(traced.skipped))
    wanted = {"fc": Bits(8, 8), "attention.out_proj": Bits(8, 8)}
    policy = Policy((site.name, wanted.get(site.name, FLOAT)) for site in traced.sites)
    reason = rf"'attention.out_proj' at W8A8 \(nn.MultiheadAttention uses its weight and never calls it, so {name} does not reach it"
    with pytest.raises(PolicyError, match=rf"{name} cannot say 1 of \d sites: {reason}; give it W32A32"):
        translate(policy, name, subject)
    if name != "nncf":  # cannot leave the other weights of the attention alone
        policy = Policy({**policy, "attention.out_proj": FLOAT})
        assert understand(translate(policy, name, subject), name, subject) == policy


@pytest.mark.parametrize("name", ["torchao", "compressed-tensors", "modelopt"])
def test_a_projection_of_the_same_name_that_is_called_can_be_said(name):
    subject = Subject(trace(Attentive(stock=False), torch.zeros(1, 5, 8)).sites)
    policy = Policy((site.name, FLOAT if "#" in site.name else Bits(8, 8)) for site in subject.sites)
    assert policy["attention.out_proj"] == Bits(8, 8)
    assert understand(translate(policy, name, subject), name, subject) == policy


def test_nncf_compresses_no_functional_call_unasked():
    subject = Subject(trace(Attentive(stock=True).eval(), torch.zeros(1, 5, 8)).sites)
    policy = Policy((site.name, Bits(8, 32) if site.name == "fc" else FLOAT) for site in subject.sites)
    with pytest.raises(PolicyError, match=r"nncf.compress_weights also quantizes 'attention#0', a functional call without a name"):
        translate(policy, "nncf", subject)


@pytest.mark.parametrize(("name", "option"), [("modelopt", "algorithm"), ("aimet", "graph"), ("llama.cpp", "architecture")])
def test_an_option_that_is_no_text_is_refused(name, option):
    with pytest.raises(PolicyError, match=rf"option '{option}' of {name} is 5, which is no text; give --option {option}=TEXT"):
        translate(Policy({}), name, Subject(()), **{option: 5})


def test_tied_layers_must_agree():
    net, _ = perceptron()
    subject = Subject(trace(net, torch.zeros(1, 32), tie=[("fc10", "fc")]).sites)
    policy = policy_of(subject, (4, 8), (2, 8), (8, 8))
    text = translate(policy, "torchao", subject)
    assert understand(text, "torchao", subject) == policy
    data = json.loads(text)
    data["_data"]["fqn_to_config"]["fc"] = None
    with pytest.raises(PolicyError, match=r"gives the layers of site 'fc10' different bits \(fc10 W2A8, fc W32A32\)"):
        understand(json.dumps(data), "torchao", subject)


def test_policies_and_files_that_do_not_fit_the_network():
    _, subject = perceptron()
    with pytest.raises(PolicyError, match="the network has no site 'fc11'; did you mean 'fc1"):
        translate(Policy({"fc11": (8, 8)}), "torchao", subject)
    with pytest.raises(PolicyError, match="no entry for site 'fc10'; give every site its bits"):
        translate(Policy({"fc1": (8, 8)}), "torchao", subject)
    text = translate(policy_of(subject, *[(8, 8)] * 4), "torchao", subject).replace("fc10", "fc11")
    with pytest.raises(PolicyError, match="the file of torchao names 'fc11', which is no layer of a site; did you mean 'fc1"):
        understand(text, "torchao", subject)


@pytest.mark.parametrize("name", [*PLAIN, "aimet", "onnxruntime-overrides"])
@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"_type": 3}', '{"quant_cfg": 4}', "[" * 100_000, '{"config_groups": {"a": 1}}'])
def test_anything_else_is_no_file_of_the_format(name, text):
    _, subject = perceptron()
    with pytest.raises(PolicyError, match=r"not a file of|expected a FqnToConfig|does not begin"):
        understand(text, name, subject)


def test_a_key_twice_is_refused():
    _, subject = perceptron()
    text = translate(policy_of(subject, *[(8, 8)] * 4), "torchao", subject)
    with pytest.raises(PolicyError, match="the file of torchao has 'fc1' twice; keep one"):
        understand(text.replace('"fc10"', '"fc1"'), "torchao", subject)


def test_a_huge_file_is_refused_unread(monkeypatch):
    monkeypatch.setattr("bitwright.translators.LARGEST", 10)
    with pytest.raises(PolicyError, match="has 11 characters, more than a policy can have"):
        understand("[" * 11, "torchao", Subject(()))


def test_llama_cpp_is_written_only():
    with pytest.raises(PolicyError, match=r"files of llama.cpp can only be written; keep the policy.json"):
        understand("", "llama.cpp", Subject(()))
