"""What a comparison is asked for: methods, seeds and budgets, and the stages of fine-tuning that its entries get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bitwright.errors import RecipeError
from bitwright.recipe import CompareSection, Options, Recipe, make_options
from bitwright.training import FinetuneOptions

Budgets = tuple[str, ...]
"""Limits that are kept all at once."""


def check_recipe(recipe: Recipe) -> None:
    """Raise `RecipeError` for a recipe whose methods cannot be compared."""
    if recipe.adaptive is not None:
        raise RecipeError(f"compare {recipe.name}: an adaptive recipe has no static policies to compare; see benchmarks/adaptive.py")
    if recipe.search.stop_at is not None:
        raise RecipeError("compare: search.stop_at would stop some methods before others; leave it out, or give search.steps")


@dataclass(frozen=True)
class Stage:
    """A fine-tuning that all contenders of a stage get; ``options`` None is none at all."""

    name: str
    options: FinetuneOptions | None
    changed: Options = field(hash=False, compare=False)


@dataclass(frozen=True)
class Plan:
    """What is compared: methods by label with the options of each, seeds, budgets, stages, and how many go on to the second stage."""

    methods: Mapping[str, str]
    options: Mapping[str, Options]
    seeds: tuple[int, ...]
    budgets: tuple[Budgets, ...]
    stages: tuple[Stage, ...]
    best: int

    @classmethod
    def of(cls, recipe: Recipe) -> Plan:
        """Return the plan of a recipe, with what its section ``compare`` leaves open filled in."""
        section, own = recipe.compare or CompareSection(), recipe.search
        methods = section.named(list(dict.fromkeys([own.method, "fisher", "random"])))
        base = {label: own.options if name == own.method else {} for label, name in methods.items()}
        return cls(
            methods=methods,
            options={label: {**base[label], **section.options.get(label, {})} for label in methods},
            seeds=tuple(section.seeds or (recipe.seed, recipe.seed + 1, recipe.seed + 2)),
            budgets=tuple(_limits(entry) for entry in section.budgets or [list(own.budgets)]),
            stages=_stages(recipe, section),
            best=section.best,
        )


def _limits(entry: str | list[str]) -> Budgets:
    texts = entry.split(",") if isinstance(entry, str) else entry
    return tuple(text.strip() for text in texts)


def _stages(recipe: Recipe, section: CompareSection) -> tuple[Stage, ...]:
    given = [("short", section.short), ("long", section.long)]
    if section.short is None and section.long is None:
        given = [("long", {} if recipe.finetune is not None else None)]
        if recipe.finetune is None:
            return (Stage("long", None, {}),)
    settings = [(name, {**(recipe.finetune or {}), **changes}) for name, changes in given if changes is not None]
    return tuple(Stage(name, make_options(FinetuneOptions, values, f"compare.{name}"), values) for name, values in settings)


@dataclass(frozen=True)
class Entry:
    """One cell of the comparison: a method's policy for a budget and seed, with the fine-tuning of a stage."""

    budget: Budgets
    stage: Stage
    label: str
    seed: int

    def __str__(self) -> str:
        return f"{self.label}, seed {self.seed}, {', '.join(self.budget)}, {self.stage.name}"
