"""What all tests share: one thread, and a recipe that takes a second."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

# A suite started in the background inherits an ignored SIGINT, and so would the processes it tests with Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)

TINY: dict[str, Any] = {
    "name": "tiny",
    "description": "A test: every stage, a second or two.",
    "threads": 1,
    "data": {"name": "digits", "held_out": 100},
    "model": {"name": "digits_cnn"},
    "float": {"epochs": 2, "batch_size": 64, "lr": 0.05, "max_steps": 30, "checkpoint_seconds": 0.0},
    "search": {
        "method": "sdq",
        "options": {"epochs": 4, "batch_size": 32, "max_steps": 40},
        "budgets": ["weight_bits<=2.5"],
        "activations": [4],
        "save_every": 5,
    },
    "quantize": {"calibration": 64, "correct": ["batchnorm"]},
    "finetune": {"epochs": 2, "batch_size": 64, "lr": 0.01, "max_steps": 30, "checkpoint_seconds": 0.0},
    "teacher": "float",
    "baselines": {"methods": ["uniform", "random", "fisher"], "random": 2, "finetune": {"epochs": 1, "batch_size": 64, "max_steps": 5}},
    "export": {"to": "packed"},
}


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Return a small recipe as data, free to be changed."""
    return copy.deepcopy(TINY)


@pytest.fixture
def recipe_file(tiny: dict[str, Any], tmp_path: Path) -> Path:
    """Write the small recipe to a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the small recipe once, all stages; tests that write into a run copy it first."""
    from bitwright.pipeline import run

    path = tmp_path_factory.mktemp("runs") / "tiny"
    run(copy.deepcopy(TINY), path)
    return path


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run a small comparison of two stages once; tests that write into it copy it first."""
    from bitwright.compare import compare
    from comparing import recipe_of

    path = tmp_path_factory.mktemp("compare") / "tiny"
    return path, compare(recipe_of(), path)
