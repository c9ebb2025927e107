"""Claims: one holder at a time, and none after a holder's death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from bitwright.claims import claim

HOLD = "import sys, time\nfrom pathlib import Path\nfrom bitwright.claims import claim\nwith claim(Path(sys.argv[1])) as held:\n"
HOLD += "    print(held, flush=True)\n    time.sleep(60)\n"


def test_a_folder_is_made_held_once_and_let_go(tmp_path: Path) -> None:
    folder = tmp_path / "a/b"
    with claim(folder) as first:
        assert first
        assert folder.is_dir()
        with claim(folder) as second, claim(tmp_path / "a") as other:
            assert not second
            assert other
    with claim(folder) as again:
        assert again
    assert list(folder.iterdir()) == []


def test_waiting_ends_when_the_holder_lets_go(tmp_path: Path) -> None:
    order: list[str] = []

    def wait() -> None:
        with claim(tmp_path, wait=True) as held:
            order.append(f"second {held}")

    with claim(tmp_path):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second True"]


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    with claim(tmp_path) as held:
        assert not held
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    with claim(tmp_path) as held:
        assert held
