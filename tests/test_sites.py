"""What `trace` finds in every kind of model, what it refuses, and that it leaves the model alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from bitwright.calls import read_call, slots
from bitwright.errors import SiteError
from bitwright.models import build
from bitwright.sites import Site, trace


def summary(model, example, **options):
    return {site.name: (site.kind, site.macs, site.weights, site.calls) for site in trace(model, example, **options).sites}


class Net(nn.Module):
    """A module with the given attributes and the given forward."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs, **named):
        return self.run(self, *inputs, **named)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


# ---------------------------------------------------------------- layers

LAYERS = [
    (nn.Conv1d(4, 6, 3, groups=2), (4, 10), "conv1d", 6 * 8 * 2 * 3, 0, 6),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 8, 8), "conv2d", 6 * 16 * 4 * 9, 0, 6),
    (nn.Conv2d(8, 16, 3, groups=8, padding=2, dilation=2), (8, 5, 5), "conv2d", 16 * 25 * 9, 0, 16),
    (nn.Conv3d(2, 3, (1, 2, 3)), (2, 4, 4, 4), "conv3d", 3 * 4 * 3 * 2 * 2 * 6, 0, 3),
    (nn.ConvTranspose1d(4, 6, 3), (4, 7), "conv_transpose1d", 4 * 7 * 6 * 3, 1, 6),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), (4, 5, 5), "conv_transpose2d", 4 * 25 * 3 * 9, 1, 6),
    (nn.ConvTranspose3d(2, 3, 2), (2, 3, 3, 3), "conv_transpose3d", 2 * 27 * 3 * 8, 1, 3),
    (nn.Linear(8, 5), (7, 8), "linear", 7 * 8 * 5, 0, 5),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 8, 8), "conv2d", 6 * 64 * 4 * 9, 0, 6),
]


@pytest.mark.parametrize(("layer", "shape", "kind", "macs", "axis", "channels"), LAYERS)
def test_each_layer_type(layer, shape, kind, macs, axis, channels):
    (site,) = trace(nn.Sequential(layer), torch.zeros(3, *shape)).sites
    assert (site.name, site.kind, site.layers, site.macs, site.channel_axis) == ("0", kind, ("0",), macs, axis)
    assert site.weight_shape == tuple(layer.weight.shape)
    assert (site.groups, site.weights, site.operands) == (getattr(layer, "groups", 1), layer.weight.numel(), 1)
    assert site.tensors == ((layer.weight.numel(), channels),)


def test_counts_are_per_sample():
    net = build("digits_cnn")
    one, five = trace(net, torch.zeros(1, 1, 8, 8)), trace(net, torch.zeros(5, 1, 8, 8))
    assert one == five
    assert one["conv1"].acts == 64
    assert (one.first, one.last, one.parameters) == ("conv1", "fc", sum(p.numel() for p in net.parameters()))


def test_order_is_execution_order_and_unused_layers_are_no_sites():
    net = Net(lambda m, x: m.first(m.second(x)), first=nn.Linear(4, 4), second=nn.Linear(4, 4), unused=nn.Linear(4, 4))
    assert trace(net, torch.zeros(1, 4)).names == ("second", "first")


def test_nested_containers_and_branches():
    branches = nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), nn.ModuleList([nn.Linear(4, 2)])[0]), "b": nn.Linear(4, 2)})
    net = Net(lambda m, x: m.inner["a"](x) + m.inner["b"](x), inner=branches)
    assert trace(net, torch.zeros(1, 4)).names == ("inner.a.1", "inner.b")


def test_shared_module_is_one_site():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    net = Net(lambda m, x, y: m.a(x) + m.b(y[..., :4, :4]), a=conv, b=conv)
    (site,) = trace(net, (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))).sites
    assert (site.name, site.layers, site.calls, site.weights, site.macs) == ("a", ("a",), 2, 81, 2 * 81 * 16)


def test_tied_weights_are_one_site_with_both_layers():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    (site,) = trace(net, torch.zeros(1, 4)).sites
    assert (site.layers, site.calls, site.weights, site.macs) == (("0", "1"), 2, 16, 32)


def test_tuple_and_dict_examples():
    net = Net(lambda m, x, y=None: m.f(x) + m.g(y), f=nn.Linear(4, 2), g=nn.Linear(3, 2))
    x, y = torch.zeros(2, 4), torch.zeros(2, 3)
    assert trace(net, (x, y)) == trace(net, {"x": x, "y": y})


# ---------------------------------------------------------------- functional calls


def test_functional_calls_are_named_by_their_parameter():
    def run(m, x):
        x = F.conv2d(x, m.w, padding=1)
        x = torch.conv2d(input=x, weight=m.many[0])
        return F.linear(x.mean((2, 3)), m.head)

    net = Net(run, w=parameter(4, 3, 3, 3), many=nn.ParameterList([parameter(6, 4, 1, 1)]), head=parameter(5, 6))
    sites = trace(net, torch.zeros(2, 3, 8, 8)).sites
    assert [(s.name, s.layers, s.kind) for s in sites] == [
        ("w", ("#0",), "conv2d"),
        ("many.0", ("#1",), "conv2d"),
        ("head", ("#2",), "linear"),
    ]
    assert [s.macs for s in sites] == [4 * 64 * 27, 6 * 64 * 4, 30]


@pytest.mark.parametrize(
    ("product", "shape", "axis"),
    [
        (lambda x, w: x @ w, (6, 3), 1),
        (lambda x, w: torch.addmm(torch.zeros(3), x, w), (6, 3), 1),
        (lambda x, w: torch.einsum("bi,io->bo", x, w), (6, 3), 1),
        (lambda x, w: torch.einsum("bi,oi->bo", [x, w]), (3, 6), 0),
        (lambda x, w: torch.einsum("...i,oi", x, w), (3, 6), 0),
        (lambda x, w: w @ x.T, (3, 6), 0),
        (lambda x, w: torch.mm(input=x, mat2=w), (6, 3), 1),
    ],
)
def test_a_matrix_product_with_a_parameter_is_linear(product, shape, axis):
    (site,) = trace(Net(lambda m, x: product(x, m.w), w=parameter(*shape)), torch.zeros(4, 6)).sites
    assert (site.name, site.kind, site.macs, site.weights, site.acts) == ("w", "linear", 18, 18, 6)
    assert (site.channel_axis, site.tensors) == (axis, ((18, 3),))


def test_a_batched_weight_keeps_the_kind_matmul():
    (site,) = trace(Net(lambda m, x: torch.bmm(x.expand(3, -1, -1), m.experts), experts=parameter(3, 4, 5)), torch.zeros(1, 1, 4)).sites
    assert (site.name, site.kind, site.operands, site.weights, site.macs) == ("experts", "matmul", 1, 60, 60)


@pytest.mark.parametrize(
    "product",
    [
        lambda x: x @ x.mT,
        lambda x: torch.bmm(x, x.transpose(1, 2)),
        lambda x: torch.einsum("bij,bkj->bik", x, x),
        lambda x: torch.baddbmm(torch.zeros(1), x, x.mT),
        lambda x: x.matmul(other=x.mT),
        lambda x: torch.einsum(x, [0, 1, 2], x, [0, 3, 2], [0, 1, 3]),
        lambda x: torch.einsum("...ij,...kj->...ik", x, x),
    ],
)
def test_a_product_of_activations(product):
    (site,) = trace(Net(lambda m, x: product(x)), torch.zeros(2, 5, 3)).sites
    assert site == Site("#0", "matmul", ("#0",), (), 1, 1, 2, 0, 75, 30, 0)


def test_what_contracts_nothing_or_is_constant_is_no_site():
    def run(m, x):
        table = m.p @ m.q + torch.einsum("i,j->ij", x[0], x[0])
        return m.fc(x) + table.sum() + (m.fixed @ m.p).sum()

    net = Net(run, p=parameter(4, 4), q=parameter(4, 4), fixed=torch.ones(4, 4), fc=nn.Linear(4, 2))
    assert trace(net, torch.zeros(1, 4)).names == ("fc",)


def test_a_buffer_that_activations_are_written_into_is_an_activation():
    def run(m, x):
        m.cache[:, :2] = x
        return m.cache @ m.w

    net = Net(run, cache=torch.zeros(1, 4, 3), w=parameter(3, 2))
    assert trace(net, torch.ones(1, 2, 3)).names == ("w",)
    assert not net.cache.any()


def test_numbers_count_anew_in_every_forward_of_the_owner():
    block = Net(lambda m, x: F.linear(x @ x.mT @ x, m.w), w=parameter(3, 3))
    sites = trace(nn.Sequential(block, nn.ReLU(), block), torch.zeros(1, 4, 3)).sites
    assert [(s.name, s.layers, s.calls) for s in sites] == [("0#0", ("0#0",), 2), ("0#1", ("0#1",), 2), ("0.w", ("0#2",), 2)]


def test_a_weight_used_twice_in_one_forward_has_two_addresses():
    (site,) = trace(Net(lambda m, x: F.linear(F.linear(x, m.w), m.w), w=parameter(3, 3)), torch.zeros(1, 3)).sites
    assert (site.layers, site.calls, site.weights, site.macs) == (("#0", "#1"), 2, 9, 18)


def test_a_subclass_with_its_own_forward_is_addressed_by_call():
    class Same(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)

    (site,) = trace(nn.Sequential(Same(3, 4, 3, 2)), torch.zeros(1, 3, 8, 8)).sites
    assert (site.name, site.layers, site.macs) == ("0", ("0#0",), 4 * 16 * 27)


def test_a_layer_called_past_its_hooks_is_found():
    net = Net(lambda m, x: m.fc.forward(x), fc=nn.Linear(4, 2))
    (site,) = trace(net, torch.zeros(1, 4)).sites
    assert (site.name, site.layers) == ("fc", ("#0",))


# ---------------------------------------------------------------- attention


class Attention(nn.Module):
    def __init__(self, width, heads, fused):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(n, tokens, width))


class ViT(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.cls, self.positions = parameter(1, 1, 8), parameter(1, 5, 8)
        self.norm, self.attn = nn.LayerNorm(8), Attention(8, 2, fused)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        x = x + self.attn(self.norm(x))
        return self.head((x + self.mlp(x))[:, 0])


@pytest.mark.parametrize("fused", [False, True])
def test_a_vit_block(fused):
    sites = trace(ViT(fused), torch.zeros(3, 3, 8, 8)).sites
    assert {s.name: s.macs for s in sites} == {
        "patch": 4 * 8 * 48,
        "attn.qkv": 5 * 8 * 24,
        "attn#0": 5 * 5 * 8,
        "attn#1": 5 * 5 * 8,
        "attn.proj": 5 * 64,
        "mlp.0": 5 * 128,
        "mlp.2": 5 * 128,
        "head": 80,
    }
    assert [s.acts for s in sites if s.operands == 2] == [2 * 5 * 8, 2 * 25 + 5 * 8]


@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention_with_one_projection(batch_first):
    net = Net(lambda m, x: m.attn(x, x, x, need_weights=False)[0], attn=nn.MultiheadAttention(8, 2, batch_first=batch_first))
    x = torch.zeros(1, 5, 8) if batch_first else torch.zeros(5, 1, 8)
    found = {s.name: (s.layers, s.macs, s.acts) for s in trace(net, x).sites}
    batch = 1 if batch_first else 5  # the first axis is the batch
    assert found == {
        "attn.in_proj_weight": (("attn#0",), 5 * 8 * 24 // batch, 40 // batch),
        "attn#qk": (("attn#qk",), 200 // batch, 80 // batch),
        "attn#av": (("attn#av",), 200 // batch, 90 // batch),
        "attn.out_proj": (("attn.out_proj",), 320 // batch, 40 // batch),
    }


def test_multihead_attention_with_three_projections():
    attn = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True, add_zero_attn=True, batch_first=True)
    net = Net(lambda m, q, k, v: m.attn(q, k, v)[0], attn=attn)
    found = {s.name: (s.layers, s.macs) for s in trace(net, (torch.zeros(2, 3, 8), torch.zeros(2, 5, 6), torch.zeros(2, 5, 4))).sites}
    assert found == {
        "attn.q_proj_weight": (("attn#0",), 3 * 64),
        "attn.k_proj_weight": (("attn#1",), 5 * 48),
        "attn.v_proj_weight": (("attn#2",), 5 * 32),
        "attn#qk": (("attn#qk",), 3 * 7 * 8),
        "attn#av": (("attn#av",), 3 * 7 * 8),
        "attn.out_proj": (("attn.out_proj",), 3 * 64),
    }


def test_the_transformer_fast_path_hides_nothing_and_stays_on():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    assert len(trace(net, torch.zeros(1, 5, 8)).sites) == 12
    assert torch.backends.mha.get_fastpath_enabled()


# ---------------------------------------------------------------- skip and tie


def encoder():
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))


def test_skip_takes_paths_subtrees_names_and_patterns():
    tokens = torch.zeros(1, 3, dtype=torch.long)
    assert trace(encoder(), tokens, skip=["0"]).names == ("1", "2.0", "2.1")
    assert trace(encoder(), tokens, skip=["0", "2"]).names == ("1",)
    found = trace(encoder(), tokens, skip=["0", "2.*"])
    assert (found.names, found.skipped) == (("1",), ("0", "2.0", "2.1"))
    assert trace(ViT(True), torch.zeros(1, 3, 8, 8), skip="attn#*").names == ("patch", "attn.qkv", "attn.proj", "mlp.0", "mlp.2", "head")


def test_skipping_does_not_renumber():
    net = Net(lambda m, x: F.linear(F.linear(x, m.a), m.b), a=parameter(3, 3), b=parameter(3, 3))
    assert trace(net, torch.zeros(1, 3), skip=["a"])["b"].layers == ("#1",)


def test_skipping_an_embedding_keeps_the_layer_that_shares_its_weight():
    net = Net(lambda m, i: m.decoder(m.embed(i)), embed=nn.Embedding(9, 4), decoder=nn.Linear(4, 9, bias=False))
    net.decoder.weight = net.embed.weight
    found = trace(net, torch.zeros(1, 3, dtype=torch.long), skip="embed")
    assert (found.names, found.skipped) == (("decoder",), ("embed",))


def test_tie_makes_one_site_of_several():
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 2))
    found = trace(net, torch.zeros(1, 4), tie=[("1", "0")])
    assert found.names == ("0", "2")
    assert found["0"] == Site("0", "linear", ("0", "1"), (6, 4), 1, 2, 1, 42, 42, 10, 0, ((24, 6), (18, 3)))


# ---------------------------------------------------------------- errors


def rnn(kind):
    return Net(lambda m, x: m.r(x)[0], r=kind(4, 4))


def cell(kind):
    def run(m, x):
        out = m.r(x[0])
        return out[0] if isinstance(out, tuple) else out

    return Net(run, r=kind(4, 4))


UNSUPPORTED = {
    "RNN": rnn(nn.RNN),
    "LSTM": rnn(nn.LSTM),
    "GRU": rnn(nn.GRU),
    "RNNCell": cell(nn.RNNCell),
    "LSTMCell": cell(nn.LSTMCell),
    "GRUCell": cell(nn.GRUCell),
    "Bilinear": Net(lambda m, x: m.r(x, x), r=nn.Bilinear(4, 4, 2)),
    "Embedding": Net(lambda m, x: m.r(x.long()), r=nn.Embedding(4, 4)),
    "EmbeddingBag": Net(lambda m, x: m.r(x[0].long()), r=nn.EmbeddingBag(4, 4)),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_layers_that_cannot_be_quantized(kind):
    net = Net(lambda m, x: m.fc(x).sum() + m.odd(x).sum(), fc=nn.Linear(4, 4), odd=UNSUPPORTED[kind])
    x = torch.zeros(1, 3, 4)
    message = rf"^trace: {kind} 'odd.r' runs {kind}, which cannot be quantized; skip=\['odd.r'\] leaves it in float$"
    with pytest.raises(SiteError, match=message):
        trace(net, x)
    assert trace(net, x, skip=["odd"]).names == ("fc",)


def standardized():
    class Conv(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True))

    return Conv(3, 4, 1)


@pytest.mark.parametrize(
    "layer",
    [
        parametrizations.weight_norm(nn.Conv2d(3, 4, 1)),
        parametrizations.spectral_norm(nn.Conv2d(3, 4, 1)),
        prune.random_unstructured(nn.Conv2d(3, 4, 1), "weight", 0.5),
        standardized(),
    ],
)
def test_a_derived_weight_is_refused_by_name(layer):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    message = r"^trace: in \w+ '1': the weight of conv2d is computed from parameters .*; remove the param.*skip=\['1'\]$"
    with pytest.raises(SiteError, match=message):
        trace(net, torch.zeros(1, 3, 4, 4))
    assert trace(net, torch.zeros(1, 3, 4, 4), skip=["1"]).names == ("0",)


@pytest.mark.parametrize(
    ("run", "parts", "match"),
    [
        (lambda m, x: F.linear(x, m.b), {"b": torch.ones(2, 4)}, "weight of linear is no parameter of the model; make it an nn.Parameter"),
        (lambda m, x: F.linear(x, x), {}, "weight of linear is no parameter of the model"),
        (lambda m, x: x @ m.w.t(), {"w": parameter(2, 4)}, r"a matmul operand is computed from parameters .* F.linear\(x, weight\)"),
        (lambda m, x: torch.einsum("ab,bc,cd->ad", x, x.T, x), {}, "einsum 'ab,bc,cd->ad': 3 operands; write it as products of two"),
        (lambda m, x: torch.tensordot(x, m.w, 1), {"w": parameter(4, 2)}, r"runs torch.tensordot \(write torch.einsum\)"),
        (lambda m, x: F.linear(x, m.w) @ m.w, {"w": parameter(4, 4)}, "weight 'w' is used along two axes, by #0 and #1; untie it"),
        (lambda m, x: m.fc(x.reshape(-1)), {"fc": nn.Linear(3, 2)}, "the model fails on the example .RuntimeError: .*; pass an input"),
        (lambda m, x: torch.vmap(m.fc)(x), {"fc": nn.Linear(4, 2)}, r"Linear 'fc' runs linear under vmap, which hides the batch; skip="),
        (
            lambda m, x: F.multi_head_attention_forward(x, x, x, 4, 1, m.w, None, None, None, False, 0.0, m.o, None)[0],
            {"w": parameter(12, 4), "o": parameter(4, 4)},
            r"the model \(Net\) runs F.multi_head_attention_forward \(use nn.MultiheadAttention\), .*; skip=\['#0'\]",
        ),
        (lambda m, x: torch.tensordot(x, m.w, 1) @ x.T, {"w": parameter(4, 4)}, r"runs torch.tensordot"),
        (lambda m, x: x.relu(), {}, "trace: Net ran no layer that can be quantized"),
    ],
)
def test_what_is_refused(run, parts, match):
    with pytest.raises(SiteError, match=match) as caught:
        trace(Net(run, **parts), torch.zeros(2, 4))
    assert "\n" not in str(caught.value)


def test_lazy_single_script_and_empty():
    x = torch.zeros(1, 4)
    with pytest.raises(SiteError, match=r"'0' is a LazyLinear without weights yet; run the model once"):
        trace(nn.Sequential(nn.LazyLinear(3)), x)
    with pytest.raises(SiteError, match=r"the model is a single Linear; wrap it in nn.Sequential"):
        trace(nn.Linear(4, 3), x)
    with pytest.raises(SiteError, match=r"the example holds no tensor"):
        trace(nn.Sequential(nn.Linear(4, 3)), ())
    with pytest.raises(SiteError, match=r"'the model' is compiled; trace it before torch.compile"):
        trace(torch.compile(nn.Sequential(nn.Linear(4, 3))), x)
    net = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4))))
    with pytest.raises(SiteError, match=r"'1' is a ScriptModule, which cannot be looked into"):
        trace(net, x)
    assert trace(net, x, skip=["1"]).names == ("0",)


def test_unknown_names_get_a_hint():
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.zeros(1, 4)
    named = Net(lambda m, x: m.backbone(x), backbone=net)
    with pytest.raises(SiteError, match=r"skip='backbon' matches no module and no site; did you mean 'backbone'\?"):
        trace(named, x, skip=["backbon"])
    with pytest.raises(SiteError, match=r"no site 'backbone.3' in the model; did you mean 'backbone"):
        trace(named, x)["backbone.3"]
    with pytest.raises(SiteError, match=r"tie: no site 'backbone.3'; did you mean"):
        trace(named, x, tie=[("backbone.0", "backbone.3")])
    with pytest.raises(SiteError, match=r"a group needs two sites or more"):
        trace(net, x, tie=["0"])
    with pytest.raises(SiteError, match=r"tie: site '1' is in two groups"):
        trace(net, x, tie=[("0", "1"), ("1", "0")])
    mixed = Net(lambda m, x: m.fc(x) @ x.mT, fc=nn.Linear(4, 4))
    with pytest.raises(SiteError, match=r"cannot share a width"):
        trace(mixed, torch.zeros(1, 3, 4), tie=[("fc", "#0")])


def test_a_model_of_products_alone_has_no_first_site():
    found = trace(Net(lambda m, x: x @ x.mT), torch.zeros(1, 3, 4))
    with pytest.raises(SiteError, match=r"no site with a weight"):
        _ = found.first


# ---------------------------------------------------------------- the model is left alone


class Restless(nn.Module):
    """Changes buffers, attributes and random state even in evaluation mode, then fails if told to."""

    def __init__(self, fail):
        super().__init__()
        self.bn, self.conv, self.seen, self.fail = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), 0, fail
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x):
        self.seen += 1
        self.extra = x
        self.steps += 1
        self.steps = self.steps + 1
        self.bn.train()
        x = self.conv(self.bn(x.relu_() + torch.rand_like(x)))
        if self.fail:
            raise RuntimeError("no")
        return x


@pytest.mark.parametrize("fail", [False, True])
def test_the_state_is_as_before(fail):
    net, x = Restless(fail), torch.randn(2, 3, 4, 4)
    net.conv.eval()
    before, input_before = copy.deepcopy(net.state_dict()), x.clone()
    buffers, random = dict(net.named_buffers()), torch.random.get_rng_state()
    if fail:
        with pytest.raises(SiteError, match=r"RuntimeError: no"):
            trace(net, x)
    else:
        trace(net, x)
    assert (net.training, net.bn.training, net.conv.training, net.seen) == (True, True, False, 0)
    assert "extra" not in net.__dict__
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert all(buffer is buffers[name] for name, buffer in net.named_buffers())
    assert torch.equal(random, torch.random.get_rng_state())
    assert torch.equal(x, input_before)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called for m in net.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()


def test_a_traced_model_still_trains_and_copies():
    net = build("digits_cnn")
    trace(net, torch.zeros(1, 1, 8, 8))
    copy.deepcopy(net)(torch.zeros(2, 1, 8, 8)).sum().backward()


def test_meta_models_are_traced_without_memory():
    with torch.device("meta"):
        net = build("resnet18")
        assert len(trace(net, torch.zeros(1, 3, 224, 224)).sites) == 21


def test_calls_take_the_slots_they_say():
    q = torch.zeros(1, 2, 5, 4)
    out = F.scaled_dot_product_attention(q, q, q)
    calls = read_call(F.scaled_dot_product_attention, (q, q, q), {}, out)
    assert len(calls) == slots(F.scaled_dot_product_attention) == 2
    assert [call.macs for call in calls] == [200, 200]
