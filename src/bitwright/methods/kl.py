r"""KL: measure what each choice of each site does to the outputs, one site at a time and without labels; then allocate exactly.

The score of choice b at site i is the loss of the policy that quantizes site i alone (`bitwright.quant.reference`):

.. math:: s_i(b) = \frac1N \sum_n KL\big(p(x_n) \,\|\, p_{i \leftarrow b}(x_n)\big),

with p the float network's answers on N images of the selection split. It is the direct measurement behind sensitivity lists such
as ZeroQ's (Cai et al., 2020), which takes this divergence on synthetic images. What each choice does by itself is exact here; what
remains assumed is that the losses of several sites add up, as every allocation does.

A pass begins at the site that is changed: what the layers before it gave is kept (`bitwright.quant.bench.Replay`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bitwright.errors import RecipeError, TrainingError, nearest
from bitwright.policy import Bits
from bitwright.problem import Problem
from bitwright.quant.batchnorm import batch_statistics, correct_batchnorm
from bitwright.quant.bench import FLOAT, Bench, Replay
from bitwright.quant.functional import UNTOUCHED
from bitwright.quant.reference import CHUNK, ReferenceLoss, divergence
from bitwright.sensitivity import ScoredMethod
from bitwright.sites import Site

Pairs = Literal["measured", "added"]


@dataclass(frozen=True)
class KL(ScoredMethod):
    """Measure the divergence that each choice of each site causes by itself, and allocate exactly.

    Attributes:
        images: selection images that the divergence is taken on.
        batchnorm: correct the BatchNorm statistics for each choice, as the loss of a policy does; without it a choice takes less time, and
            the scores foretell whole policies worse.
        pairs: ``measured`` takes every pair of a weight and an activation width; ``added`` takes each width once, the other operand
            in float, and adds the two: for 8 by 8 widths a quarter of the passes.
    """

    images: int = 512
    batchnorm: bool = True
    pairs: Pairs = "measured"

    def __post_init__(self) -> None:
        if self.images < 1:
            raise RecipeError(f"kl: images={self.images}; give at least 1")
        if self.pairs not in get_args(Pairs):
            raise RecipeError(f"kl: pairs='{self.pairs}' is unknown; {nearest(self.pairs, get_args(Pairs))}")

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return the divergence that every choice causes by itself.

        Raises:
            TrainingError: a divergence is not finite.
        """
        measure = _Measure(problem, self)
        scores = {}
        for site in problem.sites:
            column = [measure(site, bits) for bits in problem.choices[site.name]]
            for value, bits in zip(column, problem.choices[site.name], strict=True):
                if not math.isfinite(value):
                    raise TrainingError(
                        f"kl: site '{site.name}' at {bits!r} gives outputs that are not finite; look for overflow in the network"
                    )
            scores[site.name] = torch.tensor(column, dtype=torch.float64)
        return scores


class _Measure:
    """The loss with one site changed: the bench, what its layers gave in float, and the float network's answers."""

    def __init__(self, problem: Problem, options: KL):
        self.problem, self.options = problem, options
        data = problem.data
        self.reference = ReferenceLoss(problem.model, data.selection, data.fit, problem.sites, problem.seed, count=options.images)
        offered = {bits for allowed in problem.choices.values() for bits in allowed}
        images = self.reference.calibration
        self.bench = Bench(problem.model, problem.sites, images, weights={b.w for b in offered}, inputs={b.a for b in offered})
        self.replay = Replay(self.bench)
        self.corrects = options.batchnorm and bool(self.reference.statistics)
        self.statistics = {name: tensor.clone() for name, tensor in self.bench.network.named_buffers()}
        self.chunks = torch.split(self.reference.images, CHUNK)
        self.seen = len(self.reference.images) + len(images) * self.corrects
        self.tapes = [self._record(chunk) for chunk in self.chunks]
        with batch_statistics(self.bench.network):
            self.settling = self._record(images) if self.corrects else []
        self.known: dict[tuple[str, Bits], float] = {}
        problem.spend(self.bench.passes + 2 * self.seen)  # the float network's answers, and the tapes

    def _record(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad(), self.replay.recording() as tape:
            self.bench.network(images)
        return tape

    def __call__(self, site: Site, bits: Bits) -> float:
        """Return the divergence that one choice of one site causes."""
        single = site.operands == 2 or bits.w >= FLOAT.w or bits.a >= UNTOUCHED
        if self.options.pairs == "added" and not single:
            return self(site, Bits(bits.w, FLOAT.a)) + self(site, Bits(FLOAT.w, bits.a))
        key = (site.name, bits)
        if key not in self.known:
            self.known[key] = self._measured(site, bits)
        return self.known[key]

    def _measured(self, site: Site, bits: Bits) -> float:
        start = self.replay.first_call(place.module for place in self.bench.places.values() if place.site is site)
        self.problem.spend(round(self.seen * self._share(site) if start else self.seen))
        with torch.no_grad(), self.bench.at({site.name: bits}):
            if self.corrects:
                with self.replay.playing(self.settling, start):
                    correct_batchnorm(self.bench.network, self.reference.model, self.reference.calibration, self.reference.statistics)
            outputs = []
            for chunk, tape in zip(self.chunks, self.tapes, strict=True):
                with self.replay.playing(tape, start):
                    outputs.append(self.bench.network(chunk))
            for name, buffer in self.bench.network.named_buffers():
                if self.corrects and name in self.statistics:
                    buffer.copy_(self.statistics[name])
        return float(divergence(self.reference.outputs, torch.cat(outputs)))

    def _share(self, site: Site) -> float:
        """Return the share of a pass's arithmetic that is done from a site on."""
        macs = [other.macs for other in self.problem.sites]
        return sum(macs[self.problem.sites.index(site) :]) / max(1, sum(macs))
