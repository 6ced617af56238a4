"""The four observations of the paper's latency analysis (arXiv 2206.01191, section 3.1), repeated on the user's engine.

Each compares small graphs that differ in one thing, at the sizes of EfficientFormer-L1 on 224 pixels, timed together.
What is compared are marginal costs where blocks repeat: a graph of several blocks less the same graph of none.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from efficientformer.export.proto import INPUT
from efficientformer.latency.graph import GraphWriter, map_block, token_block, weighted_attention
from efficientformer.latency.measure import Latency, time_engines
from efficientformer.runtime.engines import open_engine
from efficientformer.runtime.timing import environment
from efficientformer.spec.arch import BlockSpec, StageSpec
from efficientformer.spec.errors import UsageError
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.spec.progress import Progress
from efficientformer.spec.variants import v1_spec

PICTURE = (224, 224)
GRID, WIDTH, HIDDEN = (14, 14), 224, 896  # stage 3 of EfficientFormer-L1
TOKENS = GRID[0] * GRID[1]
BLOCKS = 4
MIN_PASSES, MAX_SPREAD = 16, 0.01  # see latency.measure
CLASSES = 10
MARGIN = 0.05  # differences below this share of the larger figure are called none
_WORDS = {True: "holds here", False: "does not hold here", None: "cannot be told here"}

Build = Callable[[GraphWriter, str], tuple[str, int]]  # adds a graph; returns its end, a map, and its channels


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the things compared.

    Attributes:
        name: What it is.
        ms: Its latency, or that of one of its blocks, in milliseconds.
        error_ms: Two standard errors: what it may be off, beside the others here.
    """

    name: str
    ms: float
    error_ms: float


@dataclass(frozen=True)
class Observation:
    """One observation and what was found here.

    Attributes:
        title: What the paper observed, in a few words.
        claim: What the paper says.
        variants: What was compared.
        holds: Whether it holds here; None if that cannot be told, or where a part of it holds and another does not.
        reason: The same in words: for each part of it where these differ, and why it cannot be told.
        verdict: What was found, in words with figures.
    """

    title: str
    claim: str
    variants: tuple[Variant, ...]
    holds: bool | None
    reason: str
    verdict: str

    @classmethod
    def of(
        cls, title: str, claim: str, variants: tuple[Variant, ...], parts: dict[str, bool | None], verdict: str
    ) -> Observation:
        """Return an observation that consists of named parts, which hold or not."""
        found = set(parts.values())
        if len(found) == 1:
            holds = found.pop()
            reason = _WORDS[holds]
        else:
            holds, reason = None, "; ".join(f"{name}: {_WORDS[each]}" for name, each in parts.items())
        if None in parts.values():
            reason += f": the errors are too large to tell a difference of {MARGIN:.0%}"
        return cls(title, claim, variants, holds, reason, verdict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Observations:
    """The four observations on one engine.

    Attributes:
        engine: The engine, its version and precision.
        threads: Its threads; None if it chose.
        observations: The four.
        environment: Where they were made.
        spread: Relative standard error of half of the latencies at most.
    """

    engine: str
    threads: int | None
    observations: tuple[Observation, ...]
    environment: dict[str, Any]
    spread: float

    @property
    def note(self) -> str:
        """How well the latencies repeat, and whether that is what was wanted."""
        busy = f": {MAX_SPREAD:.2%} was wanted, the machine is busy" if self.spread > MAX_SPREAD else ""
        return f"Half of the latencies repeat within {self.spread:.2%}{busy}."

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "engine": self.engine,
            "threads": self.threads,
            "observations": [each.to_dict() for each in self.observations],
            "environment": self.environment,
            "spread": round(self.spread, 5),
            "busy": self.spread > MAX_SPREAD,
        }


def observe(
    *, engine: str = "auto", precision: str = "auto", threads: int | None = None, progress: Progress | None = None
) -> Observations:
    """Repeat the paper's four comparisons.

    Args:
        engine: As for ``open_engine``.
        precision: As for ``open_engine``; not ``int8``.
        threads: As for ``open_engine``.
        progress: Told how it goes.

    Raises:
        UsageError: If the precision is int8.
        EngineError: If the engine cannot do the precision.
        MissingExtraError: If a library is not installed.
    """
    if precision == "int8":
        raise UsageError("The observations compare float graphs", expected="fp32, bf16 or fp16", found="int8")
    subjects = _subjects()
    with tempfile.TemporaryDirectory(prefix="efficientformer-", ignore_cleanup_errors=True) as folder:
        engines = []
        for index, (channels, grid, build) in enumerate(subjects.values()):
            file = _write(build, channels, grid, Path(folder) / f"{index}.onnx")
            engines.append(open_engine(file, engine, precision=precision, threads=threads))
        timings = dict(
            zip(
                subjects,
                time_engines(engines, min_passes=MIN_PASSES, max_spread=MAX_SPREAD, progress=progress),
                strict=True,
            )
        )
        first = engines[0]
    found = (_stems(timings), _mixers(timings), _norms(timings), _activations(timings))
    where = {**environment(first.key), "engine": first.name}
    spread = median(timing.error_ms / timing.ms for timing in timings.values())
    return Observations(first.name, threads, found, where, spread)


def _write(build: Build, channels: int, grid: tuple[int, int], path: Path) -> Path:
    """Write a graph from an input of ``channels`` maps of ``grid`` to ten logits."""
    graph = GraphWriter()
    graph.part = "subject"
    end, width = build(graph, INPUT)
    pooled = graph.op("ReduceMean", end, graph.ints(2, 3), keepdims=0, noop_with_empty_axes=0)
    graph.op("Gemm", pooled, graph.weight(CLASSES, width, fan_in=width), graph.weight(CLASSES), transB=1)
    spec = v1_spec(  # says which input and output the file has; the rest of it is not in the file
        (16,) * 4, (0,) * 4, 0, input_size=grid, in_chans=channels, num_classes=CLASSES, distilled=False, stem_stride=1
    )
    preprocess = PreprocessSpec(grid, "squash", 0)
    proto = graph.proto((channels, *grid), CLASSES, Manifest(spec, preprocess, provenance={"name": "experiment"}))
    path.write_bytes(proto.SerializeToString())
    return path


def _subjects() -> dict[str, tuple[int, tuple[int, int], Build]]:
    """Return everything that is timed: input channels, input map, and what builds the graph, by name."""
    picture = (3, PICTURE)
    stage = (WIDTH, GRID)
    return {
        "patch 4": (*picture, _convolutions([(64, 7, 4)], "")),
        "stem 4": (*picture, _convolutions([(32, 3, 2), (64, 3, 2)], "Relu")),
        "patch 16": (*picture, _convolutions([(384, 16, 16)], "")),
        "stem 16": (*picture, _convolutions([(48, 3, 2), (96, 3, 2), (192, 3, 2), (384, 3, 2)], "Relu")),
        "none": (*stage, _blocks("")),
        "pool": (*stage, _blocks("p" * BLOCKS)),
        "tokens one": (*stage, _blocks("t")),
        "tokens": (*stage, _blocks("t" * (BLOCKS + 1))),
        "maps": (*stage, _blocks("m" * BLOCKS)),
        "apart": (*stage, _blocks("p" * BLOCKS + "t" * BLOCKS)),
        "alternating": (*stage, _blocks("pt" * BLOCKS)),
        "conv gelu": (*stage, _mlps("conv", "Gelu")),
        "conv relu": (*stage, _mlps("conv", "Relu")),
        "conv hardswish": (*stage, _mlps("conv", "HardSwish")),
        "linear one": (*stage, _mlps("linear", "Gelu", 1)),
        "linear gelu": (*stage, _mlps("linear", "Gelu", BLOCKS + 1)),
    }


def _convolutions(layers: Sequence[tuple[int, int, int]], activation: str) -> Build:
    """Return a stack of convolutions, each (channels, kernel, stride); a large kernel sees patches, unpadded."""

    def build(graph: GraphWriter, x: str) -> tuple[str, int]:
        dim = 3
        for width, kernel, stride in layers:
            x = graph.conv(x, dim, width, kernel, stride=stride, pad=1 if kernel == 3 else (kernel - stride + 1) // 2)
            x = graph.op(activation, x) if activation else x
            dim = width
        return x, dim

    return build


def _blocks(kinds: str) -> Build:
    """Return blocks in a row: p MB4D with pooling, t MB3D on tokens, m attention on maps; reshapes where they meet."""
    spec = v1_spec((WIDTH,) * 4, (0,) * 4, 0, input_size=PICTURE)
    stage = StageSpec(WIDTH, (), "conv")

    def build(graph: GraphWriter, x: str) -> tuple[str, int]:
        on_tokens = False
        for kind in kinds:
            if (kind == "t") != on_tokens:
                x = _to_tokens(graph, x) if kind == "t" else _to_map(graph, x)
                on_tokens = kind == "t"
            if kind == "t":
                x = token_block(graph, spec, stage, BlockSpec("mb3d"), GRID, x)
            elif kind == "p":
                x = map_block(graph, spec, stage, BlockSpec("mb4d"), GRID, x)
            else:
                x = _mlp_on_map(graph, graph.op("Add", x, _attention_on_map(graph, x)), "Gelu")
        return (_to_map(graph, x) if on_tokens else x), WIDTH

    return build


def _to_tokens(graph: GraphWriter, x: str) -> str:
    return graph.transpose(graph.reshape(x, WIDTH, TOKENS), 0, 2, 1)


def _to_map(graph: GraphWriter, x: str) -> str:
    return graph.reshape(graph.transpose(x, 0, 2, 1), WIDTH, *GRID)


def _attention_on_map(graph: GraphWriter, x: str) -> str:
    """Add MB3D's attention with 1x1 convolutions in place of linear layers: the map is never transposed as a whole."""
    heads, key, value = 8, 32, 128
    q = graph.transpose(graph.reshape(graph.conv(x, WIDTH, heads * key), heads, key, TOKENS), 0, 1, 3, 2)
    k = graph.reshape(graph.conv(x, WIDTH, heads * key), heads, key, TOKENS)
    v = graph.transpose(graph.reshape(graph.conv(x, WIDTH, heads * value), heads, value, TOKENS), 0, 1, 3, 2)
    y = weighted_attention(graph, q, k, v, (heads, TOKENS, TOKENS), None)
    return graph.conv(graph.reshape(graph.transpose(y, 0, 1, 3, 2), heads * value, *GRID), heads * value, WIDTH)


def _mlp_on_map(graph: GraphWriter, x: str, activation: str) -> str:
    hidden = _activate(graph, graph.conv(x, WIDTH, HIDDEN), activation)
    return graph.op("Add", x, graph.conv(hidden, HIDDEN, WIDTH))


def _activate(graph: GraphWriter, x: str, activation: str) -> str:
    return graph.gelu(x) if activation == "Gelu" else graph.op(activation, x)


def _mlps(kind: str, activation: str, blocks: int = BLOCKS) -> Build:
    """Return residual MLPs: 1x1 convolutions with BatchNorm folded away, or LayerNorm and linear layers."""

    def build(graph: GraphWriter, x: str) -> tuple[str, int]:
        x = _to_tokens(graph, x) if kind == "linear" else x
        for _ in range(blocks):
            if kind == "conv":
                x = _mlp_on_map(graph, x, activation)
            else:
                hidden = _activate(graph, graph.linear(graph.layer_norm(x, WIDTH), WIDTH, HIDDEN), activation)
                x = graph.op("Add", x, graph.linear(hidden, HIDDEN, WIDTH))
        return (_to_map(graph, x) if kind == "linear" else x), WIDTH

    return build


def _variant(timings: dict[str, Latency], label: str, name: str, *, blocks: int = 0, less: str = "none") -> Variant:
    """Return the figure of a subject, or of one of the ``blocks`` that the subject ``less`` lacks."""
    timing, base = timings[name], timings[less] if blocks else None
    error = 2 * math.hypot(timing.error_ms, base.error_ms if base else 0.0)
    ms = timing.ms - (base.ms if base else 0.0)
    return Variant(label, max(0.0, ms) / max(1, blocks), error / max(1, blocks))


def _slower(first: Variant, second: Variant) -> bool | None:
    """Whether the first is slower by more than the margin; None if the errors of both do not let that be told."""
    gap, error = first.ms - second.ms, math.hypot(first.error_ms, second.error_ms)
    least = MARGIN * max(first.ms, second.ms)
    if gap > max(least, error):
        return True
    return False if gap + error <= least else None


def _not(outcome: bool | None) -> bool | None:
    return None if outcome is None else not outcome


def _ratio(first: Variant, second: Variant) -> str:
    return f"{first.ms / second.ms:.2f} times" if second.ms else "the second is too short to be measured"


def _figure(variant: Variant) -> str:
    return f"{variant.ms:.3f} ms (within {variant.error_ms:.3f})"


def _stems(timings: dict[str, Latency]) -> Observation:
    patch16 = _variant(timings, "patch embedding 16x16, stride 16", "patch 16")
    stem16 = _variant(timings, "four 3x3 convolutions of stride 2", "stem 16")
    patch4 = _variant(timings, "patch embedding 7x7, stride 4", "patch 4")
    stem4 = _variant(timings, "two 3x3 convolutions of stride 2", "stem 4")
    parts = {"to stride 16": _slower(patch16, stem16), "to stride 4": _slower(patch4, stem4)}
    verdict = (
        f"To stride 16 the patch embedding takes {_figure(patch16)}, the convolution stem {_figure(stem16)}: "
        f"{_ratio(patch16, stem16)}. To stride 4, {_figure(patch4)} and {_figure(stem4)}: {_ratio(patch4, stem4)}."
    )
    claim = "Patch embedding with a large kernel and stride is a bottleneck; a stem of 3x3 convolutions is not."
    variants = (patch16, stem16, patch4, stem4)
    return Observation.of("Patch embedding against convolution stem", claim, variants, parts, verdict)


def _mixers(timings: dict[str, Latency]) -> Observation:
    pool = _variant(timings, "block with pooling (MB4D)", "pool", blocks=BLOCKS)
    # less a network that has reshapes to tokens and back, too: they are no part of a block
    tokens = _variant(timings, "block with attention on tokens (MB3D)", "tokens", blocks=BLOCKS, less="tokens one")
    maps = _variant(timings, "block with attention on maps", "maps", blocks=BLOCKS)
    apart = _variant(timings, "MB4D and MB3D, one reshape in all", "apart", blocks=BLOCKS)
    alternating = _variant(timings, "MB4D and MB3D, a reshape at each", "alternating", blocks=BLOCKS)
    slow = {"reshapes": _slower(alternating, apart)}
    verdict = (
        f"A pair of MB4D and MB3D takes {_figure(apart)} with one reshape in the whole network and "
        f"{_figure(alternating)} with reshapes at every block: {_ratio(alternating, apart)}. The mixers themselves: "
        f"pooling {_figure(pool)} a block, attention on tokens {_figure(tokens)}, on maps {_figure(maps)}; "
        f"attention in place of pooling, {_ratio(tokens, pool)}."
    )
    claim = "A consistent layout matters for the choice of token mixer: reshapes between 4D and 3D are slow."
    variants = (pool, tokens, maps, apart, alternating)
    return Observation.of("Token mixers with and without reshapes", claim, variants, slow, verdict)


def _norms(timings: dict[str, Latency]) -> Observation:
    conv = _variant(timings, "MLP of convolutions, BatchNorm folded", "conv gelu", blocks=BLOCKS)
    # the reshapes again are left out
    linear = _variant(timings, "MLP of LayerNorm and linear layers", "linear gelu", blocks=BLOCKS, less="linear one")
    verdict = (
        f"LayerNorm and linear layers take {_figure(linear)} a block, convolutions with BatchNorm {_figure(conv)}: "
        f"{_ratio(linear, conv)}."
    )
    claim = "Conv-BN is faster than LayerNorm-Linear, because BatchNorm folds into the convolution."
    slow = {"LayerNorm-Linear": _slower(linear, conv)}
    return Observation.of("Conv-BN against LayerNorm-Linear", claim, (conv, linear), slow, verdict)


def _activations(timings: dict[str, Latency]) -> Observation:
    relu = _variant(timings, "ReLU", "conv relu", blocks=BLOCKS)
    gelu = _variant(timings, "GELU", "conv gelu", blocks=BLOCKS)
    swish = _variant(timings, "hard-swish", "conv hardswish", blocks=BLOCKS)
    parts = {
        "GELU hardly slower than ReLU": _not(_slower(gelu, relu)),
        "hard-swish slower than GELU": _slower(swish, gelu),
    }
    verdict = (
        f"A block of the MLP takes {_figure(relu)} with ReLU, {_figure(gelu)} with GELU ({_ratio(gelu, relu)}) and "
        f"{_figure(swish)} with hard-swish ({_ratio(swish, relu)})."
    )
    claim = (
        "What a nonlinearity costs depends on device and compiler: on the paper's phone GELU was hardly slower than "
        "ReLU, and hard-swish slow."
    )
    return Observation.of("ReLU, GELU, hard-swish", claim, (relu, gelu, swish), parts, verdict)
