"""Points: tensors that a deployment target needs on a grid though no layer's width decides about them.

An integer runtime adds, joins and pools integers only where all that goes in and comes out is on a grid; a tensor that is not
makes its neighbours fall back to float. A point is a fixed-width quantizer (8 bit) at the call that makes such a tensor. Points
are in the network while it is fine-tuned, so that what is trained is what runs; they are no decision and no part of a policy.

A tensor gets a point where

- an addition of two activations (``add``), a concatenation (``concat``) or an average (``pool``) reads it, or
- two layers or more read it through quantizers of their own (``shared``): integers have one grid at a time.

What only moves values (reshaping, slicing, padding with zeros, max-pooling) passes a grid on: the tensor it began with gets the point.
A layer whose input has 8 bits and comes from a point uses the point's grid instead of one of its own.

The network's own forward runs under a mode of `torch.overrides` that counts the calls that make new values; a compiled training
step runs it eagerly.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bitwright.errors import BitwrightError, nearest
from bitwright.quant.calibration import Rule
from bitwright.quant.functional_calls import ProductCall, WeightCall
from bitwright.quant.modules import QuantLayer, evaluating
from bitwright.quant.quantizers import ActivationQuantizer, LSQActivation

PointKind = Literal["add", "concat", "pool", "shared"]
KINDS: tuple[PointKind, ...] = ("add", "concat", "pool", "shared")
HELD = "quantized_points"
"""Name under which a network holds its points."""
WIDTH = 8
"""Bits of every point."""
ENTRY = -1
"""Number of the tensor that enters the network."""

_JOINS: dict[str, PointKind] = {
    **dict.fromkeys(("add", "add_"), "add"),
    **dict.fromkeys(("cat", "concat", "concatenate"), "concat"),
    **dict.fromkeys(("mean", "avg_pool1d", "avg_pool2d", "avg_pool3d"), "pool"),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), "pool"),
}
_MOVES = """view reshape flatten unflatten permute transpose transpose_ t contiguous clone dropout max_pool1d max_pool2d max_pool3d
__getitem__ squeeze unsqueeze chunk split unbind expand narrow select movedim swapaxes channel_shuffle repeat"""
_MAKES = """relu relu_ relu6 hardtanh hardtanh_ clamp clamp_ clip leaky_relu elu gelu silu hardswish hardsigmoid sigmoid tanh softmax
sub sub_ mul mul_ div div_ sum batch_norm layer_norm group_norm instance_norm interpolate conv1d conv2d conv3d linear matmul bmm
conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention stack"""
_MOVING, _MAKING = frozenset(_MOVES.split()), frozenset([*_MAKES.split(), *_JOINS])


class OnPoint(ActivationQuantizer):
    """Input quantizer of a layer that reads a point's tensor: its values are on that grid already."""

    def __init__(self, point: LSQActivation):
        super().__init__(WIDTH)
        self.held = (point,)  # in a tuple: the point belongs to the network, not to this module

    @property
    def point(self) -> LSQActivation:
        """The point."""
        return self.held[0]

    @property
    def signed(self) -> bool:
        """Whether the grid has negative levels."""
        return self.point.signed

    @property
    def codes(self) -> tuple[int, int]:
        """The lowest and the highest level, in steps."""
        return self.point.codes

    def calibrate(self, x: Tensor) -> None:
        """Do nothing: the point is calibrated."""

    def step(self) -> Tensor:
        """Return the point's step."""
        return self.point.step()

    def forward(self, x: Tensor) -> Tensor:
        """Return the values."""
        return x


class PointOwner(nn.Module):
    """A network with points; its class is made by `_owner_class`."""

    quantized_points: nn.ModuleDict

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (type(self).__bases__[1],), self.__getstate__()  # type: ignore[no-untyped-call]


@functools.cache
def _owner_class(base: Any) -> type[PointOwner]:
    """Return the subclass of a network's class that runs its points."""

    @functools.wraps(base.forward)
    def forward(self: PointOwner, *args: Any, **kwargs: Any) -> Any:
        places = {int(name): cast(LSQActivation, point) for name, point in self.quantized_points.items()}
        if ENTRY in places:
            args = (places[ENTRY](args[0]), *args[1:])
        with _Placer(places, self.__dict__["point_calls"]):
            if base.forward is nn.Sequential.forward:  # it would run its points as a layer
                for module in (module for name, module in self._modules.items() if name != HELD):
                    args = (cast(nn.Module, module)(*args),)
                return args[0]
            return base.forward(self, *args, **kwargs)

    content = {"forward": torch.compiler.disable(forward), "__doc__": base.__doc__, "__module__": base.__module__}  # type: ignore[no-untyped-call]
    return type(f"Pointed{base.__name__}", (PointOwner, base), content)


def _blank(base: Any) -> PointOwner:
    """Return an empty owner for a copy to fill."""
    made = _owner_class(base)
    return made.__new__(made)


class _Counter(TorchFunctionMode):
    """Numbers, along one forward, the calls and layers that make new values; what runs inside a quantized layer is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.inside, self.thread = 0, 0, threading.get_ident()

    def __enter__(self) -> _Counter:
        self.handles = (register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() == self.thread and isinstance(module, (QuantLayer, ProductCall, ActivationQuantizer)):
            if not self.inside:
                self.reads(module, args)
            self.inside += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != self.thread or not isinstance(module, (QuantLayer, ProductCall, ActivationQuantizer)):
            return None
        self.inside -= 1
        if self.inside:
            return None
        if isinstance(module, QuantLayer) and not isinstance(module, WeightCall) and isinstance(output, Tensor):
            return self._next("layer", (args,), output)
        return self.passes(args, output)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.inside:
            return out
        name = getattr(func, "__name__", "")
        if name in _MAKING and isinstance(out, Tensor) and out.is_floating_point() and out.dim() > 1:
            return self._next(name, (args, kwargs), out)
        moved = name in _MOVING or (name == "pad" and not _filled(args, kwargs or {}))
        return self.passes((args, kwargs), out) if moved else out

    def _next(self, name: str, inputs: Any, out: Tensor) -> Tensor:
        self.made += 1
        return self.makes(self.made - 1, name, inputs, out)

    def reads(self, module: nn.Module, args: Any) -> None:
        """Note that a layer or a product is given tensors."""

    def makes(self, number: int, name: str, inputs: Any, out: Tensor) -> Tensor:
        """Take part in a call that makes new values."""
        return out

    def passes(self, inputs: Any, out: Any) -> Any:
        """Take part in a call that moves values."""
        return out


def _filled(args: Any, kwargs: Any) -> bool:
    """Return whether padding fills with another value than zero."""
    return bool(kwargs.get("value", args[3] if len(args) > 3 else 0))


class _Placer(_Counter):
    """Puts results on the grids of their points."""

    def __init__(self, places: dict[int, LSQActivation], calls: dict[int, str]):
        super().__init__()
        self.places, self.calls = places, calls

    def makes(self, number: int, name: str, inputs: Any, out: Tensor) -> Tensor:
        """Return the result on its point's grid, if it has one."""
        if number not in self.places:
            return out
        if self.calls[number] != name:
            found = f"call {number} is '{name}' and was '{self.calls[number]}' when the network was quantized"
            raise BitwrightError(f"points: {found}; a network with points must make the same calls each time, so leave points out")
        result: Tensor = self.places[number](out)
        return result


@dataclass
class _Reader:
    """Who reads a tensor: quantized inputs, joins, and whether a float layer or function does."""

    layers: list[QuantLayer] = field(default_factory=list)
    quantizers: int = 0
    joins: list[PointKind] = field(default_factory=list)


class _Observer(_Counter):
    """Follows which call made each tensor, and who reads it."""

    def __init__(self, entry: Tensor):
        super().__init__()
        self.names: dict[int, str] = {}
        self.source: dict[int, int] = {id(entry): ENTRY}
        self.readers: dict[int, _Reader] = {}
        self.alive: list[object] = [entry]

    def _sources(self, inputs: Any) -> list[int]:
        return [self.source[id(x)] for x in tree_leaves(inputs) if isinstance(x, Tensor) and id(x) in self.source]

    def reads(self, module: nn.Module, args: Any) -> None:
        for number in dict.fromkeys(self._sources(args)):
            reader = self.readers.setdefault(number, _Reader())
            if isinstance(module, QuantLayer) and module.input_quantizer is not None:
                reader.quantizers += 1
                reader.layers.append(module)
            elif isinstance(module, ProductCall):
                reader.quantizers += 1

    def makes(self, number: int, name: str, inputs: Any, out: Tensor) -> Tensor:
        self.names[number] = name
        sources = self._sources(inputs) if name != "layer" else []
        tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() > 1]
        join = _JOINS.get(name)
        if join is not None and len(sources) == len(tensors) and (join != "add" or len(sources) == 2):
            for source in sources:
                self.readers.setdefault(source, _Reader()).joins.append(join)
        self.source[id(out)] = number
        self.alive.append(out)
        return out

    def passes(self, inputs: Any, out: Any) -> Any:
        sources = self._sources(inputs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and sources:
                self.source[id(x)] = sources[0]
                self.alive.append(x)
        return out

    def wanted(self, kinds: Sequence[PointKind]) -> list[int]:
        """Return the numbers of the tensors that need a point."""
        return sorted(
            number
            for number, reader in self.readers.items()
            if any(join in kinds for join in reader.joins) or ("shared" in kinds and reader.quantizers > 1)
        )


def check_kinds(kinds: Sequence[str]) -> tuple[PointKind, ...]:
    """Return the kinds of points in order; raises `BitwrightError` for one that is unknown.

    >>> check_kinds(["pool", "add"])
    ('add', 'pool')
    """
    for kind in kinds:
        if kind not in KINDS:
            raise BitwrightError(f"points: no kind '{kind}'; {nearest(kind, KINDS)}")
    return tuple(kind for kind in KINDS if kind in kinds)


def add_points(model: nn.Module, kinds: Sequence[str], images: Tensor | None, *, rule: Rule = "mse", power_of_two: bool = False) -> None:
    """Give a quantized network the points it needs, calibrated on images, in place; none where no activation is quantized.

    Raises:
        BitwrightError: a kind is unknown, or there are no images.
    """
    asked = check_kinds(kinds)
    if not asked or not any(isinstance(module, ActivationQuantizer) for module in model.modules()):
        return
    if images is None:
        raise BitwrightError("points need calibration=; give a batch of inputs or a split")
    entry = images[:2].clone()
    observer = _Observer(entry)
    with torch.no_grad(), evaluating(model), observer:
        model(entry)
    places = {number: LSQActivation(WIDTH, rule=rule, power_of_two=power_of_two).to(images.device) for number in observer.wanted(asked)}
    if not places:
        return
    _calibrate(model, places, observer.names, images)
    for number, point in places.items():
        for layer in observer.readers[number].layers:
            # a weaker input keeps its own grid, and one that two tensors enter keeps it too
            several = sum(layer in reader.layers for reader in observer.readers.values()) > 1
            if layer.bits.a == WIDTH and not several and isinstance(layer.input_quantizer, LSQActivation):
                layer.input_quantizer = OnPoint(point).to(images.device)
    kind: Any = type(model)
    model.__class__ = _owner_class(kind)
    owner = cast(PointOwner, model)
    owner.__dict__["point_calls"] = {number: observer.names.get(number, "") for number in places}
    owner.quantized_points = nn.ModuleDict({str(number): point for number, point in places.items()}).train(model.training)


def _calibrate(model: nn.Module, places: dict[int, LSQActivation], names: dict[int, str], images: Tensor) -> None:
    """Calibrate each point on what reaches it while the points before it are at work."""

    def see(point: nn.Module, args: tuple[Tensor, ...]) -> None:
        cast(LSQActivation, point).calibrate(args[0])

    handles = [point.register_forward_pre_hook(see) for point in places.values()]
    try:
        with torch.no_grad(), evaluating(model):
            entry = places[ENTRY](images) if ENTRY in places else images
            with _Placer(places, names):
                model(entry)
    finally:
        for handle in handles:
            handle.remove()


def named_points(model: nn.Module) -> Iterator[tuple[str, LSQActivation]]:
    """Yield each point with its name, ``point:N:call``."""
    if isinstance(model, PointOwner):
        for number, point in model.quantized_points.items():
            yield f"point:{number}:{model.__dict__['point_calls'][int(number)] or 'input'}", cast(LSQActivation, point)
