"""`import bitwright` is light, and its public names are few and documented."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import bitwright

EXTRAS = ("scipy", "sklearn", "PIL", "rich", "tyro", "pydantic", "yaml", "torchvision", "timm", "matplotlib", "optuna")
PROBE = """
import sys, time
import torch
start = time.process_time()
import bitwright
seconds = time.process_time() - start
print(seconds, *(name for name in {extras!r} if name in sys.modules))
"""


def test_import_adds_little_to_torch_and_no_extra() -> None:
    source = str(Path(bitwright.__file__).parents[1])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r}){PROBE.format(extras=EXTRAS)}"]
    seconds, *extras = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert extras == []
    assert float(seconds) <= 0.5  # processor time: a busy machine delays the wall's


def test_the_public_names_are_few_sorted_and_there() -> None:
    assert len(bitwright.__all__) <= 20
    assert list(bitwright.__all__) == sorted(bitwright.__all__)
    for name in bitwright.__all__:
        assert (getattr(bitwright, name).__doc__ or "").strip(), name


def test_the_version_is_that_of_the_package() -> None:
    text = (Path(bitwright.__file__).parents[2] / "pyproject.toml").read_text()
    assert f'version = "{bitwright.__version__}"' in text


def test_python_dash_m_is_the_command_line() -> None:
    source = str(Path(bitwright.__file__).parents[1])
    command = [sys.executable, "-c", f"import sys, runpy; sys.path.insert(0, {source!r}); sys.argv = ['bitwright', 'evalute']; "]
    command[-1] += "runpy.run_module('bitwright', run_name='__main__')"
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "bitwright: no verb 'evalute'; did you mean 'evaluate'?\n"
