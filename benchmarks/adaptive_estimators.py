"""Which gradient should an actor learn from? The estimators beside the exact gradient, and on data where it is known who needs bits.

    python benchmarks/adaptive_estimators.py [--draws 400] [--seeds 0 1 2 3 4 5 6 7 8 9]

First, three sites of three widths (tests/adaptive/test_gradients.py): the cosine of one draw and of the mean over draws with the gradient
of the expected loss, summed over all 27 joint choices, and the length of the mean over that gradient's. Then the planted data of
tests/adaptive/planted.py, on which half of the images need one bit and half four: how often an actor finds that, that is gives the
second half at least 0.7 of the four-bit decisions more than the first, and the accuracy. Writes results/adaptive-estimators.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import environment, write
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "adaptive"))
import pytest
import test_gradients as sites
from planted import planted

from bitwright.adaptive.network import adapt
from bitwright.adaptive.promise import decisions
from bitwright.adaptive.relaxations import Draw
from bitwright.adaptive.training import ESTIMATORS, AdaptiveOptions, Estimator, train_adaptive
from bitwright.training import FinetuneOptions

TRAINING = FinetuneOptions(epochs=12, batch_size=64, optimizer="adam", lr=0.01, weight_decay=0.0)


def gradients(draws: int) -> list[dict[str, Any]]:
    """Return how each estimator's gradients lie to the exact one."""
    net, x, y = sites.three_sites()
    truth = sites.exact(net, x, y)
    drawn = [Draw.of((sites.S, sites.N, sites.K), torch.Generator().manual_seed(k), 1.0, 1.0) for k in range(draws)]
    estimates: dict[Estimator, Callable[[int], Tensor]] = {
        "counterfactual": lambda k: sites.difference(net, x, y, k),
        "pathwise": lambda k: sites.estimate(net, x, y, drawn[k]),
        "reinforce": lambda k: sites.scored(net, x, y, drawn[k]),
    }
    rows = []
    for name, estimate in estimates.items():
        each = torch.stack([estimate(k) for k in range(draws)])
        single = sum(sites.cosine(one, truth) for one in each) / draws
        mean = each.mean(0)
        cosines = {"cosine_of_one": single, "cosine_of_mean": sites.cosine(mean, truth)}
        rows.append({"what": "three sites", "estimator": name, "n": draws, **cosines, "length": float(mean.norm() / truth.norm())})
    return rows


def found(estimator: Estimator, seeds: list[int]) -> dict[str, Any]:
    """Return how often an actor finds who needs bits."""
    with pytest.MonkeyPatch.context() as patch:
        case = planted(patch)
        gaps, accuracies = [], []
        for seed in seeds:
            options = AdaptiveOptions(estimator=estimator)
            net = adapt(case.model, case.space, case.fit.batch(torch.arange(256))[0], options.actor_options(), seed=seed)
            train_adaptive(net, case.fit, case.held_out, options, TRAINING, seed=seed)
            index = decisions(net, case.held_out)[1][0].double()
            gaps.append(float(index[1::2].mean() - index[0::2].mean()))
            x, y = case.held_out.batch(torch.arange(len(case.held_out)))
            with torch.no_grad():
                accuracies.append(float((net.eval()(x).argmax(1) == y).double().mean()))
    share = sum(gap > 0.7 for gap in gaps) / len(gaps)
    return {"what": "planted", "estimator": estimator, "n": len(seeds), "found": share, "top1": sum(accuracies) / len(accuracies)}


def main() -> None:
    """Compare, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    arguments = parser.parse_args()
    rows = gradients(arguments.draws) + [found(name, arguments.seeds) for name in ESTIMATORS]
    for row in rows:
        print(*(f"{key} {value:.3f}" if isinstance(value, float) else value for key, value in row.items()), flush=True)
    print(write("adaptive-estimators", [{**row, **environment()} for row in rows]))


if __name__ == "__main__":
    main()
