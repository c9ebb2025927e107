"""Code from outside the package: callbacks are told apart, and one stays itself while it runs and in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import pytest

from bitwright.outside import callback_digest


def factory(weight):
    return lambda policy: weight * len(policy)


def weighed(policy, weight):
    return weight * len(policy)


@dataclass(frozen=True)
class Weighed:
    weight: float

    def __call__(self, policy):
        return self.weight * len(policy)


class Counting:
    def __init__(self):
        self.calls = 0

    def loss(self, policy):
        self.calls += 1
        return 0.0


def counted():
    calls = 0

    def loss(policy):
        nonlocal calls
        calls += 1
        return 0.0

    return loss


def endless():
    def loss(policy):
        return loss(policy)

    return loss


@pytest.mark.parametrize("make", [factory, lambda weight: partial(weighed, weight=weight), Weighed])
def test_what_a_callback_was_made_with_tells_it_apart(make):
    assert callback_digest(make(1.0)) == callback_digest(make(1.0)) != callback_digest(make(2.0))


def test_code_tells_callbacks_apart():
    written = [lambda policy: 1.0, lambda policy: len(policy) + 1, lambda policy: policy in {1, 2}, weighed, endless()]
    assert len({callback_digest(call) for call in written}) == len(written)


@pytest.mark.parametrize("make", [counted, lambda: Counting().loss])
def test_a_callback_that_counts_its_calls_stays_itself(make):
    call = make()
    before = callback_digest(call)
    call({})
    assert callback_digest(call) == before


def test_another_process_finds_the_same_digest():
    text = "from bitwright.outside import callback_digest; print(callback_digest(lambda policy: policy in {'a', 'b', 'c'}))"
    found = [
        subprocess.run(
            [sys.executable, "-c", text], check=True, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]
