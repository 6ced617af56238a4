"""Weights stored in half precision; they are widened when an engine opens the file."""

from __future__ import annotations

from typing import Any

import numpy as np


def store_half(proto: Any) -> None:  # noqa: ANN401 (an onnx.ModelProto)
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
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
