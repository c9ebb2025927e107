"""Flags of verbs that have many of them, and what they change in a recipe."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from bitwright.additivity import POLICIES
from bitwright.deployment import default_widths, target_overrides
from bitwright.errors import BitwrightError
from bitwright.recipe import load_recipe, parse_yaml

METHOD = "sdq"
"""The method of a search by flags that names none."""
OPTION = "option."
"""Begins the names of a method's options among the arguments, so that none takes the place of another flag."""
HELD_OUT = 500
"""Training images held out for selection where flags stand for a recipe and do not say."""


class UsageError(BitwrightError):
    """The command line itself is wrong."""


def flag_recipe(parser: argparse.ArgumentParser) -> None:
    """Add what stands for a recipe."""
    flags = parser.add_argument_group("instead of a recipe; all but --model and --data also change one")
    flags.add_argument("--model", metavar="NAME", help="a bundled network or package.module:function")
    flags.add_argument("--weights", metavar="FILE", help="its trained weights: .safetensors, .npz, .th, .pt or .pth")
    flags.add_argument("--data", metavar="NAME", help="a data set")
    flags.add_argument("--held-out", type=int, metavar="N", help=f"training images held out for selection (default: {HELD_OUT})")
    flags.add_argument("--budget", action="append", metavar="COST<=LIMIT", help="such as weight_bits<=2; may be repeated")
    flags.add_argument("--weight-bits", type=int, nargs="+", metavar="W", help="candidates (default: the target's, or 1 to 8)")
    flags.add_argument("--activation-bits", type=int, nargs="+", metavar="A", help="candidates (default: the target's, or 32: float)")


def method_flag(parser: argparse.ArgumentParser) -> None:
    """Add what `search` searches with."""
    about = f"a search method (default: the recipe's, or {METHOD}); see `bitwright methods`"
    parser.add_argument("--method", metavar="NAME", help=about)
    parser.set_defaults(method_options=())


def recipe_of_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe that the flags of `search` and `profile` spell without one."""
    for name in ("model", "data", "budget"):
        if not getattr(arguments, name, None):
            raise UsageError(f"{arguments.verb}: give a recipe, a run directory, or --model, --data and --budget (--{name} is missing)")
    method, widths = getattr(arguments, "method", None) or METHOD, default_widths(getattr(arguments, "deploy", None))
    return {
        "name": f"{arguments.model}-{method}".replace(":", "-"),
        "data": {"name": arguments.data, "held_out": HELD_OUT if arguments.held_out is None else arguments.held_out},
        "model": {"name": arguments.model, "weights": arguments.weights},
        "search": {
            "method": method,
            "options": {name: parse_yaml(value, f"'{value}'") for name, value in method_values(arguments).items()},
            "budgets": arguments.budget,
            "weights": arguments.weight_bits or widths["weights"],
            "activations": arguments.activation_bits or widths["activations"],
        },
    }


def method_values(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the options of the method that were given as flags, as they were typed."""
    given = {name: getattr(arguments, OPTION + name) for name in getattr(arguments, "method_options", ())}
    return {name: value for name, value in given.items() if value is not None}


def overrides(arguments: argparse.Namespace) -> list[str]:
    """Return the changes of a recipe that a verb's flags stand for; what belongs to ``--set`` comes before the flags with a name.

    Raises:
        UsageError: a flag that cannot change a recipe.
    """
    seed = [] if arguments.seed is None else [f"seed={arguments.seed}"]
    proxy = [f"search.proxy={arguments.proxy}"] if getattr(arguments, "proxy", None) is not None else []
    first, last = _changes(arguments) if arguments.target is not None else ([], [])
    return [*target_overrides(getattr(arguments, "deploy", None)), *first, *arguments.set, *seed, *proxy, *last]


def _changes(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return what the flags of `flag_recipe` change in a recipe: what comes before ``--set``, and what after."""
    for name in ("model", "data"):
        if getattr(arguments, name, None) is not None:
            way = f"leave one of the two out, or give --set {name}.name=…"
            raise UsageError(f"{arguments.target}: --{name} stands instead of a recipe; {way}")
    places = {
        "weights": "model.weights",
        "held_out": "data.held_out",
        "budget": "search.budgets",
        "weight_bits": "search.weights",
        "activation_bits": "search.activations",
    }
    given = {place: getattr(arguments, name, None) for name, place in places.items()}
    changed = [f"{place}={json.dumps(value)}" for place, value in given.items() if value is not None]
    return _method_change(arguments), [*changed, *(f"search.options.{name}={value}" for name, value in method_values(arguments).items())]


def _method_change(arguments: argparse.Namespace) -> list[str]:
    """Return the change to another method: the options of the recipe's own are no options of it."""
    method = getattr(arguments, "method", None)
    if method is None or Path(arguments.target).is_dir():
        return [] if method is None else [f"search.method={method}"]
    if any(text.partition("=")[0].strip() == "search.method" for text in arguments.set):
        raise UsageError(f"{arguments.target}: --method and --set search.method say the same thing; give one of them")
    same = load_recipe(arguments.target).search.method == method
    return [] if same else [f"search.method={method}", "search.options={}"]


def check_shape(arguments: argparse.Namespace) -> None:
    """Refuse what has no meaning beside ``--shape``: a network by name alone is profiled on random images, without a recipe."""
    names = ("weights", "data", "held_out", "budget", "weight_bits", "activation_bits", "seed")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is not None]
    given += ["--set"] * bool(arguments.set) + [f"the recipe '{arguments.target}'"] * (arguments.target is not None)
    if given:
        raise UsageError(f"profile --shape: stands instead of a recipe and of data, so {given[0]} has no meaning; leave one of the two out")


def method_of(arguments: argparse.Namespace) -> str:
    """Return the method whose options are flags: the one that is named, that of the recipe or run directory, or the default."""
    if arguments.method is not None or arguments.target is None:
        return str(arguments.method or METHOD)
    target = Path(arguments.target)
    with suppress(BitwrightError):  # what cannot be read is refused where it is used
        return load_recipe(target / "recipe.yaml" if target.is_dir() else arguments.target, arguments.set).search.method
    return METHOD


def profile_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `profile` takes."""
    parser.add_argument("--shape", metavar="CxHxW", help="input of --model where no data set is given, such as 3x224x224")
    parser.add_argument("--sensitivity", action="store_true", help="also measure what each choice adds to the loss, one site at a time")
    about = "by which method: kl (default), fisher, hawq or limpq; without a name and with --target: time networks on its runtime"
    parser.add_argument("--measure", metavar="NAME", nargs="?", const="latency", help=about)
    parser.add_argument(
        "--save", metavar="FILE", help="write what was measured to a file; a search takes it by the option table, or latency"
    )
    parser.add_argument("--judge", type=int, default=20, metavar="N", help="networks that predicted latencies are judged on (default: 20)")
    parser.add_argument("--check-additivity", action="store_true", help="also check on random policies whether they add up to the loss")
    parser.add_argument("--policies", type=int, metavar="N", help=f"how many policies are drawn (default: {POLICIES}, or by size)")


def compare_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `compare` takes."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, COMPARE_HELP
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="names, package.module:Class, or LABEL=NAME; uniform is added")
    about = "each a split, a search and a training (default: the recipe's and the next two)"
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help=about)
    parser.add_argument("--budget", nargs="+", metavar="COST<=LIMIT", help="each one a comparison; a comma joins limits kept at once")
    parser.add_argument("--out", metavar="DIR", help="the comparison's directory (default: runs/<recipe name>-compare)")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key of the recipe; may be repeated")


COMPARE_HELP = """\
A table, a CSV and report.html say which differences are significant (bootstrap over seeds and test images, Holm-corrected)
and whether mixed widths beat uniform. The same command goes on after a crash; started twice, the processes share the work.

  bitwright compare digits-sdq --methods sdq fisher uniform random --seeds 0 1 2
  bitwright compare my.yaml --methods sdq old=sdq --set compare.options.old.gate=interpolation
  bitwright compare my.yaml --budget 'bitops<=W4A4' 'bitops<=W3A3' --out runs/c
  bitwright compare my.yaml --set compare.short.epochs=1 --set compare.long.epochs=20

With compare.short and compare.long there are two stages: all methods with the short fine-tuning, then the compare.best
(default 5) on the selection images, and uniform, with the long one. Both are changes of the recipe's finetune section.
"""
