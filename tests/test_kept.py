"""What a comparison keeps: damage is named with what to do, and a seed keeps the float network that it began with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bitwright.compare import compare
from bitwright.errors import RunError
from bitwright.runs import Run, load_tree
from comparing import recipe_of, without_times


def test_a_damaged_result_is_named(compared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path = shutil.copytree(compared[0], tmp_path / "copy")
    next(path.glob("searches/fisher-*/result.json")).write_text("{")
    with pytest.raises(RunError, match=r"result.json: damaged .*; delete its folder, and the same command does that part again"):
        compare(recipe_of(), path)


def _edited(file: Path, **changes: Any) -> None:
    """Change values of a JSON file; None takes a key out."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("where", "changes", "message"),
    [
        ("trainings/*/correct.safetensors", None, r"correct.safetensors: missing or damaged"),
        ("seeds/0/float.safetensors", None, r"float.safetensors: missing or damaged"),
        ("searches/fisher-*/result.json", {"policy": None}, r"result.json: damaged \(it has no policy, or something else there\)"),
        ("searches/fisher-*/result.json", {"policy": {"conv1": 4}}, r"result.json: damaged \(.*\)"),
        (
            "trainings/*/result.json",
            {"selection": {"top1": 1.0}},
            r"result.json: damaged \(it has no selection.loss, or something else there\)",
        ),
        (
            "trainings/*/result.json",
            {"top1": 0.9999},
            r"result.json: damaged \(top1 and n are not those of correct.safetensors beside it\)",
        ),
        ("trainings/*/result.json", {"n": 449}, r"result.json: damaged \(top1 and n are not those of correct.safetensors beside it\)"),
        ("seeds/0/float.json", {"top1": None}, r"float.json: damaged \(it has no top1, or something else there\)"),
    ],
)
def test_a_damaged_file_is_named_and_its_folder_may_be_deleted(
    where: str, changes: dict[str, Any] | None, message: str, compared: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path = shutil.copytree(compared[0], tmp_path / "copy")
    file = min(path.glob(where))
    if changes is None:
        file.unlink()
    else:
        _edited(file, **changes)
    if where.endswith("float.safetensors"):  # read where something is to be done
        shutil.rmtree(min(path.glob("searches/fisher-*-0")))
    with pytest.raises(RunError, match=message + r"; delete its folder, and the same command does that part again"):
        compare(recipe_of(), path)
    shutil.rmtree(file.parent)
    assert without_times(compare(recipe_of(), path)) == without_times(compared[1])


# ---- one float network a seed


def _weights(folder: Path, file: Path, factor: float) -> None:
    """Write the float network of a comparison's seed, made something else, to a file as a user would give it."""
    from safetensors.torch import save_file

    save_file({name: (tensor * factor).contiguous() for name, tensor in load_tree(folder / "float.safetensors").items()}, file)


def test_other_weights_under_the_same_path_are_refused(compared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    seed, file, path = compared[0] / "seeds/0", tmp_path / "w.safetensors", tmp_path / "run"

    def go(*seeds: int) -> Any:
        recipe = {**recipe_of(methods=["random"], seeds=seeds, options={}, long=None), "float": None}
        recipe["model"] = {"name": "digits_cnn", "weights": str(file)}
        return compare(recipe, path)

    _weights(seed, file, 1.0)
    go(0)
    _weights(seed, file, 1.1)
    for _ in range(2):  # what was refused is not begun
        with pytest.raises(RunError, match=r"w.safetensors is not the network that seed 0 began with; restore that file, or give another"):
            go(0, 1)
    assert not list(path.glob("searches/*-1/result.json"))
    shutil.rmtree(path / "seeds")  # and neither is it if the seed's own copy is lost
    with pytest.raises(RunError, match=r"seeds/0: its float network is not the one that this seed began with; restore .*w.safetensors, or"):
        go(0)
    _weights(seed, file, 1.0)
    assert go(0, 1)["complete"]


def test_a_comparison_begun_before_networks_were_noted_goes_on(compared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path = shutil.copytree(compared[0], tmp_path / "copy")
    noted = Run.load(path).manifest["stages"]["float"]["networks"]
    assert list(noted) == ["0", "1"]
    Run.load(path).reopen("float")  # as such a one was left
    for search_ in path.glob("searches/fisher-*"):
        shutil.rmtree(search_)
    assert without_times(compare(recipe_of(), path)) == without_times(compared[1])
    assert Run.load(path).manifest["stages"]["float"]["networks"] == noted
