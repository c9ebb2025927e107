"""Does it pay to give every input its own bits? DQMQ's reconstruction beside static policies and its controls, on data of mixed quality.

    python benchmarks/adaptive.py --data-root DATA --weights RESNET20.th [--recipe cifar10-resnet20-dqmq-quick] [--seeds 0 1 2]
        [--rates 0.02 0.04 0.08] [--arms …] [--epochs 20] [--images N] [--set key=value …] [--runs runs/adaptive] [--name cifar10]

Every arm keeps the recipe's budget of bit operations an image (the actor's own inside), takes as many sample-passes (a forward pass is
one, a backward pass two; the neighbour that the actor's gradient computes is one more) and has the same grid of learning rates, of which
the mixed selection images choose one. Arms: ``uniform`` and ``sdq`` (static policies, trained on the same mixed data; the search counts),
``static`` (one policy for all inputs, learned by the adaptive code), ``random`` (every sample's widths drawn), ``controller`` (DQNet's
kind), ``reinforce``, ``pathwise`` and ``gaussian`` (dqmq with another estimator or relaxation), ``severity`` (told the true severity),
``dqmq``. ``permuted`` is dqmq with every image taking another
one's decisions. What is in ``--runs`` already is not repeated, so several processes may share the work: a row that is being made is a
folder with a lock. Writes results/adaptive-NAME.csv (a row per arm, seed, condition), results/adaptive-NAME-summary.csv and
results/adaptive-NAME-stream.csv (dqmq along a stream whose quality changes; benchmarks/adaptive_plots.py draws it).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import environment, mean_interval, write
from torch import Tensor, nn

from bitwright.adaptive import files
from bitwright.adaptive.judging import Seen, describe, look, mean_bits, paired_gain, rank_trend, stream
from bitwright.adaptive.network import AdaptiveNet, adapt
from bitwright.adaptive.training import train_adaptive
from bitwright.costs import BitOps
from bitwright.data.quality import TEST_SEED, Condition, Mix, MixedSplit
from bitwright.driver import search
from bitwright.evaluation import evaluate, wilson
from bitwright.job import Job
from bitwright.methods.sdq import SDQ
from bitwright.pipeline import run_stages, threads
from bitwright.policy import Bits, Policy
from bitwright.problem import Problem
from bitwright.quant import quantize
from bitwright.recipe import load_recipe, make_options
from bitwright.training import FinetuneOptions, finetune

ADAPTIVE: dict[str, dict[str, Any]] = {
    "dqmq": {},
    "gaussian": {"relaxation": "gaussian"},
    "pathwise": {"estimator": "pathwise"},
    "reinforce": {"estimator": "reinforce"},
    "controller": {"actor": "controller", "hot": 1.0, "cold": 1.0},
    "static": {"actor": "static"},
    "severity": {"actor": "severity"},
    "random": {"actor": "random"},
}
ARMS = ("uniform", "sdq", *ADAPTIVE)
DRAWN = ("reinforce", "random")
"""Arms that compute one width a sample."""
SEARCH_EPOCHS = 1.0
STATIC = ("uniform", "sdq")
ONE_POLICY = (*STATIC, "static")
"""Arms of one policy for all inputs: the best of them is what adaptive bits are compared with."""


def passes(arm: str, job: Job) -> float:
    """Return the sample-passes of one image's training step, on the mean of the training: nothing is tried again in the warm-up."""
    if arm in STATIC or arm in DRAWN:
        return 3.0
    options = dataclasses.replace(files.options_of(job.recipe), **ADAPTIVE[arm])
    return 4.0 - (options.warmup if options.estimator == "counterfactual" else 0.0)


def options_of(arm: str, job: Job, rate: float, epochs: float) -> FinetuneOptions:
    """Return the weights' training of an arm: fewer steps where a step takes more passes."""
    base = make_options(FinetuneOptions, job.recipe.finetune or {}, "finetune")
    spent = SEARCH_EPOCHS if arm == "sdq" else 0.0
    images = LIMIT or len(job.data.fit)
    steps = round((epochs - spent) * (images // base.batch_size) * 3 / passes(arm, job))
    return dataclasses.replace(base, lr=rate, max_steps=max(1, steps), epochs=max(1, round(epochs)))


LIMIT, TESTED = 0, 0
"""Training and test images of a trial; 0 takes all."""


def fit_of(job: Job) -> Any:
    """Return the training images, all or the first of them."""
    return job.data.fit.take(LIMIT) if LIMIT else job.data.fit


def train_static(arm: str, job: Job, rate: float, epochs: float, out: Path) -> tuple[nn.Module, Policy]:
    """Return a static network of the budget: uniform, or found by SDQ on the same mixed images."""
    space, fit = files.space_of(job), fit_of(job)
    if arm == "uniform":
        fits = [k for k in range(len(space.choices)) if space.fixed + int(space.terms[:, k].sum()) <= space.limit]
        policy = space.policy([max(fits)] * len(space.names))
    else:
        policy = searched(job, fit, rate)
    assert BitOps().total(job.trace.sites, policy) <= space.limit
    model = quantize(job.network, policy, calibration=fit.batch(torch.arange(min(512, len(fit))))[0], correct=("batchnorm",))
    finetune(model, fit, options_of(arm, job, rate, epochs), out=out, seed=job.recipe.seed)
    return model, policy


def searched(job: Job, fit: Any, rate: float) -> Policy:
    """Return SDQ's policy among the adaptive choices' widths."""
    pins = {name: allowed for name, allowed in job.choices.items() if len(allowed) == 1}
    space = files.space_of(job)
    choices = {name: pins.get(name) or tuple(Bits(w, a) for w in widths(space, 0) for a in widths(space, 1)) for name in job.trace.names}
    data = dataclasses.replace(job.data, fit=fit, selection=job.data.selection.take(500))
    problem = Problem(job.network, job.trace, choices, job.budgets, data, seed=job.recipe.seed)
    base = options_of("uniform", job, rate, 1.0)
    same = {"precision": base.precision, "compile": base.compile, "channels_last": base.channels_last, "batch_size": base.batch_size}
    return search(problem, SDQ(epochs=SEARCH_EPOCHS, lr=0.01, **same)).policy


def widths(space: Any, part: int) -> list[int]:
    """Return the widths that the choices have."""
    return sorted({bits[part] for bits in space.choices})


def train_own(arm: str, job: Job, rate: float, epochs: float, out: Path) -> tuple[AdaptiveNet, dict[str, Any]]:
    """Return an adaptive network of the budget and its promise."""
    own = files.options_of(job.recipe)
    options = dataclasses.replace(own, **ADAPTIVE[arm])
    images = job.data.example(options.calibration)
    net = adapt(job.network, files.space_of(job), images, options.actor_options(), seed=job.recipe.seed)
    history = train_adaptive(
        net, fit_of(job), job.data.selection, options, options_of(arm, job, rate, epochs), out=out, seed=job.recipe.seed
    )
    return net, {**history.promise.to_dict(), "alarms": list(history.alarms), "actor_macs": net.actor.macs}


def seen_static(model: nn.Module, split: Any, share: float) -> Seen:
    """Return what a static network does with a split; its cost is the same for all."""
    correct = evaluate(model, split).correct
    return Seen(correct, torch.full((len(correct),), share), torch.zeros(0, len(correct), dtype=torch.int64))


class Judge:
    """Looks at one trained network under every condition."""

    def __init__(self, arm: str, model: nn.Module, job: Job, policy: Policy | None):
        self.arm, self.model, self.space = arm, model, files.space_of(job)
        self.base, self.mix = job.data.test, Mix()
        if isinstance(job.data.test, MixedSplit):
            self.base, self.mix = job.data.test.base, job.data.test.mix
        self.base = self.base.take(TESTED) if TESTED else self.base
        self.share = 0.0 if policy is None else BitOps().total(job.trace.sites, policy) / self.space.limit

    def seen(self, split: Any, forced: Tensor | None = None) -> Seen:
        """Return what the network does with a split."""
        own = isinstance(self.model, AdaptiveNet)
        return look(self.model, split, forced=forced) if own else seen_static(self.model, split, self.share)

    def row(self, one: Seen) -> dict[str, Any]:
        """Return accuracy, bits and cost of what was seen."""
        if isinstance(self.model, AdaptiveNet):
            return describe(self.model, one)
        hits, n = int(one.correct.sum()), len(one.correct)
        bitops = self.share * self.space.limit
        return {"n": n, "top1": hits / n, "interval": list(wilson(hits, n)), "bits": None, "bitops": bitops, "share": self.share}

    def whole(self) -> dict[str, Any]:
        """Return the rows on all test images: clean, mixed (also by severity), held out; and dqmq's permuted decisions."""
        rows: dict[str, Any] = {}
        found: dict[str, Any] = {"rows": rows}
        for name in ("clean", "mixed", "held_out"):
            split = (
                MixedSplit(self.base, Mix(clean=1.0), TEST_SEED)
                if name == "clean"
                else Condition(name).split(self.base, self.mix, TEST_SEED)
            )
            one = self.seen(split)
            rows[name] = self.row(one)
            if name != "mixed":
                continue
            severity = MixedSplit(self.base, self.mix, TEST_SEED).quality.severity
            for level in sorted(set(severity.tolist())):
                own = (severity == level).nonzero().flatten()
                rows[f"mixed severity {level}"] = self.row(Seen(one.correct[own], one.shares[own], one.index[:, own]))
            found["correct"] = one.correct.int().tolist()
            if self.arm == "dqmq":
                order = torch.randperm(len(severity), generator=torch.Generator().manual_seed(0))
                other = self.seen(split, one.index[:, order])
                found["permuted"] = {**self.row(other), **paired_gain(one, other)}
                assert isinstance(self.model, AdaptiveNet)
                found["stream"] = stream(self.model, self.base, self.mix, images=len(self.base))
        return found

    def corruption(self, name: str, probe: int) -> tuple[dict[str, Any], dict[str, float] | None]:
        """Return the rows of one corruption at every severity, clean first, and the rank correlation of bits with severity."""
        few, rows, bits = self.base.take(probe), {}, []
        levels = (0, 1, 2, 3, 4, 5)
        for level in levels:
            clean = MixedSplit(few, Mix(clean=1.0), TEST_SEED)
            one = self.seen(clean if level == 0 else Condition(name, level).split(few, self.mix, TEST_SEED))
            rows[f"{name}:{level}"] = self.row(one)
            if isinstance(self.model, AdaptiveNet):
                bits.append(mean_bits(self.model, one.index))
        return rows, rank_trend([float(level) for level in levels], bits) if bits else None


def judge(arm: str, model: nn.Module, job: Job, policy: Policy | None, probe: int) -> dict[str, Any]:
    """Return accuracy, bits and cost under every condition, and which mixed test images were right."""
    own = Judge(arm, model, job, policy)
    result = {**own.whole(), "spearman": {}}
    for name in (*own.mix.corruptions, *(own.mix.held_out or ())):
        rows, trend = own.corruption(name, probe)
        result["rows"] |= rows
        if trend is not None:
            result["spearman"][name] = trend
    return result


def job_of(seed: int, arguments: argparse.Namespace) -> Job:
    """Return the job of a seed, its float network ready."""
    given = [] if arguments.weights is None else [f"model.weights={arguments.weights}"]
    overrides = [f"seed={seed}", f"threads={arguments.threads}", "export=null", "report=false", *given, *arguments.set]
    recipe = load_recipe(arguments.recipe, overrides)
    job = Job.open(recipe, arguments.runs / f"{arguments.name}-seed{seed}", data_root=arguments.data_root)
    run_stages(job, ["float"])
    return job


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what else decides a result, beside arm, seed and learning rate."""
    return {name: getattr(arguments, name) for name in ("recipe", "epochs", "images", "test_images", "probe", "set")}


def measure(arm: str, seed: int, rate: float, arguments: argparse.Namespace, made_by: dict[str, str]) -> dict[str, Any] | None:
    """Return the result of one training, made now unless it is there or another process is at it."""
    folder = arguments.runs / f"{arguments.name}-{arm}-seed{seed}-lr{rate:g}"
    file, lock = folder / "result.json", folder / "lock"
    settings = settings_of(arguments)
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text())
        if known["settings"] != settings:
            raise SystemExit(f"{file} was made with {known['settings']}, and asked for is {settings}; give another --runs or --name")
        return known
    folder.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        print(f"{folder}: another process is at it, or was killed (then delete {lock})", flush=True)
        return None
    try:
        job, started = job_of(seed, arguments), time.monotonic()
        with threads(arguments.threads):
            policy, facts = None, {}
            if arm in STATIC:
                model, policy = train_static(arm, job, rate, arguments.epochs, folder)
                facts = {"policy": {name: list(bits) for name, bits in policy.items()}}
            else:
                model, facts = train_own(arm, job, rate, arguments.epochs, folder)
            chosen = look(model, job.data.selection) if isinstance(model, AdaptiveNet) else seen_static(model, job.data.selection, 0.0)
            judged = judge(arm, model, job, policy, arguments.probe)
        options = options_of(arm, job, rate, arguments.epochs)
        assert options.max_steps is not None
        extra = SEARCH_EPOCHS * 3 * len(fit_of(job)) if arm == "sdq" else 0
        record = {
            "arm": arm,
            "seed": seed,
            "lr": rate,
            "sample_passes": round(options.max_steps * options.batch_size * passes(arm, job)) + extra,
            "seconds": round(time.monotonic() - started, 1),
            "selection": float(chosen.correct.double().mean()),
            "made_by": made_by,
            "settings": settings,
            **facts,
            **judged,
        }
        file.write_text(json.dumps(record))
        shown = record["rows"]["mixed"]
        print(f"{arm} seed {seed} lr {rate:g}: mixed {100 * shown['top1']:.2f} %, {shown['share']:.3f} of the budget", flush=True)
        return record
    finally:
        lock.unlink(missing_ok=True)


def rows_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of one training, a condition each."""
    head = {name: record[name] for name in ("arm", "seed", "lr", "sample_passes", "seconds", "selection")}
    head |= {"epochs": record["settings"]["epochs"], "images": record["settings"]["images"] or "all"}
    rows = []
    named = dict(record["rows"])
    if "permuted" in record:
        named["mixed, decisions permuted"] = record["permuted"]
    for condition, one in named.items():
        low, high = one["interval"]
        figures = {"n": one["n"], "top1": one["top1"], "low": low, "high": high, "bits": one["bits"], "bitops": one["bitops"]}
        rows.append({**head, "condition": condition, **figures, "share": one["share"], **record["made_by"]})
    return rows


def stream_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a training's moving means along a stream, with the severity at each place."""
    found, rows = record["stream"], []
    count = len(found["bits"])
    for k, (bits, right) in enumerate(zip(found["bits"], found["accuracy"], strict=True)):
        image = round(found["each"] * len(found["segments"]) * (k + 1) / count)
        part = found["segments"][min(len(found["segments"]) - 1, (image - 1) // found["each"])]
        figures = {"bits": bits, "accuracy": 100 * right, "condition": part["condition"], "severity": part["severity"]}
        rows.append({"seed": record["seed"], "image": image, **figures, **record["made_by"]})
    return rows


def summary_of(best: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each arm's gain over the best static one on the mixed test images, over seeds, and dqmq's trends."""
    arms = list(dict.fromkeys(record["arm"] for record in best))
    means = {arm: mean_interval([r["rows"]["mixed"]["top1"] for r in best if r["arm"] == arm]) for arm in arms}
    rival = max((arm for arm in arms if arm in ONE_POLICY), key=lambda arm: means[arm]["mean"], default=None)
    rows: list[dict[str, Any]] = []
    for arm in arms:
        own = [r for r in best if r["arm"] == arm]
        row = {"what": "mixed accuracy", "name": arm, **means[arm], "share": sum(r["rows"]["mixed"]["share"] for r in own) / len(own)}
        pairs = [(r, s) for r in own for s in best if s["arm"] == rival and s["seed"] == r["seed"]]
        if rival is not None and pairs:
            gains = [100 * (sum(r["correct"]) - sum(s["correct"])) / len(r["correct"]) for r, s in pairs]
            gain = mean_interval(gains)
            row |= {"rival": rival, "gain_points": gain["mean"], "gain_interval": gain["interval"]}
        rows.append({**row, **own[-1]["made_by"]})
    for record in best:
        made_by = record["made_by"]
        for name, trend in record["spearman"].items() if record["arm"] == "dqmq" else ():
            rows.append(
                {"what": f"spearman seed {record['seed']}", "name": name, "n": trend["n"], "mean": trend["value"]} | trend | made_by
            )
        if "permuted" in record:
            lost = record["permuted"]
            low, high = lost["gain_interval"]
            rows.append(
                {"what": f"own over permuted seed {record['seed']}", "name": "dqmq", "mean": lost["gain"], "low": low, "high": high}
                | made_by
            )
    return rows


def main() -> None:
    """Train what is missing, choose each arm's learning rate, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar10-resnet20-dqmq-quick")
    parser.add_argument("--name", default="cifar10", help="of the result files")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--weights", type=Path, help="the trained float network; by default the recipe trains one")
    parser.add_argument("--runs", type=Path, default=Path("runs/adaptive"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.04, 0.08])
    parser.add_argument("--epochs", type=float, default=20.0, help="of a static arm; others have as many sample-passes")
    parser.add_argument("--images", type=int, default=0, help="train on so many images only (a trial)")
    parser.add_argument("--test-images", type=int, default=0, help="judge on so many test images only (a trial)")
    parser.add_argument("--probe", type=int, default=2000, help="test images of each corruption and severity")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the recipe")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true", help="only train; another process writes the rows")
    arguments = parser.parse_args()
    global LIMIT, TESTED
    LIMIT, TESTED = arguments.images, arguments.test_images
    made_by, best = environment(), []
    for seed in arguments.seeds:
        for arm in arguments.arms:
            tried = [measure(arm, seed, rate, arguments, made_by) for rate in arguments.rates]
            done = [record for record in tried if record is not None]
            if len(done) == len(tried):
                best.append(max(done, key=lambda record: float(record["selection"])))
    if not arguments.no_write and best:
        print(write(f"adaptive-{arguments.name}", [row for record in best for row in rows_of(record)]))
        print(write(f"adaptive-{arguments.name}-summary", summary_of(best)))
        followed = [record for record in best if "stream" in record]
        if followed:
            print(write(f"adaptive-{arguments.name}-stream", stream_of(followed[0])))


if __name__ == "__main__":
    main()
