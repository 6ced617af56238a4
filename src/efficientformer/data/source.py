"""What every data set looks like to the rest: numbered pictures with a label each, read one by one, without torch."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from efficientformer.runtime.image import decode, in_turn_if_large
from efficientformer.runtime.preprocess import resize_crop
from efficientformer.spec.preprocess import PreprocessSpec


class ImageSource(ABC):
    """A data set of labelled pictures, addressed by number.

    Listing one reads names only; ``read`` fetches one picture, which is not trusted before it is decoded.

    Attributes:
        classes: Class names in order of their labels.
        labels: Label of every picture, (N,) int64.
        unnamed: Whether the classes have no names but their numbers.
        notes: What a user should know about the listing: what was left out.
    """

    unnamed: bool = False
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what people call a picture: its path below the data set, or its key in a shard."""

    @abstractmethod
    def read(self, index: int) -> bytes | Image.Image:
        """Return a picture, encoded or decoded, for ``runtime.image.decode``.

        Raises:
            ImageError: If it cannot be read.
        """

    def image(self, index: int, preprocess: PreprocessSpec) -> Image.Image:
        """Return a picture decoded as a network's preprocessing asks, at its own size.

        Raises:
            ImageError: If it cannot be read.
        """
        return decode(self.read(index), mode=preprocess.mode, exif=preprocess.exif, name=self.name(index))

    def cropped(self, index: int, preprocess: PreprocessSpec) -> Image.Image:
        """Return a picture decoded, resized and cropped to a network's input; large ones wait for each other.

        Raises:
            ImageError: If it cannot be read.
        """
        with in_turn_if_large():
            return resize_crop(self.image(index, preprocess), preprocess)

    def digest(self) -> str:
        """Return a SHA-256 of every name and label: which data this is, not what the pictures show."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for index in range(len(self)):
            digest.update(self.name(index).encode("utf-8", "surrogateescape") + b"\0")
        digest.update(self.labels.tobytes())
        return digest.hexdigest()


class Subset(ImageSource):
    """Some pictures of a source, in a given order.

    Args:
        source: The whole.
        indices: Which of its pictures.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int] | npt.NDArray[np.int64]) -> None:
        self.source, self.indices = source, np.asarray(indices, np.int64)
        self.classes, self.labels = source.classes, source.labels[self.indices]
        self.notes, self.unnamed = source.notes, source.unnamed

    def name(self, index: int) -> str:
        """Return what people call a picture."""
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> bytes | Image.Image:
        """Return a picture, encoded or decoded."""
        return self.source.read(int(self.indices[index]))
