"""An adaptive network: a float network's copy whose sites choose their bits for every input."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from bitwright.adaptive.actor import WIDTH, Actor, ActorOptions, SiteInput, Table, build_actor
from bitwright.adaptive.execution import AdaptiveLayer, Decision, Ledger, Pass, SwitchableNorm
from bitwright.adaptive.relaxations import Chosen, Draw, concrete, gaussian, settled
from bitwright.errors import BitwrightError, DataError, SiteError
from bitwright.policy import Bits, Policy
from bitwright.quant.convert import layer_calls
from bitwright.quant.functional import UNTOUCHED
from bitwright.quant.gates import Gate, GatedActivation, GatedWeight, LayerGates, switchable
from bitwright.quant.modules import Op, QuantLayer, evaluating, replace_module
from bitwright.quant.quantizers import LSQActivation, LSQWeight

if TYPE_CHECKING:
    from bitwright.sites import Site, Trace

Mode = Literal["settled", "pathwise", "probing", "drawn"]
CALIBRATION = 64
"""Images that step sizes start from; normalisation and the actor see all that are given."""


@dataclass(frozen=True)
class Space:
    """What an adaptive network may choose from, and what every choice costs.

    Attributes:
        sites: all sites, in execution order.
        names: the sites that decide, in the same order.
        choices: of each deciding site, cheapest first.
        pinned: bits of the others.
        limit: bit operations that an input may take on average, all sites and the actor included.
    """

    sites: tuple[Site, ...]
    names: tuple[str, ...]
    choices: tuple[Bits, ...]
    pinned: Mapping[str, Bits]
    limit: int

    @classmethod
    def of(cls, trace: Trace, choices: Mapping[str, Sequence[Bits]], limit: int) -> Space:
        """Return the space of a trace's sites; raises `SiteError` for a deciding site that has no layer of its own."""
        names = tuple(name for name in trace.names if len(choices[name]) > 1)
        if not names:
            raise BitwrightError("adaptive: every site has one choice, so there is nothing to adapt; give several widths or free the ends")
        allowed = {tuple(sorted(choices[name], key=lambda bits: bits.w * bits.a)) for name in names}
        if len(allowed) > 1:
            raise BitwrightError(f"adaptive: sites have different choices ({len(allowed)} kinds); give all that are not pinned the same")
        for name in names:
            call = next((layer for layer in trace[name].layers if "#" in layer), None)
            if call is not None:
                raise SiteError(f"adaptive: site '{name}' is the functional call '{call}', which cannot adapt; name it in search.skip")
        pinned = {name: choices[name][0] for name in trace.names if name not in names}
        return cls(trace.sites, names, allowed.pop(), pinned, limit)

    @cached_property
    def macs(self) -> int:
        """MACs of the whole network, a sample."""
        return sum(site.macs for site in self.sites)

    @cached_property
    def fixed(self) -> int:
        """Bit operations of the sites that do not decide."""
        return sum(site.macs * self.pinned[site.name].w * self.pinned[site.name].a for site in self.sites if site.name in self.pinned)

    @cached_property
    def terms(self) -> Tensor:
        """Bit operations of each deciding site at each choice, float64 ``[S, K]``."""
        known = {site.name: site for site in self.sites}
        return torch.tensor(
            [[float(known[name].macs * bits.w * bits.a) for bits in self.choices] for name in self.names], dtype=torch.float64
        )

    def policy(self, index: Sequence[int]) -> Policy:
        """Return the static policy in which every deciding site has one choice."""
        own = dict(zip(self.names, (self.choices[int(k)] for k in index), strict=True))
        return Policy((site.name, own.get(site.name) or self.pinned[site.name]) for site in self.sites)


class AdaptiveNet(nn.Module):
    """A network that decides the bits of its sites for every input; in evaluation mode without any draw.

    Make one with `adapt`. ``network`` holds the shared weights, with step sizes and normalisation of every width; ``actor`` decides.
    Costs and actor are those of one size of image, so it takes no other: ``image`` is that of the example.
    """

    def __init__(self, network: nn.Module, actor: Actor, space: Space, shared: Pass, relaxation: str, conditions: int, example: Tensor):
        super().__init__()
        self.network, self.actor, self.space, self.relaxation, self.conditions = network, actor, space, relaxation, conditions
        self.image, self.dtype = tuple(example.shape[1:]), example.dtype
        self._fixed = space.fixed  # taken here: the first use of a cached property breaks the graph of a compiled step
        self._shared = shared
        shared.decide = self._decide
        self.mode: Mode = "settled"
        self._draw: Draw | None = None
        self._forced: Tensor | None = None
        self._condition: Tensor | None = None
        self._seen: Tensor | None = None
        self._heard: list[Tensor] | None = None
        self._chosen: list[Chosen] = []
        self.register_buffer("shares", (space.terms / space.limit).float(), persistent=False)
        # by how much of the budget the decisions can move the cost: from all narrowest to all widest
        self.span = float((space.terms[:, -1] - space.terms[:, 0]).sum() / space.limit)

    shares: Tensor

    @property
    def interpolate(self) -> bool:
        """Whether outputs of two widths are mixed while training (the Gaussian relaxation's first part)."""
        return self._shared.interpolate

    @interpolate.setter
    def interpolate(self, value: bool) -> None:
        self._shared.interpolate = value

    def trust(self, largest: float) -> None:
        """Let the gradient of a gate count for no more than this in the coming passes."""
        self._shared.trust = largest

    @property
    def base(self) -> float:
        """The share of the budget that every input takes: pinned sites and the actor."""
        return (self._fixed + self.actor.macs * WIDTH.w * WIDTH.a) / self.space.limit

    def forward(self, x: Tensor, *, draw: Draw | None = None, forced: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Return the logits.

        Args:
            x: images ``[N, …]``.
            draw: randomness, in the modes that draw.
            forced: choices ``[S, N]`` that are taken instead of the actor's.
            condition: true severity of each image, int64 ``[N]``, for an actor that is told.

        Raises:
            DataError: images of another shape or type than it was adapted to, or none; in evaluation, values that are not finite.
        """
        check_batch(x, self.image, self.dtype, "adaptive network")
        if not self.training and not torch.compiler.is_compiling():
            check_finite(x)
        self._shared.reset()
        self._draw, self._forced, self._condition, self._chosen = draw, forced, condition, []
        self._seen = None if forced is not None else self.actor.begin(x, condition)
        if self._shared.ledger is not None and self.actor.macs and forced is None:
            self._shared.ledger.entries.append(("actor", WIDTH, len(x), self.actor.macs))
        logits: Tensor = self.network(x)
        return logits

    def _decide(self, site: int, x: Tensor) -> Decision:
        """Return a site's decision in the present mode."""
        if self._forced is not None:
            return Decision(self._forced[site])
        with torch.autocast(x.device.type, enabled=False):
            raw = self.actor.scores(site, x, self._seen, self._condition).float()
            if self._heard is not None:
                self._heard.append(raw.cpu())
            scores = raw - self.actor.price[site] * self.worth(site)
            if self._draw is None:
                return Decision(self._settle(site, scores))
            chosen = self._relaxed(site, scores, self._draw)
        self._chosen.append(chosen)
        return Decision(chosen.decision.index) if self.mode == "probing" else chosen.decision

    def worth(self, site: int) -> Tensor:
        """Return what a unit of price takes from each output of a site: the choice's cost, in shares of what a mean site can move."""
        share = self.shares[site] * (len(self.space.names) / self.span)
        if self.relaxation == "concrete":
            return share
        return torch.stack([share[-1] - share[0], torch.zeros_like(share[0])])

    @property
    def draws(self) -> bool:
        """Whether even a deployed network draws its widths: the control that reads nothing and learns nothing."""
        return isinstance(self.actor, Table) and not self.actor.scores_of.requires_grad

    @contextmanager
    def hearing(self) -> Iterator[list[Tensor]]:
        """Keep what the actor says at each site, before any price, for a while: ``[N, outputs]`` a site and pass."""
        self._heard = []
        try:
            yield self._heard
        finally:
            self._heard = None

    def shares_at(self, price: Tensor, scores: Tensor) -> Tensor:
        """Return each sample's share of the budget at each site's price, ``[N]``, for scores ``[S, N, outputs]`` as they were heard."""
        total = torch.full((scores.shape[1],), self.base)
        for site, raw in enumerate(scores):
            priced = raw - price[site] * self.worth(site).cpu()
            shares = self.shares[site].cpu()
            if self.draws:
                total += (torch.softmax(priced, 1) * shares).sum(1)
            else:
                total += shares[settled(priced, shares, self.relaxation)]
        return total

    def _settle(self, site: int, scores: Tensor) -> Tensor:
        if self.draws:
            noise = torch.rand(scores.shape, device=scores.device).clamp(1e-12, 1 - 1e-7).log().neg().log().neg()
            return (scores + noise).argmax(1)  # the control that draws at random draws in a deployed network too
        return settled(scores, self.shares[site], self.relaxation)

    def _relaxed(self, site: int, scores: Tensor, draw: Draw) -> Chosen:
        costs, pathwise = self.shares[site], self.mode != "drawn"
        if self.relaxation == "concrete":
            return concrete(scores, costs, draw.gumbel[site], draw.uniform[site], draw, pathwise=pathwise)
        return gaussian(scores, costs, draw.normal[site], draw.uniform[site], draw, pathwise=pathwise, interpolate=self.interpolate)

    def spent(self) -> Tensor:
        """Return the share of the budget that each sample of the last pass took, ``[N]``, with the relaxation's gradient."""
        if self._chosen:
            return torch.stack([chosen.cost for chosen in self._chosen]).sum(0) + self.base
        return self.cost_of(self.taken()) + self.base

    def score_size(self) -> Tensor:
        """Return the mean square of the actor's scores in the last pass, summed over sites, ``[N]``; see `Chosen`."""
        return torch.stack([chosen.size for chosen in self._chosen]).sum(0)

    def log_probability(self) -> Tensor:
        """Return the log-probability of all choices of each sample in the last pass, ``[N]``."""
        return torch.stack([chosen.logp for chosen in self._chosen if chosen.logp is not None]).sum(0)

    def taken(self) -> Tensor:
        """Return the choices of the last pass, int64 ``[S, N]``."""
        return torch.stack([decision.index for decision in self._shared.decisions if decision is not None])

    def cost_of(self, index: Tensor) -> Tensor:
        """Return the share of the budget that the deciding sites take at some choices ``[S, N]``, ``[N]``."""
        return self.shares.to(index.device).gather(1, index).sum(0)

    def changed(self, site: Tensor) -> tuple[Tensor, Tensor]:
        """Return the choices of the last pass, each sample's neighbour at one site, and the gates of those neighbours.

        Args:
            site: which site of each sample changes, int64 ``[N]``.

        Returns:
            Choices ``[S, N]`` to be forced, and gates ``[N]``: zero, with the gradient of the neighbour's probability over its own draw.
        """
        chosen = [one.decision for one in self._chosen]
        others = torch.stack([decision.other for decision in chosen if decision.other is not None])
        gates = torch.stack([decision.gate for decision in chosen if decision.gate is not None])
        at = torch.arange(len(others), device=site.device)[:, None] == site
        return torch.where(at, others, self.taken()), (gates * at).sum(0)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Run a training batch again, for a while, without a trace in statistics but those of choices that were hardly taken before.

        A `SwitchableNorm` normalises by the statistics of the pass before, and such choices by those of this one, which they follow; a
        plain BatchNorm by those of the batch as it now is.
        """
        plain = [module for module in self.modules() if isinstance(module, BatchNorm)]
        tracked = [module.track_running_stats for module in plain]
        self._shared.replay = True
        for module in plain:
            module.track_running_stats = False
        try:
            yield
        finally:
            self._shared.replay = False
            for module, known in zip(plain, tracked, strict=True):
                module.track_running_stats = known

    @contextmanager
    def counting(self) -> Iterator[Ledger]:
        """Count what is executed, for a while."""
        self._shared.ledger = ledger = Ledger()
        try:
            yield ledger
        finally:
            self._shared.ledger = None

    def forced_to(self, choice: int, samples: int) -> Tensor:
        """Return choices ``[S, N]`` that are one and the same everywhere."""
        return torch.full((len(self.space.names), samples), choice, dtype=torch.int64, device=self.shares.device)

    def observe(self, images: Tensor) -> None:
        """Give every width normalisation statistics of its own, and the actor the usual size of its statistics, from images ``[N, …]``."""
        norms = [module for module in self.modules() if isinstance(module, SwitchableNorm)]
        momenta = [norm.momentum for norm in norms]
        with torch.no_grad(), evaluating(self):
            for norm in norms:
                norm.train()
                norm.momentum = None
            for choice in range(len(self.space.choices)):
                self(images, forced=self.forced_to(choice, len(images)))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self._observe_actor(images)

    def _observe_actor(self, images: Tensor) -> None:
        decide = self._shared.decide
        top = len(self.space.choices) - 1

        def watch(site: int, x: Tensor) -> Decision:
            self.actor.observe(site, x)
            return Decision(torch.full((len(x),), top, dtype=torch.int64, device=x.device))

        self._shared.decide = watch
        try:
            with torch.no_grad(), evaluating(self):
                self._shared.reset()
                self.actor.observe(-1, images)
                self.network(images)
        finally:
            self._shared.decide = decide

    def member(self, index: Sequence[int]) -> nn.Module:
        """Return the static quantized network in which every deciding site has one choice; it shares no memory with this one."""
        chosen = dict(zip(range(len(self.space.names)), (int(k) for k in index), strict=True))
        blank = Pass(len(self.space.names), self._shared.decide)
        result = copy.deepcopy(self.network, {id(self._shared): blank}).eval()
        for path, module in list(result.named_modules()):
            if isinstance(module, AdaptiveLayer):
                replace_module(result, path, _static_layer(module, chosen.get(module.site, 0)))
            elif isinstance(module, SwitchableNorm):
                replace_module(result, path, module.plain(chosen[module.site]))
        for parameter in result.parameters():
            parameter.requires_grad_(False)
        return result.eval()


def check_batch(x: Tensor, image: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
    """Raise `DataError` unless ``x`` is a batch of at least one image of a shape and type."""
    if isinstance(x, Tensor) and tuple(x.shape[1:]) == image and x.dtype == dtype and len(x):
        return
    found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    wanted = f"a tensor of {dtype} and shape ({', '.join(map(str, ('N', *image)))}), N at least 1"
    raise DataError(f"{what}: got {found}; give {wanted}; images of another size need one of their own")


def check_finite(x: Tensor) -> None:
    """Raise `DataError` for images that hold values that are not finite."""
    if bool(torch.isfinite(x).all()):
        return
    bad = int((~torch.isfinite(x).flatten(1).all(1)).nonzero()[0])
    raise DataError(f"image {bad} of {len(x)} has values that are not finite (nan or inf); mend or leave out that image")


def _static_layer(layer: AdaptiveLayer, choice: int) -> QuantLayer:
    """Return an adaptive layer as an ordinary one at one choice."""
    bits = layer.choices[choice]
    weight = nn.Parameter(layer.weight.detach().clone())
    bias = None if layer.bias is None else nn.Parameter(cast(Tensor, layer.bias).detach().clone())
    weights = inputs = None
    if layer.weight_quantizer is not None and bits.w < UNTOUCHED:
        weights = LSQWeight(weight.detach(), bits.w, axis=layer.op.channel_axis, narrow=False, entropy=False, rule="minmax").to(
            weight.device
        )
        with torch.no_grad():
            weights.scale.copy_(layer.weight_quantizer.scale[bits.w - 1].view(weights.scale.shape))
    if layer.input_quantizer is not None and bits.a < UNTOUCHED:
        inputs = LSQActivation(bits.a).to(weight.device)
        inputs.set_sign(signed=layer.input_quantizer.signed)
        with torch.no_grad():
            inputs.scale.copy_(layer.input_quantizer.scale[bits.a - 1])
    return QuantLayer(layer.op, weight, bias, bits, weights, inputs)


def adapt(
    model: nn.Module, space: Space, images: Tensor, options: ActorOptions | None = None, *, conditions: int = 6, seed: int = 0
) -> AdaptiveNet:
    """Return an adaptive copy of a float network; the network itself is untouched.

    Args:
        model: float network.
        space: its sites and their choices.
        images: calibration inputs ``[N, …]`` of all qualities that are expected.
        options: the actor.
        conditions: severities that an actor of true severities tells apart, clean included.
        seed: of the actor's first weights.

    Raises:
        BitwrightError: the actor would take too much of the network's work.
        SiteError: a layer cannot adapt.
    """
    options = options or ActorOptions()
    images = images.to(next(model.parameters()).device)
    check_finite(images)
    gates = {layer: _gates(space, site.name) for site in space.sites for layer in site.layers}
    network = switchable(model, gates, images[:CALIBRATION])
    owners = {layer: k for k, name in enumerate(space.names) for site in space.sites if site.name == name for layer in site.layers}
    shared = Pass(len(space.names), lambda site, x: Decision(torch.zeros(len(x), dtype=torch.int64)))
    links = follow(model, images[:2], list(owners))
    for site in space.sites:
        for path in site.layers:
            _swap_layer(network, path, space, owners.get(path, -1), shared, normalised=path in links)
    for path, (norm, calls) in links.items():
        bn = cast(BatchNorm, network.get_submodule(norm))
        replace_module(network, norm, SwitchableNorm(bn, len(space.choices), owners[path], path, shared, calls=calls))
    actor = actor_for(model, space, images, options, conditions=conditions, seed=seed).to(images.device)
    net = AdaptiveNet(network, actor, space, shared, options.relaxation, conditions, images).to(images.device)
    net.observe(images)
    return net


def actor_for(model: nn.Module, space: Space, images: Tensor, options: ActorOptions, *, conditions: int = 6, seed: int = 0) -> Actor:
    """Return an untrained actor for a network; raises `BitwrightError` if it would take too much of its work, see `adapt`."""
    inputs = _site_inputs(model, space, images[:2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_actor(options, inputs, tuple(images.shape[1:]), len(space.choices), space.macs, conditions)


def _gates(space: Space, name: str) -> LayerGates:
    """Return which step sizes a site's layers need; the tables hold all widths, so one gate says it."""
    allowed = [space.pinned[name]] if name in space.pinned else list(space.choices)
    needs = [any(bits[part] < UNTOUCHED for bits in allowed) for part in (0, 1)]
    return LayerGates(*(Gate.at([8], [1.0]) if need else 32 for need in needs))


def _swap_layer(network: nn.Module, path: str, space: Space, site: int, shared: Pass, *, normalised: bool) -> None:
    """Put an adaptive layer in the place of a gated one."""
    layer = network.get_submodule(path)
    if not isinstance(layer, QuantLayer):
        raise SiteError(f"adaptive: layer '{path}' is a {type(layer).__name__}, which cannot adapt; name it in search.skip")
    name = next(s.name for s in space.sites if path in s.layers)
    choices = space.choices if site >= 0 else (space.pinned[name],)
    weights, inputs = cast("GatedWeight | None", layer.weight_quantizer), cast("GatedActivation | None", layer.input_quantizer)
    for part in (weights, inputs):
        if part is not None:
            part.gate.requires_grad_(False)
    new = AdaptiveLayer(path, layer.op, layer.weight, layer.bias, choices, weights, inputs, site, shared, normalised=normalised)
    replace_module(network, path, new.train(layer.training))


def follow(model: nn.Module, images: Tensor, paths: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Return the BatchNorm that reads the very output of each layer at every call and nothing else, and how many calls that are.

    Layers without one are left out.
    """
    made: dict[int, str] = {}
    calls: Counter[str] = Counter()
    reads: dict[str, list[str | None]] = {}
    kept: list[Tensor] = []
    handles = []
    for path in paths:

        def produced(_: nn.Module, __: object, output: Tensor, path: str = path) -> None:
            made[id(output)] = path
            calls[path] += 1
            kept.append(output)  # an identity is only worth something while the tensor lives

        handles.append(model.get_submodule(path).register_forward_hook(produced))
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm) and module.running_mean is not None:

            def read(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                reads.setdefault(name, []).append(made.get(id(args[0])))

            handles.append(module.register_forward_pre_hook(read))
    try:
        with torch.no_grad(), evaluating(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    links: dict[str, tuple[str, int]] = {}
    for name, sources in reads.items():
        source = sources[0]
        if source is not None and sources == [source] * calls[source]:
            links.setdefault(source, (name, calls[source]))
    return links


def _site_inputs(model: nn.Module, space: Space, images: Tensor) -> list[SiteInput]:
    """Return what enters the first layer of each deciding site at its first call, where the site decides."""
    first = [next(site.layers[0] for site in space.sites if site.name == name) for name in space.names]
    seen = layer_calls(model, first, images)
    return [SiteInput(tuple(seen[path][0].shape[1:]), Op.of(model.get_submodule(path)).kind == "linear") for path in first]


__all__ = ["AdaptiveNet", "Space", "adapt", "check_batch", "check_finite", "follow"]
