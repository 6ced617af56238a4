"""An exported file in int8: QuantizeLinear and DequantizeLinear nodes around its operators, which every engine knows.

Weights are symmetric int8 with a scale for each output channel, activations uint8 with one scale each, from the
smallest and largest values seen in calibration. Weights use 7 of their 8 bits unless asked otherwise: x86 processors
without VNNI add two products of 8 bits in 16, and two of full-range weights overflow there. Such a file is right where
it was made and 7 to 10 points of top-1 worse elsewhere; the eighth bit gained 0.01 points (PERF.md, 2026-11-28).

In a file for OpenVINO alone activations are symmetric int8 as well, because of uint8 it subtracts the zero point
wherever a float operator follows; that is a little faster, rougher, and slow in ONNX Runtime, whose kernels are made
for uint8.

Only layers with weights are int8: residual sums, pooling, GELU and the attention's products in int8 cost more in
conversions than they saved, in both engines. What matrix products give stays in float as well, logits among it, which
is as fast and rounds once less.

ONNX Runtime's quantiser does the work: its files run in int8 in ONNX Runtime and in OpenVINO alike. NNCF's were as fast
in OpenVINO, but ONNX Runtime could not fuse them. OpenVINO 2026.4 leaves out a LayerNorm's eps where an int8 layer
follows. That shows only where the norm's input varies no more than eps, as in untrained networks, whose layer scales
are tiny: then its logits are not the graph's.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from efficientformer.export.proto import halve_weights, load_float, put_first, quiet, sign
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.progress import Progress

WEIGHTED = ("Conv", "MatMul", "Gemm")
MIN_WEIGHTS = 1024  # smaller tensors save nothing when only weights are stored in int8


class Quantiser:
    """A float file, calibrated once, of which int8 files can be made that keep some layers in float.

    Args:
        path: The float file.
        batch: Calibration pictures, (N, C, H, W), preprocessed.
        progress: Told how many pictures are done, and how many there are.
        signed: Activations in symmetric int8 instead of uint8, for OpenVINO.
        weight_bits: Bits of a weight that are used: 7, or 8 for processors that add products of 8 bits in 32.

    Raises:
        MissingExtraError: If onnx is not installed.
    """

    def __init__(
        self,
        path: Path,
        batch: npt.NDArray[np.float32],
        progress: Progress | None = None,
        *,
        signed: bool = False,
        weight_bits: int = 7,
    ) -> None:
        self._signed, self._weight_bits = signed, weight_bits
        self._proto = load_float(path)
        self._ranges = _calibrate(self._proto, batch, progress)
        weights = {each.name for each in self._proto.graph.initializer}
        nodes = [node for node in self._proto.graph.node if node.op_type in WEIGHTED]
        self.layers = tuple(node.name for node in nodes if any(name in weights for name in node.input))
        self._products = tuple(node.name for node in nodes if node.name not in self.layers)  # of activations

    def write(self, target: Path, manifest: Manifest, *, keep: Sequence[str] = (), only: str = "") -> None:
        """Write an int8 file.

        Args:
            target: The file.
            manifest: What the float file says about itself.
            keep: Layers that stay in float.
            only: If given, the one layer that does not.
        """
        import onnx
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        proto = onnx.ModelProto()
        proto.CopyFrom(self._proto)
        with quiet():
            quantizer = QDQQuantizer(
                proto,
                per_channel=True,
                reduce_range=self._weight_bits == 7,  # of weights alone
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QInt8 if self._signed else QuantType.QUInt8,
                tensors_range=self._ranges,
                nodes_to_quantize=[only] if only else [],
                nodes_to_exclude=[*keep, *self._products],
                op_types_to_quantize=list(WEIGHTED),
                extra_options={
                    "WeightSymmetric": True,
                    "ActivationSymmetric": self._signed,
                    "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                },
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()  # OpenVINO reads nodes in order
        provenance = {**manifest.provenance, "precision": "int8", "weight_bits": str(self._weight_bits)}
        _save(quantizer.model.model, target, dataclasses.replace(manifest, provenance=provenance))


def store_weights_int8(path: Path, target: Path, manifest: Manifest) -> None:
    """Write a file that computes in float and holds its matrices and kernels in int8, a scale for each output channel.

    Args:
        path: The float file.
        target: The file to write.
        manifest: What it says about itself.

    Raises:
        MissingExtraError: If onnx is not installed.
    """
    proto = load_float(path)
    from onnx import helper, numpy_helper

    transposed = {node.input[1] for node in proto.graph.node if node.op_type == "MatMul"}  # (in, out), not (out, in)
    added, nodes = [], []
    for tensor in list(proto.graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.ndim < 2 or values.size < MIN_WEIGHTS:
            continue
        axis = values.ndim - 1 if tensor.name in transposed else 0
        largest = np.abs(values).max(tuple(i for i in range(values.ndim) if i != axis))
        scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        small = np.clip(np.round(values / scale.reshape(shape)), -127, 127).astype(np.int8)
        name = tensor.name
        parts: dict[str, npt.NDArray[Any]] = {
            f"{name}.int8": small,
            f"{name}.scale": scale,
            f"{name}.zero": np.zeros(len(scale), np.int8),
        }
        added += [numpy_helper.from_array(value, key) for key, value in parts.items()]
        nodes.append(helper.make_node("DequantizeLinear", list(parts), [name], axis=axis))
        proto.graph.initializer.remove(tensor)
    proto.graph.initializer.extend(added)
    put_first(proto, nodes)
    _save(proto, target, manifest)


def store_weights_half(path: Path, target: Path, manifest: Manifest) -> None:
    """Write a file that computes in float and holds its matrices and kernels in half precision.

    Args:
        path: The float file.
        target: The file to write.
        manifest: What it says about itself.

    Raises:
        MissingExtraError: If onnx is not installed.
    """
    proto = load_float(path)
    halve_weights(proto)
    _save(proto, target, manifest)


def _calibrate(proto: Any, batch: npt.NDArray[np.float32], progress: Progress | None) -> Any:  # noqa: ANN401
    """Run the pictures one by one and return the range of every tensor."""
    import onnx
    from onnxruntime.quantization.calibrate import CalibrationDataReader, create_calibrator

    name = proto.graph.input[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self._at = 0

        def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
            if self._at == len(batch):
                return None
            self._at += 1
            if progress is not None:
                progress("calibrating", self._at, len(batch))
            return {name: batch[self._at - 1 : self._at]}

    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "float.onnx"
        onnx.save(proto, str(path))
        calibrator = create_calibrator(path, augmented_model_path=str(Path(folder) / "augmented.onnx"))
        calibrator.collect_data(Reader())
        return calibrator.compute_data()


def _save(proto: Any, target: Path, manifest: Manifest) -> None:  # noqa: ANN401
    sign(proto, manifest)
    target.write_bytes(proto.SerializeToString())
