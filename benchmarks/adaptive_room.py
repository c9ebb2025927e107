"""How much could bits that follow quality gain at all? A network at each uniform width, and the best width for each quality.

    python benchmarks/adaptive_room.py --data-root DATA --recipe fashion-resnet8-dqmq [--weights FILE] [--budgets W1A1 W2A2 W3A3 W4A4]
        [--at W2A2 W3A3] [--epochs 6] [--seeds 0 1 2]

Trains the recipe's network on its mixed data at every uniform width (as the arm ``uniform`` of benchmarks/adaptive.py) and looks at each
corruption and severity of the mix. Then, as if quality were known and a network of every width were at hand, it takes for each quality
the width that gives the highest mean accuracy at no more than the mean cost of each of ``--at``: widths by a Lagrange multiplier. What
that gains over this width for all images is the room for bits that follow corruption and severity and nothing else of an image. Half of
the test images choose the widths and the other half says what they gain, and the halves change places. Writes
results/adaptive-room-NAME.csv: a row per seed and quality with the accuracy at each width, and one a seed and cost with the gain.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import environment, write

from adaptive import job_of, options_of, threads
from bitwright.costs import BitOps
from bitwright.data.quality import TEST_SEED, Condition, Mix, MixedSplit
from bitwright.evaluation import evaluate
from bitwright.policy import Bits, Policy
from bitwright.quant import quantize
from bitwright.training import finetune

PRICES = np.linspace(0, 1, 20001)
Floats = NDArray[np.float64]


def qualities(mix: Mix) -> dict[str, float]:
    """Return each quality of a mix with its share."""
    kinds, levels = sum(mix.corruptions.values()), sum(mix.severities.values())
    return {"clean": mix.clean} | {
        f"{name}:{level}": (1 - mix.clean) * often / kinds * count / levels
        for name, often in mix.corruptions.items()
        for level, count in mix.severities.items()
        if often * count > 0
    }


def seen(budget: str, seed: int, arguments: argparse.Namespace) -> tuple[float, dict[str, Any], dict[str, float]]:
    """Return the BitOps of a uniform width, which test images are right under each quality, and the shares of the qualities."""
    job = job_of(seed, arguments)
    width = Bits(*(int(part) for part in budget[1:].split("A")))
    ends = [name for name, allowed in job.choices.items() if len(allowed) == 1]
    policy = Policy((name, job.choices[name][0] if name in ends else width) for name in job.trace.names)
    base = job.data.test
    assert isinstance(base, MixedSplit)
    shares = qualities(base.mix)
    with threads(arguments.threads):
        images = job.data.example(512)
        model = quantize(job.network, policy, calibration=images, correct=("batchnorm",))
        finetune(model, job.data.fit, options_of("uniform", job, arguments.rate, arguments.epochs), seed=seed)
        few, correct = base.base.take(arguments.probe), {}
        for name in shares:
            kind, _, level = name.partition(":")
            split = MixedSplit(few, Mix(clean=1.0), TEST_SEED) if not level else Condition(kind, int(level)).split(few, base.mix, TEST_SEED)
            correct[name] = evaluate(model, split).correct
    return float(BitOps().total(job.trace.sites, policy)), correct, shares


def best(accuracy: Floats, costs: Floats, shares: Floats, limit: float) -> NDArray[np.int64]:
    """Return the width ``[Q]`` of each quality, for accuracies ``[Q, B]`` and costs ``[B]``, within a mean cost."""
    found, top = None, -1.0
    for price in PRICES:
        chosen = (accuracy - price * costs / limit).argmax(1)
        mean = float(shares @ costs[chosen])
        value = float(shares @ accuracy[np.arange(len(chosen)), chosen])
        if mean <= limit * (1 + 1e-9) and value > top:
            found, top = chosen, value
    assert found is not None
    return found


def gain(correct: Mapping[str, list[torch.Tensor]], costs: Floats, shares: Mapping[str, float], at: int) -> float:
    """Return the gain in points of the widths chosen on one half of the images, on the other."""
    right = np.stack([np.stack([one.numpy() for one in each]) for each in correct.values()]).astype(float)  # [Q, B, N]
    weights, places, gains = np.array(list(shares.values())), np.arange(len(right)), []
    for part in (0, 1):
        chosen = best(right[:, :, part::2].mean(2), costs, weights, costs[at])
        judged = right[:, :, 1 - part :: 2].mean(2)
        gains.append(float(weights @ (judged[places, chosen] - judged[:, at])))
    return 100 * float(np.mean(gains))


def main() -> None:
    """Train, look, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fashion-resnet8-dqmq")
    parser.add_argument("--name", default="fashion", help="of the result file")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--weights", type=Path, help="the trained float network; by default the recipe trains one")
    parser.add_argument("--runs", type=Path, default=Path("runs/adaptive-room"))
    parser.add_argument("--budgets", nargs="+", default=["W1A1", "W2A2", "W3A3", "W4A4"])
    parser.add_argument("--at", nargs="+", default=["W2A2", "W3A3"], help="the widths whose cost is to be kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=0.04)
    parser.add_argument("--epochs", type=float, default=6.0)
    parser.add_argument("--probe", type=int, default=2000, help="test images of each corruption and severity")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the recipe")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if not set(arguments.at) <= set(arguments.budgets):
        parser.error(f"--at {' '.join(arguments.at)}: each must be among --budgets {' '.join(arguments.budgets)}")
    made_by, rows = environment(), []
    for seed in arguments.seeds:
        found = {budget: seen(budget, seed, arguments) for budget in arguments.budgets}
        costs = np.array([found[budget][0] for budget in arguments.budgets])
        shares = found[arguments.at[0]][2]
        correct = {quality: [found[budget][1][quality] for budget in arguments.budgets] for quality in shares}
        for quality, share in shares.items():
            top1 = {f"top1_{b}": float(one.double().mean()) for b, one in zip(arguments.budgets, correct[quality], strict=True)}
            rows.append({"seed": seed, "quality": quality, "share": share, "n": arguments.probe, **top1, **made_by})
        for at in arguments.at:
            points = gain(correct, costs, shares, arguments.budgets.index(at))
            rows.append({"seed": seed, "quality": "gain in points", "at": at, "n": arguments.probe, "gain": points, **made_by})
            print(f"seed {seed}: the best width for each quality gains {points:+.2f} points at the cost of {at}", flush=True)
    print(write(f"adaptive-room-{arguments.name}", rows))


if __name__ == "__main__":
    main()
