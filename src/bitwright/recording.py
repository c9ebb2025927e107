"""The recorder of `trace`: follows one run of a model and notes each product of a weight or an activation with an activation."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from bitwright.calls import UNSUPPORTED, Call, Function, read_call, slots
from bitwright.errors import SiteError, nearest
from bitwright.lifetimes import Tape, activations

_Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


class Skips:
    """The skip patterns, resolved to canonical module paths; remembers which patterns matched."""

    def __init__(self, model: nn.Module, patterns: tuple[str, ...]):
        self.patterns = patterns
        canonical = {id(module): path for path, module in model.named_modules()}
        self.known = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
        self.known += [path for path, _ in model.named_parameters(remove_duplicate=False)]
        self.paths = {canonical[id(m)] for path, m in model.named_modules(remove_duplicate=False) if path and self._match(path)}

    def _match(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)

    def covers(self, path: str, *names: str) -> bool:
        """Whether one of the names is skipped, or the module at ``path`` or one above it."""
        return any(self._match(name) for name in names) or any(above in self.paths for above in _above(path))

    def check_all_used(self, found: Iterable[str]) -> None:
        """Raise `SiteError` for a pattern that matched no module and none of the names ``found`` in the run."""
        names = [*self.known, *found]
        for pattern in self.patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise SiteError(f"skip='{pattern}' matches no module and no site; {nearest(pattern, names)}")


def _above(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


@dataclass
class _Frame:
    """A module's forward that is running, and how many functional calls it has made."""

    module: nn.Module
    path: str
    calls: int = 0


@dataclass
class Entry:
    """A site as it grows over the calls of the run; counts are of the whole batch."""

    name: str
    call: Call
    weight: Tensor | None
    layers: list[str] = field(default_factory=list)
    calls: int = 0
    macs: int = 0
    acts: int = 0

    @property
    def axis(self) -> int:
        """The output-channel axis of the weight; 0 where there is none."""
        return 0 if self.weight is None else _axis(self.call, self.weight)


class Recorder(TorchFunctionMode):
    """Watches the run: which module is running, what each call multiplies, which tensors come from parameters alone."""

    def __init__(self, model: nn.Module, skips: Skips, batch: int):
        self.model, self.skips, self.batch = model, skips, max(batch, 1)
        self.parameter_paths = {id(p): path for path, p in model.named_parameters()}
        self.names = _names(model)
        self.entries: dict[object, Entry] = {}
        self.skipped: dict[str, None] = {}
        self.found: list[str] = []
        self.stack: list[_Frame] = []
        self.tape = Tape(self.batch)
        # Tensors made of parameters and buffers only: True where a parameter is among them.
        self.constant = WeakTensorKeyDictionary()
        for parameter in model.parameters():
            self.constant[parameter] = True
        for buffer in model.buffers():
            self.constant[buffer] = False

    def watch(self, stack: ExitStack) -> None:
        """Follow every module's forward; ``stack`` takes the hooks off again."""
        for path, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue

            def enter(module: nn.Module, args: Any, path: str = path) -> None:
                self.stack.append(_Frame(module, path))

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                self.stack.pop()

            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)

    def __torch_function__(self, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.stack:  # before and after the root's forward nothing belongs to the model
            self._observe(func, args, kwargs, out)
        self._follow(func, args, kwargs, out)
        if self.stack:
            written = args[0] if getattr(func, "__name__", "") == "__setitem__" else out
            self.tape.note(func, self.stack[-1].path, activations((args, kwargs), self.constant), activations(written, self.constant))
        return out

    def _follow(self, func: Function, args: Any, kwargs: Any, out: Any) -> None:
        """Note which results are constant, and forget those that an activation was written into."""
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        constant = bool(inputs) and all(x in self.constant for x in inputs)
        name = getattr(func, "__name__", "")
        written = [out] if name != "__setitem__" else [args[0]]
        for tensor in tree_leaves(written):
            if not isinstance(tensor, Tensor) or isinstance(tensor, nn.Parameter):
                continue
            if constant:
                self.constant[tensor] = any(self.constant[x] for x in inputs)
            elif tensor in self.constant:
                del self.constant[tensor]

    def _observe(self, func: Function, args: Any, kwargs: Any, out: Any) -> None:
        frame = self.stack[-1]
        if func is F.multi_head_attention_forward and isinstance(frame.module, nn.MultiheadAttention):
            self._multihead(frame, args, kwargs)
            return
        address = f"{frame.path}#{frame.calls}"
        if func in UNSUPPORTED or _is_foreign(func, args, kwargs):
            what = UNSUPPORTED.get(func, f"the operator {func}")
            self._refuse(frame, address, f"runs {what}, which cannot be quantized")
        elif slots(func):
            if any(isinstance(x, Tensor) and torch._C._functorch.is_batchedtensor(x) for x in tree_leaves(out)):
                self._refuse(frame, address, f"runs {func.__name__} under vmap, which hides the batch")
            try:
                calls = read_call(func, args, kwargs, out)
            except SiteError as error:
                self._refuse(frame, address, f"runs {error}")
                calls = ()
            for k, call in enumerate(calls, frame.calls):
                self._record(frame, call, f"{frame.path}#{k}")
        frame.calls += slots(func)

    def _refuse(self, frame: _Frame, address: str, found: str) -> None:
        name = frame.path or address
        if not self._skip(frame, name):
            raise SiteError(f"trace: {_where(frame)} {found}; skip=['{name}'] leaves it in float")

    def _record(self, frame: _Frame, call: Call, address: str) -> None:
        left, right = call.operands
        if call.role != "second" and left in self.constant and right in self.constant:
            return  # arithmetic on parameters and buffers alone, such as a table of positions
        weight = self._weight(call)
        if weight is None:
            if self._skip(frame, address):
                self.tape.read_in_float(call.operands)
                return
            self._check_product(frame, call, frame.path or address)
            self.tape.read_by(address, call.operands)
            self._add(address, address, call, None, left.numel() + right.numel())
            return
        own = _runs_own_forward(frame.module) and weight is frame.module.weight
        name, address = (frame.path, frame.path) if own else (self.names[id(weight)], address)
        inputs = right if weight is left else left
        if self._skip(frame, name, self.parameter_paths[id(weight)]):
            self.tape.read_in_float([inputs])
            return
        self.tape.read_by(name, [inputs])
        self._add(name, address, call, weight, inputs.numel())

    def _weight(self, call: Call) -> Tensor | None:
        candidates = {"second": call.operands[1:], "either": call.operands, "none": ()}[call.role]
        return next((x for x in candidates if id(x) in self.names), None)

    def _check_product(self, frame: _Frame, call: Call, name: str) -> None:
        """Refuse what looks like a product of activations but holds a weight that is no parameter itself."""
        right = call.operands[1]
        derived = any(x in self.constant and self.constant[x] for x in (call.operands if call.role == "either" else (right,)))
        if call.role == "second":
            found = "computed from parameters (parametrized, normalised, transposed, …)" if derived else "no parameter of the model"
            ask = "remove the parametrization" if derived else "make it an nn.Parameter"
            raise SiteError(f"trace: in {_where(frame)}: the weight of {call.kind} is {found}; {ask}, or skip=['{name}']")
        if call.role == "either" and derived:
            raise SiteError(
                f"trace: in {_where(frame)}: a matmul operand is computed from parameters (transposed, expanded, …); "
                f"use the parameter itself, as in F.linear(x, weight), or skip=['{name}']"
            )

    def _add(self, name: str, address: str, call: Call, weight: Tensor | None, acts: int) -> None:
        entry = self.entries.setdefault(id(weight) if weight is not None else address, Entry(name, call, weight))
        if weight is not None and entry.axis != _axis(call, weight):
            both = f"{entry.layers[0]} and {address}"
            raise SiteError(f"trace: weight '{name}' is used along two axes, by {both}; untie it, or skip=['{name}']")
        if address not in entry.layers:
            entry.layers.append(address)
        entry.calls += 1
        entry.macs += call.macs
        entry.acts += acts

    def _skip(self, frame: _Frame, *names: str) -> bool:
        """Whether a would-be site is skipped; the first name is what `Trace.skipped` shows."""
        self.found.extend(names)
        covered = self.skips.covers(frame.path, *names)
        if covered:
            self.skipped.setdefault(names[0])
        return covered

    def _multihead(self, frame: _Frame, args: Any, kwargs: Any) -> None:
        """Read `nn.MultiheadAttention` from its arguments: nothing can be intercepted inside it."""
        bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
        bound.apply_defaults()
        given, path = bound.arguments, frame.path
        query, key, value = given["query"], given["key"], given["value"]
        if given["use_separate_proj_weight"]:
            own = zip("qkv", (query, key, value), strict=True)
            inputs: list[tuple[tuple[Tensor, ...], Tensor]] = [((x,), given[f"{name}_proj_weight"]) for name, x in own]
        else:
            inputs = [((query, key, value), given["in_proj_weight"])]
        width = query.shape[-1]
        for k, (xs, weight) in enumerate(inputs):
            distinct = {id(x): x.numel() for x in xs}
            self._projection(frame, f"{path}#{k}", weight, sum(x.numel() for x in xs) * width, sum(distinct.values()), xs)
        tokens = key.shape[0] + (given["bias_k"] is not None) + bool(given["add_zero_attn"])
        keys = key.numel() // key.shape[-1] // key.shape[0] * tokens * width
        scores = query.numel() // width * given["num_heads"] * tokens
        for suffix, acts in (("qk", query.numel() + keys), ("av", scores + keys)):
            if not self._skip(frame, f"{path}#{suffix}"):
                self._add(f"{path}#{suffix}", f"{path}#{suffix}", Call("matmul", (query, key), query.numel() * tokens, (0, 0)), None, acts)
        self._projection(frame, f"{path}.out_proj", given["out_proj_weight"], query.numel() * width, query.numel())

    def _projection(self, frame: _Frame, address: str, weight: Tensor, macs: int, acts: int, seen: Iterable[Tensor] = ()) -> None:
        if id(weight) not in self.names:
            if not self._skip(frame, address):
                ask = f"remove its parametrization, or skip=['{frame.path}']"
                raise SiteError(f"trace: in {_where(frame)}: the weight of {address} is no parameter of the model; {ask}")
            return
        name = self.names[id(weight)]
        if self._skip(frame, name):
            self.tape.read_in_float(seen)
        else:
            self.tape.read_by(name, seen)
            self._add(name, address, Call("linear", (weight, weight), macs, (0, 0), "second"), weight, acts)


def _axis(call: Call, weight: Tensor) -> int:
    return call.axes[0 if call.operands[0] is weight else 1]


def _where(frame: _Frame) -> str:
    kind = type(frame.module).__name__
    return f"{kind} '{frame.path}'" if frame.path else f"the model ({kind})"


def _is_foreign(func: Function, args: Any, kwargs: Any) -> bool:
    """Whether this is an operator of another library that is given a weight (two axes or more)."""
    if not isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return False
    return any(isinstance(x, nn.Parameter) and x.dim() > 1 for x in tree_leaves((args, kwargs)))


def _runs_own_forward(module: nn.Module) -> TypeGuard[_Layer]:
    """Whether the module is a stock layer: a subclass with a forward of its own is quantized call by call."""
    for layer in LAYERS:
        if isinstance(module, layer):
            own = type(module)
            inner = [getattr(kind, "_conv_forward", None) for kind in (own, layer)]
            return own.forward is layer.forward and inner[0] is inner[1]
    return False


def _names(model: nn.Module) -> dict[int, str]:
    """Site name of every parameter: its layer's path where it is the layer's weight, else its own path."""
    names = {id(p): path for path, p in model.named_parameters()}
    for path, module in reversed(list(model.named_modules())):
        if isinstance(module, LAYERS) and isinstance(module.weight, nn.Parameter):
            names[id(module.weight)] = path
    return names
