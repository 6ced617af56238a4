"""Where fetched weights are kept, and how a kept file is told from a damaged one.

``<root>/weights/<model>/<source>/<filename>`` holds a file; ``<filename>.stamp.json`` beside it holds the size, the
modification time and the digest it had when it was last read in full, so that a later look costs no hashing. A file
without a stamp was put there by hand and is read once. A download grows in ``<filename>.part`` and gets its final
name when it is complete and checked. Folders of the same root hold other things, such as deployable files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficientformer.spec.errors import DownloadError, UsageError
from efficientformer.spec.whole import whole_file
from efficientformer.spec.zoo import WeightsSource
from efficientformer.weights.progress import Progress

HOME_VARIABLE = "EFFICIENTFORMER_HOME"
_LOCK_TIMEOUT = 3600.0  # seconds; longer than any download worth waiting for
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# Weights are binary: a safetensors header length, a zip or a pickle never reads as markup without a zero byte.
_MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?\s*<[!?A-Za-z][^\x00]*\Z")


class SourceFailedError(DownloadError):
    """One source, or its file in the cache, cannot be used; another may still do."""


class CacheError(DownloadError):
    """The cache folder cannot be written, so no source can help."""


def cache_root() -> Path:
    """Return the cache folder: $EFFICIENTFORMER_HOME, else $XDG_CACHE_HOME/efficientformer, else ~/.cache/...

    Raises:
        CacheError: If none is named, and the user, as in some containers, has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        if home := os.environ.get(HOME_VARIABLE):
            return Path(home).expanduser()
        return (Path(base) if base else Path.home() / ".cache") / "efficientformer"
    except RuntimeError as error:
        raise CacheError("There is no place for the cache", found=str(error),
                         hint=f"Set {HOME_VARIABLE} to a folder") from error  # fmt: skip


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn what the operating system says about ``folder`` into a message that says what to do.

    Raises:
        CacheError: The folder is full, read-only, or not a folder.
    """
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"Cannot write to the cache folder {folder}",
            found=str(error),
            hint=f"Make room or rights there, or set {HOME_VARIABLE} to another folder",
        ) from error


def sha256_of(path: Path) -> str:
    """Return the digest of a whole file, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def web_page(found: str) -> SourceFailedError:
    """Build the error for a web page where weights should be."""
    what = "A web page came instead of weights, perhaps a sign-in, quota or confirmation page"
    return SourceFailedError(what, found=found)


def check_file(path: Path, expected: str, found: str) -> None:
    """Refuse a file that cannot be the weights it should be.

    Args:
        path: The file.
        expected: Its digest, the first digits of it, or ''.
        found: The digest it has.

    Raises:
        SourceFailedError: It is empty, a web page, or has another digest.
    """
    with path.open("rb") as handle:
        head = handle.read(512)
    if not head:
        raise SourceFailedError("The file is empty")
    if _MARKUP.match(head):
        raise web_page("a text that begins with '<'")
    if not found.startswith(expected.lower()):
        raise SourceFailedError("The sha256 digest is wrong", expected=expected.lower(), found=found)


@dataclass(frozen=True)
class Cache:
    """A folder of fetched weights.

    Args:
        root: The folder; made when something is first put into it.
    """

    root: Path = field(default_factory=cache_root)

    def path(self, model_name: str, source: WeightsSource) -> Path:
        """Return where the file of ``source`` lies, or would lie.

        Raises:
            UsageError: A name would lead out of the cache.
        """
        for name in (model_name, source.name, source.filename):
            if not _NAME.fullmatch(name):
                raise UsageError("Illegal name in the cache", expected="letters, digits and . _ + -", found=repr(name))
        return self.root / "weights" / model_name / source.name / source.filename

    def find(self, model_name: str, source: WeightsSource, *, verify: bool = False) -> Path | None:
        """Return the cached file of ``source``, or None where there is none.

        A file that still has its stamped size and time is taken as it is; any other is read in full.

        Args:
            model_name: The model's zoo name.
            source: Where the file came from.
            verify: Read the file in full whatever its stamp says.

        Raises:
            SourceFailedError: There is a file, but not the right one.
        """
        path = self.path(model_name, source)
        try:
            status, stamp = path.stat(), _read_json(_stamp_of(path))
            recorded = str(stamp.get("sha256", ""))
            unchanged = [stamp.get("size"), stamp.get("mtime_ns")] == [status.st_size, status.st_mtime_ns]
            if unchanged and not verify and recorded.startswith(source.sha256.lower()):
                return path
            if not stat.S_ISREG(status.st_mode):
                raise SourceFailedError("It is not a file")
            digest = sha256_of(path)
            check_file(path, source.sha256 or recorded, digest)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, SourceFailedError) as error:
            raise SourceFailedError(f"The file in the cache, {path}, cannot be used", found=str(error)) from error
        _write_stamp(path, digest)
        return path

    def store(self, fetched: Path, final: Path, digest: str) -> Path:
        """Give a complete, checked file its final name, in one step.

        Args:
            fetched: The file, on the same file system as ``final``.
            final: The name it gets; a file that has it is replaced.
            digest: The sha256 of the file.

        Raises:
            CacheError: The folder cannot be written.
        """
        with writing_to(final.parent):
            # First the old stamp: a stop between the two steps must leave a file without a stamp, not a wrong one.
            _stamp_of(final).unlink(missing_ok=True)
            fetched.replace(final)
        _write_stamp(final, digest)
        return final

    def adopt(self, file: Path, final: Path, expected: str) -> Path:
        """Take over a copy of a file of another cache.

        Raises:
            SourceFailedError: It is not the file it should be.
            CacheError: The folder cannot be written.
        """
        digest = sha256_of(file)
        check_file(file, expected, digest)
        copy = final.with_name(f"{final.name}.copy")
        try:
            with writing_to(final.parent):
                # Not a hard link: whoever overwrites our file in place would change the other cache with it.
                shutil.copyfile(file, copy)
            return self.store(copy, final, digest)
        finally:
            with suppress(OSError):
                copy.unlink()

    @contextmanager
    def lock(self, path: Path, progress: Progress) -> Iterator[None]:
        """Keep every other process from fetching ``path`` meanwhile.

        Raises:
            CacheError: The folder cannot be made or written.
            SourceFailedError: Another process holds the lock for an hour.
        """
        with ExitStack() as stack:
            with writing_to(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
                taken = _take_lock(stack, path, 1.0)
                if not taken:
                    progress(f"waiting for another process that fetches {path.name}", 0, None)
                    taken = _take_lock(stack, path, _LOCK_TIMEOUT)
            if not taken:
                raise SourceFailedError(f"Another process has held {path}.lock for too long")
            yield


@dataclass(frozen=True)
class Part:
    """A file on its way, which a later call or process can take up again.

    Args:
        path: Where the bytes go; ``<path>.json`` tells what they are a part of.
    """

    path: Path

    def open(self, url: str) -> tuple[int, str, int | None]:
        """Return how much is here, the server's mark of that version, and its full size; (0, '', None) for nothing."""
        state = _read_json(self._state)
        size, total = self.path.stat().st_size if self.path.is_file() else 0, state.get("total")
        if state.get("url") != url or not isinstance(total, int) or not 0 < size < total:
            return 0, "", None
        return size, str(state.get("validator", "")), total

    def restart(self, url: str, validator: str, total: int | None) -> None:
        """Throw away what is here and note what comes now."""
        self.discard()
        with writing_to(self.path.parent):
            self.path.touch()
            _write_json(self._state, {"url": url, "validator": validator, "total": total})

    def require_space(self, size: int) -> None:
        """Raise CacheError unless ``size`` more bytes fit on the disk."""
        with writing_to(self.path.parent):
            free = shutil.disk_usage(self.path.parent).free
            if free < size:
                raise OSError(f"{free / 1e6:.0f} MB free where {size / 1e6:.0f} MB are needed")

    def discard(self) -> None:
        """Remove the part and what was noted about it."""
        with writing_to(self.path.parent):
            self.path.unlink(missing_ok=True)
            self._state.unlink(missing_ok=True)

    @property
    def _state(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")


def hub_cached(repo: str, revision: str, filename: str) -> Path | None:
    """Return a file that is in the cache of ``huggingface_hub``, which all programs share, if there is one."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, filename, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _take_lock(stack: ExitStack, path: Path, seconds: float) -> bool:
    # filelock, with a way out where a file system has no locks
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    try:
        stack.enter_context(WeakFileLock(f"{path}.lock", timeout=seconds))
    except TimeoutError:
        return False
    return True


def _stamp_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.stamp.json")


def _write_stamp(path: Path, digest: str) -> None:
    """Record what a file is; a cache that can only be read goes without, at the price of hashing each time."""
    with suppress(OSError):
        status = path.stat()
        _write_json(_stamp_of(path), {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest})


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a small file of ours; one that cannot be read says nothing."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    with whole_file(path) as draft:
        draft.write_text(json.dumps(data), encoding="utf-8")
