"""The verbs of deployment: list targets, check a policy against one, verify an artefact from the outside."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bitwright import models
from bitwright.errors import ExportError, TargetError
from bitwright.exporters import Verification, get, verify
from bitwright.job import Job
from bitwright.latency import FILE as LATENCY
from bitwright.latency import SECONDS, TURNS, fingerprint, measure_table
from bitwright.latency import Table as LatencyTable
from bitwright.policy import Policy
from bitwright.problem import build_choices
from bitwright.profile import model_and_example
from bitwright.report.terminal import new_console
from bitwright.sites import trace
from bitwright.targets import Target, available, get_target

Log = Callable[[str, Mapping[str, Any]], None]


def targets_command(arguments: argparse.Namespace) -> dict[str, Any]:
    """List the deployment targets: what runs there, as what, and what else must be on a grid."""
    chosen = [get_target(arguments.name)] if arguments.name else [get_target(name) for name in available()]
    for target in chosen:
        _show_target(target)
    return {"targets": {target.name: target.model_dump(mode="json") for target in chosen}}


def _show_target(target: Target) -> None:
    out = sys.stdout
    reads = f"reads {target.exporter}" if target.exporter else "no file is written for it"
    out.write(f"{target.name} (version {target.version}, {reads}): {target.about}\n")
    for kind, rules in target.layers.items():
        for rule in rules:
            faster = {True: ", faster", False: ", no faster", None: ""}[rule.faster]
            out.write(f"    {kind}: W{_spelled(rule.w)} A{_spelled(rule.a)} runs as {rule.runs}{faster}\n")
    if target.points:
        out.write(f"    8-bit points: {', '.join(target.points)}\n")
    for note in target.notes:
        out.write(f"    {note}\n")


def _spelled(widths: tuple[int, ...]) -> str:
    return ",".join(map(str, sorted(widths)))


def check_policy(job: Job, name: str | None, policy: Policy | None) -> dict[str, Any]:
    """Check a policy, by default the run's own, against a target, by default the run's own, and say which of its points the run lacks.

    Raises:
        TargetError: some sites do not run there; the message names each of them and its nearest widths that do.
    """
    target = job.target if name is None else get_target(name)
    if target is None:
        raise TargetError("export --check: the run has no target; give --target NAME, one of " + ", ".join(available()))
    policy = job.policy if policy is None else policy
    job.trace_names(policy)
    target.check(job.trace, policy)
    sites = {site.name: target.runs(site, policy[site.name]) for site in job.trace.sites}
    sys.stdout.write(f"{len(sites)} sites run on {target.name}\n")
    missing = _missing_points(job, target, policy)
    if missing:
        ask = f"run the recipe with --target {target.name}, or with quantize.points: [{', '.join(target.points)}]"
        found = f"the run has no 8-bit points for {', '.join(missing)}, so layers beside such tensors may run in float"
        sys.stdout.write(f"! {found}; {ask}\n")
    return {"target": target.name, "version": target.version, "violations": [], "runs": sites, "missing_points": missing}


def _missing_points(job: Job, target: Target, policy: Policy) -> list[str]:
    """Return the kinds of points that a target needs and a run has not; none where no activation is quantized."""
    if all(bits.a > 8 for bits in policy.values()):
        return []
    return [kind for kind in target.points if kind not in (job.quantize_options.points or ())]


def verify_command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Verify an artefact: read it again, count the levels of its tensors, compare with its policy, run it."""
    model = models.build(arguments.model) if arguments.model else None
    verified = verify(arguments.artefact, to=arguments.to, model=model)
    _show_verification(verified)
    return verified.to_dict()


def _show_verification(verified: Verification) -> None:
    table = Table(title=f"{verified.path} ({verified.to})", title_justify="left")
    for column in ("tensor", "kind", "bits", "stored as", "levels", "allowed"):
        table.add_column(column, justify="left" if column in ("tensor", "kind", "stored as") else "right")
    for row in verified.tensors:
        counted = ["–" if number is None else str(number) for number in (row.levels, row.allowed)]
        table.add_row(row.name, row.kind, str(row.bits), row.stored, *counted)
    new_console().print(table)
    known = verified.answer is not None
    answer = f"its answer within {100 * (verified.answer or 0):.3g} % of the network's" if known else "no answer in it to compare with"
    ran = f"run on {verified.samples} samples, {answer}" if verified.samples else "not run here"
    sys.stdout.write(f"{verified.path}: keeps its policy of {len(verified.policy)} sites; {ran}\n")


# ---- latency


def measure_latency(job: Job, save: str | None, policies: int | None, judged: int) -> dict[str, Any]:
    """Time random policies of a job's network on its target's runtime and write the table; see `bitwright.latency`."""
    if job.target is None:
        raise TargetError("profile --measure: give --target, such as openvino-x86, or --measure METHOD with --sensitivity")

    def log(text: str) -> None:
        job.log("latency", {"status": text})

    _check_counts(policies, judged)
    example, file = job.data.example(2), Path(save) if save is not None else job.run.path / LATENCY
    table = measure_table(job.untrained, job.trace, example, job.target, job.choices, policies=policies, judged=judged, log=log)
    return _kept(table, file, judged)


def measure_model(name: str, shape: str, target: Target, file: Path, policies: int | None, judged: int, log: Log) -> dict[str, Any]:
    """Time random policies of an untrained network by name: what a layer takes does not depend on its weights."""
    _check_counts(policies, judged)
    model, example = model_and_example(name, shape)
    traced, widths = trace(model.eval(), example), target.widths()
    choices = target.restrict(traced, build_choices(traced, *widths, pin_first="free", pin_last="free"))
    table = measure_table(
        model,
        traced,
        torch.cat([example, example]),
        target,
        choices,
        policies=policies,
        judged=judged,
        log=lambda text: log("latency", {"status": text}),
    )
    return _kept(table, file, judged)


def _check_counts(policies: int | None, judged: int) -> None:
    if judged < 0 or (policies is not None and policies < 1):
        raise TargetError(
            f"profile --measure: --policies {policies} --judge {judged}; give at least 1 policy to fit on, and 0 or more to judge"
        )


def _kept(table: LatencyTable, file: Path, judged: int) -> dict[str, Any]:
    table.save(file)
    record = {**table.to_dict(), "file": str(file)}
    judged_text = f"; {describe_errors(table.errors())}" if judged else ""
    sys.stdout.write(f"{file}: {len(table.terms)} sites on {table.target}, fitted on {len(table.fitted)} networks{judged_text}\n")
    return record


def describe_errors(errors: list[float]) -> str:
    """Return how well networks are predicted, for people.

    >>> describe_errors([0.01, 0.02, 0.03, 0.2])
    'predictions of 4 others are off by 2.5 % in the median, 20 % at worst'
    """
    middle, worst = 100 * statistics.median(errors), 100 * max(errors)
    return f"predictions of {len(errors)} others are off by {middle:.3g} % in the median, {worst:.3g} % at worst"


def measured_latency(job: Job) -> dict[str, Any]:
    """Return what a run's policy is predicted to take beside what it takes; nothing where there is no table or no runtime.

    ``machine`` is the one that measures now, and ``table`` says where the prediction is from.
    """
    if job.target is None or job.target.latency is None or not job.has_latency or not job.latency.covers(job.policy):
        return {}
    from bitwright.timing import Stopwatch  # noqa: PLC0415  (needs the extras of the runtimes)

    stopwatch = Stopwatch(job.untrained, job.trace, job.data.example(2), job.target)
    (timing,) = stopwatch.time([job.policy], SECONDS, TURNS)
    facts = {
        "target": job.latency.target,
        "machine": fingerprint(job.target.latency),
        "table": {"machine": dict(job.latency.machine), "elsewhere": job.latency.elsewhere()},
        "predicted_ns": job.latency.predict(job.policy),
        "measured_ns": timing.typical,
        "fastest_ns": timing.low,
        "median_ns": timing.high,
        "n": timing.runs,
    }
    return {"latency": facts}


# ---- flags, and what they change


def target_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--target``."""
    parser.add_argument("--target", dest="deploy", metavar="NAME", help="what it is deployed to: see `bitwright targets`, or a YAML file")


def targets_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `targets` takes."""
    parser.add_argument("name", metavar="TARGET", nargs="?", help="one target, or a YAML file of your own (default: all)")


def verify_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `verify` takes."""
    parser.add_argument("artefact", metavar="ARTEFACT", help="what `bitwright export` wrote: a file, or the folder of a bank")
    parser.add_argument("--to", metavar="FORMAT", help="its format (default: found out from the file)")
    parser.add_argument("--model", metavar="NAME", help="its float network, for a packed file of a network of your own")


def check_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `export --check` takes."""
    parser.add_argument("--check", action="store_true", help="only check the policy against the target, and write nothing")
    parser.add_argument("--policy", metavar="FILE", help="with --check: a policy.json instead of the run's own")


def target_overrides(name: str | None) -> list[str]:
    """Return the changes of a recipe that ``--target`` stands for: the target, and the format that it reads."""
    if name is None:
        return []
    target = get_target(name)
    if target.exporter is None:
        return [f"target={name}"]
    return [f"target={name}", f"export.to={target.exporter}", "export.options={}"]


def default_widths(name: str | None) -> Mapping[str, list[int]]:
    """Return the candidates of a search by flags: what runs on the target, else all integer weights with float activations."""
    weights, activations = (list(range(1, 9)), [32]) if name is None else get_target(name).widths()
    return {"weights": weights, "activations": activations}


def file_name(to: str) -> str:
    """Return what an artefact is called in a run.

    >>> file_name("packed")
    'model.safetensors'
    """
    suffixes = get(to).suffixes
    if not suffixes:
        raise ExportError(f"export: format '{to}' names no ending of its files; give --file")
    return f"model{suffixes[0]}"


__all__ = ["check_policy", "targets_command", "verify_command"]
