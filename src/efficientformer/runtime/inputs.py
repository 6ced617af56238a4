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
import socket
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from efficientformer.runtime.image import SUFFIXES, read_file, read_stream
from efficientformer.spec.errors import ImageError

STDIN = "-"
MAX_DOWNLOAD_BYTES = 64 << 20
TIMEOUT_S = 20.0  # for a connection, and for each wait on it
DEADLINE_S = 300.0  # for a whole download, redirects and all: a byte now and then must not hold a job forever

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
        elif _SCHEME.match(text) and offline:
            yield _failed(text, f"a file while {offline}", "a URL")
        elif _SCHEME.match(text):
            yield Input(text, readable(partial(fetch, text)))
        elif not text:
            yield _failed("''", "a file, folder, pattern or URL", "an empty name")
        elif _WILDCARDS.search(text) and not os.path.lexists(text):
            yield from _glob(text, outside)
        else:
            yield from _named(Path(text), text, outside)


def fetch(
    url: str, *, timeout: float = TIMEOUT_S, deadline: float = DEADLINE_S, max_bytes: int = MAX_DOWNLOAD_BYTES
) -> bytes:
    """Download one picture into memory over http or https.

    Args:
        url: The address. Redirects are followed to http and https only.
        timeout: Seconds to wait for the connection, and for each piece of the answer.
        deadline: Seconds the whole may take.
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
    with _Deadline(deadline) as limit:
        try:
            request = urllib.request.Request(address, headers={"User-Agent": "efficientformer"})
            with _opener(limit).open(request, timeout=timeout) as response:
                return _body(response, url, limit, max_bytes)
        except (OSError, http.client.HTTPException, ValueError) as error:
            found = f"HTTP {error.code} {error.reason}" if isinstance(error, urllib.error.HTTPError) else str(error)
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            raise ImageError(
                f"Cannot download {url!r}",
                expected="a picture",
                found="the deadline passed" if limit.passed else found or type(error).__name__,
                hint="Check the address and the network, or download it by other means and name the file",
            ) from error


class _Deadline:
    """Cuts the connections of one download when its time is up, whatever they wait for.

    A socket's own timeout begins anew with every byte, so it never ends a server that sends one now and then.
    """

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()  # a number that is closed here must not be another socket's when it is cut
        for each in self._sockets:
            each.close()

    def watch(self, connected: socket.socket) -> None:
        """Have a connection end with the rest."""
        self._sockets.append(connected.dup())  # TLS takes the number away from the socket that it wraps
        if self.passed:
            self._cut()

    def _cut(self) -> None:
        self.passed = True
        for each in list(self._sockets):
            with contextlib.suppress(OSError):  # it ended by itself
                each.shutdown(socket.SHUT_RDWR)


class _Http(http.client.HTTPConnection):
    """A connection under a deadline."""

    limit: _Deadline

    def connect(self) -> None:
        """Connect, and let the deadline know."""
        super().connect()
        self.limit.watch(self.sock)


class _Https(http.client.HTTPSConnection, _Http):
    """The same with TLS, whose handshake is under the deadline too: the library connects ``_Http`` first."""


class _Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler, urllib.request.HTTPRedirectHandler):
    """Opens http and https under a deadline, and follows redirects without reading what else they say."""

    def __init__(self, limit: _Deadline) -> None:
        super().__init__()
        self._limit = limit

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Open an http address."""
        return self.do_open(partial(self._connection, _Http), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Open an https address."""
        return self.do_open(partial(self._connection, _Https), req)

    def _connection(self, kind: type[_Http], host: str, **options: Any) -> _Http:  # noqa: ANN401 (as the library's)
        connection = kind(host, **options)
        connection.limit = self._limit
        return connection

    def redirect_request(self, req: Any, fp: Any, *rest: Any) -> urllib.request.Request | None:  # noqa: ANN401
        """Close the body of a redirect: the library would read all of it, and it may have no end."""
        fp.close()
        return super().redirect_request(req, fp, *rest)


def _opener(limit: _Deadline) -> urllib.request.OpenerDirector:
    """Return an opener for http and https alone: a redirect to file, ftp or data finds no handler."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _Handler(limit),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _body(response: http.client.HTTPResponse, url: str, limit: _Deadline, max_bytes: int) -> bytes:
    """Read an answer up to ``max_bytes`` and the deadline."""
    declared = response.length
    data = bytearray()
    if (declared or 0) <= max_bytes:
        while len(data) <= max_bytes and (block := response.read1(1 << 16)):
            data += block
        if limit.passed:  # an answer that was cut looks like one that ended
            raise TimeoutError
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
