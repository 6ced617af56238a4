"""ONNX Runtime: the engine of the base install."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from efficientformer.runtime.manifests import parse_manifest
from efficientformer.spec.errors import EngineError
from efficientformer.spec.manifest import METADATA_KEY


class OnnxRuntimeEngine:
    """Runs an .onnx file on the CPU.

    Args:
        path: The file.
        threads: Threads of one run; None lets ONNX Runtime choose.

    Raises:
        EngineError: If the file cannot be opened, has no manifest, or its input and output are not what it says.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions; warnings would land on the user's terminal
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise EngineError(
                f"ONNX Runtime cannot open {path}",
                expected="an .onnx file",
                found=str(error).strip().splitlines()[0][:300],
                hint="Export it again: efficientformer convert CHECKPOINT FILE.onnx",
            ) from error
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.manifest = parse_manifest(path, metadata.get(METADATA_KEY))
        self.name = f"ONNX Runtime {ort.__version__}"
        self._input = self._check_ports(path)

    def _check_ports(self, path: Path) -> str:
        """Return the input's name after checking that the graph takes and gives what the manifest says."""
        spec = self.manifest.spec
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        expected = [[spec.in_chans, *spec.input_size], [spec.num_classes]]
        found = [list(port.shape[1:]) for port in (*inputs, *outputs)]
        if found != expected or inputs[0].type != "tensor(float)":
            raise EngineError(
                f"{path} does not do what its manifest says", expected=f"shapes {expected}", found=f"shapes {found}"
            )
        return str(inputs[0].name)

    def run(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return logits (N, num_classes) for preprocessed images (N, C, H, W)."""
        logits: npt.NDArray[np.float32] = self._session.run(None, {self._input: batch})[0]
        return logits
