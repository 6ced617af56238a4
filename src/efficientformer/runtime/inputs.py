"""What a user names on a command line, as pictures to read: files, folders, globs, URLs and standard input.

Gathering only lists names; bytes are read one picture at a time, and a name that leads nowhere becomes an input whose
``read`` raises, so one bad name never stops the others.
"""

from __future__ import annotations

import contextlib
import fnmatch
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from efficientformer.runtime.image import SUFFIXES, read_file, read_stream
from efficientformer.spec.errors import ImageError

STDIN = "-"
MAX_DOWNLOAD_BYTES = 64 << 20
TIMEOUT_S = 20.0  # for a connection, and for each wait on it
DEADLINE_S = 300.0  # for a whole download: a server that sends a byte now and then must not hold a job forever

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_WILDCARDS = re.compile(r"[*?\[]")


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


def gather(inputs: Iterable[str | os.PathLike[str]], *, stdin: BinaryIO | None = None) -> Iterator[Input]:
    """List the pictures behind names, lazily and in a fixed order; ``list(gather(...))`` tells how many there are.

    A file is taken whatever its ending. A folder gives every file below it with a picture's ending: sorted, hidden
    ones left out, links followed but every real folder visited once. A pattern (``*``, ``?``, ``[...]``, and ``**``
    for any depth) gives what the shell would give, unless a file has just that name. ``http`` and ``https`` URLs are
    downloaded when read. ``-`` is one picture on standard input.

    Args:
        inputs: The names.
        stdin: Where ``-`` reads; by default the process's standard input.

    Yields:
        One input per picture, and one whose ``read`` raises for each name that leads nowhere.
    """
    stdin_taken = False
    for item in [inputs] if isinstance(inputs, str) else inputs:
        text = os.fspath(item)
        scheme = _SCHEME.match(text)
        if text == STDIN:
            again = _failed(STDIN, "standard input named once", "a second '-'")
            yield again if stdin_taken else Input(STDIN, partial(_read_stdin, stdin))
            stdin_taken = True
        elif scheme:
            yield Input(text, partial(fetch, text))
        elif not text:
            yield _failed("''", "a file, folder, pattern or URL", "an empty name")
        elif _WILDCARDS.search(text) and not os.path.lexists(text):
            yield from _glob(text)
        else:
            yield from _named(Path(text), text)


def fetch(
    url: str, *, timeout: float = TIMEOUT_S, deadline: float = DEADLINE_S, max_bytes: int = MAX_DOWNLOAD_BYTES
) -> bytes:
    """Download one picture into memory over http or https.

    Args:
        url: The address. Redirects are followed to http and https only.
        timeout: Seconds to wait for the connection, and for each piece of the answer.
        deadline: Seconds the body may take in all.
        max_bytes: Larger answers are refused.

    Returns:
        The body.

    Raises:
        ImageError: If the address is illegal, the server fails or is too slow, or the answer is too large or cut short.
    """
    scheme = _SCHEME.match(url)
    if scheme is None or scheme[1].lower() not in ("http", "https"):
        hint = "Name a local file by its path, without a scheme"
        raise ImageError("Cannot read this kind of address", expected="http:// or https://", found=repr(url), hint=hint)
    # Addresses pasted from a browser's bar hold spaces and accents.
    address = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    end = time.monotonic() + deadline
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "efficientformer"})
        with _opener().open(request, timeout=timeout) as response:
            return _body(response, url, end, max_bytes)
    except (OSError, http.client.HTTPException, ValueError) as error:
        found = f"HTTP {error.code} {error.reason}" if isinstance(error, urllib.error.HTTPError) else str(error)
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise ImageError(
            f"Cannot download {url!r}",
            expected="a picture",
            found=found or type(error).__name__,
            hint="Check the address and the network, or download it by other means and name the file",
        ) from error


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for http and https alone: a redirect to file, ftp or data finds no handler."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _body(response: http.client.HTTPResponse, url: str, end: float, max_bytes: int) -> bytes:
    """Read an answer up to ``max_bytes`` and until ``time.monotonic()`` passes ``end``."""
    declared = response.length
    data = bytearray()
    if (declared or 0) <= max_bytes:
        while len(data) <= max_bytes and (block := response.read1(1 << 16)):
            data += block
            if time.monotonic() > end:
                raise ImageError(f"Cannot download {url!r}", expected="a faster server", found="the deadline passed")
    if max(len(data), declared or 0) > max_bytes:
        expected, found = f"at most {max_bytes:,} bytes", f"{max(len(data), declared or 0):,} or more"
        raise ImageError(f"{url!r} is too large", expected=expected, found=found)
    if declared is not None and len(data) < declared:
        found = f"{len(data):,} before the connection ended"
        raise ImageError(f"Cannot download {url!r}", expected=f"{declared:,} bytes", found=found, hint="Try again")
    return bytes(data)


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


def _failed(name: str, expected: str, found: str, hint: str = "") -> Input:
    """Return an input for a name that leads nowhere."""
    error = ImageError(f"Cannot read {name!r}", expected=expected, found=found, hint=hint)
    return Input(name, partial(_raise, error))


def _unreadable(folder: Path, problem: OSError) -> Input:
    """Return an input for a folder that could not be listed."""
    return _failed(str(folder), "a readable folder", problem.strerror or str(problem))


def _named(path: Path, name: str) -> Iterator[Input]:
    """Yield the inputs of one named file or folder."""
    if not _is_folder(path):
        yield Input(name, partial(read_file, name))
        return
    empty = True
    for folder, files, problem in _walk(path):
        if problem is not None:
            empty = False
            yield _unreadable(folder, problem)
        for file in files:
            if file.suffix.lower() in SUFFIXES:
                empty = False
                yield Input(str(file), partial(read_file, file))
    if empty:
        yield _failed(name, f"files ending in {', '.join(sorted(SUFFIXES))}", "a folder without any")


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


def _glob(pattern: str) -> Iterator[Input]:
    """Yield the inputs a pattern names; the standard ``glob`` is unsorted and can circle in links for hours."""
    parts = Path(pattern).parts
    empty = True
    for found in dict.fromkeys(_expand(Path(), parts)):  # two ** can reach one file in several ways
        if isinstance(found, Input):
            yield found
        elif "**" in parts and _is_folder(found):
            continue  # what lies in it was matched by itself
        else:
            yield from _named(found, str(found))
        empty = False
    if empty:
        yield _failed(pattern, "a pattern that matches something", "no match")


def _expand(base: Path, parts: tuple[str, ...]) -> Iterator[Path | Input]:
    """Yield the paths below ``base`` that match the parts of a pattern, and failures for folders that keep it out."""
    part, rest = parts[0], parts[1:]
    matches: Iterable[tuple[Path, OSError | None]]
    if part == "**":
        while rest[:1] == ("**",):
            rest = rest[1:]
        rest = rest or ("*",)
        matches = ((folder, problem) for folder, _, problem in _walk(base))
    elif _WILDCARDS.search(part):
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
