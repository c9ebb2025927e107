"""How much could bits that follow the input gain at all? One network that runs at every width, and the best width for each image.

    python benchmarks/adaptive_room.py --data-root DATA --weights RESNET20.th [--recipe cifar10-resnet20-dqmq-quick] [--name cifar10]
        [--epochs 5] [--images 20000] [--seeds 0] [--set 'search.weights=[3]' finetune.compile=false]

Trains the recipe's network on its mixed data with the widths of every sample and site drawn (the arm ``random`` of
benchmarks/adaptive.py), so that it has learned to run at all of them, and passes held-out images of the mix through it with all sites at
each choice. Then every image is given the choice that is most likely right, as far as something that is known of it foretells that,
within the recipe's budget on the mean, by a Lagrange multiplier. What is known:

- ``nothing``: the best one choice for all, which is what the others are compared with;
- ``quality``: the true corruption and severity;
- ``statistics``: what the actor reads of the image itself, its squares and products;
- ``features after BLOCK``: mean and deviation of every channel there, in the narrowest pass: what a decision inside the network could see;
- ``answer``: how sure the narrowest pass is in the end, as if that pass cost nothing: more than any decision made on the way can see;
- ``cascade``: the same with the pass paid for, and the widest choice after it for the images it is least sure of;
- ``label``: which choices are right, the image's label and luck included: no decision can reach it.

Being wrong is foretold by ridge regression. Half of the images teach it and the other half is judged, and the halves change places.
Differences are paired over images, with normal 95 % intervals. Writes results/adaptive-room-NAME.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import environment, write
from torch import Tensor

import adaptive
from adaptive import job_of, train_own
from bitwright.adaptive.actor import deviation, image_statistics
from bitwright.adaptive.network import AdaptiveNet
from bitwright.data.quality import MixedSplit
from bitwright.pipeline import threads

Floats = NDArray[np.float64]
BATCH = 250
BISECTIONS = 60
Z = 1.96


@dataclass(frozen=True, eq=False)
class Seen:
    """What was seen of images: which choices are right ``[N, K]``, and what may be known of them ``[N, features]``."""

    correct: Floats
    quality: NDArray[np.int64]
    known: dict[str, Floats]
    sure: Floats


def seen(net: AdaptiveNet, split: MixedSplit) -> Seen:
    """Pass a split through the network at each choice, the narrowest last so that its features are the ones that stay."""
    places = list(dict.fromkeys(name.rpartition(".")[0] for name in net.space.names))
    modules, features = dict(net.network.named_modules()), dict.fromkeys(places, torch.zeros(0))

    def keep(place: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            value = output.float()
            features[place] = torch.cat([value.mean((2, 3)), deviation(value, (2, 3))], 1)

        return hook

    handles = [modules[place].register_forward_hook(keep(place)) for place in places]
    parts: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for start in range(0, len(split), BATCH):
            x, y, quality = split.labelled(torch.arange(start, min(start + BATCH, len(split))))
            right: list[Tensor] = []
            chance = torch.zeros(0)
            for choice in reversed(range(len(net.space.choices))):
                logits = net(x, forced=net.forced_to(choice, len(x))).float()
                right.insert(0, (logits.argmax(1) == y).float())
                chance = logits.softmax(1).sort(1, descending=True).values
            entropy = -(chance * chance.clamp_min(1e-9).log()).sum(1)
            one = {"correct": torch.stack(right, 1)}
            one |= {"quality": quality.corruption * 10 + quality.severity, "statistics": image_statistics(x)}
            one |= {f"features after {place}": value for place, value in features.items()}
            one["answer"] = torch.stack([chance[:, 0], chance[:, 0] - chance[:, 1], entropy], 1)
            for name, value in one.items():
                parts.setdefault(name, []).append(value)
    for handle in handles:
        handle.remove()
    whole = {name: torch.cat(values).double().numpy() for name, values in parts.items()}
    correct, quality = whole.pop("correct"), whole.pop("quality")
    return Seen(correct, quality.astype(np.int64), whole, whole["answer"][:, 0])


def foretold(features: Floats, wrong: Floats, *, products: bool) -> Floats:
    """Return how likely each image is wrong at each choice, as the other half's images foretell it."""
    x = (features - features.mean(0)) / (features.std(0) + 1e-6)
    if products:
        x = np.concatenate([x, *(x[:, [i]] * x[:, i:] for i in range(x.shape[1]))], 1)
    x = np.concatenate([np.ones((len(x), 1)), x], 1)
    result, even = np.zeros_like(wrong), np.arange(len(x)) % 2 == 0
    for half in (even, ~even):
        rest = x[~half]
        weights = np.linalg.solve(rest.T @ rest + x.shape[1] * np.eye(x.shape[1]), rest.T @ wrong[~half])
        result[half] = x[half] @ weights
    return result


def by_quality(quality: NDArray[np.int64], wrong: Floats) -> Floats:
    """Return for each image how often the other half's images of its quality are wrong at each choice."""
    result, even = np.zeros_like(wrong), np.arange(len(wrong)) % 2 == 0
    for kind in np.unique(quality):
        for half in (even, ~even):
            result[(quality == kind) & half] = wrong[(quality == kind) & ~half].mean(0)
    return result


def within(wrong: Floats, costs: Floats) -> NDArray[np.int64]:
    """Return the choice of each image that is least likely wrong, at the price at which the mean cost is the budget, or just less."""
    low, high = 0.0, 100.0
    for _ in range(BISECTIONS):
        price = (low + high) / 2
        low, high = (price, high) if costs[(wrong + price * costs).argmin(1)].mean() > 1 else (low, price)
    chosen: NDArray[np.int64] = (wrong + high * costs).argmin(1)
    return chosen


def rows_of(found: Seen, costs: Floats) -> list[dict[str, Any]]:
    """Return accuracy, mean cost and gain of every kind of knowledge."""
    wrong = 1 - found.correct
    count = np.arange(len(wrong))
    fits = [k for k in range(len(costs)) if costs[k] <= 1 + 1e-6]  # float32 sums
    base = max(fits, key=lambda k: float(found.correct[:, k].mean()))
    chosen = {"nothing": np.full(len(count), base), "quality": within(by_quality(found.quality, wrong), costs)}
    for name, features in found.known.items():
        chosen[name] = within(foretold(features, wrong, products=features.shape[1] < 20), costs)
    chosen["label"] = within(wrong, costs)
    paid = {name: costs[own] for name, own in chosen.items()}
    again = min(len(count), int((1 - costs[0]) / costs[-1] * len(count)))
    chosen["cascade"] = np.zeros(len(count), dtype=np.int64)
    chosen["cascade"][found.sure.argsort()[:again]] = len(costs) - 1
    paid["cascade"] = costs[0] + np.where(chosen["cascade"] > 0, costs[-1], 0.0)
    rows = []
    for name, own in chosen.items():
        right = found.correct[count, own]
        gain = 100 * (right - found.correct[:, base])
        half = Z * float(gain.std()) / len(count) ** 0.5
        figures = {"n": len(count), "top1": float(right.mean()), "share": float(paid[name].mean()), "gain_points": float(gain.mean())}
        rows.append({"known": name, **figures, "low": figures["gain_points"] - half, "high": figures["gain_points"] + half})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Train, look and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar10-resnet20-dqmq-quick")
    parser.add_argument("--name", default="cifar10", help="of the result file")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--weights", type=Path, help="the trained float network; by default the recipe trains one")
    parser.add_argument("--runs", type=Path, default=Path("runs/adaptive-room"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rate", type=float, default=0.04)
    parser.add_argument("--epochs", type=float, default=5.0, help="of a static arm's sample-passes")
    parser.add_argument("--images", type=int, default=20000, help="training images; 0 takes all")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the recipe")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    adaptive.LIMIT = arguments.images
    made_by, rows = environment(), []
    for seed in arguments.seeds:
        job = job_of(seed, arguments)
        with threads(arguments.threads):
            net, _ = train_own("random", job, arguments.rate, arguments.epochs, arguments.runs / f"{arguments.name}-random-seed{seed}")
            assert isinstance(job.data.selection, MixedSplit)
            found = seen(net.eval(), job.data.selection)
        costs = np.array([float(net.shares[:, k].double().sum()) + net.base for k in range(len(net.space.choices))])
        choices = {"choices": " ".join(str(bits) for bits in net.space.choices), "costs": " ".join(f"{cost:.3f}" for cost in costs)}
        alone = {"top1_each": " ".join(f"{value:.4f}" for value in found.correct.mean(0))}
        settings = {"epochs": arguments.epochs, "images": arguments.images or len(job.data.fit), "lr": arguments.rate}
        rows += [{"seed": seed, **row, **choices, **alone, **settings, **made_by} for row in rows_of(found, costs)]
    print(write(f"adaptive-room-{arguments.name}", rows))


if __name__ == "__main__":
    main()
