"""What the listed data sets share: names packed so that workers do not copy them, and notes on what was left out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from efficientformer.data.source import ImageSource
from efficientformer.runtime.image import SUFFIXES, read_file

SHOWN = 5  # names in a message


class Names:
    """Many names in one block of bytes.

    A list of a million strings takes a third more memory, and forked workers would copy all of it: reading a Python
    object counts its references, which writes to its page.

    Args:
        names: The names, in order.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._data = b"".join(encoded)

    def __getitem__(self, index: int) -> str:
        start, end = self._ends[index], self._ends[index + 1]
        return os.fsdecode(self._data[start:end])


class ListedSource(ImageSource):
    """A data set whose pictures were listed when it was opened.

    Args:
        names: Name of every picture.
        labels: Label of every picture.
        classes: Class names in order of their labels.
        notes: What a user should know about the listing: files and folders that were left out.
    """

    def __init__(
        self,
        names: Iterable[str],
        labels: Iterable[int] | npt.NDArray[np.int64],
        classes: Iterable[str],
        notes: Iterable[str] = (),
    ) -> None:
        self._names = Names(names)
        self.labels = np.asarray(labels if isinstance(labels, np.ndarray) else list(labels), np.int64)
        self.classes = tuple(classes)
        self.notes = tuple(notes)

    def name(self, index: int) -> str:
        """Return what people call a picture."""
        return self._names[range(len(self))[index]]


class FileSource(ListedSource):
    """Pictures in files below one folder; a picture's name is its path from there.

    Args:
        root: The folder.
        names: Path of every picture below it.
        labels: Label of every picture.
        classes: Class names in order of their labels.
        notes: What a user should know about the listing.
    """

    def __init__(
        self,
        root: Path,
        names: Iterable[str],
        labels: Iterable[int] | npt.NDArray[np.int64],
        classes: Iterable[str],
        notes: Iterable[str] = (),
    ) -> None:
        super().__init__(names, labels, classes, notes)
        self.root = root

    def read(self, index: int) -> bytes:
        """Return a picture's file.

        Raises:
            ImageError: If it cannot be read.
        """
        return read_file(os.path.join(self.root, self.name(index)))  # noqa: PTH118 (Path costs 5 us a picture)


def is_picture(name: str) -> bool:
    """Tell by its ending whether a file is a picture."""
    return name[name.rfind(".") :].lower() in SUFFIXES


def counted(number: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun: ``1 file``, ``2,000 files``."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def some(names: Iterable[str]) -> str:
    """Return the first names of many for a message, with how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN:,} more" if len(listed) > SHOWN else ""
    return ", ".join(map(repr, listed[:SHOWN])) + more
