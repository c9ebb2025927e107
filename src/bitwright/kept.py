"""What a comparison keeps and reads again: whole, or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bitwright import runs
from bitwright.errors import PolicyError, RunError
from bitwright.policy import Bits, Policy
from bitwright.problem import digest_of
from bitwright.standings import COSTS

Kinds = Mapping[str, type | tuple[type, ...]]
"""Keys, dotted where they lie deeper, and what each must hold."""
NUMBER = (int, float)
SCORED: Kinds = {"top1": NUMBER}
"""What is needed of a float network's evaluation."""
SEARCHED: Kinds = {
    "policy": dict,
    **dict.fromkeys(("method", "status"), str),
    **dict.fromkeys(("costs", "limits"), list),
    "made_by": dict,
    **dict.fromkeys(("steps", "loss", "seconds", "sample_passes"), NUMBER),
}
"""What is needed of a search."""
TRAINED: Kinds = {
    "interval": list,
    **dict.fromkeys(("bits", "weight_widths", "activation_widths", "made_by"), dict),
    **dict.fromkeys(("top1", "n", "selection.top1", "selection.loss", "widths", *COSTS), NUMBER),
}
"""What is needed of a training."""
MEND = "delete its folder, and the same command does that part again"


def read(file: Path, needed: Kinds) -> dict[str, Any]:
    """Return what a JSON file holds; raises `RunError` unless it has what is needed of it."""
    try:
        content: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise RunError(f"{file}: damaged ({error}); {MEND}") from None
    wrong = [key for key, kind in needed.items() if not isinstance(_at(content, key), kind)]
    if wrong:
        raise RunError(f"{file}: damaged (it has no {', '.join(wrong)}, or something else there); {MEND}")
    return content


def _at(content: Any, key: str) -> Any:
    for name in key.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content


def policy_of(folder: Path, record: Mapping[str, Any]) -> Policy:
    """Return the policy that a search in a folder found; raises `RunError` if its bits are none."""
    try:
        return Policy({name: Bits(*bits) for name, bits in record["policy"].items()})
    except (TypeError, PolicyError) as error:
        raise RunError(f"{folder / 'result.json'}: damaged ({error}); {MEND}") from None


def correct_of(folder: Path, row: Mapping[str, Any]) -> Tensor:
    """Return which test images a training in a folder had right; raises `RunError` where its row says otherwise."""
    correct: Tensor = _tensors(folder / "correct.safetensors")["correct"]
    if row["n"] != len(correct) or not math.isclose(row["top1"], int(correct.sum()) / len(correct), abs_tol=1e-9):
        raise RunError(f"{folder / 'result.json'}: damaged (top1 and n are not those of correct.safetensors beside it); {MEND}")
    return correct


def network_of(folder: Path) -> str:
    """Return the digest of the float network that a seed's folder keeps."""
    return digest_of(_tensors(folder / "float.safetensors"))


def _tensors(file: Path) -> Any:
    try:
        return runs.load_tree(file)
    except RunError:
        raise RunError(f"{file}: missing or damaged; {MEND}") from None
