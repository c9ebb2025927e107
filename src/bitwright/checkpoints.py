"""The checkpoints of a search: the newest states in a run directory, and whether they belong to the search that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bitwright import runs
from bitwright.errors import RunError

KEPT = 2
"""Checkpoints that stay on disk: were the newest damaged, the one before it could go on."""


def keep(out: Path, steps: int, tree: Mapping[str, Any]) -> None:
    """Write the checkpoint of a step, and delete those that are no longer needed."""
    runs.save_tree(out / "checkpoint" / f"search-{steps:09d}.safetensors", tree)
    for old in _files(out)[:-KEPT]:
        old.unlink(missing_ok=True)


def latest(out: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the newest checkpoint, or None where there is none; refuses a damaged or a foreign one."""
    files = _files(out)
    if not files:
        return None
    try:
        saved: dict[str, Any] = runs.load_tree(files[-1])
    except RunError as error:
        older = f" (without it the search goes on from {files[-2].name})" if len(files) > 1 else ""
        raise RunError(f"{error}{older}") from None
    _check_same(out, saved.get("fingerprint", {}), fingerprint)
    return saved


def _check_same(out: Path, was_made_by: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Refuse another search, and one of which is not known whether it is another."""
    differing = [part for part in ("method", "options", "problem", "source") if was_made_by.get(part) != fingerprint.get(part)]
    if "problem" in differing and "kind" not in was_made_by.get("problem", {}):
        why = "was begun by an earlier version, which did not note what data and which loss it was asked on"
        raise RunError(f"{out}: its search {why}; give another --out, or delete {out / 'checkpoint'} to search anew here")
    if differing:
        was, now = was_made_by.get(differing[0]), fingerprint.get(differing[0])
        raise RunError(f"{out}: holds a search with another {runs.difference(differing[0], was, now)}; give another --out, or restore that")


def _files(out: Path) -> list[Path]:
    return sorted((out / "checkpoint").glob("search-*.safetensors"))


def map_tensors(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a tree with every tensor changed, visited in the order of `runs.flatten`."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([map_tensors(value, change) for value in tree])
    return tree
