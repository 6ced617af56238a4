"""Pictures to tensors for loops of one's own: the pixels that a classifier feeds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efficientformer.runtime.image import Source, decode
from efficientformer.runtime.preprocess import preprocess
from efficientformer.spec.preprocess import PreprocessSpec


@dataclass(frozen=True)
class Transform:
    """Turns a picture into a network's input: as ``transform=`` of a data set, also in worker processes.

    Attributes:
        preprocess: The preprocessing.
    """

    preprocess: PreprocessSpec

    def __call__(self, picture: Source) -> Tensor:
        """Return the input (C, H, W), float32.

        Args:
            picture: A path, the bytes of a file, an open binary file, a Pillow image, or a uint8 array in RGB order.

        Raises:
            ImageError: If it is no readable picture.
        """
        image = decode(picture, mode=self.preprocess.mode, exif=self.preprocess.exif)
        return torch.from_numpy(preprocess(image, self.preprocess))
