r"""From an actor's scores to a decision that gradients can pass: the two relaxations, and what a decision is expected to cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitwright.adaptive.execution import Decision

TINY = 1e-12


@dataclass(frozen=True)
class Draw:
    """The randomness and temperatures of one training step.

    Attributes:
        gumbel: standard Gumbel noise ``[S, N, K]``.
        normal: standard normal noise ``[S, N]``.
        uniform: in (0, 1), ``[S, N]``; chooses the neighbour.
        temperature: of the relaxation, 0-dimensional.
        noise: factor on the noise, 0-dimensional: 1 draws from the actor's distribution, 0 takes its mode as a deployed network does.
        heed: factor on what the actor says, 0-dimensional: 0 draws evenly from all choices. It is data, so that a compiled step that
            warms up is the step that comes after.
    """

    gumbel: Tensor
    normal: Tensor
    uniform: Tensor
    temperature: Tensor
    noise: Tensor
    heed: Tensor

    @classmethod
    def of(cls, shape: tuple[int, int, int], generator: torch.Generator, temperature: float, noise: float, heed: float = 1.0) -> Draw:
        """Draw for sites, samples and choices ``(S, N, K)``."""
        exponential = torch.rand(shape, generator=generator).clamp(TINY, 1 - 1e-7).log().neg()
        normal = torch.randn(shape[:2], generator=generator)
        uniform = torch.rand(shape[:2], generator=generator).clamp(1e-6, 1 - 1e-6)
        return cls(exponential.log().neg(), normal, uniform, torch.tensor(temperature), torch.tensor(noise), torch.tensor(heed))

    def to(self, device: torch.device) -> Draw:
        """Return the draw on a device."""
        parts = (self.gumbel, self.normal, self.uniform, self.temperature, self.noise, self.heed)
        return Draw(*(value.to(device) for value in parts))


@dataclass(frozen=True)
class Chosen:
    """A decision with what the objective needs of it.

    Attributes:
        decision: what runs.
        cost: cost of the choice, with the gradient of the relaxation, ``[N]``.
        size: mean square of the scores about their mean, ``[N]``: how far the actor is from reconsidering; zero for ``gaussian``.
        logp: log-probability of the choice under the actor's distribution, ``[N]``; None where it is not asked for.
    """

    decision: Decision
    cost: Tensor
    size: Tensor
    logp: Tensor | None = None


def concrete(scores: Tensor, costs: Tensor, gumbel: Tensor, uniform: Tensor, draw: Draw, *, pathwise: bool = True) -> Chosen:
    r"""Draw a choice by Gumbel-max and pass gradients through the softmax at a temperature (Jang et al., 2017; Maddison et al., 2017).

    With :math:`z = \ell + \nu g` and :math:`p = \mathrm{softmax}(z/\tau)` the forward takes :math:`k = \arg\max z`. The
    straight-through gradient of the task is :math:`\sum_m \langle g_y, y_m - y_k\rangle\,\partial p_m`, a sum over all widths. One
    neighbour j is drawn with :math:`q_j = p_j/(1-p_k)` and its term divided by :math:`q_j`: the mean over draws is the whole sum.

    Differs: the reparametrised draw of the paper computes every branch; here one neighbour stands for all others, without bias.

    Args:
        scores: :math:`\ell`, ``[N, K]``.
        costs: of each choice, ``[K]``.
        gumbel: ``[N, K]``.
        uniform: ``[N]``.
        draw: temperatures.
        pathwise: whether a neighbour is wanted.
    """
    noisy = draw.heed * scores + draw.noise * gumbel
    index = noisy.argmax(1)
    soft = torch.softmax(noisy / draw.temperature, 1)
    hot = F.one_hot(index, scores.shape[1]).to(soft.dtype)
    cost = ((hot + soft - soft.detach()) * costs).sum(1)
    size = (scores - scores.mean(1, keepdim=True)).square().mean(1)
    if not pathwise:
        logp = torch.log_softmax(scores, 1)
        return Chosen(Decision(index), cost, size, (logp * hot).sum(1))
    rest = soft.detach() * (1 - hot) + TINY * (1 - hot)
    others = rest / rest.sum(1, keepdim=True)
    other = (others.cumsum(1) < uniform[:, None]).sum(1).clamp_max(scores.shape[1] - 1)
    weight = (soft / others.clamp_min(TINY)).gather(1, other[:, None])[:, 0]
    return Chosen(Decision(index, other, weight - weight.detach()), cost, size)


def gaussian(
    scores: Tensor, costs: Tensor, normal: Tensor, uniform: Tensor, draw: Draw, *, pathwise: bool = True, interpolate: bool = False
) -> Chosen:
    r"""Draw a place between two adjacent choices: :math:`t = \mathrm{clip}(m + \nu s\epsilon, 0, K-1)`, two numbers a site.

    The nearer of the two runs; the gradient of t is taken against the difference of the two outputs. With ``interpolate`` their outputs
    are mixed by the fraction, as FracBits mixes widths. Reconstruction: "a continuous distribution of few parameters", read literally.

    Args:
        scores: m and the spread before a softplus, ``[N, 2]``.
        costs: of each choice, ``[K]``.
        normal: ``[N]``.
        uniform: ``[N]``, the place where the actor is not heeded.
        draw: temperatures.
        pathwise: whether a neighbour is wanted.
        interpolate: mix outputs instead of taking the nearer one.
    """
    last = len(costs) - 1
    middle, width = last / 2 + scores[:, 0], F.softplus(scores[:, 1])
    even = uniform * (last + 1) - 0.5
    raw = draw.heed * (middle + draw.noise * width * normal) + (1 - draw.heed) * even
    place = raw + (raw.clamp(0, last) - raw).detach()
    low = place.detach().floor().clamp(0, max(0, last - 1)).long()
    share = place - low
    upper = share.detach() > 0.5
    index = low + upper.long()
    other = (low + (~upper).long()).clamp_max(last)
    step = costs[(low + 1).clamp_max(last)] - costs[low]
    exact = costs[low] + share * step
    cost = exact if interpolate else costs[index] + exact - exact.detach()
    if not pathwise:
        spread = (draw.noise * width).clamp_min(1e-3)
        logp = -0.5 * ((raw.detach() - middle) / spread).square() - spread.log()
        return Chosen(Decision(index), cost, torch.zeros_like(cost), logp)
    weight = torch.where(upper, 1 - share, share)
    return Chosen(Decision(index, other, weight if interpolate else weight - weight.detach()), cost, torch.zeros_like(cost))


def settled(scores: Tensor, costs: Tensor, relaxation: str) -> Tensor:
    """Return the choice that a deployed network takes, int64 ``[N]``: the mode, without any draw; of equals the cheapest.

    >>> settled(torch.tensor([[0.1, 0.3, 0.3]]), torch.tensor([1.0, 2.0, 3.0]), "concrete")
    tensor([1])
    """
    if relaxation == "concrete":
        return scores.argmax(1)
    last = len(costs) - 1
    return (last / 2 + scores[:, 0]).clamp(0, last).round().long()
