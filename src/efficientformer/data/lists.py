"""Data sets in a list: a picture and its class on each line, as Kaggle, mmpretrain and spreadsheets have them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from efficientformer.data.listing import FileSource, is_picture, some
from efficientformer.data.shards import MAX_CLASSES, find_class_names
from efficientformer.spec.errors import DataError

TABLES = (".csv", ".tsv")
SUFFIXES = (*TABLES, ".txt")
PICTURE = ("file", "filename", "file_name", "filepath", "file_path", "path", "image", "image_path", "picture")
LABEL = ("label", "class", "class_name", "category", "target", "labels")
SPLIT = ("split", "subset", "part", "partition")

_TRIED = 5  # pictures looked for when a list is opened


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a list.

    Attributes:
        picture: Path of the picture, from the list's folder.
        label: Its class: a name or a number.
        split: The part it belongs to, as the list calls it; empty where it does not say.
        line: The line's number, for messages.
    """

    picture: str
    label: str
    split: str
    line: int


def is_list(path: Path) -> bool:
    """Tell by its ending whether a file is a list of pictures."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def has_classes(path: Path) -> bool:
    """Tell whether a file is a list with classes: a table of something else is not, nor is Kaggle's ``test.csv``."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            _, (picture, label, _) = next(_lines(path, file))
    except (OSError, UnicodeDecodeError, csv.Error, DataError, StopIteration):
        return False
    return bool(picture and label)


def read_rows(path: Path) -> list[Row]:
    """Read a list: ``.csv`` or ``.tsv`` with the names of the columns in the first line, or pictures and classes alone.

    A ``.txt`` holds a picture, white space, and its class, as mmpretrain's annotation files do.

    Raises:
        DataError: If it cannot be read, or a line has no picture or no class.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [Row(*each, number) for number, each in _lines(path, file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"Cannot read {str(path)!r}", expected="a list in UTF-8", found=str(error)) from error
    if not rows:
        raise DataError(f"{str(path)!r} lists nothing", expected="a picture and its class on each line")
    if bad := next((row for row in rows if not (row.picture and row.label)), None):
        found = f"line {bad.line}: picture {bad.picture!r}, class {bad.label!r}"
        raise DataError(f"A line of {str(path)!r} is not whole", expected="a picture and its class", found=found)
    return rows


def open_list(path: Path, rows: list[Row]) -> FileSource:
    """Open rows of a list; pictures are looked for from the list's folder.

    Classes that are numbers are labels; ``classes.txt`` beside the list or one folder above names them, else they are
    called by their numbers. Others are in the order of their sorted names.

    Raises:
        DataError: If none of the first pictures is there, or a number is out of range.
    """
    root = path.absolute().parent
    tried = [row.picture for row in islice(rows, _TRIED)]
    if not any((root / name).is_file() for name in tried):
        hint = "Write whole paths, with the ending, or put the list where they begin"
        raise DataError(f"The pictures of {str(path)!r} are not there", expected=f"files in {root}",
                        found=f"no {some(tried)}", hint=hint)  # fmt: skip
    said = [row.label for row in rows]
    numbered = all(label.isascii() and label.isdecimal() for label in said)
    names = find_class_names(root) if numbered else tuple(sorted(set(said)))
    limit = len(names) or MAX_CLASSES
    order = {name: label for label, name in enumerate(names)}
    labels = [min(int(label), MAX_CLASSES) if numbered else order[label] for label in said]
    if (highest := max(labels)) >= limit:
        raise DataError(f"A class in {str(path)!r} is out of range", expected=f"0 to {limit - 1}", found=f"{highest}")
    source = FileSource(root, (row.picture for row in rows), labels, names or map(str, range(highest + 1)))
    source.unnamed = not names
    return source


def _lines(path: Path, file: Iterator[str]) -> Iterator[tuple[int, tuple[str, str, str]]]:
    """Yield the number of each line, and picture, class and part in it."""
    return _split(file) if path.suffix.lower() == ".txt" else _columns(path, file)


def _split(file: Iterator[str]) -> Iterator[tuple[int, tuple[str, str, str]]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            picture, _, label = line.strip().replace("\t", " ").rpartition(" ")
            yield number, (picture.strip(), label, "")


def _columns(path: Path, file: Iterator[str]) -> Iterator[tuple[int, tuple[str, str, str]]]:
    """Yield picture, class and part of each line, out of the columns that are called so."""
    reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    first = [cell.strip() for cell in next(reader, [])]
    picture, label, split = (_column(first, names) for names in (PICTURE, LABEL, SPLIT))
    if None in (picture, label):
        if len(first) != 2 or not is_picture(first[0]):
            expected = f"a column {' or '.join(PICTURE[:4])} ..., and one {' or '.join(LABEL[:4])} ..."
            raise DataError(f"Cannot tell the columns of {str(path)!r}", expected=expected, found=some(first))
        picture, label = 0, 1
        yield 1, (first[0], first[1], "")
    for cells in filter(None, reader):
        values = [cells[at].strip() if at is not None and at < len(cells) else "" for at in (picture, label, split)]
        yield reader.line_num, (values[0], values[1], values[2])


def _column(names: list[str], wanted: tuple[str, ...]) -> int | None:
    lower = [name.lower() for name in names]
    return next((lower.index(name) for name in wanted if name in lower), None)
