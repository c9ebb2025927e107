"""Which activations are held when: counted by hand on small networks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitwright.lifetimes import Held
from bitwright.memory import ActivationMemory
from bitwright.policy import Bits
from bitwright.sites import trace


class Residual(nn.Module):
    def __init__(self, *, inplace=False):
        super().__init__()
        self.inplace = inplace
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        y = F.relu(self.one(x), inplace=self.inplace)
        z = self.norm(self.two(y))
        if self.inplace:
            z += y
        else:
            z = z + y
        return self.head(F.relu(z, inplace=self.inplace).mean((2, 3)))


class Dense(nn.Module):
    """Each layer reads the concatenation of all before it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 2 * k, 2, 1) for k in range(3))

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)).relu())
        return torch.cat(features, 1)


def held(traced):
    """Return, per step, the tensors held, the largest first."""
    return {step.name: [traced.lifetimes.tensors[i] for i in step.held] for step in traced.lifetimes.steps}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_residual_network_counted_by_hand(inplace, batch):
    steps = held(trace(Residual(inplace=inplace), torch.zeros(batch, 3, 8, 8)))
    image, y = Held(192, ("one",)), Held(256, ("two",), point=True)  # y is read by the addition, too
    sum_operand, z = Held(256, point=True), Held(256, point=True)
    pooled, logits = Held(4, ("head",)), Held(2, point=True)
    assert steps == {
        "one: conv2d": [image, y],
        "two: conv2d": [y, sum_operand],
        "add_" if inplace else "add": [y, z],
        "mean": [z, pooled],
        "head: linear": [pooled, logits],
    }


def test_a_dense_network_counted_by_hand():
    steps = held(trace(Dense(), torch.zeros(1, 3, 4, 4)))
    image = Held(48, point=True)
    new = Held(32, point=True)
    joined = [Held(80, ("layers.1",)), Held(112, ("layers.2",))]
    assert steps["layers.2: conv2d"] == [image, new, new, joined[1], new]
    assert sum(tensor.elements for tensor in steps["layers.2: conv2d"]) == 48 + 32 + 32 + 112 + 32


def test_relu_and_batchnorm_are_part_of_the_layer_before():
    plain = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1))
    fused = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(), nn.Conv2d(2, 1, 1))
    first, second = (trace(net, torch.zeros(1, 1, 4, 4)).lifetimes for net in (plain, fused))
    assert [t.elements for t in first.tensors] == [t.elements for t in second.tensors] == [16, 32, 16]
    assert [step.held for step in first.steps] == [step.held for step in second.steps] == [(0, 1), (1, 2)]
    assert second.tensors[1].sites == ("4",)


def test_views_are_the_tensor_they_look_at():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 5)

        def forward(self, x):
            a, b = x.flatten(1).chunk(2, 1)
            return self.left(a), self.right(b)

    traced = trace(Halves(), torch.zeros(1, 2, 4))
    assert traced.lifetimes.tensors[0] == Held(8, ("left", "right"))
    assert [sum(traced.lifetimes.tensors[i].elements for i in step.held) for step in traced.lifetimes.steps] == [16]


class Shuffle(nn.Module):
    """Two groups of channels are shuffled between two layers, as ShuffleNet does."""

    def __init__(self, built_in):
        super().__init__()
        self.a, self.b, self.built_in = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 1, 1), built_in

    def forward(self, x):
        x = self.a(x)
        if self.built_in:
            x = F.channel_shuffle(x, 2)
        else:
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.b(F.relu(x))


@pytest.mark.parametrize("built_in", [False, True])
def test_a_channel_shuffle_cannot_be_done_in_place(built_in):
    traced = trace(Shuffle(built_in), torch.zeros(1, 3, 8, 8))
    image, made, answer = Held(192, ("a",)), Held(512, ("b",)), Held(64, point=True)  # what the copy reads has the width of what it gives
    copy = "channel_shuffle" if built_in else "reshape"
    assert held(traced) == {"a: conv2d": [image, made], copy: [made, made], "b: conv2d": [made, answer]}
    cost = ActivationMemory(traced.lifetimes)
    assert cost.total(traced.sites, {"a": Bits(8, 8), "b": Bits(8, 8)}) == 512 + 512
    assert cost.total(traced.sites, {"a": Bits(8, 8), "b": Bits(8, 4)}) == 256 + 256
    assert cost.peak(traced.sites, {"a": Bits(8, 8), "b": Bits(8, 8)}) == copy


def test_a_copy_in_the_same_order_is_part_of_the_layer_before():
    class Copied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)

        def forward(self, x):
            return self.b(self.a(x).clone().contiguous().reshape(-1, 2, 4, 4))

    steps = held(trace(Copied(), torch.zeros(1, 1, 4, 4)))
    assert {name: [tensor.elements for tensor in tensors] for name, tensors in steps.items()} == {
        "a: conv2d": [16, 32],
        "b: conv2d": [32, 16],
    }


def test_what_only_max_pooling_reads_has_the_width_of_what_it_gives():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 1, 1), nn.AvgPool2d(2), nn.Conv2d(1, 1, 1))
    tensors = trace(net, torch.zeros(1, 1, 4, 4)).lifetimes.tensors
    assert tensors[1] == Held(32, ("3",))
    assert tensors[2] == Held(8, ("3",))
    assert tensors[3] == Held(4, point=True)  # average pooling makes new values


def test_a_skipped_layer_reads_float():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    tensors = trace(net, torch.zeros(1, 2), skip=["2"]).lifetimes.tensors
    assert tensors[1] == Held(4, (), least=32)


def test_tied_sites_are_named_by_their_group():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    tensors = trace(net, torch.zeros(1, 2), tie=[("0", "2")]).lifetimes.tensors
    assert [tensor.sites for tensor in tensors] == [("0",), ("1",), ("0",), ()]


def test_integers_keep_their_own_width_and_constants_do_not_count():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("gain", torch.ones(1000))

        def forward(self, x, keep):
            return self.layer(x) * keep * self.gain.mean()

    tensors = trace(Masked(), (torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.int16))).lifetimes.tensors
    assert Held(4, point=True, least=16) in tensors
    assert max(tensor.elements for tensor in tensors) == 4


def test_attention_reads_what_it_multiplies():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v)

    tensors = trace(Attention(), torch.zeros(1, 5, 8)).lifetimes.tensors
    assert tensors[1] == Held(120, ("#0", "#1"))
    multihead = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, batch_first=True)})
    multihead.forward = lambda x: multihead["mha"](x, x, x)[0]
    assert trace(multihead, torch.zeros(1, 5, 8)).lifetimes.tensors[0].sites == ("mha.in_proj_weight",)
