"""What a search and a policy come to: the rows that stages, baselines and comparisons have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bitwright import runs
from bitwright.driver import Result, SearchMethod, search
from bitwright.errors import RecipeError
from bitwright.evaluation import Evaluation
from bitwright.job import Job
from bitwright.outside import theirs
from bitwright.policy import Policy
from bitwright.problem import Problem, condition
from bitwright.training import FinetuneOptions, finetune


def searched(problem: Problem, method: SearchMethod[Any], out: Path | None = None, **how: Any) -> Result:
    """Return what `search` finds, for a run or a comparison; ``problem`` has a network of its own, as `Job.problem_of` gives it.

    Raises:
        RecipeError: the method changed the network that it was to find a policy for, and what it found is not kept; or it is from outside
            the package and failed.
        KeyboardInterrupt: the search was interrupted; the same call goes on with it.
    """
    before = condition(problem.model)
    with theirs(type(method)):
        result = search(problem, method, out=out, **how)
    if result.status == "interrupted":
        raise KeyboardInterrupt
    changed = [what for what, now in condition(problem.model).items() if now != before[what]]
    if changed:
        for path in [] if out is None else [*out.glob("checkpoint/search-*"), out / "policy.json"]:
            path.unlink(missing_ok=True)  # or the next call would take it for a search that is done
        remedy = "let it work on copy.deepcopy(problem.model)"
        raise RecipeError(f"method '{method.name}' changed the network: after the search {' and '.join(changed)}; {remedy}")
    return result


def found(job: Job, problem: Problem, method: str, result: Result) -> dict[str, Any]:
    """Return what a search found and spent, its proxy's training included, and what its policy costs, as JSON-able data."""
    shown = [budget.describe(cost, problem.sites) for budget, cost in zip(problem.budgets, result.costs, strict=True)]
    facts: dict[str, Any] = {"method": method, "status": result.status, "steps": result.steps, "loss": result.loss}
    spent: dict[str, Any] = {"seconds": result.seconds, "sample_passes": result.sample_passes}
    facts |= {"costs": list(result.costs), "limits": [budget.limit for budget in problem.budgets]}
    if job.proxy is not None:
        images = len(job.proxy.data.fit) + len(job.proxy.data.selection)
        spent["sample_passes"] += job.proxy.sample_passes
        spent["proxy"] = {"data": job.proxy.data.name, "images": images, "adaptation_passes": job.proxy.sample_passes}
    return {**facts, **spent, "budgets": shown, **job.describe(result.policy)}


def key_of(policy: Policy) -> str:
    """Return a short name of a policy: equal policies have equal ones.

    >>> key_of(Policy({"conv1": (8, 4)}))
    '815c296b495169fd'
    """
    return policy.digest[:16]


def trained(
    job: Job,
    policy: Policy,
    options: FinetuneOptions | None,
    out: Path,
    *,
    seed: int | None = None,
    log: Callable[[Mapping[str, Any]], None] | None = None,
) -> nn.Module:
    """Return the float network quantized at a policy and fine-tuned, if there are options for it.

    Args:
        job: where network, data, quantizer and teacher come from.
        policy: bits of every site.
        options: of the fine-tuning; None leaves the network as it was quantized.
        out: folder for checkpoints; a fine-tuning that was killed goes on from them. Whoever asked deletes it in the end.
        seed: of the fine-tuning, by default the recipe's.
        log: told of each epoch.
    """
    model = job.quantize(policy)
    if options is not None:
        own = job.recipe.seed if seed is None else seed
        finetune(model, job.data.fit, options, teacher=job.teacher, selection=job.data.selection, out=out, seed=own, log=log)
    return model


def row_of(job: Job, policy: Policy, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return bits, costs and accuracy of a policy as one JSON-able row; ``measured`` is `Evaluation.to_dict`."""
    return {"bits": {name: list(bits) for name, bits in policy.items()}, **job.describe(policy), **measured}


def keep_correct(path: Path, evaluation: Evaluation) -> None:
    """Write which images were right, for comparisons on the same images later."""
    runs.save_tree(path, {"correct": evaluation.correct})


def recall(path: Path, row: Mapping[str, Any]) -> Evaluation:
    """Return the evaluation that a row and the file of `keep_correct` hold; raises `RunError` if that file is damaged."""
    low, high = row["interval"]
    correct = runs.load_tree(path)["correct"]
    return Evaluation(row["top1"], row["top5"], row["n"], row["loss"], (low, high), tuple(row["per_class"]), correct)
