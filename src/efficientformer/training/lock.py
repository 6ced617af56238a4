"""A run folder is the work of one process at a time."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from efficientformer.runtime.lock import try_lock
from efficientformer.spec.errors import UsageError, reason_of

LOCK = "run.lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder, where the system has such locks; a lock ends with its process.

    Raises:
        UsageError: If another process is there, or the folder cannot be written.
    """
    path = folder / LOCK
    with _opened(path) as file:
        held = try_lock(file)
        # whoever held it may have removed it just now: then it is another file by that name which counts
        if held is False or (held and not _is_at(file, path)):
            file.seek(0)
            hint = "Wait for it, or end it: what it has done so far is kept"
            raise UsageError(f"Another process is at work in {folder}", found=file.read(), hint=hint)
        if held:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
    path.unlink(missing_ok=True)
    yield


def _is_at(file: TextIO, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _opened(path: Path) -> TextIO:
    try:
        return path.open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"Cannot write the run folder {path.parent}", found=reason_of(error)) from error
