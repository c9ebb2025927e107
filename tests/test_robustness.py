"""Accuracy under conditions: known answers, intervals over images, and goals."""

import json

import pytest
import torch
from torch import nn

from bitwright.data import Mix, MixedSplit, TensorSplit
from bitwright.errors import DataError, TrainingError
from bitwright.evaluation import evaluate, wilson
from bitwright.robustness import Accuracy, Goal, measure


class Contrast(nn.Module):
    """Says 1 for images of more contrast than its limit: what is right about an image can be told from its pixels."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return torch.stack([torch.full((len(x),), self.limit), x.flatten(1).std(1)], 1)


def split(n=40, classes=2):
    pixels = torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return TensorSplit(pixels, torch.ones(n, dtype=torch.long), classes=classes)


def test_known_answers():
    # standard deviation of uniform pixels is 0.29; contrast keeps 0.75, 0.5, 0.4, 0.3, 0.15 of it
    found = measure(Contrast(0.1), split(), "clean,contrast,mixed", mix=Mix({"contrast": 1}, {1: 1, 5: 1}, clean=0.5))
    table = {str(one.condition): one.accuracy.top1 for one in found.measured}
    assert table == {f"contrast:{k}": float(k < 4) for k in range(1, 6)} | {"clean": 1.0, "mixed": table["mixed"]}
    assert found.mean_corruption.top1 == pytest.approx(0.6)
    assert found.worst_severity == 4
    assert str(found.worst.condition) == "contrast:4"
    parts = found.measured[-1].by_severity
    assert {severity: part.top1 for severity, part in parts.items()} == {0: 1.0, 1: 1.0, 5: 0.0}
    assert sum(part.n for part in parts.values()) == 40
    assert table["mixed"] == pytest.approx((parts[0].n + parts[1].n) / 40)


def test_the_mean_is_over_corruptions_first():
    found = measure(Contrast(0.1), split(), "contrast:5,contrast:4,brightness:1")
    assert found.mean_corruption.top1 == pytest.approx(0.5)
    assert found.severities[5].top1 == 0
    assert measure(Contrast(0.1), split(), "clean").mean_corruption is None
    assert measure(Contrast(0.1), split(), "clean").worst_severity is None


def test_intervals_are_over_images():
    once = torch.arange(200) % 4 != 0
    assert Accuracy.of(once).interval == wilson(150, 200)
    assert Accuracy.of(once.double()).interval == wilson(150, 200)
    half = Accuracy.of(torch.full((200,), 0.75))  # every image right three times of four: they do not differ
    assert half.interval == pytest.approx(wilson(150, 200))
    generator = torch.Generator().manual_seed(0)
    apart = (torch.rand(4, 200, generator=generator) < 0.75).double().mean(0)
    width = [high - low for low, high in (Accuracy.of(apart).interval, wilson(150, 200))]
    assert width[0] == pytest.approx(width[1] / 2, rel=0.2)


def test_seeds_draw_anew_and_what_draws_nothing_runs_once():
    model = Contrast(0.1)
    found = measure(model, split(), "clean,contrast:1,gaussian_noise:5,mixed", seeds=(0, 1, 2))
    assert [one.seeds for one in found.measured] == [1, 1, 3, 3]
    assert model.seen == 40 * 8
    assert found.measured[2].accuracy.n == 40
    assert found.measured[3].correct.shape == (3, 40)


def test_a_split_of_mixed_quality_is_taken_as_it_was_before():
    mix = Mix({"contrast": 1}, {5: 1}, clean=0.25)
    data = MixedSplit(split(), mix, seed=0)
    result = evaluate(Contrast(0.1), data, conditions=("clean", "mixed"))
    clean, again = result.robustness.measured
    assert clean.accuracy.top1 == 1
    assert again.accuracy.top1 == result.top1 == float((data.quality.severity == 0).double().mean())
    assert evaluate(Contrast(0.1), data).robustness is None


def test_what_is_written_down():
    result = evaluate(Contrast(0.1), split(), conditions="clean,contrast").to_dict()
    record = json.loads(json.dumps(result))["quality"]
    assert record["mean_corruption_accuracy"] | {"interval": 0} == {
        "top1": pytest.approx(0.6),
        "interval": 0,
        "n": 40,
        "corruptions": 1,
        "all_common": False,
    }
    assert record["conditions"][0] == {"condition": "clean", "top1": 1.0, "interval": list(wilson(40, 40)), "n": 40, "seeds": 1}
    assert record["worst_severity"] == 4
    assert "quality" not in evaluate(Contrast(0.1), split()).to_dict()


def test_a_network_that_is_adaptive_sees_images_alone():
    calls = []

    class Curious(Contrast):
        def forward(self, *arguments, **named):
            calls.append((len(arguments), named))
            return super().forward(*arguments)

    measure(Curious(0.1), split(), "mixed")
    assert calls == [(1, {})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conditions": "fogg"}, "no condition 'fogg'; did you mean 'fog'"),
        ({"conditions": "clean", "seeds": ()}, r"seeds are \[\]; give at least one, each once"),
        ({"conditions": "clean", "seeds": (1, 1)}, r"seeds are \[1, 1\]; give at least one, each once"),
    ],
)
def test_what_cannot_be_measured(arguments, message):
    with pytest.raises(DataError, match=message):
        measure(Contrast(0.1), split(), **arguments)


def test_images_outside_0_and_1_cannot_be_corrupted():
    data = TensorSplit(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), classes=2)
    with pytest.raises(DataError, match="give pixels in 0 … 1"):
        evaluate(Contrast(0.1), data, conditions="fog:1")


def test_goals():
    goal = Goal.parse("contrast:3 >= 0.9")
    assert (str(goal.condition), goal.accuracy) == ("contrast:3", 0.9)
    assert goal.measure(Contrast(0.1), split()) == 1.0
    assert goal.measure(Contrast(0.2), split()) == 0.0


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("clean", TrainingError, "stop_at is 'clean'; give a condition and a fraction, for example gaussian_noise:3>=0.80"),
        ("clean>=90", TrainingError, "stop_at is 'clean>=90'; give a condition and a fraction"),
        ("clean>=x", TrainingError, "give a condition and a fraction"),
        ("fog>=0.5", TrainingError, "give the one severity of 'fog' that counts, for example fog:3"),
        ("fogg:3>=0.5", DataError, "did you mean 'fog'"),
    ],
)
def test_goals_that_cannot_be_read(text, error, message):
    with pytest.raises(error, match=message):
        Goal.parse(text)
