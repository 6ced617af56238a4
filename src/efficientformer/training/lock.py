"""A run folder is the work of one process at a time."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from efficientformer.spec.errors import UsageError

LOCK = "run.lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder, where the system has such locks; a lock ends with its process.

    Raises:
        UsageError: If another process is there, or the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with _opened(folder / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            hint = "Wait for it, or end it: what it has done so far is kept"
            raise UsageError(f"Another process is at work in {folder}", found=file.read(), hint=hint) from error
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def _opened(path: Path) -> TextIO:
    try:
        return path.open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"Cannot write the run folder {path.parent}", found=error.strerror or str(error)) from error
