"""ONNX Runtime: the engine of the base install."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from efficientformer.runtime.engines import OpenFile, check_ports, failed_run, settle_precision
from efficientformer.runtime.manifests import parse_manifest
from efficientformer.spec.errors import EngineError
from efficientformer.spec.manifest import METADATA_KEY


class OnnxRuntimeEngine(OpenFile):
    """Runs an .onnx file on the CPU, in single precision or, for a quantised file, in int8.

    Args:
        path: The file.
        precision: ``auto``, ``fp32`` or ``int8``.
        threads: Threads in all; None lets ONNX Runtime choose.
        streams: Callers at a time. With more than one, each runs on its own share of threads.

    Raises:
        EngineError: If the file cannot be opened, has no manifest, its input and output are not what it says, or it
            cannot run in that precision.
    """

    key = "onnxruntime"

    def __init__(self, path: Path, *, precision: str = "auto", threads: int | None = None, streams: int = 1) -> None:
        super().__init__(path, threads, streams)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions; warnings would land on the user's terminal
        if streams > 1:
            # a session has one pool of threads: of one thread each it is the callers' own threads that compute
            options.intra_op_num_threads = 1
        else:  # left to itself it counts the machine's cores, not those it may use, and pins a thread to each
            options.intra_op_num_threads = self._cores
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise EngineError(
                f"ONNX Runtime cannot open {path}",
                expected="an .onnx file",
                found=str(error).strip().splitlines()[0][:300],
                hint="Export it again: efficientformer convert CHECKPOINT FILE.onnx. One in the cache is made anew "
                "if you remove it",
            ) from error
        self.manifest = parse_manifest(path, self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY))
        self.precision = settle_precision(precision, self.manifest, ("fp32",), "ONNX Runtime")
        self.name = f"ONNX Runtime {ort.__version__} ({self.precision})"
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        found = [list(port.shape[1:]) for port in (*inputs, *outputs)]
        check_ports(path, self.manifest, found, is_float=inputs[0].type == "tensor(float)")
        self._input = str(inputs[0].name)

    def run(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return logits (N, num_classes) for preprocessed images (N, C, H, W).

        Raises:
            EngineError: If ONNX Runtime fails.
        """
        try:
            logits: npt.NDArray[np.float32] = self._session.run(None, {self._input: batch})[0]
        except Exception as error:  # as above
            raise failed_run(self.name, batch.shape, error) from error
        return logits
