"""Progress of a run for people: one line a stage and epoch, on the error stream so that results stay alone on the output."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TextIO

QUIET_SECONDS = 2.0
"""The least time between two lines of the same stage, where nothing is lost by leaving one out."""


class Progress:
    """Writes the rows that the stages report; on a terminal the running one stays on a line of its own."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.live = stream.isatty()
        self.shown = 0.0
        self.width = 0

    def __call__(self, stage: str, row: Mapping[str, Any]) -> None:
        """Show a row; rows that come too fast are left out, the last of a stage never is."""
        final = (
            any(name in row for name in ("status", "waiting", "left out", "alarm"))
            or ("policy" in row and "top1" in row)
            or row.get("epoch") == row.get("epochs", -1)
        )
        if not final and time.monotonic() - self.shown < QUIET_SECONDS:
            return
        self.shown = time.monotonic()
        self._write(f"{stage:<9} {text_of(row)}", stay=final)

    def _write(self, text: str, *, stay: bool) -> None:
        if not self.live:
            print(text, file=self.stream, flush=True)
            return
        print("\r" + text.ljust(self.width), end="\n" if stay else "", file=self.stream, flush=True)
        self.width = 0 if stay else len(text)


def text_of(row: Mapping[str, Any]) -> str:
    """Return a row as a few words.

    >>> text_of({"epoch": 3, "epochs": 10, "loss": 0.25, "selection": 0.9})
    'epoch 3/10  loss 0.2500  selection 90.00 %'
    >>> text_of({"step": 50, "note": {"loss": 0.25, "margin": 1.5}})
    'step 50  training loss 0.2500  class margin 1.500'
    """
    if "status" in row:
        seconds = f" in {row['seconds']:.1f} s" if "seconds" in row else ""
        return f"{row['status']}{seconds}"
    if "waiting" in row:
        return f"waiting: {row['waiting']}"
    if "left out" in row:
        return f"{row['policy']} left out: {row['left out']}"
    if "policy" in row and "top1" in row:
        return f"{row['policy']}: {100 * row['top1']:.2f} %"
    if "epoch" in row:
        accuracy = f"  selection {100 * row['selection']:.2f} %" if "selection" in row else ""
        alarm = f"  ! {row['alarm']}" if "alarm" in row else ""
        return f"epoch {row['epoch']}/{row['epochs']}  loss {row['loss']:.4f}{accuracy}{alarm}"
    note = row.get("note") or {}
    loss = f"  loss {row['loss']:.4f}" if isinstance(row.get("loss"), float) and row["loss"] == row["loss"] else ""
    loss = loss or (f"  training loss {note['loss']:.4f}" if "loss" in note else "")
    margin = f"  class margin {note['margin']:.3f}" if "margin" in note else ""
    return f"step {row.get('step', 0)}{loss}{margin}"
