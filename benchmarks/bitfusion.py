"""SDQ's comparison on Bit Fusion, repeated on paper: ResNet-18 at 224 px, W3.61/A8 against uniform widths.

SDQ's own assignment of widths is not published, only its average. So beside the uniform rows stand the least and the most that any
policy of that average can take (exact integer programs over widths 1 to 8), and one drawn up the way SDQ is reported to spend bits:
more for layers with many MACs per weight. Weights are not needed: the cost depends on shapes alone.

    python benchmarks/bitfusion.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from record import environment, write

from bitwright import models
from bitwright.allocation import allocate
from bitwright.bitfusion import BitFusionCycles, BitFusionEnergy
from bitwright.costs import BitOps, Cost, WeightBits
from bitwright.policy import Bits, Policy
from bitwright.sites import Trace, trace

AVERAGE = 3.61
BATCHES = (1, 16)


def main() -> None:
    """Write results/bitfusion.csv."""
    traced = trace(models.build("resnet18"), torch.zeros(1, 3, 224, 224))
    rows = []
    for batch in BATCHES:
        costs = (BitFusionCycles(traced.first, batch), BitFusionEnergy(traced.first, batch))
        base = None
        for name, policy in policies(traced, costs[0]).items():
            row = measured(traced, policy, costs)
            base = row if name == "W4/A8" else base
            rows.append({"network": "resnet18", "input": "3x224x224", "batch": batch, "policy": name, **row, **environment()})
        for row in rows[-len(policies(traced, costs[0])) :]:
            assert base is not None
            row["cycles_of_w4a8"], row["energy_of_w4a8"] = (f"{row[key] / base[key]:.4f}" for key in ("cycles", "energy_pj"))
    print(write("bitfusion", rows))


def policies(traced: Trace, cycles: Cost) -> Mapping[str, Policy]:
    """Return uniform policies, first and last site at 8 bits, and three whose average weight width is that of SDQ."""
    ends = {traced.first, traced.last}
    uniform = {
        f"W{w}/A{a}": Policy((site.name, Bits(8, 8) if site.name in ends else Bits(w, a)) for site in traced.sites)
        for w, a in ((8, 8), (5, 8), (4, 8), (3, 8), (2, 8), (4, 4), (2, 4), (2, 2))
    }
    terms = [[cycles(site, bits) for bits in choices(site.name, ends)] for site in traced.sites]
    noise = [[site.macs * 4.0**-bits.w for bits in choices(site.name, ends)] for site in traced.sites]
    most = max(max(column) for column in terms)
    mixed = {
        "W3.61/A8 least cycles": drawn(traced, ends, terms, most),
        "W3.61/A8 by MACs": drawn(traced, ends, noise, 0),
        "W3.61/A8 most cycles": drawn(traced, ends, [[most - term for term in column] for column in terms], 0),
    }
    return {**uniform, **mixed}


def choices(name: str, ends: set[str]) -> tuple[Bits, ...]:
    """Return the widths of a site; the ends are pinned."""
    return (Bits(8, 8),) if name in ends else tuple(Bits(w, 8) for w in range(1, 9))


def drawn(traced: Trace, ends: set[str], values: Sequence[Sequence[float]], slack: float) -> Policy:
    """Return the policy of least value whose average is at most `AVERAGE`, and at least a hundredth of a bit less where ``slack``."""
    weights = sum(site.weights for site in traced.sites)
    bits = [[WeightBits()(site, choice) for choice in choices(site.name, ends)] for site in traced.sites]
    rows, limits = [bits], [int(AVERAGE * weights)]
    if slack:  # cheap policies would leave bits unused
        rows.append([[-term for term in column] for column in bits])
        limits.append(-int((AVERAGE - 0.01) * weights))
    index = allocate([np.asarray(column, dtype=float) for column in values], rows, limits)
    return Policy((site.name, choices(site.name, ends)[j]) for site, j in zip(traced.sites, index, strict=True))


def measured(traced: Trace, policy: Policy, costs: tuple[BitFusionCycles, BitFusionEnergy]) -> dict[str, object]:
    """Return what a policy takes."""
    cycles, energy = (cost.total(traced.sites, policy) for cost in costs)
    weights = sum(site.weights for site in traced.sites)
    return {
        "average_weight_bits": f"{WeightBits().total(traced.sites, policy) / weights:.3f}",
        "gbitops": f"{BitOps().total(traced.sites, policy) / 1e9:.2f}",
        "cycles": cycles,
        "milliseconds": f"{cycles / 500e3:.3f}",
        "energy_pj": energy,
        "millijoule": f"{energy / 1e9:.3f}",
    }


if __name__ == "__main__":
    main()
