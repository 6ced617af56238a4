"""Int8 networks without trained weights: quantised on random pictures, which is enough to time them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from efficientformer.export.qdq import Quantiser
from efficientformer.runtime.engines import open_engine

PICTURES = 2


def quantise(path: Path) -> None:
    """Replace a float network by its int8 form, as ``efficientformer quantize`` makes it.

    Args:
        path: The .onnx file, written by ``write_network``.

    Raises:
        MissingExtraError: If onnx is not installed.
    """
    manifest = open_engine(path, "onnxruntime").manifest
    spec = manifest.spec
    shape = (PICTURES, spec.in_chans, *spec.input_size)
    batch = np.random.default_rng(0).standard_normal(shape, np.float32)
    Quantiser(path, batch).write(path, manifest)
