"""The report of a comparison: tables, sentences and charts say what compare.json says, and every text is escaped."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bitwright.errors import RunError
from bitwright.report import charts, render, terminal
from bitwright.runs import Run
from bitwright.standings import standings
from contenders import contender
from pages import checked

EVIL = '<script>alert("x")</script>&'


def content_of(*, evil: str = "other") -> dict[str, Any]:
    """Return a comparison of two budgets; the first has two stages, and a method that could not run."""

    def part(budget: str, stage: str, *, last: bool, shift: float = 0.0) -> dict[str, Any]:
        methods = [contender("uniform", [0.8 + shift] * 3, 0.8), contender("good", [0.9 + shift] * 3, 0.9), contender(evil, [0.7] * 3, 0.7)]
        table = standings(methods, {"left": f"seed 0: {evil} [extra]"} if last else {})
        goes_on = None if last else ["good", "uniform"]
        return {"budget": budget, "stage": stage, "last": last, "finetune": {"epochs": 3, "max_steps": 7}, "goes_on": goes_on} | table

    tables = [part("bitops<=W3A3", "short", last=False), part("bitops<=W3A3", "long", last=True)]
    tables.append(part("weight_bits<=2", "long", last=True, shift=0.05))
    names = ["uniform", "good", evil]
    methods = {name: {"method": "m", "options": {"count": 3}} for name in names}
    return {"recipe": "mine", "complete": True, "seeds": [0, 1, 2], "methods": methods, "float": [0.92, 0.94], "tables": tables}


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    """Return a comparison's directory."""
    return directory_of(tmp_path, content_of())


def directory_of(tmp_path: Path, content: dict[str, Any]) -> Path:
    path = tmp_path / "compared"
    Run.open(path, {"kind": "comparison", "name": "mine"})
    (path / "compare.json").write_text(json.dumps(content))
    (path / "recipe.yaml").write_text("name: mine\n")
    return path


def test_the_page_is_well_formed_and_stands_alone(compared: Path) -> None:
    page = render(compared)
    checker = checked(page)
    assert checker.references == []
    assert not re.search(r"https?://|@import|url\(", page)
    assert {"svg", "table", "style", "details"} <= checker.tags
    assert "script" not in checker.tags
    assert render(compared) == page


def test_the_page_says_what_the_tables_say(compared: Path) -> None:
    text = checked(render(compared)).text
    content = content_of()
    for table in content["tables"]:
        for sentence in table["sentences"] if table["last"] else ():
            assert sentence in text
        for entry in table["methods"]:
            assert f"{100 * entry['accuracy']['mean']:.2f} ±" in text
    assert "bitops<=W3A3, long stage (3 epochs, 7 steps at most)" in text
    assert "93.00 %" in text  # of the float network
    assert "so in the next stage: good, uniform." in text
    assert "left left out: seed 0: other [extra]" in text
    assert "good - uniform" in text
    assert "m(count=3)" in text
    for title in ("Accuracy against bits a weight", "Accuracy against BitOps an image", "Accuracy against what the search cost"):
        assert title in text


def test_every_text_is_escaped(tmp_path: Path) -> None:
    content = content_of(evil=EVIL)
    content["recipe"] = EVIL
    for table in content["tables"]:
        table["budget"] = EVIL
    path = directory_of(tmp_path, content)
    (path / "recipe.yaml").write_text(EVIL)
    page = render(path)
    assert "<script" not in page
    assert checked(page).text.count('alert("x")') >= 10


def test_the_terminal_says_it_too(compared: Path) -> None:
    stream = io.StringIO()
    terminal.show(compared, Console(file=stream, width=160))
    text = stream.getvalue()
    for words in (
        "bitops<=W3A3, short stage",
        "weight_bits<=2, long stage",
        "to uniform",
        "+9.87*",
        "• Mixed widths beat uniform here",
        "compare.csv",
    ):
        assert words in text
    assert "left left out: seed 0: other [extra]" in text


def test_what_is_not_complete_is_said_to_be(tmp_path: Path) -> None:
    content = content_of()
    content |= {"complete": False, "tables": content["tables"][:1]}
    path = directory_of(tmp_path, content)
    assert "Not complete: this is what is done so far." in checked(render(path)).text
    stream = io.StringIO()
    terminal.show(path, Console(file=stream, width=160))
    assert "! not complete: `bitwright compare" in stream.getvalue()


def test_what_cannot_be_shown(compared: Path) -> None:
    (compared / "compare.json").write_text("{")
    with pytest.raises(RunError, match=r"compare.json: damaged .*; `bitwright compare .*` writes it again"):
        render(compared)
    (compared / "compare.json").unlink()
    with pytest.raises(RunError, match=r"no stage of this comparison is complete yet; `bitwright compare .*` goes on with it"):
        render(compared)


# ---- the chart


def test_a_front_steps_over_what_is_beaten() -> None:
    marks = [charts.Mark(x, y, y - 1, y + 1, "") for x, y in ((1, 50), (2, 40), (3, 60))]
    page = charts.scatter([charts.Track("a", marks)], x_label="cost", y_label="accuracy")
    (front,) = re.findall(r'class="front" points="([^"]*)"', page)
    heights = [float(point.split(",")[1]) for point in front.split()]
    assert len(heights) == 4  # 50, level to 3, up to 60, level to the edge
    assert heights[0] == heights[1] > heights[2] == heights[3]
    assert page.count("<circle") == 3
    assert charts.scatter([], x_label="x", y_label="y") == ""


def test_names_beside_a_chart_do_not_overlap() -> None:
    tracks = [charts.Track(f"name {k}", [charts.Mark(1, 50 + 0.01 * k, 49, 51, "")]) for k in range(9)]
    page = charts.scatter(tracks, x_label="x", y_label="y")
    places = sorted(float(y) for y in re.findall(r'class="label" x="[^"]*" y="([^"]*)"', page))
    assert len(places) == 9
    assert min(b - a for a, b in itertools.pairwise(places)) >= 13.9
