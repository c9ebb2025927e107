"""Claims: several processes of one machine share work by holding folders; a process that dies, however, lets go of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on this system: one process at a time is then the user's care
    fcntl = None  # type: ignore[assignment]


@contextmanager
def claim(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a folder, made if it is missing, while the block runs; yield whether it is held.

    Args:
        folder: what to hold; nothing is written into it.
        wait: wait for another process that holds it, instead of yielding False at once.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with claim(folder) as first, claim(folder) as second:
    ...     print(first, second)
    True False
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _locked(descriptor, wait=wait)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
