"""An exported graph with int8 layers between QuantizeLinear and DequantizeLinear, or with its weights stored smaller.

Weights are quantised per output channel and symmetrically, activations per tensor to unsigned 8 bits. Layers are the
convolutions and the matrix products with weights. The attention's products of activations stay in float, and so do the
outputs of linear layers: where these are quantised, OpenVINO 2026.4 computes other logits than the graph's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from efficientformer.spec.errors import missing_extra

LAYER_TYPES = ("Conv", "Gemm", "MatMul")


def load_float(path: Path) -> Any:  # noqa: ANN401 (an onnx.ModelProto; onnx has no types)
    """Read an exported file; weights stored in half precision are widened.

    Raises:
        MissingExtraError: If onnx is not installed.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise missing_extra("quantize", "Quantisation", error) from error
    proto = onnx.load(path)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    casts = [node for node in proto.graph.node if node.op_type == "Cast" and node.input[0] in stored]
    for node in casts:
        tensor = stored[node.input[0]]
        wide = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(wide, node.output[0]))
        proto.graph.node.remove(node)
    return proto


def layers_of(proto: Any) -> list[str]:  # noqa: ANN401
    """Return the names of the nodes that have weights, in the order they run."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    return [node.name for node in proto.graph.node if node.op_type in LAYER_TYPES and node.input[1] in stored]


class Quantiser:
    """Knows the range of every activation of a network, and makes graphs with any of its layers in int8.

    Args:
        proto: The float graph, from ``load_float``.
        batches: Calibration pictures, each (N, C, H, W) float32; every batch gives one range, and ranges are averaged.
    """

    def __init__(self, proto: Any, batches: Iterator[npt.NDArray[np.float32]]) -> None:  # noqa: ANN401
        self.layers = layers_of(proto)
        self._proto = proto
        self._ranges = _activation_ranges(proto, batches)

    def build(self, in_float: Collection[str] = ()) -> Any:  # noqa: ANN401 (an onnx.ModelProto)
        """Return a new graph whose layers are in int8, but for those named."""
        import onnx
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        proto = onnx.ModelProto()
        proto.CopyFrom(self._proto)
        quantised = [name for name in self.layers if name not in in_float]
        if not quantised:
            return proto
        quantizer = QDQQuantizer(
            proto,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=self._ranges,
            nodes_to_quantize=quantised,
            nodes_to_exclude=[],
            op_types_to_quantize=list(LAYER_TYPES),
            extra_options={
                "WeightSymmetric": True,
                "ActivationSymmetric": False,
                "OpTypesToExcludeOutputQuantization": ["MatMul"],
            },
        )
        quantizer.quantize_model()
        result = quantizer.model.model
        del result.metadata_props[:]
        return result


def _activation_ranges(proto: Any, batches: Iterator[npt.NDArray[np.float32]]) -> Any:  # noqa: ANN401
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

    name = proto.graph.input[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
            batch = next(batches, None)
            return None if batch is None else {name: batch}

    with tempfile.TemporaryDirectory() as folder:
        plain, augmented = Path(folder) / "float.onnx", Path(folder) / "augmented.onnx"
        plain.write_bytes(proto.SerializeToString())
        calibrator = create_calibrator(
            plain,
            list(LAYER_TYPES),
            augmented_model_path=str(augmented),
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"moving_average": True, "averaging_constant": 0.05},
        )
        calibrator.collect_data(Reader())
        return calibrator.compute_data()


def store_weights_int8(proto: Any) -> None:  # noqa: ANN401
    """Store the weights of every layer in 8 bits with a scale for each output channel; they are computed in float."""
    import onnx
    from onnx import helper, numpy_helper

    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    widened = []
    for node in proto.graph.node:
        if node.op_type not in LAYER_TYPES or node.input[1] not in stored:
            continue
        name = node.input[1]
        tensor = stored.pop(name)
        weights = numpy_helper.to_array(tensor)
        axis = _output_axis(node, weights.ndim)
        others = tuple(each for each in range(weights.ndim) if each != axis)
        scale = np.maximum(np.abs(weights).max(axis=others) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        shape = [-1 if each == axis else 1 for each in range(weights.ndim)]
        small = np.clip(np.rint(weights / scale.reshape(shape)), -127, 127).astype(np.int8)
        tensor.CopyFrom(numpy_helper.from_array(small, f"{name}.int8"))
        proto.graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
        inputs = [f"{name}.int8", f"{name}.scale"]
        widened.append(helper.make_node("DequantizeLinear", inputs, [name], f"{name}.widen", axis=axis))
    nodes = [*widened, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.checker.check_model(proto)


def _output_axis(node: Any, ndim: int) -> int:  # noqa: ANN401 (an onnx.NodeProto)
    """Return the axis of a layer's weights that counts its output channels."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else ndim - 1


def bytes_with_manifest(proto: Any, key: str, text: str) -> bytes:  # noqa: ANN401
    """Return a graph as a file's bytes, with one entry of metadata."""
    del proto.metadata_props[:]
    entry = proto.metadata_props.add()
    entry.key, entry.value = key, text
    data: bytes = proto.SerializeToString()
    return data
