"""Weights from files, read without running anything that a file says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bitwright import runs
from bitwright.errors import BitwrightError, nearest


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the weights of a file into ``model``; nothing is copied unless all of them fit.

    Reads safetensors (a run's float.safetensors too), ``.npz`` (arrays only) and ``.th``/``.pt``/``.pth`` (tensors only).
    A ``{"state_dict": …}`` around the weights and a ``module.`` before every name are taken off. BatchNorm's
    ``num_batches_tracked`` may be missing.

    Raises:
        BitwrightError: the file is missing, damaged or of another kind, or a name or shape does not match.
    """
    state = read_weights(path)
    own = model.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    if missing:
        raise BitwrightError(f"weights '{path}': no '{missing[0]}' ({len(missing)} missing); {nearest(missing[0], state)}")
    extra = [name for name in state if name not in own]
    if extra:
        raise BitwrightError(f"weights '{path}': the model has no '{extra[0]}' ({len(extra)} unexpected); {nearest(extra[0], own)}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            found, expected = list(tensor.shape), list(own[name].shape)
            raise BitwrightError(f"weights '{path}': '{name}' has shape {found}, the model's is {expected}; check the model's arguments")
    model.load_state_dict(state, strict=False)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file by name; see `load_weights`."""
    path = Path(path)
    readers: Mapping[str, Callable[[Path], Any]] = {
        ".safetensors": _read_safetensors,
        ".npz": _read_npz,
        **dict.fromkeys((".th", ".pt", ".pth"), _read_torch),
    }
    if path.suffix not in readers:
        raise BitwrightError(f"weights '{path}': unknown kind '{path.suffix}'; expected {', '.join(readers)}")
    if not path.is_file():
        raise BitwrightError(f"weights '{path}': no such file; check the path")
    try:
        content = readers[path.suffix](path)
    except Exception as error:  # each format has errors of its own, and all mean the same to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BitwrightError(f"weights '{path}': the file is damaged or holds more than tensors ({reason}); fetch it again") from error
    return _unwrap(path, content)


def _read_safetensors(path: Path) -> Any:
    with safe_open(str(path), framework="pt") as file:
        if (file.metadata() or {}).get("format") != runs.TREE_FORMAT:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    return runs.load_tree(path)


def _read_npz(path: Path) -> Any:
    import numpy as np  # noqa: PLC0415

    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name].copy()) for name in arrays.files}


def _read_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _unwrap(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise BitwrightError(f"weights '{path}': holds no table of tensors; save model.state_dict()")
    prefix = "module." if all(str(name).startswith("module.") for name in content) else ""
    return {str(name).removeprefix(prefix): value for name, value in content.items()}
