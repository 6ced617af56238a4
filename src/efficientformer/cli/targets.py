"""Where a verb is told to write: that it cannot is found out before the work, which may take hours, not after it."""

from __future__ import annotations

import os
from pathlib import Path

from efficientformer.spec.errors import UsageError, reason_of


def check_file(path: Path) -> None:
    """Raise UsageError unless a file of this name can be written."""
    if not _exists(path):
        found = "" if _is_writable(path.absolute().parent) else "no writable folder to put it in"
    elif path.is_dir():
        found = "a folder"
    else:
        found = "" if os.access(path, os.W_OK) else "a file that is not to be written"
    if found:
        raise UsageError(f"Cannot write {path}", expected="a file in a writable folder", found=found)


def check_folder(folder: Path) -> None:
    """Raise UsageError unless a folder can be made here, and written to; nothing is made yet."""
    if not _is_writable(next(each for each in (folder.absolute(), *folder.absolute().parents) if _exists(each))):
        raise UsageError(f"Cannot write to {folder}", expected="a folder that can be made and written")


def prepare_folder(folder: Path) -> None:
    """Create a folder.

    Raises:
        UsageError: If that is impossible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"Cannot create the folder {folder}", found=reason_of(error)) from error


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK) and folder.is_dir()


def _exists(path: Path) -> bool:
    return os.access(path, os.F_OK)  # in a folder that is closed to us nothing does; Path.exists would raise
