"""Proof that an exported file is the trained network: both run on photographs, through every engine installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from efficientformer.models.network import EfficientFormer
from efficientformer.runtime.engines import installed_engines, open_engine
from efficientformer.runtime.samples import sample_batch
from efficientformer.spec.errors import ExportError

# Largest difference of a logit, relative to the largest logit. Single precision reorders sums; half storage rounds
# each weight to 11 bits.
TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far an exported file agrees with the network it was made from.

    Attributes:
        pictures: Photographs compared.
        max_difference: Largest absolute difference of a logit.
        largest_logit: Largest absolute logit of the network, for scale.
    """

    pictures: int
    max_difference: float
    largest_logit: float


def verify(model: EfficientFormer, path: Path, *, half_storage: bool = False) -> Agreement:
    """Compare an exported file with its network on the package's photographs.

    Args:
        model: The network in train form and evaluation mode, in single precision on the CPU.
        path: The exported file.
        half_storage: Whether weights are stored in half precision, which allows for rounding.

    Raises:
        ExportError: If a logit differs by more than rounding explains.
    """
    batch = sample_batch(open_engine(path, "onnxruntime").manifest.preprocess)  # (N, C, H, W)
    with torch.inference_mode():
        expected = model(torch.from_numpy(batch)).numpy()
    largest = float(np.abs(expected).max())
    limit = (HALF_TOLERANCE if half_storage else TOLERANCE) * max(1.0, largest)
    worst = 0.0
    for name in installed_engines():
        engine = open_engine(path, name, precision="fp32")
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
        worst = max(worst, difference)
    return Agreement(len(batch), worst, largest)
