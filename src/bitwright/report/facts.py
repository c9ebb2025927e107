"""What a run directory says: its files, read once, with what is missing left empty."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.errors import RunError
from bitwright.exporters import spelled_fallbacks
from bitwright.policy import Bits, Policy
from bitwright.runs import Run, read_jsonl
from bitwright.settled import FILE, outdated, read_policy

Row = Mapping[str, Any]
SPENT = 0.95
"""A policy that spends less of every budget leaves something on the table."""


@dataclass(frozen=True)
class Facts:
    """The files of a run.

    Attributes:
        manifest: versions, fingerprint, recipe and stages.
        recipe: the recipe's YAML text.
        sites: site records of sites.json, in execution order.
        budgets: budget records of sites.json.
        latency: of sites.json, where the latency table of a budget was measured.
        policy: the policy found, if there is one.
        search: the lines of search.jsonl.
        found: search.json.
        curves: the rows of float.jsonl and finetune.jsonl, by stage.
        statistics: per layer, in-bin variance and entropy before and after fine-tuning.
        evaluation: evaluation.json.
        baselines: baselines.json.
        artefact: export/export.json.
        certificate: certificate.json, of a search on a proxy.
        additivity: additivity.json, of a check whether the loss is additive.
        adaptive: adaptive.json, what an adaptive network does by the quality of its inputs.
    """

    manifest: Row
    recipe: str
    sites: tuple[Row, ...]
    budgets: tuple[Row, ...]
    latency: Row
    policy: Policy | None
    search: tuple[Row, ...]
    found: Row
    curves: Mapping[str, tuple[Row, ...]]
    statistics: Row
    evaluation: Row
    baselines: Row
    artefact: Row
    certificate: Row
    additivity: Row
    adaptive: Row

    @property
    def name(self) -> str:
        """The recipe's name."""
        return str(self.manifest["recipe"].get("name", "run"))

    @property
    def description(self) -> str:
        """The recipe's description."""
        return str(self.manifest["recipe"].get("description", ""))


def read_facts(run_dir: str | Path) -> Facts:
    """Read a run directory, without what is of an earlier policy; raises `RunError` if it is none, or a file is damaged or edited."""
    run = Run.load(run_dir)
    sites = _json(run.path / "sites.json")
    recipe = run.path / "recipe.yaml"

    def of(stage: str, name: str) -> Row:
        return {} if outdated(run, stage) else _json(run.path / name)

    curves = [name for name in ("float", "finetune", "adaptive") if not outdated(run, name)]
    return Facts(
        manifest=run.manifest,
        recipe=recipe.read_text("utf-8") if recipe.is_file() else "",
        sites=tuple(sites.get("sites", ())),
        budgets=tuple(sites.get("budgets", ())),
        latency=sites.get("latency", {}),
        policy=read_policy(run) if (run.path / FILE).is_file() else None,
        search=tuple(read_jsonl(run.path / "search.jsonl")),
        found=_json(run.path / "search.json"),
        curves={name: tuple(read_jsonl(run.path / f"{name}.jsonl")) for name in curves},
        statistics=of("finetune", "statistics.json"),
        evaluation=of("evaluate", "evaluation.json"),
        baselines=of("baselines", "baselines.json"),
        artefact=of("export", "export/export.json"),
        certificate=_json(run.path / "certificate.json"),
        additivity=_json(run.path / "additivity.json"),
        adaptive=_json(run.path / "adaptive.json"),
    )


def expected_bits(facts: Facts) -> tuple[list[float], dict[str, list[float]]]:
    """Return the steps of the search trajectory and, per free site, the expected weight width at each.

    It is the mean of a site's gate over its choices where the method logs gates, else the width that was proposed.
    """
    choices = {site["name"]: [Bits(*bits) for bits in site["choices"]] for site in facts.sites}
    free = [name for name, allowed in choices.items() if len({bits.w for bits in allowed}) > 1]
    lines = [line for line in facts.search if not line.get("uniform") and line.get("proposed")]
    if len(lines) < 2:
        return [], {}
    return [float(line["step"]) for line in lines], {name: [_expected(line, name, choices[name]) for line in lines] for name in free}


def _expected(line: Row, name: str, allowed: list[Bits]) -> float:
    gates = line.get("gates") or {}
    gate = gates.get(f"{name}:w") or gates.get(name)
    if not gate or not sum(gate):
        return float(line["proposed"][name][0])
    widths = [bits.w for bits in allowed] if len(gate) == len(allowed) else sorted({bits.w for bits in allowed})
    return float(sum(share * width for share, width in zip(gate, widths, strict=True)) / sum(gate))


def alarms(facts: Facts) -> list[str]:
    """Return what a reader should know before trusting the result, one sentence each."""
    found = []
    if facts.found.get("status") == "stopped":
        found.append("The search was stopped by a step or time limit, or at an accuracy, before the method was done.")
    if facts.found.get("alarm"):
        found.append(facts.found["alarm"])
    if facts.certificate and not facts.certificate["safe"]:
        found.append("The policy is not safe to transfer from its proxy: " + "; ".join(facts.certificate["reasons"]) + ".")
    tables = (facts.latency, (facts.artefact.get("latency") or {}).get("table", {}))
    found += dict.fromkeys(table["elsewhere"] for table in tables if table.get("elsewhere"))
    if facts.additivity.get("warning"):
        found.append(facts.additivity["warning"])
    if facts.artefact.get("float_fallbacks"):
        found.append(fallback_alarm(facts.artefact["float_fallbacks"]))
    found += _search_alarms(facts)
    found += _unspent(facts)
    found += _accuracy_alarms(facts)
    return found


def fallback_alarm(fallbacks: Mapping[str, str]) -> str:
    """Return what is to be known of layers that do not run in integers."""
    count = f"{len(fallbacks)} layer{'s' * (len(fallbacks) != 1)} of 8 bits or fewer"
    return f"In the exported file {count} do{'es' * (len(fallbacks) == 1)} not run in integers: {spelled_fallbacks(fallbacks)}."


def _search_alarms(facts: Facts) -> list[str]:
    """Bits that never moved, and collapse of every site to one width."""
    found = []
    _, paths = expected_bits(facts)
    still = [name for name, values in paths.items() if max(values) - min(values) < 0.05]
    if still:
        listed = ", ".join(still[:6]) + (" …" if len(still) > 6 else "")
        found.append(f"The bits of {len(still)} of {len(paths)} sites never moved during the search: {listed}.")
    if facts.policy is not None and len(paths) > 1 and len({facts.policy[name].w for name in paths}) == 1:
        found.append("Every free site ended at the same weight width: the search collapsed to a uniform policy.")
    last: Row = facts.search[-1] if facts.search else {}
    if last.get("repaired"):
        found.append("The method's last proposal broke the budget; the nearest feasible policy was taken instead.")
    if (last.get("note") or {}).get("short"):
        found.append(f"The search took {last['step']} steps, too few to see what a width is worth: leave out its epochs and max_steps.")
    if (last.get("note") or {}).get("collapsed"):
        found.append("Nearly every bit-width fell to its lowest candidate: the budget leaves no choice, or the search moved too fast.")
    return found


def _unspent(facts: Facts) -> list[str]:
    """Say when even the tightest budget is far from spent: wider bits were free."""
    pairs = zip(facts.found.get("costs", ()), facts.budgets, strict=False)
    shares = [cost / budget["limit"] for cost, budget in pairs if budget["limit"]]
    if not shares or max(shares) >= SPENT:
        return []
    return [f"The policy spends {max(shares):.0%} of its tightest budget: wider bits would have fitted."]


def _accuracy_alarms(facts: Facts) -> list[str]:
    found = []
    own, uniform = facts.found.get("loss"), (facts.found.get("uniform") or {}).get("loss")
    if own is not None and uniform is not None and uniform < own:
        found.append(
            f"Before fine-tuning, the uniform policy of the same budget has the lower loss ({uniform:.4g} against {own:.4g}); "
            "the comparison after fine-tuning is the one that counts."
        )
    verdict = facts.baselines.get("random")
    if verdict and verdict["gap"] <= 2 * verdict["standard_error"]:
        measured = f"{100 * verdict['gap']:+.2f} points, standard error {100 * verdict['standard_error']:.2f}"
        rivals = f"the mean of {verdict['n']} random policies of the same budget"
        found.append(f"The found policy does not beat {rivals} by more than two standard errors ({measured}).")
    return found


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error}); restore it from a copy, or run its stage again") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: expected an object; restore it from a copy, or run its stage again")
    return content
