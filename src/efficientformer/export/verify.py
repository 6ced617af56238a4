"""Proof that an exported file is the trained network: both run on photographs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from efficientformer.models.network import EfficientFormer
from efficientformer.runtime.choice import REFERENCE
from efficientformer.runtime.engines import Engine, installed_engines, open_engine
from efficientformer.runtime.samples import sample_batch
from efficientformer.spec.errors import EngineError, ExportError

# Largest difference of a logit, relative to the largest logit. Single precision reorders sums; half storage rounds
# each weight to 11 bits.
TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far an exported file agrees with the network it was made from.

    Attributes:
        pictures: Photographs compared.
        max_difference: Largest absolute difference of a logit, of the engines that agree.
        largest_logit: Largest absolute logit of the network, for scale.
    """

    pictures: int
    max_difference: float
    largest_logit: float


def verify(model: EfficientFormer, path: Path, *, half_storage: bool = False) -> Agreement:
    """Compare an exported file with its network on the package's photographs.

    ONNX Runtime decides. Another engine that fails or differs says nothing of the file, and is warned of: where engines
    are chosen (``runtime.choice``) it is left out for the same reason.

    Args:
        model: The network in train form and evaluation mode, in single precision on the CPU.
        path: The exported file.
        half_storage: Whether weights are stored in half precision, which allows for rounding.

    Raises:
        ExportError: If a logit differs by more than rounding explains.
        EngineError: If ONNX Runtime cannot run the file.
    """
    reference = open_engine(path, REFERENCE)
    batch = sample_batch(reference.manifest.preprocess)  # (N, C, H, W)
    with torch.inference_mode():
        expected = model(torch.from_numpy(batch)).numpy()
    largest = float(np.abs(expected).max())
    limit = (HALF_TOLERANCE if half_storage else TOLERANCE) * max(1.0, largest)
    worst = _checked(reference, batch, expected, limit)
    for name in installed_engines():
        if name != REFERENCE:
            try:
                worst = max(worst, _checked(open_engine(path, name, precision="fp32"), batch, expected, limit))
            except (EngineError, ExportError) as error:
                found = f"{error.problem}: {error.found}"
                warnings.warn(f"The new file is right in ONNX Runtime and not in {name}. {found}", stacklevel=2)
    return Agreement(len(batch), worst, largest)


def _checked(engine: Engine, batch: Floats, expected: Floats, limit: float) -> float:
    """Return the largest difference of an engine's logits.

    Raises:
        ExportError: If it is above the limit.
    """
    # the second batch size proves that the batch is free
    found = np.concatenate([engine.run(batch[:1]), engine.run(batch[1:])])
    difference = float(np.abs(expected - found).max())
    if not difference <= limit:  # also true for NaN
        raise ExportError(
            "The exported file differs from the network",
            expected=f"logits within {limit:.1e} on {len(batch)} photographs",
            found=f"a difference of {difference:.1e} with {engine.name}",
            hint="Nothing was written. Please report this with what efficientformer info MODEL --json prints",
        )
    return difference
