"""The verb `policy`: a run's policy to another tool's file, and back."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from bitwright.errors import PolicyError, RunError
from bitwright.job import Job
from bitwright.recipe import parse_yaml
from bitwright.runs import write_text_atomic
from bitwright.translators import Subject, available, get, read_text, translate, understand


def policy_command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Translate a run's policy to another tool's file, or such a file to a policy of the run's network."""
    if not Path(arguments.target).is_dir():
        raise RunError(f"{arguments.target}: no such run directory; give the --out of a `bitwright run`")
    job = Job.load(arguments.target, data_root=arguments.data_root or os.environ.get("BITWRIGHT_DATA"))
    options = dict(_option(text) for text in arguments.option)
    return (_to if arguments.direction == "to" else _from)(job, arguments, options)


def _to(job: Job, arguments: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    name = arguments.format
    if arguments.out is not None:
        raise PolicyError(f"policy to {name}: --out {arguments.out} is where `policy from` writes; give --file {arguments.out}")
    suffix = get(name).suffix
    tuned = (job.run.path / "model.safetensors").is_file()
    text = translate(job.policy, name, Subject(job.trace.sites, job.quantized if tuned else None, tuple(job.trace.skipped)), **options)
    file = Path(arguments.file) if arguments.file else job.run.inside("export", f"policy-{name}{suffix}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PolicyError(f"{file}: cannot be written ({error.strerror or error}); give another --file") from None
    write_text_atomic(file, text)
    print(f"{file}: {len(job.policy)} sites for {name}")  # noqa: T201  (what the command is for)
    return {"file": str(file), "format": name, "sites": len(job.policy)}


def _from(job: Job, arguments: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    if arguments.file is None:
        raise PolicyError(f"policy from {arguments.format}: no file to read; give --file FILE")
    policy = understand(read_text(arguments.file), arguments.format, Subject(job.trace.sites, skipped=tuple(job.trace.skipped)), **options)
    out = Path(arguments.out or "policy.json")
    write_text_atomic(out, policy.to_json() + "\n")
    differing = {site: [None if bits is None else repr(bits) for bits in pair] for site, pair in job.policy.diff(policy).items()}
    print(f"{out}: {len(policy)} sites; {len(differing)} differ from the run's own policy")  # noqa: T201
    return {"file": str(out), "format": arguments.format, "sites": len(policy), "differing": differing}


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise PolicyError(f"--option {text}: expected key=value, for example --option graph=float.onnx")
    return name, parse_yaml(value, f"'{value}'")


def policy_flags(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("direction", choices=["to", "from"], metavar="to|from", help="write another tool's file, or read one")
    parser.add_argument("format", metavar="FORMAT", help=f"one of {', '.join(available())}")
    parser.add_argument("target", metavar="RUN", help="a run directory, for its policy and the names of its layers")
    parser.add_argument("--file", metavar="FILE", help="the other tool's file (to: default in the run's export folder)")
    parser.add_argument("--out", metavar="FILE", help="from: where to write the policy (default: policy.json)")
    parser.add_argument("--option", metavar="KEY=VALUE", action="append", default=[], help="an option of the format; may be repeated")
    parser.add_argument("--data-root", metavar="DIR", help="folder that holds the data sets (default: $BITWRIGHT_DATA)")
