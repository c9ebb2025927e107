"""A bank: a few static policies on one weight set, and a router that reads the image alone, so that it can run before any of them.

The policies are cluster centres of the decisions that the adaptive network took on training images of the stated mix. Their number
is the smallest that explains `BankOptions.explained` of how decisions vary, each site's step counted by what it costs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.adaptive.actor import Dense, Standard, image_features, image_statistics, image_work, rectified
from bitwright.adaptive.judging import Seen, describe, look, paired_gain
from bitwright.adaptive.network import AdaptiveNet
from bitwright.adaptive.promise import batches, decisions
from bitwright.adaptive.session import Session, members_of, normalisation, write_bank
from bitwright.data.splits import Split
from bitwright.errors import RecipeError
from bitwright.evaluation import wilson
from bitwright.policy import Policy

ROUNDS = 50
STARTS = 4
BISECTIONS = 30
LARGEST = 1e4
TIMED = 5
"""Rounds of a throughput measurement; each times the session and its widest member once."""


@dataclass(frozen=True)
class BankOptions:
    """How an adaptive network becomes a bank.

    Attributes:
        most: largest number of members.
        explained: share of the decisions' variance, each site weighted by its cost, that the members must explain.
        images: training images whose decisions are clustered and on which the router is trained.
        hidden: units of the router.
        epochs: passes of the router over those images.
    """

    most: int = 8
    explained: float = 0.9
    images: int = 4000
    hidden: int = 32
    epochs: int = 60

    def __post_init__(self) -> None:
        if min(self.most, self.images, self.hidden, self.epochs) < 1 or not 0 < self.explained <= 1:
            raise RecipeError("bank options most, images, hidden and epochs must be at least 1, and explained in (0, 1]")


class Router(nn.Module):
    """From an image's own statistics to the member that runs it; 8-bit arithmetic, as the actor's."""

    price: Tensor

    def __init__(self, image: tuple[int, ...], members: int, hidden: int):
        super().__init__()
        self.image = image
        self.standard = Standard(image_features(image))
        self.inner = Dense(image_features(image), hidden)
        self.outer = Dense(hidden, members)
        self.register_buffer("price", torch.zeros(()))
        self.register_buffer("worth", torch.zeros(members))

    worth: Tensor

    def forward(self, statistics: Tensor) -> Tensor:
        """Return scores ``[N, K]`` of statistics ``[N, features]``."""
        scores: Tensor = self.outer(rectified(self.inner(self.standard(statistics))))
        return scores - self.price * self.worth

    def route(self, x: Tensor) -> Tensor:
        """Return the member of each image, int64 ``[N]``."""
        scores: Tensor = self(image_statistics(x))
        return scores.argmax(1)

    @property
    def macs(self) -> int:
        """Multiply-accumulates an image."""
        return image_work(self.image) + self.inner.macs + self.outer.macs


@dataclass(frozen=True, eq=False)
class Bank:
    """What `save_bank` writes.

    Attributes:
        net: the adaptive network that the members are taken from.
        index: choices of every member, int64 ``[K, S]``, cheapest member first.
        members: the same as policies.
        shares: what each member costs of the budget, the router included, ``[K]``.
        router: chooses among them.
        facts: how the members were found, as JSON-able data.
        mean, std: normalisation of the images, so that a session takes pixels in 0 … 1.
    """

    net: AdaptiveNet
    index: Tensor
    members: tuple[Policy, ...]
    shares: Tensor
    router: Router
    facts: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def build_bank(net: AdaptiveNet, data: Split, options: BankOptions, *, seed: int = 0) -> Bank:
    """Cluster the decisions that a network takes on images of the stated mix, and train a router to choose among the centres.

    Args:
        net: a trained adaptive network.
        data: training images of the mix.
        options: how many members at most, and how they are found.
        seed: of starts and of the router's weights.
    """
    images = data.take(options.images)
    shares, index = decisions(net, images)
    count, centres, told = choose_members(index, net.space.terms, options, seed)
    order = net.space.terms.gather(1, centres.T).sum(0).argsort()
    centres = centres[order]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router, agreement = _train_router(net, images, centres, index, options)
    costs = _member_shares(net, centres, router)
    target = min(1.0, float(shares.double().mean()))
    _settle(router, images, costs, target)
    mean, std = normalisation(data)
    facts = {
        "members": count,
        "criterion": criterion(options, told[-1], index.shape[1]),
        "explained": told,
        "router_agreement": agreement,
        "router_macs": router.macs,
    }
    policies = tuple(net.space.policy(row.tolist()) for row in centres)
    return Bank(net, centres, policies, costs, router.eval(), facts, mean, std)


def criterion(options: BankOptions, explained: float, images: int) -> str:
    """Return in words by what the number of members was chosen, and where it falls short.

    >>> criterion(BankOptions(most=2), 0.5, 100)
    "the fewest that explain 90% of the cost-weighted variance of 100 images' decisions, 2 at most: these explain 50%"
    """
    wanted = f"the fewest that explain {options.explained:.0%} of the cost-weighted variance of {images} images' decisions"
    return wanted if explained >= options.explained else f"{wanted}, {options.most} at most: these explain {max(0.0, explained):.0%}"


def choose_members(index: Tensor, terms: Tensor, options: BankOptions, seed: int = 0) -> tuple[int, Tensor, list[float]]:
    """Return how many members are enough, their choices ``[K, S]``, and the variance that 1, 2, … members explain.

    >>> index = torch.tensor([[0, 0, 1, 1], [0, 0, 2, 2]])
    >>> choose_members(index, torch.tensor([[1.0, 4, 9], [1, 4, 9]]), BankOptions())[1].tolist()
    [[0, 0], [1, 2]]
    """
    points = terms.gather(1, index).T.double()  # [N, S]: what each site costs
    total = float((points - points.mean(0)).square().sum())
    told: list[float] = []
    centres = index.T.mode(0).values[None]
    for count in range(1, min(options.most, len(points)) + 1):
        centres, left = _cluster(index, points, terms, count, seed)
        told.append(1.0 if total == 0 else 1 - left / total)
        if told[-1] >= options.explained:
            break
    return len(centres), centres, told


def _cluster(index: Tensor, points: Tensor, terms: Tensor, count: int, seed: int) -> tuple[Tensor, float]:
    """Return the best of a few k-means whose centres are policies (the commonest choice of each site), and the variance left."""
    generator = torch.Generator().manual_seed(seed)
    best, least = index.T.mode(0).values[None], float("inf")
    for _ in range(STARTS):
        centres = _spread_out(index, points, terms, count, generator)
        for _ in range(ROUNDS):
            near = _distances(points, centres, terms).argmin(1)
            new = torch.stack([index.T[near == k].mode(0).values if bool((near == k).any()) else centres[k] for k in range(len(centres))])
            if torch.equal(new, centres):
                break
            centres = new
        left = float(_distances(points, centres, terms).amin(1).sum())
        if left < least:
            best, least = centres, left
    return torch.unique(best, dim=0), least


def _spread_out(index: Tensor, points: Tensor, terms: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return first centres: each next one drawn with the squared distance to those there (k-means++, Arthur and Vassilvitskii, 2007)."""
    centres = index.T[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < count:
        far = _distances(points, centres, terms).amin(1)
        if float(far.sum()) == 0:
            break
        centres = torch.cat([centres, index.T[torch.multinomial(far, 1, generator=generator)]])
    return centres


def _distances(points: Tensor, centres: Tensor, terms: Tensor) -> Tensor:
    """Return squared distances ``[N, K]`` of decisions to policies, in what they cost."""
    places = terms.gather(1, centres.T).T.double()
    return torch.cdist(points, places).square()


def _train_router(net: AdaptiveNet, images: Split, centres: Tensor, index: Tensor, options: BankOptions) -> tuple[Router, float]:
    """Return a router that was taught which centre is nearest to what the network decides, and how often it agrees on its own images."""
    x, y = _statistics(images), _distances(net.space.terms.gather(1, index).T.double(), centres, net.space.terms).argmin(1)
    shape = tuple(images.batch(torch.arange(1))[0].shape[1:])
    router = Router(shape, len(centres), options.hidden)
    router.standard.observe(x)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.01)
    steps = options.epochs * max(1, len(x) // 256)
    for step in range(steps):
        rows = torch.randint(len(x), (min(256, len(x)),))
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(router(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return router, float((router(x).argmax(1) == y).double().mean())


def _statistics(split: Split) -> Tensor:
    return torch.cat([image_statistics(x).cpu() for x, _, _ in batches(split)])


def _member_shares(net: AdaptiveNet, centres: Tensor, router: Router) -> Tensor:
    own = net.space.terms.gather(1, centres.T).sum(0) + net.space.fixed + 64 * router.macs
    return (own / net.space.limit).float()


def _settle(router: Router, images: Split, shares: Tensor, target: float) -> None:
    """Set the router's price, which may be negative, so that its mean cost on the images is that of the network, or just less."""
    statistics = _statistics(images)
    router.worth.copy_(shares - shares.mean())

    def mean(price: float) -> float:
        router.price.fill_(price)
        with torch.no_grad():
            return float(shares[router(statistics).argmax(1)].double().mean())

    low, high = -1.0, 1.0
    while mean(low) <= target and low > -LARGEST:
        low *= 4
    while mean(high) > target and high < LARGEST:
        high *= 4
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > target else (low, middle)
    mean(high)


def save_bank(bank: Bank, folder: Path, example: Tensor, *, reference: tuple[str, Any] | None = None) -> int:
    """Write bank.json and bank.safetensors, read them back and compare every member's logits; return the bytes of both.

    Raises:
        ExportError: what was read back differs.
    """
    return write_bank(bank, folder, example, reference)


def session_of(bank: Bank) -> Session:
    """Return the session that a saved bank would give."""
    return Session(members_of(bank.net, bank.index), bank.router, bank.members, bank.shares * bank.net.space.limit, bank.mean, bank.std)


def try_bank(bank: Bank, net: AdaptiveNet, test: Split, *, threads: int | None = None) -> dict[str, Any]:
    """Return accuracy and mean cost of bank and adaptive network on the same images, and what was measured of the session's speed."""
    full = look(net, test)
    routed, correct = _routed(bank, test)
    shares = bank.shares[routed]
    own = Seen(correct, shares, bank.index[routed].T)
    widest = look(net, test, forced=bank.index[-1][:, None].expand(-1, len(test)))
    seconds = _time(bank, test)
    cost = [float(share) * net.space.limit for share in bank.shares]
    return {
        **bank.facts,
        "policies": [{site: list(bits) for site, bits in policy.items()} for policy in bank.members],
        "member_bitops": cost,
        "member_use": [float((routed == k).double().mean()) for k in range(len(cost))],
        "adaptive": describe(net, full),
        "bank": {**describe(net, own), **paired_gain(own, full)},
        "widest_member": {"top1": float(widest.correct.double().mean()), "interval": list(wilson(int(widest.correct.sum()), len(test)))},
        "modelled_bitops_ratio": float(shares.double().mean()) * net.space.limit / cost[-1],
        "measured": {**seconds, "threads": threads or torch.get_num_threads(), "runtime": f"torch {torch.__version__}, eager, CPU"},
    }


def _routed(bank: Bank, test: Split) -> tuple[Tensor, Tensor]:
    session = session_of(bank)
    routed, correct = [], []
    for x, y, _ in batches(test):
        logits, chosen = session.run(x.cpu())
        routed.append(chosen)
        correct.append(logits.argmax(1) == y.cpu())
    return torch.cat(routed), torch.cat(correct)


def _time(bank: Bank, test: Split) -> dict[str, Any]:
    """Measure images a second of the session and of its widest member, one after the other in every round; medians and their range."""
    session, x = session_of(bank), test.batch(torch.arange(min(128, len(test))))[0].cpu()
    widest = session.members[-1]
    rates: dict[str, list[float]] = {"session": [], "widest": []}
    with torch.no_grad():
        for _ in range(TIMED + 1):
            for name, call in (("session", session.run), ("widest", widest)):
                started = time.perf_counter()
                call(x)
                rates[name].append(len(x) / (time.perf_counter() - started))
    found = {name: sorted(values[1:]) for name, values in rates.items()}  # the first round warms up
    ratios = sorted(a / b for a, b in zip(rates["session"][1:], rates["widest"][1:], strict=True))
    return {
        "images_per_second": {name: values[TIMED // 2] for name, values in found.items()},
        "ratio": ratios[TIMED // 2],
        "ratio_range": [ratios[0], ratios[-1]],
        "batch": len(x),
    }


__all__ = ["Bank", "BankOptions", "Router", "build_bank", "choose_members", "save_bank", "session_of", "try_bank"]
