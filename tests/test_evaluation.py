"""Evaluation: known answers, intervals, and one clear line for what cannot be evaluated."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from bitwright.data import TensorSplit
from bitwright.errors import DataError, TrainingError
from bitwright.evaluation import Evaluation, evaluate, paired_difference, score, wilson


def split(n=40, classes=7):
    images = torch.randn(n, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    return TensorSplit(images, torch.arange(n) % classes, classes=classes)


class Net(nn.Module):
    def __init__(self, outputs=7):
        super().__init__()
        self.flat, self.norm, self.drop, self.linear = nn.Flatten(), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, outputs)

    def forward(self, x):
        return self.linear(self.drop(self.norm(self.flat(x))))


def test_known_answers():
    torch.manual_seed(0)
    model, data = Net(), split()
    result = evaluate(model, data, batch_size=7)
    x, y = data.batch(torch.arange(40))
    model.eval()
    logits = model(x)
    order = logits.argsort(1, descending=True)
    right = order[:, 0] == y
    assert result.n == 40
    assert result.top1 == right.sum().item() / 40
    assert result.top5 == pytest.approx((order[:, :5] == y[:, None]).any(1).float().mean().item())
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-6)
    assert torch.equal(result.correct, right)
    assert result.per_class[3] == right[y == 3].float().mean().item()
    assert json.loads(json.dumps(result.to_dict()))["top1"] == result.top1


def test_the_size_of_a_batch_does_not_matter():
    torch.manual_seed(0)
    model = Net()
    assert torch.equal(evaluate(model, split(), batch_size=1).correct, evaluate(model, split(), batch_size=500).correct)


def test_the_model_is_left_as_it_was():
    model = Net()
    model.drop.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate(model, split())
    assert model.training
    assert model.norm.training
    assert not model.drop.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_class_without_images_has_no_accuracy():
    assert score(torch.eye(3)[:2], torch.tensor([0, 1]), 3).per_class == (1.0, 1.0, None)
    assert score(torch.eye(3)[:2], torch.tensor([0, 1]), 3).top5 is None


def test_what_cannot_be_evaluated():
    model = Net()
    model.linear.weight.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"logits of image 0 \(and 39 more of 40\) are nan.*lower the learning rate"):
        evaluate(model, split())
    with pytest.raises(DataError, match="label 5 and there are 5 classes"):
        evaluate(Net(5), split())
    with pytest.raises(DataError, match=r"gives shape \(40, 1, 2, 4\) for 40 images"):
        evaluate(nn.Identity(), split())


@pytest.mark.parametrize(("successes", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (9173, 10000, 0.9117, 0.9225)])
def test_wilson(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_covers():
    rng = np.random.default_rng(0)
    inside = [low <= 0.9 <= high for low, high in (wilson(int(k), 50) for k in rng.binomial(50, 0.9, 2000))]
    assert 0.93 < np.mean(inside) < 0.975
    with pytest.raises(ValueError, match="3 successes of 2 trials"):
        wilson(3, 2)


def known(correct):
    return Evaluation(float(correct.float().mean()), None, len(correct), 0.0, (0.0, 1.0), (), correct)


def test_paired_difference_equals_a_plain_bootstrap():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.rand(400, generator=draw) < 0.9, torch.rand(400, generator=draw) < 0.8
    result = paired_difference(known(a), known(b), seed=1)
    assert result.difference == pytest.approx((a.float() - b.float()).mean().item())
    values = (a.int() - b.int()).numpy()
    plain = np.random.default_rng(0).choice(values, (4000, 400)).mean(1)
    assert result.interval == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=0.004)
    assert result == paired_difference(known(a), known(b), seed=1)
    assert result.significant
    assert not paired_difference(known(a), known(a)).significant
    with pytest.raises(DataError, match="400 images and the other 10"):
        paired_difference(known(a), known(b[:10]))
