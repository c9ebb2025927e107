"""The registry: the folder, entry points of other packages, and classes by their path."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from importlib.metadata import EntryPoint

import pytest
from safetensors.torch import save_file

import bitwright.methods
from bitwright import baselines, cli, runs
from bitwright.driver import SearchMethod, search
from bitwright.errors import RecipeError, RunError
from bitwright.job import Job
from bitwright.methods import available, get_method
from bitwright.methods.uniform import Uniform
from bitwright.policy import Policy
from bitwright.testing import table_problem

OUTSIDE = '''
"""Narrowing: every site at one of its choices, from the widest down, until the budget holds."""

from dataclasses import dataclass
from typing import ClassVar

from bitwright.driver import Proposal, SearchMethod


@dataclass
class State:
    lowered: int = 0


@dataclass(frozen=True)
class Narrowing(SearchMethod[State]):
    """Lower all sites together.

    Attributes:
        notches: choices to go down at each step.
    """

    ranking: ClassVar[str] = "loss"

    notches: int = 1

    def start(self, problem):
        return State(-self.notches)

    def step(self, problem, state, told):
        state = State(state.lowered + self.notches)
        index = [max(0, len(allowed) - 1 - state.lowered) for allowed in problem.choices.values()]
        return state, Proposal(problem.policy(index), note={"lowered": state.lowered})

    def done(self, problem, state):
        index = [max(0, len(allowed) - 1 - state.lowered) for allowed in problem.choices.values()]
        return problem.feasible(problem.policy(index))
'''


def trained_digits(run, folder):
    """Return the flags of a trained network, whose weights are taken from a run."""
    weights = {name: tensor.contiguous() for name, tensor in runs.load_tree(run / "float.safetensors").items()}
    save_file(weights, folder / "net.safetensors")
    return ["--model", "digits_cnn", "--weights", str(folder / "net.safetensors"), "--data", "digits", "--held-out", "100"]


def test_every_file_is_a_method_named_like_it():
    found = available()
    assert {"uniform", "random", "fisher", "sdq", "greedy", "evolution", "haq"} <= set(found)
    for name, kind in found.items():
        assert get_method(name) is kind
        assert kind().name == name
        assert kind.ranking in {"loss", "last"}
        assert dataclasses.fields(kind) is not None
        assert kind.__dataclass_params__.frozen


def test_a_class_by_its_path():
    assert get_method("bitwright.methods.uniform:Uniform") is Uniform


def test_a_method_from_another_package_searches_from_the_command_line(monkeypatch, tmp_path, finished_run, capsys):
    package = tmp_path / "elsewhere"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "narrowing.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    network = trained_digits(finished_run, tmp_path)
    asked = ["--budget", "weight_bits<=4", "--weight-bits", "1", "2", "3", "4", "8", "--method", "elsewhere.narrowing:Narrowing"]
    out = tmp_path / "run"
    assert cli.main(["search", *network, *asked, "--notches", "2", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["search"]
    assert result["method"] == "elsewhere.narrowing:Narrowing"
    lines = [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()]
    assert [line["note"]["lowered"] for line in lines[1:]] == [0.0, 2.0]  # --notches 2, after the line of the uniform point
    assert {bits[0] for name, bits in lines[-1]["proposed"].items() if name not in ("conv1", "fc")} == {3}  # two choices under 8
    best = min(lines[1:], key=lambda line: line["loss"])
    assert Policy.from_json((out / "policy.json").read_text()) == Policy(best["policy"])
    assert result["average_weight_bits"] <= 4
    assert cli.main(["search", str(out), "--again", "--json"]) == 0  # the recipe in the run directory names it too
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["search"]["method"] == "elsewhere.narrowing:Narrowing"


STEP = "        state = State(state.lowered + self.notches)\n"
LINE = 1 + OUTSIDE.splitlines().index(STEP.rstrip())


@pytest.mark.parametrize(
    ("name", "instead", "message"),
    [
        ("raises", "        1 / 0\n", rf"ZeroDivisionError: division by zero (PATH, line {LINE}); mend that file"),
        ("lacks", "        import a_package_that_nobody_has\n", "ModuleNotFoundError: No module named 'a_package_that_nobody_has' (PATH"),
        ("bare", "        return state\n", "step() returned State; let it return a tuple of the state and a Proposal or None"),
        ("stateless", "        return 3, None\n", "its state is a int; let step() return a dataclass of tensors and numbers"),
        ("unsaved", "        return State(problem), None\n", "TypeError: tree.state.lowered: cannot save Problem; use tensors, numbers"),
    ],
)
def test_a_fault_of_a_method_from_outside_is_one_line_that_says_where(name, instead, message, monkeypatch, tmp_path, finished_run, capsys):
    file = tmp_path / f"fault_{name}.py"
    begin, _, _ = OUTSIDE.replace(STEP, instead).partition("    def done(")
    file.write_text(begin + "    def done(self, problem, state):\n        return False\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    network = trained_digits(finished_run, tmp_path)
    asked = ["--budget", "weight_bits<=4", "--method", f"fault_{name}:Narrowing", "--set", "search.save_every=1"]
    assert cli.main(["search", *network, *asked, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("bitwright: the search failed: ")
    assert message.replace("PATH", str(file)) in said
    assert "Traceback" not in said


SCORED = """
from dataclasses import dataclass
from bitwright.sensitivity import ScoredMethod


@dataclass(frozen=True)
class Scored(ScoredMethod):
    def scores(self, problem):
        return 1 / 0
"""


def test_profiles_and_baselines_say_it_too(monkeypatch, tmp_path, finished_run, capsys):
    file = tmp_path / "fault_scored.py"
    file.write_text(SCORED)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(["profile", str(finished_run), "--sensitivity", "--measure", "fault_scored:Scored"]) == 2
    message = f"the search failed: ZeroDivisionError: division by zero ({file}, line 9); mend that file"
    assert message in capsys.readouterr().err
    with pytest.raises(RecipeError, match=re.escape(message)):
        baselines._policy(Job.load(finished_run), "fault_scored:Scored", 0)


def test_a_fault_of_our_own_method_is_our_fault(monkeypatch, tmp_path, finished_run, capsys):
    monkeypatch.setattr("bitwright.methods.uniform.Uniform.step", lambda *_: 1 / 0)
    network = trained_digits(finished_run, tmp_path)
    asked = ["--budget", "weight_bits<=4", "--method", "uniform", "--out", str(tmp_path / "run")]
    assert cli.main(["search", *network, *asked]) == 1
    assert "this is our fault, not yours" in capsys.readouterr().err


def test_a_file_in_the_working_directory_is_a_method(monkeypatch, tmp_path):
    (tmp_path / "own_narrowing.py").write_text(OUTSIDE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    assert get_method("own_narrowing:Narrowing")().notches == 1
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("own_syntax", "x = (\n", r"cannot be imported: SyntaxError: .* \(\S*own_syntax.py, line 1\); mend that file"),
        ("own_fails", "x = 1\ny = 1 / 0\n", r"imported: ZeroDivisionError: division by zero \(\S*own_fails.py, line 2\); mend that file"),
        (
            "own_plain",
            OUTSIDE.replace("@dataclass(frozen=True)\n", ""),
            r"is no dataclass of options; write @dataclass\(frozen=True\) above class Narrowing in \S*own_plain.py",
        ),
        (
            "own_unranked",
            OUTSIDE.replace('    ranking: ClassVar[str] = "loss"\n', ""),
            r"'own_unranked:Narrowing' does not say how its proposals are ranked; write ranking: ClassVar = \"loss\" in it, or \"last\"",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(name, text, message, monkeypatch, tmp_path):
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message):
        get_method(f"{name}:Narrowing")


def test_a_search_by_an_edited_file_does_not_go_on(monkeypatch, tmp_path):
    (tmp_path / "own_edited.py").write_text(OUTSIDE)
    monkeypatch.chdir(tmp_path)
    small = table_problem([[1.0, 0.5]] * 2, [[[2, 4]] * 2], [8])
    kind = get_method("own_edited:Narrowing")
    search(small, kind(), out=tmp_path / "run")
    search(small, kind(), out=tmp_path / "run")
    (tmp_path / "own_edited.py").write_text(OUTSIDE + "# changed")
    with pytest.raises(RunError, match="holds a search with another source"):
        search(small, kind(), out=tmp_path / "run")


def test_entry_points_add_methods(monkeypatch):
    entry = EntryPoint("mine", "bitwright.methods.uniform:Uniform", bitwright.methods.GROUP)
    monkeypatch.setattr(bitwright.methods, "entry_points", lambda group, name="mine": [entry] if name == "mine" else [])
    assert get_method("mine") is Uniform
    assert available()["mine"] is Uniform


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unifrom", r"unknown method 'unifrom'; did you mean 'uniform'\?, or package.module:Class for one of your own"),
        ("no_such_package:Thing", r"method 'no_such_package:Thing' cannot be imported \(No module named 'no_such_package'\)"),
        ("bitwright.methods.uniform:Nothing", "cannot be imported .*has no attribute 'Nothing'"),
        (":Nothing", "cannot be imported"),
        ("bitwright.methods.uniform:State", "method 'bitwright.methods.uniform:State' is no search method; give a class that derives"),
        ("bitwright.driver:SearchMethod", "is no search method"),
    ],
)
def test_what_is_no_method_is_refused(name, message):
    with pytest.raises(RecipeError, match=message):
        get_method(name)


def test_a_file_without_a_method_is_named(monkeypatch):
    monkeypatch.setattr(bitwright.methods, "_names", lambda: ["functional"])
    monkeypatch.setattr(bitwright.methods, "__name__", "bitwright.quant")
    with pytest.raises(RecipeError, match=r"bitwright\.quant\.functional: holds no SearchMethod"):
        get_method("functional")


def test_the_base_class_cannot_be_used():
    with pytest.raises(TypeError):
        SearchMethod()
