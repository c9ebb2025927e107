"""Targets: what a deployment runtime or device runs, as versioned files, so that a policy is never more than it can do.

A target says for each kind of layer which pairs of widths run and as what, which ends are pinned, which operations it fuses, and
which tensors beside the layers' inputs must be on a grid (`bitwright.quant.points`) so that nothing falls back to float unseen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bitwright.errors import TargetError, nearest
from bitwright.policy import WIDTHS, Bits
from bitwright.quant.points import PointKind

if TYPE_CHECKING:
    from bitwright.sites import Site, Trace

FORMAT = "bitwright-target-1"
LayerKind = Literal["convolution", "depthwise", "transposed", "linear", "product"]
Width = Annotated[int, Field(strict=True)]
TIMED = {"openvino": "openvino", "onnxruntime": "onnx"}
"""The format that each runtime which measures latencies reads."""
LARGEST = 1 << 20
"""Bytes of the largest target file that is read."""


class _Strict(BaseModel):
    """Frozen; every key must be known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _known_widths(value: tuple[int, ...]) -> tuple[int, ...]:
    for width in value:
        if width not in WIDTHS:
            raise ValueError(f"width {width} is not one of {', '.join(map(str, WIDTHS))}")
    return value


class Rule(_Strict):
    """Pairs of widths that run, and as what.

    Attributes:
        w: weight widths.
        a: widths of the input activations; every weight width goes with every one of them.
        runs: what the runtime computes with: ``int8``, ``bf16``, ``float32``, ``int4 weights``, ``any width``, …
        faster: whether that is faster than what comes with more bits, where it is known.
    """

    w: tuple[Width, ...] = Field(min_length=1)
    a: tuple[Width, ...] = Field(min_length=1)
    runs: str
    faster: bool | None = None

    @field_validator("w", "a")
    @classmethod
    def _known(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return _known_widths(value)

    @property
    def pairs(self) -> tuple[Bits, ...]:
        """The pairs."""
        return tuple(Bits(w, a) for w in self.w for a in self.a)


class Pins(_Strict):
    """Widths of the first and the last site; None leaves them to the recipe."""

    first: tuple[Width, Width] | None = None
    last: tuple[Width, Width] | None = None

    @field_validator("first", "last")
    @classmethod
    def _known(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        return value if value is None else cast("tuple[int, int]", _known_widths(value))


class Target(_Strict):
    """A runtime or device.

    Attributes:
        format: of the file.
        name: what it is called on the command line.
        version: of what the file says, raised by every change.
        about: one line for people.
        exporter: the format that it reads; None where bitwright writes none for it.
        latency: the runtime that measures latencies for it; None where nothing here can.
        layers: what runs, by kind of layer. ``depthwise`` falls back to ``convolution``, ``transposed`` likewise; a kind that is
            not there does not run.
        pinned: ends with widths of their own.
        functional_calls: whether a weight may be used by a call in a module's own forward, without a layer of its own, as
            `nn.MultiheadAttention` does; a packed file has no place for such a call, at any width.
        one_float_type: whether a network there has one type for all that is not in integers, so that 16 and 32 bits do not go together.
        fusions: operations that run as one, for people.
        points: what else must be on a grid.
        notes: what is to be known.
    """

    format: Literal["bitwright-target-1"]
    name: str = Field(pattern=r"^[a-z0-9-]+$")
    version: int = Field(ge=1, strict=True)
    about: str
    exporter: str | None = None
    latency: Literal["openvino", "onnxruntime"] | None = None
    layers: dict[LayerKind, tuple[Rule, ...]]
    pinned: Pins = Pins()
    functional_calls: bool = True
    one_float_type: bool = False
    fusions: tuple[str, ...] = ()
    points: tuple[PointKind, ...] = ()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _agrees(self) -> Target:
        """Refuse a target whose parts do not go together, which a search would find out late or never."""
        from bitwright.exporters import available as formats  # noqa: PLC0415  (what is written is no business of a target's but its name)

        if self.exporter is not None and self.exporter not in formats():
            raise ValueError(f"exporter: no format '{self.exporter}'; {nearest(self.exporter, formats())}")
        if self.latency is not None and self.exporter != TIMED[self.latency]:
            given = "no exporter" if self.exporter is None else f"exporter {self.exporter}"
            raise ValueError(f"latency: {self.latency} goes with {given}; give exporter: {TIMED[self.latency]}, or leave latency out")
        pairs = {pair for rules in self.layers.values() for rule in rules for pair in rule.pairs}
        if not pairs:
            raise ValueError("layers: no rule, so nothing runs; give one, such as linear: [{w: [8], a: [8], runs: int8}]")
        for end, pin in (("first", self.pinned.first), ("last", self.pinned.last)):
            if pin is not None and Bits(*pin) not in pairs:
                raise ValueError(f"pinned.{end}: no rule runs {Bits(*pin)!r}; give widths that a rule has, or add a rule")
        return self

    def rules(self, site: Site) -> tuple[Rule, ...]:
        """Return what applies to a site."""
        if not self.functional_calls and is_call(site):
            return ()
        kind = kind_of(site)
        fallback: LayerKind = "convolution" if kind in ("depthwise", "transposed") else kind
        return self.layers.get(kind, self.layers.get(fallback, ()))

    def legal(self, site: Site) -> tuple[Bits, ...]:
        """Return the pairs that run at a site, a product of two activations with equal widths."""
        pairs = dict.fromkeys(pair for rule in self.rules(site) for pair in rule.pairs)
        return tuple(pair for pair in pairs if site.operands == 1 or pair.w == pair.a)

    def runs(self, site: Site, bits: Bits) -> str | None:
        """Return what computes a site at a pair of widths; None where it does not run."""
        return next((rule.runs for rule in self.rules(site) if bits in rule.pairs), None)

    def nearest(self, site: Site, bits: Bits) -> Bits:
        """Return the pair nearest to one by the ratios of widths; of equally near ones the wider, which loses less.

        Raises:
            TargetError: no pair runs at the site.
        """
        allowed = self.legal(site)
        if not allowed:
            found = f"runs no {self._named(site)}, such as '{site.name}'"
            raise TargetError(f"target {self.name}: {found}; {_skip(site)}, or take another target")
        return _nearest(allowed, bits)

    def violations(self, trace: Trace, policy: Mapping[str, Bits]) -> tuple[Violation, ...]:
        """Return the sites whose widths do not run, or not beside the others', with the nearest that do."""
        pins = self._pins(trace)
        mixed = self.one_float_type and any(16 in bits for bits in policy.values())
        found = []
        for site in trace.sites:
            bits = policy.get(site.name)
            if bits is None:
                continue
            allowed = (pins[site.name],) if site.name in pins else self.legal(site)
            allowed = tuple(pair for pair in allowed if not (mixed and 32 in pair)) or allowed
            if bits not in allowed:
                found.append(Violation(site.name, self._named(site), bits, _nearest(allowed, bits) if allowed else None, _skip(site)))
        return tuple(found)

    def check(self, trace: Trace, policy: Mapping[str, Bits]) -> None:
        """Raise `TargetError` that names every site whose widths do not run, and the nearest that do."""
        found = self.violations(trace, policy)
        if found:
            ends = [f"nearest {v.nearest!r}" if v.nearest else f"which runs at no widths: {v.instead}" for v in found]
            listed = "; ".join(f"'{v.site}' ({v.kind}) has {v.bits!r}, {end}" for v, end in zip(found, ends, strict=True))
            raise TargetError(f"target {self.name}: {len(found)} of {len(policy)} sites do not run there: {listed}")

    def restrict(self, trace: Trace, choices: Mapping[str, Sequence[Bits]]) -> dict[str, tuple[Bits, ...]]:
        """Return the choices that run; a pinned site that does not run takes the target's pin, or the nearest pair.

        Raises:
            TargetError: none of a site's choices runs.
        """
        pins = self._pins(trace)
        kept = {site.name: self._restricted(site, tuple(choices[site.name]), pins.get(site.name)) for site in trace.sites}
        if not (self.one_float_type and any(16 in bits for allowed in kept.values() for bits in allowed)):
            return kept
        # 32 bits are slower than 16, and both do not go into one network
        return {name: tuple(bits for bits in allowed if 32 not in bits) or allowed for name, allowed in kept.items()}

    def _pins(self, trace: Trace) -> dict[str, Bits]:
        """Return the widths of the ends that have some of their own."""
        ends = ((site, pin) for site, pin in ((trace.first, self.pinned.first), (trace.last, self.pinned.last)) if pin is not None)
        return {site: self.nearest(trace[site], Bits(*pin)) for site, pin in ends}

    def _restricted(self, site: Site, asked: tuple[Bits, ...], pin: Bits | None) -> tuple[Bits, ...]:
        allowed = self.legal(site)
        if pin is not None:
            return (pin,)
        kept = tuple(bits for bits in asked if bits in allowed)
        if not kept and (len(asked) == 1 or not allowed):
            return (self.nearest(site, asked[0]),)  # raises where nothing runs
        if not kept:
            wanted, known = ", ".join(map(repr, asked[:4])), ", ".join(map(repr, allowed[:8])) or "none"
            more = " …" if len(asked) > 4 else ""
            ask = "add such widths to search.weights and search.activations, or take another target"
            raise TargetError(f"target {self.name}: site '{site.name}' may be {wanted}{more}, and {known} run there; {ask}")
        return kept

    def _named(self, site: Site) -> str:
        """Return the kind of a site, for people."""
        return "functional call with a weight" if not self.functional_calls and is_call(site) else kind_of(site)

    def widths(self) -> tuple[list[int], list[int]]:
        """Return all weight and all activation widths that run somewhere."""
        pairs = [pair for rules in self.layers.values() for rule in rules for pair in rule.pairs]
        return sorted({pair.w for pair in pairs}), sorted({pair.a for pair in pairs})


@dataclass(frozen=True)
class Violation:
    """A site whose widths do not run on a target, and the nearest that do; None where none do, and then what to do instead."""

    site: str
    kind: str
    bits: Bits
    nearest: Bits | None
    instead: str


def kind_of(site: Site) -> LayerKind:
    """Return the kind of layer of a site, as target files name it."""
    if site.operands == 2:
        return "product"
    if "transpose" in site.kind:
        return "transposed"
    if site.kind.startswith("conv"):
        return "depthwise" if site.groups > 1 and site.weight_shape[1] == 1 else "convolution"
    return "linear"


def is_call(site: Site) -> bool:
    """Return whether a site with a weight is, somewhere, a functional call (addressed ``owner#k``) and no layer."""
    return site.operands == 1 and any("#" in layer for layer in site.layers)


def _skip(site: Site) -> str:
    """Return what to leave out where a site does not run: of a functional call the module that makes it."""
    owner = next((layer.partition("#")[0] for layer in site.layers if "#" in layer), "")
    return f"skip '{owner}'" if owner else "skip it"


def _nearest(allowed: Sequence[Bits], bits: Bits) -> Bits:
    return min(allowed, key=lambda pair: (_distance(pair, bits), -pair.w, -pair.a))


def _distance(pair: Bits, wanted: Bits) -> float:
    return abs(math.log2(pair.w / wanted.w)) + abs(math.log2(pair.a / wanted.a))


def available() -> tuple[str, ...]:
    """Return the names of the targets that come with the package.

    >>> "onnxruntime-x86" in available()
    True
    """
    folder = resources.files("bitwright") / "targets"
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def get_target(name: str | Path) -> Target:
    """Return a target by name, or from a YAML file of one's own.

    Raises:
        TargetError: there is none, or the file says something unknown.

    >>> get_target("onnxruntime-x86").exporter
    'onnx'
    """
    text = str(name)
    if text in available():
        return _parse((resources.files("bitwright") / "targets" / f"{text}.yaml").read_text("utf-8"), f"target {text}")
    path = Path(text)
    if not path.is_file():
        raise TargetError(f"target '{text}': no target and no file of that name; {nearest(text, available())}")
    if path.stat().st_size > LARGEST:
        raise TargetError(f"target '{text}': larger than {LARGEST} bytes; give a YAML file such as those of bitwright")
    try:
        return _parse(path.read_text("utf-8"), f"target {text}")
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"target '{text}': cannot be read as text ({error}); give a YAML file") from None


def check_format(target: str | None, to: str | None, points: Sequence[str] | None, *, integer: bool) -> None:
    """Check that a target is there, and that a packed file, if one is asked for, can say what it and the quantizer ask for.

    Raises:
        TargetError: the target is unknown, or the format cannot say its points or integer arithmetic.
    """
    asked = points if points is not None or target is None else get_target(target).points
    if target is not None:
        get_target(target)
    if to == "packed" and (asked or integer):
        what = f"8-bit points ({', '.join(asked)})" if asked else "scales 'power_of_two'"
        raise TargetError(f"recipe: export.to is packed, and a packed file cannot say {what}; give export.to=onnx, or quantize.points=[]")


def _parse(text: str, where: str) -> Target:
    from bitwright.recipe import parse_yaml  # noqa: PLC0415  (a recipe names its target)

    data: Any = parse_yaml(text, where)
    try:
        return Target.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise TargetError(f"{where}: unknown key '{place}'; {nearest(str(first['loc'][-1]), Target.model_fields)}") from None
        message = first["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
        raise TargetError(": ".join(filter(None, (where, place, message)))) from None


__all__ = ["FORMAT", "Rule", "Target", "Violation", "available", "get_target", "kind_of"]
