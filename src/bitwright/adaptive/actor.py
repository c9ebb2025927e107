r"""The actor: a small network that reads statistics of an input, and of each layer's input, and says which width every site takes.

What it reads carries no gradient, so that it cannot bend the network. Its arithmetic is that of 8-bit integers, and it counts in
the cost at that width. Published (Wang, Guo, Guo and Zhang, "Data quality-aware mixed-precision quantization via hybrid reinforcement
learning", 2023) is that a policy decides bit-widths from uneven image quality without a label of it, and that its discrete
choice is relaxed to a continuous distribution of few parameters. Everything else here is a reconstruction.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.errors import BitwrightError, RecipeError, nearest
from bitwright.policy import Bits
from bitwright.quant.functional import round_ste

Kind = Literal["layerwise", "controller", "static", "random", "severity"]
Relaxation = Literal["concrete", "gaussian"]
KINDS: tuple[Kind, ...] = ("layerwise", "controller", "static", "random", "severity")

WIDTH = Bits(8, 8)
"""The actor's own width."""
GRID, LARGEST = 32.0, 127.0
"""Its activations are multiples of 1/32 up to 127/32: standard deviations of a statistic, or units of a hidden layer."""
SHARE = 0.015
"""The largest share of the network's MACs that an actor may take."""
POOL = 4
"""Places across to which a DQNet-style controller pools what it reads."""


@dataclass(frozen=True)
class ActorOptions:
    """What decides, and how large it is.

    Attributes:
        kind: ``layerwise`` reads the image and each layer's input (ours); ``controller`` decides all sites at once from pooled
            stem features, as DQNet does (Liu et al., 2022); ``static`` learns one policy for all inputs; ``random`` draws every
            sample's widths; ``severity`` learns one policy for each true severity, which no deployed network knows.
        relaxation: ``concrete`` (a Gumbel-softmax over the choices) or ``gaussian`` (a mean and a spread, two numbers a site).
        quality: features of the image embedding.
        project: features that each layer's statistics are projected to.
        hidden: units of each site's hidden layer.
        looks: values of a layer's input that its statistics are taken from, spread evenly over its places.
    """

    kind: Kind = "layerwise"
    relaxation: Relaxation = "concrete"
    quality: int = 16
    project: int = 16
    hidden: int = 16
    looks: int = 1024

    def __post_init__(self) -> None:
        if self.kind == "random" and self.relaxation != "concrete":
            raise RecipeError("actor kind 'random' draws among choices, which the gaussian relaxation has not; use relaxation=concrete")
        for name, known in (("kind", KINDS), ("relaxation", ("concrete", "gaussian"))):
            if getattr(self, name) not in known:
                raise RecipeError(f"actor {name} '{getattr(self, name)}' is unknown; {nearest(str(getattr(self, name)), known)}")
        if min(self.quality, self.project, self.hidden, self.looks) < 1:
            raise RecipeError("actor: quality, project, hidden and looks must be at least 1; leave them out for the defaults")

    def smaller(self) -> ActorOptions | None:
        """Return options of about half the work, or None where nothing is left to halve."""
        if self.project <= 2:
            return None
        halved = {name: max(2, getattr(self, name) // 2) for name in ("quality", "project", "hidden")}
        return replace(self, **halved, looks=max(32, self.looks // 2))


@dataclass(frozen=True)
class SiteInput:
    """What enters a deciding site: its shape without the batch, ``(C, H, W)``, ``(…, C)`` of a linear layer, and which it is."""

    shape: tuple[int, ...]
    linear: bool

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[-1] if self.linear else self.shape[0]

    @property
    def places(self) -> int:
        """Number of values a channel has."""
        return math.prod(self.shape) // self.channels

    def stride(self, looks: int) -> int:
        """Return the distance, along each axis of places, of the values that statistics are taken from."""
        axes = max(1, len(self.shape) - 1)
        share: float = self.channels * self.places / looks
        return max(1, math.ceil(math.exp(math.log(share) / axes)))

    def looked(self, looks: int) -> int:
        """Return how many values that leaves."""
        step = self.stride(looks)
        sizes = self.shape[:-1] if self.linear else self.shape[1:]
        return self.channels * math.prod(math.ceil(n / step) for n in sizes)


def laplacian(x: Tensor) -> Tensor:
    r"""Return :math:`4x_{i,j} - x_{i\pm1,j} - x_{i,j\pm1}` of images ``[N, C, H, W]``, where all neighbours exist.

    >>> laplacian(torch.eye(3)[None, None])
    tensor([[[[4.]]]])
    """
    middle = 4 * x[..., 1:-1, 1:-1]
    return middle - x[..., :-2, 1:-1] - x[..., 2:, 1:-1] - x[..., 1:-1, :-2] - x[..., 1:-1, 2:]


def image_statistics(x: Tensor) -> Tensor:
    """Return what tells an image's quality: at full and at half resolution mean |Laplacian| and spread, and the mean; ``[N, 5C]``.

    Noise lifts the Laplacian at full resolution, blur lowers it, a loss of contrast lowers the spread. Inputs that are no
    images give mean magnitude, spread and mean: ``[N, 3]``.

    >>> image_statistics(torch.zeros(2, 3, 8, 8)).shape, image_statistics(torch.zeros(2, 7)).shape
    (torch.Size([2, 15]), torch.Size([2, 3]))
    """
    x = x.detach().float()
    if x.dim() != 4 or min(x.shape[2:]) < 6:
        flat = x.flatten(1)
        return torch.stack([magnitude(flat.abs().mean(1)), magnitude(deviation(flat, (1,))), flat.mean(1)], 1)
    half = F.avg_pool2d(x, 2)
    parts = [magnitude(laplacian(view).abs().mean((2, 3))) for view in (x, half)]
    parts += [magnitude(deviation(view, (2, 3))) for view in (x, half)]
    return torch.cat([*parts, x.mean((2, 3))], 1)


def image_work(shape: tuple[int, ...]) -> int:
    """Return the multiply-accumulates that `image_statistics` takes for one image: one for the Laplacian's centre, one for a square."""
    count = math.prod(shape)
    return 2 * count + 2 * count // 4 if len(shape) == 3 else count


def image_features(shape: tuple[int, ...]) -> int:
    """Return how many numbers `image_statistics` gives for one image."""
    return 5 * shape[0] if len(shape) == 3 and min(shape[1:]) >= 6 else 3


def layer_statistics(x: Tensor, site: SiteInput, looks: int) -> Tensor:
    """Return the mean magnitude and the standard deviation of each channel of a layer's input, ``[N, 2C]``, on a log scale."""
    x, step = x.detach(), site.stride(looks)
    if site.linear:
        x = x.reshape(len(x), -1, x.shape[-1])[:, ::step].transpose(1, 2)
    else:
        x = x[(slice(None), slice(None), *[slice(None, None, step)] * (x.dim() - 2))]
    flat = x.float().flatten(2)
    return torch.cat([magnitude(flat.abs().mean(2)), magnitude(deviation(flat, (2,)))], 1)


def deviation(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return the standard deviation over some axes."""
    return (x - x.mean(axes, keepdim=True)).square().mean(axes).sqrt()


def magnitude(x: Tensor) -> Tensor:
    """Put a magnitude on a log scale that ends at about 0.01."""
    return (x + 0.01).log()


class Standard(nn.Module):
    """Statistics in standard deviations around the mean of the calibration images, on the actor's grid."""

    center: Tensor
    width: Tensor

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("center", torch.zeros(features))
        self.register_buffer("width", torch.ones(features))

    def observe(self, values: Tensor) -> None:
        """Take centre and width from a sample ``[N, features]``."""
        with torch.no_grad():
            self.center.copy_(values.mean(0))
            self.width.copy_(values.std(0, correction=0).clamp_min(0.05))

    def forward(self, values: Tensor) -> Tensor:
        """Return integer codes of 1/32 within ±127."""
        return ((values - self.center) / self.width * GRID).round().clamp(-LARGEST, LARGEST)


class Dense(nn.Module):
    """A linear layer of 8-bit integers, weights and inputs: its sums are exact, so they are the same in any batch."""

    def __init__(self, inputs: int, outputs: int, *, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * gain / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, codes: Tensor) -> Tensor:
        """Map codes ``[N, inputs]`` of 1/32 to values ``[N, outputs]``."""
        step = (self.weight.detach().abs().amax() / LARGEST).clamp_min(1e-8)
        return F.linear(codes, round_ste(self.weight / step)) * (step / GRID) + self.bias

    @property
    def macs(self) -> int:
        """Multiply-accumulates a sample."""
        return self.weight.numel()


def rectified(values: Tensor) -> Tensor:
    """Return the codes of the positive part, with the gradient of a clipped ReLU."""
    return round_ste((values * GRID).clamp(0, LARGEST))


class Actor(nn.Module, ABC):
    """Says how much each site likes each of its choices, sample by sample.

    Attributes:
        outputs: numbers a site gets: its choices, or mean and spread.
        price: what a choice of each site loses for each share of the budget that it costs; set so that the mean cost meets the budget.
    """

    reads: ClassVar[bool] = True
    """Whether the decision depends on the input."""
    price: Tensor

    def __init__(self, sites: int, outputs: int):
        super().__init__()
        self.sites, self.outputs = sites, outputs
        self.register_buffer("price", torch.zeros(sites))

    def begin(self, x: Tensor, condition: Tensor | None) -> Tensor | None:
        """Look at the images before anything runs; what is returned comes back in `scores`."""
        return None

    @abstractmethod
    def scores(self, site: int, x: Tensor, seen: Tensor | None, condition: Tensor | None) -> Tensor:
        """Return ``[N, outputs]`` of a site whose input is ``x``."""

    def observe(self, site: int, x: Tensor) -> None:
        """Take the usual size of the statistics from calibration inputs; site -1 is the image."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates a sample, statistics included."""
        return 0


class Layerwise(Actor):
    """Ours: an embedding of the input's quality, joined at every site with the statistics of the site's own input.

    The embedding is taken from the image and from the features that the first deciding site reads, which are the stem's.
    """

    def __init__(self, inputs: Sequence[SiteInput], image: tuple[int, ...], outputs: int, options: ActorOptions):
        super().__init__(len(inputs), outputs)
        self.inputs, self.image, self.options = tuple(inputs), image, options
        quality, project, hidden = options.quality, options.project, options.hidden
        features = image_features(image)
        self.standard = Standard(features)
        self.embed = Dense(features + 2 * inputs[0].channels, quality)
        self.standards = nn.ModuleList(Standard(2 * site.channels) for site in inputs)
        self.projections = nn.ModuleList(Dense(2 * site.channels, project) for site in inputs)
        self.hidden = nn.ModuleList(Dense(quality + project, hidden) for _ in inputs)
        self.heads = nn.ModuleList(Dense(hidden, outputs, gain=0.5) for _ in inputs)
        self._quality: Tensor | None = None

    def begin(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Return the codes of the image's statistics, ``[N, features]``."""
        seen: Tensor = self.standard(image_statistics(x))
        return seen

    def scores(self, site: int, x: Tensor, seen: Tensor | None, condition: Tensor | None) -> Tensor:
        """Return the outputs of a site's head; the first one to ask brings the stem's features."""
        statistics = self.standards[site](layer_statistics(x, self.inputs[site], self.options.looks))
        if site == 0:
            assert seen is not None
            self._quality = rectified(self.embed(torch.cat([seen, statistics], 1)))
        assert self._quality is not None
        joined = torch.cat([self._quality, rectified(self.projections[site](statistics))], 1)
        scores: Tensor = self.heads[site](rectified(self.hidden[site](joined)))
        return scores

    def observe(self, site: int, x: Tensor) -> None:
        """Take centre and width of one site's statistics, or the image's."""
        if site < 0:
            self.standard.observe(image_statistics(x))
        else:
            self.standards[site].observe(layer_statistics(x, self.inputs[site], self.options.looks))  # type: ignore[operator]

    @property
    def macs(self) -> int:
        """Statistics, embedding, and every site's three layers."""
        dense = sum(module.macs for module in self.modules() if isinstance(module, Dense))
        return image_work(self.image) + dense + sum(site.looked(self.options.looks) for site in self.inputs)


class Controller(Actor):
    """DQNet's controller (Liu et al., CVPR 2022): pooled features of the stem, two linear layers, all sites at once.

    Differs: the features are pooled to 4 × 4 whatever their size, and no dropout is used.
    """

    def __init__(self, first: SiteInput, sites: int, outputs: int, options: ActorOptions):
        super().__init__(sites, outputs)
        self.first = first
        features = first.channels * (1 if first.linear else POOL ** (len(first.shape) - 1))
        self.standard = Standard(features)
        self.inner = Dense(features, 4 * options.hidden)
        self.outer = Dense(4 * options.hidden, sites * outputs, gain=0.5)
        self._known: Tensor | None = None

    def _features(self, x: Tensor) -> Tensor:
        x = x.detach().float()
        if self.first.linear:
            return x.reshape(len(x), -1, x.shape[-1]).mean(1)
        pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[x.dim() - 3]
        return pool(x, POOL).flatten(1)

    def scores(self, site: int, x: Tensor, seen: Tensor | None, condition: Tensor | None) -> Tensor:
        """Return a site's part; all are made when the first one asks."""
        if site == 0:
            self._known = self.outer(rectified(self.inner(self.standard(self._features(x))))).view(len(x), self.sites, self.outputs)
        assert self._known is not None
        return self._known[:, site]

    def observe(self, site: int, x: Tensor) -> None:
        """Take centre and width of the pooled features."""
        if site == 0:
            self.standard.observe(self._features(x))

    @property
    def macs(self) -> int:
        """The two layers; pooling only adds."""
        return self.inner.macs + self.outer.macs


class Table(Actor):
    """One learned row of scores for all inputs, or one for each true condition; nothing is read.

    A condition that no training image had takes the row of the nearest that one had, of two equally near the milder.
    """

    reads = False
    met: Tensor

    def __init__(self, sites: int, outputs: int, conditions: int = 1, *, learned: bool = True):
        super().__init__(sites, outputs)
        self.scores_of = nn.Parameter(torch.zeros(conditions, sites, outputs), requires_grad=learned)
        self.register_buffer("met", torch.zeros(conditions if conditions > 1 else 0))

    def scores(self, site: int, x: Tensor, seen: Tensor | None, condition: Tensor | None) -> Tensor:
        """Return the row of each sample's condition."""
        if len(self.scores_of) == 1:
            return self.scores_of[:, site].expand(len(x), -1)
        if condition is None:
            raise BitwrightError("an actor of true severities needs the severity of each image; evaluate it on a mixed-quality data set")
        if self.training:
            self.met.index_fill_(0, condition, 1.0)
            return self.scores_of[condition, site]
        places = torch.arange(len(self.met), device=x.device)
        far = (places[:, None] - places).abs() + len(places) * (self.met == 0)
        return self.scores_of[far.argmin(1)[condition], site]


def build_actor(
    options: ActorOptions, inputs: Sequence[SiteInput], image: tuple[int, ...], choices: int, network_macs: int, conditions: int = 6
) -> Actor:
    """Return an actor within `SHARE` of the network's MACs: sizes are halved until it fits.

    Args:
        options: what decides, and how large it may be.
        inputs: what enters each deciding site.
        image: shape of one input.
        choices: number of choices of a site.
        network_macs: MACs of the whole network, a sample.
        conditions: severities that the ``severity`` kind tells apart, clean included.

    Raises:
        BitwrightError: even the smallest actor is too large.
    """
    wanted: ActorOptions | None = options
    actor: Actor | None = None
    while wanted is not None:
        actor = _actor(wanted, inputs, image, choices, conditions)
        if actor.macs <= SHARE * network_macs:
            return actor
        wanted = wanted.smaller()
    assert actor is not None
    found = f"the smallest {options.kind} one takes {actor.macs:,} MACs an image and the network {network_macs:,}"
    least = f"at least {math.ceil(actor.macs / SHARE):,} MACs"
    raise BitwrightError(
        f"actor: may take {SHARE:.1%} of the network's work; {found}; use a network of {least}, or search one policy for all inputs"
    )


def _actor(options: ActorOptions, inputs: Sequence[SiteInput], image: tuple[int, ...], choices: int, conditions: int) -> Actor:
    outputs = choices if options.relaxation == "concrete" else 2
    if options.kind == "layerwise":
        return Layerwise(inputs, image, outputs, options)
    if options.kind == "controller":
        return Controller(inputs[0], len(inputs), outputs, options)
    if options.kind == "severity":
        return Table(len(inputs), outputs, conditions)
    return Table(len(inputs), outputs, learned=options.kind == "static")
