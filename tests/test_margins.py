"""Class margins: exact distances to decision boundaries."""

from __future__ import annotations

import torch
from torch import nn

from bitwright.data import TensorSplit
from bitwright.margins import class_margins, features_of, margins_of


def test_margin_is_the_distance_to_the_nearest_boundary() -> None:
    """Moving a sample by its margin along the boundary's normal makes two logits equal, and no others are nearer."""
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    z = torch.randn(50, 3, dtype=torch.float64)
    y = (z @ weight.T + bias).argmax(1)
    margins = class_margins(z, y, weight, bias)
    for sample, label, margin in zip(z, y, margins, strict=True):
        gaps = []
        for other in range(4):
            if other != label:
                normal = weight[label] - weight[other]
                moved = sample - normal / normal.norm() * margin
                logits = weight @ moved + bias
                gaps.append(float(logits[label] - logits[other]))
        assert min(abs(gap) for gap in gaps) < 1e-9
        assert min(gaps) > -1e-9


def test_one_class_has_no_boundary() -> None:
    assert class_margins(torch.rand(3, 2), torch.zeros(3, dtype=torch.long), torch.rand(1, 2)).tolist() == [float("inf")] * 3


def test_wrong_samples_have_negative_margins() -> None:
    assert float(class_margins(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), torch.eye(2))) < 0


def test_features_are_what_enters_the_layer_and_modes_stay() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2)).train()
    split = TensorSplit(torch.rand(6, 1, 2, 2), torch.arange(6) % 2)
    z, y = features_of(net, "3", split)
    x, _ = split.batch(torch.arange(6))
    assert torch.allclose(z, net[1](x.flatten(1)).detach())
    assert net[2].training
    assert y.tolist() == [0, 1, 0, 1, 0, 1]


def test_margins_do_not_change_with_the_scale_of_the_features() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    split = TensorSplit(torch.rand(20, 1, 2, 2), torch.arange(20) % 2)
    before = margins_of(net, "2", split)
    with torch.no_grad():
        net[1].weight *= 7
    assert torch.allclose(margins_of(net, "2", split), before, atol=1e-5)
