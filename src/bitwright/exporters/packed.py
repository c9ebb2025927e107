"""The packed format: integer codes at their true widths, bit-packed, in one safetensors file with the policy and the scales.

A safetensors header entry takes about a hundred bytes a tensor, so tensors are coalesced into one blob a data type:

- ``codes`` (uint8): the weights of each quantized layer, in the order of the model's modules: ⌈n·w/8⌉ bytes of codes at 1 to
  8 bits, bfloat16 at 16, float32 at 32.
- ``float32``: the weight scales of those layers in the same order, their activation scales, then every unquantized float32
  tensor (biases, BatchNorm); other data types have a blob of their name each.

The metadata say what is where: ``layout`` (names and shapes, the same at every policy), ``bits`` (two digits a site, places in
`bitwright.policy.WIDTHS`), ``layers`` (six characters each), ``model`` (its name and arguments), ``sample`` (inputs that anyone can make
again, and some numbers of the network's answer; of a fixed length, blank where there is none) and ``sha256``.

A code k stands for the weight (k + origin) · scale. Grids: *integer*, origin -2^(w-1), or -2^(w-1) + 1 where it is narrow;
*half-integer*, origin -(2^w - 1)/2. `num_batches_tracked` of a BatchNorm is not kept: evaluation does not use it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from bitwright import models
from bitwright.errors import ExportError
from bitwright.exporters import Check, Example, Exporter, Reference, Source, Verification, check_policy, compare_outputs, outputs
from bitwright.exporters._container import DTYPES, header_room, pack_bits, raw, to_bytes
from bitwright.exporters._format import (
    SAMPLE_ROOM,
    VECTORS,
    BatchNormMode,
    Content,
    Kept,
    Record,
    Slot,
    kept_tensors,
    origin,
    vector_norms,
)
from bitwright.exporters._loading import answer_on, load, read_policy
from bitwright.exporters._loading import verify as verify_packed
from bitwright.exporters._sample import SAMPLES, Sample
from bitwright.policy import Bits, Policy
from bitwright.quant.folding import Folded
from bitwright.quant.functional_calls import named_quant_calls
from bitwright.quant.modules import QuantLayer, named_quant_layers
from bitwright.quant.points import named_points
from bitwright.quant.quantizers import (
    DoReFaActivation,
    DoReFaWeight,
    EntropyWeight,
    LSQActivation,
    LSQWeight,
    PACTActivation,
    WeightQuantizer,
)
from bitwright.runs import write_bytes_atomic

if TYPE_CHECKING:
    from bitwright.sites import Trace

__all__ = ["Packed", "load", "packed_overhead", "read_policy"]

SCHEMES: dict[type[WeightQuantizer], str] = {LSQWeight: "l", EntropyWeight: "e", DoReFaWeight: "d"}


class Encoded(NamedTuple):
    """One layer as it is written."""

    record: Record
    codes: bytes
    scale: bytes
    activation: bytes


@dataclass(frozen=True)
class Packed(Exporter):
    """Bit-packed codes in one safetensors file; `load` reads it back.

    Attributes:
        batchnorm: ``as-trained`` keeps the four tensors of a BatchNorm; ``eval-vectors`` the two that evaluation needs,
            weight/√(var+eps) and bias - mean·that, in the rounding of torch's own kernel.
    """

    suffixes = (".safetensors",)
    batchnorm: BatchNormMode = "as-trained"

    @classmethod
    def verify(cls, path: Path, model: nn.Module | None = None) -> Verification:
        """Load a file, count the levels of its weights and run it; raises `ExportError` with the reason for a damaged one."""
        return verify_packed(path, model)

    def __post_init__(self) -> None:
        if self.batchnorm not in ("as-trained", "eval-vectors"):
            raise ExportError(f"export: batchnorm '{self.batchnorm}'; type 'as-trained' or 'eval-vectors'")

    def write(self, source: Source, path: Path) -> Mapping[str, int]:
        """Write the file; raises `ExportError` for a quantizer or a data type that the format cannot say."""
        layers = dict(named_quant_layers(source.model))
        if not layers:
            raise ExportError("export: the model has no quantized layer; pass what quantize() returned")
        call = next((name for name, _ in named_quant_calls(source.model)), None)
        if call is not None:
            ask = f"leave it float with trace(..., skip=['{call}'])"
            raise ExportError(f"export: a packed file cannot say the functional call '{call}'; {ask}")
        _check_plain(source.model)
        policy = source.policy or Policy((name, layer.bits) for name, layer in layers.items())
        check_policy(policy, {name: layer.bits for name, layer in layers.items()})
        encoded = [_encode(name, layer) for name, layer in layers.items()]
        slots = _slots([(name, layer.weight) for name, layer in layers.items()], encoded)
        own = [item for item, slot in zip(encoded, slots, strict=True) if slot.same is None]
        codes, scales = b"".join(item.codes for item in own), b"".join(item.scale for item in own)
        scales += b"".join(item.activation for item in encoded)
        rest = _rest(source.model, list(layers), self.batchnorm)
        content = _content(slots, [item.record for item in encoded], rest, policy, source, self.batchnorm)
        content = replace(content, sample=_sample(source))
        data = to_bytes(content.to_metadata(), _blobs(codes, scales, rest))
        write_bytes_atomic(path, data)
        tensors = sum(kept.size for kept in content.kept)
        return {"codes": len(codes), "scales": len(scales), "tensors": tensors, "header": len(data) - len(codes) - len(scales) - tensors}

    def check(self, source: Source, path: Path) -> Check:
        """Load the file and compare logits bit for bit, and the number of distinct weights with the widths."""
        builtin = source.reference is not None and source.reference[0] in models.available()
        loaded = load(path, None if builtin else _blank(source.model))
        difference = compare_outputs(outputs(source.model, source.example), outputs(loaded, source.example))
        if difference:
            raise ExportError(f"export: the file's network differs by {difference:.3g} on the example; nothing was written")
        return Check(_count_levels(source.model, loaded))


def _check_plain(model: nn.Module) -> None:
    """Refuse what a float architecture has no place for."""
    point = next((name for name, _ in named_points(model)), None)
    if point is not None:
        raise ExportError(f"export: a packed file cannot say '{point}' of a target; give --to onnx, or quantize without points")
    folded = next((name for name, module in model.named_modules() if isinstance(module, Folded)), None)
    if folded is not None:
        found = f"the BatchNorm '{folded}' is folded (scales='power_of_two')"
        raise ExportError(f"export: {found}, and a packed file keeps the float architecture; give --to onnx")
    for name, layer in named_quant_layers(model):
        if isinstance(layer.input_quantizer, LSQActivation) and layer.input_quantizer.power_of_two:
            found = f"'{name}' rounds its steps to powers of two, and its bias to their product (scales='power_of_two')"
            raise ExportError(f"export: {found}, and a packed file keeps both unrounded; give --to onnx, or quantize with scales='free'")


def _encode(name: str, layer: QuantLayer) -> Encoded:
    if layer.weight.dtype != torch.float32:
        raise ExportError(f"export: the weight of '{name}' is {layer.weight.dtype}; convert the model with .float() first")
    kind, activation = _encode_input(name, layer)
    if layer.weight_quantizer is None:
        if layer.bits.w < 16:
            found = f"'{name}' has W{layer.bits.w} and no weight quantizer, as in a loaded network"
            raise ExportError(f"export: {found}; export the fine-tuned one")
        kept = layer.weight.to(torch.bfloat16) if layer.bits.w == 16 else layer.weight
        return Encoded(Record(layer.bits, input=kind), raw(kept), b"", activation)
    with torch.no_grad():
        code, wanted = layer.weight_quantizer.encode(layer.weight), layer.quantized_weight()
    if code.bits != layer.bits.w or not torch.equal(code.decode(), wanted):
        raise ExportError(f"export: the codes of '{name}' do not give back its {layer.bits.w}-bit weights; are its scales finite?")
    scheme = SCHEMES.get(type(layer.weight_quantizer))
    grid = next((g for g in "inh" if origin(g, code.bits) == code.origin), None)
    if scheme is None or grid is None:
        raise ExportError(f"export: '{name}' has a {type(layer.weight_quantizer).__name__}, which a packed file cannot say")
    axis = layer.op.channel_axis
    if code.scale.numel() > 1 and tuple(code.scale.shape) != tuple(n if k == axis else 1 for k, n in enumerate(layer.weight.shape)):
        raise ExportError(f"export: '{name}' has scales of shape {tuple(code.scale.shape)}; use one, or one for each output channel")
    record = Record(layer.bits, scheme, grid, "c" if code.scale.numel() > 1 else "t", kind)
    return Encoded(record, pack_bits(code.codes, code.bits), raw(code.scale), activation)


def _encode_input(name: str, layer: QuantLayer) -> tuple[str, bytes]:
    """Return the letter of a layer's input quantizer, and its scale."""
    quantizer = layer.input_quantizer
    if quantizer is None and layer.bits.a >= 16:
        return "-", b""
    if type(quantizer) is LSQActivation:
        return "s" if quantizer.signed else "u", raw(quantizer.scale.abs())
    if type(quantizer) is PACTActivation:
        return "p", raw(quantizer.scale.abs())
    if type(quantizer) is DoReFaActivation:
        return "d", b""
    found = "no quantizer" if quantizer is None else f"a {type(quantizer).__name__}"
    raise ExportError(f"export: '{name}' has A{layer.bits.a} and {found} on its input, which a packed file cannot say")


def _slots(weights: Sequence[tuple[str, Tensor]], encoded: Sequence[Encoded] | None = None) -> tuple[Slot, ...]:
    """Place the layers; one whose weight is an earlier one's too is written once (if its codes are the same as well)."""
    first: dict[int, int] = {}
    slots = []
    for i, (name, weight) in enumerate(weights):
        j = first.setdefault(id(weight), i)
        alike = j < i and (encoded is None or _same_codes(encoded[i], encoded[j]))
        slots.append(Slot(name, tuple(weight.shape), j if alike else None))
    return tuple(slots)


def _same_codes(a: Encoded, b: Encoded) -> bool:
    return (a.codes, a.scale, a.record.bits.w, a.record.grid) == (b.codes, b.scale, b.record.bits.w, b.record.grid)


def _rest(model: nn.Module, layers: Sequence[str], mode: BatchNormMode) -> dict[str, Tensor]:
    """Return what is written as it is, by name; a BatchNorm's two vectors under the names of its weight and bias."""
    norms = vector_norms(model, mode)
    rest = {name: tensor.detach() for name, tensor in kept_tensors(model, layers, norms).items()}
    for norm in norms:
        vectors = evaluation_vectors(norm, model.get_submodule(norm))
        rest |= {f"{norm}.{part}": vector for part, vector in zip(VECTORS, vectors, strict=True)}
    for name, tensor in rest.items():
        if tensor.dtype not in DTYPES:
            raise ExportError(f"export: '{name}' is {tensor.dtype}, which a packed file cannot say; convert the model with .float()")
    return rest


def evaluation_vectors(name: str, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return (alpha, beta) of a BatchNorm, so that evaluation is x·alpha + beta, as torch's kernel itself rounds them.

    They are read off that kernel: at mean 0 and bias 0 it maps 1 to alpha, and as trained it maps 0 to beta.
    """
    assert isinstance(norm, BatchNorm)
    trained = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, var, weight, bias = (None if tensor is None else tensor.detach().cpu() for tensor in trained)
    assert mean is not None
    assert var is not None
    none, one = torch.zeros_like(mean), torch.ones_like(mean)
    alpha = F.batch_norm(one.view(1, -1, 1), none, var, weight, none, eps=norm.eps).view(-1)
    beta = F.batch_norm(none.view(1, -1, 1), mean, var, weight, bias, eps=norm.eps).view(-1)
    spread = (torch.linspace(-8, 8, 41) * var.sqrt().view(-1, 1) + mean.view(-1, 1))[None]
    wanted = F.batch_norm(spread, mean, var, weight, bias, eps=norm.eps)
    if not torch.equal(wanted, F.batch_norm(spread, none, one, alpha, beta, eps=0.0)):
        raise ExportError(f"export: two vectors do not reproduce BatchNorm '{name}' on this machine; use batchnorm='as-trained'")
    return alpha, beta


def _content(
    slots: tuple[Slot, ...], records: Sequence[Record], rest: Mapping[str, Tensor], policy: Policy, source: Source, mode: BatchNormMode
) -> Content:
    kept = tuple(Kept.of(name, tensor) for name, tensor in rest.items())
    return Content(slots, tuple(records), kept, policy, vector_norms(source.model, mode), source.reference)


def _sample(source: Source) -> Sample | None:
    """Return some numbers of what the network answers to inputs like the example; None where it takes no such, or they have no room."""
    inputs = _inputs_like(source.example)
    try:
        output = None if inputs is None else answer_on(source.model, Sample(inputs, (), ()))
    except (RuntimeError, TypeError, ValueError, IndexError):  # the network's own code: made up inputs may be none that it takes
        return None
    if inputs is None or output is None or not bool(torch.isfinite(output).all()):
        return None
    sample = Sample.of(inputs, output.float().numpy())
    return sample if len(str(sample)) <= SAMPLE_ROOM else None


def _inputs_like(example: Example) -> tuple[tuple[str, tuple[int, ...], str], ...] | None:
    """Return name, shape and data type of an example's inputs, at most `SAMPLES` of a batch; None where one is no tensor."""
    placed = example if isinstance(example, tuple) else (example,)
    named = example.items() if isinstance(example, Mapping) else [("", value) for value in placed]
    inputs = []
    for name, value in named:
        if (
            not isinstance(value, Tensor)
            or not str(value.dtype).startswith(("torch.float", "torch.int"))
            or not (name or "x").isidentifier()
        ):
            return None
        inputs.append((name, tuple(value[:SAMPLES].shape if value.dim() else ()), str(value.dtype).removeprefix("torch.")))
    return tuple(inputs)


def _blobs(codes: bytes, scales: bytes, rest: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    """Return the blobs in file order: the widest data types first, so that each is aligned."""
    by_type: dict[torch.dtype, list[bytes]] = {torch.float32: [scales]}
    for tensor in rest.values():
        by_type.setdefault(tensor.dtype, []).append(raw(tensor))
    ordered = sorted(by_type, key=lambda dtype: -dtype.itemsize)
    blobs = {str(dtype).removeprefix("torch."): (dtype, b"".join(by_type[dtype])) for dtype in ordered}
    return blobs | {"codes": (torch.uint8, codes)}


def packed_overhead(model: nn.Module, trace: Trace, *, reference: Reference | None = None, batchnorm: BatchNormMode = "as-trained") -> int:
    """Return the bytes of a packed file that no policy changes: header, unquantized tensors, room for activation scales.

    With the terms of `bitwright.costs.Size` it is an upper bound of the file's size, tight but for activation scales that
    are not there (4 bytes a layer) and weight scales per tensor instead of per channel.

    Args:
        model: the float network, or its quantized copy.
        trace: its sites.
        reference: the one given to `export`; matters only if its JSON is longer than 160 characters.
        batchnorm: the option given to `export`.
    """
    places = {layer for site in trace.sites for layer in site.layers}
    weights = [(name, module.get_parameter("weight")) for name, module in model.named_modules() if name in places]
    rest = _rest(model, [name for name, _ in weights], batchnorm)
    policy = Policy((name, Bits(32, 32)) for name in trace.names)
    records = [Record(Bits(32, 32))] * len(weights)
    content = _content(_slots(weights), records, rest, policy, Source(model, (), policy, reference), batchnorm)
    blobs = _blobs(b"", b"", rest)
    return header_room(content.to_metadata(), len(blobs)) + sum(kept.size for kept in content.kept) + 4 * len(weights)


def _blank(model: nn.Module) -> nn.Module:
    """Return a copy whose every kept value is nan or zero, so that nothing can come from it but the architecture."""
    blank = copy.deepcopy(model)
    for tensor in blank.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    return blank


def _count_levels(model: nn.Module, loaded: nn.Module) -> dict[str, int]:
    """Return the most distinct weights in a scale group of each layer, from the loaded values; raises if its width has fewer."""
    counts = {}
    for name, layer in named_quant_layers(model):
        weight = loaded.get_submodule(name).get_parameter("weight")
        if layer.bits.w == 16 and not torch.equal(weight, weight.bfloat16().float()):
            raise ExportError(f"export: '{name}' was read back with weights that are no bfloat16")
        if layer.weight_quantizer is None:
            continue
        grouped = layer.weight_quantizer.encode(layer.weight).scale.numel() > 1
        rows = weight.movedim(layer.op.channel_axis, 0).flatten(1) if grouped else weight.reshape(1, -1)
        counts[name] = int((rows.sort(1).values.diff(dim=1) != 0).sum(1).max()) + 1
        if counts[name] > 2**layer.bits.w:
            found = f"'{name}' was read back with {counts[name]} distinct weights"
            raise ExportError(f"export: {found}, and its policy says {layer.bits.w} bits; report this file")
    return counts
