"""The training loop: the step by hand, schedules, groups, resuming bit for bit, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitwright.data import TensorSplit
from bitwright.errors import DataError, RunError, TrainingError
from bitwright.policy import Policy
from bitwright.quant import named_quant_layers, quantize, verify_widths
from bitwright.quant.modules import QuantLayer
from bitwright.training import FinetuneOptions, finetune
from bitwright.training.finetune import CHECKPOINT, blend, build_optimizer, draw_batch, learning_rate, steps_in

CLASSES = 3


def seeded(seed, make):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def images(seed, n, augment="crop-flip"):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (n,), generator=generator)
    x = torch.randn(n, 1, 6, 6, generator=generator) * 0.5
    for k in range(CLASSES):
        x[y == k, :, 2 * k : 2 * k + 2] += 1.5
    return TensorSplit(x, y, classes=CLASSES, augment=augment, pad=1)


def float_net():
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(4, 4, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, CLASSES))


def quantized_net(seed=0):
    policy = Policy({"0": (8, 8), "4": (2, 4), "7": (3, 32)})
    return quantize(seeded(seed, float_net), policy, calibration=images(9, 40, "none"))


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)


QUICK = FinetuneOptions(epochs=3, batch_size=16, lr=0.05, checkpoint_seconds=0.0)


class Stopped(Exception):
    """Stands for a kill."""


def stop_at(epoch):
    def log(row):
        if row["epoch"] == epoch:
            raise Stopped

    return log


# ---- the step by hand


def one_linear():
    return nn.Sequential(nn.Flatten(), seeded(1, lambda: nn.Linear(36, CLASSES)))


def test_one_step_of_sgd_by_hand():
    data, net = images(2, 20, "none"), one_linear()
    options = FinetuneOptions(epochs=1, batch_size=20, lr=0.1, momentum=0.0, weight_decay=0.01)
    expected = copy.deepcopy(net)
    loss = F.cross_entropy(expected(data.images), data.labels)
    loss.backward()
    weight = expected[1].weight - 0.1 * (expected[1].weight.grad + 0.01 * expected[1].weight)
    bias = expected[1].bias - 0.1 * expected[1].bias.grad  # no decay
    history = finetune(net, data, options)
    assert torch.allclose(net[1].weight, weight, atol=1e-6)
    assert torch.allclose(net[1].bias, bias, atol=1e-6)
    assert history.steps == 1
    assert history.epochs[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert not net.training


def test_with_a_teacher_the_loss_is_the_soft_cross_entropy_and_no_label_counts():
    data, teacher = images(2, 20, "none"), seeded(3, float_net)
    kept, modes = copy.deepcopy(teacher.state_dict()), [m.training for m in teacher.modules()]
    other = TensorSplit(data.images, data.labels.roll(1), classes=CLASSES)
    options = FinetuneOptions(epochs=1, batch_size=20, lr=0.1, momentum=0.0, weight_decay=0.0)
    nets = [one_linear(), one_linear()]
    rows = [finetune(net, split, options, teacher=teacher).epochs[0] for net, split in zip(nets, (data, other), strict=True)]
    assert same(*nets)
    with torch.no_grad():
        soft = copy.deepcopy(teacher).eval()(data.images).softmax(1)
        loss = -(soft * one_linear()(data.images).log_softmax(1)).sum(1).mean()
    assert rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in kept.items())
    assert [m.training for m in teacher.modules()] == modes


def test_label_smoothing_by_hand():
    data, net = images(2, 20, "none"), one_linear()
    log_p = net(data.images).log_softmax(1)
    hard = -log_p.gather(1, data.labels[:, None]).mean()
    loss = 0.9 * hard - 0.1 * log_p.mean()
    row = finetune(net, data, FinetuneOptions(epochs=1, batch_size=20, label_smoothing=0.1)).epochs[0]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_float_and_quantized_networks_learn():
    data = images(4, 160)
    for net in (seeded(5, float_net), quantized_net(5)):
        rows = finetune(net, data, FinetuneOptions(epochs=10, batch_size=16, lr=0.02)).epochs
        assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]
        x, y = images(6, 200, "none").batch(torch.arange(200))
        assert float((net(x).argmax(1) == y).float().mean()) > 0.7
    assert verify_widths(net)["4"] <= 4


def test_the_latent_weights_move_and_the_step_sizes_are_learned():
    net = quantized_net()
    before = copy.deepcopy(net.state_dict())
    finetune(net, images(7, 48), QUICK)
    for name, layer in named_quant_layers(net):
        assert not torch.equal(layer.weight, before[f"{name}.weight"])
        assert not torch.equal(layer.weight_quantizer.scale, before[f"{name}.weight_quantizer.scale"])
    assert not torch.equal(net[4].input_quantizer.scale, before["4.input_quantizer.scale"])


def test_bins_make_the_latent_weights_lie_closer_to_their_levels():
    from bitwright.training.losses import bin_statistics

    nets = [quantized_net(), quantized_net()]
    for net, bins in zip(nets, (0.0, 3.0), strict=True):
        finetune(net, images(7, 48), FinetuneOptions(epochs=15, batch_size=16, lr=0.02, bins=bins, bins_start=0.0, scale_lr=0.0))
    without, with_bins = (bin_statistics(net) for net in nets)
    assert all(with_bins[name].variance < 0.5 * without[name].variance for name in ("4", "7"))


# ---- schedules and groups


def test_cosine_and_line_after_a_linear_rise():
    options = FinetuneOptions(lr=2.0, warmup_epochs=1.0)
    assert [learning_rate(options, s, 12, 4) for s in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    for s in range(4, 12):
        assert learning_rate(options, s, 12, 4) == pytest.approx(1 + math.cos(math.pi * (s - 4) / 8))
    line = FinetuneOptions(lr=2.0, schedule="linear")
    assert [learning_rate(line, s, 4, 2) for s in range(4)] == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert learning_rate(FinetuneOptions(lr=1.0, warmup_epochs=5.0), 0, 1, 3) > 0


def test_rows_and_steps_count_as_said():
    data = images(8, 40)
    assert steps_in(data, FinetuneOptions(epochs=3, batch_size=16)) == (2, 6)
    assert steps_in(data, FinetuneOptions(epochs=3, batch_size=16, max_steps=5)) == (2, 5)
    assert steps_in(data, FinetuneOptions(epochs=3, batch_size=64)) == (1, 3)
    seen = []
    options = FinetuneOptions(epochs=3, batch_size=16, max_steps=5, lr=0.04)
    history = finetune(seeded(0, float_net), data, options, log=seen.append)
    assert [(row["epoch"], row["step"]) for row in history.epochs] == [(1, 2), (2, 4), (3, 5)]
    assert list(history.epochs) == seen
    assert [row["lr"] for row in seen] == pytest.approx([learning_rate(options, s, 5, 2) for s in (1, 3, 4)])
    assert history.steps == 5


def test_every_epoch_sees_each_image_once_in_an_order_of_its_own():
    marked = TensorSplit(torch.arange(12.0).view(12, 1, 1, 1), torch.zeros(12, dtype=torch.int64), classes=2)
    orders = []
    for epoch in range(3):
        batches = [draw_batch(marked, epoch * 3 + k, 3, 4, seed=5)[0].flatten().tolist() for k in range(3)]
        orders.append([v for batch in batches for v in batch])
        assert sorted(orders[-1]) == list(range(12))
    assert orders[0] != orders[1] != orders[2]
    assert draw_batch(marked, 4, 3, 4, seed=6)[0].flatten().tolist() != draw_batch(marked, 4, 3, 4, seed=5)[0].flatten().tolist()


def test_decay_is_halved_at_three_bits_and_quartered_below():
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)], nn.LayerNorm(4))
    policy = Policy((str(k), (w, 32)) for k, w in enumerate((1, 2, 3, 4, 8, 32)))
    quantized = quantize(net, policy)
    optimizer = build_optimizer(quantized, FinetuneOptions(weight_decay=0.4, scale_lr=0.1))
    found = {id(p): (g["weight_decay"], g["lr_factor"]) for g in optimizer.param_groups for p in g["params"]}
    assert [found[id(quantized[k].weight)] for k in range(6)] == [(d, 1.0) for d in (0.1, 0.1, 0.2, 0.4, 0.4, 0.4)]
    assert all(found[id(quantized[k].bias)] == (0.0, 1.0) for k in range(6))
    assert all(found[id(quantized[k].weight_quantizer.scale)] == (0.0, 0.1) for k in range(5))
    assert found[id(quantized[6].weight)] == (0.0, 1.0)
    assert len(found) == sum(1 for _ in quantized.parameters())
    flat = build_optimizer(quantized, FinetuneOptions(weight_decay=0.4, low_bit_decay=False))
    decays = {id(p): g["weight_decay"] for g in flat.param_groups for p in g["params"]}
    assert all(decays[id(quantized[k].weight)] == 0.4 for k in range(6))
    left_out = build_optimizer(quantized, FinetuneOptions(), without=[quantized[0].weight])
    assert id(quantized[0].weight) not in {id(p) for g in left_out.param_groups for p in g["params"]}


def test_shared_and_frozen_parameters_are_trained_once_and_not_at_all():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    net[0].bias.requires_grad_(False)
    groups = build_optimizer(net, FinetuneOptions()).param_groups
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted([id(net[0].weight), id(net[1].bias)])


def test_scale_lr_zero_keeps_the_step_sizes():
    net = quantized_net()
    before = {n: p.detach().clone() for n, p in net.named_parameters() if n.endswith("scale")}
    finetune(net, images(7, 48), FinetuneOptions(epochs=1, batch_size=16, scale_lr=0.0))
    assert before
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters() if n in before)


# ---- resuming

RECIPES = {
    "sgd": {},
    "adam": {"optimizer": "adam", "lr": 0.005, "schedule": "linear"},
    "ema": {"ema": 0.6},
    "adam, ema, bins, warm-up": {"optimizer": "adam", "lr": 0.005, "ema": 0.9, "bins": 0.05, "bins_start": 0.2, "warmup_epochs": 1.5},
    "bfloat16, channels last": {"precision": "bfloat16", "channels_last": True},
    "odd end": {"max_steps": 7, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["quantized", "quantized with a teacher", "float"])
def test_resumed_runs_end_bit_for_bit_as_uninterrupted_ones(recipe, kind, tmp_path):
    make = (lambda: seeded(0, float_net)) if kind == "float" else quantized_net
    teacher = seeded(3, float_net) if "teacher" in kind else None
    data, options = images(10, 48), dataclasses.replace(QUICK, **RECIPES[recipe])
    whole = make()
    straight = finetune(whole, data, options, teacher=teacher, seed=4)
    for epoch in (1, 2):
        with pytest.raises(Stopped):
            finetune(make(), data, options, teacher=teacher, seed=4, out=tmp_path, log=stop_at(epoch))
    resumed = seeded(99, make)
    torch.manual_seed(1234)
    rows = []
    history = finetune(resumed, data, options, teacher=teacher, seed=4, out=tmp_path, log=rows.append)
    assert same(whole, resumed)
    assert history.steps == straight.steps
    assert [row["loss"] for row in history.epochs] == [row["loss"] for row in straight.epochs]
    assert len(rows) < len(history.epochs)
    again = make()
    finetune(again, data, options, teacher=teacher, seed=4, out=tmp_path)
    assert same(whole, again)


def test_the_seed_decides_everything_and_the_global_generator_nothing():
    runs = []
    for seed, noise in ((1, 5), (1, 6), (2, 5)):
        net = quantized_net()
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        finetune(net, images(10, 48), QUICK, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        runs.append(net)
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_saving_checkpoints_changes_nothing(tmp_path):
    nets = [quantized_net(), quantized_net()]
    finetune(nets[0], images(10, 48), QUICK)
    finetune(nets[1], images(10, 48), QUICK, out=tmp_path)
    assert same(*nets)
    assert (tmp_path / CHECKPOINT).is_file()


def test_the_moving_average_lies_between_the_weights_it_averages():
    data, options = images(10, 32), FinetuneOptions(epochs=6, batch_size=32, lr=0.1, ema=0.5)
    net, seen = seeded(0, float_net), []
    finetune(net, data, options, log=lambda _: seen.append({k: v.clone() for k, v in net.state_dict().items()}))
    plain = seeded(0, float_net)
    finetune(plain, data, FinetuneOptions(epochs=6, batch_size=32, lr=0.1))
    assert not same(net, plain)
    for name, value in net.state_dict().items():
        stack = torch.stack([s[name] for s in seen]).float()
        assert torch.equal(stack[-1], plain.state_dict()[name].float())
        assert bool((value >= stack.amin(0) - 1e-6).all())
        assert bool((value <= stack.amax(0) + 1e-6).all())


def test_memory_order_is_put_back():
    net = quantized_net()
    finetune(net, images(10, 32), FinetuneOptions(epochs=1, batch_size=16, channels_last=True))
    assert all(p.is_contiguous() for p in net.parameters())


# ---- refusals


def poison(net, layer):
    def log(row):
        if row["epoch"] == 2:
            net.get_submodule(layer).weight.data.fill_(float("nan"))

    return log


@pytest.mark.parametrize("layer", ["4", "7"])
@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_a_nan_loss_stops_names_the_layer_and_keeps_the_checkpoint(layer, kind, tmp_path):
    net = quantized_net() if kind == "quantized" else seeded(0, float_net)
    with pytest.raises(Stopped):
        finetune(net, images(10, 48), QUICK, out=tmp_path, log=stop_at(2))
    kept = (tmp_path / CHECKPOINT).read_bytes()
    options = FinetuneOptions(epochs=3, batch_size=16, lr=0.05, checkpoint_seconds=1e6)
    with pytest.raises(TrainingError) as caught:
        finetune(net, images(10, 48), options, out=tmp_path, log=poison(net, layer))
    text = str(caught.value)
    assert text.startswith(f"the loss is nan at step 6, first seen in layer '{layer}")  # or its quantizer
    assert "'; lower lr or check the data; the last good checkpoint is" in text
    assert str(tmp_path / CHECKPOINT) in text
    assert "\n" not in text
    assert (tmp_path / CHECKPOINT).read_bytes() == kept


def test_a_loss_that_runs_away_is_an_error_that_says_lower_lr():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Linear(16, CLASSES))
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+, first seen in .*lower lr"):
        finetune(net, images(10, 48), FinetuneOptions(epochs=40, batch_size=16, lr=1e18))


def test_a_nan_that_no_layer_makes_names_the_network_or_the_loss():
    class Log(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(36, CLASSES)

        def forward(self, x):
            return torch.log(-self.fc(x.flatten(1)).square() - 1)

    with pytest.raises(TrainingError) as caught:
        finetune(Log(), images(10, 48), QUICK)
    assert "first seen in the network's own forward;" in str(caught.value)


def test_empty_data():
    class Nothing:
        classes = 3

        def __len__(self):
            return 0

    with pytest.raises(DataError, match="fine-tuning got an empty data set; give at least one image"):
        finetune(quantized_net(), Nothing(), QUICK)


def test_labels_that_the_network_has_no_output_for():
    data = TensorSplit(torch.zeros(16, 1, 6, 6), torch.arange(16) % 5, classes=5)
    with pytest.raises(DataError, match="the network has 3 outputs and the labels run to 4; give it 5 outputs"):
        finetune(seeded(0, float_net), data, QUICK)


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    finetune(quantized_net(), images(10, 32), QUICK, out=tmp_path)
    kept = (tmp_path / CHECKPOINT).read_bytes()
    other = FinetuneOptions(epochs=3, batch_size=16, lr=0.01, weight_decay=0.0, checkpoint_seconds=0.0)
    with pytest.raises(RunError, match=r"was made with other fine-tuning options \(lr, weight_decay\); use another --out, or the old ones"):
        finetune(quantized_net(), images(10, 32), other, out=tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == kept
    only_saving = FinetuneOptions(epochs=3, batch_size=16, lr=0.05, checkpoint_seconds=9.0)
    finetune(quantized_net(), images(10, 32), only_saving, out=tmp_path)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    finetune(quantized_net(), images(10, 32), QUICK, out=tmp_path)
    wider = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))
    with pytest.raises(RunError, match=r"belongs to another network \(.*\); use another --out") as caught:
        finetune(wider, images(10, 32), QUICK, out=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_network_of_other_widths_is_another_network(tmp_path):
    """Its tensors have the same names and shapes, so only the widths tell."""

    def at(bits):
        return quantize(seeded(0, float_net), Policy({"0": (8, 32), "4": (bits, 32), "7": (8, 32)}))

    finetune(at(2), images(10, 32), QUICK, out=tmp_path)
    for bits in (4, 1):  # one changes the groups of the optimizer, the other nothing
        with pytest.raises(RunError, match=r"belongs to another network \(its layers have other widths\); use another --out"):
            finetune(at(bits), images(10, 32), QUICK, out=tmp_path)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    finetune(quantized_net(), images(10, 32), QUICK, out=tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(RunError, match="damaged"):
        finetune(quantized_net(), images(10, 32), QUICK, out=tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 0}, "epochs=0 is below 1"),
        ({"batch_size": 0}, "batch_size=0 is below 1"),
        ({"lr": -1.0}, "lr=-1.0 is below 0"),
        ({"bins": -0.1}, "bins=-0.1 is below 0"),
        ({"ema": 1.0}, "ema=1.0 and bins_start=0.25 must be below 1"),
        ({"bins_start": 1.0}, "ema=0.0 and bins_start=1.0 must be below 1"),
        ({"max_steps": 0}, "max_steps"),
        ({"warmup_epochs": -1.0}, "warmup_epochs"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"optimizer": "adamw"}, "optimizer"),
        ({"schedule": "step"}, "schedule"),
        ({"precision": "float16"}, "precision"),
        ({"bins_reduction": "max"}, "bins_reduction"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(TrainingError, match=text) as caught:
        FinetuneOptions(**options)
    assert "\n" not in str(caught.value)


def test_bins_with_nothing_quantized_train_as_without():
    nets = [seeded(0, float_net), seeded(0, float_net)]
    for net, bins in zip(nets, (0.0, 0.1), strict=True):
        finetune(net, images(10, 32), FinetuneOptions(epochs=1, batch_size=16, bins=bins))
    assert same(*nets)
    assert not any(isinstance(m, QuantLayer) for m in nets[0].modules())


def test_mixup_blends_pairs_in_one_proportion():
    torch.manual_seed(0)
    x = torch.eye(6)
    mixed, target = blend(x, torch.arange(6), 1.0, 6)
    assert torch.allclose(mixed, target)  # images that are their own labels show the same blend
    assert torch.allclose(target.sum(1), torch.ones(6))
    own = target.diagonal()
    assert len({round(float(share), 6) for share in own if share < 1}) == 1


def test_mixup_trains_with_and_without_a_teacher_and_repeats():
    options = dataclasses.replace(QUICK, mixup=0.5)
    for teacher in (None, seeded(3, float_net).eval()):
        nets = [quantized_net() for _ in range(3)]
        losses = [
            finetune(net, images(1, 64), o, teacher=teacher).epochs[-1]["loss"]
            for net, o in zip(nets, (options, options, QUICK), strict=True)
        ]
        assert same(nets[0], nets[1])
        assert losses[0] == losses[1] != losses[2]


def test_mixup_pads_labels_to_the_networks_outputs():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES + 4))
    history = finetune(net, images(1, 64), dataclasses.replace(QUICK, mixup=0.5))
    assert math.isfinite(history.epochs[-1]["loss"])


def test_a_last_step_that_diverges_is_an_error():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))
    loud = TensorSplit(100 * torch.randn(64, 1, 6, 6), torch.arange(64) % CLASSES)
    with pytest.raises(TrainingError, match=r"after the last step '1\.weight' holds values that are not finite"):
        finetune(net, loud, dataclasses.replace(QUICK, epochs=1, max_steps=1, lr=3e38))


def bright(seed, n):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (n,), generator=generator)
    x = torch.rand(n, 1, 6, 6, generator=generator) * 0.3
    for k in range(CLASSES):
        x[y == k, :, 2 * k : 2 * k + 2] += 0.6
    return TensorSplit(x, y, classes=CLASSES)


def test_it_stops_at_an_accuracy_and_stays_stopped(tmp_path):
    options = dataclasses.replace(QUICK, epochs=40, stop_at="contrast:1>=0.95")
    net, selection = seeded(0, float_net), bright(2, 60)
    history = finetune(net, bright(1, 160), options, selection=selection, out=tmp_path)
    goals = [row["goal"] for row in history.epochs]
    assert 1 <= len(goals) < 40
    assert goals[-1] >= 0.95 > max(goals[:-1], default=0)
    assert history.steps == 10 * len(goals)
    again = seeded(3, float_net)
    assert finetune(again, bright(1, 160), options, selection=selection, out=tmp_path).steps == history.steps
    assert same(net, again)


def test_a_killed_training_with_a_goal_ends_alike(tmp_path):
    options = dataclasses.replace(QUICK, epochs=6, stop_at="clean>=1.0", ema=0.9)

    def kill(row):
        if row["epoch"] == 2:
            raise Stopped

    whole, parts = (seeded(0, float_net) for _ in range(2))
    expected = finetune(whole, bright(1, 80), options, selection=bright(2, 60))
    with pytest.raises(Stopped):
        finetune(parts, bright(1, 80), options, selection=bright(2, 60), out=tmp_path, log=kill)
    found = finetune(parts, bright(1, 80), options, selection=bright(2, 60), out=tmp_path)
    assert same(whole, parts)
    assert [row["goal"] for row in found.epochs] == [row["goal"] for row in expected.epochs]


def test_a_goal_needs_images_and_must_be_one():
    with pytest.raises(TrainingError, match=r"stop_at='clean>=0.9' needs images to be judged on; give selection="):
        finetune(float_net(), bright(1, 40), dataclasses.replace(QUICK, stop_at="clean>=0.9"))
    with pytest.raises(TrainingError, match="stop_at is 'clean'; give a condition and a fraction"):
        FinetuneOptions(stop_at="clean")


def test_options_without_a_goal_know_checkpoints_of_before_there_were_goals(tmp_path):
    from bitwright import runs

    finetune(seeded(0, float_net), bright(1, 40), QUICK, out=tmp_path)
    assert "stop_at" not in runs.load_tree(tmp_path / CHECKPOINT)["options"]
