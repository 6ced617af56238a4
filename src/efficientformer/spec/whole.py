"""Files that are there whole or not at all: written under a hidden name beside their own, which they get at the end."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from efficientformer.spec.errors import UsageError, reason_of

_MAX_NAME = 200  # bytes of a name that its hidden file has too


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a hidden file that gets its name, once it is on disk, when the block ends well, and vanishes if it does not.

    Raises:
        OSError: If ``path`` is a folder, or no file can be created, brought to disk or named there.
    """
    if path.is_dir():
        raise IsADirectoryError("it is a folder")
    with hidden_file(path) as temporary:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def hidden_file(path: Path) -> Iterator[Path]:
    """Give a hidden file beside a path, which vanishes with the block unless it got another name.

    Raises:
        OSError: If no file can be created there.
    """
    name = os.fsdecode(os.fsencode(path.name)[:_MAX_NAME])  # file systems have a limit
    temporary = path.with_name(f".{name}.{secrets.token_hex(4)}.partial")
    temporary.touch(exist_ok=False)  # with the permissions that the umask gives; tempfile's are their owner's alone
    try:
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink()


def half_written(path: Path) -> bool:
    """Whether a file is what a process that was killed had half written: its name is one that ``hidden_file`` gives."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.partial", path.name) is not None


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8: a file whole or not at all, so that an earlier one is not lost.

    A pipe or a device is written as it is, as is a file in a folder that takes no other, and a link stays one.

    Raises:
        UsageError: If it cannot be written.
    """
    with named_by(path):
        target = Path(os.path.realpath(path))
        if path.exists() and not (path.is_file() and os.access(target.parent, os.W_OK)):
            path.write_text(text, "utf-8")
            return
        with whole_file(target) as temporary:
            temporary.write_text(text, "utf-8")


@contextmanager
def named_by(path: Path) -> Iterator[None]:
    """Turn what the operating system says against a user's file into an error that names the file.

    Raises:
        UsageError: On any OSError.
    """
    try:
        yield
    except OSError as error:
        hint = "Choose a file in a writable folder"
        raise UsageError(f"Cannot write {path}", found=reason_of(error), hint=hint) from error
