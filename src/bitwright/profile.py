"""A profile: the sites of a model, their work, what uniform widths cost, and what each width loses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from bitwright import models
from bitwright.additivity import FILE as ANSWER
from bitwright.additivity import check_additivity
from bitwright.costs import BitOps, Size, WeightBits
from bitwright.errors import BitwrightError, RunError, nearest
from bitwright.exporters.packed import packed_overhead
from bitwright.job import Job
from bitwright.memory import ActivationMemory
from bitwright.methods import available, get_method
from bitwright.outside import theirs
from bitwright.policy import Bits
from bitwright.problem import Problem
from bitwright.recipe import make_options
from bitwright.report import render
from bitwright.report.additive import correlation_text
from bitwright.report.table import amount, size_text
from bitwright.report.terminal import new_console
from bitwright.runs import write_text_atomic
from bitwright.sensitivity import FILE as TABLE
from bitwright.sensitivity import ScoredMethod, Sensitivity, other_quantizer, parse_bits
from bitwright.sites import Trace, trace

UNIFORM = tuple(Bits(w, a) for w, a in ((32, 32), (8, 8), (6, 6), (5, 5), (4, 4), (3, 3), (2, 2), (2, 32), (2, 4)))


def profile(
    job: Job,
    *,
    sensitivity: bool = False,
    measure: str = "kl",
    save: str | Path | None = None,
    additivity: bool = False,
    policies: int | None = None,
) -> dict[str, Any]:
    """Return the profile of a job's network as JSON-able data.

    Args:
        job: recipe, data and run directory.
        sensitivity: also give what every choice of every site adds to the loss (`bitwright.sensitivity`), as ``sensitivity``; ``alarm``
            says where the recipe quantizes otherwise than they are measured.
        measure: the method that scores; it takes its options from the recipe if that searches with it. A table of its that is in the
            run directory and not stale is taken instead of measuring again.
        save: write that table to a file, too.
        additivity: also check on random policies whether the loss is additive (`bitwright.additivity`), as ``additivity``, and keep
            the answer in the run directory.
        policies: how many of them; by default as many as `check_additivity` draws.

    Raises:
        BudgetError: no policy keeps the budgets close to which policies are drawn.
        BitwrightError: sensitivities need trained weights and there are none; or ``measure`` scores nothing.
    """
    result = {"model": job.recipe.model.name, **_table(job.trace, job.overhead)}
    if not sensitivity and save is None and not additivity:
        return result
    method = _method(job, measure)
    problem = job.problem_of(_network(job))
    if additivity:
        problem.check()
    table = _sensitivity(job, problem, method)
    if save is not None:
        table.save(save)
    if sensitivity or save is not None:
        result["sensitivity"], result["alarm"] = json.loads(table.to_json()), other_quantizer(job.quantize_options)
    if additivity:
        result["additivity"] = check_additivity(problem, table, policies).to_dict()
        write_text_atomic(job.run.inside(ANSWER), json.dumps(result["additivity"], indent=1) + "\n")
        if (job.run.path / "report.html").is_file():
            write_text_atomic(job.run.path / "report.html", render(job.run.path))
    return result


def model_and_example(name: str, shape: str) -> tuple[nn.Module, Tensor]:
    """Return an untrained network by name, and one input of a shape such as ``3x224x224``; raises `BitwrightError` for another text."""
    parts = shape.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BitwrightError(f"--shape {shape}: expected sizes of one input, for example 3x224x224")
    return models.build(name), torch.rand(1, *map(int, parts), generator=torch.Generator().manual_seed(0))


def profile_model(name: str, shape: str) -> dict[str, Any]:
    """Return the profile of a network by name on inputs of a shape such as ``3x224x224``.

    >>> profile_model("cifar_resnet20", "3x32x32")["macs"]
    40551040
    """
    model, example = model_and_example(name, shape)
    traced = trace(model, example)
    return {"model": name, **_table(traced, packed_overhead(model, traced))}


def _table(traced: Trace, overhead: int) -> dict[str, Any]:
    sites = traced.sites
    return {
        "sites": [asdict(site) for site in sites],
        "skipped": list(traced.skipped),
        "parameters": traced.parameters,
        "weights": sum(site.weights for site in sites),
        "macs": sum(site.macs for site in sites),
        "peak": ActivationMemory(traced.lifetimes).peak(sites, dict.fromkeys(traced.names, Bits(8, 8))),
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
        "activation_memory": ActivationMemory(traced.lifetimes, 8 if bits.a < 16 else 32).total(traced.sites, policy),
    }


def _network(job: Job) -> nn.Module:
    """Return the trained float network: the run's own, or with the recipe's weights."""
    section = job.recipe.model
    if (job.run.path / "float.safetensors").is_file():
        return job.network
    if section.weights is None and section.name in models.available():
        raise BitwrightError("profile: the network is not trained, and sensitivities need one; give a run, or --set model.weights=FILE")
    network = job.build()
    if section.weights is not None:
        models.load_weights(network, section.weights)
    return network


def _method(job: Job, measure: str) -> ScoredMethod:
    """Return the method of a measure, with the recipe's options where it searches with it."""
    kind = get_method(measure)
    if not issubclass(kind, ScoredMethod):
        scored = [name for name, method in available().items() if issubclass(method, ScoredMethod)]
        raise BitwrightError(f"--measure {measure}: scores no choices one by one; {nearest(measure, scored)}")
    own = job.recipe.search.options if job.recipe.search.method == measure else {}
    return make_options(kind, own, "search.options")


def _sensitivity(job: Job, problem: Problem, method: ScoredMethod) -> Sensitivity:
    """Return the run's own table if the method measured it and it is not stale, else what it measures now."""
    file = job.run.path / TABLE
    if file.is_file() and method.table is None:
        with suppress(RunError):  # measured otherwise, or changed since: measure anew
            table = Sensitivity.load(file)
            table.check(problem, method)
            table.scores(problem)
            return table
    with theirs(type(method)):
        return method.sensitivity(problem)


def show(result: Mapping[str, Any]) -> None:
    """Print a profile."""
    console = new_console()
    console.print(_sites_table(result))
    console.print(_uniform_table(result))
    console.print(f"activations are at their peak in '{result['peak']}' (all at 8 bits)", highlight=False)
    if "sensitivity" in result:
        for table in _sensitivity_tables(result["sensitivity"]):
            console.print(table)
        if result["alarm"]:
            console.print(f"! {result['alarm']}", highlight=False)
    if "additivity" in result:
        for text in _additivity_lines(result["additivity"]):
            console.print(text, highlight=False)


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
    for heading in ("widths", "BitOps", "bits a weight", "packed size", "peak of activations"):
        table.add_column(heading, justify="left" if heading == "widths" else "right")
    for widths, costs in result["uniform"].items():
        table.add_row(
            widths,
            amount(costs["bitops"]),
            f"{costs['weight_bits']:.3f}",
            *(size_text(costs[name]) for name in ("size", "activation_memory")),
        )
    return table


def _sensitivity_tables(content: Mapping[str, Any]) -> list[Table]:
    """Return what each width of the weights adds with the widest inputs, and if there is a choice each width of the inputs."""
    rows = {site: {parse_bits(text): value for text, value in row.items()} for site, row in content["values"].items()}
    tables = []
    for kind, what, other in (("w", "weights", "a"), ("a", "input activations", "w")):
        columns = {name: _widest(row, kind, other) for name, row in rows.items()}
        widths = sorted({width for column in columns.values() for width in column})
        if kind == "a" and all(len(column) == 1 for column in columns.values()):
            continue
        table = Table(title=f"loss added by one site's {what} at each width ('{content['measure']}')")
        table.add_column("site")
        for width in widths:
            table.add_column(f"{width} bit", justify="right")
        for name, column in columns.items():
            table.add_row(name, *(f"{column[width]:.4g}" if width in column else "" for width in widths))
        tables.append(table)
    return tables


def _widest(row: Mapping[Bits, float], kind: str, other: str) -> dict[int, float]:
    """Return the values by one width, where the other is the widest that the site offers."""
    most = max(getattr(bits, other) for bits in row)
    return {getattr(bits, kind): value for bits, value in row.items() if getattr(bits, other) == most}


def _additivity_lines(content: Mapping[str, Any]) -> list[str]:
    pairs = [("rank correlation", "spearman"), ("linear", "pearson"), ("rank correlation close to the budget", "near_budget")]
    found = "; ".join(f"{label} {correlation_text(content[name])}" for label, name in pairs)
    text = f"is the loss additive? foretold ('{content['measure']}') against measured, {len(content['points'])} policies: {found}"
    return [text, *([f"! {content['warning']}"] if content["warning"] else [])]
