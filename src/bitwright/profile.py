"""A profile: the sites of a model, their work, what uniform widths cost, and what each width loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table

from bitwright import models
from bitwright.costs import BitOps, Size, WeightBits
from bitwright.errors import BitwrightError
from bitwright.exporters.packed import packed_overhead
from bitwright.job import Job
from bitwright.policy import Bits, Policy
from bitwright.quant.reference import ReferenceLoss
from bitwright.report.table import amount, size_text
from bitwright.report.terminal import new_console
from bitwright.sites import Trace, trace

UNIFORM = tuple(Bits(w, a) for w, a in ((32, 32), (8, 8), (6, 6), (5, 5), (4, 4), (3, 3), (2, 2), (2, 32), (2, 4)))


def profile(job: Job, *, sensitivity: bool = False) -> dict[str, Any]:
    """Return the profile of a job's network as JSON-able data.

    Args:
        job: recipe, data and run directory.
        sensitivity: also measure the loss (see `ReferenceLoss`) of every weight width at every site, all others in float32.

    Raises:
        BitwrightError: sensitivities need trained weights and there are none.
    """
    result = {"model": job.recipe.model.name, **_table(job.trace, job.overhead)}
    return {**result, "sensitivity": _sensitivity(job)} if sensitivity else result


def profile_model(name: str, shape: str) -> dict[str, Any]:
    """Return the profile of a network by name on inputs of a shape such as ``3x224x224``.

    >>> profile_model("cifar_resnet20", "3x32x32")["macs"]
    40551040
    """
    parts = shape.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BitwrightError(f"--shape {shape}: expected sizes of one input, for example 3x224x224")
    model = models.build(name)
    traced = trace(model, torch.zeros(1, *map(int, parts)))
    return {"model": name, **_table(traced, packed_overhead(model, traced))}


def _table(traced: Trace, overhead: int) -> dict[str, Any]:
    sites = traced.sites
    return {
        "sites": [asdict(site) for site in sites],
        "skipped": list(traced.skipped),
        "parameters": traced.parameters,
        "weights": sum(site.weights for site in sites),
        "macs": sum(site.macs for site in sites),
        "uniform": {repr(bits): _uniform(traced, overhead, bits) for bits in UNIFORM},
    }


def _uniform(traced: Trace, overhead: int, bits: Bits) -> dict[str, float]:
    """Return what one width pair costs with the first and last site at 8 bits, as budgets and papers count it."""
    ends = {traced.first, traced.last}
    pinned = bits if bits.w == 32 else Bits(8, 8 if bits.a < 16 else 32)
    policy = {site.name: pinned if site.name in ends else bits for site in traced.sites}
    weights = sum(site.weights for site in traced.sites)
    return {
        "bitops": BitOps().total(traced.sites, policy),
        "weight_bits": WeightBits().total(traced.sites, policy) / weights,
        "size": Size(overhead).total(traced.sites, policy),
    }


def _sensitivity(job: Job) -> dict[str, dict[str, float]]:
    """Return the loss of each weight width at each site, one site at a time."""
    section = job.recipe.model
    if (job.run.path / "float.safetensors").is_file():
        network = job.network
    elif section.weights is not None or section.name not in models.available():
        network = job.build()
        if section.weights is not None:
            models.load_weights(network, section.weights)
    else:
        raise BitwrightError("profile --sensitivity: the network is not trained; give a run directory, or --set model.weights=FILE")
    loss = ReferenceLoss(network, job.data.selection, job.data.fit, job.trace.sites, job.recipe.seed)
    everything = Policy((name, Bits(32, 32)) for name in job.trace.names)
    weighted = [site.name for site in job.trace.sites if site.operands == 1]
    widths = sorted(set(job.recipe.search.weights))
    return {name: {str(w): loss(everything.replace({name: Bits(w, 32)})) for w in widths} for name in weighted}


def show(result: Mapping[str, Any]) -> None:
    """Print a profile."""
    console = new_console()
    console.print(_sites_table(result))
    console.print(_uniform_table(result))
    if "sensitivity" in result:
        console.print(_sensitivity_table(result))


def _sites_table(result: Mapping[str, Any]) -> Table:
    table = Table(title=f"{result['model']}: {result['weights']:,} weights, {result['macs']:,} MACs an input")
    table.add_column("site")
    table.add_column("kind")
    for heading in ("weight", "weights", "MACs", "input activations"):
        table.add_column(heading, justify="right")
    for site in result["sites"]:
        shape = "×".join(map(str, site["weight_shape"]))
        table.add_row(site["name"], site["kind"], shape, f"{site['weights']:,}", f"{site['macs']:,}", f"{site['acts']:,}")
    return table


def _uniform_table(result: Mapping[str, Any]) -> Table:
    table = Table(title="one width pair everywhere, first and last site at 8 bits")
    for heading in ("widths", "BitOps", "bits a weight", "packed size"):
        table.add_column(heading, justify="left" if heading == "widths" else "right")
    for widths, costs in result["uniform"].items():
        table.add_row(widths, amount(costs["bitops"]), f"{costs['weight_bits']:.3f}", size_text(costs["size"]))
    return table


def _sensitivity_table(result: Mapping[str, Any]) -> Table:
    rows = result["sensitivity"]
    widths = list(next(iter(rows.values())))
    table = Table(title="loss (mean KL divergence from the float network) of one site's weights at each width")
    table.add_column("site")
    for width in widths:
        table.add_column(f"{width} bit", justify="right")
    for name, losses in rows.items():
        table.add_row(name, *(f"{losses[width]:.4f}" for width in widths))
    return table
