"""Simulated methods of a comparison, with accuracies that a test chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitwright.standings import Contender

N = 2000


def contender(label: str, accuracies: Sequence[float], selection: float, key: str | None = None, n: int = N) -> Contender:
    """Simulate a method: seed k has the first images wrong, so that methods are paired, and a few more of its own."""
    correct: list[Tensor] = []
    rows: list[dict[str, Any]] = []
    for seed, accuracy in enumerate(accuracies):
        right = torch.arange(n) >= round((1 - accuracy) * n)
        flips = torch.randperm(n, generator=torch.Generator().manual_seed(1000 * seed + sum(map(ord, label))))[: n // 100]
        right[flips] = ~right[flips]
        search = {
            "method": "m",
            "status": "done",
            "seconds": 2.0,
            "sample_passes": 50,
            "steps": 3,
            "loss": 0.1,
            "costs": [95],
            "limits": [100],
        }
        costs = {"average_weight_bits": 2.0 + seed, "average_activation_bits": 4.0, "bitops": 10, "size": 100, "widths": 2}
        score = {"top1": float(right.float().mean()), "interval": [0.0, 1.0], "n": n, "selection": {"top1": selection, "loss": 1.0}}
        counts = {
            "weight_widths": {"2": 3},
            "activation_widths": {"4": 3},
            "made_by": {"commit": "abc"},
            "bits": {"a": [8, 8], "b": [2, 4], "c": [2, 4]},
        }
        rows.append(
            {"seed": seed, "key": f"{key or label}-{seed}", "label": label, "correct": "file", "search": search} | costs | score | counts
        )
        correct.append(right)
    return Contender(label, tuple(rows), tuple(correct))
