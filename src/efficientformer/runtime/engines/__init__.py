"""Inference engines behind one small protocol; ``open_engine`` picks one for a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from efficientformer.spec.errors import UsageError, nearest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from efficientformer.spec.manifest import Manifest

ENGINES = ("auto", "onnxruntime")


class Engine(Protocol):
    """What runs an exported file.

    Attributes:
        name: The engine and its version, for people.
        manifest: What the file says about itself.
    """

    name: str
    manifest: Manifest

    def run(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return logits (N, num_classes) for preprocessed images (N, C, H, W)."""


def open_engine(path: Path, engine: str = "auto", *, threads: int | None = None) -> Engine:
    """Open an exported file.

    Args:
        path: The file, with a manifest in its metadata.
        engine: One of ``ENGINES``; ``auto`` takes the fastest that is installed and can run the file.
        threads: CPU threads of the engine; None lets it take what the process may use.

    Raises:
        UsageError: If there is no engine of that name.
        EngineError: If the file cannot be run, or says nothing about itself.
    """
    if engine not in ENGINES:
        close = nearest(engine, ENGINES)
        hint = f"Did you mean {close[0]}?" if close else ""
        raise UsageError(f"Unknown engine {engine!r}", expected=f"one of {', '.join(ENGINES)}", hint=hint)
    from efficientformer.runtime.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(path, threads=threads)
