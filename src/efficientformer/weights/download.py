"""Fetching weights: from the cache, else from the first source that delivers what it promised.

Hub addresses go through ``huggingface_hub`` (mirrors, tokens, its own transfer protocol), others through plain HTTP.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from efficientformer.spec.errors import DownloadError
from efficientformer.spec.zoo import WeightsSource
from efficientformer.weights.cache import (
    Cache,
    Part,
    SourceFailedError,
    check_file,
    hub_cached,
    sha256_of,
    web_page,
    writing_to,
)
from efficientformer.weights.progress import Progress, silent

OFFLINE_VARIABLES = ("EFFICIENTFORMER_OFFLINE", "HF_HUB_OFFLINE")
_CHUNK = 1 << 20
_RETRY_CODES = frozenset({408, 416, 425, 429, 500, 502, 503, 504})
HUB_URL = re.compile(r"https://(?:huggingface\.co|hf\.co)/([^/?]+/[^/?]+)/(?:resolve|blob)/([^/?]+)/([^?]+)(?:\?.*)?")


@dataclass(frozen=True)
class Limits:
    """How patient and how trusting a download is.

    Args:
        timeout: Seconds without a sign of life from a server.
        attempts: Tries per source where a fault may pass.
        backoff: Seconds before the second try; doubled before each further one.
        max_bytes: The largest file accepted.
    """

    timeout: float = 20.0
    attempts: int = 4
    backoff: float = 1.0
    max_bytes: int = 2 << 30

    def check_size(self, size: int) -> None:
        """Raise SourceFailedError if ``size`` bytes are too many."""
        if size > self.max_bytes:
            raise SourceFailedError(
                "The file is too large", expected=f"at most {self.max_bytes} bytes", found=f"{size}"
            )


def offline_reason(offline: bool | None = None) -> str:
    """Return why no connection may be made, or '' if one may; an explicit True or False beats the environment."""
    if offline is not None:
        return "offline=True" if offline else ""
    for name in OFFLINE_VARIABLES:
        if os.environ.get(name, "").lower() in {"1", "on", "yes", "true"}:
            return f"{name}={os.environ[name]}"
    return ""


def fetch(
    model_name: str,
    sources: Iterable[WeightsSource],
    *,
    offline: bool | None = None,
    progress: Progress | None = None,
    cache: Cache | None = None,
    verify: bool = False,
    limits: Limits | None = None,
) -> Path:
    """Return a local file with a model's weights, downloading it if no source's file is in the cache.

    Args:
        model_name: The model's zoo name; names its folder in the cache.
        sources: Where the weights are published, best first.
        offline: Forbid (True) or allow (False) connections; None asks the environment.
        progress: Told how the download goes; None prints nothing.
        cache: Another cache than the user's.
        verify: Read a cached file in full instead of trusting its size and time.
        limits: Other limits than the default ones.

    Raises:
        DownloadError: No source delivered; the message says why for each, and how to put a file there by hand.
        CacheError: The cache folder cannot be written.
        UsageError: A name that cannot be a file name.
    """
    sources, cache, reason = tuple(sources), cache or Cache(), offline_reason(offline)
    options = (verify, progress or silent, limits or Limits())
    failures = []
    for source in sources:
        try:
            if found := cache.find(model_name, source, verify=verify):
                return found
        except SourceFailedError as error:
            failures.append(f"{source.name}: {error}")
            logging.getLogger(__name__).warning("%s", error)
    for source in sources:
        try:
            return _Job(cache, model_name, source, *options).run(reason)
        except SourceFailedError as error:
            failures.append(f"{source.name}: {error}")
    offers = "".join(f"\n  {source.url}\n    -> {cache.path(model_name, source)}" for source in sources if source.url)
    by_hand = f"\nTo put a file there by hand, save any of these under the name given:{offers}\n" if offers else ""
    raise DownloadError(
        f"No weights for {model_name}" + (f" are here, and {reason} forbids connections" if reason else ""),
        found="".join(f"\n  {failure}" for failure in failures) or "no source that publishes them",
        hint=f"{by_hand}Any published layout is recognised. Or give a weights file as the model",
    )


@dataclass(frozen=True)
class _Job:
    """Bringing the file of one source into the cache."""

    cache: Cache
    model_name: str
    source: WeightsSource
    verify: bool
    progress: Progress
    limits: Limits

    def run(self, offline: str) -> Path:
        """Return the file, under its final name."""
        final = self.cache.path(self.model_name, self.source)
        match = HUB_URL.fullmatch(self.source.url)
        hub = [unquote(group) for group in match.groups()] if match else None
        shared = hub_cached(*hub) if hub else None
        if offline and not shared:
            raise SourceFailedError(f"Not in the cache ({final})")
        with self.cache.lock(final, self.progress):
            with suppress(SourceFailedError):  # a damaged file is what this is about to replace
                if found := self.cache.find(self.model_name, self.source, verify=self.verify):
                    return found  # another process was faster
            if shared:
                with nullcontext() if offline else suppress(SourceFailedError):
                    return self.cache.adopt(shared, final, self.source.sha256)
            return self._from_hub(final, *hub) if hub else self._from_http(final)

    def _report(self, done: int, total: int | None) -> None:
        self.progress(f"{self.model_name} ({self.source.name})", done, total)

    def _from_http(self, final: Path) -> Path:
        part = Part(final.with_name(f"{final.name}.part"))
        digest = _HttpTransfer(self.source.url, self.source.sha256, part, self.limits, self._report).run()
        path = self.cache.store(part.path, final, digest)
        part.discard()
        return path

    def _from_hub(self, final: Path, repo: str, revision: str, filename: str) -> Path:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        folder = final.with_name(f"{final.name}.hub")
        endpoint = hub_endpoint()
        try:
            # A look first: it fails at once where hf_hub_download retries for minutes, and it knows the size.
            url = hf_hub_url(repo, filename, revision=revision, endpoint=endpoint)
            facts = get_hf_file_metadata(url, timeout=self.limits.timeout)
            self.limits.check_size(facts.size or 0)
            revision, bar = facts.commit_hash or revision, hub_bar(self._report)
            path = hf_hub_download(
                repo, filename, revision=revision, local_dir=folder, endpoint=endpoint, tqdm_class=bar
            )
            fetched, digest = Path(path), sha256_of(Path(path))
            published = "".join(re.findall(r"^[0-9a-f]{64}$", facts.etag or ""))  # the hub's tag of a large file
            check_file(fetched, self.source.sha256 or published, digest)
            stored = self.cache.store(fetched, final, digest)
        except DownloadError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except Exception as error:  # of whatever library it stands on: httpx, requests, xet
            if isinstance(error, OSError) and error.errno:  # the disk; what comes from a connection has no number
                with writing_to(folder):
                    raise
            raise SourceFailedError("huggingface_hub gave up", found=say(error)) from error
        shutil.rmtree(folder, ignore_errors=True)  # after a stop or a lost connection it stays, for the next try
        return stored


def hub_endpoint() -> str | None:
    """Return the hub that the environment names now, None for the usual one; the library looks only when imported."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def hub_bar(report: Callable[[int, int | None], None]) -> Any:  # noqa: ANN401 (a class of tqdm's kind)
    """Return a progress bar class for ``huggingface_hub`` that draws nothing and reports instead."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    most = 0  # over all bars: one transfer may have one for what came and one for what was put together

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]
            self.size, self.here = kwargs.get("total"), int(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            nonlocal most
            self.here += int(n or 0)
            most = max(most, self.here)
            report(most, self.size)

    return Bar


def say(error: BaseException) -> str:
    """Return an error of another library in one line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 240)


class _TransientError(SourceFailedError):
    """A fault that may pass: worth another try."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        before, after = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if after != "https" and (before, after) != ("http", "http"):
            raise SourceFailedError("A redirect was refused", expected="http or https, never less safe", found=newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for http and https alone; the default one would also read local files."""
    opener, lib = urllib.request.OpenerDirector(), urllib.request
    errors = (lib.HTTPDefaultErrorHandler(), lib.HTTPErrorProcessor(), lib.UnknownHandler(), _Redirects())
    for handler in (*errors, lib.ProxyHandler(), lib.HTTPHandler(), lib.HTTPSHandler()):
        opener.add_handler(handler)
    return opener


@dataclass(frozen=True)
class _HttpTransfer:
    """The plain way to bring a file into a part; the cache's lock keeps others away from it."""

    url: str
    sha256: str
    part: Part
    limits: Limits
    report: Callable[[int, int | None], None]

    def run(self) -> str:
        """Fetch the whole file and return its digest."""
        last = ""
        for attempt in range(self.limits.attempts):
            time.sleep(self.limits.backoff * 2 ** (attempt - 1) if attempt else 0)
            try:
                return self._attempt()
            except _TransientError as error:
                last = str(error)
        raise SourceFailedError(f"{self.limits.attempts} tries failed", found=last)

    def _attempt(self) -> str:
        offset, mark, total = self.part.open(self.url)
        if not (mark or self.sha256):  # nothing would tell that the rest is of another version
            offset = 0
        with self._request(offset, mark) as response:
            offset, total = self._agree(response, offset, mark, total)
            try:
                digest = self._receive(response, offset, total)
                check_file(self.part.path, self.sha256, digest)
            except _TransientError:
                raise
            except SourceFailedError as error:
                self.part.discard()
                if offset:  # perhaps only the old bytes were bad
                    raise _TransientError(str(error)) from None
                raise
        return digest

    def _request(self, offset: int, mark: str) -> HTTPResponse:
        headers = {"User-Agent": "efficientformer", "Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={offset}-"} if offset else {}
        headers |= {"If-Range": mark} if offset and mark else {}
        try:
            request = urllib.request.Request(self.url, headers=headers)
            response: HTTPResponse = _opener().open(request, timeout=self.limits.timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # nothing at that offset
                self.part.discard()
            kind = _TransientError if error.code in _RETRY_CODES else SourceFailedError
            raise kind(f"The server answers {error.code} {error.reason}") from None
        except urllib.error.URLError as error:
            # A server that is unknown, refuses or is not trusted will not change in seconds: on to the next source.
            kind = _TransientError if isinstance(error.reason, ConnectionResetError) else SourceFailedError
            raise kind(f"No connection: {error.reason}") from None
        except (OSError, HTTPException) as error:
            raise _TransientError(f"No answer: {say(error)}") from None
        except ValueError as error:
            raise SourceFailedError(f"Not an address: {error}") from None
        return response

    def _agree(self, response: HTTPResponse, offset: int, mark: str, total: int | None) -> tuple[int, int | None]:
        """Return where the answer begins in the file, and the file's size (None: nobody says)."""
        kind, headers = response.headers.get_content_type(), response.headers
        if kind in {"text/html", "application/xhtml+xml"}:
            raise web_page(f"content type {kind}")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise SourceFailedError("The server compresses the file, unasked")
        etag = headers.get("ETag", "")
        new_mark = etag if etag.startswith('"') else headers.get("Last-Modified", "")  # If-Range takes no weak tag
        if response.status == 206:  # a part, as asked for
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
            if not span or (int(span[1]), int(span[2])) != (offset, total) or new_mark not in ("", mark):
                self.part.discard()
                raise _TransientError("The file on the server has changed since the download began")
            return offset, total
        length = headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
        if total is None and not response.chunked and not self.sha256:
            raise SourceFailedError("Nothing says how long the file is, so a cut would go unseen")
        self.limits.check_size(total or 0)
        self.part.restart(self.url, new_mark, total)
        self.part.require_space(total or 0)
        return 0, total

    def _receive(self, response: HTTPResponse, offset: int, total: int | None) -> str:
        done = offset
        with writing_to(self.part.path.parent), self.part.path.open("r+b") as handle:
            digest = hashlib.file_digest(handle, "sha256")  # the old bytes count too
            while chunk := _read(response):
                done += len(chunk)
                self.limits.check_size(done)
                handle.write(chunk)
                digest.update(chunk)
                self.report(done, total)
            handle.flush()
            os.fsync(handle.fileno())
        if total is not None and done != total:
            raise _TransientError(f"The connection ended after {done} of {total} bytes")
        return digest.hexdigest()


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read1(_CHUNK)
    except (OSError, HTTPException) as error:
        raise _TransientError(f"The connection broke: {say(error)}") from None
