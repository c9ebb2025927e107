"""The super-network of the differentiable searches: one network whose every decision is a gate over widths, and its training.

SDQ, FracBits, EdMIPS and SEAM differ in how they make gates and in what they learn from the gates' gradients. The network,
its weights' training, its state and its budget's pressure are the same and live here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from bitwright.driver import SearchMethod
from bitwright.errors import RecipeError, TrainingError, nearest
from bitwright.problem import Problem
from bitwright.quant.convert import calibration_images
from bitwright.quant.functional import UNTOUCHED
from bitwright.quant.gates import Gate, GatedActivation, GatedWeight, LayerGates, WeightForm, switchable
from bitwright.quant.modules import QuantLayer, named_quant_layers
from bitwright.relaxation import Decisions
from bitwright.training.finetune import (
    FinetuneOptions,
    Loss,
    build_loss,
    build_optimizer,
    draw_batch,
    first_bad_layer,
    learning_rate,
    set_memory_order,
    steps_in,
)

STEPS = 150
"""Steps that a search takes at least unless it is told how long: what a step sees of a width's gain is mostly noise."""
KNOWN = {"quantizer": ("lsq", "entropy", "dorefa"), "precision": ("float32", "bfloat16")}


@dataclass
class SupernetState:
    """What every differentiable search holds: the step, and the network's tensors and its optimizer's."""

    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    loss: float = math.nan

    def __post_init__(self) -> None:
        self.net: Supernet | None = None


S = TypeVar("S", bound=SupernetState)


@dataclass(frozen=True)
class SupernetMethod(SearchMethod[S]):
    """Options of the weights' training, which every differentiable search shares.

    Attributes:
        epochs: passes over the fit split, however few steps they are; where not given, one pass and at least 150 steps.
        max_steps: stop after so many steps, where given.
        batch_size: images a step.
        quantizer: of weights: ``lsq`` (a learned step size per width), ``entropy`` or ``dorefa``.
        lr: learning rate of the weights, along a cosine.
        momentum: of the weights.
        weight_decay: of the weights.
        precision: ``float32`` or ``bfloat16``.
        compile: compile the step.
        channels_last: memory order of images and weights.
    """

    ranking: ClassVar[Literal["loss", "last"]] = "last"

    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int = 128
    quantizer: WeightForm = "lsq"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        self.check_known(KNOWN)
        if self.max_steps is not None and self.max_steps < 1:
            raise RecipeError(f"{self.name}: max_steps={self.max_steps}; give at least 1, or leave it out")
        if min(1.0 if self.epochs is None else self.epochs, self.lr, self.batch_size) <= 0:
            raise RecipeError(f"{self.name}: epochs, lr and batch_size must be above 0")

    def check_known(self, known: dict[str, tuple[str, ...]]) -> None:
        """Raise `RecipeError` where an option is none of the words it may be."""
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise RecipeError(f"{self.name}: {name}='{getattr(self, name)}' is unknown; {nearest(str(getattr(self, name)), words)}")

    def done(self, problem: Problem, state: S) -> bool:
        """Say whether all steps are taken."""
        return state.step >= self.steps(problem)

    def steps(self, problem: Problem) -> int:
        """Return the number of steps of the whole search."""
        epoch = max(1, len(problem.data.fit) // self.batch_size)
        total = max(STEPS, epoch) if self.epochs is None else max(1, round(self.epochs * epoch))
        return total if self.max_steps is None else min(total, self.max_steps)

    def brevity(self, problem: Problem) -> dict[str, float]:
        """Warn of a search that is too short to see what a width is worth, and return what its last proposal notes of it; else nothing."""
        steps = self.steps(problem)
        if steps >= STEPS:
            return {}
        few = f"{steps} step{'s are' if steps > 1 else ' is'} too few to see what a width is worth"
        warnings.warn(f"{self.name}: {few}; leave out epochs and max_steps, or let them give {STEPS} or more", stacklevel=3)
        return {"short": 1.0}

    def training(self) -> FinetuneOptions:
        """Return the options of the weights' training."""
        return FinetuneOptions(
            epochs=math.ceil(self.epochs or 1),
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            low_bit_decay=False,
            precision=self.precision,
            compile=self.compile,
            channels_last=self.channels_last,
        )


class Supernet:
    """The live network of a search; it holds no state of its own: its tensors are those of the state it is attached to.

    Args:
        method: how the weights are trained.
        problem: the network, its data and costs.
        decisions: the rows; each row with a choice gets one gate.
        slots: widths that a gate mixes at once: 2 for two adjacent ones (first the two widest), 0 for all of its row.
        loss: builds the loss of a batch from the network and the training options.
    """

    def __init__(
        self,
        method: SupernetMethod[Any],
        problem: Problem,
        decisions: Decisions,
        *,
        slots: int = 0,
        loss: Callable[[nn.Module, FinetuneOptions], Loss] = lambda network, options: build_loss(network, None, options),
    ):
        self.method, self.problem, self.decisions = method, problem, decisions
        self.slots = slots or decisions.widest
        self.device = next(problem.model.parameters()).device
        self.row_gates = [self._gate(row.widths) for row in decisions.rows]
        images = calibration_images(problem.data.fit)
        assert images is not None
        self.calibrated_on = len(images)
        gates = {layer: self._layer_gates(name) for name in problem.choices for layer in problem.trace[name].layers}
        self.network = switchable(problem.model, gates, images.to(self.device), form=method.quantizer)
        set_memory_order(self.network.train(), channels_last=method.channels_last)
        self.options = method.training()
        self.optimizer = build_optimizer(self.network, self.options, without=[gate.weights for gate in self.row_gates if gate is not None])
        self.loss_of = loss(self.network, self.options)

    def _gate(self, widths: tuple[int, ...]) -> Gate | None:
        """Return the gate of a row over its widest candidates, or None for a row without a choice."""
        if len(widths) == 1:
            return None
        mixed = widths[::-1][: self.slots]
        gate = Gate.at(mixed, [1.0] + [0.0] * (len(mixed) - 1))
        return Gate(gate.widths.to(self.device), nn.Parameter(gate.weights.data.to(self.device)))

    def _layer_gates(self, site: str) -> LayerGates:
        both = [self.row_gates[r] or self.decisions.rows[r].widths[0] for r in self.decisions.of_site[site]]
        return LayerGates(*both)

    def attach(self, state: SupernetState, *, fresh: bool) -> None:
        """Make the tensors of the network those of a state; a fresh state takes the network's, whose calibration is then spent."""
        if fresh:
            self.problem.spend(self.calibrated_on)
        else:
            self.network.load_state_dict(state.weights)
            self.optimizer.load_state_dict(state.optimizer)
        state.weights = dict(self.network.state_dict())
        state.optimizer = self.optimizer.state_dict()
        state.net = self

    def set_gates(self, weights: Tensor, candidates: Tensor) -> None:
        """Write what every gate mixes, in place.

        Args:
            weights: ``[row, slot]``; slots that a row does not have are left out.
            candidates: which of the row's widths each slot has, int64 ``[row, slot]``.
        """
        for row, gate, share, places in zip(self.decisions.rows, self.row_gates, weights.float(), candidates.tolist(), strict=True):
            if gate is not None:
                count = len(gate.widths)
                gate.widths.copy_(torch.tensor([row.widths[place] for place in places[:count]]))
                gate.weights.data.copy_(share[:count])
                gate.weights.grad = None

    def train(self, step: int) -> float:
        """Take one optimizer step of the weights, leave the gradient in the gates, and return the loss."""
        method, data = self.method, self.problem.data.fit
        epoch_steps, _ = steps_in(data, self.options)
        x, y = draw_batch(data, step, epoch_steps, method.batch_size, self.problem.seed)
        if method.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        rate = learning_rate(self.options, step, method.steps(self.problem), epoch_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        loss = self.loss_of(x.to(self.device), y.to(self.device), torch.zeros((), device=self.device))
        value = float(loss.detach())
        if not math.isfinite(value):
            where = first_bad_layer(self.network, x.to(self.device))
            seen = f"the loss is {value} at step {step}, first seen in {where}"
            raise TrainingError(f"{method.name}: {seen}; lower lr (now {method.lr}) or check the data")
        self.problem.spend(len(x), backward=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def gate_gradients(self) -> Tensor:
        """Return the gradient of the loss in every gate, float64 ``[row, slot]``; slots that a row does not have get zeros."""
        grads = torch.zeros(len(self.row_gates), self.slots, dtype=torch.float64)
        for row, gate in zip(grads, self.row_gates, strict=True):
            if gate is not None and gate.weights.grad is not None:
                row[: len(gate.widths)] = gate.weights.grad.cpu()
        return grads

    def errors(self) -> Tensor:
        """Return the relative quantization error of every candidate, float64 ``[row, candidate]``: of weights as they are now,
        of inputs on the calibration images.
        """
        errors = torch.zeros(len(self.decisions.rows), self.decisions.widest, dtype=torch.float64)
        layers = dict(named_quant_layers(self.network))
        for r in self.decisions.free:
            row = self.decisions.rows[r]
            members = [layers[layer] for site in row.sites for layer in self.problem.trace[site].layers]
            for i, width in enumerate(row.widths):
                errors[r, i] = sum(_relative_error(member, row.kind, width, self.device) for member in members) / len(members)
        return errors


def _relative_error(layer: QuantLayer, kind: str, width: int, device: torch.device) -> float:
    """Return the relative squared error of a width; of inputs, as it was on the calibration images."""
    bits = torch.tensor(width, device=device)
    with torch.no_grad():
        if kind == "w":
            quantizer, value = layer.weight_quantizer, layer.weight
            assert isinstance(quantizer, GatedWeight)
            return float((quantizer.at_width(value, bits) - value).square().sum() / value.square().sum().clamp_min(1e-12))
        inputs = layer.input_quantizer
        assert isinstance(inputs, GatedActivation)
        return 0.0 if width >= UNTOUCHED else float(inputs.error[width - 1])


def tighten(strength: Tensor, costs: Tensor, start: Tensor, progress: float) -> float:
    """Strengthen, in place, the pressure of every budget whose expected cost is behind its planned descent; return how far behind.

    The plan is a straight line in the logarithm of the cost, so that the low widths, which matter, get more steps.

    Args:
        strength: of the pressure, ``[budget]``.
        costs: expected costs over their limits, ``[budget]``.
        start: what they were at the beginning.
        progress: share of the planned descent that has passed; 1 or more asks for the limit itself.

    Returns:
        The largest lag over the budgets, within [-1, 1].

    >>> pressure = torch.ones(1)
    >>> tighten(pressure, torch.tensor([2.0]), torch.tensor([4.0]), 0.5), float(pressure)
    (0.0, 1.0)
    """
    plan = start.clamp_min(1.0) ** (1 - min(1.0, progress))
    behind = ((costs / plan).log() / 0.05).clamp(-1, 1)
    strength *= torch.exp(0.1 * behind.clamp_min(-0.2))
    return float(behind.max())
