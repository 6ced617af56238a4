"""ImageNet-1k's validation pictures as they are published: one flat folder, and the truth in another file."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from typing import Any

from efficientformer.data.folders import Folder, first_picture
from efficientformer.data.listing import FileSource, some
from efficientformer.spec.errors import DataError, missing_extra, reason_of
from efficientformer.spec.labels import label_names, synset_labels, synsets

DEVKIT = Path("ILSVRC2012_devkit_t12") / "data"
SOLUTION = "LOC_val_solution.csv"

_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_PICTURE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_LEVELS = 5  # in Kaggle's tree the solution lies four folders above the pictures
_MAX_TRUTH_BYTES = 64 << 20


def is_validation(folder: Folder) -> bool:
    """Tell whether a folder holds ``ILSVRC2012_val_000XXXXX.JPEG``."""
    return any(_PICTURE.fullmatch(name) for name in folder.files)


def open_validation(folder: Folder) -> FileSource:
    """Open a flat folder of ImageNet's validation pictures, or of some of them.

    The truth is looked for in the folder and in those above it: Kaggle's solution, or the development kit.

    Raises:
        DataError: If there is no truth, or it does not cover the pictures.
        MissingExtraError: If scipy is needed for the development kit and not installed.
    """
    names = [name for name in folder.files if _PICTURE.fullmatch(name)]
    truth = _find_truth(folder.path)
    unknown = [name for name in names if name[:-5] not in truth]
    if unknown:
        raise DataError(
            f"The truth beside {str(folder.path)!r} does not name every picture", found=f"no label for {some(unknown)}"
        )
    order = synset_labels()
    labels = [order[truth[name[:-5]]] for name in names]
    other = len(folder.files) - len(names)
    notes = [f"{other:,} files left out: not named like ImageNet's validation pictures"] if other else []
    if beside := [name for name in folder.folders if first_picture(folder.path, name)]:
        notes.append(f"the pictures in {some(beside)} left out: those beside these folders are the data set")
    return FileSource(folder.path, names, labels, label_names("imagenet1k"), notes)


def _find_truth(folder: Path) -> dict[str, str]:
    """Return picture -> synset from the nearest file that tells."""
    path = folder.absolute()
    for place in [path, *path.parents][:_LEVELS]:
        if (place / SOLUTION).is_file():
            return _from_solution(place / SOLUTION)
        for kit in (place / DEVKIT, place):
            if (kit / _TRUTH).is_file() and (kit / _META).is_file():
                return _from_devkit(kit)
    raise DataError(
        f"No labels for ImageNet's validation pictures in {str(folder)!r}",
        expected=f"{SOLUTION}, or {DEVKIT}/ with {_TRUTH} and {_META}, beside the pictures or above them",
        hint="Unpack ILSVRC2012_devkit_t12.tar.gz there, or sort the pictures into folders named by synset",
    )


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_TRUTH_BYTES + 1)
    except OSError as error:
        raise DataError(f"Cannot read {str(path)!r}", found=reason_of(error)) from error
    if len(data) > _MAX_TRUTH_BYTES:
        raise DataError(f"{str(path)!r} is too large", expected=f"at most {_MAX_TRUTH_BYTES:,} bytes", found="more")
    return data.decode("utf-8", "replace")


def _from_solution(path: Path) -> dict[str, str]:
    """Read rows like ``ILSVRC2012_val_00048981,n03995372 85 1 499 272``."""
    known, truth = set(synsets()), {}
    try:
        for row in csv.reader(_read_text(path).splitlines()[1:]):
            if row:
                truth[row[0]] = row[1].split()[0]
    except (csv.Error, IndexError) as error:
        raise _bad_truth(path, "rows 'ILSVRC2012_val_00000001,n01751748 ...'", "a row of another form") from error
    strange = sorted(set(truth.values()) - known)
    if strange:
        raise _bad_truth(path, "synsets of ImageNet-1k", some(strange))
    return truth


def _from_devkit(kit: Path) -> dict[str, str]:
    """Read the development kit: line i of the truth is the ILSVRC id of picture i."""
    synset_of = _read_meta(kit / _META)
    truth = {}
    for number, line in enumerate(_read_text(kit / _TRUTH).split(), 1):
        if line not in synset_of:
            raise _bad_truth(kit / _TRUTH, "ids from 1 to 1000, one a line", f"{line[:20]!r} in line {number}")
        truth[f"ILSVRC2012_val_{number:08d}"] = synset_of[line]
    return truth


def _read_meta(path: Path) -> dict[str, str]:
    """Return ILSVRC id (as text) -> synset; ids above 1000 are inner nodes of WordNet's tree."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise missing_extra("train", "Reading ImageNet's development kit", error) from error
    try:
        rows: Any = loadmat(os.fspath(path), squeeze_me=True)["synsets"]
        found = {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in rows if int(row["ILSVRC2012_ID"]) <= 1000}
    except Exception as error:  # scipy lets anything out of a damaged file
        raise _bad_truth(path, "the table 'synsets'", f"{type(error).__name__}: {error}") from error
    if set(found.values()) != set(synsets()):
        raise _bad_truth(path, "the 1000 synsets of ImageNet-1k", f"{len(found)} others")
    return found


def _bad_truth(path: Path, expected: str, found: str) -> DataError:
    return DataError(f"Cannot use {str(path)!r}", expected=expected, found=found, hint="Unpack or download it again")
