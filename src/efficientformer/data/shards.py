"""Tar shards in the webdataset convention: ``key.jpg`` beside ``key.cls`` or ``key.json``, read in place."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from efficientformer.data.listing import ListedSource, counted
from efficientformer.runtime.image import MAX_BYTES, SUFFIXES
from efficientformer.spec.errors import DataError, ImageError, reason_of
from efficientformer.spec.labels import read_names

CLASSES = "classes.txt"
MAX_CLASSES = 1 << 16  # so that one hostile number makes no endless list of class names
MAX_LABEL_BYTES = 1 << 20

_READ = 1 << 20


@dataclass(slots=True)
class _Sample:
    """Where the parts of one sample lie in its shard: (offset, size)."""

    picture: tuple[int, int] | None = None
    labels: dict[str, tuple[int, int]] = field(default_factory=dict)


class ShardSource(ListedSource):
    """Pictures in tar files, found by offsets that were listed once.

    Every read opens its shard anew: nothing is shared between threads or forked workers, and the source can be pickled.

    Args:
        shards: The tar files.
        classes: Class names; if empty, the labels' numbers as text.

    Raises:
        DataError: If a shard is damaged or hostile, or a label is missing or out of range.
    """

    def __init__(self, shards: Iterable[Path], classes: tuple[str, ...] = ()) -> None:
        self._shards = tuple(shards)
        self.unnamed = not classes
        names: list[str] = []
        labels: list[int] = []
        places: list[tuple[int, int, int]] = []
        self._other = 0
        for number, shard in enumerate(self._shards):
            for key, label, (offset, size) in self._index(shard):
                names.append(f"{shard.name}/{key}")
                labels.append(label)
                places.append((number, offset, size))
        if not names:
            expected = "samples such as key.jpg with key.cls"
            found = counted(self._other, "other file")
            hint = "A key ends at the first dot: rename pictures that have more than one in their names"
            raise DataError(
                f"No pictures in the tar files of {str(_folder(self._shards))!r}",
                expected=expected,
                found=found,
                hint=hint,
            )
        self._places = np.array(places, np.int64)
        limit, highest = len(classes) or MAX_CLASSES, max(labels)
        if highest >= limit:
            raise DataError(
                "A label in the tar files is out of range", expected=f"0 to {limit - 1}", found=str(highest)
            )
        notes = [f"{counted(self._other, 'file')} in the tar files left out"] if self._other else []
        super().__init__(names, labels, classes or map(str, range(highest + 1)), notes)

    def read(self, index: int) -> bytes:
        """Return a picture's bytes out of its shard.

        Raises:
            ImageError: If the shard cannot be read, or was cut since it was listed.
        """
        number, offset, size = self._places[index].tolist()
        try:
            with self._shards[number].open("rb") as file:
                file.seek(offset)
                data: bytes = file.read(size)
        except OSError as error:
            raise ImageError(f"Cannot read {self.name(index)!r}", found=reason_of(error)) from error
        if len(data) != size:
            raise ImageError(f"Cannot read {self.name(index)!r}", expected=f"{size:,} bytes", found=f"{len(data):,}")
        return data

    def _index(self, shard: Path) -> Iterator[tuple[str, int, tuple[int, int]]]:
        """Yield key, label and place of each picture of a shard."""
        try:
            with shard.open("rb") as file:
                samples: dict[str, _Sample] = {}
                for member in _members(file, shard):
                    self._other += not _add(samples, member, shard)
                for key, sample in samples.items():
                    if sample.picture is None:
                        self._other += len(sample.labels)
                    else:
                        yield key, _label(file, sample, f"{shard.name}/{key}"), sample.picture
        except OSError as error:
            raise _hostile(shard, reason_of(error)) from error


def open_shards(shards: list[Path]) -> ShardSource:
    """Open tar shards; ``classes.txt`` beside them or one folder above names the classes, one a line.

    Raises:
        DataError: If a shard or ``classes.txt`` cannot be used.
    """
    return ShardSource(shards, find_class_names(_folder(shards)))


def find_class_names(folder: Path) -> tuple[str, ...]:
    """Return the names in ``classes.txt`` in a folder or one above it, in the order of their labels; none without one.

    Raises:
        DataError: If the file cannot be used.
    """
    paths = (folder / CLASSES, folder.parent / CLASSES)
    return next((read_names(path) for path in paths if path.is_file()), ())


def _folder(shards: Iterable[Path]) -> Path:
    return next(iter(shards)).absolute().parent


def _members(file: IO[bytes], shard: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the plain files of a tar, each checked; tarfile itself sees to it that they lie in it whole."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                _check(member, shard)
                yield member
            end = archive.offset
    except (OSError, DataError):
        raise
    except Exception as error:  # tarfile lets ValueErrors and more out of hostile headers
        raise _hostile(shard, f"{type(error).__name__}: {error}") from error
    # tarfile ends silently at a header it cannot read, and at the end of the first of several archives in one file;
    # the samples behind it would be lost without a word.
    file.seek(end)
    while block := file.read(_READ):
        if block.count(0) < len(block):
            raise _hostile(shard, f"no valid header, or another archive, behind byte {end:,}")


def _check(member: tarfile.TarInfo, shard: Path) -> None:
    if not member.isreg() or member.issparse():
        raise _hostile(shard, f"{member.name!r}, which is a link, a device or sparse")
    if not 0 <= member.size <= MAX_BYTES:
        raise _hostile(shard, f"{member.name!r} of {member.size:,} bytes")


def _add(samples: dict[str, _Sample], member: tarfile.TarInfo, shard: Path) -> bool:
    """File a member under its key, which ends at the first dot of its base name; return whether it is of use.

    All after that dot is its ending: ``key.mask.png`` is not the picture of its sample.
    """
    folder, slash, base = member.name.rpartition("/")
    stem, _, ending = base.partition(".")
    ending = ending.lower()
    if not stem or not (ending in ("cls", "json") or f".{ending}" in SUFFIXES):
        return False
    sample = samples.setdefault(folder + slash + stem, _Sample())
    if ending in sample.labels or (sample.picture and ending not in ("cls", "json")):
        raise _hostile(shard, f"a second {member.name!r}")
    place = (member.offset_data, member.size)
    if ending in ("cls", "json"):
        sample.labels[ending] = place
    else:
        sample.picture = place
    return True


def _label(file: IO[bytes], sample: _Sample, name: str) -> int:
    """Return the label of a sample, from ``.cls`` rather than from ``.json``."""
    if not sample.labels:
        raise DataError(f"No label for {name!r}", expected="key.cls or key.json", found="neither")
    ending = "cls" if "cls" in sample.labels else "json"
    offset, size = sample.labels[ending]
    text = b""
    if size <= MAX_LABEL_BYTES:
        file.seek(offset)
        text = file.read(size)
    try:
        label = int(text.decode("ascii")) if ending == "cls" else json.loads(text)["label"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        label = None
    if type(label) is not int or not 0 <= label < MAX_CLASSES:
        expected = "a label as an ascii number" if ending == "cls" else 'a number under "label"'
        raise DataError(
            f"Cannot use {name}.{ending}", expected=f"{expected}, below {MAX_CLASSES:,}", found=repr(text[:40])
        )
    return label


def _hostile(shard: Path, found: str) -> DataError:
    hint = "Fetch or write the file again"
    return DataError(f"Cannot use the shard {str(shard)!r}", expected="a plain, whole tar file", found=found, hint=hint)
