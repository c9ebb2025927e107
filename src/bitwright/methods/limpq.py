r"""LIMPQ: learned step sizes tell how much each layer minds each width (Tang et al., ECCV 2022); then exact allocation.

One network is trained at all widths together, with one learned step size (LSQ) per layer and width. The step size that a layer ends up
with at a width is taken for its importance there: a layer that loses much by coarse levels learns to spread them further. A step of the
training passes a batch once at every width uniformly ("atomic"), once more at a random mixed policy, and updates once. Then, with
:math:`s_w, s_a` the learned step sizes of weights and input activations,

.. math:: \min_b \sum_l s_a^{(l)}(b) + \alpha\, s_w^{(l)}(b) \quad \text{within the budgets.}

Schedules are those of the authors' public code: 5 epochs there, SGD at 0.01 along a cosine, decay 2.5e-5, label smoothing 0.1, gradients
clipped at 1, :math:`\alpha = 2`.

Differs: step sizes of weights are per output channel, as everywhere here, and a layer counts with their mean; they start at least squared
error, not at the extremes of the distribution; BatchNorm is shared by all widths; where a narrower width learned the *smaller* step, the
authors forbid it (cost 1e8), while here it counts as much as the next wider one, so that no budget becomes unreachable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from bitwright.driver import Proposal, Trial
from bitwright.errors import RecipeError, SiteError, TrainingError
from bitwright.policy import Bits
from bitwright.problem import Problem
from bitwright.quant.convert import calibration_images
from bitwright.quant.functional import UNTOUCHED
from bitwright.quant.gates import Gate, GatedActivation, GatedWeight, LayerGates, switchable
from bitwright.quant.modules import QuantLayer, named_quant_layers
from bitwright.sensitivity import ScoredMethod, Scores, solve
from bitwright.training.finetune import (
    FinetuneOptions,
    build_loss,
    build_optimizer,
    draw_batch,
    first_bad_layer,
    learning_rate,
    set_memory_order,
    steps_in,
)

CLIP = 1.0
"""Gradients are clipped to this magnitude, one by one."""


@dataclass
class State(Scores):
    """The scores, and until they are known the training: its step, the network's tensors and its optimizer's."""

    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.engine: _Engine | None = None


@dataclass(frozen=True)
class LIMPQ(ScoredMethod):
    """Train one step size per layer and width, take them for importance, and allocate exactly.

    Attributes:
        epochs: passes over the fit split; the authors take 5 on ImageNet.
        max_steps: stop after so many steps, where given.
        batch_size: images a step; each passes once per width, and once more.
        alpha: what a weight's step size counts beside an activation's.
        lr: learning rate, along a cosine.
        momentum: of SGD.
        weight_decay: of the weights.
        label_smoothing: of the cross-entropy.
        precision: ``float32`` or ``bfloat16``.
        compile: compile the step; it is compiled once, whatever the widths.
        channels_last: memory order of images and weights.
    """

    joint: ClassVar[bool] = True

    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 128
    alpha: float = 2.0
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 2.5e-5
    label_smoothing: float = 0.1
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.max_steps < 1:
            raise RecipeError(f"limpq: max_steps={self.max_steps}; give at least 1, or leave it out")
        if min(self.epochs, self.lr, self.batch_size) <= 0 or self.alpha < 0:
            raise RecipeError("limpq: epochs, lr and batch_size must be above 0, and alpha not below")

    def start(self, problem: Problem) -> State:
        """Return the state before the first step."""
        return State()

    def step(self, problem: Problem, state: Scores, told: Trial | None) -> tuple[Scores, Proposal | None]:
        """Train the step sizes on one batch; after the last one, allocate."""
        assert isinstance(state, State)
        if self.table is not None or _settled(problem):
            return super().step(problem, state, told)
        engine = self._train(problem, state)
        if state.step < self.steps(problem):
            return state, None
        state.scores = engine.importance()
        state.weights, state.optimizer, state.engine = {}, {}, None  # nothing needs them any more
        return state, Proposal(solve(problem, state.scores))

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return the weighted sum of learned step sizes of every choice; pinned sites get zeros.

        Raises:
            SiteError: a free site is a functional call, for which there is no learned step size.
            TrainingError: the loss is not finite.
        """
        if _settled(problem):
            return {name: torch.zeros(1, dtype=torch.float64) for name in problem.choices}
        state = State()
        with torch.random.fork_rng(devices=[]):
            engine = self._train(problem, state)
            while state.step < self.steps(problem):
                self._train(problem, state)
        return engine.importance()

    def _train(self, problem: Problem, state: State) -> _Engine:
        """Take one step of the training, on the live network of the state."""
        before = problem.sample_passes
        engine = state.engine or _Engine(self, problem)
        if state.engine is None:
            engine.attach(state)
        engine.train(state.step)
        state.step += 1
        state.optimizer = engine.optimizer.state_dict()
        state.sample_passes += problem.sample_passes - before
        return engine

    def steps(self, problem: Problem) -> int:
        """Return the number of steps of the training."""
        total = max(1, round(self.epochs * max(1, len(problem.data.fit) // self.batch_size)))
        return total if self.max_steps is None else min(total, self.max_steps)

    def training(self) -> FinetuneOptions:
        """Return the options of the training."""
        return FinetuneOptions(
            epochs=math.ceil(self.epochs),
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            low_bit_decay=False,
            label_smoothing=self.label_smoothing,
            precision=self.precision,
            compile=self.compile,
            channels_last=self.channels_last,
        )

    def quantizer(self) -> dict[str, Any]:
        """Return what the scores assume of the quantizer: learned step sizes, one per output channel and width."""
        return {"quantizer": "lsq", "per_channel": True, "learned": True}


class _Engine:
    """The live network; it holds no state of its own: its tensors are those of the `State` that it is attached to."""

    def __init__(self, method: LIMPQ, problem: Problem):
        self.method, self.problem = method, problem
        self.device = next(problem.model.parameters()).device
        images = calibration_images(problem.data.fit)
        assert images is not None
        self.calibrated_on = len(images)
        self.gates = {site.name: self._gates(site.name) for site in problem.sites}
        by_layer = {layer: self.gates[site.name] for site in problem.sites for layer in site.layers}
        self.network = switchable(problem.model, by_layer, images.to(self.device))
        set_memory_order(self.network.train(), channels_last=method.channels_last)
        self.options = method.training()
        self.optimizer = build_optimizer(self.network, self.options)
        self.loss_of = build_loss(self.network, None, self.options)
        self.widths = sorted(
            {w for allowed in problem.choices.values() if len(allowed) > 1 for bits in allowed for w in bits if w < UNTOUCHED}
        )

    def _gates(self, name: str) -> LayerGates:
        allowed = self.problem.choices[name]
        call = next((layer for layer in self.problem.trace[name].layers if "#" in layer), None)
        if call is not None:
            ask = "leave it out with search.skip, or take kl or fisher"
            raise SiteError(f"limpq: site '{name}' is the functional call '{call}', which learns no step size of its own; {ask}")
        widths = [sorted({getattr(bits, kind) for bits in allowed}) for kind in ("w", "a")]
        return LayerGates(*(options[0] if len(options) == 1 else self._gate(options[-1]) for options in widths))

    def _gate(self, width: int) -> Gate:
        gate = Gate.at([width], [1.0])
        return Gate(gate.widths.to(self.device), nn.Parameter(gate.weights.data.to(self.device), requires_grad=False))

    def attach(self, state: State) -> None:
        """Make the tensors of the network those of a state; a state that has none takes the network's, whose calibration is then spent."""
        if state.weights:
            self.network.load_state_dict(state.weights)
            self.optimizer.load_state_dict(state.optimizer)
        else:
            self.problem.spend(self.calibrated_on)
        state.weights, state.optimizer = dict(self.network.state_dict()), self.optimizer.state_dict()
        state.engine = self

    def _put(self, index: dict[str, int]) -> None:
        """Put every site at one of its choices, in place."""
        for name, j in index.items():
            gates, bits = self.gates[name], self.problem.choices[name][j]
            for gate, width in ((gates.weights, bits.w), (gates.inputs, bits.a)):
                if isinstance(gate, Gate):
                    gate.widths.fill_(width)

    def train(self, step: int) -> None:
        """Add up the gradients of a batch at every width and at a random policy, and take one step."""
        method, data = self.method, self.problem.data.fit
        epoch_steps, _ = steps_in(data, self.options)
        x, y = draw_batch(data, step, epoch_steps, method.batch_size, self.problem.seed)  # seeds torch's global generator, too
        if method.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        choices = self.problem.choices
        policies = [{name: _near(allowed, width) for name, allowed in choices.items()} for width in self.widths]
        policies.append({name: int(torch.randint(len(allowed), ())) for name, allowed in choices.items()})
        for index in policies:
            self._put(index)
            self._backward(step, x.to(self.device), y.to(self.device))
        nn.utils.clip_grad_value_(self.network.parameters(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.options, step, method.steps(self.problem), epoch_steps) * group["lr_factor"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, step: int, x: Tensor, y: Tensor) -> None:
        loss = self.loss_of(x, y, torch.zeros((), device=self.device))
        if not math.isfinite(float(loss.detach())):
            seen = f"the loss is {float(loss.detach())} at step {step}, first seen in {first_bad_layer(self.network, x)}"
            raise TrainingError(f"limpq: {seen}; lower lr (now {self.method.lr}) or check the data")
        self.problem.spend(len(x), backward=True)
        loss.backward()  # type: ignore[no-untyped-call]

    def importance(self) -> dict[str, Tensor]:
        """Return the summed indicators of every choice, float64 ``[choices]`` per site."""
        layers = dict(named_quant_layers(self.network))
        scores = {}
        for site in self.problem.sites:
            score = torch.zeros(len(self.problem.choices[site.name]), dtype=torch.float64)
            free = site.name not in self.problem.pins
            for layer in (layers[address] for address in site.layers) if free else ():
                score += self._of_layer(layer, self.problem.choices[site.name])
            scores[site.name] = score
        return scores

    def _of_layer(self, layer: QuantLayer, allowed: tuple[Bits, ...]) -> Tensor:
        weights, inputs = cast("GatedWeight | None", layer.weight_quantizer), cast("GatedActivation | None", layer.input_quantizer)
        by_weight = _indicators(None if weights is None else weights.scale, [bits.w for bits in allowed])
        by_input = _indicators(None if inputs is None else inputs.scale, [bits.a for bits in allowed])
        return self.method.alpha * by_weight + by_input


def _settled(problem: Problem) -> bool:
    """Say whether every site is pinned, so that nothing is left to decide."""
    return len(problem.pins) == len(problem.sites)


def _near(allowed: tuple[Bits, ...], width: int) -> int:
    """Return the choice nearest to one width of weights and activations, by the ratio of widths."""
    distances = [abs(math.log2(bits.w / width)) + abs(math.log2(bits.a / width)) for bits in allowed]
    return distances.index(min(distances))


def _indicators(scale: Tensor | None, widths: list[int]) -> Tensor:
    """Return the step size of each width, never below that of a wider one; a width that is not rounded has none.

    Args:
        scale: learned step sizes, ``[width - 1]`` or ``[width - 1, channel]``.
        widths: one for each choice.
    """
    found = torch.zeros(len(widths), dtype=torch.float64)
    if scale is None or len(set(widths)) == 1:
        return found
    steps = scale.detach().double().abs().cpu()
    steps = steps if steps.dim() == 1 else steps.mean(1)
    largest = 0.0
    for width in sorted({width for width in widths if width < UNTOUCHED}, reverse=True):
        largest = max(largest, float(steps[width - 1]))
        found[[k for k, other in enumerate(widths) if other == width]] = largest
    return found
