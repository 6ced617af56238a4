"""The package's own photographs: what a network is run on where no pictures of the user's are at hand."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable

import numpy as np
import numpy.typing as npt

from efficientformer.runtime.image import decode
from efficientformer.runtime.preprocess import preprocess_batch
from efficientformer.spec.preprocess import PreprocessSpec


def photographs() -> list[Traversable]:
    """Return the photographs' files, by name."""
    folder = files("efficientformer") / "assets" / "photos"
    return sorted((entry for entry in folder.iterdir() if entry.name.endswith(".jpg")), key=lambda entry: entry.name)


def sample_batch(spec: PreprocessSpec) -> npt.NDArray[np.float32]:
    """Return the package's photographs as one preprocessed batch, (N, C, H, W) float32."""
    photos = (photo.read_bytes() for photo in photographs())
    return preprocess_batch([decode(photo, mode=spec.mode, exif=spec.exif) for photo in photos], spec)
