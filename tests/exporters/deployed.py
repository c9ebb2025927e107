"""Networks that exporters of graphs are tested on: small, and with what real ones have."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright import models
from bitwright.models.mobilenetv2 import InvertedResidual
from bitwright.policy import Policy
from bitwright.quant import QuantOptions, quantize
from bitwright.sites import trace

ALL = ("add", "concat", "pool", "shared")


class OptionA(nn.Module):
    """A residual block whose shortcut is sliced and padded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.norm1 = nn.Conv2d(8, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.two, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        y = self.norm2(self.two(F.relu(self.norm1(self.one(x)))))
        y = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.head(y.mean((2, 3)))


class Inverted(nn.Sequential):
    """Two inverted residuals of MobileNetV2, one with a shortcut, and a pooled head."""

    def __init__(self) -> None:
        stem = nn.Conv2d(3, 8, 3, 2, padding=1)
        blocks = (InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 12, 2, 2))
        super().__init__(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


class Block(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(16, 2, batch_first=True), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Grouped(nn.Module):
    """A transposed convolution whose groups share the scales of their output channels, and a BatchNorm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.norm = nn.Conv2d(3, 6, 3, 2, padding=1), nn.ConvTranspose2d(6, 4, 2, 2, groups=2), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.up(F.relu(self.stem(x))))))


class InPlace(nn.Module):
    """A residual block as torchvision writes it, whose addition changes a tensor in place."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.head, self.relu, self.change = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5), nn.ReLU(inplace=True), change
        self.one, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.two, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        out = self.norm2(self.two(self.relu(self.norm1(self.one(x)))))
        return self.head(self.relu(self.change(out, x)).mean((2, 3)))


def into_result(out: Tensor, identity: Tensor) -> Tensor:
    """Add to a result in place, as torchvision's blocks do."""
    out += identity
    return out


def into_shortcut(out: Tensor, identity: Tensor) -> Tensor:
    """Add to a shortcut in place."""
    identity += out
    return identity


def halved(out: Tensor, identity: Tensor) -> Tensor:
    """Add and multiply in place."""
    out += identity
    out *= 0.5
    return out


IN_PLACE = {"into-result": into_result, "into-shortcut": into_shortcut, "halved": halved}


class Plenty(nn.Module):
    """Many kinds of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding="same", bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.group, self.head = nn.GroupNorm(2, 16), nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.rand(1, 16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.a(x))
        y = F.hardswish(self.b(F.avg_pool2d(x, 2)))
        y = torch.cat([F.leaky_relu(x, 0.1), self.up(y).clamp(-1, 1)], 1)
        y = self.group(y) * self.scale + F.interpolate(F.adaptive_avg_pool2d(y, 4), scale_factor=2, mode="nearest")
        first, second = (y.sigmoid() - 0.5).chunk(2, 1)
        y = torch.cat([F.elu(first).tanh(), second / 2], 1).flatten(2).transpose(1, 2)
        return self.head(y).softmax(-1).permute(0, 2, 1).unsqueeze(1)[:, 0, :, 1:]


IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(2))
DIGITS = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(3))
NETWORKS = {
    "option-a": (OptionA, IMAGES),
    "inverted": (Inverted, IMAGES),
    "digits": (lambda: models.build("digits_cnn"), DIGITS),
    "block": (Block, TOKENS),
    "plenty": (Plenty, IMAGES),
    "grouped": (Grouped, IMAGES),
    "tiny": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 8), nn.Linear(8, 5)),
        IMAGES,
    ),
}


def network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Return a network with settled BatchNorms, and an input."""
    kind, x = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # some gains below zero, as training leaves them
                nn.init.uniform_(module.weight, -0.3, 1.0)
                nn.init.uniform_(module.bias, -0.2, 0.2)
    with torch.no_grad():
        for _ in range(20):
            model(x)
    return model.eval(), x


def deployed(
    name: str, bits: list[tuple[int, int]], *, points: tuple[str, ...] = ALL, **options: object
) -> tuple[nn.Module, Tensor, Policy]:
    """Return a quantized network whose sites take the given widths in turn, an input, and the policy."""
    model, x = network(name)
    sites = trace(model, x).sites
    policy = Policy(
        {site.name: bits[k % len(bits)] if site.operands == 1 else (bits[k % len(bits)][1],) * 2 for k, site in enumerate(sites)}
    )
    quantized = quantize(model, policy, calibration=x, sites=sites, options=QuantOptions(points=points, **options))
    return quantized.eval(), x, policy
