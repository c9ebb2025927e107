"""Simulates how often `bitwright compare` calls a difference significant that is not there, and how often it finds one that is.

    python benchmarks/significance.py [--repetitions 400]

Simulates six methods of 85 % accuracy and one of 92 % on 1,000 test images: an image is hard for all networks, to some share for the
networks of one method, and otherwise anew for each network; seeds shift a network's level. Each method is compared with the first by
`over_seeds`, and the comparisons are Holm-corrected together. Writes results/significance.csv: for each number of seeds, noise of seeds
and share of a method's own images, the rate at which one comparison, and any of five, is called significant where nothing differs (5 % is
what is promised), the rate at which the better method is found among six comparisons, and how much larger the stated error is than
the true deviation of the difference.
"""

from __future__ import annotations

import argparse
import math
from statistics import NormalDist, fmean, pstdev
from typing import Any

import numpy as np
import torch
from record import environment, write
from torch import Tensor

from bitwright.evaluation import corrected, over_seeds, wilson

IMAGES, SHARED = 1000, 0.6
ACCURACIES = (*[0.85] * 6, 0.92)


def trainings(seeds: int, noise: float, own: float, repetition: int) -> list[list[Tensor]]:
    """Return which images are right, ``[method][seed] -> bool [n]``."""
    draw = np.random.default_rng(repetition)
    hard, found = draw.normal(size=IMAGES), []
    for accuracy in ACCURACIES:
        fixed = math.sqrt(SHARED) * hard + math.sqrt(own) * draw.normal(size=IMAGES)
        levels = [-NormalDist().inv_cdf(1 - accuracy) + noise * draw.normal() for _ in range(seeds)]
        found.append([torch.from_numpy(fixed + math.sqrt(1 - SHARED - own) * draw.normal(size=IMAGES) < level) for level in levels])
    return found


def row_of(seeds: int, noise: float, own: float, repetitions: int) -> dict[str, Any]:
    """Return the rates of one setting."""
    single, any_of, detected, means, squares = 0, 0, 0, [], []
    for repetition in range(repetitions):
        first, *others = trainings(seeds, noise, own, repetition)
        estimates = [over_seeds(other, first, samples=400) for other in others]
        same = estimates[:-1]
        single += sum(one.p_value <= 0.05 for one in same)
        any_of += any(one.significant for one in corrected(same))
        detected += corrected(estimates)[-1].significant
        means += [one.mean for one in same]
        squares += [one.error**2 for one in same]
    row: dict[str, Any] = {"seeds": seeds, "noise_of_seeds": noise, "own_images": own, "n": repetitions}
    for name, count, n in (("single", single, len(means)), ("any_of_5", any_of, repetitions), ("found", detected, repetitions)):
        low, high = wilson(count, n)
        row |= {name: count / n, f"{name}_low": low, f"{name}_high": high}
    return row | {"error_over_deviation": math.sqrt(fmean(squares)) / pstdev(means)}


def main() -> None:
    """Simulate and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=400)
    arguments = parser.parse_args()
    made_by, rows = environment(), []
    for seeds in (3, 5):
        for noise in (0.0, 0.03, 0.1, 0.2):
            for own in (0.0, 0.2):
                row = row_of(seeds, noise, own, arguments.repetitions)
                print(row, flush=True)
                rows.append({**row, **made_by})
    print(write("significance", rows))


if __name__ == "__main__":
    main()
