"""A file as a sign that a process is at work. Standard library only."""

from __future__ import annotations

from typing import IO


def try_lock(file: IO[bytes] | IO[str]) -> bool | None:
    """Lock an open file until it is closed or the process ends, however it ends.

    Returns:
        False if another process, or another opening of it in this one, holds it; None where the system or the file
        system has no such locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
