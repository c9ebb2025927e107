r"""Joint training of an adaptive network and its actor: the hybrid objective, its controls, and the promise that the budget is kept.

.. math:: \min_{\theta,\phi} \mathrm E_{x,a\sim\pi_\phi}\,[\,\mathrm{CE}(f_\theta(x;a), y) + \lambda\,(C(a) - B)/(C_{max} - C_{min})\,]

The quantized network is the known model of what a decision leads to, so the gradient in :math:`\phi` asks it: by another decision at one
site (counterfactual), or to first order by the gradient through it (pathwise); the weights :math:`\theta` learn from the same loss.
Published (Wang et al., 2023): a hybrid of model-based policy optimisation and
supervised quantization training with an objective of task and benefit. Reconstructed: its form, all schedules and all numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from bitwright import runs
from bitwright.adaptive.actor import ActorOptions, Kind, Relaxation, Table
from bitwright.adaptive.network import AdaptiveNet, Mode
from bitwright.adaptive.objective import forced_losses, sample_losses
from bitwright.adaptive.promise import ALIKE, Promise, alarms_of, bracket, check, settle_price
from bitwright.adaptive.relaxations import Draw
from bitwright.allocation import allocate
from bitwright.data.quality import MixedSplit
from bitwright.data.splits import Split
from bitwright.errors import RunError, TrainingError
from bitwright.training.finetune import (
    FinetuneOptions,
    History,
    Log,
    build_optimizer,
    first_bad_layer,
    learning_rate,
    mix,
    set_memory_order,
    steps_in,
)

Estimator = Literal["counterfactual", "pathwise", "reinforce"]
ESTIMATORS: tuple[Estimator, ...] = ("counterfactual", "pathwise", "reinforce")
CHECKPOINT = "checkpoint/adaptive.safetensors"
FIRM = 10.0
"""Score of a choice that is no longer to be reconsidered."""
PULL = 1.0
"""How much of the present excess over the budget is added to its integral in λ."""
PRICED = 0.05
"""Share of training between two settings of the actor's price, so that weights are trained at decisions that keep the budget."""
UNUSED = ("ema", "bins", "mixup", "stop_at")
"""Options of fine-tuning that an adaptive training does not know; they must be 0, or left out."""


@dataclass(frozen=True)
class AdaptiveOptions:
    """How an actor is trained beside the weights; those of the weights are `FinetuneOptions`'.

    Attributes:
        actor: what decides: ``layerwise``, ``controller``, ``static``, ``random`` or ``severity``; see `ActorOptions`.
        relaxation: ``concrete`` or ``gaussian``.
        estimator: what tells the actor its gradient. ``counterfactual`` runs the batch once more with one site of each sample at another
            width and takes the difference of losses; ``pathwise`` takes that difference to first order, at every site, from the gradient
            that passes through the network; ``reinforce`` has losses alone (Williams, 1992), with a running mean as baseline.
        quality: features of the actor's image embedding.
        project: features of its layer statistics.
        hidden: units of its hidden layers.
        looks: values of a layer's input that it looks at.
        actor_lr: learning rate of the actor (Adam), along a cosine.
        warmup: share of training with widths drawn evenly, so that the weights learn to live with all of them.
        quiet: share of training after which the actor draws no more: between the warm-up and then its noise falls to none, so that the
            weights learn from decisions as they will be deployed while their learning rate is still high. ``reinforce`` draws until
            ``final``, and its actor learns no more from then on.
        final: share of training at the end with the lowest temperature and a fixed λ.
        hot: temperature of the relaxation at the start.
        cold: temperature at the end; it falls exponentially in between.
        interpolate: share of training in which the ``gaussian`` relaxation mixes the outputs of two widths, with ``pathwise``.
        trust: in nats: the loss that a site is estimated to save for a sample counts for no more; the estimate is linear, so a large one
            is wrong.
        hold: weight of the mean square of the actor's scores, summed over sites: an actor that is too sure of a choice hears nothing of
            the others any more, not even that the budget is exceeded.
        baseline: decay of the running mean that ``reinforce`` compares losses with.
        patience: how fast λ reacts: at 1, an excess of a tenth of what decisions can move, kept for all of training, raises λ by 1.
        calibration: training images that step sizes and statistics are taken from.
        settle: training images that the actor's price is set on at the end; of more, the mean is known better and less is left unspent.
    """

    actor: Kind = "layerwise"
    relaxation: Relaxation = "concrete"
    estimator: Estimator = "counterfactual"
    quality: int = 16
    project: int = 16
    hidden: int = 16
    looks: int = 1024
    actor_lr: float = 0.01
    warmup: float = 0.1
    quiet: float = 0.5
    final: float = 0.2
    hot: float = 5.0
    cold: float = 0.5
    interpolate: float = 0.5
    trust: float = 1.0
    hold: float = 1e-3
    baseline: float = 0.95
    patience: float = 1.0
    calibration: int = 512
    settle: int = 2000

    def __post_init__(self) -> None:
        self.actor_options()
        if self.estimator not in ESTIMATORS:
            raise TrainingError(f"adaptive option estimator='{self.estimator}' is unknown; use {', '.join(ESTIMATORS[:-1])} or reinforce")
        shares = (self.warmup, self.quiet, self.final, self.interpolate, self.baseline)
        if not all(0 <= share < 1 for share in shares) or self.warmup + self.final >= 1:
            raise TrainingError("adaptive options warmup, quiet, final, interpolate and baseline are in [0, 1), and warmup + final below 1")
        if self.quiet < self.warmup:
            raise TrainingError(
                f"adaptive option quiet={self.quiet} is below warmup={self.warmup}: in the warm-up all is drawn; raise quiet"
            )
        above = (self.hot, self.cold, self.patience, self.actor_lr, self.trust)
        if min(above) <= 0 or self.hold < 0 or min(self.calibration, self.settle) < 2:
            raise TrainingError(
                "adaptive options hot, cold, patience, trust, actor_lr must be above 0, hold at least 0, calibration and settle at least 2"
            )

    def actor_options(self) -> ActorOptions:
        """Return what the actor is built from."""
        return ActorOptions(self.actor, self.relaxation, self.quality, self.project, self.hidden, self.looks)

    def temperature(self, share: float) -> float:
        """Return the temperature at a share of training.

        >>> [round(AdaptiveOptions().temperature(share), 2) for share in (0.0, 0.45, 0.9)]
        [5.0, 1.58, 0.5]
        """
        joint = (share - self.warmup) / max(1e-9, 1 - self.final - self.warmup)
        return self.hot * math.exp(math.log(self.cold / self.hot) * min(1.0, max(0.0, joint)))

    def noise(self, share: float) -> float:
        """Return the factor on the noise at a share of training.

        >>> [round(AdaptiveOptions().noise(share), 2) for share in (0.05, 0.3, 0.5, 0.9)]
        [1.0, 0.5, 0.0, 0.0]
        """
        if self.actor == "random" or share < self.warmup:
            return 1.0
        if self.estimator == "reinforce":  # it learns from draws alone, so it draws as long as it learns
            return float(share < 1 - self.final)
        return max(0.0, (self.quiet - share) / max(1e-9, self.quiet - self.warmup))


@dataclass
class _Progress:
    """Where a training stands; with the network and the optimizers it is all the state there is."""

    step: int = 0
    integral: float = 0.0
    strength: float = 0.0
    mean_cost: float = 1.0
    baseline: float = math.nan
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class AdaptiveHistory(History):
    """What a joint training did: rows of epochs as in fine-tuning, what it promises to cost, and its alarms."""

    promise: Promise
    alarms: tuple[str, ...]


def train_adaptive(
    net: AdaptiveNet,
    data: Split,
    held_out: Split,
    options: AdaptiveOptions,
    training: FinetuneOptions,
    *,
    out: Path | None = None,
    log: Log | None = None,
    seed: int = 0,
) -> AdaptiveHistory:
    """Train weights and actor together, in place, and set the actor's price so that the mean cost keeps the budget.

    Args:
        net: what `adapt` made.
        data: training images of the stated mix.
        held_out: other images of that mix, on which the promise is checked; they choose nothing.
        options: how the actor is trained.
        training: how the weights are trained; `UNUSED` options must be 0 or left out, and weight decay does not depend on widths.
        out: directory for checkpoints; a checkpoint found there is resumed, bit for bit on a CPU.
        log: called with each epoch's row.
        seed: of order, augmentation and draws.

    Raises:
        TrainingError: an option that has no meaning here, or a loss that is not a number.
        RunError: the checkpoint in ``out`` belongs to another network or cannot be read.
    """
    for name in UNUSED:
        if getattr(training, name):
            raise TrainingError(f"adaptive training knows no {name}; leave finetune.{name} out")
    trainer = _Trainer(net, data, options, training, seed, out)
    with torch.random.fork_rng(devices=[]):
        trainer.run(log)
        bad = next((name for name, value in net.state_dict().items() if not bool(torch.isfinite(value).all())), None)
        if bad is not None:
            raise TrainingError(f"after the last step '{bad}' holds values that are not finite; lower finetune.lr or check the data")
        if not _one_policy(net):
            settle_price(net, data.take(options.settle), others=len(held_out))
        promise = check(net, held_out, seed=seed)
    set_memory_order(net.eval(), channels_last=False)
    progress = trainer.progress
    return AdaptiveHistory(tuple(progress.rows), progress.step, progress.seconds, promise, tuple(alarms_of(net, promise, progress.rows)))


class _Trainer:
    """One training at work."""

    def __init__(self, net: AdaptiveNet, data: Split, options: AdaptiveOptions, training: FinetuneOptions, seed: int, out: Path | None):
        self.net, self.data, self.options, self.training, self.seed, self.out = net, data, options, training, seed, out
        set_memory_order(net.train(), channels_last=training.channels_last)
        self.device = next(net.parameters()).device
        actor = [parameter for parameter in net.actor.parameters() if parameter.requires_grad]
        plain = FinetuneOptions(**{**asdict(training), "low_bit_decay": False})
        self.optimizer = build_optimizer(net, plain, without=list(net.actor.parameters()))
        self.actor_optimizer = torch.optim.Adam(actor, lr=options.actor_lr, betas=(0.9, 0.99)) if actor else None
        self.epoch_steps, self.steps = steps_in(data, training)
        self.final_step = math.ceil(self.steps * (1 - options.final))
        self.progress = self._resume()
        self.losses: dict[str, Callable[..., Any]] = {}

    def run(self, log: Log | None) -> None:
        """Run the steps that are left."""
        progress, started, saved = self.progress, time.monotonic() - self.progress.seconds, time.monotonic()
        if self.options.actor == "random":
            settle_price(self.net, self.data.take(self.options.calibration), margin=0.0)
            self.net.train()
        while progress.step < self.steps:
            self._step()
            progress.step += 1
            if progress.step % self.epoch_steps == 0 or progress.step == self.steps:
                self._end_epoch(time.monotonic() - started, log)
            last = progress.step == self.steps
            if self.out is not None and (last or time.monotonic() - saved >= self.training.checkpoint_seconds):
                progress.seconds = time.monotonic() - started
                self._save()
                saved = time.monotonic()
        progress.seconds = max(progress.seconds, time.monotonic() - started)

    def _step(self) -> None:
        progress, options, net = self.progress, self.options, self.net
        share = progress.step / self.steps
        warm = share < options.warmup
        if progress.step == self.final_step and _one_policy(net):
            _fix_policy(net)
        if self._prices_now():
            settle_price(net, self.data.take(options.calibration), margin=0.0)
            net.train()
        x, y, condition = self._batch()
        net.mode = self._mode()
        net.interpolate = net.mode == "pathwise" and options.relaxation == "gaussian" and share < options.interpolate
        net.trust(options.trust / len(x))  # the loss is a mean over samples
        draw = self._draw(len(x), share, heed=not warm)
        self._rates()
        site = self._probed(len(x))
        losses, cost, size, logp, other, gate = self._loss_of()(x, y, draw, condition, site)
        task, spent = losses.mean(), cost.mean()
        over = (cost - 1) / net.span  # in units of what decisions can change, whatever the pinned sites and the actor take
        objective = task if warm else task + progress.strength * over.mean()
        if not warm and net.mode == "drawn" and self.actor_optimizer is not None and options.noise(share) > 0:
            objective = task + self._score_function(losses.detach() + progress.strength * over.detach(), logp)
        if not warm and net.mode == "probing":
            objective = objective + self._differences(x, y, losses.detach(), other, gate)
        self._take(objective + options.hold * size.mean(), x, draw, condition, warm=warm)
        self._control(float(spent.detach()), warm=warm, fixed=progress.step >= self.final_step)
        for name, value in (("loss", float(task.detach())), ("spent", float(spent.detach()))):
            progress.sums[name] = progress.sums.get(name, 0.0) + value

    def _prices_now(self) -> bool:
        """Return whether the actor's price is set in this step: now and then, once nothing is drawn any more."""
        if self.actor_optimizer is None or _one_policy(self.net):
            return False
        quiet = self.final_step if self.options.estimator == "reinforce" else math.ceil(self.options.quiet * self.steps)
        since = self.progress.step - quiet
        return since >= 0 and since % max(1, round(self.steps * PRICED)) == 0

    def _mode(self) -> Mode:
        if self.options.estimator == "reinforce" or self.options.actor == "random":
            return "drawn"
        return "probing" if self.options.estimator == "counterfactual" else "pathwise"

    def _probed(self, samples: int) -> Tensor:
        """Return the site of each sample that is looked at in this step."""
        generator = torch.Generator().manual_seed(mix(self.seed, self.progress.step, 5))
        return torch.randint(0, len(self.net.space.names), (samples,), generator=generator).to(self.device)

    def _differences(self, x: Tensor, y: Tensor, losses: Tensor, other: Tensor, gate: Tensor) -> Tensor:
        """Return what has the gradient of the expected loss: the batch runs again, one site of each sample at its neighbour's width."""
        with torch.no_grad(), self.net.replaying():
            changed: Tensor = self._again()(x, y, other)
        trust, sites = self.options.trust, len(self.net.space.names)
        surrogate: Tensor = sites * ((changed - losses).clamp(-trust, trust) * gate).mean()
        return surrogate

    def _batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the augmented batch of a step and the severities; they depend on the seed and the step alone."""
        step, size = self.progress.step, self.training.batch_size
        epoch, place = divmod(step, self.epoch_steps)
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(mix(self.seed, epoch, 1)))
        generator = torch.Generator().manual_seed(mix(self.seed, step, 2))
        torch.manual_seed(mix(self.seed, step, 3))
        index, condition = order[place * size : (place + 1) * size], None
        if isinstance(self.data, MixedSplit):
            x, y, quality = self.data.labelled(index, generator)
            condition = quality.severity.to(self.device)
        else:
            x, y = self.data.batch(index, generator)
        if self.training.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x.to(self.device), y.to(self.device), condition

    def _draw(self, samples: int, share: float, *, heed: bool) -> Draw:
        generator = torch.Generator().manual_seed(mix(self.seed, self.progress.step, 4))
        shape = (len(self.net.space.names), samples, len(self.net.space.choices))
        return Draw.of(shape, generator, self.options.temperature(share), self.options.noise(share), float(heed)).to(self.device)

    def _rates(self) -> None:
        lr = learning_rate(self.training, self.progress.step, self.steps, self.epoch_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        if self.actor_optimizer is not None:
            joint = (self.progress.step / self.steps - self.options.warmup) / (1 - self.options.warmup)
            for group in self.actor_optimizer.param_groups:
                group["lr"] = self.options.actor_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, joint))))

    def _loss_of(self) -> Callable[..., Any]:
        """Return what gives every sample's loss and cost, see `sample_losses`."""
        return self._compiled(f"{self.net.mode} {self.net.interpolate}", sample_losses)

    def _again(self) -> Callable[..., Any]:
        """Return what gives every sample's loss at forced choices."""
        return self._compiled("again", forced_losses)

    def _compiled(self, key: str, make: Callable[[AdaptiveNet, FinetuneOptions], Callable[..., Any]]) -> Callable[..., Any]:
        """Return a way of running, compiled once where that is asked for."""
        if key not in self.losses:
            loss = make(self.net, self.training)
            self.losses[key] = torch.compile(loss, dynamic=False) if self.training.compile else loss
        return self.losses[key]

    def _score_function(self, losses: Tensor, logp: Tensor) -> Tensor:
        """Return what has the gradient of REINFORCE: the losses above their running mean, times the log-probability."""
        progress, mean = self.progress, float(losses.mean())
        if math.isnan(progress.baseline):
            progress.baseline = mean
        surrogate = ((losses - progress.baseline) * logp).mean()
        progress.baseline += (1 - self.options.baseline) * (mean - progress.baseline)
        return surrogate

    def _take(self, objective: Tensor, x: Tensor, draw: Draw, condition: Tensor | None, *, warm: bool) -> None:
        value = float(objective.detach())
        if not math.isfinite(value):
            where = first_bad_layer(_Bound(self.net, draw, condition), x)
            kept = f"; the last good checkpoint is {self.out / CHECKPOINT}" if self.out and (self.out / CHECKPOINT).exists() else ""
            at = f"the loss is {value} at step {self.progress.step}, first seen in {where}"
            raise TrainingError(f"{at}; lower finetune.lr or check the data{kept}")
        objective.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.actor_optimizer is not None:
            done = self.options.estimator == "reinforce" and self.progress.step >= self.final_step
            if not warm and not done:
                self.actor_optimizer.step()
            self.actor_optimizer.zero_grad(set_to_none=True)

    def _control(self, spent: float, *, warm: bool, fixed: bool) -> None:
        """Move λ, the price of the budget, by what is spent over it; in the final part it stays.

        Once nothing is drawn any more, λ may fall below zero: weights that got used to few bits do not ask for what is left of the budget.
        """
        progress = self.progress
        progress.mean_cost += 0.1 * (spent - progress.mean_cost)
        if warm or not self.actor_optimizer:
            return
        if fixed:
            progress.strength = progress.integral  # without the part that follows the last few steps
            return
        excess = (progress.mean_cost - 1) / self.net.span
        least = 0.0 if progress.step < self.options.quiet * self.steps else -math.inf
        progress.integral = max(least, progress.integral + 10 * self.options.patience * excess / self.steps)
        progress.strength = max(least, progress.integral + PULL * excess)

    def _end_epoch(self, seconds: float, log: Log | None) -> None:
        progress = self.progress
        done = (progress.step - 1) % self.epoch_steps + 1
        means = {name: total / done for name, total in progress.sums.items()}
        lr = self.optimizer.param_groups[0]["lr"]
        epoch = (progress.step - 1) // self.epoch_steps + 1
        row = {"epoch": epoch, "step": progress.step, **means, "lr": lr, "strength": progress.strength, "seconds": seconds}
        row["temperature"] = self.options.temperature(progress.step / self.steps)
        alike = self._agreement()
        row["agreement"] = alike
        if self.net.actor.reads and alike > ALIKE and progress.step / self.steps > 0.5:
            row["alarm"] = "degenerate actor: it decides the same for all samples"
        progress.rows.append(row)
        progress.sums = {}
        if log is not None:
            log(row)
        self.net.train()

    def _agreement(self) -> float:
        """Return which share of decisions on some training images is each site's most frequent one."""
        images, severities = labelled(self.data.take(min(len(self.data), 128)))
        self.net.eval()
        with torch.no_grad():
            self.net(images.to(self.device), condition=severities)
        taken = self.net.taken()
        self.net.train()
        return float((taken == taken.mode(1, keepdim=True).values).float().mean())

    def _identity(self) -> dict[str, Any]:
        kept = {k: v for k, v in asdict(self.training).items() if k not in ("checkpoint_seconds", "compile")}
        space = {"choices": list(map(list, self.net.space.choices)), "limit": self.net.space.limit}
        return {"training": kept, "adaptive": asdict(self.options), "seed": self.seed, **space}

    def _save(self) -> None:
        assert self.out is not None
        tree: dict[str, Any] = {"model": dict(self.net.state_dict()), "optimizer": self.optimizer.state_dict()}
        tree["actor"] = None if self.actor_optimizer is None else self.actor_optimizer.state_dict()
        runs.save_tree(self.out / CHECKPOINT, {**tree, "progress": asdict(self.progress), "identity": self._identity()})

    def _resume(self) -> _Progress:
        """Load the checkpoint in ``out``, if there is one."""
        if self.out is None or not (self.out / CHECKPOINT).exists():
            return _Progress()
        tree, identity = runs.load_tree(self.out / CHECKPOINT), self._identity()
        if tree["identity"] != identity:
            differs = runs.difference("options", tree["identity"], identity)
            raise RunError(f"{self.out / CHECKPOINT} was made with other options ({differs}); use another --out, or the old ones")
        try:
            self.net.load_state_dict(tree["model"])
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise RunError(f"{self.out / CHECKPOINT} belongs to another network ({reason}); use another --out") from None
        self.optimizer.load_state_dict(tree["optimizer"])
        if self.actor_optimizer is not None:
            self.actor_optimizer.load_state_dict(tree["actor"])
        return _Progress(**tree["progress"])


def _one_policy(net: AdaptiveNet) -> bool:
    """Return whether one learned policy is taken for all inputs: no price can split the last of its budget among them."""
    actor = net.actor
    return isinstance(actor, Table) and len(actor.scores_of) == 1 and not net.draws and net.relaxation == "concrete"


def _fix_policy(net: AdaptiveNet) -> None:
    """Let a table of one policy take, from now on, the best choices within the budget: at the price at which it would just exceed it."""
    actor, space = cast(Table, net.actor), net.space
    scores = actor.scores_of.detach()[0].cpu()
    low, _ = bracket(len(scores), lambda price: float(net.shares_at(price, scores[:, None])) > 1)
    priced = scores - low[:, None] * torch.stack([net.worth(site).cpu() for site in range(len(scores))])
    chosen = allocate((-priced).tolist(), [space.terms.long().tolist()], [space.limit - space.fixed])
    with torch.no_grad():
        actor.price.zero_()
        actor.scores_of.zero_()
        actor.scores_of[0, torch.arange(len(chosen)), torch.tensor(chosen)] = FIRM


class _Bound(torch.nn.Module):
    """A network with the draws of one step, for whoever only has images."""

    def __init__(self, net: AdaptiveNet, draw: Draw, condition: Tensor | None):
        super().__init__()
        self.net, self.draw, self.condition = net, draw, condition

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.net(x, draw=self.draw, condition=self.condition)
        return logits


def labelled(split: Split) -> tuple[Tensor, Tensor | None]:
    """Return a whole split's images in the evaluation view, and their true severities where it knows them."""
    index = torch.arange(len(split))
    if isinstance(split, MixedSplit):
        x, _, quality = split.labelled(index)
        return x, quality.severity.to(x.device)
    return split.batch(index)[0], None


__all__ = ["AdaptiveHistory", "AdaptiveOptions", "train_adaptive"]
