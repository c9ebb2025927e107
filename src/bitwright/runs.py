"""Run directories: a manifest, append-only JSON lines, and trees of tensors written atomically (no pickle).

Everything a stage must remember goes through `save_tree`: one safetensors file whose metadata holds the JSON skeleton of
the tree and a SHA-256 of its content. A file is written beside its place, synced and renamed, so that a process killed
at any point, or a full disk, leaves either the old file or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bitwright.errors import RunError

TREE_FORMAT = "bitwright-tree-1"
RUN_FORMAT = "bitwright-run-1"
PARTIAL = ".partial"


def flatten(tree: object) -> tuple[Any, list[Tensor]]:
    """Split a tree into a JSON skeleton and its tensors; `unflatten` puts them together again.

    A tree is made of dicts (keys: any of the following), lists, tuples, tensors, numbers, strings, bools and None.

    >>> skeleton, tensors = flatten({"step": 3, 0: (torch.zeros(2), float("inf"))})
    >>> skeleton
    {'items': [['step', 3], [0, {'tuple': [{'tensor': 0}, {'float': 'inf'}]}]]}
    >>> unflatten(skeleton, tensors)
    {'step': 3, 0: (tensor([0., 0.]), inf)}
    """
    tensors: list[Tensor] = []
    return _encode(tree, tensors, "tree"), tensors


def _encode(node: object, tensors: list[Tensor], where: str) -> Any:
    if isinstance(node, Tensor):
        # A clone: two entries may share a storage, and the caller may go on training before the file is written.
        tensors.append(node.detach().to("cpu").clone(memory_format=torch.contiguous_format))
        return {"tensor": len(tensors) - 1}
    if node is None or isinstance(node, (bool, int, str)):
        return node
    if isinstance(node, float):
        return node if math.isfinite(node) else {"float": repr(node)}
    if isinstance(node, list):
        return [_encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(node)]
    if isinstance(node, tuple):
        return {"tuple": [_encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(node)]}
    if isinstance(node, Mapping):
        if all(isinstance(key, str) for key in node):
            return {"dict": {key: _encode(value, tensors, f"{where}.{key}") for key, value in node.items()}}
        return {"items": [[_encode(key, tensors, where), _encode(value, tensors, f"{where}.{key}")] for key, value in node.items()]}
    allowed = "use tensors, numbers, strings, bools, None, and dicts, lists or tuples of them"
    raise TypeError(f"{where}: cannot save {type(node).__name__}; {allowed}")


def unflatten(skeleton: Any, tensors: list[Tensor]) -> Any:
    """Return the tree that `flatten` took apart."""
    if isinstance(skeleton, list):
        return [unflatten(item, tensors) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, value),) = skeleton.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "float":
        return float(value)
    if kind == "tuple":
        return tuple(unflatten(item, tensors) for item in value)
    if kind == "dict":
        return {key: unflatten(item, tensors) for key, item in value.items()}
    if kind == "items":
        return {unflatten(key, tensors): unflatten(item, tensors) for key, item in value}
    raise ValueError(f"unknown node '{kind}'")


def _digest(skeleton: str, tensors: Iterable[Tensor]) -> str:
    """SHA-256 over the skeleton and every tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(skeleton.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tree(path: str | Path, tree: object, **marks: str) -> None:
    """Write a tree (see `flatten`) to one safetensors file, atomically.

    Tensors come back from `load_tree` on the CPU and contiguous, so copy them into the live ones instead of replacing
    those. Named tuples come back as tuples. ``marks`` are kept beside the tree for `mark_of`. Raises `RunError` when the
    disk refuses; the old file is then intact.
    """
    skeleton, tensors = flatten(tree)
    text = json.dumps(skeleton, separators=(",", ":"))
    metadata = {**marks, "format": TREE_FORMAT, "tree": text, "sha256": _digest(text, tensors)}
    write_bytes_atomic(path, save({str(i): tensor for i, tensor in enumerate(tensors)}, metadata=metadata))


def load_tree(path: str | Path) -> Any:
    """Read what `save_tree` wrote; raises `RunError` if the file is missing, truncated or altered."""
    path = Path(path)
    mend = "restore it from a copy, or delete it to start that stage again"
    if not path.is_file():
        raise RunError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != TREE_FORMAT:
                raise RunError(f"{path}: not a file of this kind (format {metadata.get('format')!r}, expected '{TREE_FORMAT}'); {mend}")
            tensors = [file.get_tensor(str(i)).clone() for i in range(len(list(file.keys())))]
        if _digest(metadata["tree"], tensors) != metadata["sha256"]:
            raise RunError(f"{path}: damaged (its checksum does not match); {mend}")
        return unflatten(json.loads(metadata["tree"]), tensors)
    except (SafetensorError, OSError, KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: damaged or truncated ({_first_line(error)}); {mend}") from None


def mark_of(path: str | Path, name: str) -> str | None:
    """Return a mark that `save_tree` kept; None where there is none, or no such file (`load_tree` says what is wrong with it)."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get(name)
    except (SafetensorError, OSError):
        return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    """Write a file so that it is either wholly old or wholly new, whatever happens; raises `RunError` on a full disk."""
    path = Path(path)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _refused(path, error) from error
        raise
    _sync_directory(path.parent)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file as `write_bytes_atomic` does."""
    write_bytes_atomic(path, text.encode())


def _refused(path: Path, error: OSError) -> RunError:
    reason = error.strerror or _first_line(error)
    return RunError(f"{path}: cannot be written ({reason}); what was there is intact: free space or mend the permissions, then run again")


def _sync_directory(path: Path) -> None:
    # The rename itself must reach the disk; some file systems have no such call, and then there is nothing to do.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def finite(node: object) -> object:
    """Replace what JSON cannot say (nan, inf) by None."""
    if isinstance(node, float) and not math.isfinite(node):
        return None
    if isinstance(node, Mapping):
        return {key: finite(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [finite(item) for item in node]
    return node


def append_jsonl(path: str | Path, record: Mapping[str, object]) -> None:
    """Append one JSON line; numbers that are not finite become null. Raises `RunError`, with no half line left behind."""
    path = Path(path)
    line = (json.dumps(finite(record), allow_nan=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:  # unbuffered: a line is one write, and a failed one can be taken back
            start = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) != len(line):
                    raise OSError("the disk is full")
            except BaseException:
                file.truncate(start)
                raise
    except OSError as error:
        raise _refused(path, error) from error


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file, without a last line that was cut off; a missing file has none."""
    path = Path(path)
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise RunError(f"{path}: not JSON lines ({_first_line(error)}); restore it from a copy or delete it") from None


def truncate_jsonl(path: str | Path, lines: int) -> None:
    """Keep the first ``lines`` lines, as a checkpoint counted them; raises `RunError` if there are fewer."""
    path = Path(path)
    if not path.exists() and lines == 0:
        return
    kept = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    if len(kept) < lines:
        raise RunError(f"{path}: has {len(kept)} lines and the checkpoint beside it expects {lines}; restore it, or delete the checkpoint")
    write_bytes_atomic(path, b"".join(line + b"\n" for line in kept[:lines]))


def fingerprint(recipe: Mapping[str, object]) -> str:
    """Return the SHA-256 of a recipe's canonical JSON: the order of keys does not matter.

    >>> fingerprint({"a": 1, "b": (2,)}) == fingerprint({"b": [2], "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def difference(part: str, was: object, now: object) -> str:
    """Name the first thing in which two fingerprints differ, as deep as it has a name.

    >>> difference("options", {"lr": 1, "steps": 5}, {"lr": 1, "steps": 6})
    'options.steps (was 5, now 6)'
    """
    if isinstance(was, dict) and isinstance(now, dict):
        key = next(key for key in [*was, *now] if was.get(key) != now.get(key))
        return difference(f"{part}.{key}", was.get(key), now.get(key))
    shown = f" (was {json.dumps(was)}, now {json.dumps(now)})"
    return part + (shown if len(shown) < 200 else "")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on: python, torch, bitwright."""
    try:
        own = importlib.metadata.version("bitwright")
    except importlib.metadata.PackageNotFoundError:
        own = "source"
    return {"python": platform.python_version(), "torch": str(torch.__version__), "bitwright": own}


def _leaves(node: object, prefix: str = "") -> dict[str, object]:
    if isinstance(node, dict) and node:
        return {k: v for key, value in node.items() for k, v in _leaves(value, f"{prefix}.{key}" if prefix else str(key)).items()}
    return {prefix: node}


class Run:
    """A run directory: where the stages of one recipe put what they make.

    ``path`` is the directory and ``manifest`` the content of its manifest.json: format, fingerprint, recipe, versions,
    created, stages. No absolute path is in it, so a run can be moved and continued elsewhere.
    """

    MANIFEST = "manifest.json"

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path, recipe: Mapping[str, object], *, free: Iterable[str] = (), shared: bool = False) -> Run:
        """Create a run directory, or continue the one that is there.

        Args:
            path: the directory; made if it is missing, and must be empty if it is not a run yet.
            recipe: everything that decides the result, as JSON-able values.
            free: dotted keys that may differ when the run is continued, such as the path of a file on this machine.
            shared: other processes may be writing in it just now, so what looks half written is left alone.

        Raises:
            RunError: the directory holds something else, a damaged manifest, or the run of another recipe (the message
                names the keys that differ). Nothing in it is changed.
        """
        path = Path(path)
        bound = {key: value for key, value in _leaves(json.loads(json.dumps(recipe))).items() if key not in set(free)}
        if not (path / cls.MANIFEST).exists():
            return cls._create(path, bound)
        run = cls.load(path)
        _check_same(path, run.manifest["recipe"], bound)
        for partial in () if shared else path.rglob(f".*{PARTIAL}"):  # left by a process that was killed while it wrote
            partial.unlink(missing_ok=True)
        return run

    @classmethod
    def _create(cls, path: Path, bound: Mapping[str, object]) -> Run:
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: is a file, and a run needs a directory; give another --out")
        if path.is_dir() and any(not (item.name.startswith(".") and item.name.endswith(PARTIAL)) for item in path.iterdir()):
            raise RunError(f"{path}: has files in it but no {cls.MANIFEST}, so it is no run; give an empty or new directory as --out")
        manifest: dict[str, Any] = {"format": RUN_FORMAT, "fingerprint": fingerprint(bound), "created": _now()}
        run = cls(path, manifest | {"versions": versions(), "recipe": dict(bound), "stages": {}})
        run._write()
        return run

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Open an existing run directory whatever its recipe, as the report does; raises `RunError` if it is none."""
        file = Path(path) / cls.MANIFEST
        if not file.is_file():
            raise RunError(f"{path}: no run directory (it has no {cls.MANIFEST}); give the --out of a `bitwright run`")
        try:
            manifest = json.loads(file.read_text())
            known = manifest["format"] == RUN_FORMAT and manifest["fingerprint"] == fingerprint(manifest["recipe"])
            known = known and isinstance(manifest["stages"], dict) and isinstance(manifest["versions"], dict)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise RunError(f"{file}: damaged ({_first_line(error)}); restore it from a copy, or give another --out") from None
        if not known:
            raise RunError(f"{file}: altered, or of another version of this format; restore it from a copy, or give another --out")
        return cls(Path(path), manifest)

    def changed_versions(self) -> dict[str, tuple[str, str]]:
        """Return the versions that differ from those the run began with, as ``{name: (then, now)}``."""
        now = versions()
        then: dict[str, str] = self.manifest["versions"]
        return {name: (then.get(name, "none"), now[name]) for name in now if then.get(name) != now[name]}

    def inside(self, *parts: str) -> Path:
        """Return a path in the run directory, its folder made; raises `RunError` for one that leads out of it."""
        path = self.path.joinpath(*parts)
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise RunError(f"{'/'.join(parts)}: leads out of the run directory {self.path}; give a relative path without '..'")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finished(self, stage: str) -> bool:
        """Return whether the stage was marked as finished."""
        return stage in self.manifest["stages"]

    def finish(self, stage: str, **facts: object) -> None:
        """Mark a stage as finished, with facts worth keeping (seconds, for one)."""
        self.manifest["stages"][stage] = {"finished": _now(), **{key: finite(value) for key, value in facts.items()}}
        self._write()

    def reopen(self, *stages: str) -> None:
        """Take back the marks of some stages, so that they run again."""
        for stage in stages:
            self.manifest["stages"].pop(stage, None)
        self._write()

    def _write(self) -> None:
        write_text_atomic(self.path / self.MANIFEST, json.dumps(self.manifest, indent=1) + "\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _check_same(path: Path, old: Mapping[str, object], new: Mapping[str, object]) -> None:
    # A run of before a key was there goes on where the key is not given.
    differing = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    if not differing:
        return
    shown = [f"{key} (was {_show(old, key)}, now {_show(new, key)})" for key in differing[:5]]
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    what = ", ".join(shown) + more
    raise RunError(f"{path}: began with another recipe; it differs in {what}; give another --out, or restore those values")


def _show(values: Mapping[str, object], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "absent"
