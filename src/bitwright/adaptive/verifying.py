"""A bank seen from the outside: what `bitwright verify` finds in its two files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright.adaptive.session import Session, answers, load_with_record
from bitwright.errors import ExportError
from bitwright.exporters import TensorCheck, Verification
from bitwright.exporters._sample import SAMPLES, Sample
from bitwright.policy import Policy
from bitwright.quant.modules import QuantLayer

ALLOWED = 0.05
"""How far an answer may be from the one in the file: another machine sums in another order, which can move a code by a step."""


def verify_bank(path: Path, model: nn.Module | None = None) -> Verification:
    """Load a bank, count the levels of every member's weights, and run each member and the router on a sample.

    Args:
        path: bank.json, its weights, the folder that has them, or the run that exported them.
        model: the float network, where it is none of ours by name.

    Raises:
        ExportError: the bank is damaged or tampered with, or does not keep its policies; the message says which.
    """
    session, record = load_with_record(path, model)
    rows = tuple(row for k, member in enumerate(session.members) for row in _levels(k, member, record))
    policy = Policy((f"member {k}: {site}", bits) for k, one in enumerate(session.policies) for site, bits in one.items())
    gap = _gap(path, session, record) if "answers" in record else None
    return Verification(path, "bank", policy, rows, SAMPLES, gap, ALLOWED).checked()


def _levels(number: int, member: nn.Module, record: Any) -> Iterator[TensorCheck]:
    """Yield what the weights of a member have and what its policy allows."""
    policy = record["policies"][number]
    for site, layers in record["sites"].items():
        for name in layers:
            layer, width = member.get_submodule(name), policy[site][0]
            assert isinstance(layer, QuantLayer)
            rows = layer.weight.detach().movedim(layer.op.channel_axis, 0).flatten(1)
            levels = None if width >= 16 else int((rows.sort(1).values.diff(dim=1) != 0).sum(1).max()) + 1
            yield TensorCheck(f"member {number}: {name}", "weight", width, "float32, shared", levels, None if width >= 16 else 2**width)


def _gap(path: Path, session: Session, record: Any) -> float:
    """Return the largest gap between the members' answers and those in the file; raises `ExportError` if the router sends elsewhere."""
    found, routed = answers(session)
    if routed != record["routed"]:
        raise ExportError(f"{path}: its router sends the sample to members {routed}, not to {record['routed']}; export the bank again")
    gaps = []
    for number, (now, kept) in enumerate(zip(found, record["answers"], strict=True)):
        own, sample = Sample.parse(now), Sample.parse(kept)
        if own is None or sample is None or own.shape != sample.shape or len(own.numbers) != len(sample.numbers):
            raise ExportError(f"{path}: member {number} has no answer in it of its own shape; export the bank again")
        wanted, numbers = torch.tensor(sample.numbers), torch.tensor(own.numbers)
        gaps.append(float((wanted - numbers).abs().max() / wanted.abs().max().clamp_min(1e-30)))
    return max(gaps)
