"""Data sets in a list: a picture and its class on each line, as Kaggle, mmpretrain and spreadsheets have them."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from efficientformer.data.folders import Folder
from efficientformer.data.listing import SHOWN, FileSource, is_picture, some
from efficientformer.data.parts import PARTS, WHOLE, Opener, is_no_class, is_part_name, noted, part_of
from efficientformer.data.shards import MAX_CLASSES, find_class_names
from efficientformer.spec.errors import DataError

SUFFIXES = (".csv", ".tsv", ".txt")
PICTURE = ("file", "filename", "file_name", "filepath", "filepaths", "file_path", "path", "fname",
           "image", "image_path", "image_id", "picture")  # fmt: skip
LABEL = ("label", "class", "class_name", "category", "target", "labels")
SPLIT = ("split", "subset", "part", "partition")

METADATA = "metadata.csv"  # what Hugging Face's image folders call a list
MOST = 16  # files in a folder that are looked into
_DELIMITERS = (",", ";", "\t")
_WORDS = 80  # letters of a line in a message


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

    @property
    def is_whole(self) -> bool:
        """Whether it says a picture and a class; a quote that is never closed makes one class of many lines."""
        return bool(self.picture and self.label) and "\n" not in self.picture + self.label


def is_list(path: Path) -> bool:
    """Tell by its ending whether a file is a list of pictures."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def peek(path: Path) -> Row | None:
    """Return the first line of a list whose first picture is there.

    Of other tables and texts, and of Kaggle's ``test.csv`` without classes, there is none.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            row = next(_rows(path, file))
        return row if row.is_whole and _find(path.absolute().parent, [row]) is not None else None
    except (OSError, ValueError, csv.Error, DataError, StopIteration):
        return None


def read_rows(path: Path) -> list[Row]:
    """Read a list: ``.csv`` or ``.tsv`` with the names of the columns in the first line, or pictures and classes alone.

    A ``.txt`` holds a picture, white space, and its class, as mmpretrain's annotation files do.

    Raises:
        DataError: If it cannot be read, or a line is not a picture and a class.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(_rows(path, file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"Cannot read {str(path)!r}", expected="a list in UTF-8", found=str(error)) from error
    if not rows:
        raise DataError(f"{str(path)!r} lists nothing", expected="a picture and its class on each line")
    if bad := next((row for row in rows if not row.is_whole), None):
        found = f"line {bad.line}: picture {bad.picture[:_WORDS]!r}, class {bad.label[:_WORDS]!r}"
        raise DataError(f"A line of {str(path)!r} is not whole", expected="a picture and its class", found=found)
    return rows


def open_list(path: Path, rows: list[Row]) -> FileSource:
    """Open rows of a list; pictures are looked for from the list's folder.

    Classes that are numbers are labels; ``classes.txt`` beside the list or one folder above names them, else they are
    called by their numbers. Others are in the order of their sorted names.

    Raises:
        DataError: If none of the pictures is there, or a number is out of range.
    """
    root = path.absolute().parent
    slash = _find(root, rows)
    if slash is None:
        hint = "Write whole paths, with the ending, or put the list where they begin"
        raise DataError(f"The pictures of {str(path)!r} are not there", expected=f"files in {root}",
                        found=f"no {some([row.picture for row in islice(rows, SHOWN)])}", hint=hint)  # fmt: skip
    said = [row.label for row in rows]
    numbered = all(label.isascii() and label.isdecimal() for label in said)
    names = find_class_names(root) if numbered else tuple(sorted(set(said)))
    limit = len(names) or MAX_CLASSES
    order = {name: label for label, name in enumerate(names)}
    labels = [_number(label) if numbered else order[label] for label in said]
    if (highest := max(labels)) >= limit:
        raise DataError(f"A class in {str(path)!r} is out of range", expected=f"0 to {limit - 1}", found=f"{highest}")
    pictures = (row.picture.replace(slash, "/") for row in rows)
    source = FileSource(root, pictures, labels, names or map(str, range(highest + 1)))
    source.unnamed = not names
    unused = np.setdiff1d(np.arange(highest), source.labels)
    if source.unnamed and len(unused):
        source.notes = (f"no picture of the classes {some(map(str, unused))}, below {highest}: labels begin at 0",)
    return source


def list_parts(path: Path) -> dict[str, Opener]:
    """Return the parts of a list: those that its lines name, or the whole.

    Raises:
        DataError: If it cannot be read, or a line names another part.
    """
    groups: dict[str, list[Row]] = {}
    for row in read_rows(path):
        if row.split and not is_part_name(row.split):
            expected = f"one of {', '.join(PARTS)}, on every line or on none"
            raise DataError(f"Unknown part in line {row.line} of {str(path)!r}", expected=expected, found=row.split)
        groups.setdefault(part_of(row.split.lower()) if row.split else WHOLE, []).append(row)
    if WHOLE in groups and len(groups) > 1:
        row = groups[WHOLE][0]
        raise DataError(f"Line {row.line} of {str(path)!r} names no part", expected="one on every line or on none")
    return {part: partial(open_list, path, groups[part]) for part in (WHOLE, *PARTS) if part in groups}


def find_lists(folder: Folder) -> dict[str, Opener]:
    """Return the parts in lists called train, val and test, or in the only one beside folders that are no classes.

    Hugging Face's ``metadata.csv`` in the folder of each part makes it one, too. Of two lists for a part one is used;
    lists that are not are named in a note.
    """
    lists = [name for name in folder.files if name.lower().endswith(SUFFIXES)]
    if len(lists) > MOST:  # a text beside every picture is none
        lists = [name for name in lists if is_part_name(Path(name).stem)]
    within = [f"{name}/{METADATA}" for name in folder.folders if is_part_name(name)]
    found = {name: row for name in (*lists, *within) if (row := peek(folder.path / name)) is not None}
    named = {(Path(name).parent.name or Path(name).stem).lower(): name for name in found}
    parts = {part: next((named[each] for each in words if each in named), "") for part, words in PARTS.items()}
    alone = parts["train"] if not (parts["val"] or parts["test"]) else ""
    if len(found) == 1 and not parts["train"] and all(is_no_class(name) for name in folder.folders):
        alone = next(iter(found))
    if alone and (found[alone].split or alone != parts["train"]):  # it may divide itself
        return noted(list_parts(folder.path / alone), [name for name in found if name != alone])
    used = {part: name for part, name in parts.items() if name and parts["train"]}
    openers = {part: partial(_open_list, folder.path / name) for part, name in used.items()}
    return noted(openers, [name for name in found if name not in used.values()])


def _open_list(path: Path) -> FileSource:
    return open_list(path, read_rows(path))


def _number(label: str) -> int:
    """Return a label, or the first that is too high: Python reads no number of thousands of digits."""
    digits = label.lstrip("0")
    return min(int(digits or "0"), MAX_CLASSES) if len(digits) < 10 else MAX_CLASSES


def _find(root: Path, rows: list[Row]) -> str | None:
    """Return what divides the paths of a list, of which one at least is there; None if none is."""
    for slash in ("/", "\\"):
        # of os.path: pathlib's has an error for names that no file can have
        if any(os.path.isfile(root / row.picture.replace(slash, "/")) for row in rows):  # noqa: PTH113
            return slash
    return None


def _rows(path: Path, file: Iterator[str]) -> Iterator[Row]:
    return _split(file) if path.suffix.lower() == ".txt" else _columns(path, file)


def _split(file: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            picture, _, label = line.strip().rpartition("\t" if "\t" in line else " ")
            yield Row(picture.strip(), label, "", number)


def _columns(path: Path, file: Iterator[str]) -> Iterator[Row]:
    """Yield the lines of a table, whose columns the first one may name."""
    first = next(file, "")
    for delimiter in _DELIMITERS:
        names = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter), [])]
        columns = [_column(names, wanted) for wanted in (PICTURE, LABEL, SPLIT)]
        bare = len(names) == 2 and is_picture(names[0])
        if bare or None not in columns[:2]:
            break
    else:
        expected = f"a column {' or '.join(PICTURE[:4])} ..., and one {' or '.join(LABEL[:4])} ..."
        raise DataError(f"Cannot tell the columns of {str(path)!r}", expected=expected, found=repr(first[:_WORDS]))
    if bare:
        columns = [0, 1, None]
        yield Row(names[0], names[1], "", 1)
    reader = csv.reader(file, delimiter=delimiter)
    for cells in filter(any, reader):
        line = reader.line_num + 1
        if len(cells) > len(names):
            expected = f"{len(names)} cells, as in the first; a name with {delimiter!r} in quotes"
            found = f"line {line}: {some(cells)[:_WORDS]}"
            raise DataError(f"A line of {str(path)!r} has too many cells", expected=expected, found=found)
        picture, label, split = (cells[at].strip() if at is not None and at < len(cells) else "" for at in columns)
        yield Row(picture, label, split, line)


def _column(names: list[str], wanted: tuple[str, ...]) -> int | None:
    lower = [name.lower() for name in names]
    return next((lower.index(name) for name in wanted if name in lower), None)
