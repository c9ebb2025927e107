"""A bank at work: its files, and the session that routes each image and runs the right member."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bitwright import models, runs
from bitwright.adaptive.network import AdaptiveNet, check_batch, check_finite
from bitwright.data.quality import MixedSplit
from bitwright.data.splits import Split
from bitwright.errors import BitwrightError, DataError, ExportError, RunError
from bitwright.exporters import BANK
from bitwright.exporters._sample import SAMPLES, Sample, sample_of
from bitwright.policy import Bits, Policy
from bitwright.quant.modules import QUANTIZABLE, Op, QuantLayer, replace_module
from bitwright.quant.quantizers import LSQActivation

if TYPE_CHECKING:
    from bitwright.adaptive.bank import Bank, Router

FORMAT = "bitwright-bank-1"
WEIGHTS = "bank.safetensors"
EXPORT = "export"
"""Where a run has both files of its bank."""
SLACK = 1e-3
"""How far beyond 0 … 1 a pixel may be: rounding, not another scale."""


class Session(nn.Module):
    """Routes each image to a member and runs it; `bitwright.load` makes one from what `bitwright export` wrote.

    Attributes:
        members: static quantized networks, cheapest first; they share one weight set on disk.
        policies: their bits.
        costs: bit operations of an image in each member, the router included, ``[K]``.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        router: Router,
        policies: Sequence[Policy],
        costs: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        self.members, self.router = nn.ModuleList(members), router
        self.policies, self.costs = tuple(policies), costs
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of images ``[N, C, H, W]`` of pixels in 0 … 1.

        Raises:
            DataError: pixels that are not finite or not in 0 … 1, images of another shape or type than float32, or none.
        """
        return self.run(self.prepare(pixels))[0]

    def prepare(self, pixels: Tensor) -> Tensor:
        """Check pixels and normalise them."""
        check_batch(pixels, tuple(self.router.image), torch.float32, "session")
        check_finite(pixels)
        low, high = float(pixels.min()), float(pixels.max())
        if low < -SLACK or high > 1 + SLACK:
            raise DataError(f"session: pixels run from {low:.4g} to {high:.4g}; give them in 0 … 1, not normalised (bytes divided by 255)")
        return (pixels - self.mean) / self.std

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of normalised images and the member that each one had, int64 ``[N]``."""
        with torch.no_grad():
            chosen = self.router.route(x)
            parts = [(rows, self.members[k](x[rows])) for k in range(len(self.members)) if len(rows := (chosen == k).nonzero().flatten())]
            logits = parts[0][1].new_empty(len(x), *parts[0][1].shape[1:])
            for rows, part in parts:
                logits[rows] = part
            return logits, chosen


class Normalised(nn.Module):
    """A session for whoever has normalised images already, as a run's splits do."""

    def __init__(self, session: Session):
        super().__init__()
        self.session = session

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of normalised images."""
        return self.session.run(x)[0]


def members_of(net: AdaptiveNet, index: Tensor) -> list[nn.Module]:
    """Return a bank's members ``[K, S]`` with their weights quantized once and for all."""
    return [frozen(net.member(row.tolist())) for row in index]


def frozen(model: nn.Module) -> nn.Module:
    """Replace every weight by its quantized value, in place, so that running does not quantize it again."""
    for module in model.modules():
        if isinstance(module, QuantLayer):
            with torch.no_grad():
                module.weight.copy_(module.quantized_weight())
            module.weight_quantizer = None
            if module.bits.w == 16:
                module.bits = Bits(32, module.bits.a)
    return model


def normalisation(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation that a split normalises by, found from what it does to two pixels."""
    base = split.base if isinstance(split, MixedSplit) else split
    channels = int(split.batch(torch.arange(1))[0].shape[1])
    zero, one = (base.normalise(torch.full((1, channels, 1, 1), value)).flatten().double() for value in (0.0, 1.0))
    std = 1 / (one - zero)
    return tuple((-zero * std).tolist()), tuple(std.tolist())


def write_bank(bank: Bank, folder: Path, example: Tensor, reference: tuple[str, Any] | None) -> int:
    """Write a bank's two files, read them back and compare; see `bitwright.adaptive.bank.save_bank`."""
    from bitwright.adaptive.bank import session_of  # noqa: PLC0415  (a bank needs this module)

    tables, norms = _tables(bank.net)
    tree = {"tables": tables, "norms": norms, "rest": _rest(bank.net), "router": dict(bank.router.state_dict())}
    runs.save_tree(folder / WEIGHTS, tree)
    record = {
        "format": FORMAT,
        "model": None if reference is None else [reference[0], dict(reference[1])],
        "sites": {site.name: list(site.layers) for site in bank.net.space.sites},
        "policies": [{site: list(bits) for site, bits in policy.items()} for policy in bank.members],
        "bitops": [float(share) * bank.net.space.limit for share in bank.shares],
        "router": {"image": list(bank.router.image), "hidden": bank.router.inner.weight.shape[0], "macs": bank.router.macs},
        "mean": list(bank.mean),
        "std": list(bank.std),
        "choices": [list(bits) for bits in bank.net.space.choices],
        **bank.facts,
    }
    kept = session_of(bank)
    record["answers"], record["routed"] = answers(kept)
    record["sha256"] = _checksum(record, folder)
    runs.write_text_atomic(folder / BANK, json.dumps(record, indent=1) + "\n")
    loaded = load_bank(folder, _architecture_of(bank.net))
    for number, (one, other) in enumerate(zip(kept.members, loaded.members, strict=True)):
        with torch.no_grad():
            difference = float((one(example) - other(example)).abs().max())
        if difference > 0:
            raise ExportError(
                f"export: member {number} of the bank differs by {difference:.3g} on the example; nothing of it can be trusted"
            )
    if not torch.equal(kept.router.route(example), loaded.router.route(example)):
        raise ExportError("export: the router read back sends the example elsewhere; nothing of it can be trusted")
    return sum((folder / name).stat().st_size for name in (BANK, WEIGHTS))


def answers(session: Session) -> tuple[list[str], list[int]]:
    """Return some numbers of each member's answer to a sample input (`bitwright.exporters._sample`), and where the router sends it."""
    shape = (SAMPLES, *session.router.image)
    images = torch.from_numpy(sample_of(shape, "float32"))
    with torch.no_grad():
        found = [str(Sample.of([("", shape, "float32")], member(images).numpy())) for member in session.members]
        return found, session.router.route(images).tolist()


def _checksum(record: Mapping[str, Any], folder: Path) -> str:
    """Return the SHA-256 of a bank: of its record but for the checksum in it, and of the file of weights."""
    signed = json.dumps({name: value for name, value in record.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(signed.encode() + (folder / WEIGHTS).read_bytes()).hexdigest()


def _tables(net: AdaptiveNet) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the shared weights with every width's step sizes, and the normalisation of every choice."""
    from bitwright.adaptive.execution import AdaptiveLayer, SwitchableNorm  # noqa: PLC0415

    layers: dict[str, Any] = {}
    norms: dict[str, Any] = {}
    for path, module in net.network.named_modules():
        if isinstance(module, AdaptiveLayer):
            quantizer, inputs = module.weight_quantizer, module.input_quantizer
            layers[path] = {
                "weight": module.weight.detach(),
                "bias": None if module.bias is None else cast(Tensor, module.bias).detach(),
                "steps": None if quantizer is None else quantizer.scale.detach(),
                "shape": None if quantizer is None else list(quantizer.shape),
                "inputs": None if inputs is None else inputs.scale.detach(),
                "signed": None if inputs is None else inputs.signed,
            }
        elif isinstance(module, SwitchableNorm):
            parts = (module.weight, module.bias, module.running_mean, module.running_var)
            norms[path] = {"layer": module.layer, "eps": module.eps, "parts": [part.detach() for part in parts]}
    return layers, norms


def _rest(net: AdaptiveNet) -> dict[str, Tensor]:
    """Return every tensor that belongs neither to a quantized layer nor to a switchable normalisation."""
    layers, norms = _tables(net)
    inside = tuple(f"{path}." for path in (*layers, *norms))
    return {name: value for name, value in net.network.state_dict().items() if not name.startswith(inside)}


def _architecture_of(net: AdaptiveNet) -> nn.Module:
    """Return a static member with blank values, as the architecture to load into."""
    blank = copy.deepcopy(net.member([0] * len(net.space.names)))
    for value in blank.state_dict().values():
        value.fill_(math.nan if value.is_floating_point() else 0)
    return blank


def load_bank(path: str | Path, model: nn.Module | None = None) -> Session:
    """Return the session of a bank.

    Args:
        path: the folder that has bank.json and bank.safetensors, one of the two files, or a run that exported them.
        model: the float architecture (its values do not matter); needed unless it is one of ours by name.

    Raises:
        ExportError: a file is missing, damaged, or does not fit the model.
    """
    return load_with_record(path, model)[0]


def load_with_record(path: str | Path, model: nn.Module | None = None) -> tuple[Session, dict[str, Any]]:
    """Return the session of a bank, and what bank.json says; see `load_bank`."""
    folder = _folder(Path(path))
    try:
        record = json.loads((folder / BANK).read_text("utf-8"))
        if record["format"] != FORMAT:
            raise ExportError(f"{folder / BANK}: has format {record['format']!r}, expected '{FORMAT}'; export the bank again")
        tree = runs.load_tree(folder / WEIGHTS)
        members = [_member(record, tree, policy, _architecture(record, model, folder)) for policy in record["policies"]]
        if record.get("sha256") != _checksum(record, folder):
            raise ExportError(f"{folder / BANK}: tampered with or damaged (its checksum does not match); export the bank again")
        costs = torch.tensor(record["bitops"])
        return Session(members, _router(record, tree), _policies(record), costs, record["mean"], record["std"]), record
    except OSError as error:
        raise ExportError(
            f"{folder / BANK}: cannot be read ({error.strerror or error}); give the folder that `bitwright export` wrote"
        ) from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError, RunError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(f"{folder}: damaged, or for another model ({reason}); export the bank again, or pass its own model=") from None


def _folder(path: Path) -> Path:
    """Return the folder that has a bank's two files; raises `ExportError` if its weights are missing."""
    folder = path if path.is_dir() else path.parent
    if (folder / WEIGHTS).is_file() or not (folder / BANK).is_file():
        return folder
    inner = folder / EXPORT
    if (inner / BANK).is_file() and (inner / WEIGHTS).is_file():  # a run keeps a copy of bank.json beside its other records
        return inner
    raise ExportError(f"{folder / BANK}: {WEIGHTS} is not beside it; copy it there, or give the folder that has both files")


def _policies(record: Mapping[str, Any]) -> list[Policy]:
    return [Policy((site, Bits(*bits)) for site, bits in policy.items()) for policy in record["policies"]]


def _router(record: Mapping[str, Any], tree: Mapping[str, Any]) -> Router:
    from bitwright.adaptive.bank import Router as Made  # noqa: PLC0415  (a bank needs this module)

    router = Made(tuple(record["router"]["image"]), len(record["policies"]), record["router"]["hidden"])
    router.load_state_dict(tree["router"])
    return router.eval().requires_grad_(False)


def _architecture(record: Mapping[str, Any], model: nn.Module | None, folder: Path) -> nn.Module:
    if model is not None:
        return copy.deepcopy(model).cpu()
    named = record["model"]
    if named is None or named[0] not in models.available():
        raise ExportError(f"{folder / BANK}: does not name one of our models; pass the float architecture it was exported from as model=")
    try:
        with torch.random.fork_rng(devices=[]):
            return models.build(named[0], **named[1])
    except BitwrightError as error:
        raise ExportError(f"{folder / BANK}: its model cannot be built ({error}); pass the float architecture as model=") from None


def _member(record: Mapping[str, Any], tree: Mapping[str, Any], policy: Mapping[str, Any], network: nn.Module) -> nn.Module:
    """Return one member: the architecture with the shared weights at its widths."""
    bits_of = {layer: Bits(*policy[site]) for site, layers in record["sites"].items() for layer in layers}
    choices = [Bits(*bits) for bits in record["choices"]]
    for path, saved in tree["tables"].items():
        replace_module(network, path, _layer(network.get_submodule(path), saved, bits_of[path]))
    own = network.state_dict()
    for path, saved in tree["norms"].items():
        place = choices.index(bits_of[saved["layer"]])
        norm: Any = network.get_submodule(path)
        with torch.no_grad():
            for target, table in zip((norm.weight, norm.bias, norm.running_mean, norm.running_var), saved["parts"], strict=True):
                target.copy_(table[place])
    with torch.no_grad():
        for name, value in tree["rest"].items():
            own[name].copy_(value)
    return frozen(network.eval().requires_grad_(False))


def _layer(layer: nn.Module, saved: Mapping[str, Any], bits: Bits) -> QuantLayer:
    """Return a quantized layer from its shared weight and tables."""
    from bitwright.quant.quantizers import LSQWeight  # noqa: PLC0415

    if not isinstance(layer, (*QUANTIZABLE, QuantLayer)) or tuple(layer.weight.shape) != tuple(saved["weight"].shape):
        raise ExportError(f"a layer is {type(layer).__name__} in the model, of another shape than in the bank; pass its own model=")
    op = layer.op if isinstance(layer, QuantLayer) else Op.of(layer)
    weight = nn.Parameter(saved["weight"].clone())
    bias = None if saved["bias"] is None else nn.Parameter(saved["bias"].clone())
    weights = inputs = None
    if saved["steps"] is not None and bits.w < 16:
        weights = LSQWeight(weight.detach(), bits.w, axis=op.channel_axis, narrow=False, entropy=False, rule="minmax")
        weights.scale.data.copy_(saved["steps"][bits.w - 1].view(weights.scale.shape))
    if saved["inputs"] is not None and bits.a < 16:
        inputs = LSQActivation(bits.a)
        inputs.set_sign(signed=saved["signed"])
        inputs.scale.data.copy_(saved["inputs"][bits.a - 1])
    return QuantLayer(op, weight, bias, bits, weights, inputs)
