"""Search on another, smaller data set: the float network adapted to it, with the sites and the costs of the target.

The proxy may differ from the target in classes, image size and channels. Its network keeps every layer of the target's: the
stem is folded to the proxy's channels and strides less where the images are smaller, the head is replaced by one for the
proxy's classes, and BatchNorm is measured anew. What the policy costs is always counted on the target.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.data import Data, Split
from bitwright.errors import DataError, SiteError
from bitwright.evaluation import evaluate
from bitwright.margins import features_of
from bitwright.quant.batchnorm import batchnorms
from bitwright.sites import Trace
from bitwright.training import FinetuneOptions, finetune

SHARE = 0.04
"""A proxy's images where their number is not given: this share of the target's (Tang et al., 2023, have 4 %)."""
HELD_OUT = 0.2
"""Share of a proxy's images on which policies are judged."""
WORSE = 0.05
"""The share of images by which training on a proxy may make its network worse without a word."""
SMALLEST_STRIDE = 2
"""Images must be smaller by this before any stride has to shrink."""
POOLS = (nn.MaxPool2d, nn.AvgPool2d)


@dataclass(frozen=True)
class Proxy:
    """A proxy data set and the target's network adapted to it.

    Attributes:
        model: the network on the proxy's classes.
        data: the proxy's splits.
        sample_passes: what the adaptation cost (`bitwright.problem.Problem.spend`).
    """

    model: nn.Module
    data: Data
    sample_passes: int


def reduced(data: Data, images: int, seed: int) -> Data:
    """Return a data set of so many training images, a fifth of them for selection.

    Raises:
        DataError: there are not so many, fewer than two were asked for, or too few are held out for selection.

    >>> from bitwright.data import load_data
    >>> small = reduced(load_data("digits", held_out=100, seed=0), 50, seed=0)
    >>> len(small.fit), len(small.selection)
    (40, 10)
    """
    held = max(1, round(HELD_OUT * images))
    most = len(data.fit) + len(data.selection)
    if not 2 <= images <= most:
        raise DataError(f"proxy: {images} images of {data.name} were asked for; give 2 to {most}")
    if images - held > len(data.fit) or held > len(data.selection):
        found = f"{len(data.selection)} of {most} are held out"
        raise DataError(f"proxy: {images} images of {data.name} are {held} for selection, and {found}; load them with held_out={held}")
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(len(split), generator=generator)[:n] for split, n in ((data.fit, images - held), (data.selection, held))]
    return Data(data.name, data.fit.subset(chosen[0]), data.selection.subset(chosen[1]), data.test, data.classes, data.shape)


def adapt(model: nn.Module, trace: Trace, shape: tuple[int, ...], data: Data, options: FinetuneOptions | None, *, seed: int = 0) -> Proxy:
    """Return a network's copy that classifies a proxy's images, trained on them for a short while.

    Args:
        model: trained float network of the target.
        trace: its sites; the first is the stem, the last a linear classifier.
        shape: (C, H, W) of the target's images.
        data: the proxy; images that the network cannot take at their own size are resized to the target's.
        options: how the adapted network is trained; None leaves it at nearest class means.
        seed: of that training.

    Raises:
        SiteError: the last site is no linear layer on one vector of features an image, so it cannot be replaced by one for other
            classes; or the stem must change and is a functional call.
        DataError: the network runs on the proxy's images at no size.
    """
    network = copy.deepcopy(model).eval()
    fold_stem(network, trace.first, shape, data.shape)
    shrink_strides(network, trace.first, shape, data.shape)
    if not _runs(network, data):
        network = _with_strides_of(model, network)
        fit, selection, test = (_Resized(split, shape[1:]) for split in (data.fit, data.selection, data.test))
        data = Data(data.name, fit, selection, test, data.classes, (data.shape[0], *shape[1:]))
        if not _runs(network, data):
            raise DataError(f"proxy: the network runs on images of {data.name} neither at their size nor at the target's; choose another")
    spent = estimate_batchnorm(network, data.fit)
    spent += replace_head(network, trace.last, data)
    if options is not None:
        before = evaluate(network, data.selection).top1
        history = finetune(network, data.fit, options, selection=data.selection, seed=seed)
        _judge(data.name, before, evaluate(network, data.selection).top1, options.lr)
        spent += 3 * history.steps * min(options.batch_size, len(data.fit))
    return Proxy(network.eval(), data, spent)


def _judge(name: str, before: float, after: float, lr: float) -> None:
    """Warn where training has made the network worse: what it is sensitive to then says nothing."""
    if after < before - WORSE:
        seen = f"{100 * after:.1f} % of its selection images right, {100 * before:.1f} % before"
        remedy = f"lower search.proxy.adapt.lr (now {lr:g}), or leave that training out with search.proxy.adapt=null"
        warnings.warn(f"proxy: training the network on {name} has made it worse ({seen}); {remedy}", stacklevel=3)


def fold_stem(network: nn.Module, first: str, shape: tuple[int, ...], proxy: tuple[int, ...]) -> None:
    """Give the first convolution the proxy's input channels, in place.

    Grey images count as colour ones of three equal channels, so the weights are summed over the channels they see; colour
    images are averaged for a grey network. Any other number repeats the mean channel at equal total weight.
    """
    ours, theirs = shape[0], proxy[0]
    if ours == theirs:
        return
    stem = _layer(network, first)
    if not isinstance(stem, nn.Conv2d) or stem.in_channels != ours or stem.groups != 1:
        raise SiteError(f"proxy: the first site '{first}' takes no images of {ours} channels; the proxy has {theirs}: give one with {ours}")
    stem.weight = nn.Parameter(stem.weight.detach().sum(1, keepdim=True).repeat(1, theirs, 1, 1) / theirs)
    stem.in_channels = theirs


def shrink_strides(network: nn.Module, first: str, shape: tuple[int, ...], proxy: tuple[int, ...]) -> None:
    """Let the stem stride less, in place, by as much as the proxy's images are smaller.

    The stem is the first convolution and a pooling layer after it: nothing branches there.
    """
    ratio = min(shape[1:]) / max(1, min(proxy[1:]))
    if ratio < SMALLEST_STRIDE:
        return
    stem = _layer(network, first)
    pools = [module for module in network.modules() if isinstance(module, POOLS)]
    for module in (stem, *pools[:1]):
        stride = _stride(module)
        if 1 < stride <= ratio:
            cast(Any, module).stride = (1, 1)
            ratio /= stride


def _layer(network: nn.Module, site: str) -> nn.Module:
    """Return the layer of a site; raises `SiteError` for a functional call, which has none that could be changed."""
    modules: dict[str, nn.Module] = dict(network.named_modules())
    if site not in modules:
        raise SiteError(
            f"proxy: site '{site}' is a functional call, which cannot be adapted; write it as a layer, such as nn.Conv2d or nn.Linear"
        )
    return modules[site]


def _stride(module: nn.Module) -> int:
    stride = getattr(module, "stride", 1)
    return max(stride) if isinstance(stride, tuple) else int(stride)


def _with_strides_of(model: nn.Module, network: nn.Module) -> nn.Module:
    """Return the network with the strides that a model has."""
    for (_, theirs), (_, ours) in zip(model.named_modules(), network.named_modules(), strict=True):
        if hasattr(theirs, "stride"):
            cast(Any, ours).stride = theirs.stride
    return network


def replace_head(network: nn.Module, last: str, data: Data, images: int = 2000) -> int:
    r"""Replace the classifier by one for the proxy's classes, in place: logits fall with the squared distance to class means.

    :math:`-\|z - \mu_k\|^2 / \sigma^2` is linear in z up to what all classes share, with :math:`\sigma^2` the mean squared
    distance within classes: the nearest-class-mean classifier at the temperature of its own noise.

    Returns:
        The sample-passes that the class means took.
    """
    old = _layer(network, last)
    if not isinstance(old, nn.Linear):
        raise SiteError(f"proxy: the last site '{last}' is a {type(old).__name__}; other classes need a linear classifier there")
    z, y = features_of(network, last, data.fit.take(images))
    counts = torch.bincount(y, minlength=data.classes).clamp_min(1)
    means = torch.zeros(data.classes, z.shape[1]).index_add(0, y, z) / counts[:, None]
    spread = (z - means[y]).square().sum(1).mean().clamp_min(1e-6)
    head = nn.Linear(old.in_features, data.classes).to(old.weight)
    with torch.no_grad():
        head.weight.copy_(2 * means / spread)
        head.bias.copy_(-means.square().sum(1) / spread)
    parent, _, name = last.rpartition(".")
    setattr(network.get_submodule(parent), name, head)
    return len(z)


def estimate_batchnorm(network: nn.Module, split: Split, images: int = 2000) -> int:
    """Measure every BatchNorm anew on a split, in place: a plain average over batches; return the sample-passes it took.

    Raises:
        DataError: there is one image, and of one a BatchNorm has no statistics because it sees no more than a vector an image.
    """
    modules = batchnorms(network)
    if not modules:
        return 0
    momenta = {name: module.momentum for name, module in modules.items()}
    device, seen = next(network.parameters()).device, 0
    for module in modules.values():
        module.reset_running_stats()
        module.momentum = None
        module.train()
    with torch.no_grad():
        for x, _ in split.take(images).batches(250):
            if len(x) > 1 or seen == 0:
                _measured(network, x.to(device))
                seen += len(x)
    for name, module in modules.items():
        module.momentum = momenta[name]
        module.eval()
    return seen


def _measured(network: nn.Module, x: Tensor) -> None:
    """Run a network in training mode; raises `DataError` where one image is too few for that."""
    try:
        network(x)
    except ValueError as error:
        if len(x) > 1:
            raise
        raise DataError(f"proxy: of one image there are no BatchNorm statistics ({error}); give 3 images or more") from None


def _runs(network: nn.Module, data: Data) -> bool:
    """Say whether a network takes the images of a data set."""
    device = next(network.parameters()).device
    try:
        with torch.no_grad():
            network(data.example(2).to(device))
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return False
    return True


class _Resized(Split):
    """A split whose images are resized, bilinearly."""

    def __init__(self, split: Split, size: tuple[int, ...]):
        self.split, self.size, self.classes = split, size, split.classes

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        x, y = self.split.batch(index, generator)
        return F.interpolate(x, self.size, mode="bilinear", antialias=True), y

    def subset(self, index: Tensor) -> Split:
        return _Resized(self.split.subset(index), self.size)


def default_images(data: Data) -> int:
    """Return the number of images that a proxy has by default.

    >>> from bitwright.data import load_data
    >>> default_images(load_data("digits", held_out=100, seed=0))
    53
    """
    return max(2, math.floor(SHARE * (len(data.fit) + len(data.selection))))
