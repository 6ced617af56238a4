"""What a user names on a command line, as pictures to read: files, folders, globs, URLs and standard input.

Gathering only lists names; bytes are read one picture at a time, and a name that leads nowhere becomes an input whose
``read`` raises, so one bad name never stops the others.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO

from efficientformer.runtime.image import SUFFIXES, WILDCARDS, read_file, read_stream
from efficientformer.spec.errors import ImageError, reason_of

STDIN = "-"
READERS = 8  # inputs that are read at a time: waiting for a server takes no core

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True, slots=True)
class Input:
    """One picture to read.

    Attributes:
        name: What to print: the path or URL, or ``-`` for standard input.
    """

    name: str
    _reader: Callable[[], bytes] = field(repr=False)

    def read(self) -> bytes:
        """Return the encoded bytes, for ``image.decode(input.read(), name=input.name)``.

        Raises:
            ImageError: If there is nothing to read under this name.
        """
        return self._reader()


def is_url(name: str) -> bool:
    """Return whether a name is an address, of whatever scheme, and no file's."""
    return _SCHEME.match(name) is not None


def read_ahead(inputs: Iterable[Input], readers: Executor) -> Iterator[Input]:
    """Yield inputs that are being read already, a few of them ahead of their use.

    Args:
        inputs: What to read.
        readers: ``READERS`` threads.
    """
    coming: deque[Input] = deque()
    for each in inputs:
        coming.append(Input(each.name, readers.submit(each.read).result))
        if len(coming) > 2 * READERS:
            yield coming.popleft()
    yield from coming


def gather(
    inputs: Iterable[str | os.PathLike[str]],
    *,
    stdin: BinaryIO | None = None,
    outside: Path | None = None,
    keep: bool = False,
    offline: str = "",
) -> Iterator[Input]:
    """List the pictures behind names, lazily and in a fixed order; ``list(gather(...))`` tells how many there are.

    A file is taken whatever its ending. A folder gives every file below it with a picture's ending: sorted, hidden
    ones left out, links followed but every real folder visited once. A pattern (``*``, ``?``, ``[...]``, and ``**``
    for any depth) gives what the shell would give, unless a file has just that name. ``http`` and ``https`` URLs are
    downloaded when read. ``-`` is one picture on standard input.

    Args:
        inputs: The names.
        stdin: Where ``-`` reads; by default the process's standard input.
        outside: A folder that is left out of folders and patterns: one that is written to while they are listed.
        keep: Whether what gives its bytes only once, standard input and URLs, keeps them to be read again.
        offline: Why no connection may be made; URLs then lead nowhere. '' allows them.

    Yields:
        One input per picture, and one whose ``read`` raises for each name that leads nowhere.
    """
    stdin_taken = False
    readable: Callable[[Callable[[], bytes]], Callable[[], bytes]] = cache if keep else lambda reader: reader
    for item in [inputs] if isinstance(inputs, str) else inputs:
        text = os.fspath(item)
        if text == STDIN:
            again = _failed(STDIN, "standard input named once", "a second '-'")
            yield again if stdin_taken else Input(STDIN, readable(partial(_read_stdin, stdin)))
            stdin_taken = True
        elif is_url(text) and offline:
            yield _failed(text, f"a file while {offline}", "a URL")
        elif is_url(text):
            yield Input(text, readable(partial(_download, text)))
        elif not text:
            yield _failed("''", "a file, folder, pattern or URL", "an empty name")
        elif WILDCARDS.search(text) and not os.path.lexists(text):
            yield from _glob(text, outside)
        else:
            yield from _named(Path(text), text, outside)


def _download(url: str) -> bytes:
    """Download one picture; what that takes is imported only now: few pictures come from the net."""
    from efficientformer.runtime.fetch import fetch

    return fetch(url)


def _read_stdin(stdin: BinaryIO | None) -> bytes:
    """Return the bytes piped into the process."""
    stream = stdin or getattr(sys.stdin, "buffer", None)
    if stream is None or stream.isatty():
        found = "a terminal" if stream else "no standard input"
        hint = "Pipe a file into the command: ... - < picture.jpg"
        raise ImageError("Cannot read standard input", expected="the bytes of one picture", found=found, hint=hint)
    return read_stream(stream, "standard input")


def _raise(error: ImageError) -> bytes:
    """Raise ``error``: the reader of an input that leads nowhere (a named function, so that inputs can be pickled)."""
    raise error


def _failed(name: str, expected: str, found: str) -> Input:
    """Return an input for a name that leads nowhere."""
    error = ImageError(f"Cannot read {name!r}", expected=expected, found=found)
    return Input(name, partial(_raise, error))


def _unreadable(folder: Path, problem: OSError) -> Input:
    """Return an input for a folder that could not be listed."""
    return _failed(str(folder), "a readable folder", reason_of(problem))


def _named(path: Path, name: str, outside: Path | None) -> Iterator[Input]:
    """Yield the inputs of one named file, or of one folder but for what lies in ``outside``."""
    if not _is_folder(path):
        yield Input(name, partial(read_file, name))
        return
    empty = True
    for folder, files, problem in _walk(path):
        if _lies_in(folder, outside):
            continue
        if problem is not None:
            empty = False
            yield _unreadable(folder, problem)
        for file in files:
            if file.suffix.lower() in SUFFIXES:
                empty = False
                yield Input(str(file), partial(read_file, file))
    if empty:
        found = f"a folder without any{f' outside {outside}' if outside else ''}"
        yield _failed(name, f"files ending in {', '.join(sorted(SUFFIXES))}", found)


def _lies_in(path: Path, folder: Path | None) -> bool:
    """Tell whether a path is a folder or lies in it, wherever links lead."""
    return folder is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _walk(root: Path) -> Iterator[tuple[Path, list[Path], OSError | None]]:
    """Yield each folder below ``root`` with its files and what kept it from being read, hidden ones left out.

    Every real folder is visited once, so circles of links end.
    """
    stack, seen = [root], set()
    while stack:
        folder = stack.pop()
        files: list[Path] = []
        folders: list[Path] = []
        problem = None
        try:
            info = folder.stat()
            if (info.st_dev, info.st_ino) in seen:
                continue
            seen.add((info.st_dev, info.st_ino))
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if not entry.name.startswith("."):
                        (folders if _is_folder(entry) else files).append(folder / entry.name)
        except OSError as error:
            problem = error
        yield folder, files, problem
        stack.extend(reversed(folders))


def _is_folder(entry: Path | os.DirEntry[str]) -> bool:
    """Tell whether this is a folder that can be looked at; a name the system refuses is none."""
    with contextlib.suppress(OSError, ValueError):
        return entry.is_dir()
    return False


def _glob(pattern: str, outside: Path | None) -> Iterator[Input]:
    """Yield the inputs a pattern names, but for what lies in ``outside``.

    The standard ``glob`` is unsorted and can circle in links for hours.
    """
    parts = Path(pattern).parts
    empty = True
    for found in dict.fromkeys(_expand(Path(), parts)):  # two ** can reach one file in several ways
        if isinstance(found, Input):
            yield found
        elif _lies_in(found, outside):
            continue
        elif "**" in parts and _is_folder(found):
            continue  # what lies in it was matched by itself
        else:
            yield from _named(found, str(found), outside)
        empty = False
    if empty:
        found_nothing = f"no match{f' outside {outside}' if outside else ''}"
        yield _failed(pattern, "a pattern that matches something", found_nothing)


def _expand(base: Path, parts: tuple[str, ...]) -> Iterator[Path | Input]:
    """Yield the paths below ``base`` that match the parts of a pattern, and failures for folders that keep it out."""
    part, rest = parts[0], parts[1:]
    matches: Iterable[tuple[Path, OSError | None]]
    if part == "**":
        while rest[:1] == ("**",):
            rest = rest[1:]
        rest = rest or ("*",)
        matches = ((folder, problem) for folder, _, problem in _walk(base))
    elif WILDCARDS.search(part):
        matches = _matches(base, part)
    else:
        matches = [(base / part, None)] if os.path.lexists(base / part) else []
    for path, problem in matches:
        if problem is not None:
            yield from [] if isinstance(problem, NotADirectoryError) else [_unreadable(path, problem)]
        elif rest:
            yield from _expand(path, rest)
        else:
            yield path


def _matches(folder: Path, pattern: str) -> Iterator[tuple[Path, OSError | None]]:
    """Yield what in ``folder`` matches one part of a pattern, sorted, or the folder with what kept it from reading."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
    except OSError as error:
        yield folder, error
        return
    for name in names:
        if fnmatch.fnmatch(name, pattern) and (not name.startswith(".") or pattern.startswith(".")):
            yield folder / name, None
