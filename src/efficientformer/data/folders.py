"""Data sets in folders: one folder a class, or pictures named by their synset."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from efficientformer.data.listing import FileSource, counted, is_picture, some
from efficientformer.spec.errors import DataError, reason_of
from efficientformer.spec.labels import label_names, synset_labels, synsets

_SYNSET_FILE = re.compile(r"(n\d{8})_")


@dataclass(frozen=True, slots=True)
class Folder:
    """What lies directly in a folder, sorted, hidden entries left out.

    Attributes:
        path: The folder.
        folders: Names of the folders in it; links to folders count.
        files: Names of all else.
    """

    path: Path
    folders: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def pictures(self) -> list[str]:
        """Names of the files that are pictures by their ending."""
        return [name for name in self.files if is_picture(name)]


def list_folder(path: str | Path) -> Folder:
    """List a folder.

    Raises:
        DataError: If it cannot be read.
    """
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if _is_folder(entry) else files).append(entry.name)
    except OSError as error:
        raise DataError(
            f"Cannot list {os.fspath(path)!r}", expected="a readable folder", found=reason_of(error)
        ) from error
    return Folder(Path(path), tuple(sorted(folders)), tuple(sorted(files)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circle of links
        return False


def open_class_folders(folder: Folder) -> FileSource:
    """Open ``DIR/CLASS/**/picture``: labels in the order of the sorted class names.

    Folders named by all synsets of ImageNet-1k get its labels and class names. Empty class folders are no classes.

    Raises:
        DataError: If no folder holds a picture, or one cannot be read.
    """
    names: list[str] = []
    labels: list[int] = []
    classes: list[str] = []
    empty: list[str] = []
    other = len(folder.files)
    for name in folder.folders:
        before = len(names)
        for path in _walk(folder.path, name):
            if is_picture(path):
                names.append(path)
            else:
                other += 1
        if len(names) == before:
            empty.append(name)
            continue
        labels += [len(classes)] * (len(names) - before)
        classes.append(name)
    if not names:
        raise DataError(
            f"No pictures in the class folders of {str(folder.path)!r}",
            expected="DIR/CLASS/picture.jpg",
            found=f"{counted(len(empty), 'folder')} and {counted(other, 'other file')}",
        )
    notes = [f"{counted(other, 'file')} left out: not a picture in a class folder"] if other else []
    if empty:
        notes.append(f"{counted(len(empty), 'folder')} without pictures left out: {some(empty)}")
    if tuple(classes) == tuple(sorted(synsets())):
        order = synset_labels()
        labels = [order[classes[label]] for label in labels]
        classes = list(label_names("imagenet1k"))
    return FileSource(folder.path, names, labels, classes, notes)


def _walk(root: Path, top: str) -> Iterator[str]:
    """Yield every file below ``root/top`` as a path from ``root``; every real folder is visited once."""
    stack, seen = [top], set()
    while stack:
        relative = stack.pop()
        folder = root / relative
        try:
            info = folder.stat()
        except OSError as error:
            raise DataError(f"Cannot list {str(folder)!r}", found=reason_of(error)) from error
        if (info.st_dev, info.st_ino) in seen:  # a circle of links
            continue
        seen.add((info.st_dev, info.st_ino))
        listed = list_folder(folder)
        for name in listed.files:
            yield f"{relative}/{name}"
        stack.extend(f"{relative}/{name}" for name in reversed(listed.folders))


def first_picture(root: Path, top: str) -> str:
    """Return the first picture below ``root/top`` as a path from ``root``: one directly in it before any deeper.

    Empty if there is none, or a folder that cannot be read comes first, such as the ``lost+found`` of a disk.
    """
    try:
        return next(filter(is_picture, _walk(root, top)), "")
    except DataError:
        return ""


def synset_files(folder: Folder) -> bool:
    """Tell whether every picture in a folder is named by a synset of ImageNet-1k: ``n01440764_10026.JPEG``."""
    known = set(synsets())
    matches = [_SYNSET_FILE.match(name) for name in folder.pictures]
    return bool(matches) and all(match and match[1] in known for match in matches)


def open_synset_files(folder: Folder) -> FileSource:
    """Open a folder of which ``synset_files`` is true; the classes are the synsets that occur."""
    names = folder.pictures
    found = [name[:9] for name in names]
    classes = sorted(set(found))
    order = {synset: label for label, synset in enumerate(classes)}
    return FileSource(folder.path, names, [order[synset] for synset in found], classes)
