"""Quantized functional calls: what a module computes in its own forward, without a layer of its own.

The module that makes the calls, their *owner*, gets a subclass of its class. While its forward runs, a mode of
`torch.overrides` numbers the calls as `bitwright.sites.trace` does (`bitwright.calls.slots`) and passes the operands of the
k-th through the module ``owner.quantized_calls[k]``: a `WeightCall` for a call with a weight, a `ProductCall` for a product of
two activations. Parameters and attributes of the owner keep their names, so that a float state dict loads into it.

Calls that a module makes in the forward of a child belong to the child. Calls that are made again outside the forward, as by
`torch.utils.checkpoint` within it, are not seen; checkpoint the whole owner instead.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from bitwright.calls import _PRODUCTS, slots
from bitwright.errors import BitwrightError, SiteError
from bitwright.policy import Bits
from bitwright.quant.attention import Quantize, multihead, scaled_dot_product
from bitwright.quant.calibration import is_signed
from bitwright.quant.functional import UNTOUCHED
from bitwright.quant.modules import CALLS, Op, QuantLayer, call_address, evaluating, named_quant_layers
from bitwright.quant.quantizers import ActivationQuantizer, WeightQuantizer, activation_quantizer, weight_quantizer

if TYPE_CHECKING:
    from bitwright.quant.convert import QuantOptions
    from bitwright.sites import Site

Operands = tuple[Tensor, ...]


class WeightCall(QuantLayer):
    """Quantizes the weight and the input of one functional call.

    Its ``weight`` is the owner's parameter itself; the state dict has it under the owner's name alone.

    Args:
        address: ``owner#k``, for messages.
        axis: output-channel axis of the weight.
        weight: the parameter that the call is made with.
        bits: the widths.
        weight_quantizer: as in `QuantLayer`.
        input_quantizer: as in `QuantLayer`.
    """

    def __init__(
        self,
        address: str,
        axis: int,
        weight: nn.Parameter,
        bits: Bits,
        weight_quantizer: WeightQuantizer | None,
        input_quantizer: ActivationQuantizer | None,
    ):
        super().__init__(Op("call", axis=axis), weight, None, bits, weight_quantizer, input_quantizer)
        self.address = address

    def forward(self, *operands: Tensor) -> Operands:  # type: ignore[override]
        """Return the operands quantized: the weight is known by identity, all else is input."""
        if not any(x is self.weight for x in operands):
            found = "is made with another weight, or is another call, than when it was quantized"
            raise BitwrightError(f"quantized call '{self.address}' {found}; quantize the model anew, or name the site in skip=")
        done = {id(self.weight): self.quantized_weight()}
        for x in operands:
            if id(x) not in done:
                done[id(x)] = x if self.input_quantizer is None else self.input_quantizer(x)
        return tuple(done[id(x)] for x in operands)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "weight"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict({**state_dict, prefix + "weight": self.weight.detach()}, prefix, *rest)


class ProductCall(nn.Module):
    """Quantizes the two operands of a product of activations, each on a grid of its own.

    Args:
        bits: the widths; only that of activations is used.
        left_quantizer: for the first operand.
        right_quantizer: for the second operand.
    """

    def __init__(self, bits: Bits, left_quantizer: ActivationQuantizer, right_quantizer: ActivationQuantizer):
        super().__init__()
        self.bits, self.left_quantizer, self.right_quantizer = bits, left_quantizer, right_quantizer

    def forward(self, left: Tensor, right: Tensor) -> Operands:
        """Return both operands on their grids."""
        return self.left_quantizer(left), self.right_quantizer(right)

    def extra_repr(self) -> str:
        """Return the widths."""
        return f"{self.bits!r}"


class _Probe(nn.Module):
    """Holds the place of a call's quantizers: changes nothing, and notes the operands when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Operands] | None = None

    def forward(self, *operands: Tensor) -> Operands:
        """Return the operands."""
        if self.seen is not None:
            copies = {id(x): x if isinstance(x, nn.Parameter) else x.detach().clone() for x in operands}
            self.seen.append(tuple(copies[id(x)] for x in operands))
        return operands


class CallOwner(nn.Module):
    """A module some of whose functional calls are quantized; its class is made by `own_calls`."""

    quantized_calls: nn.ModuleDict

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (type(self).__bases__[1],), self.__getstate__()  # type: ignore[no-untyped-call]


@functools.cache
def _owner_class(base: Any) -> type[CallOwner]:
    """Return the subclass of a module's class that quantizes calls while its forward runs."""

    @functools.wraps(base.forward)
    def forward(self: CallOwner, *args: Any, **kwargs: Any) -> Any:
        with _Interceptor(self):
            return base.forward(self, *args, **kwargs)

    # The mode counts calls as they are made: a compiled forward would make others, or none.
    content = {"forward": torch.compiler.disable(forward), "__doc__": base.__doc__, "__module__": base.__module__}  # type: ignore[no-untyped-call]
    return type(f"Quant{base.__name__}", (CallOwner, base), content)


def _blank(base: Any) -> CallOwner:
    """Return an empty owner for a copy or a pickle to fill."""
    made = _owner_class(base)
    return made.__new__(made)


def own_calls(module: nn.Module, path: str) -> CallOwner:
    """Make a module the owner of quantized calls, in place; there are none yet.

    Raises:
        SiteError: the module is a container that runs all its children, or its forward is not its class's.
    """
    if isinstance(module, CallOwner):
        return module
    kind: Any = type(module)
    where = f"{kind.__name__} '{path}'"
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        ask = "make it a plain nn.Module, or name it in skip="
        raise SiteError(f"quantize: {where} makes functional calls and runs all its children; {ask}")
    if "forward" in vars(module):
        raise SiteError(f"quantize: the forward of {where} was replaced on the instance; define it in the class, or name it in skip=")
    module.__class__ = _owner_class(kind)
    owner = cast(CallOwner, module)
    owner.quantized_calls = nn.ModuleDict()
    return owner


class _Interceptor(TorchFunctionMode):
    """Runs along one forward of an owner: numbers the calls it makes itself and changes their operands."""

    def __init__(self, owner: CallOwner):
        super().__init__()
        self.owner, self.made, self.inside, self.thread = owner, 0, 0, threading.get_ident()

    def __enter__(self) -> _Interceptor:
        # Hooks on all modules, for the time of this forward: what runs in another module's forward is not the owner's.
        enter, leave = functools.partial(self._step, 1), functools.partial(self._step, -1)
        self.handles = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()

    def _step(self, by: int, *_: Any) -> None:
        if threading.get_ident() == self.thread:
            self.inside += by

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        calls = dict(self.owner.quantized_calls.items())
        if func is F.multi_head_attention_forward and isinstance(self.owner, nn.MultiheadAttention):
            return multihead(self.owner, calls, args, kwargs)
        taken = slots(func)
        wanted = [calls.get(str(k)) for k in range(self.made, self.made + taken)]
        self.made += taken
        if func is F.scaled_dot_product_attention:
            return scaled_dot_product(func, args, kwargs, wanted[0], wanted[1])
        if wanted and wanted[0] is not None:
            args, kwargs = _with_operands(func, args, kwargs, wanted[0])
        return func(*args, **kwargs)


def _with_operands(func: Callable[..., Any], args: Any, kwargs: Any, change: Quantize) -> tuple[Any, Any]:
    """Return the arguments of a call with its two operands changed."""
    if func is torch.einsum:
        listed = isinstance(args[1], (list, tuple))
        operands = change(*(args[1] if listed else args[1:]))
        return (args[0], operands) if listed else (args[0], *operands), kwargs
    places = _PRODUCTS.get(func, ((0, ("input",)), (1, ("weight",))))
    keys = [at if at < len(args) else next(name for name in names if name in kwargs) for at, names in places]
    arguments: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
    arguments |= dict(zip(keys, change(*(arguments[key] for key in keys)), strict=True))
    return tuple(arguments[k] for k in range(len(args))), {name: arguments[name] for name in kwargs}


def disable_fast_paths(model: nn.Module) -> None:
    """Make torch's transformer encoders run their layers one by one: the fused kernel would read the float weights."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


@dataclass(frozen=True)
class CallPlan:
    """One call that is to be quantized: where, how, and for which site."""

    address: str
    bits: Bits
    site: Site

    @property
    def place(self) -> tuple[str, str]:
        """The owner's path and the key in its ``quantized_calls``."""
        owner, _, key = self.address.rpartition("#")
        return owner, key

    @property
    def product(self) -> bool:
        """Whether it multiplies two activations."""
        return self.site.operands == 2

    @property
    def observed(self) -> bool:
        """Whether a run must show its operands: for the range of activations, or to tell tied weights apart."""
        return self.bits.a < UNTOUCHED or len(self.site.tensors) > 1


def sites_of_calls(sites: Sequence[Site]) -> dict[str, Site]:
    """Return the site of each functional call; raises `SiteError` for a call that two sites make in turn."""
    found: dict[str, Site] = {}
    for site in sites:
        for address in site.layers:
            if "#" in address and found.setdefault(address, site) is not site:
                names = f"sites '{found[address].name}' and '{site.name}'"
                raise SiteError(f"quantize: call '{address}' is made by {names} in turn; leave them out with trace(..., skip=)")
    return found


def plan_calls(model: nn.Module, widths: Mapping[str, Bits], site_of: Mapping[str, Site]) -> list[CallPlan]:
    """Make the owners of calls in ``widths`` ready, in place, and return the calls; the model computes what it did.

    An `nn.MultiheadAttention` is made ready for its ``out_proj`` too, which it would not run as a module.

    Raises:
        SiteError: the owner of a call is missing or unfit.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    plans = []
    for path, bits in widths.items():
        parent, _, name = path.rpartition(".")
        if "#" not in path:
            if name == "out_proj" and isinstance(modules[parent], nn.MultiheadAttention):
                own_calls(modules[parent], parent)
            continue
        plan = CallPlan(path, bits, site_of[path])
        if plan.place[0] not in modules:
            raise SiteError(f"quantize: the model has no module '{plan.place[0]}', which site '{plan.site.name}' is in; trace this model")
        owner = own_calls(modules[plan.place[0]], plan.place[0])
        if not plan.product or bits.a < UNTOUCHED:
            owner.quantized_calls[plan.place[1]] = _Probe()
            plans.append(plan)
    return plans


def observe_calls(model: nn.Module, plans: Sequence[CallPlan], images: Tensor | None) -> dict[str, list[Operands]]:
    """Return the operands of each call on some inputs, by address; only of calls where they matter.

    Raises:
        BitwrightError: there are no inputs, or a call does not run on them.
    """
    wanted = [plan for plan in plans if plan.observed]
    if not wanted:
        return {}
    if images is None:
        need = "activations below 16 bits need" if any(plan.bits.a < UNTOUCHED for plan in wanted) else "tied functional calls need"
        raise BitwrightError(f"{need} calibration=; give a batch of inputs or a split")
    probes = {plan.address: cast(_Probe, _calls(model, plan)[plan.place[1]]) for plan in wanted}
    for probe in probes.values():
        probe.seen = []
    with torch.no_grad(), evaluating(model):
        model(images)
    seen = {address: probe.seen or [] for address, probe in probes.items()}
    for address, operands in seen.items():
        probes[address].seen = None
        if not operands:
            found = f"call '{address}' did not run on the calibration data"
            raise BitwrightError(f"{found}, so its activations have no range; name it in skip=")
    return seen


def install_calls(model: nn.Module, plans: Sequence[CallPlan], seen: Mapping[str, list[Operands]], options: QuantOptions) -> None:
    """Put quantizers, calibrated on the float operands in ``seen``, at the place of each call."""
    # A weight has one grid: calls share the quantizer of a layer, or of an earlier call, that has the same weight.
    grids = {id(layer.weight): layer for _, layer in named_quant_layers(model)}
    for plan in plans:
        operands, calls = seen.get(plan.address, []), _calls(model, plan)
        if plan.product:
            left, right = (_quantizer(plan, [pair[i] for pair in operands], options) for i in (0, 1))
            call: nn.Module = ProductCall(plan.bits, left, right)
        else:
            weight = _weight(model, plan, operands)
            inputs = None
            if plan.bits.a < UNTOUCHED:
                distinct = [{id(x): x for x in call if x is not weight} for call in operands]
                inputs = _quantizer(plan, [x for call in distinct for x in call.values()], options)
            first = grids.get(id(weight))
            alike = first is not None and first.bits.w == plan.bits.w
            grid = first.weight_quantizer if first is not None and alike else _grid(plan, weight, options)
            call = WeightCall(plan.address, _axis(plan.site, weight), weight, plan.bits, grid, inputs)
            grids.setdefault(id(weight), call)
        calls[plan.place[1]] = call.train(model.get_submodule(plan.place[0]).training)


def _calls(model: nn.Module, plan: CallPlan) -> nn.ModuleDict:
    return cast(CallOwner, model.get_submodule(plan.place[0])).quantized_calls


def _weight(model: nn.Module, plan: CallPlan, operands: Sequence[Operands]) -> nn.Parameter:
    """Return the weight of a call: the one that its site names, or of several tied ones the one that was seen."""
    if len(plan.site.tensors) == 1:
        named = dict(model.named_parameters(remove_duplicate=False))
        name = plan.site.name
        return named[name] if name in named else model.get_submodule(name).get_parameter("weight")
    # Where the input is a parameter as well, the weight is the second operand.
    found = {id(call[-1 if isinstance(call[-1], nn.Parameter) else 0]): call for call in operands}
    call = next(iter(found.values()))
    weight = call[-1] if isinstance(call[-1], nn.Parameter) else call[0]
    if len(found) > 1 or not isinstance(weight, nn.Parameter):
        raise SiteError(f"quantize: call '{plan.address}' is made with several weights; give each a call of its own, or name it in skip=")
    return weight


def _axis(site: Site, weight: Tensor) -> int:
    """Return the output-channel axis of a weight; in a site of tied weights it may differ from the first one's."""
    if len(site.tensors) == 1:
        return site.channel_axis
    axes = (axis for axis in (site.channel_axis, *range(weight.dim())) if axis < weight.dim())
    return next((axis for axis in axes if (weight.numel(), weight.shape[axis]) in site.tensors), 0)


def _grid(plan: CallPlan, weight: nn.Parameter, options: QuantOptions) -> WeightQuantizer | None:
    """Return the quantizer of a weight; a vector has one step size."""
    if plan.bits.w >= UNTOUCHED:
        return None
    if weight.dim() < 2 and options.quantizer == "entropy":
        raise SiteError(f"quantize: the weight of '{plan.address}' is a vector, which 'entropy' cannot quantize; use quantizer='lsq'")
    axis = _axis(plan.site, weight) if options.per_channel and weight.dim() > 1 else None
    made = weight_quantizer(
        options.quantizer,
        weight.detach(),
        plan.bits.w,
        axis=axis,
        narrow=options.narrow,
        entropy=options.entropy,
        rule=options.rule,
        power_of_two=options.integer,
    )
    return made.to(weight.device)


def _quantizer(plan: CallPlan, operands: Sequence[Tensor], options: QuantOptions) -> ActivationQuantizer:
    """Return a calibrated activation quantizer."""
    sample = _together(operands)
    if plan.product and options.quantizer in ("pact", "dorefa") and is_signed(sample):
        found = f"an operand of '{plan.address}' has negative values, which '{options.quantizer}' maps to zero"
        raise SiteError(f"quantize: {found}; use quantizer='lsq', or name the site in skip=")
    made = activation_quantizer(options.quantizer, plan.bits.a, rule=options.rule, power_of_two=options.integer)
    made.calibrate(sample)
    return made.to(sample.device)


def _together(samples: Sequence[Tensor]) -> Tensor:
    """Return several inputs of one call as one, ``[N, …]``."""
    if len(samples) == 1:
        return samples[0]
    rows = len(samples[0]) if len({len(x) for x in samples}) == 1 else 1
    return torch.cat([x.reshape(rows, -1) for x in samples], 1)


def named_quant_calls(model: nn.Module) -> Iterator[tuple[str, WeightCall | ProductCall]]:
    """Yield each quantized functional call once, with its address ``owner#k``."""
    for name, module in model.named_modules():
        if isinstance(module, (WeightCall, ProductCall)):
            yield call_address(name), module


__all__ = ["CALLS", "CallOwner", "ProductCall", "WeightCall", "disable_fast_paths", "named_quant_calls"]
