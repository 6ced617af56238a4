"""Int8 networks without trained weights: quantised on random pictures, which is enough to time them."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from efficientformer.latency.graph import INPUT
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import missing_extra
from efficientformer.spec.manifest import METADATA_KEY, Manifest

OPERATORS = ("Conv", "MatMul", "Gemm")  # where the time goes; everything else stays in floating point
PICTURES = 2


def quantise(path: Path, spec: ArchSpec) -> None:
    """Replace a float network by its int8 form: QuantizeLinear and DequantizeLinear around ``OPERATORS``.

    Args:
        path: The .onnx file, written by ``write_network``.
        spec: Its architecture.

    Raises:
        MissingExtraError: If onnx is not installed.
    """
    try:
        import onnx
        from onnxruntime import quantization
    except ImportError as error:
        raise missing_extra("torch", "Quantising a network to be timed", error) from error
    logging.getLogger().addFilter(_quiet)  # the quantiser advises on accuracy, which random weights have none of
    try:
        quantization.quantize_static(
            path, path, _Pictures(spec), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            op_types_to_quantize=list(OPERATORS), activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
    finally:
        logging.getLogger().removeFilter(_quiet)
    proto = onnx.load(path)
    entry = next(entry for entry in proto.metadata_props if entry.key == METADATA_KEY)
    manifest = Manifest.from_json(entry.value)
    manifest = dataclasses.replace(manifest, provenance={**manifest.provenance, "precision": "int8"})
    entry.value = manifest.to_json()
    onnx.save(proto, path)


def _quiet(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


class _Pictures:
    """Random pictures, one at a time, as the quantiser reads them."""

    def __init__(self, spec: ArchSpec) -> None:
        rng = np.random.default_rng(0)
        shape = (1, spec.in_chans, *spec.input_size)
        self._left: list[npt.NDArray[Any]] = [rng.standard_normal(shape, dtype=np.float32) for _ in range(PICTURES)]

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        """Return the next picture, or None after the last."""
        return {INPUT: self._left.pop()} if self._left else None
