"""What our .onnx files have in common: version of the operators, ports, manifest, how weights are stored."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from efficientformer.spec.errors import missing_extra
from efficientformer.spec.manifest import METADATA_KEY, Manifest

OPSET = 20  # the first with Gelu as one operator
INPUT, OUTPUT = "images", "logits"


def sign(proto: Any, manifest: Manifest) -> None:  # noqa: ANN401 (an onnx.ModelProto; onnx has no types)
    """Have a file say what the network is, and nothing else of how it was made."""
    del proto.metadata_props[:]
    del proto.graph.value_info[:]
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, manifest.to_json()
    proto.producer_name, proto.doc_string = "efficientformer", ""


def load_float(path: Path) -> Any:  # noqa: ANN401 (an onnx.ModelProto)
    """Read a file with every weight as a float initialiser, also those that are stored in half precision behind a Cast.

    Raises:
        MissingExtraError: If onnx is not installed.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise missing_extra("quantize", "Quantising a network", error) from error
    proto = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    halves = {t.name: t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
    kept = []
    for node in proto.graph.node:
        if node.op_type == "Cast" and node.input[0] in halves:
            half = halves[node.input[0]]
            values = numpy_helper.to_array(half).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
            proto.graph.initializer.remove(half)
        else:
            kept.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    return proto


def halve_weights(proto: Any) -> None:  # noqa: ANN401 (an onnx.ModelProto)
    """Store large weights in half precision behind a Cast, which the engine folds away when it opens the file."""
    import onnx
    from onnx import helper, numpy_helper

    casts = []
    for index, tensor in enumerate(proto.graph.initializer):
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            continue  # biases and factors stay exact: they are small, and the smallest of them matter
        name, values = tensor.name, numpy_helper.to_array(tensor)
        half = numpy_helper.from_array(values.astype(np.float16), f"{name}.half")
        proto.graph.initializer[index].CopyFrom(half)
        casts.append(helper.make_node("Cast", [half.name], [name], to=onnx.TensorProto.FLOAT))
    put_first(proto, casts)


def put_first(proto: Any, nodes: Sequence[Any]) -> None:  # noqa: ANN401
    """Add nodes before all others, as those must be whose results the others take."""
    rest = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *rest])


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the log of a library that makes files off the user's terminal; its errors are exceptions."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
