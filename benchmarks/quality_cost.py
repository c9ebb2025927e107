"""Measure what a training batch of mixed quality costs beside a training step of ResNet-20: processor time on one thread.

OMP_NUM_THREADS=1 python benchmarks/quality_cost.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from record import environment, mean_interval, write
from torch.nn.functional import cross_entropy

from bitwright.data import CORRUPTIONS, Mix, MixedSplit, TensorSplit
from bitwright.data.corruptions import SEVERITIES
from bitwright.models import build
from bitwright.training.finetune import draw_batch

BATCH, RUNS, SEED = 128, 10, 0
EVERY = Mix(dict.fromkeys(CORRUPTIONS, 1.0), dict.fromkeys(SEVERITIES, 1.0), clean=0.05, held_out=())


def timed(work: Callable[[int], object]) -> dict[str, float]:
    """Return the processor's milliseconds of a call: n, mean and interval, the first call left out."""
    taken = []
    for k in range(RUNS + 1):
        started = time.process_time()
        work(k)
        taken.append(1000 * (time.process_time() - started))
    return mean_interval(taken[1:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    pixels = torch.randint(256, (2000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    plain = TensorSplit(pixels, torch.arange(2000) % 10, mean=(0.485,) * 3, std=(0.229,) * 3, augment="crop-flip")
    mixed, every = (MixedSplit(plain, mix, SEED) for mix in (Mix(), EVERY))
    model = build("cifar_resnet20").train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = draw_batch(plain, 0, 15, BATCH, SEED)

    def step(k: int) -> None:
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    works: dict[str, Callable[[int], object]] = {
        "batch, clean": lambda k: draw_batch(plain, k, 15, BATCH, SEED),
        "batch, default mix": lambda k: draw_batch(mixed, k, 15, BATCH, SEED),
        "batch, all 19 corruptions at 5 severities": lambda k: draw_batch(every, k, 15, BATCH, SEED),
        "ResNet-20 step, float": step,
    }
    measured = {name: timed(work) for name, work in works.items()}
    rows = [{"what": name, "batch": BATCH, "milliseconds": row.pop("mean"), **row, "seed": SEED} for name, row in measured.items()]
    print(write("quality-cost", [{**row, **environment()} for row in rows]))
