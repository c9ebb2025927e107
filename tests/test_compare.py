"""`compare`: what it leaves, what it does once, how it goes on after a kill, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from bitwright import cli
from bitwright.claims import claim
from bitwright.compare import compare
from bitwright.driver import search
from bitwright.errors import BitwrightError, BudgetError, RecipeError, RunError
from bitwright.evaluation import evaluate
from bitwright.job import Job
from bitwright.measure import trained
from bitwright.methods import get_method, limpq
from bitwright.methods.fisher import Fisher
from bitwright.models import build
from bitwright.plan import Plan
from bitwright.problem import Problem
from bitwright.recipe import load_recipe
from bitwright.report import render
from bitwright.runs import Run, load_tree
from bitwright.training import FinetuneOptions
from comparing import CHEAPEST, LONG, SHORT, recipe_of, without_times
from conftest import TINY

METHODS = f'''{CHEAPEST}
from bitwright.errors import RecipeError


@dataclass(frozen=True)
class Needy(Cheapest):
    """Needs what is not there."""

    def start(self, problem):
        import a_package_that_nobody_has


@dataclass(frozen=True)
class Failing(SearchMethod[State]):
    ranking: ClassVar[str] = "loss"

    def start(self, problem):
        return State()

    def step(self, problem, state, told):
        return 1 / 0

    def done(self, problem, state):
        return True


@dataclass(frozen=True)
class Refusing(Cheapest):
    """Has a word to say."""

    def start(self, problem):
        raise RecipeError("refusing: this needs two activation widths")
'''


# ---- what it leaves


def test_two_stages_and_who_goes_on(compared: tuple[Path, dict[str, Any]]) -> None:
    short, long = compared[1]["tables"]
    assert (short["stage"], long["stage"], long["last"]) == ("short", "long", True)
    assert {entry["label"] for entry in short["methods"]} == {"fisher", "random", "other", "uniform"}
    means = {e["label"]: e["mean"]["selection_top1"] for e in short["methods"] if e["label"] != "uniform"}
    best = max(means.values())
    (chosen,) = set(short["goes_on"]) - {"uniform"}
    assert means[chosen] == best
    assert {entry["label"] for entry in long["methods"]} == {chosen, "uniform"}
    assert short["finetune"]["max_steps"] == 4
    assert long["finetune"] == {**TINY["finetune"], **LONG}


def test_every_policy_keeps_the_budget_and_every_figure_is_there(compared: tuple[Path, dict[str, Any]]) -> None:
    path, content = compared
    assert content["complete"]
    for table in content["tables"]:
        for entry in table["methods"]:
            assert [row["seed"] for row in entry["rows"]] == [0, 1]
            assert all(row["average_weight_bits"] <= 2.5 for row in entry["rows"])
            assert entry["mean"]["widths"] >= 1
            assert entry["accuracy"]["n"] == 450
            assert (entry["against_uniform"] is None) == (entry["label"] == "uniform" or entry["same_as"] == "uniform")
    passes = {entry["label"]: entry["mean"]["search_sample_passes"] for entry in content["tables"][0]["methods"]}
    assert passes["uniform"] <= passes["random"] < passes["fisher"]
    assert {entry["mean"]["widths"] for entry in content["tables"][0]["methods"] if entry["label"] == "uniform"} == {1}
    with (path / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["method", "budget", "seed", "stage"]
    assert {row["stage"] for row in rows} == {"short", "long"}
    assert sum(row["seed"] == "mean" for row in rows) == 6
    assert json.loads((path / "compare.json").read_text())["tables"] == content["tables"]


def test_a_row_is_what_search_and_training_by_hand_give(compared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, content = compared
    (entry,) = [entry for entry in content["tables"][0]["methods"] if entry["label"] == "fisher"]
    row = entry["rows"][1]
    job = Job.open(load_recipe({**copy.deepcopy(TINY), "seed": 1}), tmp_path / "run")
    shutil.copyfile(path / "seeds/1/float.safetensors", tmp_path / "run/float.safetensors")
    result = search(job.problem, get_method("fisher")(samples=128))
    assert {name: list(bits) for name, bits in result.policy.items()} == row["bits"]
    assert result.sample_passes == row["search"]["sample_passes"]
    model = trained(job, result.policy, FinetuneOptions(**{**TINY["finetune"], **SHORT}), tmp_path / "out")
    assert evaluate(model, job.data.test).top1 == row["top1"]
    assert evaluate(model, job.data.selection).top1 == row["selection"]["top1"]
    kept = load_tree(path / "trainings" / row["key"] / "correct.safetensors")["correct"]
    assert kept.float().mean().item() == pytest.approx(row["top1"])


def test_options_reach_their_method(compared: tuple[Path, dict[str, Any]]) -> None:
    path, content = compared
    assert content["methods"]["fisher"] == {"method": "fisher", "options": {"samples": 128}}
    assert content["methods"]["other"] == {"method": "random", "options": {"within": 0.3}}
    assert len(list((path / "searches").glob("random-*"))) == 4


def test_nothing_is_left_of_checkpoints(compared: tuple[Path, dict[str, Any]]) -> None:
    assert list(compared[0].glob("searches/*/checkpoint")) == []
    assert list(compared[0].glob("trainings/*/checkpoint")) == []


# ---- what is done once


def test_the_same_command_does_nothing_twice(compared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path = shutil.copytree(compared[0], tmp_path / "copy")
    before = {file: file.stat().st_mtime_ns for file in path.rglob("result.json")}
    seen: list[Any] = []
    again = compare(recipe_of(), path, log=lambda label, row: seen.append((label, row)))
    assert seen == []
    assert {file: file.stat().st_mtime_ns for file in path.rglob("result.json")} == before
    assert without_times(again) == without_times(compared[1])


def test_what_is_there_serves_another_choice_of_methods_and_stages(compared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path = shutil.copytree(compared[0], tmp_path / "copy")
    before = set(path.glob("trainings/*"))
    options = {"fisher": {"samples": 128}, "again": {"samples": 128}}
    content = compare(recipe_of(methods=["fisher", "again=fisher"], options=options, long=None, seeds=[1]), path)
    (table,) = content["tables"]
    assert table["last"]
    assert {entry["label"] for entry in table["methods"]} == {"fisher", "again", "uniform"}
    assert set(path.glob("trainings/*")) == before
    twins = [entry for entry in table["methods"] if entry["label"] in ("fisher", "again")]
    assert twins[1]["same_as"] == twins[0]["label"]
    assert twins[0]["accuracy"] == twins[1]["accuracy"]


def test_what_was_measured_for_one_budget_is_solved_again_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, ...]] = []
    scores = Fisher.scores

    def counted(self: Fisher, problem: Problem) -> Any:
        measured.append(tuple(budget.text for budget in problem.budgets))
        return scores(self, problem)

    monkeypatch.setattr(Fisher, "scores", counted)
    asked = {"methods": ["fisher"], "seeds": [0], "short": None, "long": None, "options": {"fisher": {"samples": 128}}}
    both = [["weight_bits<=3"], ["weight_bits<=2.5"]]
    one = compare(recipe_of(**asked, budgets=both), tmp_path / "both")
    assert measured == [("weight_bits<=3",)]
    begun = next(path for path in (tmp_path / "both" / "searches").glob("fisher-*") if "2.5" in (path / "result.json").read_text())
    (begun / "result.json").unlink()  # as if it had been killed: begun with a table, gone on without one
    other = compare(recipe_of(**asked, budgets=both[1:]), tmp_path / "both")
    assert measured == [("weight_bits<=3",), ("weight_bits<=2.5",)]
    first, solved, alone = [
        next(entry for entry in table["methods"] if entry["label"] == "fisher")["rows"][0] for table in (*one["tables"], *other["tables"])
    ]
    assert without_times(solved) == without_times(alone)  # sample-passes too, as a search at this budget alone would have taken
    assert solved["search"]["seconds"] > first["search"]["seconds"]


def test_a_scoring_method_that_trains_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    train = limpq._Engine.train

    class Killed(BaseException):
        pass

    def counted(self: Any, step: int) -> None:
        steps.append(step)
        if steps == [0, 1, 2]:
            raise Killed
        train(self, step)

    monkeypatch.setattr(limpq._Engine, "train", counted)
    options = {"limpq": {"max_steps": 4, "batch_size": 32}}
    recipe = recipe_of(methods=["limpq"], seeds=[0], short=None, long=None, options=options)
    recipe["search"] = {**recipe["search"], "save_every": 1}
    with pytest.raises(Killed):
        compare(recipe, tmp_path / "c")
    compare(recipe, tmp_path / "c")
    assert steps == [0, 1, 2, 2, 3]  # the third was killed


def test_another_teacher_under_the_same_path_is_another_training(tmp_path: Path) -> None:
    teacher, recipe = tmp_path / "teacher.safetensors", recipe_of(methods=["uniform"], seeds=[0], options={}, long=None)
    recipe["teacher"] = {"name": "digits_cnn", "weights": str(teacher)}
    tops = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(dict(build("digits_cnn").state_dict()), teacher)
        compare(recipe, tmp_path / "run")
        tops.append(len(list((tmp_path / "run" / "trainings").iterdir())))
    assert tops == [1, 2]
    teacher.unlink()
    with pytest.raises(RunError, match=r"teacher\.weights=.*: cannot be read"):
        compare(recipe, tmp_path / "run")


def test_work_of_another_process_is_waited_for(compared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path = shutil.copytree(compared[0], tmp_path / "copy")
    folder = next(path.glob("trainings/*"))
    (folder / "result.json").rename(folder / "away.json")
    seen: list[Any] = []
    with contextlib.ExitStack() as held:
        held.enter_context(claim(folder))

        def log(label: str, row: Any) -> None:
            seen.append(row)
            (folder / "away.json").rename(folder / "result.json")
            held.close()

        again = compare(recipe_of(), path, log=log)
    (row,) = seen
    assert row["waiting"].startswith("other processes work on 1 of ")
    assert without_times(again) == without_times(compared[1])


def test_a_killed_comparison_goes_on_to_the_same_result(compared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path = shutil.copytree(compared[0], tmp_path / "copy")
    for left in [*sorted(path.glob("trainings/*"))[:3], *path.glob("searches/fisher-*-1"), *path.glob("compare.*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_of()))
    command = [sys.executable, "-m", "bitwright", "compare", str(file), "--out", str(path), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not list(path.glob("trainings/*/checkpoint/*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    assert list(path.glob("trainings/*/checkpoint")), "it was to be killed in a training"
    assert not (path / "compare.json").exists()
    with pytest.raises(RunError, match=r"no stage of this comparison is complete yet; `bitwright compare .*` goes on with it"):
        render(path)
    assert without_times(compare(file, path)) == without_times(compared[1])


# ---- who goes on


def test_methods_with_the_same_policies_share_one_place(compared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path = shutil.copytree(compared[0], tmp_path / "copy")
    options = {"other": {"within": 0.3}, **{label: {"samples": 128} for label in ("fisher", "twin")}}
    ranks = {"same=uniform": 0.9, "fisher": 0.8, "twin=fisher": 0.8, "other=random": 0.7, "random": 0.6}
    for file in path.glob("trainings/*/result.json"):  # the order on the selection images is not left to chance
        row = json.loads(file.read_text())
        who = [name for name in ranks if json.dumps(row["bits"]) in _bits(compared[1], name)]
        file.write_text(json.dumps({**row, "selection": {"top1": ranks[who[0]], "loss": 1.0}}))
    short, long = compare(recipe_of(methods=list(ranks), options=options, best=2), path)["tables"]
    assert set(short["goes_on"]) == {"uniform", "same", "fisher", "twin", "other"}  # "same" and "twin" take no place
    assert {entry["label"] for entry in long["methods"]} == set(short["goes_on"])
    twins = [entry for entry in long["methods"] if entry["label"] in ("fisher", "twin")]
    assert [row["key"] for row in twins[0]["rows"]] == [row["key"] for row in twins[1]["rows"]]


def _bits(content: dict[str, Any], name: str) -> set[str]:
    """Return the policies that a method, named as in `compare.methods`, had in the first stage of a comparison."""
    label = {"same=uniform": "uniform", "twin=fisher": "fisher"}.get(name, name.partition("=")[0])
    (entry,) = [entry for entry in content["tables"][0]["methods"] if entry["label"] == label]
    return {json.dumps(row["bits"]) for row in entry["rows"]}


# ---- who takes no part


def test_a_method_that_cannot_run_is_shown_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(METHODS)
    monkeypatch.syspath_prepend(str(tmp_path))
    methods = ["mine:Needy", "no=mine:Refusing", "bad=mine:Failing", "low=mine:Cheapest"]
    recipe = recipe_of(methods=methods, seeds=[0], long=None, options={})
    recipe["search"]["never_worse"] = True

    def where(code: str) -> str:
        line = next(number for number, text in enumerate(METHODS.splitlines(), 1) if code in text)
        return f"({tmp_path / 'mine.py'}, line {line}); mend that file"

    content = compare(recipe, tmp_path / "run")
    (table,) = content["tables"]
    assert table["left_out"] == {
        "mine:Needy": "seed 0: the search failed: ModuleNotFoundError: No module named 'a_package_that_nobody_has' "
        + where("import a_pack"),
        "no": "seed 0: refusing: this needs two activation widths",
        "bad": f"seed 0: the search failed: ZeroDivisionError: division by zero {where('1 / 0')}",
    }
    entries = {entry["label"]: entry for entry in table["methods"]}
    assert set(entries) == {"low", "uniform"}
    # Its loss is above that of uniform, which must not replace it although the recipe says never_worse.
    assert entries["low"]["mean"]["average_weight_bits"] < entries["uniform"]["mean"]["average_weight_bits"]
    assert entries["low"]["rows"][0]["search"]["loss"] > entries["uniform"]["rows"][0]["search"]["loss"]
    assert "refusing: this needs two activation widths" in (tmp_path / "run/report.html").read_text()
    assert "refusing: this needs two activation widths" in (tmp_path / "run/compare.csv").read_text()
    assert len(list(tmp_path.glob("run/searches/mine-Cheapest-*"))) == 1
    (tmp_path / "mine.py").write_text(METHODS + "# edited")
    compare(recipe, tmp_path / "run")
    assert len(list(tmp_path.glob("run/searches/mine-Cheapest-*"))) == 2  # what was found before the edit is not shown again


def test_a_method_of_the_package_that_fails_is_our_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.methods.uniform.Uniform.step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare(recipe_of(methods=["uniform"], options={}, seeds=[0], long=None), tmp_path / "run")


def test_where_nobody_can_run_it_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.problem.Problem.uniform", lambda self: None)
    with pytest.raises(BudgetError, match=r"compare: no method can run at weight_bits<=2.5: seed 0: method 'uniform': no single width"):
        compare(recipe_of(methods=["uniform"], options={}, seeds=[0], long=None), tmp_path / "run")


# ---- the plan


def test_defaults_of_the_plan(tiny: dict[str, Any]) -> None:
    plan = Plan.of(load_recipe({**tiny, "seed": 4}))
    assert list(plan.methods) == ["sdq", "fisher", "random", "uniform"]
    assert plan.seeds == (4, 5, 6)
    assert plan.budgets == (("weight_bits<=2.5",),)
    assert plan.options["sdq"] == tiny["search"]["options"]
    assert [(stage.name, stage.options) for stage in plan.stages] == [("long", FinetuneOptions(**tiny["finetune"]))]
    assert Plan.of(load_recipe({**tiny, "finetune": None})).stages[0].options is None


def test_stages_and_budgets_of_the_plan(tiny: dict[str, Any]) -> None:
    def stages(**section: Any) -> list[str]:
        return [stage.name for stage in Plan.of(load_recipe({**tiny, "compare": section})).stages]

    assert stages(short={"epochs": 1}) == ["short"]
    assert stages(long={"epochs": 9}) == ["long"]
    assert stages(short={"epochs": 1}, long={}) == ["short", "long"]
    budgets = ["weight_bits<=3, size<=9KB", ["bitops<=W3A4"]]
    assert Plan.of(load_recipe({**tiny, "compare": {"budgets": budgets}})).budgets == (("weight_bits<=3", "size<=9KB"), ("bitops<=W3A4",))


# ---- what is refused


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"methods": ["fishr"]}, r"unknown method 'fishr'; did you mean 'fisher'\?"),
        ({"methods": ["fisher", "fisher"]}, r"compare.methods is .*; 'fisher' is given twice; give each once"),
        ({"methods": ["a=fisher", "a=random"]}, r"compare.methods has 'a=fisher'; give NAME or LABEL=NAME, each label once"),
        ({"methods": ["uniform=fisher"]}, r"compare.methods has 'uniform=fisher'; .* none called uniform"),
        ({"options": {"sdq": {"epoch": 3}}}, r"unknown key 'compare.options.sdq.epoch'; did you mean 'epochs'\?"),
        ({"options": {"sqd": {}}}, r"compare.options.sqd is for no method and no label .*; did you mean 'sdq'\?, or name it there as sqd="),
        ({"options": {"random": {"count": 0}}}, r"random: count=0, within=0.02; give a count of at least 1"),
        ({"short": {"epoch": 3}}, r"unknown key 'compare.short.epoch'; did you mean 'epochs'\?"),
        ({"seeds": [0, -1]}, r"compare.seeds.1 is -1; expected greater than or equal to 0"),
        ({"best": 0}, r"compare.best is 0; expected greater than or equal to 1"),
        ({"method": ["sdq"]}, r"unknown key 'compare.method'; did you mean 'methods'\?"),
    ],
)
def test_a_wrong_section_is_refused(tiny: dict[str, Any], section: dict[str, Any], message: str) -> None:
    with pytest.raises(BitwrightError, match=message):
        load_recipe({**tiny, "compare": section})


def test_budgets_are_checked_before_anything_is_trained(tmp_path: Path) -> None:
    for text, message in (("weight_bits<=0.5", "cannot be met"), ("watts<=3", "watts")):
        with pytest.raises(BudgetError, match=message):
            compare(recipe_of(budgets=["weight_bits<=3", text]), tmp_path / text[:5])
        assert not list((tmp_path / text[:5]).rglob("float.safetensors"))
    with pytest.raises(RecipeError, match=r"has neither model.weights nor a float section"):
        compare({**recipe_of(), "float": None}, tmp_path / "run")
    with pytest.raises(BudgetError, match="cannot be met"):  # not "began with another recipe": nothing was done yet
        compare(recipe_of(budgets=["weight_bits<=0.5"]), tmp_path / "run")


def test_a_directory_of_something_else_is_refused(compared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    Run.open(tmp_path / "run", {"name": "a run"})
    with pytest.raises(RunError, match=r"holds a run, no comparison; give another --out"):
        compare(recipe_of(), tmp_path / "run")
    with pytest.raises(RunError, match=r"holds a comparison, no run; type `bitwright compare .*` or `bitwright report"):
        Job.load(compared[0])
    other = {**recipe_of(), "model": {"name": "digits_cnn", "weights": "other.npz"}}
    with pytest.raises(RunError, match=r"began with another recipe; it differs in model.weights \(was null, now \"other.npz\"\)"):
        compare(other, compared[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file, and a comparison needs a directory"):
        compare(recipe_of(), tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("")
    with pytest.raises(RunError, match=r"has files in it but no manifest.json"):
        compare(recipe_of(), tmp_path / "full")


# ---- the command line


def test_the_verb(compared: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shutil.copytree(compared[0], tmp_path / "copy")
    changes = ["--set", "compare.options={fisher: {samples: 128}}", "--set", "compare.long=null"]
    assert cli.main(["compare", str(path), "--methods", "fisher", "random", *changes, "--json"]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    content = json.loads(last)
    assert content["run"] == str(path)
    assert content["files"] == ["compare.json", "compare.csv", "report.html"]
    text = "\n".join(shown)
    for words in ("weight_bits<=2.5, short stage (1 epoch, 4 steps at most)", "to uniform", "passes", "uniform here", "report.html"):
        assert words in text
    assert cli.main(["report", str(path)]) == 0
    assert cli.main(["compare", str(path), "--budget", "weight_bits<=0.1"]) == 2
    assert "budget 'weight_bits<=0.1' cannot be met" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "recipe 'nothing': no bundled recipe and no file of that name"),
        (["digits-sdq", "--seeds", "one"], "compare: argument --seeds: invalid int value: 'one'"),
        (["digits-sdq", "--method", "sdq"], "compare: unknown argument '--method'; did you mean '--methods'?"),
        (["digits-sdq", "--methods", "sqd"], "unknown method 'sqd'; did you mean 'sdq'?"),
        (["."], ".: no comparison (it has no recipe.yaml); give a recipe, or the --out of a `bitwright compare`"),
        ([".", "--out", "x"], "compare .: is a directory to go on with; leave out --out, or give a recipe instead"),
    ],
)
def test_bad_commands_are_one_line(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_search_on_a_proxy_is_one_here_too(tmp_path: Path) -> None:
    recipe = recipe_of(methods=["fisher"], seeds=[0], options={}, long=None, short={"max_steps": 1})
    recipe["search"]["proxy"] = {"name": "digits", "images": 200, "adapt": None}
    (table,) = compare(recipe, tmp_path / "run")["tables"]
    (fisher,) = [entry for entry in table["methods"] if entry["label"] == "fisher"]
    search_ = fisher["rows"][0]["search"]
    assert (search_["proxy"]["data"], search_["proxy"]["images"]) == ("digits", 200)
    assert search_["sample_passes"] > search_["proxy"]["adaptation_passes"] > 0  # at least its statistics were taken anew
    assert (tmp_path / "run/seeds/0/proxy.safetensors").is_file()
    with pytest.raises(RunError, match=r"it differs in search.proxy.*; give another --out"):
        compare(recipe_of(), tmp_path / "run")
