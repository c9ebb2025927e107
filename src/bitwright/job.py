"""A job: a recipe at work in a run directory; everything the stages share is built here, once and when first asked for."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright import latency, runs, settled
from bitwright.bitfusion import BitFusionCycles, BitFusionEnergy
from bitwright.costs import BitOps, Budget, Cost, Size, WeightBits, parse_budget
from bitwright.data import Data, Split, TensorSplit, check_model, load_data, mixed
from bitwright.errors import BudgetError, DataError, PolicyError, RunError, nearest
from bitwright.exporters.packed import packed_overhead
from bitwright.memory import ActivationMemory
from bitwright.models import build, load_weights
from bitwright.policy import Bits, Policy
from bitwright.problem import Choices, Problem, build_choices
from bitwright.proxy import HELD_OUT, Proxy, adapt, default_images, reduced
from bitwright.quant import quantize, verify_widths
from bitwright.recipe import QuantizeOptions, Recipe, load_recipe, make_options
from bitwright.runs import Run
from bitwright.sites import Trace, trace
from bitwright.targets import Target, get_target
from bitwright.training import FinetuneOptions

PROXY = "proxy.safetensors"
"""Where a run keeps the network that was adapted to its proxy data set."""
Log = Callable[[str, Mapping[str, Any]], None]
"""Called with the name of a stage and one row of numbers."""


@dataclass(frozen=True)
class Job:
    """A recipe and its run directory; the properties are built from the two alone.

    Attributes:
        recipe: what to do.
        run: where it is done.
        data_root: the folder that holds the data sets.
        device: where the networks run.
        log: told of progress.
    """

    recipe: Recipe
    run: Run
    data_root: Path | None
    device: torch.device
    log: Log

    @classmethod
    def open(
        cls, recipe: Recipe, out: str | Path, *, data_root: str | Path | None = None, device: str = "cpu", log: Log | None = None
    ) -> Job:
        """Open a run directory for a recipe, new or to be continued; raises `RunError` if it began with another recipe."""
        _forget_unbegun(Path(out))
        run = Run.open(out, recipe.model_copy(update={"compare": None}).to_dict())  # what is compared decides nothing of a run
        runs.write_text_atomic(run.path / "recipe.yaml", recipe.to_yaml())
        root = None if data_root is None else Path(data_root)
        return cls(recipe, run, root, torch.device(device), log or (lambda stage, row: None))

    @classmethod
    def load(cls, path: str | Path, *, data_root: str | Path | None = None, device: str = "cpu", log: Log | None = None) -> Job:
        """Open an existing run directory with the recipe it holds."""
        run = Run.load(path)
        if run.manifest["recipe"].get("kind") == "comparison":
            raise RunError(f"{path}: holds a comparison, no run; type `bitwright compare {path}` or `bitwright report {path}`")
        file = run.path / "recipe.yaml"
        if not file.is_file():
            raise RunError(f"{file}: missing; restore it from a copy, or give another --out")
        return cls.open(load_recipe(file), path, data_root=data_root, device=device, log=log)

    @cached_property
    def data(self) -> Data:
        """The data set, its batches on the device and in the recipe's quality."""
        section = self.recipe.data
        data = load_data(section.name, self.data_root, held_out=section.held_out, seed=self.recipe.seed, **section.options)
        if section.images is not None:
            data = replace(data, fit=data.fit.take(section.images))
        return self._in_quality(self._moved(data))

    def _in_quality(self, data: Data) -> Data:
        """Return a data set in the recipe's quality: the images of a proxy are treated as those of the target."""
        section = self.recipe.data.quality
        return data if section is None else mixed(data, section.mix(), self.recipe.seed)

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions that the recipe asks its networks to be evaluated under."""
        section, quality = self.recipe.evaluate, self.recipe.data.quality
        if section is not None:
            return tuple(section.conditions)
        if quality is None:
            return ()
        return ("clean", "mixed", "held_out") if quality.mix().held_out else ("clean", "mixed")

    def _moved(self, data: Data) -> Data:
        """Return a data set whose batches are on the device."""
        if self.device.type == "cpu":
            return data
        fit, selection, test = (on_device(split, self.device) for split in (data.fit, data.selection, data.test))
        return replace(data, fit=fit, selection=selection, test=test)

    def build(self) -> nn.Module:
        """Return the network as built, its random weights from the recipe's seed."""
        section = self.recipe.model
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed)
            model = build(section.name, **section.arguments)
        model.to(self.device)
        check_model(model, self.data)
        return model

    @cached_property
    def untrained(self) -> nn.Module:
        """The network as built, for what does not depend on weights."""
        return self.build()

    @cached_property
    def network(self) -> nn.Module:
        """The float network that is quantized, as the float stage left it."""
        return self._restored(self.build(), "float.safetensors")

    @cached_property
    def trace(self) -> Trace:
        """The network's sites."""
        section = self.recipe.search
        return trace(self.untrained, self.data.example(), skip=section.skip, tie=section.tie)

    @cached_property
    def choices(self) -> Choices:
        """The choices of every site."""
        section = self.recipe.search
        pins = {"pin_first": section.pin_first, "pin_last": section.pin_last}
        choices = build_choices(self.trace, section.weights, section.activations, **pins)
        if self.target is None:
            return choices
        kept = self.target.restrict(self.trace, choices)
        moved = [name for name, asked in choices.items() if not set(kept[name]) <= set(asked)]
        if moved:
            listed = "; ".join(f"'{name}' from {_spelled(choices[name])} to {_spelled(kept[name])}" for name in moved)
            found = f"target {self.target.name} changes the widths that the recipe gives some sites, such as its pins"
            self.log("search", {"status": f"! {found}: {listed}"})
        return kept

    @cached_property
    def target(self) -> Target | None:
        """What the network is deployed to; None where the recipe does not say."""
        return None if self.recipe.target is None else get_target(self.recipe.target)

    @cached_property
    def quantize_options(self) -> QuantizeOptions:
        """How a policy becomes a network; the points are the target's unless the recipe names others."""
        options = make_options(QuantizeOptions, self.recipe.quantize, "quantize")
        return options if options.points is not None or self.target is None else replace(options, points=self.target.points)

    def trace_names(self, policy: Mapping[str, Bits]) -> None:
        """Raise `PolicyError` unless a policy names the network's sites, all of them and no other."""
        for name in policy:
            if name not in self.trace.names:
                raise PolicyError(f"policy: the network has no site '{name}'; {nearest(name, self.trace.names)}")
        for name in self.trace.names:
            if name not in policy:
                raise PolicyError(f"policy: site '{name}' has no entry; add it")

    @cached_property
    def overhead(self) -> int:
        """Bytes of the packed file that no policy changes."""
        options = {} if self.recipe.export is None or self.recipe.export.to != "packed" else self.recipe.export.options
        return packed_overhead(self.untrained, self.trace, reference=self.reference, **options)

    @property
    def reference(self) -> tuple[str, Mapping[str, Any]]:
        """How the float architecture is made again: its name and arguments."""
        return self.recipe.model.name, self.recipe.model.arguments

    @cached_property
    def budgets(self) -> tuple[Budget, ...]:
        """The recipe's budgets."""
        return self.parse_budgets(self.recipe.search.budgets)

    def parse_budgets(self, texts: Sequence[str]) -> tuple[Budget, ...]:
        """Return budgets of this network; raises `BudgetError` for one that does not parse."""
        pins = {name: allowed[0] for name, allowed in self.choices.items() if len(allowed) == 1}
        extent = {"fixed_bytes": self.overhead, "float_bytes": 4 * self.trace.parameters}
        costs: tuple[Cost, ...] = (self.memory, BitFusionCycles(self.trace.first), BitFusionEnergy(self.trace.first))
        if any(text.strip().startswith(latency.Table.name) for text in texts):
            costs = (*costs, self.latency)
        return tuple(parse_budget(text, self.trace.sites, pins=pins, **extent, costs=costs) for text in texts)

    @cached_property
    def latency(self) -> latency.Table:
        """The latency table: the recipe's, or the one in the run directory; raises `BudgetError` where there is none.

        One that was measured on another machine may be meant for that one; the log says so.
        """
        file = self.run.path / latency.FILE if self.recipe.latency is None else Path(self.recipe.latency)
        table = latency.Table.load(file)
        if self.target is not None and table.target != latency.named(self.target):
            raise BudgetError(
                f"latency: {file} is of {table.target}, and the recipe's target is {latency.named(self.target)}; measure again"
            )
        table.check(self.trace.sites)
        elsewhere = table.elsewhere()
        if elsewhere is not None:
            self.log("latency", {"status": f"! {elsewhere}"})
        return table

    @property
    def has_latency(self) -> bool:
        """Whether there is a latency table."""
        return self.recipe.latency is not None or (self.run.path / latency.FILE).is_file()

    @property
    def memory(self) -> ActivationMemory:
        """The cost of activations held at once; what no site reads is float32 where the recipe quantizes no activation."""
        return ActivationMemory(self.trace.lifetimes, 8 if min(self.recipe.search.activations) < 16 else 32)

    @cached_property
    def problem(self) -> Problem:
        """The recipe's problem on a copy of the float network."""
        return self.problem_of(self.network)

    def problem_of(
        self,
        model: nn.Module,
        seed: int | None = None,
        evaluate: Callable[[Policy], float] | None = None,
        budgets: Sequence[Budget] | None = None,
    ) -> Problem:
        """Return the recipe's problem on a copy of a network with these sites: a search method may be anybody's, and the network is not.

        Seed and budgets are the recipe's where they are not given.
        """
        seed = self.recipe.seed if seed is None else seed
        limits = self.budgets if budgets is None else budgets
        return Problem(copy.deepcopy(model), self.trace, self.choices, limits, self.data, seed=seed, evaluate=evaluate)

    @cached_property
    def proxy_data(self) -> Data | None:
        """The proxy's images; None where the recipe has no proxy."""
        section = self.recipe.search.proxy
        if section is None:
            return None
        images = default_images(self.data) if section.images is None else section.images
        load = partial(load_data, section.name, self.data_root, seed=self.recipe.seed, **section.options)
        try:
            whole = load(held_out=max(1, round(HELD_OUT * images)))
        except DataError:  # where that is because of more images than there are, `reduced` says how many there are
            whole = load(held_out=1)
        return self._in_quality(self._moved(reduced(whole, images, self.recipe.seed)))

    @cached_property
    def proxy(self) -> Proxy | None:
        """The proxy that is searched on, its network trained on it once and kept in proxy.safetensors; None without one."""
        section, data = self.recipe.search.proxy, self.proxy_data
        if section is None or data is None:
            return None
        file = self.run.inside(PROXY)
        options = None if section.adapt is None else make_options(FinetuneOptions, section.adapt, "search.proxy.adapt")
        known = file.is_file()
        proxy = adapt(self.network, self.trace, self.data.shape, data, None if known else options, seed=self.recipe.seed)
        if known:
            saved = runs.load_tree(file)
            proxy.model.load_state_dict(saved["model"])
            return replace(proxy, sample_passes=saved["sample_passes"])
        runs.save_tree(file, {"model": dict(proxy.model.state_dict()), "sample_passes": proxy.sample_passes})
        return proxy

    def search_problem(self) -> Problem:
        """Return the problem that a search works on, new each time: the recipe's, or that of the proxy with the target's costs."""
        return self.on_proxy(self.problem_of(self.network))

    def on_proxy(self, problem: Problem) -> Problem:
        """Return a problem of this recipe as its search sees it: on a copy of the proxy, where there is one."""
        return problem if self.proxy is None else problem.on(copy.deepcopy(self.proxy.model), self.proxy.data)

    @property
    def policy(self) -> Policy:
        """The policy that the search found; read anew each time, because a search may replace it."""
        return settled.read_policy(self.run)

    @property
    def float_policy(self) -> Policy:
        """The policy that leaves everything in float32."""
        return Policy((name, Bits(32, 32)) for name in self.trace.names)

    @cached_property
    def teacher(self) -> nn.Module | None:
        """The network whose soft labels are learned in fine-tuning, if the recipe has one."""
        section = self.recipe.teacher
        if section is None or section.name == "float":
            return None if section is None else self.network
        model = build(section.name, **section.arguments)
        if section.weights is not None:
            load_weights(model, section.weights)
        model.to(self.device)
        check_model(model, self.data)
        return model.eval()

    def quantize(self, policy: Policy) -> nn.Module:
        """Return the float network quantized at a policy, calibrated on training images, its widths verified."""
        options = self.quantize_options
        images = self.data.example(options.calibration)
        model = quantize(
            self.network,
            policy,
            calibration=images,
            correct=options.correct,
            sites=self.trace.sites,
            options=options,
        )
        verify_widths(model)
        return model

    @cached_property
    def quantized(self) -> nn.Module:
        """The fine-tuned network; raises `RunError` if it was fine-tuned at another policy than the run's."""
        policy, file = self.policy, self.run.path / "model.safetensors"
        if runs.mark_of(file, settled.MARK) not in (None, policy.digest):
            found = f"was fine-tuned at another policy than that of {self.run.path / settled.FILE}"
            raise RunError(f"{file}: {found}; type `bitwright finetune {self.run.path} --again`")
        return self._restored(self.quantize(policy), file.name)

    def forget_quantized(self) -> None:
        """Let `quantized` be read anew: it was fine-tuned once more."""
        self.__dict__.pop("quantized", None)

    def _restored(self, model: nn.Module, name: str) -> nn.Module:
        """Load the weights that a stage of this run wrote."""
        file = self.run.path / name
        if not file.is_file():
            raise RunError(f"{file}: not there yet; run `bitwright run {self.run.path}` first")
        try:
            model.load_state_dict(runs.load_tree(file))
        except RuntimeError as error:
            raise RunError(f"{file}: belongs to another network ({str(error).splitlines()[-1].strip()}); give another --out") from None
        return model.eval()

    def describe(self, policy: Mapping[str, Bits]) -> dict[str, Any]:
        """Return what a policy costs; averages are over all sites, pinned ones included, activations weighted by their number."""
        sites = self.trace.sites
        weights, acts = sum(site.weights for site in sites), sum(site.acts for site in sites)
        weighted = [policy[site.name] for site in sites if site.operands == 1]
        return {
            "average_weight_bits": WeightBits().total(sites, policy) / weights,
            "average_activation_bits": sum(site.acts * policy[site.name].a for site in sites) / acts,
            "bitops": BitOps().total(sites, policy),
            "size": Size(self.overhead).total(sites, policy),
            "activation_memory": self.memory.total(sites, policy),
            "weight_widths": dict(sorted(Counter(bits.w for bits in weighted).items())),
            "activation_widths": dict(sorted(Counter(policy[site.name].a for site in sites).items())),
        }

    def sites_table(self) -> dict[str, Any]:
        """Return the sites, their choices and the budgets as JSON-able data: the content of sites.json."""
        sites = [{**asdict(site), "choices": [list(bits) for bits in self.choices[site.name]]} for site in self.trace.sites]
        budgets = [{"text": b.text, "cost": b.cost.name, "unit": b.cost.unit, "limit": b.limit} for b in self.budgets]
        facts = {"sites": sites, "skipped": list(self.trace.skipped), "parameters": self.trace.parameters, "budgets": budgets}
        if all(budget.cost.name != latency.Table.name for budget in self.budgets):
            return facts
        return {**facts, "latency": {"machine": dict(self.latency.machine), "elsewhere": self.latency.elsewhere()}}


def _forget_unbegun(path: Path) -> None:
    """Empty a run directory in which nothing was done yet: a recipe that was refused may be mended and tried again."""
    files = {"manifest.json", "recipe.yaml"}
    if (path / "manifest.json").is_file() and {item.name for item in path.iterdir()} <= files:
        for name in files:
            (path / name).unlink(missing_ok=True)


def _spelled(allowed: Sequence[Bits]) -> str:
    return ", ".join(map(repr, allowed[:4])) + (", …" if len(allowed) > 4 else "")


def on_device(split: Split, device: torch.device) -> Split:
    """Return a split whose batches are on a device: made there if its images are a tensor, else moved there."""
    return split.to(device) if isinstance(split, TensorSplit) else _Moved(split, device)


class _Moved(Split):
    """A split that moves each batch to a device."""

    def __init__(self, split: Split, device: torch.device):
        self.split, self.device, self.classes = split, device, split.classes

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        x, y = self.split.batch(index, generator)
        return x.to(self.device), y.to(self.device)

    def pixels(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        x, y = self.split.pixels(index, generator)
        return x.to(self.device), y.to(self.device)

    def normalise(self, pixels: Tensor) -> Tensor:
        return self.split.normalise(pixels)

    def subset(self, index: Tensor) -> Split:
        return _Moved(self.split.subset(index), self.device)
