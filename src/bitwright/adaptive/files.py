"""What an adaptive run keeps: the space of a recipe, the network built from it, and the actor's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright import runs
from bitwright.adaptive.actor import WIDTH
from bitwright.adaptive.network import AdaptiveNet, Space, actor_for, adapt
from bitwright.adaptive.training import UNUSED, AdaptiveOptions
from bitwright.costs import BitOps
from bitwright.errors import BudgetError, RecipeError, RunError
from bitwright.policy import Bits
from bitwright.problem import digest
from bitwright.recipe import Recipe, make_options

if TYPE_CHECKING:
    from bitwright.job import Job

ACTOR = "actor.safetensors"
MODEL = "model.safetensors"
SEARCHES: dict[str, Any] = {"method": "sdq", "options": {}, "steps": None, "seconds": None, "proxy": None, "never_worse": False}
"""Keys of the section `search` that choose how a static policy is looked for, at their defaults."""


def options_of(recipe: Recipe) -> AdaptiveOptions:
    """Return the options of a recipe's adaptive section."""
    return make_options(AdaptiveOptions, recipe.adaptive or {}, "adaptive")


def paired(weights: Sequence[int], activations: Sequence[int]) -> tuple[Bits, ...]:
    """Return the choices of a site: lists of equal length are paired, and one width goes with all of the other list.

    >>> paired([2, 4], [2, 4]), paired([4], [2, 8])
    ((W2A2, W4A4), (W4A2, W4A8))
    """
    if len(weights) == 1 or len(activations) == 1:
        return tuple(Bits(w, a) for w in weights for a in activations)
    if len(weights) != len(activations):
        found = f"{len(weights)} weight widths and {len(activations)} activation widths"
        raise RecipeError(f"search: an adaptive site moves both widths together and {found} cannot be paired; give as many of each, or one")
    return tuple(Bits(w, a) for w, a in zip(weights, activations, strict=True))


def space_of(job: Job) -> Space:
    """Return what the recipe lets its sites choose from, within its budget.

    Raises:
        RecipeError: the budget is none of bit operations, or there are several.
        BudgetError: even the narrowest choice of all sites costs more than the budget.
    """
    section, budgets = job.recipe.search, job.budgets
    if len(budgets) != 1 or not isinstance(budgets[0].cost, BitOps):
        found = ", ".join(budget.text for budget in budgets)
        raise RecipeError(f"search.budgets: '{found}'; an adaptive network keeps one budget of bit operations, such as 'bitops<=W3A3'")
    pairs = paired(section.weights, section.activations)
    choices = {name: pairs if len(allowed) > 1 else allowed for name, allowed in job.choices.items()}
    space = Space.of(job.trace, choices, budgets[0].limit)
    least, most = (space.fixed + int(space.terms[:, k].sum()) for k in (0, -1))
    if least > space.limit:
        show = BitOps().show
        reach = f"{show(least, space.sites)} to {show(most, space.sites)}, and the actor"
        raise BudgetError(
            f"budget '{budgets[0].text}': allows {show(space.limit, space.sites)}; these widths reach {reach}; give narrower widths"
        )
    return space


def check_budget(job: Job) -> None:
    """Raise `BudgetError` where the narrowest choices and the actor cost more than the budget, before anything is trained."""
    space = space_of(job)
    actor = actor_for(job.untrained, space, job.data.example(2), options_of(job.recipe).actor_options())
    own = actor.macs * WIDTH.w * WIDTH.a
    least = space.fixed + int(space.terms[:, 0].sum()) + own
    if least > space.limit:
        show = BitOps().show
        found = f"the narrowest widths take {show(least - own, space.sites)} and the actor {show(own, space.sites)}"
        ask = "give narrower widths, a larger budget, or a smaller actor (adaptive.quality, project, hidden, looks)"
        raise BudgetError(f"budget '{job.budgets[0].text}': allows {show(space.limit, space.sites)}; {found}; {ask}")


def build(job: Job) -> AdaptiveNet:
    """Return the recipe's adaptive network as it is before training."""
    options = options_of(job.recipe)
    images = job.data.example(options.calibration)
    return adapt(job.network, space_of(job), images, options.actor_options(), seed=job.recipe.seed)


def restored(job: Job) -> AdaptiveNet:
    """Return the trained adaptive network of a run; raises `RunError` if a file is missing or belongs to another one."""
    net = build(job)
    file = job.run.path / MODEL
    try:
        net.network.load_state_dict(runs.load_tree(file))
    except RuntimeError as error:
        raise RunError(f"{file}: belongs to another network ({str(error).splitlines()[-1].strip()}); give another --out") from None
    load_actor(net, job.run.path / ACTOR)
    return net.eval()


def identity(net: AdaptiveNet) -> dict[str, Any]:
    """Return what an actor's file must have in common with a network."""
    return {
        "actor": type(net.actor).__name__.lower(),
        "relaxation": net.relaxation,
        "sites": list(net.space.names),
        "choices": [list(bits) for bits in net.space.choices],
        "limit": net.space.limit,
        "network": digest(net.network),
        "shapes": {name: list(value.shape) for name, value in net.actor.state_dict().items()},
    }


def save_actor(net: AdaptiveNet, path: Path) -> None:
    """Write the actor with what it was trained for."""
    runs.save_tree(path, {"identity": identity(net), "state": dict(net.actor.state_dict())})


def load_actor(net: AdaptiveNet, path: Path) -> None:
    """Read an actor's file into a network; raises `RunError` if it was trained for another one."""
    tree = runs.load_tree(path)
    own = identity(net)
    found = tree.get("identity") if isinstance(tree, Mapping) and "state" in tree else None
    if found != own:
        what = "it holds no actor" if not isinstance(found, Mapping) else f"they differ in {runs.difference('actor', found, own)}"
        raise RunError(f"{path}: does not match the network; {what}; give the actor that was trained with it, or train again")
    net.actor.load_state_dict(tree["state"])


def check_recipe(recipe: Recipe) -> None:
    """Check what an adaptive recipe says besides its own section; nothing of it is ignored silently."""
    from bitwright.adaptive.bank import BankOptions  # noqa: PLC0415  (it needs this module)

    _check_training(recipe)
    for key, default in SEARCHES.items():
        if getattr(recipe.search, key) != default:
            raise RecipeError(f"recipe: search.{key} looks for one static policy, and an adaptive recipe has none; leave it out")
    for key in ("baselines", "compare", "teacher"):
        if getattr(recipe, key) is not None:
            raise RecipeError(
                f"recipe: section '{key}' belongs to static policies; leave it out, see benchmarks/adaptive.py for comparisons"
            )
    for key, value in recipe.quantize.items():
        if (key, value) not in (("quantizer", "lsq"), ("correct", [])):
            raise RecipeError(f"recipe: quantize.{key} has no meaning in an adaptive recipe; leave it out")
    paired(recipe.search.weights, recipe.search.activations)
    if recipe.export is not None:
        if recipe.export.to != "bank":
            raise RecipeError(f"recipe: export.to is '{recipe.export.to}'; an adaptive network is exported as a bank: give export.to=bank")
        make_options(BankOptions, recipe.export.options, "export.options")


def _check_training(recipe: Recipe) -> None:
    """Raise `RecipeError` where something is said of the training that it would not heed."""
    options = options_of(recipe)
    mixes = options.relaxation == "gaussian" and options.estimator == "pathwise"
    if (recipe.adaptive or {}).get("interpolate") and not mixes:
        asked = f"relaxation={options.relaxation} and estimator={options.estimator}"
        raise RecipeError(f"recipe: adaptive.interpolate mixes outputs with relaxation=gaussian and estimator=pathwise, not with {asked}")
    if recipe.finetune is None:
        raise RecipeError("recipe: an adaptive recipe trains its weights by the section 'finetune', which is missing; add it")
    for key in UNUSED:
        if recipe.finetune.get(key):
            raise RecipeError(f"recipe: an adaptive training knows no {key}; leave finetune.{key} out")
    if recipe.finetune.get("low_bit_decay"):
        raise RecipeError("recipe: finetune.low_bit_decay goes by a layer's one width, and an adaptive layer has several; leave it out")
