"""Functional calls, products and attention: identical at 32 bits, on their grids below, trainable, copied and refused clearly."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitwright.errors import BitwrightError, ExportError, PolicyError, SiteError
from bitwright.exporters import export
from bitwright.policy import Policy
from bitwright.quant import named_quant_layers, quantize, verify_widths
from bitwright.quant.functional_calls import ProductCall, WeightCall, named_quant_calls
from bitwright.sites import trace
from bitwright.training.losses import bin_statistics


class Net(nn.Module):
    """A module with the given attributes and the given forward."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape) * 0.5)


def at(net, x, w, a, **options):
    """Return the network with every site at the same widths."""
    sites = trace(net, x).sites
    return quantize(net, Policy({site.name: (w, a) for site in sites}), sites=sites, calibration=x, **options).eval()


class Same(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Attention(nn.Module):
    """Attention as vision transformers have it, fused or in two products."""

    def __init__(self, fused, width=8, heads=2, **options):
        super().__init__()
        self.heads, self.fused, self.options = heads, fused, options
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, **self.options) if self.fused else ((q @ k.mT) * 0.5).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(n, tokens, width))


class Block(nn.Module):
    """A transformer block on tokens ``[N, 5, 8]``."""

    def __init__(self, fused, **options):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), Attention(fused, **options)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Multihead(nn.Module):
    """`nn.MultiheadAttention` on one input, with options of the module and of the call."""

    def __init__(self, options, named):
        super().__init__()
        self.attn, self.named = nn.MultiheadAttention(8, 2, **options), named
        for p in self.attn.parameters():
            nn.init.normal_(p, std=0.4)

    def forward(self, x):
        out, weights = self.attn(x, x[..., : self.attn.kdim], x[..., : self.attn.vdim], **self.named)
        return (out,) if weights is None else (out, weights)


CALLS = {
    "linear": (lambda m, x: F.linear(x, m.w), (5, 8)),
    "keywords": (lambda m, x: F.linear(weight=m.w, input=x), (5, 8)),
    "matmul": (lambda m, x: x @ m.w, (8, 5)),
    "left": (lambda m, x: (m.w @ x.T).T, (5, 8)),
    "addmm": (lambda m, x: torch.addmm(x[:, :5], x, m.w), (8, 5)),
    "einsum": (lambda m, x: torch.einsum("bi,oi->bo", x, m.w), (5, 8)),
    "einsum of a list": (lambda m, x: torch.einsum("bi,oi->bo", [x, m.w]), (5, 8)),
    "mv": (lambda m, x: x.mv(m.w), (8,)),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------- calls with a weight


@pytest.mark.parametrize("call", CALLS)
def test_a_call_with_a_parameter(call):
    run, shape = CALLS[call]
    net, x = Net(run, w=parameter(*shape)), torch.randn(6, 8)
    assert torch.equal(at(net, x, 32, 32)(x), net(x))
    quantized = at(net, x, 2, 3)
    ((name, layer),) = named_quant_layers(quantized)
    assert (name, layer.bits, layer.weight is quantized.w) == ("#0", (2, 3), True)
    assert verify_widths(quantized)["#0"] <= 4
    assert bin_statistics(quantized)["#0"].bits == 2
    assert layer.weight_quantizer.scale.numel() == (5 if len(shape) == 2 else 1)
    by_hand = copy.deepcopy(net)
    by_hand.w.data = layer.quantized_weight().data
    levels = layer.input_quantizer(x)
    assert len(levels.unique()) <= 8
    if call == "addmm":  # the term that is added is no operand
        by_hand.run = lambda m, y: torch.addmm(x[:, :5], y, m.w)
    assert torch.equal(quantized(x), by_hand(levels))


def test_a_convolution_with_a_parameter():
    def run(m, x):
        return F.conv2d(F.conv_transpose2d(x, m.up, stride=2).relu(), m.w, m.b, padding=1)

    net = Net(run, up=parameter(3, 4, 2, 2), w=parameter(6, 4, 3, 3), b=parameter(6))
    x = torch.randn(4, 3, 4, 4)
    assert torch.equal(at(net, x, 32, 32)(x), net(x))
    quantized = at(net, x, 3, 4)
    layers = dict(named_quant_layers(quantized))
    assert {name: tuple(layer.weight_quantizer.scale.shape) for name, layer in layers.items()} == {"#0": (1, 4, 1, 1), "#1": (6, 1, 1, 1)}
    assert [layer.input_quantizer.signed for layer in layers.values()] == [True, False]
    assert all(count <= 8 for count in verify_widths(quantized).values())
    wide = at(net, x, 8, 8)(x)
    assert 0 < (wide - net(x)).abs().max() < 0.05 * net(x).abs().max()


def test_a_layer_with_its_own_forward():
    net, x = nn.Sequential(Same(3, 4, 3, 2), nn.ReLU()), torch.randn(4, 3, 8, 8)
    assert torch.equal(at(net, x, 32, 32)(x), net(x))
    quantized = at(net, x, 2, 4)
    assert isinstance(quantized[0], Same)
    assert verify_widths(quantized)["0#0"] <= 4
    assert "0.weight" in quantized.state_dict()
    assert type(net[0]) is Same


def test_calls_of_children_are_not_counted_and_skipped_calls_are():
    def run(m, x):
        x = F.linear(m.child(F.linear(x, m.a)), m.b)
        return F.linear(x, m.c)

    child = Net(lambda m, x: F.linear(x, m.w) @ m.v, w=parameter(8, 8), v=parameter(8, 8))
    net = Net(run, a=parameter(8, 8), b=parameter(8, 8), c=parameter(8, 8), child=child)
    x = torch.randn(6, 8)
    sites = trace(net, x, skip=["b"]).sites
    quantized = quantize(net, Policy({s.name: (2, 4) for s in sites}), sites=sites, calibration=x)
    assert [name for name, _ in named_quant_layers(quantized)] == ["child#0", "child#1", "#0", "#2"]
    levels = {name: layer.quantized_weight() for name, layer in named_quant_layers(quantized)}
    plain = copy.deepcopy(net)
    plain.a.data, plain.c.data, plain.child.w.data, plain.child.v.data = (levels[n].data for n in ("#0", "#2", "child#0", "child#1"))
    weights_alone = quantize(net, Policy({s.name: (2, 32) for s in sites}), sites=sites)
    assert torch.equal(weights_alone(x), plain(x))


def test_a_weight_used_twice_has_one_grid():
    net, x = Net(lambda m, x: m.fc(F.linear(F.linear(x, m.w), m.w)), w=parameter(8, 8), fc=nn.Linear(8, 8)), torch.randn(6, 8)
    net.fc.weight = net.w
    quantized = at(net, x, 2, 8)
    grids = {id(layer.weight_quantizer) for _, layer in named_quant_layers(quantized)}
    inputs = {id(layer.input_quantizer) for _, layer in named_quant_layers(quantized)}
    assert (len(grids), len(inputs)) == (1, 3)


def test_tied_sites_need_a_run_to_tell_their_weights_apart():
    net, x = Net(lambda m, x: F.linear(x @ m.a, m.b), a=parameter(8, 6), b=parameter(4, 6)), torch.randn(6, 8)
    sites = trace(net, x, tie=[("a", "b")]).sites
    policy = Policy({"a": (2, 32)})
    quantized = quantize(net, policy, sites=sites, calibration=x)
    assert [(n, tuple(layer.weight_quantizer.scale.shape)) for n, layer in named_quant_layers(quantized)] == [
        ("#0", (1, 6)),
        ("#1", (4, 1)),
    ]
    with pytest.raises(BitwrightError, match="tied functional calls need calibration="):
        quantize(net, policy, sites=sites)


# ---------------------------------------------------------------- products


@pytest.mark.parametrize(
    ("fused", "options"),
    [
        (False, {}),
        (True, {}),
        (True, {"dropout_p": 0.0, "scale": 0.3}),
        (True, {"is_causal": True}),
        (True, {"attn_mask": torch.ones(5, 5).tril().bool()}),
        (True, {"attn_mask": torch.linspace(-1, 1, 25).view(5, 5)}),
        (True, {"attn_mask": torch.tensor([False] + 4 * [True])[:, None] & torch.ones(5, 5).bool()}),
    ],
)
def test_a_block(fused, options):
    net, x = Block(fused, **options).eval(), torch.randn(6, 5, 8)
    assert torch.equal(at(net, x, 32, 32)(x), net(x))
    fine = (at(net, x, 8, 8)(x) - net(x)).abs().max()
    quantized = at(net, x, 3, 3)
    assert 0 < fine < 0.05 < (quantized(x) - net(x)).abs().max()
    calls = dict(named_quant_calls(quantized))
    assert list(calls) == ["attn#0", "attn#1"]
    signs = [(call.left_quantizer.signed, call.right_quantizer.signed) for call in calls.values()]
    assert signs == [(True, True), (False, True)]
    seen = []
    for call in calls.values():
        call.register_forward_hook(lambda _, args, out: seen.extend(out))
    quantized(x)
    assert len(seen) == 4
    assert all(len(operand.unique()) <= 8 for operand in seen)
    assert len({quantizer.scale.item() for call in calls.values() for quantizer in call.children()}) == 4


def test_grouped_queries_and_one_product_alone():
    net = Net(lambda m, x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :2] * 2, enable_gqa=True))
    x = torch.randn(3, 4, 5, 6)
    for name in ("#0", "#1"):
        sites = trace(net, x, skip=[n for n in ("#0", "#1") if n != name]).sites
        exact = quantize(net, Policy({name: (8, 8)}), sites=sites, calibration=x)
        assert 0 < (exact(x) - net(x)).abs().max() < 0.1


@pytest.mark.parametrize("quantizer", ["pact", "dorefa"])
def test_a_grid_without_negative_codes_refuses_signed_operands(quantizer):
    net, x = Net(lambda m, x: x @ x.mT), torch.randn(3, 4, 5)
    with pytest.raises(SiteError, match=f"operand of '#0' has negative values, which '{quantizer}' maps to zero"):
        at(net, x, 4, 4, quantizer=quantizer)
    assert at(Net(lambda m, x: x.abs() @ x.abs().mT), x, 4, 4, quantizer=quantizer)(x).isfinite().all()


# ---------------------------------------------------------------- nn.MultiheadAttention

CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
PADDING = torch.tensor([[False] * 3 + [True] * 2, [False] * 5] * 2)
VARIANTS = [
    ({}, {}),
    ({"batch_first": True}, {"need_weights": False}),
    ({"batch_first": True, "bias": False}, {"average_attn_weights": False}),
    ({"batch_first": True}, {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    ({"batch_first": True}, {"attn_mask": CAUSAL, "is_causal": True}),
    ({"batch_first": True}, {"attn_mask": CAUSAL.isinf(), "key_padding_mask": PADDING}),
    ({"batch_first": True}, {"attn_mask": torch.randn(8, 5, 5), "need_weights": False}),
    ({"batch_first": True}, {"key_padding_mask": torch.tensor([[True], [False]] * 2).expand(4, 5), "need_weights": False}),
    ({"batch_first": True, "kdim": 6, "vdim": 4}, {"need_weights": False}),
    ({"kdim": 6, "vdim": 8, "add_bias_kv": True, "add_zero_attn": True}, {}),
    ({"batch_first": True, "add_bias_kv": True}, {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    ({"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}, {"attn_mask": CAUSAL.isinf(), "key_padding_mask": PADDING}),
]


@pytest.mark.parametrize(("options", "named"), VARIANTS)
def test_multihead_attention(options, named):
    net = Multihead(options, named).eval()
    x = torch.randn(4, 5, 8) if options.get("batch_first") else torch.randn(5, 4, 8)
    wanted, found = net(x), at(net, x, 32, 32)(x)
    assert len(wanted) == len(found)
    for a, b in zip(wanted, found, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)
    quantized = at(net, x, 3, 3)
    counts = verify_widths(quantized)
    projections = {"attn#0", "attn#1", "attn#2"} if "kdim" in options else {"attn#0"}
    assert set(counts) == projections | {"attn.out_proj"}
    assert max(counts.values()) <= 8
    with torch.no_grad():  # the fast path must not come back
        assert torch.equal(quantized(x)[0], quantized.train().eval()(x)[0])
        assert not torch.allclose(quantized(x)[0], wanted[0], atol=1e-3)
    calls = dict(named_quant_calls(quantized))
    assert (calls["attn#av"].left_quantizer.signed, calls["attn#av"].right_quantizer.signed) == (False, True)
    sum(out.sum() for out in quantized(x)).backward()
    assert all(p.grad is not None for p in quantized.parameters())


def test_multihead_attention_without_a_batch_and_a_mask_of_the_wrong_shape():
    net, x = Multihead({}, {}).eval(), torch.randn(5, 4, 8)
    quantized = at(net, x, 32, 32)
    for a, b in zip(net(x[:, 0]), quantized(x[:, 0]), strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-6)
    with pytest.raises(BitwrightError, match=r"attn_mask has the shape \(1, 5\); give \(5, 5\) or \(8, 5, 5\)"):
        quantized.attn(x, x, x, attn_mask=torch.zeros(1, 5))
    with pytest.raises(BitwrightError, match="is_causal without attn_mask"):
        quantized.attn(x, x, x, is_causal=True)


def test_only_the_output_projection_of_attention():
    net, x = Multihead({"batch_first": True}, {"need_weights": False}).eval(), torch.randn(4, 5, 8)
    sites = trace(net, x, skip=["attn#*", "attn.in_proj_weight"]).sites
    for given in (sites, None):
        quantized = quantize(net, Policy({"attn.out_proj": (2, 4)}), sites=given, calibration=x)
        with torch.no_grad():
            assert not torch.allclose(quantized(x)[0], net(x)[0], atol=1e-3)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_encoder(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=norm_first)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x = torch.randn(4, 5, 8)
    with torch.no_grad():
        assert torch.allclose(at(net, x, 32, 32)(x), net(x), atol=1e-6)
        quantized = at(net, x, 2, 4)
        plain = quantized(x)
        assert not torch.allclose(plain, net(x), atol=1e-3)
        padded = quantized(x, src_key_padding_mask=PADDING)
        assert torch.allclose(padded[1], plain[1], atol=1e-6)
        assert padded.isfinite().all()
    assert torch.equal(quantized(x), plain)  # no fast path either way
    assert all(count <= 4 for count in verify_widths(quantized).values())
    assert len(verify_widths(quantized)) == 8
    quantized.train()(x).sum().backward()
    assert all(p.grad is not None for p in quantized.parameters())
    assert quantized.layers[0].self_attn.training
    assert torch.backends.mha.get_fastpath_enabled()


def test_plain_layers_of_an_encoder_layer_are_not_bypassed():
    net, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(4, 5, 8)
    quantized = quantize(net, Policy({"linear1": (1, 32), "linear2": (1, 32)}), skip=["self_attn*"])
    with torch.no_grad():
        assert not torch.allclose(quantized(x), net(x), atol=1e-3)


# ---------------------------------------------------------------- life of a quantized model


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = parameter(3, 8)

    def forward(self, x):
        return F.linear(x, self.w)


def both():
    return nn.Sequential(Block(False), Block(True), Head()).eval(), torch.randn(6, 5, 8)


def test_gradients_reach_scales_and_weights_and_training_changes_them():
    net, x = both()
    quantized = at(net, x, 4, 4).train()
    optimizer = torch.optim.SGD(quantized.parameters(), lr=0.1)
    quantized(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in quantized.parameters())
    call = dict(named_quant_layers(quantized))["2#0"]
    operands = quantized[0].attn.quantized_calls["1"]
    grads = [call.weight.grad, call.weight_quantizer.scale.grad, call.input_quantizer.scale.grad]
    grads += [operands.left_quantizer.scale.grad, operands.right_quantizer.scale.grad]
    assert all(bool(g.abs().sum() > 0) for g in grads)
    before = quantized(x).detach()
    optimizer.step()
    assert not torch.equal(quantized(x), before)
    assert quantized[2].w is call.weight


def test_state_dict_round_trip_and_names():
    net, x = both()
    quantized, other = at(net, x, 3, 4), at(both()[0], x * 3, 3, 4)
    state = quantized.state_dict()
    assert set(net.state_dict()) <= set(state)
    assert {"0.attn.quantized_calls.0.left_quantizer.scale", "2.quantized_calls.0.weight_quantizer.scale"} <= set(state)
    assert "2.quantized_calls.0.weight" not in state
    other.load_state_dict(state)
    assert torch.equal(other(x), quantized(x))
    assert len({id(p) for p in quantized.parameters()}) == len(list(quantized.parameters()))
    missing = dict(state)
    del missing["2.w"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "2.w"'):
        other.load_state_dict(missing)


def test_widths_are_buffers():
    quantized = at(*both(), 3, 4)
    widths = {n: int(b) for n, b in quantized.named_buffers() if n.endswith(".bits") and "quantized_calls" in n}
    assert widths["2.quantized_calls.0.weight_quantizer.bits"] == 3
    assert widths["1.attn.quantized_calls.1.right_quantizer.bits"] == 4


def test_copies_are_independent_and_the_argument_is_untouched():
    net, x = both()
    kinds, state = [type(m) for m in net.modules()], copy.deepcopy(net.state_dict())
    quantized = at(net, x, 3, 4)
    assert kinds == [type(m) for m in net.modules()]
    assert all(torch.equal(a, b) for a, b in zip(state.values(), net.state_dict().values(), strict=True))
    wanted = quantized(x)
    for made in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert [type(m) for m in made.modules()] == [type(m) for m in quantized.modules()]
        assert torch.equal(made(x), wanted)
        assert made[2].quantized_calls["0"].weight is made[2].w
        with torch.no_grad():
            made[2].w.zero_()
            made[0].attn.quantized_calls["0"].left_quantizer.scale.mul_(2)
        assert not torch.equal(made(x), wanted)
        assert torch.equal(quantized(x), wanted)


def test_an_error_in_the_forward_leaves_no_hooks():
    net, x = both()
    quantized = at(net, x, 3, 4)
    wanted = quantized(x)
    with pytest.raises(RuntimeError):
        quantized(x[..., :3])
    assert not nn.modules.module._has_any_global_hook()
    assert torch.equal(quantized(x), wanted)


def test_compiled():
    net, x = nn.Sequential(nn.LayerNorm(8), Head()).eval(), torch.randn(6, 8)
    quantized = at(net, x, 3, 4)
    compiled = torch.compile(quantized, backend="eager")
    assert torch.equal(compiled(x), quantized(x))
    compiled(x).sum().backward()
    assert quantized[1].w.grad is not None


def test_a_quantized_model_within_another_and_shared_owners():
    block = Block(True)
    net, x = nn.Sequential(block, nn.GELU(), block).eval(), torch.randn(6, 5, 8)
    quantized = at(net, x, 4, 4)
    assert quantized[0] is quantized[2]
    assert [name for name, _ in named_quant_calls(nn.Sequential(quantized))] == ["0.0.attn#0", "0.0.attn#1"]
    assert all(isinstance(call, ProductCall) for _, call in named_quant_calls(quantized))


# ---------------------------------------------------------------- refused


def test_a_policy_without_a_site_or_with_an_unknown_one():
    net, x = both()
    sites = trace(net, x).sites
    policy = {s.name: (4, 4) for s in sites}
    for name in ("1.attn#1", "2.w"):
        with pytest.raises(PolicyError, match=f"site '{name}' has no entry"):
            quantize(net, Policy({n: b for n, b in policy.items() if n != name}), sites=sites, calibration=x)
    with pytest.raises(PolicyError, match=r"no site '1.attn#3'; did you mean"):
        quantize(net, Policy({**policy, "1.attn#3": (4, 4)}), sites=sites, calibration=x)
    with pytest.raises(BitwrightError, match="need calibration="):
        quantize(net, Policy(policy), sites=sites)
    skipped = quantize(net, Policy(policy), sites=sites, calibration=x, skip=["*#*"])
    assert not list(named_quant_calls(skipped))


def test_without_sites_plain_layers_are_quantized_as_before():
    net, x = both()
    paths = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)]
    quantized = quantize(net, Policy(dict.fromkeys(paths, (4, 8))), calibration=x)
    assert [n for n, _ in named_quant_layers(quantized)] == paths
    assert not list(named_quant_calls(quantized))
    assert [type(m) for m in quantized] == [type(m) for m in net]


def test_owners_that_cannot_be():
    class Chain(nn.Sequential):
        def forward(self, x):
            return super().forward(x) @ x.mT

    x = torch.randn(2, 3, 4)
    with pytest.raises(SiteError, match="Chain '' makes functional calls and runs all its children"):
        at(Chain(nn.Linear(4, 4)), x, 4, 4)
    net = Net(None)
    net.forward = lambda x: x @ x.mT
    with pytest.raises(SiteError, match="the forward of Net '' was replaced on the instance"):
        at(net, x, 4, 4)


def test_a_call_that_is_another_one_than_traced():
    net, x = Net(lambda m, x: F.linear(x, m.w if m.first else m.v), w=parameter(4, 4), v=parameter(4, 4)), torch.randn(3, 4)
    net.first = True
    quantized = at(net, x, 4, 4)
    quantized.first = False
    with pytest.raises(BitwrightError, match="quantized call '#0' is made with another weight"):
        quantized(x)
    assert isinstance(dict(named_quant_calls(quantized))["#0"], WeightCall)


def test_a_call_that_does_not_run_on_the_calibration_data_or_has_two_owners():
    net, x = Net(lambda m, x: F.linear(x, m.w) if len(x) < 4 else x, w=parameter(4, 4)), torch.randn(3, 4)
    sites = trace(net, x).sites
    with pytest.raises(BitwrightError, match="call '#0' did not run on the calibration data"):
        quantize(net, Policy({"w": (4, 4)}), sites=sites, calibration=torch.randn(5, 4))
    block = Net(lambda m, pair: F.linear(*pair))
    twice = Net(lambda m, x: m.f((m.f((x, m.a)), m.b)), f=block, a=parameter(4, 4), b=parameter(4, 4))
    with pytest.raises(SiteError, match="call 'f#0' is made by sites 'a' and 'b' in turn"):
        at(twice, x, 4, 4)
    with pytest.raises(SiteError, match="is a vector, which 'entropy' cannot quantize"):
        at(Net(lambda m, x: x.mv(m.w), w=parameter(4)), x, 4, 4, quantizer="entropy")


def test_packed_export_refuses_and_names_the_call(tmp_path):
    net, x = both()
    with pytest.raises(ExportError, match=r"call '0.attn#0'"):
        export(at(net, x, 4, 4), "packed", tmp_path / "model.safetensors", example=x)
