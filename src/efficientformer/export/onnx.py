"""A trained network as an .onnx file that carries its manifest and was compared with torch before it got its name."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from pathlib import Path
from typing import Any

import torch

from efficientformer.export.proto import INPUT, OPSET, OUTPUT, halve_weights, quiet, sign
from efficientformer.export.verify import Agreement, verify
from efficientformer.models.fold import fold
from efficientformer.models.network import EfficientFormer
from efficientformer.spec.errors import require
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.whole import named_by, whole_file


def export_onnx(
    model: EfficientFormer, manifest: Manifest, path: str | Path, *, half_storage: bool = False
) -> Agreement:
    """Fold a network, write it as ONNX, run the file with ONNX Runtime on photographs, and compare.

    Args:
        model: The network in train form, which is left untouched; its evaluation behaviour is exported. Any batch size
            works on the result.
        manifest: Its architecture, preprocessing, labels and provenance; stored in the file.
        path: The file to write. It appears only once it has been verified.
        half_storage: Store weights in half precision (half the size); they are widened to single when loaded.

    Returns:
        How far file and network agree.

    Raises:
        MissingExtraError: If the torch extra is not installed.
        ExportError: If the file's logits are not the network's.
        UsageError: If no file can be written there.
    """
    path = Path(path)
    model = copy.deepcopy(model).float().cpu().eval()
    with contextlib.ExitStack() as stack:
        with named_by(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(whole_file(path))
        proto = _to_proto(model)
        if half_storage:
            halve_weights(proto)
        sign(proto, manifest)
        temporary.write_bytes(proto.SerializeToString())
        return verify(model, temporary, half_storage=half_storage)


def _to_proto(model: EfficientFormer) -> Any:  # noqa: ANN401 (an onnx.ModelProto; onnx has no types)
    # torch's exporter needs it, and its own error does not say which extra brings it
    require("torch", "Building a deployable file", "onnxscript")
    deployed = fold(model)
    example = torch.zeros(2, model.spec.in_chans, *model.spec.input_size, device="cpu")
    batch = torch.export.Dim("batch")
    # the exporter tells of its progress, and of what its own libraries will no longer do
    with quiet(), warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            deployed,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: batch},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:  # the exporter notes source paths of the machine it ran on
        node.doc_string = ""
        del node.metadata_props[:]
    return proto
