"""Tensor types for llama-quantize, against its documented ``name=type`` lines."""

import re

import pytest
import torch
from torch import nn

from bitwright.errors import PolicyError
from bitwright.policy import Bits, Policy
from bitwright.sites import trace
from bitwright.translators import Subject, translate


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, x):
        return self.o_proj(self.q_proj(x))


class Block(nn.Module):
    def __init__(self, name="self_attn"):
        super().__init__()
        self.name = name
        self.add_module(name, Attention())

    def forward(self, x):
        return getattr(self, self.name)(x)


class Language(nn.Module):
    """Named as transformers names a Llama."""

    def __init__(self, blocks=12, name="self_attn"):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.Sequential(*(Block(name) for _ in range(blocks)))
        self.lm_head = nn.Linear(256, 20, bias=False)

    def forward(self, x):
        return self.lm_head(self.model.layers(x))


def subject_of(net):
    return Subject(trace(net, torch.zeros(1, 3, 256)).sites)


def test_each_tensor_gets_its_type_and_no_other_tensor_does():
    pytest.importorskip("gguf", reason="gguf is not installed")
    subject = subject_of(Language())
    widths = [2, 3, 4, 5, 6, 8, 16, 32]
    policy = Policy((site.name, Bits(widths[i % 8], 32)) for i, site in enumerate(subject.sites))
    lines = translate(policy, "llama.cpp", subject).splitlines()
    assert lines[0] == r"^blk\.0\.attn_q\.weight$=q2_k"
    assert lines[-1] == r"^output\.weight$=q2_k"
    names = [f"blk.{block}.{part}.weight" for block in range(12) for part in ("attn_q", "attn_output")] + ["output.weight"]
    for line in lines:  # llama-quantize searches the expression anywhere in the name
        pattern, _, kind = line.rpartition("=")
        assert len([name for name in names if re.search(pattern, name)]) == 1
        assert kind in {"q2_k", "q3_k", "q4_0", "q5_0", "q6_k", "q8_0", "bf16", "f32"}


def test_types_are_known_to_gguf():
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    from bitwright.translators.llama_cpp import TYPES

    assert {kind.upper() for kind in TYPES.values()} <= {kind.name for kind in gguf.GGMLQuantizationType}


def test_its_own_names_need_no_mapping():
    net = nn.Sequential()
    net.add_module("output", nn.Linear(256, 8))
    assert translate(Policy({"output": (4, 32)}), "llama.cpp", subject_of(net)) == "^output\\.weight$=q4_0\n"


def test_messages():
    subject = subject_of(Language(1))
    for bits, message in (
        (Bits(4, 8), r"cannot say 3 of 3 sites.*llama-quantize cannot be told widths of activations; leave them in float \(32\)"),
        (Bits(1, 32), "it has no type of 1 bits, only 2, 3, 4, 5, 6, 8, 16, 32"),
        (Bits(7, 32), "it has no type of 7 bits"),
    ):
        with pytest.raises(PolicyError, match=message):
            translate(Policy((site.name, bits) for site in subject.sites), "llama.cpp", subject)
    policy = Policy((site.name, Bits(4, 32)) for site in subject.sites)
    pytest.importorskip("gguf", reason="gguf is not installed")
    with pytest.raises(PolicyError, match=r"llama.cpp has no architecture 'llamma'; did you mean 'llama'"):
        translate(policy, "llama.cpp", subject, architecture="llamma")
    odd = subject_of(Language(1, "attention_of_mine"))
    with pytest.raises(PolicyError, match=r"has no tensor for 'model.layers.0.attention_of_mine.q_proj'; give --option architecture=NAME"):
        translate(Policy((site.name, Bits(4, 32)) for site in odd.sites), "llama.cpp", odd)


@pytest.mark.parametrize(("columns", "width", "kind", "block"), [(896, 2, "q2_k", 256), (48, 4, "q4_0", 32), (896, 6, "q6_k", 256)])
def test_rows_that_no_block_divides_are_refused_as_llama_quantize_would_take_another_type(columns, width, kind, block):
    net = nn.Sequential()
    net.add_module("output", nn.Linear(columns, 8))
    subject = Subject(trace(net, torch.zeros(1, columns)).sites)
    with pytest.raises(PolicyError, match=f"{kind} needs rows of a multiple of {block} weights, and these have {columns}"):
        translate(Policy({"output": (width, 32)}), "llama.cpp", subject)


def test_blocks_are_those_of_gguf():
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    from bitwright.translators.llama_cpp import BLOCKS

    assert {kind: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]][0] for kind in BLOCKS} == BLOCKS


def test_without_gguf_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    subject = subject_of(Language(1))
    with pytest.raises(PolicyError, match=r"is no name of llama.cpp; pip install 'bitwright\[llm\]'"):
        translate(Policy((site.name, Bits(4, 32)) for site in subject.sites), "llama.cpp", subject)
