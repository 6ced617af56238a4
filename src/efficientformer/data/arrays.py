"""Data sets whose pictures lie in one array, as MNIST and CIFAR are published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from efficientformer.data.listing import ListedSource
from efficientformer.spec.errors import DataError

MAX_BYTES = 1 << 30  # of one file, unpacked; MNIST has 47 MB, CIFAR-100 155 MB


class ArraySource(ListedSource):
    """Pictures in one array.

    Args:
        images: Grey (N, H, W) or in colour (N, H, W, 3), uint8.
        labels: (N,).
        classes: Class names in order of their labels.
        part: What the names of the pictures begin with.
    """

    def __init__(
        self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], classes: tuple[str, ...], part: str
    ) -> None:
        super().__init__((f"{part}/{index:06d}" for index in range(len(images))), labels, classes)
        self._images = images

    def read(self, index: int) -> Image.Image:
        """Return a picture, mode L or RGB."""
        return Image.fromarray(self._images[index])


def damaged(path: Path, expected: str, found: str) -> DataError:
    """Return the error for a file that is not what it should be."""
    return DataError(f"Cannot use {str(path)!r}", expected=expected, found=found, hint="Download it again")
