"""The architecture of a network, read off the names and shapes of its weights.

Widths, depths, block kinds, expansions, attention sizes, classes and heads are all in the shapes. The input size is in
the length of the attention-bias tables as far as grids are square; the stem's stride is nowhere and taken as 4.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from efficientformer.spec.arch import (
    ATTENTION_KINDS,
    BLOCK_KINDS,
    ArchSpec,
    AttentionSpec,
    BlockSpec,
    StageSpec,
)
from efficientformer.spec.errors import CheckpointError
from efficientformer.spec.geometry import NUM_STAGES, Grid
from efficientformer.weights.formats.detect import detect_family, get_layout
from efficientformer.weights.formats.layout import BIASES, SAME, Layout, Rules, join, rename

STEM_STRIDE = 4
DEFAULT_SIDE = 224  # of a network without attention, which works on any size
MAX_DEPTH = 256


def infer_spec(state: Mapping[str, Tensor], layout: str, heads: ArchSpec | None = None) -> ArchSpec:
    """Return the spec of the network whose tensors are ``state``, named as in ``layout``.

    Only names and shapes are looked at, and only as many as it takes; whether all the rest fits is for the reader
    that maps every tensor to check.

    Args:
        state: Tensors by name, on any device.
        layout: ``native``, ``snap``, ``timm``, ``mmpretrain`` or ``transformers``.
        heads: A network whose classes and heads are taken where there are no heads.

    Raises:
        CheckpointError: If a tensor the architecture depends on is missing or misshapen.
        SpecError: If the shapes describe no legal network.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    names = _Names(get_layout(layout, detect_family(layout, shapes)), shapes)
    stages, attentions = _stages(names)
    num_classes, distilled = _heads(names, heads)
    return ArchSpec(
        names.layout.family,
        tuple(stages),
        _input_size(names, attentions),
        in_chans=names.shape(_Part(0, names.layout.stem, "stem"), "conv1.conv.weight", 4)[1],
        num_classes=num_classes,
        distilled=distilled,
        stem_stride=STEM_STRIDE,
        attention=_attention(names, attentions),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the network in the file: its stage (zero-based), its name there, and its kind."""

    stage: int
    prefix: str
    kind: str


class _Names:
    """Names and shapes of one file, asked for by our names."""

    def __init__(self, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.layout, self.shapes = layout, shapes
        self._sorted = sorted(shapes)

    def below(self, prefix: str) -> list[str]:
        """Return the names under a dotted prefix, relative to it."""
        start, end = (bisect_left(self._sorted, f"{prefix}{letter}") for letter in "./")  # "/" comes next after "."
        return [name[len(prefix) + 1 :] for name in self._sorted[start:end]]

    def shape(self, part: _Part, name: str, ndim: int) -> tuple[int, ...]:
        """Return the shape of our tensor ``name`` of a part, after checking that it has ``ndim`` sides, none 0."""
        theirs = join(part.prefix, rename(self.layout.tables.get(part.kind, SAME), name) or name)
        if theirs not in self.shapes:
            raise CheckpointError(f"{theirs} is missing", hint="Without it the architecture is unknown")
        shape = self.shapes[theirs]
        if len(shape) != ndim or 0 in shape:
            raise CheckpointError(f"{theirs} has an impossible shape", expected=f"{ndim} sides", found=str(list(shape)))
        return shape

    def part(self, stage: int, prefix: str, kinds: Sequence[str]) -> _Part:
        """Return a part as the one of ``kinds`` whose layer names fit best what is there."""
        present = self.below(prefix)
        return _Part(stage, prefix, min(kinds, key=lambda kind: _misfits(self.layout.tables[kind], present)))

    def blocks(self, stage: int) -> list[_Part]:
        """Find a stage's blocks by walking up the indices: those on maps, then those after the reshape, if any."""
        maps = self._walk(stage, 0, MAX_DEPTH)
        tokens = self._walk(stage, len(maps), len(maps))
        return [self.part(stage, prefix, BLOCK_KINDS[self.layout.family]) for prefix in (*maps, *tokens)]

    def _walk(self, stage: int, first: int, num_map: int) -> list[str]:
        prefixes = (self.layout.block(stage, index, num_map) for index in range(first, MAX_DEPTH))
        return list(takewhile(self.below, prefixes))


def _misfits(rules: Rules, present: Sequence[str]) -> int:
    """Count the names that no rule covers and the rules that cover no name."""
    layers = {theirs for _, theirs in rules}
    found = [{name, name.rpartition(".")[0]} & layers for name in present]
    return sum(not layer for layer in found) + len(layers - set().union(*found))


def _stages(names: _Names) -> tuple[list[StageSpec], list[_Part]]:
    """Return the stages, and every part of them that holds an attention."""
    layout, stages, attentions = names.layout, [], []
    kinds = ("conv", "attn") if "attn" in layout.tables else ("conv",)
    for number in range(NUM_STAGES):
        if number == 0:
            embedding = _Part(0, layout.stem, "stem")
        else:
            embedding = names.part(number, layout.embedding(number), kinds)
        last_conv = {"stem": "conv2.conv.weight", "conv": "conv.weight", "attn": "conv.conv.weight"}[embedding.kind]
        width = names.shape(embedding, last_conv, 4)[0]
        blocks = names.blocks(number)
        stages.append(StageSpec(width, tuple(_block(names, block, width) for block in blocks), embedding.kind))
        attentions += [part for part in (embedding, *blocks) if part.kind in (*ATTENTION_KINDS, "attn")]
    return stages, attentions


def _heads(names: _Names, absent: ArchSpec | None) -> tuple[int, bool]:
    """Return the number of classes, and whether there is a distillation head; those of ``absent`` without heads."""
    head, distilled = names.layout.head, bool(names.below(names.layout.head_dist))
    if names.below(head) or distilled:
        return names.shape(_Part(3, head, "head"), "weight", 2)[0], distilled
    if absent is None:
        hint = "Without it the classes are unknown: name the network, and give num_classes, to get new heads"
        raise CheckpointError(f"{head}.weight is missing", hint=hint)
    return absent.num_classes, absent.distilled


def _block(names: _Names, part: _Part, width: int) -> BlockSpec:
    hidden = (
        names.shape(part, "mlp.fc1.weight", 2)[0]
        if part.kind == "mb3d"
        else names.shape(part, "mlp.fc1.conv.weight", 4)[0]
    )
    expansion = hidden / width
    while int(width * expansion) < hidden:  # rounding may lose the last unit
        expansion = math.nextafter(expansion, math.inf)
    return BlockSpec(part.kind, expansion, _stride(names, part))


def _stride(names: _Names, part: _Part) -> int:
    strided = any(name.startswith("token_mixer.stride_conv.") for name in names.below(part.prefix))
    return 2 if part.kind == "attn_ffn" and strided else 1


def _attention(names: _Names, attentions: Sequence[_Part]) -> AttentionSpec:
    """Read the sizes off the first attention block and the first attention embedding."""
    sizes: dict[str, int] = {}
    for part in attentions:
        mixer = "attn" if part.kind == "attn" else "token_mixer"
        heads = names.shape(part, f"{mixer}.{BIASES}", 2)[0]
        if part.kind == "mb3d":
            values = names.shape(part, "token_mixer.proj.weight", 2)[1]
            keys = (names.shape(part, "token_mixer.qkv.weight", 2)[0] - values) // 2
        else:
            values = names.shape(part, f"{mixer}.v.conv.weight", 4)[0]
            keys = names.shape(part, f"{mixer}.k.conv.weight", 4)[0]
        width = "embedding_key_dim" if part.kind == "attn" else "key_dim"
        found = {"num_heads": heads, width: keys // heads, "value_ratio": values // max(keys, 1)}
        sizes = found | sizes
    return AttentionSpec(**sizes)


def _input_size(names: _Names, attentions: Sequence[_Part]) -> Grid:
    """Return the smallest square input (height, width) that gives the grids of the bias tables."""
    sides: dict[int, int] = {}  # by stage
    for part in attentions:
        embeds = part.kind == "attn"
        length = names.shape(part, f"{'attn' if embeds else 'token_mixer'}.{BIASES}", 2)[1]
        side = math.isqrt(length)
        if side * side != length:
            raise CheckpointError(
                f"The attention of {part.prefix} is not on a square map",
                expected="a bias table with a square number of entries",
                found=str(length),
                hint="Only a file with a manifest can say other shapes than squares",
            )
        # an embedding attends to the map of the stage before it
        sides.setdefault(part.stage - embeds, side * _stride(names, part))
    if not sides:
        return DEFAULT_SIDE, DEFAULT_SIDE
    stage = min(sides)
    side = (sides[stage] * STEM_STRIDE) << stage
    return side, side
