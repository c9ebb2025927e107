"""What a SEAM search on a proxy costs beside HAQ on the target, in sample-passes.

    python benchmarks/search_cost.py --data-root DATA --weights RESNET20.th [--episodes 200] [--arms cifar100 fashion_mnist]

HAQ searches on the target within the same budget. Two comparisons, as the claim of "up to 300 times" does not say which is meant:
its published search (600 episodes, each trains for an epoch of 20,000 images and is judged on 10,000: counted, not run) and the episode
at which the HAQ search that was run here (no training inside an episode, judged by the loss of any policy) first has a policy whose
loss is no higher than that of SEAM's policy, at its own cost and at the published cost of so many episodes. An image forward is one
sample-pass, backward two more. What is searched on the proxies, and its files, are those of benchmarks/transfer.py.
Writes results/search-cost.csv.
"""

from __future__ import annotations

from typing import Any

import torch
from record import environment, write
from transfer import Bench, flags, prepared

from bitwright import search
from bitwright.methods.haq import HAQ, HAQ_EPISODES

BATCHES, BATCH, JUDGED = 79, 256, 10_000
"""Of an episode of the published search: batches trained on, images in one, and images it is judged on."""
PUBLISHED = 3 * BATCHES * BATCH + JUDGED
"""Sample-passes of an episode of the published search."""


def rows_of(bench: Bench, arms: list[str], episodes: int) -> list[dict[str, Any]]:
    """Return a row for each proxy."""
    found = search(bench.problem, HAQ(episodes=episodes), out=bench.file("haq", f"-{episodes}"))
    trials = [trial.loss for trial in found.history]
    each = found.sample_passes / max(1, len(trials))
    rows = []
    for arm in arms:
        _, facts = bench.searched(arm)
        loss, passes = facts["loss"], facts["sample_passes"]
        reached = next((k for k, value in enumerate(trials, 1) if value <= loss), None)
        row = {"arm": arm, "seed": bench.seed, "seam_loss": loss, "seam_sample_passes": passes, "haq_episodes": len(trials)}
        row |= {"haq_best_loss": min(trials), "haq_sample_passes_an_episode": each, "haq_reached_at": reached}
        row |= {"ratio_published": HAQ_EPISODES * PUBLISHED / passes}
        if reached is not None:
            row |= {"ratio_reached": reached * each / passes, "ratio_reached_at_published_cost": reached * PUBLISHED / passes}
        else:
            row |= {"ratio_above": len(trials) * each / passes, "ratio_above_at_published_cost": len(trials) * PUBLISHED / passes}
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Measure and write the rows."""
    parser = flags(__doc__)
    parser.add_argument("--episodes", type=int, default=200, help="of the HAQ search that is run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    made_by, rows = environment(), []
    for seed in arguments.seeds:
        own = rows_of(prepared(arguments, seed), arguments.arms or ["cifar100", "fashion_mnist"], arguments.episodes)
        rows += [{**row, "budget": arguments.budget, "model": arguments.model, "threads": 1, **made_by} for row in own]
    if not arguments.no_write:
        columns = dict.fromkeys(key for row in rows for key in row)
        print(write("search-cost", [{key: row.get(key, "") for key in columns} for row in rows]))


if __name__ == "__main__":
    main()
