r"""EdMIPS: a softmax over all widths of every layer, learned with the weights (Cai and Vasconcelos, CVPR 2020).

*Published.* Every layer computes one convolution of a composite weight :math:`\sum_k \pi^w_k Q_{b_k}(w)` with a composite
activation :math:`\sum_k \pi^a_k Q_{b_k}(x)`, where :math:`\pi = \mathrm{softmax}(\alpha)`. Weights and α are trained in the same
steps on the loss plus a penalty on the expected bit operations; the policy is the argmax of every α.

Differs: the paper weighs the penalty by a constant chosen by hand for each network. Here its weight follows a planned descent of
the expected cost to the budget (`bitwright.supernet.tighten`), any cost can be a budget, α is moved by Adam (so that a short
search need not guess the scale of the loss), and by default the policy is the most probable one within the budget, widened by
what it leaves of the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.methods._softmax import SoftmaxMethod, SoftmaxState
from bitwright.policy import Policy
from bitwright.problem import Problem
from bitwright.supernet import Supernet

WIDER = 1e-6
"""What the next wider candidate is worth where a row's logits do not tell, in units of -log p."""


@dataclass(frozen=True)
class EdMIPS(SoftmaxMethod[SoftmaxState]):
    """Options of EdMIPS: those of `SoftmaxMethod` and of the weights' training, `SupernetMethod`."""

    def start(self, problem: Problem) -> SoftmaxState:
        """Return all widths of a row equally probable, and the network as it is."""
        return self.prepared(problem, SoftmaxState())

    def gates(self, state: SoftmaxState, probabilities: Tensor) -> Tensor:
        """Return the composite: every width by its probability."""
        return probabilities

    def values(self, net: Supernet, state: SoftmaxState, probabilities: Tensor) -> Tensor:
        """Return minus the logarithm of every probability: the least sum is the most probable policy."""
        return -probabilities.clamp_min(1e-12).log()

    def allocated(self, net: Supernet, state: SoftmaxState, probabilities: Tensor) -> Policy | None:
        """Return the most probable policy within the budgets, and spend what it leaves of them on wider candidates.

        The most probable policy stays below a budget where rows are sure of low widths. What is left goes, exactly, to the widenings
        whose rows hold the most probability above them: the sum of -log P(width of a row <= chosen) becomes least.
        """
        decisions = net.decisions
        found = decisions.allocate(self.values(net, state, probabilities), probabilities >= 0)
        if found is None:
            return None
        enough = probabilities.cumsum(1).clamp(1e-12, 1.0).log()
        enough += WIDER * torch.arange(decisions.widest)  # where a row is sure already, wider is still better
        return decisions.allocate(-enough, torch.arange(decisions.widest)[None] >= torch.tensor(decisions.index(found))[:, None])
