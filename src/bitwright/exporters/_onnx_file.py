"""What makes an ONNX file ours: the policy, where each weight and activation is, a sample with its answer, and a checksum."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.errors import ExportError, PolicyError
from bitwright.exporters import Example, Source, TensorCheck, Verification, check_policy, outputs, policy_gap
from bitwright.exporters._claims import bound_of, fitting, samples_of
from bitwright.exporters._emission import Emitted
from bitwright.exporters._graph import Program
from bitwright.exporters._sample import DRAWS, SAMPLES, sample_of
from bitwright.policy import Bits, Policy

FORMAT = "bitwright-onnx-1"
KEY, SUM = "bitwright", "bitwright_sha256"
LARGEST_ANSWER = 65536
"""Numbers of an answer that are kept in a file."""
CLEAR = 0.25
"""The share of what an answer may differ by within which no other sample is tried."""
Runner = Callable[[bytes, Mapping[str, Any]], list[Any]]
Run = Callable[[list[Any]], Any]
"""Gives a file's first output on inputs."""


def content_text(source: Source, program: Program, emitted: Emitted, allowed: float, run: Run, form: str = FORMAT) -> str:
    """Return what a file says of itself, as JSON.

    Args:
        source: the network.
        program: its graph.
        emitted: what was written of it.
        allowed: how far outputs may be from the network's, as a share.
        run: runs what was written.
        form: the name of the format.
    """
    policy = source.policy or Policy(emitted.layers)
    check_policy(policy, emitted.layers)
    inputs = [node.meta["val"] for node in program.graph.nodes if node.name in program.inputs]
    shapes = [[size if isinstance(size, int) else SAMPLES for size in value.shape] for value in inputs]
    dtypes = [str(value.dtype).removeprefix("torch.") for value in inputs]
    content = {
        "format": form,
        "policy": json.loads(policy.to_json()),
        "layers": {name: list(bits) for name, bits in emitted.layers.items()},
        "weights": [[r.address, list(r.bits), r.initializer, r.axis] for r in emitted.weights],
        "activations": [[p.name, p.bits, p.codes, p.low + p.zero, p.high + p.zero] for p in emitted.points if p.codes],
        "sample": _sample(source, [list(pair) for pair in zip(shapes, dtypes, strict=True)], allowed, run),
        "allowed": allowed,
    }
    return json.dumps(content, separators=(",", ":"))


def stamp(onnx: Any, model: Any, source: Source, program: Program, emitted: Emitted, allowed: float, runner: Runner) -> None:
    """Write into a model what `verify_file` needs."""
    data, names = model.SerializeToString(), [value.name for value in model.graph.input]
    content = content_text(source, program, emitted, allowed, lambda values: runner(data, dict(zip(names, values, strict=True)))[0])
    onnx.helper.set_model_props(model, {KEY: content})
    onnx.helper.set_model_props(model, {KEY: content, SUM: checksum(model)})


def _sample(source: Source, inputs: list[list[Any]], allowed: float, run: Run) -> dict[str, Any]:
    """Return a sample and the network's own answer to it; no answer where it is large, or none of the draws has a well-defined one.

    A sample is noise, and where its values lie on the border of two codes of few bits the answer is not defined: the network and a file
    that reproduces it give others. So of `DRAWS` samples the one is kept on which they agree best. Where equality is asked for there is
    no such border, and the first one has to do.
    """
    draws = DRAWS if allowed > 0 and any(dtype.startswith("float") for _, dtype in inputs) else 1
    best: tuple[float, int, Any] = (math.inf, 0, None)
    for draw in range(draws):
        values = [sample_of(shape, dtype, draw) for shape, dtype in inputs]
        answer = _answer(source, values)
        if answer is None or draws == 1:
            return {"inputs": inputs, "draw": draw, "answer": answer}
        gap = answer_gap(answer, run(values))
        if gap is not None and gap < best[0]:
            best = gap, draw, answer
        if best[0] <= CLEAR * allowed:
            break
    return {"inputs": inputs, "draw": best[1], "answer": best[2] if best[0] <= allowed else None}


def _answer(source: Source, sample: list[Any]) -> list[Any] | None:
    """Return the network's own first output on a sample, as shape and base64; None for a large one."""
    import torch  # noqa: PLC0415  (the rest of this module reads files without it)

    values = [torch.from_numpy(value) for value in sample]
    keys = list(source.example) if isinstance(source.example, Mapping) else []
    example: Example = dict(zip(keys, values, strict=True)) if keys else tuple(values)
    out = outputs(source.model, example)[0].contiguous().numpy()
    if out.size > LARGEST_ANSWER:
        return None
    return [list(out.shape), base64.b64encode(out.astype("<f4").tobytes()).decode()]


def checksum(model: Any) -> str:
    """Return the SHA-256 of a model but for the checksum in it."""
    plain = type(model)()
    plain.CopyFrom(model)
    kept = [(entry.key, entry.value) for entry in model.metadata_props if entry.key != SUM]
    del plain.metadata_props[:]
    for key, value in kept:
        plain.metadata_props.add(key=key, value=value)
    return hashlib.sha256(plain.SerializeToString(deterministic=True)).hexdigest()


def read_model(onnx: Any, path: Path) -> Any:
    """Return the model in a file; raises `ExportError` with the reason for one that is damaged or not ours."""
    if not path.is_file():
        raise ExportError(f"{path}: no such file; give an artefact that `bitwright export` wrote")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:
        raise ExportError(f"{path.name}: truncated or no ONNX file (its protocol buffer does not parse); export it again") from None
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if KEY not in properties or SUM not in properties:
        raise ExportError(f"{path.name}: has no policy in it, so bitwright did not write it, or it is cut off; export it again")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise ExportError(f"{path.name}: refers to other files, which artefacts of bitwright never do; export it again")
    if checksum(model) != properties[SUM]:
        raise ExportError(f"{path.name}: tampered with or damaged: its content does not match the checksum in it; export it again")
    return model


def content_of_text(name: str, text: str, form: str = FORMAT) -> dict[str, Any]:
    """Return what a file says of itself, the policy parsed; raises `ExportError` for anything else."""
    try:
        content = json.loads(text)
        if content["format"] != form:
            raise ExportError(f"{name}: its format is {content['format']!r}, expected '{form}'")
        content["policy"] = Policy.from_json(json.dumps(content["policy"]))
        layers = {str(layer): Bits(*bits) for layer, bits in content["layers"].items()}
        found = policy_gap(content["policy"], layers) or next(
            (
                f"'{a}' is written at {Bits(*b)!r} and runs at {layers.get(a)!r}"
                for a, b, *_ in content["weights"]
                if layers.get(a) != Bits(*b)
            ),
            None,
        )
    except (ValueError, KeyError, TypeError, AttributeError, PolicyError, RecursionError) as error:
        raise ExportError(f"{name}: its metadata do not parse ({type(error).__name__}); export it again") from None
    if found is not None:
        raise ExportError(f"{name}: tampered with or damaged: {found}; export it again")
    return dict(content)


def content_of(name: str, model: Any) -> dict[str, Any]:
    """Return what a model says of itself; see `content_of_text`."""
    return content_of_text(name, {entry.key: entry.value for entry in model.metadata_props}[KEY])


def verify_file(onnx: Any, path: Path, runner: Runner) -> Verification:
    """Check a file from the outside: structure, checksum, levels of each tensor against the policy, and the sample's answer."""
    model = read_model(onnx, path)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise ExportError(f"{path.name}: refused by onnx.checker ({str(error).strip().splitlines()[0][:160]})") from None
    content = content_of(path.name, model)
    with fitting(path.name):
        weights = [_weight_check(onnx, model, *entry) for entry in content["weights"]]
        inputs = samples_of(content)
        names = [value.name for value in model.graph.input]
        data, count = _with_outputs(onnx, model, [entry[2] for entry in content["activations"]]), len(model.graph.output)
        found = runner(data, dict(zip(names, inputs, strict=True)))
        activations = [_activation_check(entry, codes) for entry, codes in zip(content["activations"], found[count:], strict=True)]
        agrees, allowed = answer_gap(content["sample"]["answer"], found[0]), bound_of(content)
    return Verification(path, "onnx", content["policy"], (*weights, *activations), SAMPLES, agrees, allowed).checked()


def _weight_check(onnx: Any, model: Any, address: str, bits: list[int], initializer: str, axis: int | None) -> TensorCheck:
    tensor = {t.name: t for t in model.graph.initializer}[initializer]
    values = np.asarray(onnx.numpy_helper.to_array(tensor)).astype(np.float32)
    stored = onnx.TensorProto.DataType.Name(tensor.data_type)
    rows = values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    widths = Bits(*bits)
    if widths.w > 8:
        return TensorCheck(address, "weight", widths.w, stored, None, None)
    levels = max(len(np.unique(row)) for row in rows)
    return TensorCheck(address, "weight", widths.w, stored, levels, 2**widths.w)


def _activation_check(entry: list[Any], codes: Any) -> TensorCheck:
    name, bits, _, low, high = entry
    if codes.size and (codes.min() < low or codes.max() > high):
        raise ExportError(f"'{name}' gives codes from {codes.min()} to {codes.max()} and its grid is {low} to {high}")
    return TensorCheck(name, "activation", bits, "UINT8", len(np.unique(codes)), 2**bits)


def _with_outputs(onnx: Any, model: Any, tensors: list[str]) -> bytes:
    changed = type(model)()
    changed.CopyFrom(model)
    for name in tensors:
        changed.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    return bytes(changed.SerializeToString())


def answer_gap(answer: list[Any] | None, found: Any) -> float | None:
    """Return how far an output is from the answer that was kept, as a share of the largest; None where it is too large to be kept.

    Raises:
        ExportError: no answer was kept of an output that is not too large, or one of another shape.
    """
    if answer is None and found.size > LARGEST_ANSWER:
        return None
    if answer is None:
        raise ExportError("it has no answer to its sample")
    shape, text = answer
    if list(found.shape) != shape:
        raise ExportError(f"its output on the sample has shape {list(found.shape)}, and the answer in it {shape}")
    wanted = np.frombuffer(base64.b64decode(text), "<f4").reshape(shape)
    return float(np.abs(wanted - found).max(initial=0.0) / max(float(np.abs(wanted).max(initial=0.0)), 1e-30))
