"""Downloading one picture over http or https, within a size and a time."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from functools import partial
from typing import Any

from efficientformer.spec.errors import ImageError

MAX_DOWNLOAD_BYTES = 64 << 20
TIMEOUT_S = 20.0  # for a connection, and for each wait on it
DEADLINE_S = 300.0  # for a whole download, redirects and all: a byte now and then must not hold a job forever

_ADDRESS = re.compile("https?://", re.IGNORECASE)


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
    if not _ADDRESS.match(url):
        hint = "Name a local file by its path, without a scheme; a folder in a cluster's storage is read with --ray"
        raise ImageError("Cannot read this kind of address", expected="http:// or https://", found=repr(url), hint=hint)
    with _Deadline(deadline) as limit:
        try:
            request = urllib.request.Request(_in_ascii(url), headers={"User-Agent": "efficientformer"})
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


def _in_ascii(url: str) -> str:
    """Return an address as servers are asked for it: one pasted from a browser's bar holds spaces and accents.

    Raises:
        ValueError: If no host can have such a name.
    """
    scheme, host, rest = re.fullmatch(r"(\w+://)([^/?#]*)(.*)", url, re.DOTALL).groups()  # type: ignore[union-attr]
    host = host if host.isascii() else host.encode("idna").decode()
    return urllib.parse.quote(scheme + host + rest, safe="%/:=&?~#+!$,;'@()*[]", errors="surrogateescape")


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
