"""The stages of an adaptive run: float, adaptive, evaluate, export, report. Each reads and writes files of the run directory alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bitwright import runs
from bitwright.adaptive import files
from bitwright.adaptive.bank import BankOptions, build_bank, save_bank, try_bank
from bitwright.adaptive.judging import Seen, averages, judge, look, stream
from bitwright.adaptive.network import AdaptiveNet
from bitwright.adaptive.training import train_adaptive
from bitwright.costs import Size
from bitwright.data.quality import Mix, MixedSplit
from bitwright.evaluation import evaluate, wilson
from bitwright.job import Job
from bitwright.recipe import ExportSection, make_options
from bitwright.runs import write_text_atomic
from bitwright.training import FinetuneOptions

CURVE_IMAGES = 1000
PROBE = 1000
"""Test images that each corruption and severity is tried on."""


def adaptive_stage(job: Job) -> dict[str, Any]:
    """Train weights and actor together; write sites.json, model.safetensors, actor.safetensors, adaptive.jsonl and promise.json."""
    _write(job, "sites.json", job.sites_table())
    options = files.options_of(job.recipe)
    training = make_options(FinetuneOptions, job.recipe.finetune or {}, "finetune")
    net = files.build(job)
    file, images = job.run.inside("adaptive.jsonl"), job.data.selection.take(CURVE_IMAGES)

    def log(row: Mapping[str, Any]) -> None:
        seen = look(net, images)
        full = {**row, "selection": float(seen.correct.double().mean()), "selection_spent": float(seen.shares.double().mean())}
        runs.append_jsonl(file, full)
        job.log("adaptive", {**full, "epochs": training.epochs})

    history = train_adaptive(net, job.data.fit, job.data.selection, options, training, out=job.run.path, log=log, seed=job.recipe.seed)
    rows = {row["epoch"]: row for row in runs.read_jsonl(file)}  # a killed run logs some epochs twice
    write_text_atomic(file, "".join(json.dumps(rows.get(row["epoch"], dict(row))) + "\n" for row in history.epochs))
    runs.save_tree(job.run.inside(files.MODEL), dict(net.network.state_dict()))
    files.save_actor(net, job.run.inside(files.ACTOR))
    _write(job, "promise.json", {**history.promise.to_dict(), "alarms": list(history.alarms), "actor": _actor(net)})
    return {"spent": history.promise.mean, "alarms": len(history.alarms)}


def _actor(net: AdaptiveNet) -> dict[str, Any]:
    work = net.actor.macs
    return {
        "kind": type(net.actor).__name__.lower(),
        "macs": work,
        "share_of_macs": work / net.space.macs,
        "bitops": 64 * work,
        "parameters": sum(p.numel() for p in net.actor.parameters()),
        "price": net.actor.price.tolist(),
    }


def evaluate_adaptive(job: Job, conditions: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Evaluate float and adaptive network on the test split and under conditions; write evaluation.json and adaptive.json."""
    net, test = files.restored(job), job.data.test
    results = {"float": evaluate(job.network, test, conditions=conditions, seeds=seeds).to_dict() | job.describe(job.float_policy)}
    seen = look(net, test)
    told = net.actor.__class__.__name__ == "Table" and len(getattr(net.actor, "scores_of", ())) > 1
    own = {} if told else evaluate(net, test, conditions=conditions, seeds=seeds).to_dict()
    results["quantized"] = {**own, **_described(job, net, seen)}
    _write(job, "evaluation.json", results)
    mix = test.mix if isinstance(test, MixedSplit) else Mix()
    record = judge(net, test, mix, images=PROBE)
    record["stream"] = stream(net, test, mix, images=PROBE)
    promise = json.loads((job.run.path / "promise.json").read_text("utf-8"))
    _write(job, "adaptive.json", {**record, "promise": promise, "choices": [list(bits) for bits in net.space.choices]})
    return {name: result["top1"] for name, result in results.items()}


def _described(job: Job, net: AdaptiveNet, seen: Seen) -> dict[str, Any]:
    """Return what the network costs on the mean, as a static policy is described; its weights take the widest member's room."""
    widest = net.space.policy([len(net.space.choices) - 1] * len(net.space.names))
    sites, taken = job.trace.sites, seen.index.flatten().tolist()
    hits = float(seen.correct.double().mean())
    counted = {part: Counter(net.space.choices[k][part] for k in taken) for part in (0, 1)}
    each = max(1, seen.index.shape[1])
    return {
        "top1": hits,
        "n": len(seen.correct),
        "interval": list(wilson(int(seen.correct.sum()), len(seen.correct))),
        **averages(net, seen),
        "bitops": float(seen.shares.double().mean()) * net.space.limit,
        "size": Size(job.overhead).total(sites, widest),
        "weight_widths": {width: round(count / each, 1) for width, count in sorted(counted[0].items())},
        "activation_widths": {width: round(count / each, 1) for width, count in sorted(counted[1].items())},
    }


def bank_stage(job: Job) -> dict[str, Any]:
    """Turn the network into a bank of static members and a router; write export/bank.json and its weights, checked."""
    section = job.recipe.export or ExportSection(to="bank")
    options = make_options(BankOptions, section.options, "export.options")
    net = files.restored(job).cpu()  # what is written runs on a CPU, and is tried there
    bank = build_bank(net, job.data.fit, options, seed=job.recipe.seed)
    folder = job.run.inside("export", "bank.json").parent
    size = save_bank(bank, folder, job.data.example(8).cpu(), reference=job.reference)
    facts = {**try_bank(bank, net, job.data.test, threads=job.recipe.threads), "to": "bank", "bytes": size}
    _write(job, "export/export.json", facts)
    write_text_atomic(job.run.inside("bank.json"), (folder / "bank.json").read_text("utf-8"))
    return {"to": "bank", "bytes": size, "members": len(bank.members)}


def _write(job: Job, name: str, content: object) -> None:
    write_text_atomic(job.run.inside(name), json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


NEEDS: dict[str, tuple[str, ...]] = {
    "float": (),
    "adaptive": ("float",),
    "evaluate": ("float", "adaptive"),
    "export": ("float", "adaptive"),
    "report": (),
}
"""The stages of an adaptive run whose files a stage reads."""
