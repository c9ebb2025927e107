"""A network and data of which it is known who needs bits: half of the images need one, half need four."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitwright.adaptive import actor
from bitwright.adaptive.actor import ActorOptions
from bitwright.adaptive.network import AdaptiveNet, Space, adapt
from bitwright.data import TensorSplit
from bitwright.policy import Bits
from bitwright.sites import trace

CHOICES = (Bits(1, 1), Bits(4, 4))


class Narrow(nn.Module):
    """One channel: a bit of it tells where a square is, not how bright an image is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1, bias=False), nn.Linear(36, 8)
        nn.init.constant_(self.first.weight, 1.0)
        nn.init.constant_(self.first.bias, 0.1)
        nn.init.constant_(self.middle.weight, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.middle(torch.relu(self.first(x))).flatten(1))
        return logits


def images(count: int, seed: int = 0) -> TensorSplit:
    """Even images: a bright quadrant, labels 0 to 3. Odd ones: one of four brightnesses everywhere, labels 4 to 7."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 4, (count,), generator=generator)
    x = torch.full((count, 1, 6, 6), 0.05)
    for n in range(count):
        k = int(kind[n])
        if n % 2 == 0:
            x[n, 0, 3 * (k // 2) : 3 * (k // 2) + 3, 3 * (k % 2) : 3 * (k % 2) + 3] = 0.9
        else:
            x[n] = 0.35 + 0.18 * k
    x = (x + 0.01 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    labels = torch.where(torch.arange(count) % 2 == 0, kind, kind + 4)
    return TensorSplit(x, labels, classes=8)


@dataclass
class Planted:
    """The float network, trained, with its space and data."""

    model: nn.Module
    space: Space
    fit: TensorSplit
    held_out: TensorSplit

    def net(self, options: ActorOptions | None = None) -> AdaptiveNet:
        """Return a fresh adaptive copy."""
        torch.manual_seed(0)
        return adapt(self.model, self.space, self.fit.batch(torch.arange(256))[0], options)


@functools.cache
def learned() -> tuple[Narrow, TensorSplit]:
    """Return the float network, trained, and its images."""
    torch.manual_seed(0)
    model, fit = Narrow(), images(512)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    x, y = fit.batch(torch.arange(512))
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), fit


def planted(monkeypatch, options: ActorOptions | None = None, *, share: float = 0.55) -> Planted:
    """Build it: the budget leaves four bits to ``share`` of the images, after the actor is paid for."""
    monkeypatch.setattr(actor, "SHARE", 1e9)
    model, fit = learned()
    x = fit.batch(torch.arange(64))[0]
    found = trace(model, x[:1])
    choices = {"first": [Bits(8, 8)], "middle": list(CHOICES), "last": [Bits(8, 8)]}
    space = Space.of(found, choices, 1)
    macs = found["middle"].macs
    probe = adapt(model, space, x[:64], options)
    limit = round(space.fixed + probe.actor.macs * 64 + macs * (1 + 15 * share))
    return Planted(model, Space.of(found, choices, limit), fit, images(400, seed=1))
