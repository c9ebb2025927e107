from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import Planted, planted
from torch import Tensor

from bitwright.adaptive.actor import ActorOptions
from bitwright.adaptive.promise import Promise, alarms_of, check, decisions, settle_price
from bitwright.adaptive.training import AdaptiveHistory, AdaptiveOptions, train_adaptive
from bitwright.errors import RunError, TrainingError
from bitwright.training import FinetuneOptions

TRAINING = FinetuneOptions(epochs=12, batch_size=64, optimizer="adam", lr=0.01, weight_decay=0.0, checkpoint_seconds=0.0)


def trained(case: Planted, options: AdaptiveOptions, training: FinetuneOptions = TRAINING, **rest: Any) -> tuple[Any, AdaptiveHistory]:
    net = case.net(options.actor_options())
    return net, train_adaptive(net, case.fit, case.held_out, options, training, **rest)


def accuracy(net: Any, case: Planted, forced: Tensor | None = None) -> float:
    x, y = case.held_out.batch(torch.arange(len(case.held_out)))
    with torch.no_grad():
        return float((net.eval()(x, forced=forced).argmax(1) == y).double().mean())


@pytest.mark.parametrize("relaxation", ["concrete", "gaussian"])
def test_bits_go_to_the_images_that_need_them(relaxation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = planted(monkeypatch, ActorOptions(relaxation=relaxation))
    net, history = trained(case, AdaptiveOptions(relaxation=relaxation))
    shares, index = decisions(net, case.held_out)
    square, even = index[0, 0::2].double().mean(), index[0, 1::2].double().mean()  # 0 is one bit, 1 is four
    assert even - square > 0.7
    assert history.promise.met
    assert history.promise.mean <= 1
    assert history.promise.mean == pytest.approx(float(shares.double().mean()))
    assert accuracy(net, case) > 0.85
    other = index[:, torch.randperm(index.shape[1], generator=torch.Generator().manual_seed(0))]
    assert accuracy(net, case, other) < accuracy(net, case) - 0.04  # the same bits given to others are worth less


@pytest.mark.parametrize("kind", ["static", "random"])
def test_what_does_not_see_the_input_is_worse(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = planted(monkeypatch, ActorOptions(kind=kind))
    net, history = trained(case, AdaptiveOptions(actor=kind))
    assert history.promise.mean < 1.06  # a random one keeps its budget in the mean of many draws
    assert accuracy(net, case) < 0.85
    assert not any("degenerate" in alarm for alarm in history.alarms)  # an actor that reads nothing cannot be


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_that_does_not_hang_on_a_seed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = planted(monkeypatch)
    net, _ = trained(case, AdaptiveOptions(), seed=seed)
    index = decisions(net, case.held_out)[1]
    assert index[0, 1::2].double().mean() - index[0, 0::2].double().mean() > 0.7
    assert accuracy(net, case) > 0.85


def test_reinforce_learns_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    case = planted(monkeypatch)
    net, _ = trained(case, AdaptiveOptions(estimator="reinforce"))
    index = decisions(net, case.held_out)[1]
    assert index[0, 1::2].double().mean() > index[0, 0::2].double().mean()
    assert check(net, case.held_out).met


def test_reinforce_ends_at_decisions_as_they_are_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    options = AdaptiveOptions(estimator="reinforce", final=0.25)
    assert [options.noise(share) for share in (0.05, 0.5, 0.74, 0.75, 1.0)] == [1.0, 1.0, 1.0, 0.0, 0.0]
    case = planted(monkeypatch)
    _, history = trained(case, options, replace(TRAINING, epochs=8))
    assert history.epochs[-1]["spent"] == pytest.approx(1.0, abs=0.05)  # the weights' last epochs are within the budget


def test_the_price_meets_the_budget_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    case = planted(monkeypatch)
    net = case.net()
    settle_price(net, case.fit)
    assert 0.85 < check(net, case.fit).mean <= 1


def test_a_killed_training_goes_on_to_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = planted(monkeypatch)
    options, training = AdaptiveOptions(), replace(TRAINING, epochs=3)
    whole, _ = trained(case, options, training)

    class Killed(Exception):
        pass

    def kill(row: Mapping[str, Any]) -> None:
        if row["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        trained(case, options, training, out=tmp_path, log=kill)
    assert (tmp_path / "checkpoint/adaptive.safetensors").is_file()
    resumed, history = trained(case, options, training, out=tmp_path)
    assert history.steps == 24
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(RunError, match=r"adaptive.cold \(was 0.5, now 0.4\)\); use another --out"):
        trained(case, replace(options, cold=0.4), training, out=tmp_path)


def test_a_degenerate_actor_raises_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    case = planted(monkeypatch)
    net = case.net()
    for head in net.actor.heads:
        head.weight.data.zero_()
    monkeypatch.setattr("bitwright.adaptive.training._Trainer._step", lambda self: None)
    history = train_adaptive(net, case.fit, case.held_out, AdaptiveOptions(), replace(TRAINING, epochs=2))
    assert any("degenerate actor" in alarm for alarm in history.alarms)


def test_an_actor_that_is_too_sure_is_brought_within_its_budget_while_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    case = planted(monkeypatch)
    net = case.net()
    for head in net.actor.heads:
        head.bias.data[-1] += 30.0  # so sure of the widest choice that no gradient is left
    history = train_adaptive(net, case.fit, case.held_out, AdaptiveOptions(), replace(TRAINING, epochs=6))
    over = [(history.epochs[place]["spent"] - 1) / net.span for place in (1, -1)]  # of what decisions can move
    assert over[0] > 0.25
    assert over[1] < 0.05
    assert history.promise.met


def test_alarms_say_what_training_came_to(monkeypatch: pytest.MonkeyPatch) -> None:
    net = planted(monkeypatch).net()
    kept = Promise(0.97, (0.95, 0.99), 100, 50, agreement=0.8, met=True)
    assert alarms_of(net, kept, [{"spent": 1.02}]) == []
    cases = [
        ([{"spent": 1.19}], kept, "training ended at 119 % of the budget"),
        ([{"spent": 1.0, "alarm": "degenerate actor: it decides the same for all samples"}], kept, "at the end of training a degenerate"),
        ([], replace(kept, agreement=1.0), "^degenerate actor: 100.0 %"),
        ([], replace(kept, mean=1.02, interval=(0.99, 1.05), met=False), "it is not certain that the budget is kept: 102.00 %"),
        ([], replace(kept, mean=1.02, interval=(1.01, 1.03), met=False), "^the budget is not kept: 102.00 %"),
        ([], replace(kept, mean=0.7, interval=(0.69, 0.71)), "much of the budget is unspent: 70.00 %"),
    ]
    for rows, promise, text in cases:
        (alarm,) = alarms_of(net, promise, rows)
        assert re.search(text, alarm)


def test_a_price_leaves_room_for_the_noise_of_the_images_it_is_checked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    case = planted(monkeypatch)
    net = case.net()
    for head in net.actor.heads:
        torch.nn.init.normal_(head.weight, std=4.0, generator=torch.Generator().manual_seed(0))
    means = []
    for others in (None, 20000, 20):
        settle_price(net, case.fit, others=others)
        means.append(check(net, case.fit).mean)
    assert means[0] >= means[1] > means[2]


def test_options_without_a_meaning_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = planted(monkeypatch)
    with pytest.raises(TrainingError, match=r"knows no ema; leave finetune\.ema out"):
        trained(case, AdaptiveOptions(), replace(TRAINING, ema=0.9))
    with pytest.raises(TrainingError, match=r"knows no stop_at; leave finetune\.stop_at out"):
        trained(case, AdaptiveOptions(), replace(TRAINING, stop_at="clean>=0.9"))
    with pytest.raises(TrainingError, match=r"quiet=0\.05 is below warmup=0\.1"):
        AdaptiveOptions(quiet=0.05)
    with pytest.raises(TrainingError, match="warmup \\+ final below 1"):
        AdaptiveOptions(warmup=0.6, final=0.6)
    with pytest.raises(TrainingError, match="estimator='path' is unknown"):
        AdaptiveOptions(estimator="path")  # type: ignore[arg-type]


def test_a_loss_that_is_no_number_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    case = planted(monkeypatch)
    with pytest.raises(TrainingError, match=r"(the loss is (nan|inf) at step|not finite; lower finetune.lr)"):
        trained(case, AdaptiveOptions(), replace(TRAINING, optimizer="sgd", lr=1e38))


def test_one_policy_for_all_spends_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = planted(monkeypatch, ActorOptions(kind="static"), share=1.2)
    net, history = trained(case, AdaptiveOptions(actor="static"))
    assert history.promise.met
    assert decisions(net, case.held_out)[1].min() == 1  # four bits fit for all, so all have them
