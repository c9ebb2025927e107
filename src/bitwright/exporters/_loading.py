"""From a packed file to a network: nothing is trusted that the file says."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from bitwright import models
from bitwright.errors import BitwrightError, ExportError
from bitwright.exporters import TensorCheck, Verification, outputs, policy_gap
from bitwright.exporters._container import from_bytes, from_raw, unpack_bits
from bitwright.exporters._format import VECTORS, Content, Kept, Record, Slot, is_vector_norm, kept_tensors
from bitwright.exporters._sample import EXTENTS, SAMPLES, Sample, sample_of
from bitwright.policy import Policy
from bitwright.quant.functional import SIGNED_MAX
from bitwright.quant.modules import QUANTIZABLE, Op, QuantLayer, replace_module
from bitwright.quant.quantizers import ActivationQuantizer, DoReFaActivation, LSQActivation, PACTActivation

LARGEST_ARGUMENT = 1 << 20
ASK = "pass the float architecture it was exported from as model="


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Return the network of a packed file, in eval mode, frozen, on the CPU.

    Its layers are those of the float architecture with the decoded weights; where a layer's input is quantized it is a
    `QuantLayer`. Its logits are bitwise those of the network that was exported.

    Args:
        path: what `export` wrote with ``to="packed"``.
        model: the float architecture (its values do not matter; it is left untouched). Needed unless the file names one of
            our own (`bitwright.models.available`): a name found in a file is never imported.

    Raises:
        ExportError: the file is missing, damaged, or does not fit the model.
    """
    try:
        content, blobs = _read(Path(path))
        network = _architecture(content, model)
        _fill(network, content, blobs)
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from None
    for tensor in network.parameters():
        tensor.requires_grad_(False)
    return network.eval()


def read_policy(path: str | Path) -> Policy:
    """Return the policy in a packed file, without its network; raises `ExportError` as `load` does."""
    try:
        return _read(Path(path))[0].policy
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from None


def verify(path: Path, model: nn.Module | None) -> Verification:
    """Load a file and count what is in it; raises `ExportError` with the reason for a damaged one."""
    network = load(path, model)
    content = _read(path)[0]
    found = policy_gap(content.policy, {slot.name: record.bits for slot, record in zip(content.slots, content.records, strict=True)})
    if found is not None:
        raise ExportError(f"{path}: tampered with or damaged: {found}; export it again")
    rows = [_count(network, slot, record) for slot, record in zip(content.slots, content.records, strict=True)]
    samples, gap = _answered(path, network, content)
    return Verification(path, "packed", content.policy, tuple(rows), samples, gap, _allowed(content)).checked()


def _answered(path: Path, network: nn.Module, content: Content) -> tuple[int, float | None]:
    """Return how many samples a network was run on, and how far its answer is from the one in the file; None where there is none."""
    if content.sample is None:
        out = _run(network, network.get_submodule(content.slots[0].name))
        if not all(bool(torch.isfinite(x).all()) for x in out):
            raise ExportError(f"{path}: its network gives outputs that are nan or infinite; export it again")
        return SAMPLES if out else 0, None
    try:
        output = answer_on(network, content.sample)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ExportError(f"{path}: its network does not run on the sample in it ({str(error)[:80]}); export it again") from None
    shape = next((shape for _, shape, _ in content.sample.inputs if shape), (1,))
    return shape[0], content.sample.gap(output.float().numpy())


def answer_on(network: nn.Module, sample: Sample) -> Tensor:
    """Return a network's first output on the inputs of a sample."""
    made = sample.made()
    if isinstance(made, Mapping):
        return outputs(network, {name: torch.from_numpy(value) for name, value in made.items()})[0]
    return outputs(network, tuple(torch.from_numpy(value) for value in made))[0]


def _allowed(content: Content) -> float:
    """Return how far an answer may be from the one in the file: another machine sums in another order, which can move a code by a step."""
    return 1e-3 if all(record.bits.a > 8 for record in content.records) else 0.05


def _run(network: nn.Module, first: nn.Module) -> list[Tensor]:
    """Return a network's outputs on samples of the first extent that it takes; none if it takes no images of any that is tried."""
    weight = first.get_parameter("weight")
    channels = weight.shape[0] if getattr(first, "transposed", False) else weight.shape[1] * int(getattr(first, "groups", 1))
    for extent in EXTENTS:
        sample = torch.from_numpy(sample_of([SAMPLES, channels, *[extent] * (weight.dim() - 2)], "float32"))
        try:
            return outputs(network, sample)
        except (RuntimeError, TypeError, ValueError, IndexError):  # another extent, or no image at all: the file does not say
            continue
    return []


def _count(network: nn.Module, slot: Slot, record: Record) -> TensorCheck:
    layer = network.get_submodule(slot.name)
    weight = layer.get_parameter("weight")
    if record.bits.w > 8:
        return TensorCheck(slot.name, "weight", record.bits.w, "bfloat16" if record.bits.w == 16 else "float32", None, None)
    rows = weight.movedim(_operation(layer).channel_axis, 0).flatten(1) if record.scale == "c" else weight.reshape(1, -1)
    levels = int((rows.sort(1).values.diff(dim=1) != 0).sum(1).max()) + 1
    return TensorCheck(slot.name, "weight", record.bits.w, f"{record.bits.w}-bit codes", levels, 2**record.bits.w)


def _read(path: Path) -> tuple[Content, dict[str, bytes]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ExportError(f"cannot be read ({error.strerror or error}); give the path of a file that `bitwright export` wrote") from None
    metadata, blobs = from_bytes(data)
    return Content.from_metadata(metadata), blobs


def _architecture(content: Content, model: nn.Module | None) -> nn.Module:
    """Return a network of the right shape: a copy of ``model``, or one of ours built by name."""
    if model is not None:
        network = copy.deepcopy(model).cpu()
        _check_fit(network, content)
        return network
    if content.reference is None:
        raise ExportError(f"does not say which model it is for; {ASK}")
    name, arguments = content.reference
    if name not in models.available():
        raise ExportError(f"is for the model '{name}', which is not one of ours, and names in files are not imported; {ASK}")
    if any(isinstance(value, int) and abs(value) > LARGEST_ARGUMENT for value in arguments.values()):
        raise ExportError(f"asks for '{name}' with {arguments}; such sizes are refused; {ASK}")
    try:
        with torch.device("meta"):  # costs no memory, whatever sizes the file asks for
            _check_fit(models.build(name, **arguments), content)
        with torch.random.fork_rng(devices=[]):
            return models.build(name, **arguments)
    except ExportError:
        raise
    except (BitwrightError, TypeError, ValueError, RuntimeError) as error:
        raise ExportError(f"names the model '{name}' with {arguments}, which cannot be built ({error}); {ASK}") from None


def _check_fit(network: nn.Module, content: Content) -> None:
    """Raise `ExportError` unless the file has exactly the tensors that the network needs."""
    modules = dict(network.named_modules())
    for slot in content.slots:
        layer = modules.get(slot.name)
        if not isinstance(layer, (*QUANTIZABLE, QuantLayer)):
            raise ExportError(f"has a layer '{slot.name}' that the model has not; {ASK}")
        if tuple(layer.weight.shape) != slot.shape:
            raise _misfit(slot.name, slot.shape, tuple(layer.weight.shape))
    for name in content.vectors:
        if name not in modules or not is_vector_norm(modules[name]):
            raise ExportError(f"has a BatchNorm '{name}' that the model has not; {ASK}")
    wanted = {name: Kept.of(name, tensor) for name, tensor in kept_tensors(network, _names(content), content.vectors).items()}
    for norm in content.vectors:
        width = modules[norm].running_mean
        assert isinstance(width, Tensor)
        wanted |= {f"{norm}.{part}": Kept(f"{norm}.{part}", tuple(width.shape), torch.float32) for part in VECTORS}
    found = {kept.name: kept for kept in content.kept}
    for name in dict.fromkeys([*wanted, *found]):
        if name not in found or name not in wanted:
            raise ExportError(f"has {'no' if name in wanted else 'a'} tensor '{name}', unlike the model; {ASK}")
        if found[name] != wanted[name]:
            raise _misfit(name, found[name].shape, wanted[name].shape)


def _names(content: Content) -> list[str]:
    return [slot.name for slot in content.slots]


def _misfit(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> ExportError:
    return ExportError(f"has '{name}' of shape {found} and the model needs {wanted} (or another data type); {ASK}")


class Cursor:
    """Reads blobs from their beginning to their end."""

    def __init__(self, blobs: Mapping[str, bytes]):
        self.blobs = blobs
        self.places = dict.fromkeys(blobs, 0)

    def take(self, blob: str, size: int) -> bytes:
        """Return the next ``size`` bytes of a blob; raises `ExportError` if there are fewer."""
        place = self.places.get(blob, 0)
        if size > len(self.blobs.get(blob, b"")) - place:
            raise ExportError(f"damaged: '{blob}' ends after {len(self.blobs.get(blob, b''))} bytes and {place + size} are claimed")
        self.places[blob] = place + size
        return self.blobs[blob][place : place + size] if size else b""

    def scales(self, shape: tuple[int, ...]) -> Tensor:
        """Return the next float32 values as scales; raises `ExportError` unless they are finite and not negative."""
        values = from_raw(self.take("float32", 4 * math.prod(shape)), torch.float32, shape)
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise ExportError("damaged: a scale is negative, infinite or nan")
        return values

    def finish(self) -> None:
        """Raise `ExportError` unless every blob was read to its end."""
        for name, place in self.places.items():
            if place != len(self.blobs[name]):
                raise ExportError(f"damaged: '{name}' has {len(self.blobs[name])} bytes and only {place} are claimed")


def _fill(network: nn.Module, content: Content, blobs: Mapping[str, bytes]) -> None:
    """Put the file's values into a network that it fits."""
    cursor = Cursor(blobs)
    pairs = list(zip(content.slots, content.records, strict=True))
    targets = kept_tensors(network, _names(content), content.vectors)
    operations = {slot.name: _operation(network.get_submodule(slot.name)) for slot in content.slots}
    weights: list[nn.Parameter] = []
    for slot, record in pairs:
        weights.append(weights[slot.same] if slot.same is not None else _weight(cursor, slot, record, operations[slot.name]))
    inputs = [_input(cursor, record) for _, record in pairs]
    for (slot, record), weight, quantizer in zip(pairs, weights, inputs, strict=True):
        _install(network, slot.name, operations[slot.name], weight, record, quantizer)
    with torch.no_grad():
        for kept in content.kept:
            value = from_raw(cursor.take(str(kept.dtype).removeprefix("torch."), kept.size), kept.dtype, kept.shape)
            if kept.name in targets:
                targets[kept.name].copy_(value)
            else:
                _set_vector(network, kept.name, value)
    cursor.finish()


def _operation(layer: nn.Module) -> Op:
    return layer.op if isinstance(layer, QuantLayer) else Op.of(layer)


def _weight(cursor: Cursor, slot: Slot, record: Record, operation: Op) -> nn.Parameter:
    count, width = math.prod(slot.shape), record.bits.w
    data = cursor.take("codes", (count * width + 7) // 8)
    if width >= 16:
        values = from_raw(data, torch.bfloat16 if width == 16 else torch.float32, slot.shape).float()
        return nn.Parameter(values, requires_grad=False)
    axis = operation.channel_axis if record.scale == "c" else -1
    scale = cursor.scales(tuple(n if k == axis else 1 for k, n in enumerate(slot.shape)))
    levels = unpack_bits(data, width, count).view(slot.shape).float() + record.origin
    if record.grid != "h" and count and float(levels.max()) > SIGNED_MAX[width]:
        raise ExportError(f"damaged: '{slot.name}' has codes out of the range of {width} bits")
    return nn.Parameter(levels * scale, requires_grad=False)


def _input(cursor: Cursor, record: Record) -> ActivationQuantizer | None:
    if record.input == "-":
        return None
    if record.input == "d":
        return DoReFaActivation(record.bits.a)
    scale = cursor.scales(())
    quantizer = PACTActivation(record.bits.a) if record.input == "p" else LSQActivation(record.bits.a)
    quantizer.scale.data.copy_(scale)
    if isinstance(quantizer, LSQActivation):
        quantizer.set_sign(signed=record.input == "s")
    return quantizer


def _install(
    network: nn.Module, name: str, operation: Op, weight: nn.Parameter, record: Record, quantizer: ActivationQuantizer | None
) -> None:
    """Give a layer its weight; a layer that torch provides stays what it is unless its input is quantized."""
    layer = network.get_submodule(name)
    if quantizer is None and type(layer) in QUANTIZABLE:
        layer.weight = weight
    else:
        bias = layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        replace_module(network, name, QuantLayer(operation, weight, bias, record.bits, None, quantizer))


def _set_vector(network: nn.Module, name: str, value: Tensor) -> None:
    """Set one of the two vectors of a BatchNorm, whose statistics then change nothing."""
    path, _, part = name.rpartition(".")
    norm = network.get_submodule(path)
    assert isinstance(norm, BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    setattr(norm, part, nn.Parameter(value, requires_grad=False))
    norm.running_mean.zero_()
    norm.running_var.fill_(1)
    norm.eps, norm.affine = 0.0, True
