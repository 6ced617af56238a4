"""The package's own photographs: what a network is run on where no pictures of the user's are at hand."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import numpy.typing as npt

from efficientformer.runtime.image import decode, preprocess_batch
from efficientformer.spec.preprocess import PreprocessSpec


def sample_batch(spec: PreprocessSpec) -> npt.NDArray[np.float32]:
    """Return the package's photographs as one preprocessed batch, (N, C, H, W) float32."""
    folder = files("efficientformer") / "assets" / "photos"
    photos = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".jpg")), key=lambda entry: entry.name)
    return preprocess_batch([decode(photo.read_bytes(), mode=spec.mode, exif=spec.exif) for photo in photos], spec)
