"""Sites: what in a model has a width to decide, found by running the model once.

Names and addresses. A *site* is named by the module path of its layer (``layer1.0.conv1``), by the path of its weight
where a functional call uses a parameter of its own (``head.weight``), or by its address where it has no weight.
An *address* says where the arithmetic happens:

- ``module.path``: an ``nn.Conv*``, ``nn.ConvTranspose*`` or ``nn.Linear`` that runs its class's own forward.
- ``owner.path#k``: the k-th functional call (from 0, counted anew in every forward of ``owner``; `calls.slots` says
  which functions count, and whether a call became a site makes no difference) that module ``owner`` makes itself.
  The root module's path is empty: ``#0``. Attention (``F.scaled_dot_product_attention``) takes two numbers:
  ``#k`` is q·k and ``#k+1`` is weights·v.
- `nn.MultiheadAttention` at path ``p``: ``p#0`` is its input projection (site ``p.in_proj_weight``), or ``p#0``,
  ``p#1``, ``p#2`` (sites ``p.q_proj_weight``, ``p.k_proj_weight``, ``p.v_proj_weight``) where query, key and value have
  weights of their own; ``p#qk`` and ``p#av`` are its two products; ``p.out_proj`` is its output projection, a
  `nn.Linear` whose weight is used although the module itself is never called.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bitwright.errors import SiteError, nearest
from bitwright.lifetimes import Lifetimes
from bitwright.recording import LAYERS, Entry, Recorder, Skips

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class Site:
    """One decision: the layers that share a width. ``macs`` and ``acts`` are per sample.

    ``operands`` is 1 for weight times input and 2 for the product of two activations. ``acts`` counts the elements of
    the input activations. ``channel_axis`` is the output-channel axis of the weight (for a transposed convolution of g
    groups, output channel (j, c) is ``weight[j·I/g:(j+1)·I/g, c]``). ``tensors`` holds (weights, output channels) of
    every distinct weight tensor; there are several only where sites were tied.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    weight_shape: tuple[int, ...]
    groups: int
    calls: int
    operands: int
    weights: int
    macs: int
    acts: int
    channel_axis: int
    tensors: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.weights and not self.tensors:
            channels = self.weight_shape[self.channel_axis] * (self.groups if "transpose" in self.kind else 1)
            object.__setattr__(self, "tensors", ((self.weights, channels),))


@dataclass(frozen=True)
class Trace:
    """The sites of a model in execution order, what was skipped, the number of its parameter elements, and what it holds when."""

    sites: tuple[Site, ...]
    skipped: tuple[str, ...]
    parameters: int
    lifetimes: Lifetimes = field(default_factory=Lifetimes)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise SiteError(f"no site '{name}' in the model; {nearest(name, self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sites, in execution order."""
        return tuple(site.name for site in self.sites)

    @property
    def first(self) -> str:
        """The name of the first site that has a weight."""
        return self._weighted()[0]

    @property
    def last(self) -> str:
        """The name of the last site that has a weight, in the order of first execution."""
        return self._weighted()[-1]

    def _weighted(self) -> list[str]:
        names = [site.name for site in self.sites if site.operands == 1]
        if not names:
            raise SiteError("the model has no site with a weight, so no first or last one; trace a model with Conv or Linear layers")
        return names


def trace(model: nn.Module, example: Example, *, skip: Iterable[str] = (), tie: Iterable[Iterable[str]] = ()) -> Trace:
    """Run ``model`` once, eagerly and in evaluation mode, and return its sites; the model is left as it was.

    Args:
        model: any module; its training flags, buffers, attributes, hooks and torch's RNG are restored, also on errors.
        example: one input tensor, a tuple of positional inputs, or a dict of keyword inputs. The first axis of the
            first tensor is the batch; counts are per sample (rounded up where a layer runs once per batch).
        skip: module paths (with all below them), site names, or patterns of them (``*`` also crosses dots).
        tie: groups of site names that must share one width; each becomes one site named by its first member.

    Raises:
        SiteError: nothing can be quantized, a layer cannot be and is not in ``skip``, or a name matches nothing.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))
    >>> [(s.name, s.kind, s.macs) for s in trace(net, torch.zeros(1, 3, 4, 4)).sites]
    [('0', 'conv2d', 3456), ('3', 'linear', 1280)]
    """
    skips = Skips(model, tuple([skip] if isinstance(skip, str) else skip))
    _check_traceable(model, skips)
    tensors = [x for x in tree_leaves(dict(example) if isinstance(example, Mapping) else example) if isinstance(x, Tensor)]
    if not tensors:
        raise SiteError("trace: the example holds no tensor; pass the tensor, the tuple or the dict that the model is called with")
    recorder = Recorder(model, skips, batch=tensors[0].shape[0] if tensors[0].dim() else 1)
    lifetimes = _run(model, example, recorder)
    skips.check_all_used(recorder.found)
    alone = [_site(entry, recorder.batch) for entry in recorder.entries.values()]
    sites = _tie(alone, tie)
    if not sites:
        kind = type(model).__name__
        raise SiteError(f"trace: {kind} ran no layer that can be quantized; it needs a Conv, Linear or matmul that is not skipped")
    owner = {layer: site.name for site in sites for layer in site.layers}
    lifetimes = lifetimes.renamed({site.name: owner[site.layers[0]] for site in alone})
    return Trace(tuple(sites), tuple(recorder.skipped), sum(p.numel() for p in model.parameters()), lifetimes)


def _check_traceable(model: nn.Module, skips: Skips) -> None:
    if isinstance(model, LAYERS):
        raise SiteError(f"trace: the model is a single {type(model).__name__}; wrap it in nn.Sequential(...) so that its site has a name")
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise SiteError(f"trace: '{path}' is a {type(module).__name__} without weights yet; run the model once on real input first")
        if isinstance(module, torch.jit.ScriptModule) and not skips.covers(path):
            raise SiteError(f"trace: '{path}' is a ScriptModule, which cannot be looked into; trace the Python model, or skip=['{path}']")
        if type(module).__name__ == "OptimizedModule":
            raise SiteError(f"trace: '{path or 'the model'}' is compiled; trace it before torch.compile")


def _run(model: nn.Module, example: Example, recorder: Recorder) -> Lifetimes:
    with _preserved(model), torch.no_grad(), ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # the fused transformer layer hides its linears
        model.eval()
        recorder.watch(stack)
        plain = dict(example) if isinstance(example, Mapping) else example
        inputs = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, plain)
        stack.enter_context(recorder)
        recorder.tape.start(inputs)
        try:
            if isinstance(inputs, dict):
                return recorder.tape.finish(model(**inputs))
            return recorder.tape.finish(model(*(inputs if isinstance(inputs, tuple) else (inputs,))))
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
            reason = (str(error).splitlines() or [""])[0]
            found = f"{type(error).__name__}: {reason}"
            raise SiteError(f"trace: the model fails on the example ({found}); pass an input it runs on") from error


@contextmanager
def _preserved(model: nn.Module) -> Iterator[None]:
    """Put back every module's attributes and registries, every buffer's values, and torch's random state."""
    inner = ("_parameters", "_buffers", "_modules")
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    saved = [(m, dict(m.__dict__), [(m.__dict__[key], dict(m.__dict__[key])) for key in inner]) for m in modules]
    flags = [(m, m.training) for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    devices = sorted({t.device.index or 0 for t in (*model.parameters(), *model.buffers()) if t.is_cuda})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, attributes, registries in saved:
                module.__dict__.clear()
                module.__dict__.update(attributes)
                for registry, content in registries:
                    registry.clear()
                    registry.update(content)
            for module, training in flags:
                module.train(training)
            for buffer, values in buffers:
                if not torch.equal(buffer, values):  # by value: batch_norm writes its statistics unseen by version counters
                    buffer.detach().copy_(values)


def _site(entry: Entry, batch: int) -> Site:
    weight, axis, call = entry.weight, entry.axis, entry.call
    return Site(
        name=entry.name,
        kind="linear" if call.kind == "matmul" and weight is not None and weight.dim() == 2 else call.kind,
        layers=tuple(entry.layers),
        weight_shape=() if weight is None else tuple(weight.shape),
        groups=call.groups,
        calls=entry.calls,
        operands=2 if weight is None else 1,
        weights=0 if weight is None else weight.numel(),
        macs=-(-entry.macs // batch),
        acts=-(-entry.acts // batch),
        channel_axis=axis,
    )


def _tie(sites: Sequence[Site], tie: Iterable[Iterable[str]]) -> list[Site]:
    by_name = {site.name: site for site in sites}
    group_of: dict[str, tuple[str, ...]] = {}
    for names in tie:
        group = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        if len(group) < 2:
            raise SiteError(f"tie={list(group)}: a group needs two sites or more; write tie=[('a', 'b')]")
        for name in group:
            if name not in by_name:
                raise SiteError(f"tie: no site '{name}'; {nearest(name, by_name)}")
            if name in group_of:
                raise SiteError(f"tie: site '{name}' is in two groups; join them into one")
            group_of[name] = group
        if len({by_name[name].operands for name in group}) > 1:
            raise SiteError(f"tie={list(group)}: weighted layers and products of activations cannot share a width; tie them apart")
    groups: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        groups.setdefault(group_of.get(site.name, (site.name,)), []).append(site)
    return [_merge(members) for members in groups.values()]


def _merge(members: Sequence[Site]) -> Site:
    """Join sites under the first one's name, kind and shape; what can be counted is summed."""
    if len(members) == 1:
        return members[0]
    return replace(
        members[0],
        layers=tuple(layer for site in members for layer in site.layers),
        calls=sum(site.calls for site in members),
        weights=sum(site.weights for site in members),
        macs=sum(site.macs for site in members),
        acts=sum(site.acts for site in members),
        tensors=tuple(tensor for site in members for tensor in site.tensors),
    )
