"""The report: stands alone, escapes every text, says what the files say, and copes with a run that is not finished."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bitwright.errors import RunError
from bitwright.report import charts, policy_rows, render, terminal
from bitwright.report.facts import alarms, expected_bits, read_facts
from bitwright.runs import Run, read_jsonl
from pages import checked


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run, free to be changed."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_page_is_well_formed_and_stands_alone(finished_run: Path) -> None:
    page = render(finished_run)
    checker = checked(page)
    assert checker.references == []
    assert not re.search(r"https?://|@import|url\(", page)
    assert "script" not in checker.tags
    assert {"svg", "table", "style", "details"} <= checker.tags


def test_every_section_says_what_the_files_say(finished_run: Path) -> None:
    text = checked(render(finished_run)).text
    evaluation = json.loads((finished_run / "evaluation.json").read_text())
    for part in ("float", "quantized"):
        assert f"{100 * evaluation[part]['top1']:.2f} %" in text
    for words in ("Alarms", "Policies of the same budget", "Bits per site", "Search", "Training", "Weights in their bins", "Provenance"):
        assert words in text
    for site in ("conv1", "depthwise", "fc"):
        assert site in text
    assert Run.load(finished_run).manifest["fingerprint"][:16] in text
    assert "weight_bits<=2.5" in text


def test_the_report_computes_nothing_anew(copied: Path) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert render(copied) == render(copied)
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_every_text_is_escaped(copied: Path) -> None:
    evil = '<script>alert("x")</script>&'
    sites = json.loads((copied / "sites.json").read_text())
    sites["budgets"][0]["text"] = evil
    (copied / "sites.json").write_text(json.dumps(sites))
    _edit(copied / "search.json", method=evil, budgets=[evil])
    (copied / "recipe.yaml").write_text(evil)
    baselines = json.loads((copied / "baselines.json").read_text())
    baselines["rows"][1]["policy"] = evil
    (copied / "baselines.json").write_text(json.dumps(baselines))
    _edit(
        copied / "statistics.json",
        **{evil: {"before": {"bits": 2, "variance": 0.1, "entropy": 1.0}, "after": {"bits": 2, "variance": 0.1, "entropy": 1.0}}},
    )
    page = render(copied)
    assert "<script" not in page
    assert checked(page).text.count('alert("x")') >= 5


def test_an_unfinished_run_has_fewer_sections(copied: Path) -> None:
    names = ("baselines.json", "evaluation.json", "export/export.json", "statistics.json", "finetune.jsonl", "search.json", "float.jsonl")
    for name in names:
        (copied / name).unlink()
        checked(render(copied))
    for name in ("search.jsonl", "policy.json", "sites.json"):
        (copied / name).unlink()
        text = checked(render(copied)).text
    assert "Provenance" in text
    assert "Bits per site" not in text


def test_no_run_and_damaged_files_are_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run directory"):
        render(tmp_path / "nowhere")
    (copied / "search.json").write_text("[1]")
    with pytest.raises(RunError, match="expected an object"):
        render(copied)
    (copied / "search.json").write_text("{")
    with pytest.raises(RunError, match=r"search.json: not JSON .*; restore it from a copy, or run its stage again"):
        render(copied)


# ---- the table


def test_the_table_has_the_result_first_and_the_equal_finetuning_apart(finished_run: Path) -> None:
    rows = policy_rows(read_facts(finished_run))
    assert [(row.group, row.name) for row in rows] == [
        ("main", "float"),
        ("main", "sdq"),
        ("same", "sdq"),
        ("same", "uniform"),
        ("same", "random 1"),
        ("same", "random 2"),
        ("same", "fisher"),
    ]
    assert [row.name for row in rows if row.chosen] == ["sdq", "sdq"]
    assert rows[0].cells[1] == "32.00"


def test_the_terminal_shows_the_same_rows(finished_run: Path) -> None:
    stream = io.StringIO()
    terminal.show(finished_run, Console(file=stream, width=80))
    out = stream.getvalue()
    for row in policy_rows(read_facts(finished_run)):
        assert all(cell in out for cell in row.cells[:-1]), row  # the widths may be folded
    assert max(len(line) for line in out.splitlines() if str(finished_run) not in line) <= 80  # paths are left whole


# ---- the trajectory and the alarms


def test_expected_bits_are_the_means_of_the_gates(copied: Path) -> None:
    lines = [json.dumps(line) for line in read_jsonl(copied / "search.jsonl")[:1]]
    policy = {name: list(bits) for name, bits in json.loads(lines[0])["policy"].items()}
    for step in (10, 20):
        gates = {"conv2:w": [0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0], "conv3": [0, 0, 0, 1, 0, 0, 0, 0]}
        record = {"step": step, "proposed": policy, "policy": policy, "costs": [1], "loss": None, "repaired": False, "seconds": 1.0}
        lines.append(json.dumps({**record, "gates": gates, "expected": [1.0]}))
    (copied / "search.jsonl").write_text("".join(line + "\n" for line in lines))
    steps, paths = expected_bits(read_facts(copied))
    assert steps == [10.0, 20.0]
    assert paths["conv2"] == [2.5, 2.5]
    assert paths["conv3"] == [4.0, 4.0]
    assert paths["depthwise"] == [policy["depthwise"][0]] * 2
    said = " ".join(alarms(read_facts(copied)))
    assert "The bits of 4 of 4 sites never moved during the search: conv2, depthwise" in said


def test_alarms_of_collapse_repair_stop_and_waste(copied: Path) -> None:
    policy = json.loads((copied / "policy.json").read_text())
    for name in ("conv2", "depthwise", "pointwise", "conv3"):
        policy["sites"][name]["w"] = 2
    (copied / "policy.json").write_text(json.dumps(policy))
    _edit(copied / "manifest.json", stages={})  # so that nothing says which policy the run was done with
    lines = read_jsonl(copied / "search.jsonl")
    plain = {name: [bits["w"], bits["a"]] for name, bits in policy["sites"].items()}
    moved = {**plain, "conv2": [8, 4]}
    base = {"costs": [1], "loss": None, "seconds": 1.0}
    lines += [
        {**base, "step": 1, "proposed": moved, "policy": moved, "repaired": False},
        {**base, "step": 2, "proposed": plain, "policy": plain, "repaired": True, "note": {"collapsed": 1.0, "short": 1.0}},
    ]
    (copied / "search.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    limit = json.loads((copied / "sites.json").read_text())["budgets"][0]["limit"]
    uniform = {"loss": 0.1, "costs": [1]}
    _edit(copied / "search.json", status="stopped", loss=0.2, costs=[limit // 2], uniform=uniform)
    verdict = {"n": 9, "mean": 0.9, "standard_error": 0.01, "gap": 0.015, "standard_errors": 1.5}
    _edit(copied / "baselines.json", random=verdict)
    said = " ".join(alarms(read_facts(copied)))
    for words in (
        "stopped by a step or time limit",
        "the search collapsed to a uniform policy",
        "broke the budget; the nearest feasible policy was taken",
        "fell to its lowest candidate",
        "took 2 steps, too few to see what a width is worth",
        "spends 50% of its tightest budget",
        "the uniform policy of the same budget has the lower loss (0.1 against 0.2)",
        "does not beat the mean of 9 random policies of the same budget by more than two standard errors",
        "(+1.50 points, standard error 1.00)",
    ):
        assert words in said
    checked(render(copied))


# ---- the charts


def test_charts_cope_with_the_ends_of_what_they_may_be_given() -> None:
    assert charts.lines([charts.Line("x", [], [])], x_label="a", y_label="b") == ""
    assert charts.lines([charts.Line("x", [1.0], [float("nan")])], x_label="a", y_label="b") == ""
    assert charts.dots([], unit="%") == ""
    for ys in ([1.0], [1.0, 1.0], [0.0, 0.0], [1.0, float("nan"), 2.0], [-5.0, 1e9]):
        line = charts.Line("<b>", [float(x) for x in range(len(ys))], ys)
        picture = charts.lines([line, line], x_label="<", y_label="&", limit=0.5, title="<i>")
        assert "nan" not in picture
        assert "<b>" not in picture
        checked(picture)
    checked(charts.heat({"a<": [8.0] * 500}, [float(k) for k in range(500)], x_label="step"))
    checked(charts.bars([charts.Bar("x" * 99, 0.0, "<0>")], 0.0))
    checked(charts.dots([charts.Dot("x", 1.0, 1.0, 1.0, "1")], unit="%"))


def test_a_long_series_is_thinned_and_keeps_its_ends() -> None:
    picture = charts.lines(
        [charts.Line("x", [float(k) for k in range(10_000)], [float(k) for k in range(10_000)])], x_label="a", y_label="b"
    )
    points = re.search(r'points="([^"]*)"', picture)
    assert points is not None
    assert len(points[1].split()) == 600
    assert charts.heat({"a": [1.0] * 999}, [float(k) for k in range(999)], x_label="s").count("<rect") == 120


def _additivity(warning: str | None) -> dict[str, Any]:
    points = [
        {"drawn": drawn, "predicted": 0.01 * k, "measured": 0.02 * k * k}
        for k, drawn in enumerate(["budget", "choices", "budget", "choices"])
    ]
    found = {"value": 0.91, "low": 0.8, "high": 0.95, "n": 4}
    return {
        "measure": "<kl>",
        "points": points,
        "spearman": found,
        "pearson": found,
        "near_budget": found,
        "threshold": 0.8,
        "warning": warning,
    }


def test_a_check_of_additivity_is_shown_as_points_and_correlations(copied: Path) -> None:
    assert "Is the loss additive?" not in render(copied)
    (copied / "additivity.json").write_text(json.dumps(_additivity(None)))
    page = render(copied)
    text = checked(page).text
    assert "Is the loss additive?" in text
    assert "rank correlation, 4 policies" in text
    assert text.count("0.910 (95 %: 0.800 to 0.950)") == 3
    assert "foretold loss ('<kl>')" in text
    section = page[page.index("Is the loss additive?") :]
    assert section[: section.index("</section>")].count("<circle") == 3  # a loss of 0 has no place on a logarithmic axis
    assert not any("additive" in alarm for alarm in alarms(read_facts(copied)))


def test_a_loss_that_is_not_additive_is_an_alarm_in_the_report_and_on_the_terminal(copied: Path) -> None:
    (copied / "additivity.json").write_text(json.dumps(_additivity("The loss is not additive here: <b>.")))
    assert "The loss is not additive here: <b>." in alarms(read_facts(copied))
    assert checked(render(copied)).text.count("The loss is not additive here: <b>.") == 2
    out = io.StringIO()
    terminal.show(copied, Console(file=out, width=200))
    assert "! The loss is not additive here: <b>." in out.getvalue()
