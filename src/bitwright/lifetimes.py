"""Lifetimes: which activations a network holds at each of its steps, seen while it runs once.

What counts, and what does not:

- A *step* is one call: a layer, a functional call, an addition, a pooling. At a step the network holds everything that it or a later
  step reads, and what it writes. Weights, buffers and what is made of them alone are not activations.
- A call that works element by element on a tensor nothing reads later (BatchNorm, ReLU, a residual addition, …) writes over it, in
  place, whether or not the code says so. Where it has that tensor alone it is part of the step before, as in every engine that fuses
  them: the convolution writes what ReLU would.
- Views (``flatten``, ``transpose``, a slice, …) are the tensor that they look at, which is held whole. What brings values into another
  order and is no view (``reshape`` after ``transpose``: a channel shuffle) copies them, a step that holds both.
- What a fused call makes inside (`nn.MultiheadAttention`, ``F.scaled_dot_product_attention``) is not seen: its inputs and output are.

A tensor is held at the width of the sites that read it, the widest where there are several; one that anything else reads (an addition,
a concatenation, average pooling, the caller) is held at the width of a fixed *point* at least; one that a skipped layer reads, in
float32. Max-pooling and copies keep codes as they are, so what only they read has the width of what they give.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

FLOAT = 32
_KEEPING = "clone detach to float half bfloat16 type_as dropout dropout1d dropout2d alpha_dropout feature_dropout"
_REORDERING = "contiguous reshape flatten permute transpose movedim view unflatten channel_shuffle"
_COMPUTING = """
relu relu_ relu6 hardtanh hardtanh_ hardswish hardsigmoid silu mish sigmoid sigmoid_ tanh tanh_ gelu elu selu celu softplus prelu
leaky_relu leaky_relu_ threshold clamp clamp_ clip batch_norm instance_norm group_norm layer_norm rms_norm softmax log_softmax
neg abs exp log sqrt rsqrt square pow __pow__ reciprocal masked_fill masked_fill_ round floor ceil sign
add add_ __add__ __radd__ __iadd__ sub sub_ __sub__ __rsub__ __isub__ rsub mul mul_ __mul__ __rmul__ __imul__
div div_ true_divide __truediv__ __itruediv__ __rtruediv__ maximum minimum where addcmul addcdiv lerp __setitem__ copy_
"""
_SELECTING = "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"

KEEPING = frozenset(_KEEPING.split())
"""Calls that give the values they read in the same order, at another place where they are no views."""
POINTWISE = KEEPING | frozenset(_COMPUTING.split())
"""Calls whose result can be written over what they read, element by element or row by row."""
PASSING = frozenset([*_SELECTING.split(), *_REORDERING.split()])
"""Calls that pass on values they read, unchanged: some of them, or, where they are no views, all in another order."""


@dataclass(frozen=True)
class Held:
    """One tensor in memory: its elements per sample, the sites that read it, and what else does.

    ``point``: something that is no site reads it; ``least``: a width it has at least (32 where a skipped layer reads it).
    """

    elements: int
    sites: tuple[str, ...] = ()
    point: bool = False
    least: int = 0


@dataclass(frozen=True)
class Step:
    """What is held while one call runs: places in `Lifetimes.tensors`."""

    name: str
    held: tuple[int, ...]


@dataclass(frozen=True)
class Lifetimes:
    """The tensors that a network holds, and which of them at each step."""

    tensors: tuple[Held, ...] = ()
    steps: tuple[Step, ...] = ()

    def renamed(self, names: Mapping[str, str]) -> Lifetimes:
        """Return the same with sites under other names: those that were tied under that of their group."""
        tensors = (replace(t, sites=tuple(dict.fromkeys(names[site] for site in t.sites if site in names))) for t in self.tensors)
        return Lifetimes(tuple(tensors), self.steps)


@dataclass
class _Value:
    """A tensor as it grows: where it is born and which steps read it."""

    elements: int
    born: int
    least: int = 0
    readers: list[int] = field(default_factory=list)
    sites: dict[str, None] = field(default_factory=dict)
    point: bool = False
    through: list[_Value] = field(default_factory=list)  # passed on, unchanged, into these
    merged: _Value | None = None  # written over at once by this one

    @property
    def end(self) -> int:
        return max([self.born, *self.readers])


@dataclass
class _Event:
    name: str
    kind: str  # "point", "pointwise" or "passing"
    read: list[_Value]
    made: list[_Value]
    sites: dict[int, list[str]]  # readers of each value, by its id
    floats: set[int]


class Tape:
    """Notes what each call reads and makes. ``batch`` is what element counts are divided by, rounded up."""

    def __init__(self, batch: int):
        self.batch = batch
        self._of_storage: dict[int, _Value] = {}
        self._events: list[_Event] = []
        self._sites: list[tuple[str, Tensor]] = []
        self._floats: list[Tensor] = []

    def read_by(self, site: str, tensors: Iterable[Tensor]) -> None:
        """Say that the call being observed reads these for a site."""
        self._sites += [(site, tensor) for tensor in tensors]

    def read_in_float(self, tensors: Iterable[Tensor]) -> None:
        """Say that the call being observed reads these for a layer that was skipped."""
        self._floats += tensors

    def note(self, func: Any, where: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Note one call; tensors that are no activations are left out by the caller."""
        sites, floats, self._sites, self._floats = self._sites, self._floats, [], []
        if not outputs:
            return  # reads a shape, or a number
        name = str(getattr(func, "__name__", func))
        before = {_storage(x): self._value(x) for x in inputs}
        in_place = name in POINTWISE and name not in KEEPING
        fresh = {_storage(x): x for x in outputs if _storage(x) not in before or in_place}
        if not fresh:
            return  # a view
        for storage, tensor in fresh.items():
            self._of_storage[storage] = self._new(tensor)
        kind = "pointwise" if name in POINTWISE else "passing" if name in PASSING else "point"
        by_value: dict[int, list[str]] = {}
        for site, tensor in sites:
            if _storage(tensor) in before:
                by_value.setdefault(id(before[_storage(tensor)]), []).append(site)
        in_float = {id(before[_storage(x)]) for x in floats if _storage(x) in before}
        made = [self._of_storage[storage] for storage in fresh]
        self._events.append(_Event(f"{where}: {name}" if where else name, kind, list(before.values()), made, by_value, in_float))

    def _new(self, tensor: Tensor) -> _Value:
        return _Value(-(-tensor.numel() // self.batch), len(self._events), _least(tensor))

    def _value(self, tensor: Tensor) -> _Value:
        """Return the value in a tensor's memory; one never seen before is born where it is first read."""
        storage = _storage(tensor)
        if storage not in self._of_storage:
            self._of_storage[storage] = self._new(tensor)
        return self._of_storage[storage]

    def start(self, inputs: Any) -> None:
        """Take the model's inputs, which are held from the first step on."""
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor) and tensor.numel():
                self._value(tensor).born = 0

    def finish(self, outputs: Any) -> Lifetimes:
        """Take the model's outputs, which are held to the end, and return what was seen."""
        results = [self._of_storage[_storage(x)] for x in tree_leaves(outputs) if isinstance(x, Tensor) and _storage(x) in self._of_storage]
        last = len(self._events)
        for step, event in enumerate(self._events):
            for value in event.read:
                value.readers.append(step)
        for value in results:
            value.readers.append(last)
            value.point = True
        overwritten = [self._settle(step, event) for step, event in enumerate(self._events)]
        return _collect(self._events, overwritten)

    @staticmethod
    def _settle(step: int, event: _Event) -> _Value | None:
        """Give the read tensors their readers; return the one that an element-wise call writes over, if any."""
        over = None
        if event.kind == "pointwise" and len(event.made) == 1:
            dying = [v for v in event.read if v.end == step and v.elements == event.made[0].elements]
            over = dying[0] if dying else None
        for value in event.read:
            sites = event.sites.get(id(value), [])
            value.sites.update(dict.fromkeys(sites))
            if id(value) in event.floats:
                value.least = FLOAT
            if over is value and len(event.read) == 1 and value.readers == [step]:
                value.merged = event.made[0]
            elif event.kind == "passing":
                value.through += event.made
            elif not sites and id(value) not in event.floats:
                value.point = True
        return over


def _collect(events: Sequence[_Event], overwritten: Sequence[_Value | None]) -> Lifetimes:
    values = list({id(v): v for event in events for v in (*event.read, *event.made)}.values())
    final = {id(v): _final(v) for v in values}
    held, span = list({id(v): v for v in final.values()}.values()), dict[int, int]()
    for value in values:
        kept = id(final[id(value)])
        span[kept] = min(span.get(kept, value.born), value.born)
    place = {id(v): i for i, v in enumerate(held)}
    steps = []
    for step, (event, over) in enumerate(zip(events, overwritten, strict=True)):
        if over is not None and over.merged is not None:
            continue
        gone = None if over is None else place[id(final[id(over)])]
        live = tuple(i for i, v in enumerate(held) if span[id(v)] <= step <= v.end and i != gone)
        steps.append(Step(event.name, live))
    return Lifetimes(tuple(_held(v) for v in held), _largest(steps))


def _final(value: _Value) -> _Value:
    while value.merged is not None:
        value = value.merged
    return value


def _held(value: _Value) -> Held:
    """Return a value with all that reads it, through what passes it on too."""
    sites, point, least, todo = dict(value.sites), value.point, value.least, list(value.through)
    while todo:
        reader = _final(todo.pop())
        sites.update(reader.sites)
        point, least = point or reader.point, max(least, reader.least)
        todo += reader.through
    return Held(value.elements, tuple(sites), point or not (sites or least), least)


def _largest(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Drop the steps that hold nothing that another one does not hold as well; of equal ones the first."""
    kept: list[Step] = []
    for step in sorted(steps, key=lambda step: -len(step.held)):
        if not any(set(step.held) <= set(other.held) for other in kept):
            kept.append(step)
    return tuple(step for step in steps if step in kept)


def _storage(tensor: Tensor) -> int:
    """Return what is the same for all tensors that share memory, as long as one of them lives."""
    return int(tensor.untyped_storage()._cdata)


def _least(tensor: Tensor) -> int:
    """Return the width of what is no floating-point number; 0 for what a policy decides on."""
    return 0 if tensor.is_floating_point() else 8 * tensor.element_size()


def activations(values: Any, constant: Any) -> list[Tensor]:
    """Return the tensors in some arguments or results that are activations: not empty, and not among the constants."""
    found = [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.numel() and x not in constant]
    return [x for x in found if x.layout == torch.strided]
