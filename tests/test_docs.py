"""What the documentation shows runs, and what it refers to is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bitwright import cli
from bitwright.recipe import bundled_recipes, load_recipe, parse_yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "__page__", type(pytest)("__page__"))
    for block in _blocks(page, "python"):
        exec(compile(block, page.name, "exec"), {"__name__": "__page__"})


def test_yaml_on_a_page_is_a_recipe() -> None:
    blocks = _blocks(ROOT / "docs/quickstart.md", "yaml")
    assert [load_recipe(parse_yaml(block, "quickstart")).name for block in blocks] == ["mine"]


def test_yaml_on_the_page_of_image_quality_is_a_part_of_a_recipe(tiny: dict[str, Any]) -> None:
    data, evaluate = (parse_yaml(block, "data-quality") for block in _blocks(ROOT / "docs/data-quality.md", "yaml"))
    recipe = load_recipe({**tiny, **data, **evaluate})
    assert recipe.data.quality is not None
    assert recipe.evaluate is not None


def test_the_own_method_page_shows_the_tested_example() -> None:
    (block,) = _blocks(ROOT / "docs/write-your-own-method.md", "python")
    assert block.strip() in (ROOT / "examples/own_method.py").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_a_page_are_known(page: Path) -> None:
    for verb, rest in re.findall(r"\bbitwright (run|[a-z]+)\b([^\n`#]*)", " ".join(_blocks(page, ""))):
        assert verb in cli.VERBS, f"{page.name}: bitwright {verb}"
        if verb == "run":
            assert rest.split()[0] in bundled_recipes(), f"{page.name}: {rest}"
