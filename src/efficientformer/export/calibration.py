"""The user's pictures for quantisation: some to set scales on, others to measure on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from efficientformer.data.align import match_classes
from efficientformer.data.folders import first_picture, list_folder
from efficientformer.data.parts import is_part_name, part_of
from efficientformer.data.sources import find_parts
from efficientformer.runtime.image import decode
from efficientformer.runtime.inputs import gather
from efficientformer.runtime.preprocess import preprocess
from efficientformer.spec.errors import DataError, ImageError
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.progress import Progress

_T = TypeVar("_T")

LEAST = 8  # pictures below which neither scales nor figures mean anything


@dataclass(frozen=True, eq=False)
class Pictures:
    """Preprocessed pictures.

    Attributes:
        calibration: To set scales on, (N, C, H, W) float32.
        held_out: Others, to measure on, (M, C, H, W) float32.
        labels: Labels of the held-out ones, (M,) int64; None if any has no class of the network's.
        skipped: Those that could not be read, with reasons.
    """

    calibration: npt.NDArray[np.float32]
    held_out: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64] | None
    skipped: tuple[tuple[str, str], ...]


def gather_pictures(
    data: str | Path, manifest: Manifest, count: int, holdout: int, seed: int, progress: Progress | None
) -> Pictures:
    """Read pictures as prediction reads them.

    Args:
        data: A folder of pictures, those in folders named after the network's classes labelled; or a data set in any
            other layout that training takes. If it has the parts ``train`` and ``val`` (or ``test``, or other words for
            these), scales are set on the one and figures measured on the other.
        manifest: The network's preprocessing and classes.
        count: Most pictures to calibrate on; of a folder without parts, no more than half.
        holdout: Most pictures to measure on.
        seed: Decides which.
        progress: Told how many are read.

    Raises:
        DataError: If there are fewer than ``LEAST`` pictures.
    """
    root = Path(data)
    parts = _folders(root) if root.is_dir() and first_picture(root, ".") else _sources(root)
    wanted = _chosen(parts, count, holdout, np.random.default_rng(seed))
    total, done = sum(map(len, wanted)), 0
    skipped = []
    kept: list[list[_Picture]] = [[], []]
    shape = (len(manifest.preprocess.mean), *manifest.preprocess.input_size)
    read = [np.empty((len(pictures), *shape), np.float32) for pictures in wanted]  # filled in place: they may be large
    for side, pictures in enumerate(wanted):
        for picture in pictures:
            try:
                read[side][len(kept[side])] = _read(picture, manifest)
                kept[side].append(picture)
            except ImageError as error:
                skipped.append((picture.name, str(error)))
            done += 1
            if progress is not None:
                progress("reading pictures", done, total)
    counts = [len(pictures) for pictures in kept]
    if min(counts) < LEAST // 2:
        found = f"{sum(counts)} that can be read" + (f"; {skipped[0][0]}: {skipped[0][1]}" if skipped else "")
        raise DataError("Too few pictures to quantise on", expected=f"at least {LEAST}, better 800", found=found)
    labels = _labels([picture.label for picture in kept[1]], manifest)
    calibration, held_out = (pictures[:count] for pictures, count in zip(read, counts, strict=True))
    return Pictures(calibration, held_out, labels, tuple(skipped))


@dataclass(frozen=True, slots=True)
class _Picture:
    """A picture that is read when it is needed, and its class."""

    name: str
    label: str
    read: Callable[[], bytes | Image.Image]


def _folders(data: Path) -> list[list[_Picture]]:
    """Return the pictures in a folder, or in those of its parts."""
    folders = {part_of(name.lower()): data / name for name in reversed(list_folder(data).folders) if is_part_name(name)}
    return [
        [_Picture(each.name, _folder_of(Path(each.name), root), each.read) for each in gather([root])]
        for root in _two(folders) or [data]
    ]


def _sources(data: Path) -> list[list[_Picture]]:
    """Return the pictures of a data set in another layout, or of its parts."""
    parts = find_parts(data)
    sources = [opener() for opener in _two(parts) or [next(iter(parts.values()))]]
    return [
        [_Picture(source.name(index), source.classes[label], partial(source.read, index))
         for index, label in enumerate(source.labels)]
        for source in sources
    ]  # fmt: skip


def _two(parts: Mapping[str, _T]) -> list[_T]:
    """Return the part for training and the one to measure on, if there are both; else none."""
    held_out = parts.get("val", parts.get("test"))
    return [parts["train"], held_out] if held_out is not None and "train" in parts else []


def _chosen(
    parts: Sequence[Sequence[_Picture]], count: int, holdout: int, rng: np.random.Generator
) -> tuple[list[_Picture], list[_Picture]]:
    """Return the pictures to set scales on and those to measure on, in random order; of one part, none is both."""
    first, *rest = ([part[i] for i in rng.permutation(len(part))] for part in parts)
    if rest:
        return first[:count], rest[0][:holdout]
    count = min(count, len(first) // 2)
    return first[:count], first[count:][:holdout]


def _read(picture: _Picture, manifest: Manifest) -> npt.NDArray[np.float32]:
    spec = manifest.preprocess
    return preprocess(decode(picture.read(), mode=spec.mode, exif=spec.exif, name=picture.name), spec)


def _labels(names: list[str], manifest: Manifest) -> npt.NDArray[np.int64] | None:
    """Return the labels of classes, if all are the network's."""
    classes = sorted(set(names))
    index = dict(zip(classes, match_classes(classes, manifest.labels), strict=True))
    return None if min(index.values()) < 0 else np.array([index[name] for name in names], np.int64)


def _folder_of(path: Path, root: Path) -> str:
    """Return the name of the folder in ``root``, or its only part, that a picture lies in, at any depth; or root's."""
    below = path.relative_to(root).parts[:-1] if path.is_relative_to(root) else (path.parent.name,)
    if len(below) > 1 and is_part_name(below[0]):  # the only part
        below = below[1:]
    return (root.name, *below)[:2][-1]
