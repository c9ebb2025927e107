"""Compare search methods: methods x seeds at one budget, with one recipe and one fine-tuning for all of them.

A comparison is a directory. Each search and each training in it has a folder of its own, named after all that decides its
result, so nothing is done twice: not after a crash, not when methods, seeds or budgets are added, and not when two methods find the
same policy. What a scoring method measured for one budget is solved again for the others. Processes that run the same command share
the work: each claims the folders it works in.

    manifest.json, recipe.yaml       what decides the result, and what was asked for last
    seeds/<seed>/                    the float network of a seed: a run directory
    searches/<method>-<hash>-<seed>/ search.jsonl, policy.json, result.json
    trainings/<hash>/                result.json, correct.safetensors: which test images are right
    compare.json, compare.csv, report.html
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bitwright import runs, sensitivity
from bitwright.claims import claim
from bitwright.driver import SearchMethod, Stop
from bitwright.errors import BitwrightError, BudgetError, DataError, RunError
from bitwright.evaluation import evaluate
from bitwright.job import Job, Log
from bitwright.kept import SCORED, SEARCHED, TRAINED, Kinds, correct_of, network_of, policy_of, read
from bitwright.measure import found, keep_correct, row_of, searched, trained
from bitwright.methods import get_method
from bitwright.outside import source_digest
from bitwright.pipeline import check_trainable, float_stage, threads
from bitwright.plan import Budgets, Entry, Plan, Stage, check_recipe
from bitwright.policy import Policy
from bitwright.recipe import Recipe, load_recipe, make_options
from bitwright.report import render
from bitwright.runs import Run
from bitwright.sensitivity import ScoredMethod, Sensitivity
from bitwright.standings import Contender, csv_text, ranked, standings

KIND = "comparison"
POLL_SECONDS = 1.0
"""Between two looks at what other processes still work on."""


def compare(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path | None = None,
    *,
    data_root: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    log: Log | None = None,
    made_by: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Search with every method and seed, fine-tune every policy alike, and say which differences are significant.

    Args:
        recipe: a bundled name, a YAML file, a mapping, or a `Recipe`; its section ``compare`` says what is compared.
        out: the comparison's directory; by default ``runs/<recipe name>-compare``. The same call goes on with it.
        data_root: the folder that holds the data sets.
        overrides: ``"a.b.c=value"`` texts.
        device: where the networks run.
        log: called with a label and a row of numbers.
        made_by: noted with each result and repeated in the table's last columns, such as the commit and the machine.

    Returns:
        What compare.json holds (`standings.standings` for each table), and the paths.

    Raises:
        BitwrightError: the recipe, the data or a budget is wrong, or the directory holds something else.
        BudgetError: a budget cannot be met, or no method could run at one.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    check_recipe(recipe)
    path = Path(out or Path("runs") / f"{recipe.name}-compare")
    work = Comparison.open(recipe, path, data_root=data_root, device=device, log=log, made_by=made_by)
    with threads(recipe.threads):
        work.do()
    result = work.write()
    for table in result["tables"]:
        if not table["methods"]:
            raise BudgetError(f"compare: no method can run at {table['budget']}: {'; '.join(table['left_out'].values())}")
    return result


# ---- the work


@dataclass
class Comparison:
    """A comparison at work in its directory.

    Attributes:
        recipe, plan: what to do.
        run: where; its manifest binds what no entry may differ in.
        rows: what is done: search and training of each entry.
        left_out: why a method takes no part at a budget.
    """

    recipe: Recipe
    plan: Plan
    run: Run
    data_root: Path | None
    device: str
    log: Log
    made_by: Mapping[str, str]
    rows: dict[Entry, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[tuple[Budgets, Stage, str], str] = field(default_factory=dict)
    _job: Job | None = None
    _checked: bool = False
    _written: int = 0

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        path: Path,
        *,
        data_root: str | Path | None,
        device: str,
        log: Log | None,
        made_by: Mapping[str, str] | None,
    ) -> Comparison:
        """Open a comparison's directory, new or to be continued; raises `RunError` if it holds something else."""
        plan = Plan.of(recipe)
        if (path / Run.MANIFEST).is_file() and Run.load(path).manifest["recipe"].get("kind") != KIND:
            raise RunError(f"{path}: holds a run, no comparison; give another --out")
        if path.is_file():
            raise RunError(f"{path}: is a file, and a comparison needs a directory; give another --out")
        with claim(path, wait=True):
            run = _opened(path, {"kind": KIND, **_bound(recipe, None)})
            runs.write_text_atomic(run.path / "recipe.yaml", recipe.to_yaml())
        root = None if data_root is None else Path(data_root)
        return cls(recipe, plan, run, root, device, log or (lambda label, row: None), dict(made_by or runs.versions()))

    def do(self) -> None:
        """Do all that is not done, as long as another process does not do it."""
        waiting = 0
        while True:
            states = [self._advance(entry) for entry in self._entries()]
            if all(states) and self._whole():
                for seed in self.plan.seeds:
                    if not self._score(seed).is_file():
                        self.job(seed)  # its folder was lost after all was done
                return
            if states.count(False) != waiting:
                waiting = states.count(False)
                self.log("compare", {"waiting": f"other processes work on {waiting} of {len(states)} entries"})
            if waiting:
                time.sleep(POLL_SECONDS)

    def _entries(self) -> Iterator[Entry]:
        """Yield what is to be done, as far as it is known: a second stage begins when the first is complete."""
        for budget in self.plan.budgets:
            for stage in self.plan.stages:
                for seed in self.plan.seeds:
                    for label in self._taking_part(budget, stage):
                        yield Entry(budget, stage, label, seed)
                if not self._complete(budget, stage):
                    break
                self._note_progress()

    def _note_progress(self) -> None:
        """Renew the files when another stage is complete, so that there is something to look at while the rest runs."""
        done = sum(self._complete(budget, stage) for budget in self.plan.budgets for stage in self.plan.stages)
        if done > self._written:
            self._written = done
            self.write()

    def _taking_part(self, budget: Budgets, stage: Stage) -> list[str]:
        """Return who takes part in a stage: all in the first, then the best on the selection images, and uniform."""
        first = self.plan.stages[0]
        labels = list(self.plan.methods) if stage == first else self._chosen(budget, first)
        return [label for label in labels if (budget, stage, label) not in self.left_out]

    def _chosen(self, budget: Budgets, first: Stage) -> list[str]:
        """Return who has uniform's policies or one of the best others: methods with the same policies for every seed share a place."""
        rows = {label: self._rows(budget, first, label) for label in self._taking_part(budget, first)}
        keys = {label: tuple(row["key"] for row in own) for label, own in rows.items()}
        others = dict.fromkeys(keys[label] for label in ranked(rows) if keys[label] != keys.get("uniform"))
        chosen = {keys.get("uniform"), *list(others)[: self.plan.best]}
        return [label for label in keys if keys[label] in chosen]

    def _rows(self, budget: Budgets, stage: Stage, label: str) -> list[dict[str, Any]]:
        return [self.rows[Entry(budget, stage, label, seed)] for seed in self.plan.seeds]

    def _complete(self, budget: Budgets, stage: Stage) -> bool:
        first = self.plan.stages[0]
        if stage != first and not self._complete(budget, first):
            return False
        names = self._taking_part(budget, stage)
        return all(Entry(budget, stage, label, seed) in self.rows for label in names for seed in self.plan.seeds)

    def _whole(self) -> bool:
        return all(self._complete(budget, stage) for budget in self.plan.budgets for stage in self.plan.stages)

    def _total(self) -> int:
        """Return how many entries there are in all, as far as it is known who goes on."""
        most = min(len(self.plan.methods), self.plan.best + 1)
        stages = [(budget, stage) for budget in self.plan.budgets for stage in self.plan.stages]
        known = [stage == self.plan.stages[0] or self._complete(budget, self.plan.stages[0]) for budget, stage in stages]
        counts = [len(self._taking_part(*place)) if sure else most for place, sure in zip(stages, known, strict=True)]
        return sum(counts) * len(self.plan.seeds)

    def _advance(self, entry: Entry) -> bool:
        """Do one entry if it is not done; return False if another process is at it."""
        place = (entry.budget, entry.stage, entry.label)
        if entry in self.rows or place in self.left_out:
            return True
        try:
            row = self._row(entry)
        except (BitwrightError, ImportError) as error:
            if isinstance(error, (RunError, DataError)) or not self._checked:
                raise  # that concerns all of them
            self.left_out[place] = f"seed {entry.seed}: {' '.join(str(error).split())}"
            self.log("compare", {"policy": str(entry), "left out": str(error)})
            return True
        if row is not None:
            self.rows[entry] = row
        return row is not None

    def _row(self, entry: Entry) -> dict[str, Any] | None:
        record = self._searched(entry)
        if record is None:
            return None
        policy = policy_of(self._folder(entry), record)
        row = self._trained(entry, policy)
        return None if row is None else {**row, "search": record, "label": entry.label, "seed": entry.seed}

    # ---- searches

    def _searched(self, entry: Entry) -> dict[str, Any] | None:
        """Return what a search found, after doing it if nobody did; None if somebody is doing it."""
        folder = self._folder(entry)
        return self._once(folder, lambda: self._search(entry, folder), SEARCHED)

    def _folder(self, entry: Entry) -> Path:
        """Return where an entry's search is kept."""
        section, name = self.recipe.search, self.plan.methods[entry.label]
        options = self.plan.options[entry.label]
        asked = {"method": name, "options": options, "budget": entry.budget, "steps": section.steps, "seconds": section.seconds}
        source = source_digest(get_method(name))
        if source is not None:  # a method of somebody's own may be edited: what it found before is not what it finds now
            asked["source"] = source
        title = name.replace(":", "-").replace("/", "-")
        return self.run.inside("searches", f"{title}-{_hash(asked)}-{entry.seed}")

    def _search(self, entry: Entry, folder: Path) -> dict[str, Any]:
        job, section = self.job(entry.seed), self.recipe.search
        name, label = self.plan.methods[entry.label], entry.label
        method: SearchMethod[Any] = make_options(get_method(name), self.plan.options[label], f"compare.options.{label}")
        measured = None
        if isinstance(method, ScoredMethod) and method.table is None:
            measured = self._measured(entry)
            if measured is not None:
                method = replace(method, table=str(measured / sensitivity.FILE))
                shutil.rmtree(folder / "checkpoint", ignore_errors=True)  # what was begun without the table is not needed any more
        problem = job.on_proxy(job.problem_of(job.network, budgets=job.parse_budgets(entry.budget)))
        tell = f"{entry.label} search"
        stop = Stop(section.steps, section.seconds)
        log = partial(self.log, tell)
        result = searched(problem, method, folder, stop=stop, log=log, save_every=section.save_every)
        record = found(job, problem, name, result)
        if measured is not None:  # a search at this budget alone would have measured too
            record["seconds"] += read(measured / "result.json", SEARCHED)["seconds"]
            record["sample_passes"] += Sensitivity.load(measured / sensitivity.FILE).sample_passes
        return {**record, "policy": {site: list(bits) for site, bits in result.policy.items()}}

    def _measured(self, entry: Entry) -> Path | None:
        """Return where the same method left what it measured for another budget of this seed, if it did."""
        folders = [self._folder(replace(entry, budget=budget)) for budget in self.plan.budgets if budget != entry.budget]
        done = (folder for folder in folders if (folder / "result.json").is_file() and (folder / sensitivity.FILE).is_file())
        return next(done, None)

    # ---- trainings

    def _trained(self, entry: Entry, policy: Policy) -> dict[str, Any] | None:
        """Return the row of a policy after a stage's fine-tuning, from whichever method asked for it first."""
        options = None if entry.stage.options is None else asdict(entry.stage.options)
        decisive = options and {name: value for name, value in options.items() if name != "checkpoint_seconds"}
        key = _hash({"policy": policy.to_json(), "finetune": decisive, "seed": entry.seed, **self._teacher()})
        folder = self.run.inside("trainings", key)
        row = self._once(folder, lambda: self._train(entry, policy, folder), TRAINED)
        return row if row is None else {**row, "key": key, "correct": correct_of(folder, row)}

    def _teacher(self) -> dict[str, str]:
        """Return what a teacher's file holds, if there is one: what another file taught is another training."""
        section = self.recipe.teacher
        if section is None or section.name == "float" or section.weights is None:
            return {}
        try:
            content = Path(section.weights).read_bytes()
        except OSError as error:
            reason = error.strerror or error
            raise RunError(
                f"teacher.weights={section.weights}: cannot be read ({reason}); restore that file, or give another --out"
            ) from None
        return {"teacher": hashlib.sha256(content).hexdigest()}

    def _train(self, entry: Entry, policy: Policy, folder: Path) -> dict[str, Any]:
        job, options = self.job(entry.seed), entry.stage.options
        shown = {"epochs": 0 if options is None else options.epochs}
        tell = f"{entry.label} {entry.stage.name}"
        model = trained(job, policy, options, folder, log=lambda row: self.log(tell, {**row, **shown}))
        test, selection = evaluate(model, job.data.test), evaluate(model, job.data.selection)
        keep_correct(folder / "correct.safetensors", test)
        self.log(f"{len(self.rows) + 1} of {self._total()}", {"policy": str(entry), "top1": test.top1})
        free = [name for name, allowed in job.choices.items() if len(allowed) > 1]
        extra = {"selection": {"top1": selection.top1, "loss": selection.loss}, "widths": len({policy[name] for name in free})}
        return {**row_of(job, policy, test.to_dict()), **extra}

    def _once(self, folder: Path, work: Callable[[], dict[str, Any]], needed: Kinds) -> dict[str, Any] | None:
        """Return the result in a folder; without one do the work and keep it, unless another process holds the folder."""
        file = folder / "result.json"
        if not file.is_file():
            with claim(folder) as held:
                if not held:
                    return None
                if not file.is_file():
                    result = {**work(), "made_by": dict(self.made_by)}
                    runs.write_text_atomic(file, json.dumps(result, indent=1, allow_nan=False) + "\n")
                    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        return read(file, needed)

    # ---- what entries share

    def job(self, seed: int) -> Job:
        """Return the job of a seed, its float network there; only the last one asked for is kept in memory."""
        path = self.run.inside("seeds", str(seed))
        if self._job is None or self._job.recipe.seed != seed:
            with claim(path, wait=True):  # another process may be training the float network, or the proxy's
                job = Job.open(_of_seed(self.recipe, seed), path, data_root=self.data_root, device=self.device, log=self.log)
                self._check(job)
                facts = None
                if not job.run.finished("float"):
                    job.log("float", {"status": f"started for seed {seed}"})
                    facts = float_stage(job)
                self._bind(seed, path)
                if facts is not None:
                    job.run.finish("float", **facts)
                if not self._score(seed).is_file():
                    score = evaluate(job.network, job.data.test)
                    runs.write_text_atomic(self._score(seed), json.dumps(score.to_dict()) + "\n")
                if job.proxy is not None:
                    job.log("proxy", {"status": f"ready for seed {seed}"})
            self._job = job
        return self._job

    def _score(self, seed: int) -> Path:
        """Return where the evaluation of a seed's float network is kept."""
        return self.run.path / "seeds" / str(seed) / "float.json"

    def _bind(self, seed: int, path: Path) -> None:
        """Hold a seed to the float network that its results are of, and to that of the other seeds where all load one file."""
        weights = self.recipe.model.weights
        with claim(self.run.path, wait=True):
            run, own = Run.load(self.run.path), network_of(path)
            known: dict[str, str] = run.manifest["stages"]["float"]["networks"] if run.finished("float") else self._unbound()
            if known.get(str(seed), own) != own:
                what = f"{path}: its float network is not the one that this seed began with"
                files = " or ".join(filter(None, ["its float.safetensors", weights]))
                raise RunError(f"{what}; restore {files}, or give another --out")
            other = next((name for name, network in known.items() if weights is not None and network != own), None)
            if other is not None:
                what = f"{self.run.path}: model.weights={weights} is not the network that seed {other} began with"
                raise RunError(f"{what}; restore that file, or give another --out")
            if not run.finished("float") or str(seed) not in known:
                run.finish("float", networks={**known, str(seed): own})

    def _unbound(self) -> dict[str, str]:
        """Return the float networks of a comparison that was begun before they were noted."""
        folders = [file.parent for file in sorted((self.run.path / "seeds").glob(f"*/{Run.MANIFEST}"))]
        return {folder.name: network_of(folder) for folder in folders if Run.load(folder).finished("float")}

    def _check(self, job: Job) -> None:
        """Refuse what no method could do, before anything is trained."""
        if not self._checked:
            check_trainable(self.recipe)
            for budget in self.plan.budgets:
                job.problem_of(job.untrained, budgets=job.parse_budgets(budget)).check()
            if self.recipe.teacher is not None and self.recipe.teacher.name != "float":
                assert job.teacher is not None  # it loads
            self._checked = True

    # ---- what comes out

    def _tables(self) -> Iterator[dict[str, Any]]:
        for budget in self.plan.budgets:
            for stage in self.plan.stages:
                if self._complete(budget, stage):
                    yield self._table(budget, stage)

    def _table(self, budget: Budgets, stage: Stage) -> dict[str, Any]:
        contenders = []
        for label in self._taking_part(budget, stage):
            rows = self._rows(budget, stage, label)
            contenders.append(Contender(label, tuple(rows), tuple(row["correct"] for row in rows)))
        left_out = {label: why for (where, when, label), why in self.left_out.items() if (where, when) == (budget, stage)}
        last = stage == self.plan.stages[-1]
        asked = {"budget": ", ".join(budget), "stage": stage.name, "last": last, "finetune": stage.changed}
        return {**asked, **standings(contenders, left_out), "goes_on": None if last else self._chosen(budget, stage)}

    def write(self) -> dict[str, Any]:
        """Write compare.json, compare.csv and report.html from what is done, and return what compare.json holds."""
        files = [self._score(seed) for seed in self.plan.seeds]
        content: dict[str, Any] = {
            "run": str(self.run.path),
            "recipe": self.recipe.name,
            "complete": self._whole(),
            "seeds": list(self.plan.seeds),
            "methods": {label: {"method": name, "options": self.plan.options[label]} for label, name in self.plan.methods.items()},
            "float": [read(file, SCORED)["top1"] for file in files if file.is_file()],
            "tables": list(self._tables()),
        }
        with claim(self.run.path, wait=True):
            text = json.dumps({key: value for key, value in content.items() if key != "run"}, indent=1, allow_nan=False)
            runs.write_text_atomic(self.run.path / "compare.json", text + "\n")
            runs.write_text_atomic(self.run.path / "compare.csv", csv_text(content["tables"]))
            runs.write_text_atomic(self.run.path / "report.html", render(self.run.path))
        return {**content, "files": ["compare.json", "compare.csv", "report.html"]}


def _opened(path: Path, bound: Mapping[str, Any]) -> Run:
    """Open a comparison's directory; one in which nothing was done yet is begun anew if the recipe was mended."""
    try:
        return Run.open(path, bound, shared=True)
    except RunError:
        names = {item.name for item in path.rglob("*") if item.is_file()}
        if Run.MANIFEST not in names or not names <= {Run.MANIFEST, "recipe.yaml"}:
            raise
    for name in ("seeds", "searches"):
        shutil.rmtree(path / name, ignore_errors=True)
    for name in (Run.MANIFEST, "recipe.yaml"):
        (path / name).unlink(missing_ok=True)
    return Run.open(path, bound, shared=True)


def _of_seed(recipe: Recipe, seed: int) -> Recipe:
    """Return the recipe of a seed's float network: what methods, budgets and fine-tuning are compared does not matter to it."""
    search_ = recipe.search.model_copy(
        update={"method": "uniform", "options": {}, "budgets": ["weight_bits<=32"], "steps": None, "seconds": None}
    )
    changes = {"seed": seed, "compare": None, "baselines": None, "finetune": None, "search": search_, "report": False, "description": ""}
    return recipe.model_copy(update=changes)


def _bound(recipe: Recipe, seed: int | None) -> dict[str, Any]:
    """Return what all entries of a directory have in common."""
    return {**_of_seed(recipe, 0).to_dict(), "seed": seed}


def _hash(decisive: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


__all__ = ["Comparison", "compare"]
