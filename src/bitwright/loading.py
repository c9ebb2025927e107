"""From a file that was exported to a network that runs."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from bitwright.exporters import is_bank, packed


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Return the network of a packed file, or the session of a bank: in evaluation mode, frozen, on the CPU.

    A packed file gives the network itself, bit for bit. A bank, which an adaptive run exports, gives a session that takes pixels
    in 0 … 1, routes each image by its own statistics and runs the right member; see `bitwright.adaptive.session.Session`.

    Args:
        path: a packed file; or bank.json, the folder that has it and its weights, or the adaptive run that exported it.
        model: the float architecture (its values do not matter; it is left untouched). Needed unless the file names one of our own.

    Raises:
        ExportError: the file is missing, damaged, or does not fit the model.
    """
    if is_bank(Path(path)):
        from bitwright.adaptive.session import load_bank  # noqa: PLC0415  (only where it is used)

        return load_bank(path, model)
    return packed.load(path, model)
