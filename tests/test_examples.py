"""The examples run, and do what their pages say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from bitwright.testing import check_method

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_quickstart_packs_a_network_that_still_reads_digits(capsys):
    accuracy = runpy.run_path(str(EXAMPLES / "quickstart.py"))["main"](epochs=6)
    assert accuracy > 0.85
    assert "bytes" in capsys.readouterr().out


def test_own_method_keeps_the_contract(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from own_method import Descent

    check_method(Descent(), kinds=("table",), limit=1.0)
    sys.modules.pop("own_method")
