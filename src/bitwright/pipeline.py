"""The stages of a run: float, search, finetune, evaluate, baselines, export, report.

Each stage is a function of a `Job` (a recipe and its run directory) that reads and writes files of that directory alone, so
each can be run again by itself, and a run that was killed goes on with the same command.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright import runs, settled
from bitwright.adaptive.files import check_budget
from bitwright.adaptive.session import Normalised, load_bank
from bitwright.adaptive.stages import NEEDS as ADAPTIVE_NEEDS
from bitwright.adaptive.stages import adaptive_stage, bank_stage, evaluate_adaptive
from bitwright.baselines import baselines_stage
from bitwright.certificate import certify
from bitwright.data import Split, parse_conditions
from bitwright.deployment import file_name, measured_latency
from bitwright.driver import SearchMethod
from bitwright.errors import RecipeError, RunError
from bitwright.evaluation import evaluate
from bitwright.exporters import export
from bitwright.exporters.packed import load
from bitwright.job import PROXY, Job
from bitwright.measure import found, searched
from bitwright.methods import get_method
from bitwright.models import available, load_weights
from bitwright.policy import Policy
from bitwright.recipe import ExportSection, Recipe, load_recipe, make_options
from bitwright.report import render
from bitwright.robustness import Goal
from bitwright.sensitivity import ScoredMethod, other_quantizer
from bitwright.stopping import Stop, watch
from bitwright.training import FinetuneOptions, finetune
from bitwright.training.losses import bin_statistics

CURVE_IMAGES = 2000
CURVE_POINTS = 50
"""The accuracy curve of a training is taken on so many selection images, at so many epochs at most."""
OF_POLICY = ("search.jsonl", "search.json", "certificate.json", "sensitivity.json", "additivity.json")
"""What a run knows of the policy that its search found, and not of another one."""
RESULTS = {"finetune": ("finetune.jsonl", "statistics.json"), "evaluate": ("evaluation.json",), "export": ("export/export.json",)}
"""What a stage says of its policy, by stage; `reopen` empties the baselines."""


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path | None = None,
    *,
    data_root: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    log: Callable[[str, Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run all stages of a recipe, or go on where the run in ``out`` stopped; return `summary`.

    Args:
        recipe: a bundled name, a YAML file, a mapping, or a `Recipe`.
        out: run directory; by default ``runs/<recipe name>``.
        data_root: the folder that holds the data sets.
        overrides: ``"a.b.c=value"`` texts.
        device: where the networks run; runs repeat bit for bit on ``cpu``.
        log: called with a stage's name and a row of numbers.

    Raises:
        BitwrightError: the recipe, the data, a budget or the run directory is wrong; nothing is lost.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    job = Job.open(recipe, Path(out or Path("runs") / recipe.name), data_root=data_root, device=device, log=log)
    return run_stages(job)


def run_stages(job: Job, stages: Sequence[str] = (), *, again: bool = False) -> dict[str, Any]:
    """Run the stages that are asked for and not finished, and those before them that they need; return `summary`.

    Args:
        job: the recipe and its run directory.
        stages: some of `STAGES`; by default all that the recipe has.
        again: run the named stages once more even if they are finished.

    Raises:
        BudgetError: a budget cannot be met; checked before anything is trained.
    """
    if again:
        reopen(job, stages)
    with threads(job.recipe.threads):
        _run_missing(job, stages)
    return summary(job)


def _run_missing(job: Job, stages: Sequence[str]) -> None:
    plan, needs = plan_of(job.recipe)
    for name in stages:
        if name not in plan:
            raise RunError(f"{job.run.path}: an adaptive run has no stage '{name}'; it has {', '.join(plan)}")
    wanted = [name for name in plan if (name in stages if stages else _in_recipe(job.recipe, name))]
    asked = [name for name in plan if name in wanted or any(name in needs[stage] for stage in wanted)]
    todo = [name for name in asked if not settled.done(job.run, name)]
    if todo and job.run.finished("report"):
        todo.append("report")  # what it shows is about to change
    if "adaptive" in todo:
        check_trainable(job.recipe)
        check_budget(job)  # a budget that cannot be kept is an error before anything is trained
    elif "float" in todo or "search" in todo:
        check_trainable(job.recipe)
        job.problem_of(job.untrained).check()
        job.proxy_data  # noqa: B018  (a proxy that is not there is an error before anything is trained)
    for name in plan:
        if name in todo or (name in asked and not settled.done(job.run, name)):  # a search may settle on another policy than before
            _do(job, name, plan[name])


def _do(job: Job, name: str, stage: Callable[[Job], dict[str, Any]]) -> None:
    """Run one stage and mark it as finished; what it left of another policy is forgotten first."""
    if settled.outdated(job.run, name):
        reopen(job, [name])
        for file in RESULTS.get(name, ()):
            (job.run.path / file).unlink(missing_ok=True)
    started = time.monotonic()
    job.log(name, {"status": "started"})
    facts = stage(job)
    job.run.finish(name, seconds=round(time.monotonic() - started, 2), **facts, **settled.marks(job.run, name))
    job.log(name, {"status": "finished", **job.run.manifest["stages"][name]})


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute on so many threads for a while: a sum may round otherwise on another number, and small networks lose time on many."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reopen(job: Job, stages: Sequence[str]) -> None:
    """Forget that some stages were finished, with what they left to resume from; their results stay until they are replaced."""
    job.run.reopen(*stages)
    leftovers = {
        "search": ("checkpoint/search-*", PROXY),
        "finetune": ("checkpoint/finetune*",),
        "float": ("float/*", PROXY),
        "baselines": ("baselines*",),
        "adaptive": ("checkpoint/adaptive*",),
    }
    for name in stages:
        for path in sorted(path for pattern in leftovers.get(name, ()) for path in job.run.path.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _in_recipe(recipe: Recipe, stage: str) -> bool:
    asked = {"baselines": recipe.baselines is not None, "export": recipe.export is not None, "report": recipe.report}
    return asked.get(stage, True)


def check_trainable(recipe: Recipe) -> None:
    """Refuse a network that nobody trained."""
    if recipe.model.weights is None and recipe.float_training is None and recipe.model.name in available():
        raise RecipeError(
            f"recipe {recipe.name}: '{recipe.model.name}' has neither model.weights nor a float section to train it; "
            "give --set model.weights=FILE, or --set float.epochs=N"
        )


# ---- the stages: each returns facts for the manifest


def float_stage(job: Job) -> dict[str, Any]:
    """Load the float network's weights, or train them; write float.safetensors."""
    section = job.recipe.model
    model = job.build()
    if section.weights is not None:
        load_weights(model, section.weights)
    elif job.recipe.float_training is not None:
        train(job, model, make_options(FinetuneOptions, job.recipe.float_training, "float"), "float", job.run.inside("float"))
        shutil.rmtree(job.run.path / "float", ignore_errors=True)
    runs.save_tree(job.run.inside("float.safetensors"), dict(model.state_dict()))
    return {"weights": section.weights or ("trained here" if job.recipe.float_training is not None else "as built")}


def search_stage(job: Job) -> dict[str, Any]:
    """Find the policy; write sites.json, search.jsonl, search.json and policy.json, after a proxy also certificate.json."""
    section = job.recipe.search
    method: SearchMethod[Any] = make_options(get_method(section.method), section.options, "search.options")
    problem = job.search_problem()
    write_json(job, "sites.json", job.sites_table())
    look, goal = _watch(job)

    def log(row: Mapping[str, Any]) -> None:
        look(row)
        job.log("search", row)

    result = searched(
        problem,
        method,
        job.run.path,
        stop=Stop(section.steps, section.seconds, goal),
        log=log,
        never_worse=section.never_worse,
        save_every=section.save_every,
    )
    uniform = result.uniform and {"loss": result.uniform.loss, "costs": list(result.uniform.costs), **job.describe(result.uniform.policy)}
    record = found(job, problem, section.method, result)
    if job.proxy is not None:
        write_json(job, "certificate.json", certify(job.problem, problem, result.policy))
    alarm = other_quantizer(job.quantize_options) if isinstance(method, ScoredMethod) else None
    write_json(job, "search.json", {**record, "uniform": uniform, **({} if alarm is None else {"alarm": alarm})})
    return {name: record[name] for name in ("method", "status", "steps", "loss", "costs")}


def _watch(job: Job) -> tuple[Callable[[Mapping[str, Any]], None], Callable[[], bool] | None]:
    """Return what sees every line of the search, and what stops it at the recipe's accuracy: that of the quantized network on selection."""
    text = job.recipe.search.stop_at
    if text is None:
        return lambda row: None, None
    goal = Goal.parse(text)
    earlier = runs.read_jsonl(job.run.path / "search.jsonl")
    return watch(lambda policy: goal.measure(job.quantize(policy), job.data.selection), goal.accuracy, earlier)


def finetune_stage(job: Job) -> dict[str, Any]:
    """Quantize the float network at the policy and fine-tune it; write model.safetensors and statistics.json."""
    model = job.quantize(job.policy)
    before = bin_statistics(model)
    if job.recipe.finetune is not None:
        options = make_options(FinetuneOptions, job.recipe.finetune, "finetune")
        train(job, model, options, "finetune", job.run.path, teacher=job.teacher)
    after = bin_statistics(model)
    runs.save_tree(job.run.inside("model.safetensors"), dict(model.state_dict()), **settled.marks(job.run, "finetune"))
    job.forget_quantized()
    write_json(job, "statistics.json", {name: {"before": before[name]._asdict(), "after": after[name]._asdict()} for name in before})
    return {}


def evaluate_stage(job: Job) -> dict[str, Any]:
    """Evaluate the float and the quantized network on the test split, which nothing before has seen, under the recipe's conditions."""
    section = job.recipe.evaluate
    return _evaluate(job, job.conditions, (0,) if section is None else section.seeds)


def _evaluate(job: Job, conditions: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Write evaluation.json and return the accuracies."""
    if job.recipe.adaptive is not None:
        return evaluate_adaptive(job, conditions, seeds)
    networks = {"float": (job.network, job.float_policy), "quantized": (job.quantized, job.policy)}
    results = {name: evaluate(network, job.data.test, conditions=conditions, seeds=seeds) for name, (network, _) in networks.items()}
    record = {name: {**result.to_dict(), **job.describe(networks[name][1])} for name, result in results.items()}
    write_json(job, "evaluation.json", record)
    return {name: result.top1 for name, result in results.items()}


def export_stage(job: Job) -> dict[str, Any]:
    """Write the artefact and check that it reproduces the network and keeps a size budget."""
    facts = {**export_file(job), **measured_latency(job)}
    write_json(job, "export/export.json", {name: value for name, value in facts.items() if name != "path"})
    return {"to": facts["to"], "bytes": facts["bytes"]}


def report_stage(job: Job) -> dict[str, Any]:
    """Render report.html from the files of the run."""
    runs.write_text_atomic(job.run.inside("report.html"), render(job.run.path))
    return {"file": "report.html"}


# ---- what several stages need


def train(job: Job, model: nn.Module, options: FinetuneOptions, stage: str, out: Path, teacher: nn.Module | None = None) -> None:
    """Train a network in place and keep its curve in ``<stage>.jsonl``: one row an epoch, with accuracy on selection images."""
    file = job.run.inside(f"{stage}.jsonl")
    every = max(1, options.epochs // CURVE_POINTS)
    images: Split = job.data.selection.take(CURVE_IMAGES)

    def log(row: Mapping[str, Any]) -> None:
        seen = {"selection": evaluate(model, images).top1} if row["epoch"] % every == 0 or row["epoch"] == options.epochs else {}
        runs.append_jsonl(file, {**row, **seen})
        job.log(stage, {**row, **seen, "epochs": options.epochs})

    history = finetune(model, job.data.fit, options, teacher=teacher, selection=job.data.selection, out=out, log=log, seed=job.recipe.seed)
    # A killed run logs the epochs after its last checkpoint twice: the last account of each is the true one.
    rows = {row["epoch"]: row for row in runs.read_jsonl(file)}
    kept = [rows.get(row["epoch"], dict(row)) for row in history.epochs]
    runs.write_text_atomic(file, "".join(json.dumps(row) + "\n" for row in kept))


def export_file(
    job: Job, to: str | None = None, path: str | Path | None = None, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Export the fine-tuned network; format, place and options are those of the recipe where they are not given.

    Raises:
        ExportError: an unknown format or option, or the file does not reproduce the network; nothing is then left of it.
    """
    if job.recipe.adaptive is not None:
        raise RunError(f"{job.run.path}: an adaptive network is exported as a bank; type `bitwright export {job.run.path}` alone")
    section = job.recipe.export or ExportSection()
    to = to or section.to
    chosen = {**(section.options if to == section.to else {}), **(options or {})}
    path = Path(path) if path is not None else job.run.inside("export", file_name(to))
    artefact = export(job.quantized, to, path, example=job.data.example(8), policy=job.policy, reference=job.reference, **chosen)
    for budget in job.budgets:
        if to == "packed" and budget.cost.name == "size" and artefact.size > budget.limit:  # packed_overhead promised a bound
            raise AssertionError(f"{path} has {artefact.size} bytes and the budget '{budget.text}' allows {budget.limit}")
    return {**artefact.to_dict(), "path": str(path)}


def evaluate_file(job: Job, path: str | Path, conditions: Sequence[str] = (), seeds: Sequence[int] = (0,)) -> dict[str, Any]:
    """Evaluate a packed file on the run's test split; raises `ExportError` if it cannot be read."""
    adaptive = job.recipe.adaptive is not None
    network = (Normalised(load_bank(path, job.untrained)) if adaptive else load(path, job.untrained)).to(job.device)
    return {"path": str(path), **evaluate(network, job.data.test, conditions=conditions, seeds=seeds).to_dict()}


def evaluate_under(job: Job, conditions: Sequence[str], seeds: Sequence[int] = (0,)) -> dict[str, Any]:
    """Evaluate a run's networks under other conditions than its recipe's; write evaluation.json and a report it had, return `summary`.

    Args:
        job: a run; the stages that its network needs are run if they are missing.
        conditions: such as ``clean``, ``gaussian_noise:3``, ``mixed``.
        seeds: draws of the corruptions.

    Raises:
        DataError: an unknown condition, before anything is run.
    """
    parse_conditions(conditions)
    if (job.recipe.adaptive or {}).get("actor") == "severity":
        raise RecipeError("evaluate --conditions: an actor of true severities is told them by its data set alone; leave --conditions out")
    run_stages(job, ["evaluate"])
    with threads(job.recipe.threads):
        _evaluate(job, conditions, seeds)
    if job.run.finished("report"):
        report_stage(job)
    return summary(job)


def derive(job: Job, out: str | Path, overrides: Sequence[str] = (), policy: Policy | None = None) -> Job:
    """Begin another run with this one's float network and policy; what comes after the search may differ.

    Args:
        job: the run to begin from.
        out: the new run's directory.
        overrides: ``"a.b.c=value"`` changes of the recipe.
        policy: takes the place of the run's own.

    Raises:
        PolicyError: the policy does not fit the sites.
        RunError: ``out`` holds something else.
    """
    new = Job.open(load_recipe(job.recipe.to_dict(), overrides), out, data_root=job.data_root, device=str(job.device), log=job.log)
    chosen = job.policy if policy is None else policy
    new.problem_of(new.untrained).index(chosen)
    if new.run.finished("search") and new.policy != chosen:
        raise RunError(f"{out}: began with another policy; give another --out")
    for name in ("float.safetensors", "float.jsonl", "sites.json", *(OF_POLICY if policy is None else ())):
        if (job.run.path / name).is_file():
            shutil.copyfile(job.run.path / name, new.run.inside(name))
    runs.write_text_atomic(new.run.inside("policy.json"), chosen.to_json() + "\n")
    for stage, bound in (("float", {}), ("search", {settled.MARK: chosen.digest})):
        if not new.run.finished(stage):
            new.run.finish(stage, taken_from=job.run.manifest["fingerprint"], **bound)
    return new


def write_json(job: Job, name: str, content: object) -> None:
    """Write a JSON file into the run directory, atomically; what is not finite becomes null."""
    runs.write_text_atomic(job.run.inside(name), json.dumps(runs.finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def summary(job: Job) -> dict[str, Any]:
    """Return what a run has so far, as JSON-able data: stages, policy, costs, accuracies, baselines, files."""
    path = job.run.path
    result: dict[str, Any] = {"run": str(path), "recipe": job.recipe.name, "stages": job.run.manifest["stages"]}
    stages = {"evaluation": "evaluate", "baselines": "baselines", "export/export": "export"}
    for name in ("search", "additivity", "evaluation", "baselines", "promise", "export/export"):
        file = path / f"{name}.json"
        if file.is_file() and not settled.outdated(job.run, stages.get(name, name)):
            result[name.rpartition("/")[2]] = json.loads(file.read_text("utf-8"))
    if (path / "policy.json").is_file():
        result["policy"] = {site: list(bits) for site, bits in job.policy.items()}
    exported = sorted(str(file.relative_to(path)) for file in (path / "export").glob("model.*"))
    files = ("policy.json", "model.safetensors", *exported, "report.html")
    return {**result, "files": [name for name in files if (path / name).is_file()]}


STAGES: dict[str, Callable[[Job], dict[str, Any]]] = {
    "float": float_stage,
    "search": search_stage,
    "finetune": finetune_stage,
    "evaluate": evaluate_stage,
    "baselines": baselines_stage,
    "export": export_stage,
    "report": report_stage,
}
"""Every stage by name, in order."""


def plan_of(recipe: Recipe) -> tuple[dict[str, Callable[[Job], dict[str, Any]]], dict[str, tuple[str, ...]]]:
    """Return the stages that a recipe may have, in order, and which of them each one needs."""
    if recipe.adaptive is None:
        return STAGES, NEEDS
    own = {"adaptive": adaptive_stage, "evaluate": evaluate_stage, "export": bank_stage, "report": report_stage}
    return {"float": float_stage, **own}, ADAPTIVE_NEEDS


NEEDS: dict[str, tuple[str, ...]] = {
    "float": (),
    "search": ("float",),
    "finetune": ("float", "search"),
    "evaluate": ("float", "search", "finetune"),
    "baselines": ("float", "search", "finetune"),
    "export": ("float", "search", "finetune"),
    "report": (),
}
"""The stages whose files a stage reads."""
