"""The training loop: quantization-aware fine-tuning, and plain training of float networks.

Everything that a step draws at random comes from the seed and the step's number, so a run that was killed goes on from
its checkpoint to the same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitwright import runs
from bitwright.errors import DataError, RunError, TrainingError
from bitwright.quant.modules import QuantLayer, evaluating, named_quant_layers
from bitwright.robustness import Goal
from bitwright.training.losses import Reduction, bin_regularization, bins_weight, distillation

if TYPE_CHECKING:
    from bitwright.data import Split

CHECKPOINT = "checkpoint/finetune.safetensors"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Log = Callable[[Mapping[str, Any]], None]
LEAST = {"epochs": 1, "max_steps": 1, "batch_size": 1} | dict.fromkeys(
    ("lr", "warmup_epochs", "scale_lr", "momentum", "weight_decay", "label_smoothing", "mixup", "bins", "bins_start", "ema"), 0
)
KNOWN = {
    "optimizer": ("sgd", "adam"),
    "schedule": ("cosine", "linear"),
    "bins_reduction": ("sum", "mean"),
    "precision": ("float32", "bfloat16"),
}


@dataclass(frozen=True)
class FinetuneOptions:
    """How a network is trained.

    Attributes:
        epochs: passes over the data.
        max_steps: stop after so many steps, where given (the learning-rate schedule shrinks to them).
        batch_size: images a step; a last, smaller batch is dropped unless it is the only one.
        optimizer: ``sgd`` (Nesterov) or ``adam``.
        lr: highest learning rate; it falls to 0 along a cosine, or a line with ``schedule="linear"``.
        schedule: ``cosine`` or ``linear``.
        warmup_epochs: epochs of linear rise before it.
        scale_lr: factor on the learning rate of step sizes and clips.
        momentum: of ``sgd``.
        weight_decay: on weights of convolutions and linear layers alone.
        low_bit_decay: halve the decay at 3 bits and quarter it at 2 and 1 (Esser et al., 2020, §3.1).
        label_smoothing: of the cross-entropy that is used without a teacher.
        mixup: parameter of the Beta distribution by which pairs of images are blended (Zhang et al., 2018); 0 leaves it out. A
            teacher labels the blended images themselves ("consistent teaching": Beyer et al., 2022).
        bins: largest weight of the bin regularization; 0 leaves it out (`losses.bin_regularization`).
        bins_start: share of training before it sets in.
        bins_reduction: ``sum`` (ours) or ``mean`` (published).
        ema: decay of the exponential moving average of weights that takes their place at the end; 0 leaves it out.
        precision: ``float32``, or ``bfloat16`` for autocast with float32 weights.
        compile: compile the step with ``torch.compile``.
        channels_last: keep images and weights in channels-last order while training.
        checkpoint_seconds: least time between two checkpoints.
        stop_at: an accuracy at a quality, such as ``gaussian_noise:3>=0.80`` or ``clean>=0.9``: the training is over at the end of the
            first epoch in which the selection images reach it (`bitwright.robustness.Goal`). The learning rate keeps the schedule
            of the whole training.
    """

    epochs: int = 10
    max_steps: int | None = None
    batch_size: int = 128
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.02
    schedule: Literal["cosine", "linear"] = "cosine"
    warmup_epochs: float = 0.0
    scale_lr: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    low_bit_decay: bool = True
    label_smoothing: float = 0.0
    mixup: float = 0.0
    bins: float = 0.0
    bins_start: float = 0.25
    bins_reduction: Reduction = "sum"
    ema: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    channels_last: bool = False
    checkpoint_seconds: float = 60.0
    stop_at: str | None = None

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise TrainingError(f"fine-tuning option {name}={getattr(self, name)} is below {least}")
        for name, known in KNOWN.items():
            if getattr(self, name) not in known:
                raise TrainingError(f"fine-tuning option {name}='{getattr(self, name)}' is unknown; use {' or '.join(known)}")
        if self.label_smoothing > 1:
            raise TrainingError(f"fine-tuning option label_smoothing={self.label_smoothing} is above 1")
        if self.ema >= 1 or not 0 <= self.bins_start < 1:
            raise TrainingError(f"fine-tuning options ema={self.ema} and bins_start={self.bins_start} must be below 1")
        if self.stop_at is not None:
            Goal.parse(self.stop_at)


@dataclass(frozen=True)
class History:
    """What a training run did: one row an epoch (epoch, step, loss, lr, seconds; with ``stop_at`` also goal, the accuracy it judges)."""

    epochs: tuple[Mapping[str, Any], ...]
    steps: int
    seconds: float


@dataclass
class _Progress:
    """Where a run stands; with the network and the optimizer it is all the state there is."""

    step: int = 0
    total: float = 0.0
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    ema: dict[str, Tensor] = field(default_factory=dict)
    reached: bool = False


def finetune(
    model: nn.Module,
    data: Split,
    options: FinetuneOptions,
    *,
    teacher: nn.Module | None = None,
    selection: Split | None = None,
    out: Path | None = None,
    log: Log | None = None,
    seed: int = 0,
) -> History:
    """Train a network in place: a quantized one at its policy, or a float one.

    The loss is the soft cross-entropy to the teacher where there is one, else the cross-entropy to the labels, plus the
    bin regularization. SDQ (Huang et al., 2022) publishes the two parts; their weights and schedules are reconstructed.

    Args:
        model: network that maps ``[N, …]`` to logits ``[N, classes]``; `QuantLayer` modules are trained with their grids.
        data: training images; each batch is an augmented view.
        options: how.
        teacher: float network whose soft labels are learned.
        selection: images that ``stop_at`` is judged on.
        out: directory for checkpoints; a checkpoint found there is resumed.
        log: called with each epoch's row.
        seed: of order, augmentation and dropout.

    Raises:
        TrainingError: the loss is not a number (the last good checkpoint stays in ``out``), or ``stop_at`` has no images.
        DataError: there is no data, or the network has no output for some label.
        RunError: the checkpoint in ``out`` belongs to another network or cannot be read.
    """
    if len(data) == 0:
        raise DataError("fine-tuning got an empty data set; give at least one image")
    if teacher is None:
        _check_outputs(model, data)
    device = next(model.parameters()).device
    set_memory_order(model.train(), channels_last=options.channels_last)
    guide = None if teacher is None else copy.deepcopy(teacher).eval().to(device)
    if guide is not None:
        set_memory_order(guide, channels_last=options.channels_last)
    optimizer = build_optimizer(model, options)
    progress = _resume(model, optimizer, _fingerprint(options, seed, taught=teacher is not None), out)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _train(model, guide, data, options, optimizer, progress, out, log, seed, _judge(options, selection))
    _check_finite(model)
    if options.ema:
        _load(model, progress.ema)
    set_memory_order(model.eval(), channels_last=False)
    return History(tuple(progress.rows), progress.step, progress.seconds)


def _judge(options: FinetuneOptions, selection: Split | None) -> Callable[[nn.Module, _Progress], None] | None:
    """Return what notes at the end of an epoch whether the goal is reached, by the weights that would be kept."""
    if options.stop_at is None:
        return None
    if selection is None:
        raise TrainingError(f"fine-tuning option stop_at='{options.stop_at}' needs images to be judged on; give selection=")
    goal = Goal.parse(options.stop_at)

    def judge(model: nn.Module, progress: _Progress) -> None:
        kept = copy.deepcopy(model) if options.ema else model
        if options.ema:
            _load(kept, progress.ema)
        accuracy = goal.measure(kept, selection)
        progress.rows[-1]["goal"] = accuracy
        progress.reached = accuracy >= goal.accuracy

    return judge


def _check_finite(model: nn.Module) -> None:
    """Raise `TrainingError` where the last step, whose loss nobody sees, left a number that is none."""
    bad = next((name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())), None)
    if bad is not None:
        raise TrainingError(f"after the last step '{bad}' holds values that are not finite; lower lr or check the data")


def _check_outputs(model: nn.Module, data: Split) -> None:
    """Raise `DataError` unless the network has an output for every label."""
    x = data.batch(torch.arange(1), None)[0].to(next(model.parameters()).device)
    with torch.no_grad(), evaluating(model):
        outputs = model(x).shape[1]
    if outputs < data.classes:
        raise DataError(f"the network has {outputs} outputs and the labels run to {data.classes - 1}; give it {data.classes} outputs")


def set_memory_order(model: nn.Module, *, channels_last: bool) -> None:
    """Put the weights of 2-D convolutions in channels-last, or in contiguous, order in place."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=order)


def steps_in(data: Split, options: FinetuneOptions) -> tuple[int, int]:
    """Return the steps of an epoch and of the whole training."""
    epoch = max(1, len(data) // options.batch_size)
    total = epoch * options.epochs
    return epoch, total if options.max_steps is None else min(total, options.max_steps)


def _train(
    model: nn.Module,
    teacher: nn.Module | None,
    data: Split,
    options: FinetuneOptions,
    optimizer: torch.optim.Optimizer,
    progress: _Progress,
    out: Path | None,
    log: Log | None,
    seed: int,
    judge: Callable[[nn.Module, _Progress], None] | None,
) -> None:
    """Run the steps that are left."""
    epoch_steps, steps = steps_in(data, options)
    loss_of = build_loss(model, teacher, options)
    device = next(model.parameters()).device
    started, saved = time.monotonic() - progress.seconds, time.monotonic()
    while progress.step < steps and not progress.reached:
        x, y = draw_batch(data, progress.step, epoch_steps, options.batch_size, seed)
        if options.mixup:
            x, y = blend(x, y, options.mixup, data.classes)
        if options.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        lr = learning_rate(options, progress.step, steps, epoch_steps)
        pull = torch.tensor(bins_weight(progress.step / steps, options.bins, options.bins_start), device=device)
        loss = _step(model, optimizer, loss_of, (x, y, pull), lr, progress, out)
        progress.total += loss
        progress.step += 1
        _average(model, options.ema, progress)
        if progress.step % epoch_steps == 0 or progress.step == steps:
            _end_epoch(progress, epoch_steps, lr, time.monotonic() - started, log, judge and partial(judge, model))
        over = progress.step == steps or progress.reached
        if out is not None and (time.monotonic() - saved >= options.checkpoint_seconds or over):
            progress.seconds = time.monotonic() - started
            _save(model, optimizer, _fingerprint(options, seed, taught=teacher is not None), progress, out)
            saved = time.monotonic()
    progress.seconds = max(progress.seconds, time.monotonic() - started)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Loss,
    batch: tuple[Tensor, Tensor, Tensor],
    lr: float,
    progress: _Progress,
    out: Path | None,
) -> float:
    """Take one optimizer step and return its loss."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    loss = loss_of(*batch)
    value = float(loss.detach())
    if not math.isfinite(value):
        kept = f"; the last good checkpoint is {out / CHECKPOINT}" if out is not None and (out / CHECKPOINT).exists() else ""
        where = first_bad_layer(model, batch[0])
        raise TrainingError(f"the loss is {value} at step {progress.step}, first seen in {where}; lower lr or check the data{kept}")
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value


def draw_batch(data: Split, step: int, epoch_steps: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the augmented batch of a step; it depends on the seed and the step alone."""
    epoch, place = divmod(step, epoch_steps)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(mix(seed, epoch, 1)))
    generator = torch.Generator().manual_seed(mix(seed, step, 2))
    torch.manual_seed(mix(seed, step, 3))
    return data.batch(order[place * size : (place + 1) * size], generator)


def blend(x: Tensor, y: Tensor, parameter: float, classes: int) -> tuple[Tensor, Tensor]:
    """Blend every image of a batch with another one of it, all in the same proportion, drawn by torch's global generator.

    Args:
        x: images ``[N, …]``.
        y: labels, int64 ``[N]``.
        parameter: a of the Beta(a, a) distribution of the proportion.
        classes: number of classes.

    Returns:
        Images ``[N, …]``, and the blended one-hot labels ``[N, classes]``.

    >>> x, y = blend(torch.eye(2), torch.tensor([0, 1]), 1.0, 2)
    >>> bool(torch.allclose(x, y)), y.sum(1)
    (True, tensor([1., 1.]))
    """
    share = torch.distributions.Beta(torch.tensor(parameter), torch.tensor(parameter)).sample().to(x)
    other = torch.randperm(len(x)).to(x.device)
    hot = F.one_hot(y, classes).to(x)
    return x.lerp(x[other], share), hot.lerp(hot[other], share)


def mix(seed: int, index: int, stream: int) -> int:
    """Return a seed for one of several independent streams.

    >>> len({mix(s, i, k) for s in range(4) for i in range(9) for k in range(3)})
    108
    """
    return ((seed * 1_000_003 + index) * 16 + stream) % (2**63 - 1)


def learning_rate(options: FinetuneOptions, step: int, steps: int, epoch_steps: int) -> float:
    """Return the learning rate of a step: a linear rise, then a cosine or a line to zero.

    >>> [round(learning_rate(FinetuneOptions(lr=1.0), s, 4, 4), 2) for s in range(4)]
    [1.0, 0.85, 0.5, 0.15]
    """
    rise = min(int(options.warmup_epochs * epoch_steps), steps - 1)
    if step < rise:
        return options.lr * (step + 1) / rise
    share = (step - rise) / max(1, steps - rise)
    return options.lr * (1 - share if options.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share)))


def build_loss(model: nn.Module, teacher: nn.Module | None, options: FinetuneOptions) -> Loss:
    """Return the loss of a batch (inputs, labels, weight of the bin regularization), compiled if asked for."""
    layers = [(layer.weight, layer.weight_quantizer) for _, layer in named_quant_layers(model) if layer.weight_quantizer is not None]
    half = options.precision == "bfloat16"
    kind = next(model.parameters()).device.type

    def loss(x: Tensor, y: Tensor, pull: Tensor) -> Tensor:
        with torch.autocast(kind, torch.bfloat16, enabled=half):
            logits = model(x).float()
            if teacher is not None:
                with torch.no_grad():
                    soft = teacher(x).float()
        if teacher is not None:
            value = distillation(logits, soft)
        else:
            target = F.pad(y, (0, logits.shape[1] - y.shape[1])) if y.is_floating_point() else y
            value = F.cross_entropy(logits, target, label_smoothing=options.label_smoothing)
        if options.bins and layers:
            value = value + pull * torch.stack([bin_regularization(w, q, reduction=options.bins_reduction) for w, q in layers]).sum()
        return value

    return torch.compile(loss, dynamic=False) if options.compile else loss


def build_optimizer(model: nn.Module, options: FinetuneOptions, *, without: Iterable[nn.Parameter] = ()) -> torch.optim.Optimizer:
    """Return the optimizer with its groups: weights by decay, step sizes at their own rate, the rest without decay.

    Normalisations of several widths, whose parameters are matrices, say ``decays = False``. Parameters in ``without`` are left out.
    """
    seen = {id(parameter) for parameter in without}
    owners = {id(layer.weight): layer.bits.w for _, layer in named_quant_layers(model)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decay = options.weight_decay if parameter.dim() > 1 and name != "scale" and getattr(module, "decays", True) else 0.0
            if options.low_bit_decay:
                decay *= {1: 0.25, 2: 0.25, 3: 0.5}.get(owners.get(id(parameter), 32), 1.0)
            factor = options.scale_lr if name == "scale" else 1.0
            if id(parameter) not in seen and parameter.requires_grad:
                groups.setdefault((decay, factor), []).append(parameter)
            seen.add(id(parameter))
    settings = [{"params": p, "weight_decay": d, "lr_factor": f} for (d, f), p in sorted(groups.items(), key=lambda item: item[0])]
    if options.optimizer == "adam":
        return torch.optim.Adam(settings, lr=options.lr)
    return torch.optim.SGD(settings, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0)


def first_bad_layer(model: nn.Module, x: Tensor) -> str:
    """Return where a batch first gives what is not finite: the images, a layer by its path, or the loss."""
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():

        def check(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(f"layer '{name}'" if name else "the network's own forward")

        handles.append(module.register_forward_hook(check))
    if not bool(torch.isfinite(x).all()):
        found.append("the input images")
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss"


def _average(model: nn.Module, decay: float, progress: _Progress) -> None:
    """Update the moving average of the weights and floating-point buffers."""
    if not decay:
        return
    current = {k: v.detach() for k, v in model.state_dict().items() if v.is_floating_point()}
    if not progress.ema:
        progress.ema.update({k: v.clone() for k, v in current.items()})
        return
    # a short memory at the start: the average of the first steps would hold the initial weights for long
    weight = max(1 - decay, 1 / (progress.step + 1))
    torch._foreach_lerp_(list(progress.ema.values()), list(current.values()), weight)


def _load(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy averaged values into the network."""
    own = model.state_dict()
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def _end_epoch(
    progress: _Progress, epoch_steps: int, lr: float, seconds: float, log: Log | None, judge: Callable[[_Progress], None] | None
) -> None:
    """Close the row of an epoch and see whether the goal is reached."""
    done = (progress.step - 1) % epoch_steps + 1
    epoch = (progress.step - 1) // epoch_steps + 1
    row = {"epoch": epoch, "step": progress.step, "loss": progress.total / done, "lr": lr, "seconds": seconds}
    progress.rows.append(row)
    progress.total = 0.0
    if judge is not None:
        judge(progress)
    if log is not None:
        log(row)


def _fingerprint(options: FinetuneOptions, seed: int, *, taught: bool) -> dict[str, Any]:
    """Return what a checkpoint must share to be resumed."""
    bound = {k: v for k, v in asdict(options).items() if k not in ("checkpoint_seconds", "compile")}
    if options.stop_at is None:  # checkpoints of before it was there go on
        del bound["stop_at"]
    return bound | {"seed": seed, "teacher": taught}


def _bits(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the widths of every quantized layer: no tensor of the network tells them."""
    return {name: (layer.bits.w, layer.bits.a) for name, layer in named_quant_layers(model)}


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any], progress: _Progress, out: Path) -> None:
    network, rates = dict(model.state_dict()), optimizer.state_dict()
    tree = {"model": network, "optimizer": rates, "progress": asdict(progress), "options": identity, "bits": _bits(model)}
    runs.save_tree(out / CHECKPOINT, tree)


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any], out: Path | None) -> _Progress:
    """Load the checkpoint in ``out``, if there is one."""
    if out is None or not (out / CHECKPOINT).exists():
        return _Progress()
    tree = runs.load_tree(out / CHECKPOINT)
    if tree["options"] != identity:
        differ = [k for k, v in identity.items() if tree["options"].get(k) != v]
        changed = ", ".join(differ)
        raise RunError(f"{out / CHECKPOINT} was made with other fine-tuning options ({changed}); use another --out, or the old ones")
    if tree.get("bits") != _bits(model):
        raise RunError(f"{out / CHECKPOINT} belongs to another network (its layers have other widths); use another --out")
    try:
        model.load_state_dict(tree["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"{out / CHECKPOINT} belongs to another network ({reason}); use another --out") from None
    optimizer.load_state_dict(tree["optimizer"])
    return _Progress(**tree["progress"])


__all__ = ["FinetuneOptions", "History", "QuantLayer", "finetune"]
