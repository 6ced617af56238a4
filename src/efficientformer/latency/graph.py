"""The exported graph of any spec with random weights, written without torch: what is timed before there is a network.

``export/onnx.py`` traces a trained network, which takes seconds; a latency table needs hundreds of networks. The graph
here has the same operators in the same order with the same shapes (a test holds the two together), and every node is
named after the part it belongs to, ``stages.1.blocks.0/Conv_12``, so that a profile can say where the time went.

Shapes: B batch, C channels, h and w the map of a stage, N = h * w tokens, H heads, K key width, V value width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from efficientformer.export.proto import INPUT, OPSET, OUTPUT, sign
from efficientformer.spec import geometry
from efficientformer.spec.arch import ArchSpec, BlockSpec, StageSpec
from efficientformer.spec.count import count
from efficientformer.spec.errors import SpecError, missing_extra
from efficientformer.spec.geometry import STEM_STRIDES, Grid
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import PreprocessSpec

IR_VERSION = 10
LAYER_NORM_EPS = 1e-5
MAX_BYTES = 2_000_000_000  # of the weights: protobuf ends at 2 GiB


def write_network(spec: ArchSpec, path: str | Path, *, name: str = "") -> Path:
    """Write a network with random weights as an .onnx file with a manifest, as ``efficientformer convert`` would.

    Args:
        spec: The architecture.
        path: The file.
        name: What results call the network.

    Raises:
        MissingExtraError: If onnx is not installed.
        SpecError: If it does not fit into one file.
    """
    if (size := 4 * weights_in_graph(spec)) > MAX_BYTES:
        found, hint = f"{size / 1e9:.1f} GB, most of it biases of attention", "Take a smaller input size"
        raise SpecError("A network too large for an ONNX file", expected="less than 2 GB", found=found, hint=hint)
    proto = network_proto(spec, name=name)
    path = Path(path)
    path.write_bytes(proto.SerializeToString())
    return path


def weights_in_graph(spec: ArchSpec) -> int:
    """Return how many numbers the graph of a network holds: its parameters, and every attention's bias gathered."""
    gathered = 0
    for stage, grid, before in zip(spec.stages, spec.grids, (spec.grids[0], *spec.grids), strict=False):
        strides = [block.stride for block in stage.blocks if block.has_attention]
        gathered += sum((_area(grid) // stride**2) ** 2 for stride in strides)
        gathered += _area(grid) * _area(before) if stage.embedding == "attn" else 0
    return count(spec).params + spec.attention.num_heads * gathered


def network_proto(spec: ArchSpec, *, name: str = "") -> Any:  # noqa: ANN401 (an onnx.ModelProto)
    """Return the exported graph of ``spec`` with random weights, as an onnx.ModelProto.

    Raises:
        MissingExtraError: If onnx is not installed.
    """
    graph = GraphWriter()
    x = _stem(graph, spec, INPUT)
    dim = spec.stages[0].width
    for index, stage in enumerate(spec.stages):
        x = _stage(graph, spec, index, dim, x)
        dim = stage.width
    _head(graph, spec, x)
    preprocess = PreprocessSpec(spec.input_size, "squash", 0)
    if spec.in_chans == 1:
        preprocess = preprocess.grey()
    provenance = {"name": f"{name}, random weights" if name else "random weights"}
    manifest = Manifest(spec, preprocess, provenance=provenance)
    return graph.proto((spec.in_chans, *spec.input_size), spec.num_classes, manifest)


class GraphWriter:
    """Collects ONNX nodes and random weights; ``part`` is the prefix of the names of what is added."""

    def __init__(self) -> None:
        try:
            from onnx import helper, numpy_helper
        except ImportError as error:
            raise missing_extra("torch", "Writing a network to be timed", error) from error
        self._helper, self._numpy = helper, numpy_helper
        self._rng = np.random.default_rng(0)  # their values do not change the time
        self._nodes: list[Any] = []
        self._tensors: list[Any] = []
        self.part = ""

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:  # noqa: ANN401 (ONNX's own)
        """Add a node; return the name of its first output (the others end in _1, _2, ...)."""
        name = f"{self.part}/{kind}_{len(self._nodes)}"
        names = [name, *(f"{name}_{i}" for i in range(1, outputs))]
        self._nodes.append(self._helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return name

    def weight(self, *shape: int, fan_in: int = 1) -> str:
        """Add random weights that keep activations of unit size, so that no denormal number slows an engine down."""
        values = self._rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(fan_in))
        return self._tensor("weight", values)

    def ints(self, *values: int) -> str:
        """Add a constant of whole numbers: a shape, or axes."""
        return self._tensor("shape", np.array(values, np.int64))

    def floats(self, *values: float) -> str:
        """Add a constant of numbers."""
        return self._tensor("const", np.array(values, np.float32))

    def _tensor(self, kind: str, values: npt.NDArray[Any]) -> str:
        name = f"{self.part}/{kind}.{len(self._tensors)}"
        self._tensors.append(self._numpy.from_array(values, name))
        return name

    def conv(
        self,
        x: str,
        dim: int,
        out_dim: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        pad: int | None = None,
    ) -> str:
        """Add a convolution with bias, BatchNorm already folded in: (B, dim, h, w) to (B, out_dim, h', w').

        ``pad`` is on each side; by default it keeps the map at stride 1.
        """
        weight = self.weight(out_dim, dim // groups, kernel, kernel, fan_in=dim // groups * kernel**2)
        pad = kernel // 2 if pad is None else pad
        return self.op(
            "Conv", x, weight, self.weight(out_dim),
            group=groups, pads=[pad] * 4, strides=[stride] * 2, dilations=[1, 1], kernel_shape=[kernel] * 2,
        )  # fmt: skip

    def linear(self, x: str, dim: int, out_dim: int) -> str:
        """Add a linear layer on tokens: (B, N, dim) to (B, N, out_dim)."""
        product = self.op("MatMul", x, self.weight(dim, out_dim, fan_in=dim))
        return self.op("Add", product, self.weight(out_dim))

    def gelu(self, x: str) -> str:
        """Add the exact GELU."""
        return self.op("Gelu", x, approximate="none")

    def layer_norm(self, x: str, dim: int) -> str:
        """Add a LayerNorm over the last axis whose factors are folded away."""
        return self.op("LayerNormalization", x, self.floats(*[1.0] * dim), axis=-1, epsilon=LAYER_NORM_EPS)

    def reshape(self, x: str, *shape: int) -> str:
        """Add a reshape of everything but the batch."""
        return self.op("Reshape", x, self.ints(-1, *shape), allowzero=1)

    def transpose(self, x: str, *perm: int) -> str:
        """Add a transposition."""
        return self.op("Transpose", x, perm=list(perm))

    def proto(self, image: tuple[int, ...], num_classes: int, manifest: Manifest) -> Any:  # noqa: ANN401
        """Return the model: images (B, *image) to logits (B, num_classes)."""
        make, float32 = self._helper.make_tensor_value_info, 1
        last = self._nodes[-1]
        last.output[0] = OUTPUT
        ports = make(INPUT, float32, ["batch", *image]), make(OUTPUT, float32, ["batch", num_classes])
        graph = self._helper.make_graph(self._nodes, "network", [ports[0]], [ports[1]], self._tensors)
        opsets = [self._helper.make_opsetid("", OPSET)]
        model = self._helper.make_model(graph, opset_imports=opsets)
        model.ir_version = IR_VERSION
        sign(model, manifest)
        return model


def _stem(graph: GraphWriter, spec: ArchSpec, x: str) -> str:
    """Add the convolution stem: (B, in_chans, height, width) to (B, C1, h1, w1)."""
    graph.part = "stem"
    width = spec.stages[0].width
    dims = (spec.in_chans, width // 2, width)
    for dim, out_dim, stride in zip(dims, dims[1:], STEM_STRIDES[spec.stem_stride], strict=False):
        x = graph.conv(x, dim, out_dim, 3, stride=stride)
        x = graph.op("Relu", x) if spec.family == "v1" else graph.gelu(x)
    return x


def _stage(graph: GraphWriter, spec: ArchSpec, index: int, dim: int, x: str) -> str:
    """Add a stage: (B, dim, h, w) to (B, C, h', w')."""
    stage, grid = spec.stages[index], spec.grids[index]
    if stage.embedding != "stem":
        graph.part = f"stages.{index}.embedding"
        attn = _attention_embedding(graph, spec, stage, dim, index, x) if stage.embedding == "attn" else ""
        x = graph.conv(x, dim, stage.width, 3, stride=2)
        x = graph.op("Add", attn, x) if attn else x
    on_tokens = False
    for number, block in enumerate(stage.blocks):
        graph.part = f"stages.{index}.blocks.{number}"
        if block.kind != "mb3d":
            x = map_block(graph, spec, stage, block, grid, x)
            continue
        if not on_tokens:
            x = graph.transpose(graph.reshape(x, stage.width, _area(grid)), 0, 2, 1)  # (B, N, C)
            on_tokens = True
        x = token_block(graph, spec, stage, block, grid, x)
    if on_tokens:
        # before the head the exporter merges the reshape back to a map with the head's own to tokens
        shape = grid if index < len(spec.stages) - 1 else (_area(grid),)
        x = graph.reshape(graph.transpose(x, 0, 2, 1), stage.width, *shape)
    return x


def _area(grid: Grid) -> int:
    return grid[0] * grid[1]


def map_block(graph: GraphWriter, spec: ArchSpec, stage: StageSpec, block: BlockSpec, grid: Grid, x: str) -> str:
    """Add an MB4D, FFN or attention block on maps: (B, C, h, w) to (B, C, h, w)."""
    dim, hidden = stage.width, stage.hidden(block)
    if block.kind == "mb4d":
        pooled = graph.op(
            "AveragePool", x, count_include_pad=0, ceil_mode=0, pads=[1] * 4, strides=[1, 1], kernel_shape=[3, 3]
        )
        x = graph.op("Add", x, graph.op("Mul", graph.op("Sub", pooled, x), graph.weight(dim, 1, 1)))
    elif block.kind == "attn_ffn":
        x = graph.op("Add", x, _map_attention(graph, spec, dim, block, grid, x))
    y = graph.gelu(graph.conv(x, dim, hidden))
    if spec.family == "v2":
        y = graph.gelu(graph.conv(y, hidden, hidden, 3, groups=hidden))
    return graph.op("Add", x, graph.conv(y, hidden, dim))


def token_block(graph: GraphWriter, spec: ArchSpec, stage: StageSpec, block: BlockSpec, grid: Grid, x: str) -> str:
    """Add an MB3D: (B, N, C) to (B, N, C)."""
    dim, hidden, tokens, sizes = stage.width, stage.hidden(block), _area(grid), spec.attention
    heads, key_dim, value_dim = sizes.num_heads, sizes.key_dim, sizes.key_dim * sizes.value_ratio
    qkv = graph.linear(graph.layer_norm(x, dim), dim, heads * (2 * key_dim + value_dim))
    qkv = graph.transpose(graph.reshape(qkv, tokens, heads, 2 * key_dim + value_dim), 0, 2, 1, 3)  # (B, H, N, 2K+V)
    widths = graph.ints(key_dim, key_dim, value_dim)
    q = graph.op("Split", qkv, widths, outputs=3, axis=3)
    k, v = f"{q}_1", f"{q}_2"
    y = weighted_attention(graph, q, graph.transpose(k, 0, 1, 3, 2), v, (heads, tokens, tokens), None)  # (B, H, N, V)
    y = graph.reshape(graph.transpose(y, 0, 2, 1, 3), tokens, heads * value_dim)
    x = graph.op("Add", x, graph.linear(y, heads * value_dim, dim))
    y = graph.gelu(graph.linear(graph.layer_norm(x, dim), dim, hidden))
    return graph.op("Add", x, graph.linear(y, hidden, dim))


def weighted_attention(
    graph: GraphWriter, q: str, k: str, v: str, shape: tuple[int, int, int], talking_heads: int | None
) -> str:
    """Add biased attention: queries (B, H, Q, K), keys (B, H, K, N) and values (B, H, N, V) to (B, H, Q, V)."""
    scores = graph.op("Add", graph.op("MatMul", q, k), graph.weight(*shape))  # (B, H, Q, N)
    if talking_heads is None:
        return graph.op("MatMul", graph.op("Softmax", scores, axis=-1), v)
    weights = graph.op("Softmax", graph.conv(scores, talking_heads, talking_heads), axis=-1)
    return graph.op("MatMul", graph.conv(weights, talking_heads, talking_heads), v)


def _map_attention(graph: GraphWriter, spec: ArchSpec, dim: int, block: BlockSpec, grid: Grid, x: str) -> str:
    """Add V2's attention on maps: (B, C, h, w) to (B, C, h, w)."""
    sizes, stride = spec.attention, block.stride
    heads = sizes.num_heads
    keys, values = heads * sizes.key_dim, heads * sizes.key_dim * sizes.value_ratio
    inner = (grid[0] // stride, grid[1] // stride)
    tokens = _area(inner)
    if stride > 1:
        x = graph.conv(x, dim, dim, 3, stride=stride, groups=dim)
    q = graph.transpose(graph.reshape(graph.conv(x, dim, keys), heads, sizes.key_dim, tokens), 0, 1, 3, 2)
    k = graph.reshape(graph.conv(x, dim, keys), heads, sizes.key_dim, tokens)
    v = graph.conv(x, dim, values)
    local = graph.conv(v, values, values, 3, groups=values)
    v = graph.transpose(graph.reshape(v, heads, values // heads, tokens), 0, 1, 3, 2)
    y = weighted_attention(graph, q, k, v, (heads, tokens, tokens), heads)
    y = graph.op("Add", graph.reshape(graph.transpose(y, 0, 1, 3, 2), values, *inner), local)
    if stride > 1:
        y = graph.op(
            "Resize", y, "", graph.floats(1, 1, stride, stride),
            mode="linear", coordinate_transformation_mode="half_pixel", nearest_mode="floor",
        )  # fmt: skip
    return graph.conv(graph.gelu(y), values, dim)


def _attention_embedding(graph: GraphWriter, spec: ArchSpec, stage: StageSpec, dim: int, index: int, x: str) -> str:
    """Add the attention half of V2's embedding: (B, C, h, w) to (B, C', ceil(h/2), ceil(w/2))."""
    sizes, grid = spec.attention, spec.grids[index - 1]
    heads, key_dim = sizes.num_heads, sizes.embedding_key_dim
    keys, values = heads * key_dim, heads * key_dim * sizes.value_ratio
    inner = (geometry.halve(grid[0]), geometry.halve(grid[1]))
    queries, tokens = _area(inner), _area(grid)
    q = graph.conv(x, dim, dim, 3, stride=2, groups=dim)
    everywhere = x
    for axis in (2, 3):  # every second row, then every second column
        bounds = (graph.ints(0), graph.ints(2**63 - 1), graph.ints(axis), graph.ints(2))
        everywhere = graph.op("Slice", everywhere, *bounds)
    q = graph.conv(graph.op("Add", q, everywhere), dim, keys)
    q = graph.transpose(graph.reshape(q, heads, key_dim, queries), 0, 1, 3, 2)
    k = graph.reshape(graph.conv(x, dim, keys), heads, key_dim, tokens)
    v = graph.conv(x, dim, values)
    local = graph.conv(v, values, values, 3, stride=2, groups=values)
    v = graph.transpose(graph.reshape(v, heads, values // heads, tokens), 0, 1, 3, 2)
    y = weighted_attention(graph, q, k, v, (heads, queries, tokens), None)
    y = graph.op("Add", graph.reshape(graph.transpose(y, 0, 1, 3, 2), values, *inner), local)
    return graph.conv(graph.gelu(y), values, stage.width)


def _head(graph: GraphWriter, spec: ArchSpec, x: str) -> None:
    """Add the final norm, the mean over positions and the averaged head: (B, C, h, w) to (B, num_classes)."""
    stage, width = spec.stages[-1], spec.stages[-1].width
    graph.part = "norm"
    if spec.family == "v1":
        on_tokens = bool(stage.blocks) and stage.blocks[-1].kind == "mb3d"
        x = x if on_tokens else graph.reshape(x, width, _area(spec.grids[-1]))
        x = graph.layer_norm(graph.transpose(x, 0, 2, 1), width)
    axes = graph.ints(1) if spec.family == "v1" else graph.ints(2, 3)
    x = graph.op("ReduceMean", x, axes, keepdims=0, noop_with_empty_axes=0)
    graph.part = "head"
    weight = graph.weight(spec.num_classes, width, fan_in=width)
    graph.op("Gemm", x, weight, graph.weight(spec.num_classes), transB=1)
