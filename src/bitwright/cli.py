"""The command line: one verb a subcommand. Exit codes: 0 done, 2 the input is wrong (one line says how to mend it), 1 our fault."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

from bitwright import profile
from bitwright.compare import compare
from bitwright.deployment import (
    check_flags,
    check_policy,
    measure_latency,
    measure_model,
    target_flag,
    target_overrides,
    targets_command,
    targets_flags,
    verify_command,
    verify_flags,
)
from bitwright.errors import BitwrightError, RunError, nearest
from bitwright.flags import (
    OPTION,
    UsageError,
    check_shape,
    compare_flags,
    flag_recipe,
    method_flag,
    method_of,
    overrides,
    profile_flags,
    recipe_of_flags,
)
from bitwright.job import Job
from bitwright.methods import available, describe, get_method
from bitwright.pipeline import derive, evaluate_file, evaluate_under, export_file, run_stages
from bitwright.plan import check_recipe
from bitwright.policy import Policy
from bitwright.progress import Progress
from bitwright.recipe import load_recipe, parse_yaml
from bitwright.report import render, terminal
from bitwright.report.facts import fallback_alarm
from bitwright.runs import versions, write_text_atomic
from bitwright.targets import get_target
from bitwright.translators._command import policy_command, policy_flags

Command = Callable[[argparse.Namespace], dict[str, Any]]
OUR_FAULT = "bitwright: this is our fault, not yours: please report the lines above together with the command"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    >>> main(["evalute"])
    2
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _parse(argv)
        result = arguments.command(arguments)
        if arguments.json:
            _say(json.dumps(result, ensure_ascii=False))
        sys.stdout.flush()
    except BitwrightError as error:
        _say(f"bitwright: {' '.join(str(error).split())}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        _say(_interrupted(argv), sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        traceback.print_exc()
        _say(OUR_FAULT, sys.stderr)
        return 1
    return 0


def _say(text: str, stream: TextIO | None = None) -> None:
    (stream or sys.stdout).write(text + "\n")


def _interrupted(argv: Sequence[str]) -> str:
    best = "if a search was running, policy.json holds the best feasible policy so far"
    return f"bitwright: stopped; `bitwright {shlex.join(argv)}` goes on from here; {best}"


# ---- the verbs


def run_command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every stage of a recipe, or go on with a run directory."""
    return _finish(run_stages(_job(arguments)), arguments)


def search_command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Find a policy only: for a recipe, a run directory, or a model and a budget given by flags."""
    return _stage(arguments, "search")


def finetune_command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune a run's policy; with --out in a new run, where the policy and the options may differ."""
    policy = _read_policy(arguments.policy)
    if arguments.out is None and (policy is not None or arguments.set or arguments.seed is not None):
        raise UsageError(f"finetune {arguments.target}: another policy or other options need a run of their own; give --out DIR")
    job = _existing(arguments)
    if arguments.out is not None:
        job = derive(job, arguments.out, overrides(arguments), policy)
    return _finish(run_stages(job, ["finetune"], again=arguments.again), arguments)


def evaluate_command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a run on its test split, float beside quantized, also on corrupted images; or a packed file of it."""
    if arguments.seeds is not None and arguments.conditions is None:
        raise UsageError("evaluate --seeds: they draw corruptions; also give --conditions, for example --conditions clean,mixed")
    conditions, seeds = () if arguments.conditions is None else arguments.conditions.split(","), arguments.seeds or (0,)
    if arguments.file is None:
        return _finish(evaluate_under(_existing(arguments), conditions, seeds), arguments) if conditions else _stage(arguments, "evaluate")
    result = evaluate_file(_existing(arguments), arguments.file, conditions, seeds)
    low, high = result["interval"]
    _say(f"{arguments.file}: {100 * result['top1']:.2f} % of {result['n']} test images (95 %: {100 * low:.2f} to {100 * high:.2f})")
    if conditions:
        terminal.show_quality({"file": result["quality"]})
    return result


def baselines_command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune and evaluate policies of the same budget beside a run's own."""
    return _stage(arguments, "baselines")


def compare_command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare search methods at one budget: every method and seed searched, fine-tuned alike, and judged."""
    target, known = arguments.target, Path(arguments.target).is_dir()
    if known and arguments.out is not None:
        raise UsageError(f"compare {target}: is a directory to go on with; leave out --out, or give a recipe instead")
    asked = {"methods": arguments.methods, "seeds": arguments.seeds, "budgets": arguments.budget}
    changes = [f"compare.{name}={json.dumps(value)}" for name, value in asked.items() if value is not None]
    if known and not (Path(target) / "recipe.yaml").is_file():
        raise RunError(f"{target}: no comparison (it has no recipe.yaml); give a recipe, or the --out of a `bitwright compare`")
    recipe = load_recipe(Path(target) / "recipe.yaml" if known else target, [*target_overrides(arguments.deploy), *arguments.set, *changes])
    check_recipe(recipe)
    out = Path(target) if known else Path(arguments.out or Path("runs") / f"{recipe.name}-compare")
    _say(f"comparison directory: {out}", sys.stderr)
    result = compare(recipe, out, **_surroundings(arguments))
    terminal.show(out)
    return result


def export_command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write a run's network to a deployable file and check what was written."""
    if arguments.check:
        if arguments.to is not None or arguments.file is not None or arguments.option:
            raise UsageError("export --check: writes nothing, so --to, --file and --option have no meaning; leave them out")
        return check_policy(_existing(arguments), arguments.deploy, _read_policy(arguments.policy))
    if arguments.policy is not None or arguments.deploy is not None:
        raise UsageError("export --target and --policy: they go with --check; the run's own target and policy are exported")
    if arguments.to is None and arguments.file is None and not arguments.option:
        return _stage(arguments, "export")
    result = export_file(_existing(arguments), arguments.to, arguments.file, _option_values(arguments.option))
    _say(f"{result['path']}: {result['bytes']} bytes, checked against the network")
    if result["float_fallbacks"]:
        _say(f"! {fallback_alarm(result['float_fallbacks'])}")
    return result


def report_command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Render a run's report from its files; nothing is computed anew."""
    file = Path(arguments.file or Path(arguments.target) / "report.html")
    write_text_atomic(file, render(arguments.target))
    _say(f"report: {file}")
    return {"report": str(file)}


def profile_command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Show the sites of a model, their work and what uniform widths cost; with --sensitivity what each choice loses."""
    if arguments.measure == "latency":
        return _measure_latency(arguments)
    table = arguments.sensitivity or arguments.save is not None
    if arguments.measure is not None and not table and not arguments.check_additivity:
        raise UsageError("profile --measure: also give what to do with it: --sensitivity, --save FILE or --check-additivity")
    if arguments.policies is not None and not arguments.check_additivity:
        raise UsageError("profile --policies: also give --check-additivity")
    if arguments.shape is not None:
        if arguments.model is None:
            raise UsageError("profile --shape: also give --model NAME, for example --model resnet18 --shape 3x224x224")
        if table or arguments.check_additivity:
            raise UsageError(
                "profile --shape: sensitivities are measured on images; give --data NAME and --weights FILE instead of --shape"
            )
        check_shape(arguments)
        result = profile.profile_model(arguments.model, arguments.shape)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            known = arguments.target is not None and Path(arguments.target).is_dir()
            arguments.out = None if known else f"{scratch}/run"
            if arguments.target is None and not arguments.budget:
                arguments.budget = ["weight_bits<=8"]  # a recipe has one; most of a profile looks at none
            wanted = {
                "sensitivity": arguments.sensitivity,
                "save": arguments.save,
                "additivity": arguments.check_additivity,
                "policies": arguments.policies,
            }
            result = profile.profile(_job(arguments), measure=arguments.measure or "kl", **wanted)
    profile.show(result)
    return result


def _measure_latency(arguments: argparse.Namespace) -> dict[str, Any]:
    ignored = {"--sensitivity": arguments.sensitivity, "--check-additivity": arguments.check_additivity}
    for flag, value in ignored.items():
        if value:
            raise UsageError(
                f"profile --measure: measures latency, and {flag} has no meaning for it; leave it out, or give --measure METHOD"
            )
    if arguments.shape is not None:
        if arguments.model is None or arguments.deploy is None or arguments.save is None:
            raise UsageError("profile --measure --shape: also give --model NAME, --target NAME and --save FILE")
        check_shape(arguments)
        target = get_target(arguments.deploy)
        counts = arguments.policies, arguments.judge
        return measure_model(arguments.model, arguments.shape, target, Path(arguments.save), *counts, Progress(sys.stderr))
    with tempfile.TemporaryDirectory() as scratch:
        known = arguments.target is not None and Path(arguments.target).is_dir()
        if not known and arguments.save is None:
            raise UsageError("profile --measure: also give --save FILE, or a run directory, where the table is kept")
        arguments.out = None if known else f"{scratch}/run"
        if arguments.target is None and not arguments.budget:
            arguments.budget = ["weight_bits<=32"]
        return measure_latency(_job(arguments), arguments.save, arguments.policies, arguments.judge)


def methods_command(arguments: argparse.Namespace) -> dict[str, Any]:
    """List the search methods and their options."""
    described = {name: describe(method) for name, method in available().items()}
    for name, entry in described.items():
        _say(f"{name}: {entry['summary']}")
        for option in entry["options"]:
            _say(f"    {option['name']} = {option['default']!r}  {option['about']}")
    return {"methods": described}


# ---- from arguments to a job


def _job(arguments: argparse.Namespace) -> Job:
    """Return the job of a recipe, of a run directory, or of flags."""
    target = arguments.target
    if target is not None and Path(target).is_dir():
        if arguments.out is not None or overrides(arguments) or getattr(arguments, "no_finetune", False):
            raise UsageError(
                f"{target}: a run directory keeps its recipe; leave out --out, --set and --seed, and all that would change it, "
                "or give a recipe instead"
            )
        return _existing(arguments)
    recipe = load_recipe(target if target is not None else recipe_of_flags(arguments), overrides(arguments))
    if getattr(arguments, "no_finetune", False):
        baselines = ["baselines.finetune=null"] if recipe.baselines is not None else []
        recipe = load_recipe(recipe.to_dict(), ["finetune=null", *baselines])
    out = arguments.out or Path("runs") / recipe.name
    _say(f"run directory: {out}", sys.stderr)
    return Job.open(recipe, out, **_surroundings(arguments))


def _existing(arguments: argparse.Namespace) -> Job:
    if not Path(arguments.target).is_dir():
        raise RunError(f"{arguments.target}: no such run directory; give the --out of a `bitwright run`")
    return Job.load(arguments.target, **_surroundings(arguments))


def _surroundings(arguments: argparse.Namespace) -> dict[str, Any]:
    root = arguments.data_root or os.environ.get("BITWRIGHT_DATA")
    return {"data_root": root, "device": _device(arguments.device), "log": Progress(sys.stderr)}


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: cannot be used ({str(error).splitlines()[0]}); give cpu, cuda or auto") from None
    return name


def _stage(arguments: argparse.Namespace, stage: str) -> dict[str, Any]:
    job = _job(arguments) if stage == "search" else _existing(arguments)
    return _finish(run_stages(job, [stage], again=arguments.again), arguments)


def _finish(summary: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Print what a run has for people, and return it for machines."""
    terminal.show(summary["run"])
    return summary


def _read_policy(path: str | None) -> Policy | None:
    if path is None:
        return None
    try:
        return Policy.from_json(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"--policy {path}: cannot be read ({error.strerror}); give a policy.json") from None


def _option_values(texts: Sequence[str]) -> dict[str, Any]:
    pairs = [text.partition("=") for text in texts]
    for name, equals, _ in pairs:
        if not equals:
            raise UsageError(f"--option {name}: expected key=value, for example --option batchnorm=eval-vectors")
    return {name: _yaml(value) for name, _, value in pairs}


def _yaml(text: str) -> Any:
    return parse_yaml(text, f"'{text}'")


# ---- parsing


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest known flag or verb."""

    def error(self, message: str) -> NoReturn:
        where = f"{self.prog.partition(' ')[2]}: ".removeprefix(": ")
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        choice = re.match(r"argument (\S+): invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            raise UsageError(f"{where}unknown argument '{unknown[1]}'; {nearest(unknown[1].partition('=')[0], flags)}")
        if choice:
            known = [name.strip(" '") for name in choice[3].split(",")]
            raise UsageError(f"{where}no {choice[1].lower()} '{choice[2]}'; {nearest(choice[2], known)}")
        raise UsageError(f"{where}{message}; see `{self.prog} --help`")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser, verbs = build_parser(argv)
    arguments, rest = parser.parse_known_args(argv)
    budget = next((text for text in [getattr(arguments, "target", None), *rest] if text is not None and "<=" in text), None)
    if budget is not None:
        raise UsageError(f"{arguments.verb}: '{budget}' is a further budget, which needs a flag of its own: --budget … --budget '{budget}'")
    if rest:  # the verb's own parser knows the flags that the unknown one may have meant
        verbs[arguments.verb].error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def build_parser(argv: Sequence[str] = ()) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser and those of its verbs; ``argv`` says whose options become flags of `search`."""
    parser = _Parser(prog="bitwright", description="Decide how many bits each layer deserves, and ship the network.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=_version())
    group = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs: dict[str, argparse.ArgumentParser] = {}
    for verb, (command, *builders) in VERBS.items():
        about = (inspect.getdoc(command) or "").splitlines()[0]
        verbs[verb] = group.add_parser(verb, help=about, description=about, allow_abbrev=False)
        verbs[verb].set_defaults(command=command)
        verbs[verb].add_argument("--json", action="store_true", help="print a machine-readable result as the last line")
        for builder in builders:
            builder(verbs[verb])
    _method_flags(verbs["search"], argv)
    return parser, verbs


def _target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RECIPE", help="a bundled recipe's name, a YAML file, or a run directory to go on with")


def _optional_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RECIPE", nargs="?", help="a bundled recipe's name, a YAML file, or a run directory")


def _run_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN", help="a run directory")


def _out_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="run directory (default: runs/<recipe name>)")


def _recipe_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key of the recipe; may be repeated")
    parser.add_argument("--seed", type=int, metavar="N", help="short for --set seed=N")


def _proxy_flag(parser: argparse.ArgumentParser) -> None:
    about = "search on another, smaller data set, with so many of its training images (default: 4 %% of the target's)"
    parser.add_argument("--proxy", metavar="DATA[:IMAGES]", help=about)


def _no_finetune_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-finetune", action="store_true", help="post-training quantization: train nothing after the search")


def _place_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-root", metavar="DIR", help="folder that holds the data sets (default: $BITWRIGHT_DATA)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda or auto (default); runs repeat bit for bit on cpu")


def _again_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--again", action="store_true", help="do it once more although it is finished")


def _new_out_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="a new run, which begins with this one's float network and policy")


def _policy_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", metavar="FILE", help="a policy.json to take instead of the run's own (needs --out)")


def _file_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", metavar="FILE", help="the packed file, or the report, instead of the run's own place")


def _condition_flags(parser: argparse.ArgumentParser) -> None:
    about = "also under these, joined by commas: clean, mixed, held_out, NAME:SEVERITY, or NAME for its five severities"
    parser.add_argument("--conditions", metavar="LIST", help=about)
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="draws of the corruptions (default: 0)")


def _export_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", metavar="FORMAT", help="the format (default: the recipe's, or packed)")
    parser.add_argument("--file", metavar="FILE", help="where to write (default: in the run's export folder)")
    parser.add_argument("--option", metavar="KEY=VALUE", action="append", default=[], help="an option of the format; may be repeated")


VERBS: dict[str, tuple[Any, ...]] = {
    "run": (run_command, _target, _out_flag, _recipe_flags, _proxy_flag, _no_finetune_flag, _place_flags, target_flag),
    "profile": (profile_command, _optional_target, _recipe_flags, _place_flags, flag_recipe, profile_flags, target_flag),
    "search": (
        search_command,
        _optional_target,
        _out_flag,
        _recipe_flags,
        _proxy_flag,
        _place_flags,
        _again_flag,
        flag_recipe,
        method_flag,
        target_flag,
    ),
    "finetune": (finetune_command, _run_target, _new_out_flag, _recipe_flags, _place_flags, _again_flag, _policy_flag),
    "evaluate": (evaluate_command, _run_target, _place_flags, _again_flag, _file_flag, _condition_flags),
    "baselines": (baselines_command, _run_target, _place_flags, _again_flag),
    "compare": (compare_command, _target, compare_flags, _place_flags, target_flag),
    "export": (export_command, _run_target, _place_flags, _again_flag, _export_flags, check_flags, target_flag),
    "verify": (verify_command, verify_flags),
    "policy": (policy_command, policy_flags),
    "report": (report_command, _run_target, _file_flag),
    "methods": (methods_command,),
    "targets": (targets_command, targets_flags),
}
"""Each verb: what it does, and what adds its arguments."""


def _method_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Turn the options of the method that ``argv`` names into flags."""
    if not argv or argv[0] != "search":
        return

    known, _ = parser.parse_known_args([text for text in argv[1:] if text not in ("-h", "--help")])
    name = method_of(known)
    method = get_method(name)
    group = parser.add_argument_group(f"options of {name} (in a recipe they are search.options)")
    taken = {flag for action in parser._actions for flag in action.option_strings}
    names = []
    for option in describe(method)["options"]:
        flag = f"--{option['name'].replace('_', '-')}"
        flag = flag if flag not in taken else f"--{name}-{flag[2:]}"
        about = f"{option['about']} (default: {option['default']})".strip().replace("%", "%%")
        group.add_argument(flag, dest=OPTION + option["name"], metavar="VALUE", help=about)
        names.append(option["name"])
    parser.set_defaults(method_options=tuple(names))


def _version() -> str:
    return f"bitwright {versions()['bitwright']}"


__all__ = ["build_parser", "main"]
