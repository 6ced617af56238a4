"""Pictures for quantisation: some to calibrate on, others, held out, to measure what it cost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from efficientformer.data.align import align
from efficientformer.data.source import ImageSource
from efficientformer.data.sources import find_parts
from efficientformer.runtime.image import decode, normalise, resize_crop
from efficientformer.runtime.inputs import gather
from efficientformer.spec.errors import DataError, ImageError
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import PreprocessSpec

BATCH = 10


@dataclass
class Pictures:
    """Decoded and cropped pictures.

    Attributes:
        preprocess: What they are normalised by.
        images: The pictures, in 8 bits.
        labels: The network's label of each; None where labels are not known.
    """

    preprocess: PreprocessSpec
    images: list[Image.Image] = field(default_factory=list)
    labels: list[int] | None = None

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.images)

    def batches(self, limit: int | None = None) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the network's input in batches, (N, C, H, W) float32."""
        images = self.images[:limit]
        for start in range(0, len(images), BATCH):
            yield normalise(images[start : start + BATCH], self.preprocess)


@dataclass(frozen=True)
class Chosen:
    """What a data set gave.

    Attributes:
        calibration: The pictures to calibrate on.
        held_out: The pictures to measure on.
        skipped: Name and reason of each that could not be read.
        note: Why labels are not known; empty if they are.
    """

    calibration: Pictures
    held_out: Pictures
    skipped: list[tuple[str, str]]
    note: str


class _Unlabelled(ImageSource):
    """Pictures of a folder without classes."""

    def __init__(self, folder: str) -> None:
        self._inputs = list(gather([folder]))
        self.classes, self.labels = (), np.zeros(len(self._inputs), np.int64)

    def name(self, index: int) -> str:
        return self._inputs[index].name

    def read(self, index: int) -> bytes | Image.Image:
        return self._inputs[index].read()


def choose_pictures(
    data: str | os.PathLike[str], manifest: Manifest, *, pictures: int, holdout: int, seed: int
) -> Chosen:
    """Choose pictures at random and decode them as prediction does.

    Of a data set with a part train and a part val or test, the one calibrates and the other is measured on. Any other
    is divided; where it is too small for both, at most half of it is held out.

    Args:
        data: A data set of any layout, or a folder of pictures.
        manifest: The network's preprocessing and labels.
        pictures: How many to calibrate on.
        holdout: How many to hold out.
        seed: Which ones.

    Raises:
        DataError: If there is no such folder, or it has fewer than two readable pictures.
    """
    source, second, note = _open(os.fspath(data), manifest)
    rng = np.random.default_rng(seed)
    skipped: list[tuple[str, str]] = []
    order = rng.permutation(len(source)).tolist()
    if second is None:
        held = min(holdout, len(order) // 2)
        held_out = _take(source, order[len(order) - held :], held, manifest, skipped, labelled=not note)
        calibration = _take(source, order[: len(order) - held], pictures, manifest, skipped, labelled=not note)
    else:
        calibration = _take(source, order, pictures, manifest, skipped, labelled=not note)
        others = rng.permutation(len(second)).tolist()
        held_out = _take(second, others, holdout, manifest, skipped, labelled=not note)
    if not len(calibration) or not len(held_out):
        reason = f"; the first that was skipped: {skipped[0][1]}" if skipped else ""
        raise DataError(
            f"Too few pictures in {os.fspath(data)!r}",
            expected="at least two that can be read: one to calibrate on, one to measure on",
            found=f"{len(calibration) + len(held_out)} readable, {len(skipped)} unreadable{reason}",
            hint="Give a few hundred pictures like those the network will see",
        )
    return Chosen(calibration, held_out, skipped, note)


def _open(data: str, manifest: Manifest) -> tuple[ImageSource, ImageSource | None, str]:
    """Return the pictures, a second part to measure on if there is one, and why labels are unknown."""
    if not Path(data).is_dir():
        found = "a file" if Path(data).is_file() else "nothing there"
        raise DataError(f"No pictures at {data!r}", expected="a folder", found=found, hint="Check the path")
    try:
        parts = find_parts(data)
        sources = {name: opener() for name, opener in parts.items()}
    except DataError:
        return _Unlabelled(data), None, "these pictures are not sorted into classes: agreement is what counts"
    note = ""
    if manifest.labels:
        try:
            sources = {name: align(source, manifest.labels) for name, source in sources.items()}
        except DataError:
            note = "the folders are not the network's classes: agreement is what counts"
    else:
        note = "the network does not name its classes: agreement is what counts"
    first = sources.get("train") or next(iter(sources.values()))
    second = next((sources[name] for name in ("val", "test") if name in sources), None)
    return first, second if second is not first else None, note


def _take(
    source: ImageSource,
    order: list[int],
    count: int,
    manifest: Manifest,
    skipped: list[tuple[str, str]],
    *,
    labelled: bool,
) -> Pictures:
    """Decode pictures in the given order until there are enough; those that cannot be read are noted."""
    spec = manifest.preprocess
    taken = Pictures(spec, [], [] if labelled else None)
    for index in order:
        if len(taken) == count:
            break
        try:
            image = decode(source.read(index), mode=spec.mode, exif=spec.exif, name=source.name(index))
            taken.images.append(resize_crop(image, spec))
        except ImageError as error:
            skipped.append((source.name(index), str(error)))
            continue
        if taken.labels is not None:
            taken.labels.append(int(source.labels[index]))
    return taken
