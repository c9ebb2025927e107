"""Evaluation: known answers, intervals, and one clear line for what cannot be evaluated."""

import json
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import nn

from bitwright.data import TensorSplit
from bitwright.errors import DataError, TrainingError
from bitwright.evaluation import Estimate, Evaluation, corrected, evaluate, holm, over_seeds, paired_difference, score, wilson


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


# ---- over seeds and images


def trainings(accuracies, n=2000, spread=0.0, shared=0.5, seed=0):
    """Simulate which images networks have right: ``[network][seed] -> bool [n]``; images are hard for all, seeds vary by ``spread``."""
    draw = np.random.default_rng(seed)
    hard = draw.normal(size=n)
    found = []
    for accuracy in accuracies:
        level = [-NormalDist().inv_cdf(1 - accuracy) + spread * draw.normal() for _ in range(3)]
        noise = [np.sqrt(shared) * hard + np.sqrt(1 - shared) * draw.normal(size=n) for _ in range(3)]
        found.append([torch.from_numpy(value < edge) for value, edge in zip(noise, level, strict=True)])
    return found


def test_the_error_of_one_seed_is_that_of_the_images():
    right = torch.arange(1000) % 10 != 0
    one = over_seeds([right])
    assert one.mean == 0.9
    assert one.error == pytest.approx(np.sqrt(0.09 / 1000), rel=0.03)
    assert one.freedom == np.inf
    assert one.interval() == pytest.approx(wilson(900, 1000), abs=0.002)


def test_the_error_equals_a_plain_resampling_of_seeds_and_images():
    a, b = trainings([0.9, 0.8], n=300, spread=0.1)
    values = np.stack([x.numpy().astype(float) - y.numpy() for x, y in zip(a, b, strict=True)])
    draw = np.random.default_rng(1)
    plain = []
    for _ in range(3000):
        seeds, images = draw.integers(0, 3, 3), draw.integers(0, 300, 300)
        per_seed = values[:, images].mean(1)
        plain.append(per_seed.mean() + np.sqrt(3 / 2) * (per_seed[seeds].mean() - per_seed.mean()))
    estimate = over_seeds(a, b)
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.error == pytest.approx(np.std(plain), rel=0.05)
    of_seeds = values.mean(1).var(ddof=1) / 3
    assert estimate.freedom == pytest.approx(2 * estimate.error**2 / of_seeds)
    assert estimate == over_seeds(a, b)


def test_seeds_that_differ_widen_the_interval():
    a, b = trainings([0.9, 0.85])
    calm = over_seeds(a, b)
    shifted = [row.clone() for row in a]
    shifted[0][:100], shifted[1][:100] = True, False
    torn = over_seeds(shifted, b)
    assert torn.error > 1.5 * calm.error
    assert 2 <= torn.freedom < 4 < calm.freedom
    assert torn.p_value > calm.p_value


def test_the_same_network_does_not_differ():
    (a,) = trainings([0.9])
    estimate = over_seeds(a, a)
    assert (estimate.mean, estimate.error, estimate.p_value, estimate.interval()) == (0.0, 0.0, 1.0, (0.0, 0.0))


def test_what_cannot_be_compared_over_seeds():
    a, b = trainings([0.9, 0.8])
    with pytest.raises(DataError, match="3 seeds of 2000 images against 2 seeds of 2000 images"):
        over_seeds(a, b[:2])
    with pytest.raises(DataError, match=r"the seeds have \[10, 2000\] images; evaluate every seed on the same split"):
        over_seeds([a[0], a[1][:10]])


def test_student_is_what_the_interval_uses():
    estimate = Estimate(0.02, 0.01, 2.0, 3, 100)
    assert estimate.interval() == pytest.approx((0.02 - 0.0430265, 0.02 + 0.0430265), abs=1e-6)
    assert estimate.p_value == pytest.approx(0.1835, abs=1e-4)


def test_holm_by_hand():
    # In order: 0.005 x 4, 0.01 x 3, 0.03 x 2 fails, and 0.04 x 1 may not be below that.
    found = holm([0.04, 0.005, 0.03, 0.01])
    assert [p for p, _ in found] == pytest.approx([0.06, 0.02, 0.06, 0.03])
    assert [share for _, share in found] == pytest.approx([0.05 / 2, 0.05 / 4, 0.05 / 2, 0.05 / 3])
    assert holm([]) == []
    assert holm([0.8, 0.9])[0][0] == 1.0


def test_a_corrected_interval_leaves_out_zero_exactly_where_it_is_significant():
    draw = np.random.default_rng(0)
    for _ in range(200):
        judged = corrected([Estimate(float(draw.normal(scale=0.02)), 0.007, 4.0, 3, 100) for _ in range(6)])
        for one in judged:
            assert one.significant == (one.interval[0] > 0 or one.interval[1] < 0) == (one.p_value <= 0.05)
            assert one.p_value >= one.estimate.p_value


@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_methods_that_are_the_same_are_rarely_told_apart(spread):
    """Five methods of the same accuracy against a sixth: in at most 5 % of comparisons may any of the five differ."""
    wrong = 0
    for seed in range(120):
        uniform, *others = trainings([0.85] * 6, n=300, spread=spread, seed=seed)
        wrong += any(one.significant for one in corrected([over_seeds(a, uniform, samples=400) for a in others]))
    assert wrong <= 11, f"{wrong} of 120"  # more than 11 would come up once in 33 times at a rate of 5 %


def test_a_difference_that_is_there_is_found():
    found = 0
    for seed in range(20):
        uniform, better, *same = trainings([0.85, 0.92, 0.85, 0.85, 0.85], spread=0.03, seed=seed)
        judged = corrected([over_seeds(a, uniform, samples=1000) for a in (better, *same)])
        found += judged[0].significant and judged[0].estimate.mean > 0
    assert found >= 17, f"{found} of 20"
