"""A float copy of a network on which any site can be put at any of its widths, and taken back, without another conversion.

Methods that look at one site at a time work on it: the quantizers of every width are calibrated once, on the float
activations, exactly as `bitwright.quant.quantize` would for each policy by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitwright.policy import Bits, Policy
from bitwright.quant.convert import quantize
from bitwright.quant.functional import UNTOUCHED
from bitwright.quant.functional_calls import ProductCall, WeightCall
from bitwright.quant.modules import QuantLayer, call_address
from bitwright.quant.quantizers import WeightQuantizer

if TYPE_CHECKING:
    from bitwright.sites import Site

FLOAT = Bits(32, 32)
OPERANDS = (("input_quantizer",), ("left_quantizer", "right_quantizer"))
"""Where a layer, and where a product of two activations, keeps the quantizers of its operands."""
LIMIT = 1 << 30
"""Bytes of layer outputs that a tape holds at most."""


class Probe(nn.Module):
    """Adds zeros to an operand: their gradient is that of the operand as this layer alone reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Return the operand, and note it beside the zeros."""
        zeros = torch.zeros_like(x, requires_grad=True)
        self.seen.append((x.detach(), zeros))
        return x + zeros


@dataclass(frozen=True)
class Place:
    """One layer or functional call, in float, and the quantizers that can stand there.

    Attributes:
        site: its site.
        module: what computes there.
        weights: quantizer of the weight by width.
        inputs: quantizers of the operands by width.
    """

    site: Site
    module: QuantLayer | ProductCall
    weights: dict[int, WeightQuantizer] = field(default_factory=dict)
    inputs: dict[int, tuple[nn.Module, ...]] = field(default_factory=dict)

    @property
    def weight(self) -> nn.Parameter | None:
        """The weight; a product of two activations has none."""
        return self.module.weight if isinstance(self.module, QuantLayer) else None

    def put(self, bits: Bits) -> None:
        """Compute at these widths from now on; `FLOAT` takes every quantizer away."""
        if isinstance(self.module, QuantLayer):
            self.module.bits, self.module.weight_quantizer = bits, self.weights.get(bits.w)
            self._put_operands(self.inputs.get(bits.a, (None,)))
        else:
            self._put_operands(self.inputs.get(bits.a, (nn.Identity(), nn.Identity())))

    def probes(self) -> list[Probe]:
        """Put a probe at every operand."""
        probes = [Probe() for _ in _slots(self.module)]
        self._put_operands(probes)
        return probes

    def _put_operands(self, modules: Sequence[nn.Module | None]) -> None:
        for slot, module in zip(_slots(self.module), modules, strict=True):
            setattr(self.module, slot, module)

    def lacking(self, bits: Bits) -> Bits:
        """Return the widths of a choice whose quantizers are not known yet; 32 stands for what is."""
        product = isinstance(self.module, ProductCall)
        known = product or bits.w >= UNTOUCHED or bits.w in self.weights
        return Bits(32 if known else bits.w, 32 if bits.a >= UNTOUCHED or bits.a in self.inputs else bits.a)

    def learn(self, module: QuantLayer | ProductCall, bits: Bits) -> None:
        """Take over the quantizers of some widths from a conversion."""
        if bits.a < UNTOUCHED:
            self.inputs[bits.a] = tuple(getattr(module, slot) for slot in _slots(module))
        if isinstance(module, QuantLayer) and module.weight_quantizer is not None:
            self.weights[bits.w] = module.weight_quantizer

    def weight_error(self, width: int) -> Tensor:
        """Return what a width, its quantizer known, changes in the weight."""
        assert isinstance(self.module, QuantLayer)
        self.put(Bits(width, 32))
        error = (self.module.quantized_weight() - self.module.weight).detach()
        self.put(FLOAT)
        return error


class Bench:
    """The copy, in evaluation mode, and its places.

    Quantizers are calibrated when they are first asked for, and kept.

    Args:
        model: float network.
        sites: the sites to look at; layers of others stay as they are.
        images: calibration inputs ``[N, …]``, on the model's device.
        weights: weight widths to calibrate at once, at every site.
        inputs: widths of input activations to calibrate at once, at every site.

    Attributes:
        network: the copy.
        places: by address: a layer's path, or ``owner#k``.
        passes: images that calibration passed through the network.

    >>> from bitwright.sites import trace
    >>> net, x = nn.Sequential(nn.Linear(4, 2)), torch.ones(1, 4)
    >>> bench = Bench(net, trace(net, x).sites, x)
    >>> with bench.at({"0": Bits(2, 32)}):
    ...     len(bench.network[0].quantized_weight().unique()) <= 8
    True
    >>> torch.equal(bench.network(x), net(x))
    True
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], images: Tensor, *, weights: Iterable[int] = (), inputs: Iterable[int] = ()):
        self._model, self._sites, self._images, self.passes = model, sites, images, 0
        owner = {address: site for site in sites for address in site.layers}
        # A product of two activations has a place of its own only where it is quantized.
        self.network, modules = self._converted({site.name: Bits(1, 1) if site.operands == 2 else FLOAT for site in sites})
        self.places = {address: Place(owner[address], module) for address, module in modules.items() if address in owner}
        for place in self.places.values():
            place.put(FLOAT)
        self.network.eval()
        for bits in [Bits(width, 32) for width in sorted(set(weights))] + [Bits(32, width) for width in sorted(set(inputs))]:
            self.calibrate({site.name: bits for site in sites})

    def _converted(self, policy: Mapping[str, Bits]) -> tuple[nn.Module, dict[str, QuantLayer | ProductCall]]:
        """Return a quantized copy, and by address the module that quantizes there."""
        quantized = quantize(self._model, Policy(policy), calibration=self._images, sites=self._sites)
        found = {call_address(path): module for path, module in quantized.named_modules() if isinstance(module, (QuantLayer, ProductCall))}
        return quantized, found

    def calibrate(self, policy: Mapping[str, Bits]) -> None:
        """Make the quantizers of a policy ready; those that are known are not made again."""
        lacking = {site.name: FLOAT for site in self._sites}
        for place in self.places.values():
            name = place.site.name
            lacking[name] = Bits(*map(min, lacking[name], place.lacking(policy.get(name, FLOAT))))
        if all(bits == FLOAT for bits in lacking.values()):
            return
        self.passes += len(self._images) * any(bits.a < UNTOUCHED for bits in lacking.values())
        for address, module in self._converted(lacking)[1].items():
            if address in self.places:
                self.places[address].learn(module, lacking[self.places[address].site.name])

    @contextmanager
    def at(self, policy: Mapping[str, Bits]) -> Iterator[None]:
        """Put some sites at some of their widths for a while."""
        self.calibrate(policy)
        places = [place for place in self.places.values() if place.site.name in policy]
        for place in places:
            place.put(policy[place.site.name])
        try:
            yield
        finally:
            for place in places:
                place.put(FLOAT)


class Replay:
    """Runs a network from any of its layers on: what the layers before it gave on the same inputs is kept and given back.

    Only layers are left out, which cost most; what a network computes between them (normalisation, sums, activations) runs again, on
    the same values. Where ``limit`` bytes do not hold all outputs, the later ones are computed every time.

    Args:
        bench: the network; its layers are watched from now on.
        limit: bytes that the tapes of this object may hold together.
    """

    def __init__(self, bench: Bench, limit: int = LIMIT):
        self.left = limit
        self.order: list[nn.Module] = []
        self._tape: list[Tensor] = []
        self._position, self._start, self._recording = 0, 0, False
        for module in {id(place.module): place.module for place in bench.places.values()}.values():
            if not isinstance(module, (WeightCall, ProductCall)):  # these give operands back, which cost little
                module.forward = partial(self._run, module, module.forward)  # type: ignore[method-assign]

    def _run(self, layer: nn.Module, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        at, self._position = self._position, self._position + 1
        if at < min(self._start, len(self._tape)):
            return self._tape[at].clone()  # a clone: the network may go on in place
        out = compute(x)
        if self._recording:
            self._keep(layer, at, out)
        return out

    def _keep(self, layer: nn.Module, at: int, out: Tensor) -> None:
        self.order[at:] = [layer]
        if len(self._tape) == at and out.nbytes <= self.left:
            self.left -= out.nbytes
            self._tape.append(out.clone())

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Keep what the layers give in the one run of the network in this block; yields the tape."""
        tape: list[Tensor] = []
        self._recording = True
        try:
            with self.playing(tape, 0):
                yield tape
        finally:
            self._recording = False

    @contextmanager
    def playing(self, tape: list[Tensor], start: int) -> Iterator[None]:
        """Take the outputs before call ``start`` from a tape in the one run of the network in this block."""
        self._tape, self._position, self._start = tape, 0, start
        try:
            yield
        finally:
            self._tape, self._start = [], 0

    def first_call(self, modules: Iterable[nn.Module]) -> int:
        """Return which call of a layer, counted over the run, is the first by these modules; 0 if one of them is not watched."""
        wanted = {id(module) for module in modules}
        called = [id(layer) for layer in self.order]
        return min(map(called.index, wanted)) if wanted <= set(called) else 0


def _slots(module: nn.Module) -> tuple[str, ...]:
    return OPERANDS[isinstance(module, ProductCall)]
