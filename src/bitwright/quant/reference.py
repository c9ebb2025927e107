"""The loss of a policy: what one fixed post-training quantizer makes of it, without any training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitwright.errors import PolicyError, nearest
from bitwright.policy import Policy
from bitwright.quant.batchnorm import collect, correct_batchnorm
from bitwright.quant.bench import Bench
from bitwright.quant.functional import UNTOUCHED

if TYPE_CHECKING:
    from bitwright.data import Split
    from bitwright.sites import Site

IMAGES = 512
"""Images of the selection split that the loss looks at."""
CHUNK = 64
"""Images that pass through a network at once: few enough for what a layer gives to stay in a core's cache."""
CALIBRATION = 256
"""Images of the fit split that calibrate the quantizers."""


def divergence(reference: Tensor, quantized: Tensor) -> Tensor:
    r"""Return how far a network's outputs moved: mean :math:`KL(p_f \| p_q)` for logits, else relative squared error.

    Args:
        reference: outputs of the float network; ``[N, classes]`` are taken for logits.
        quantized: outputs of the quantized network, of the same shape.

    >>> divergence(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
    tensor(0.1201)
    """
    if reference.dim() == 2 and reference.shape[1] > 1:
        p, q = reference.log_softmax(1), quantized.log_softmax(1)
        return (p.exp() * (p - q)).sum(1).mean()
    return (quantized - reference).square().sum() / reference.square().sum().clamp_min(1e-12)


class ReferenceLoss:
    """Mean divergence of the quantized from the float network on the selection split.

    The policy is applied to the float weights with LSQ grids, least-squares step sizes per channel and BatchNorm
    correction (`bitwright.quant.batchnorm`), calibrated on fit images. No label is used.

    Args:
        model: float network.
        selection: split the loss is taken on.
        calibration: split of other images for step sizes and BatchNorm.
        sites: the trace's sites.
        seed: chooses which images of the two splits.
        count: images of the selection split that the loss looks at.
        spend: told how many images each evaluation passes through a network.
        calibrated: pairs of a site and an activation width that an earlier session has calibrated: not told again; added to.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Split,
        calibration: Split,
        sites: Sequence[Site],
        seed: int = 0,
        *,
        count: int = IMAGES,
        spend: Callable[[int], None] = lambda images: None,
        calibrated: set[tuple[str, int]] | None = None,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.model = copy.deepcopy(model).eval()
        self.sites, self.spend = sites, spend
        self.calibrated = set() if calibrated is None else calibrated
        self.images = selection.batch(torch.randperm(len(selection), generator=generator)[:count], None)[0]
        self.calibration = calibration.batch(torch.randperm(len(calibration), generator=generator)[:CALIBRATION], None)[0]
        self.outputs = self._outputs(self.model)
        self.statistics = collect(self.model, self.calibration)

    def _outputs(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(chunk) for chunk in torch.split(self.images, CHUNK)])

    @cached_property
    def _bench(self) -> Bench:
        return Bench(self.model, self.sites, self.calibration)

    def __call__(self, policy: Policy) -> float:
        """Return the divergence that a policy causes; raises `PolicyError` unless it has every site, and no other."""
        names = [site.name for site in self.sites]
        for name in [*names, *policy]:
            if name not in policy or name not in names:
                what = f"site '{name}' has no entry; add it" if name in names else f"the model has no site '{name}'; {nearest(name, names)}"
                raise PolicyError(f"policy: {what}")
        network = self._bench.network
        kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
        with torch.no_grad(), self._bench.at(policy):
            correct_batchnorm(network, self.model, self.calibration, self.statistics)
            outputs = self._outputs(network)
            for name, buffer in network.named_buffers():
                if name in kept:
                    buffer.copy_(kept[name])
        new = {(name, bits.a) for name, bits in policy.items() if bits.a < UNTOUCHED} - self.calibrated
        self.calibrated |= new
        self.spend(len(self.images) + len(self.calibration) * (2 if new else 1))
        return float(divergence(self.outputs, outputs))
