r"""SEAM: a transferable policy, searched on a proxy dataset by keeping class margins (Tang et al., ACM MM 2023).

*Published.* Noise from badly chosen widths shrinks class margins; a policy that keeps classes compact and apart on a small
proxy dataset is therefore good on the target dataset too. The proxy has 4 % of the target's images or fewer.

*Reconstructed* (no code and no equations are public). The super-network is EdMIPS's: one convolution on gate-weighted quantized
weights and activations per layer, gates and weights learned in the same steps. Its loss is cross-entropy plus
:math:`\mu L_M`, where :math:`L_M` is intra-class compactness over inter-class separation of the features before the classifier
(`bitwright.training.losses.margin_ratio`); it has no scale, and μ is 1. The budget is that of the target network at the
target's image size. Gates are drawn one-hot by the Gumbel-softmax, straight through: a softmax mixture of several low widths is more
precise than any of them and would flatter them. The final policy is the exact allocation over what every width was seen to add
to that loss, which meets the budget exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.errors import RecipeError
from bitwright.margins import class_margins, features_of
from bitwright.methods._softmax import SoftmaxMethod, SoftmaxState, empty
from bitwright.problem import Problem
from bitwright.relaxation import Decisions, losses_of_gains
from bitwright.supernet import Supernet
from bitwright.training.finetune import FinetuneOptions, Loss
from bitwright.training.losses import margin_ratio

CENTRE_RATE = 0.5
"""How fast class centres follow the features of a batch (Wen et al., 2016, eq. 4)."""
CENTRE_IMAGES = 2000
"""Fit images that the centres are taken from before the first step."""


@dataclass
class State(SoftmaxState):
    """``centres``: of the classes, ``[class, feature]``; ``gains``, ``draws``: sum and number of the gains between neighbouring
    widths, ``[row, candidate, lower or upper drawn]``; ``margin``: mean class margin of the last batch.
    """

    centres: Tensor = field(default_factory=empty)
    gains: Tensor = field(default_factory=empty)
    draws: Tensor = field(default_factory=empty)
    margin: float = float("nan")


@dataclass(frozen=True)
class SEAM(SoftmaxMethod[State]):
    """Options of SEAM; the others are those of `SoftmaxMethod` and, for the weights' training, `SupernetMethod`.

    Differs: the gates choose which widths are drawn, and so measured; by default (``final="allocate"``) the measured gains alone
    decide. ``final="argmax"`` reads the gates, as the paper's family does.

    Attributes:
        margin: weight μ of the large-margin regularizer; 0 leaves it out (the control).
        gate: ``drawn`` takes one-hot Gumbel-softmax draws, ``mixed`` the softmax itself (EdMIPS's composite).
    """

    margin: float = 1.0
    gate: Literal["drawn", "mixed"] = "drawn"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_known({"gate": ("drawn", "mixed")})
        if self.margin < 0:
            raise RecipeError(f"seam: margin={self.margin} is below 0; 1 is the default, 0 leaves the regularizer out")

    def start(self, problem: Problem) -> State:
        """Return all widths of a row equally probable, and the classes' centres in the float network's features."""
        head = classifier(problem)
        state = self.prepared(problem, State())
        assert state.net is not None
        state.centres = class_centres(problem, head)
        shape = (*state.alpha.shape, 2)
        state.gains, state.draws = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        return state

    def net(self, problem: Problem) -> Supernet:
        """Return the super-network, its loss with the margin term."""
        return Supernet(self, problem, Decisions(problem, self.granularity), loss=self._loss(classifier(problem)))

    def _loss(self, head: str) -> Callable[[nn.Module, FinetuneOptions], Loss]:
        def build(network: nn.Module, options: FinetuneOptions) -> Loss:
            return MarginLoss(network, head, self.margin, options)

        return build

    def gates(self, state: State, probabilities: Tensor) -> Tensor:
        """Return a one-hot draw of every row, its gradient that of the Gumbel-softmax at temperature 1; or the mixture."""
        loss = _loss_of(state)
        loss.centres = state.centres  # the state's own tensor: a step moves it in place
        if self.gate == "mixed":
            return probabilities
        noise = gumbel(probabilities)
        soft = ((probabilities.clamp_min(1e-12)).log() + noise).masked_fill(probabilities == 0, float("-inf")).softmax(1)
        hard = F.one_hot(soft.argmax(1), soft.shape[1]).to(soft)
        return hard + (soft - soft.detach())

    def observe(self, net: Supernet, state: State, gates: Tensor, gradients: Tensor) -> None:
        r"""Note what each width gains over the next lower one: :math:`\langle\partial L/\partial w^q, Q_{low}-Q_{up}\rangle`.

        For a quadratic loss the mean of the gain seen at the upper and at the lower width is the exact difference.
        """
        gain = gradients[:, :-1] - gradients[:, 1:]
        for side, share in ((0, gates[:, :-1]), (1, gates[:, 1:])):
            state.gains[:, 1:, side] += share * gain
            state.draws[:, 1:, side] += share
        state.margin = _loss_of(state).settle()

    def note(self, state: State) -> dict[str, float]:
        """Return also the mean class margin of the last batch, which the regularizer is to keep."""
        return {**super().note(state), "margin": state.margin}

    def values(self, net: Supernet, state: State, probabilities: Tensor) -> Tensor:
        """Return what every width was seen to add to the loss, against the widest."""
        return losses_of_gains(state.gains, state.draws, net.errors(), net.decisions)


def _loss_of(state: State) -> MarginLoss:
    assert state.net is not None
    loss = state.net.loss_of
    assert isinstance(loss, MarginLoss)
    return loss


class MarginLoss:
    """Cross-entropy plus the large-margin regularizer of one batch.

    Args:
        network: its module at ``head`` is the classifier.
        head: path of the classifier.
        weight: of the regularizer.
        options: precision, and whether the step is compiled.
    """

    def __init__(self, network: nn.Module, head: str, weight: float, options: FinetuneOptions):
        self.network, self.weight = network, weight
        self.classifier = network.get_submodule(head)
        self.half, self.kind = options.precision == "bfloat16", next(network.parameters()).device.type
        self.centres = torch.zeros(0)
        self.seen: list[Tensor] = []
        self.batch: tuple[Tensor, Tensor] | None = None
        self.classifier.register_forward_pre_hook(lambda _, args: self.seen.append(args[0]))
        self.terms = torch.compile(self._terms, dynamic=False) if options.compile else self._terms

    def __call__(self, x: Tensor, y: Tensor, _: Tensor) -> Tensor:
        """Return the loss of a batch, and keep its features for `settle`."""
        loss, features = self.terms(x, y, self.centres.to(x.device))
        self.batch = (features.detach(), y)
        return loss

    def _terms(self, x: Tensor, y: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.clear()
        with torch.autocast(self.kind, torch.bfloat16, enabled=self.half):
            logits = self.network(x).float()
        features = self.seen[0].float()
        self.seen.clear()
        return F.cross_entropy(logits, y) + self.weight * margin_ratio(features, y, centres), features

    def settle(self) -> float:
        """Let the centres follow the last batch, in place, and return its mean class margin."""
        assert self.batch is not None
        features, labels = (tensor.cpu() for tensor in self.batch)
        counts = torch.bincount(labels, minlength=len(self.centres)).float()
        sums = torch.zeros_like(self.centres).index_add(0, labels, features)
        self.centres += CENTRE_RATE * (sums - counts[:, None] * self.centres) / (1 + counts[:, None])
        weight, bias = self.classifier.get_parameter("weight"), self.classifier.bias
        with torch.no_grad():
            margins = class_margins(features, labels, weight.cpu(), bias.cpu() if isinstance(bias, Tensor) else None)
        return float(margins.mean())


def gumbel(like: Tensor) -> Tensor:
    """Draw standard Gumbel noise by torch's global generator."""
    uniform = torch.rand(like.shape, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return -(-uniform.log()).log()


def classifier(problem: Problem) -> str:
    """Return the path of the linear layer that the margins are taken at: the network's last site.

    Raises:
        RecipeError: the last site is none.
    """
    last = problem.trace.last
    site = problem.trace[last]
    if site.kind != "linear" or len(site.layers) != 1 or "#" in site.layers[0]:
        raise RecipeError(f"seam: the last site, '{last}', is a {site.kind}; margins need a linear classifier there: use sdq instead")
    return site.layers[0]


def class_centres(problem: Problem, head: str) -> Tensor:
    """Return the mean feature of every class over some fit images in the float network, ``[class, feature]``; zeros for a class unseen."""
    data = problem.data.fit.take(CENTRE_IMAGES)
    features, labels = features_of(problem.model, head, data)
    problem.spend(len(features))
    counts = torch.bincount(labels, minlength=data.classes).float()
    return torch.zeros(data.classes, features.shape[1]).index_add(0, labels, features) / counts.clamp_min(1)[:, None]
