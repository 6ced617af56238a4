"""Which networks a latency table is for, and the designed sample of them that is measured. Standard library only."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product

from efficientformer.latency.parts import Part, parts_of
from efficientformer.spec.arch import (
    ATTENTION_STAGES,
    BLOCK_KINDS,
    ArchSpec,
    AttentionSpec,
    BlockSpec,
    StageSpec,
)
from efficientformer.spec.errors import InputSizeError, SpecError
from efficientformer.spec.fields import as_list, as_pair, check_choice, check_int
from efficientformer.spec.geometry import NUM_STAGES, Grid

WIDTHS = tuple(range(16, 257, 16))
DEPTHS = (3, 3, 6, 4)
ATTENTION = AttentionSpec()  # the published networks'
EMBEDDINGS = {"v1": ("stem", "conv", "conv", "conv"), "v2": ("stem", "conv", "conv", "attn")}  # theirs, too
SORTED_SHARE = 0.85  # of the sampled networks; the rest has widths in any order, as a slimmed network may
SHALLOW_SHARE = 0.25  # of the networks measured for a table: no more than one block in a stage
MAX_TRIES = 20_000
MAX_WIDTHS = 256


@dataclass(frozen=True, slots=True)
class TableSpace:
    """A space of networks.

    Attributes:
        family: ``v1`` or ``v2``.
        widths: Widths any stage may have.
        max_widths: Widest of ``widths`` that each stage may have; empty for no limit.
        depths: Most blocks of each stage; every number from 0 on is in the space.
        expansions: Expansion ratios any block may have.
        input_sizes: Input sizes: a side, or (height, width).
        stem_strides: Total strides of the stem.
        in_chans: Input channels.
        num_classes: Classes.
        attention: Sizes of the attentions.
        stage3_stride: For V2: stride of the attention in stage 3.
        embeddings: What leads into each stage; empty for what does in the family's published networks.

    Raises:
        SpecError: If a value is illegal.
    """

    family: str = "v1"
    widths: tuple[int, ...] = WIDTHS
    depths: tuple[int, ...] = DEPTHS
    expansions: tuple[float, ...] = (4.0,)
    input_sizes: tuple[tuple[int, int], ...] = ((32, 32),)
    stem_strides: tuple[int, ...] = (1, 2)
    in_chans: int = 3
    num_classes: int = 10
    attention: AttentionSpec = ATTENTION
    stage3_stride: int = 2
    max_widths: tuple[int, ...] = ()
    embeddings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("family", self.family, tuple(BLOCK_KINDS))
        for name, limit in (("widths", MAX_WIDTHS), ("depths", NUM_STAGES), ("expansions", 16), ("stem_strides", 3)):
            values = as_list(name, getattr(self, name), limit)
            if not values or (name != "depths" and len(set(values)) < len(values)):
                raise SpecError(f"Illegal {name}", expected="at least one value, each once", found=repr(values))
            object.__setattr__(self, name, tuple(values))
        for width in self.widths:
            check_int("width", width, 2, 8192)
        embeddings = as_list("embeddings", self.embeddings, NUM_STAGES) or EMBEDDINGS[self.family]
        object.__setattr__(self, "embeddings", tuple(embeddings))
        for name in ("depths", "embeddings"):
            if len(values := getattr(self, name)) != NUM_STAGES:
                raise SpecError(f"Illegal {name}", expected=f"one for each of {NUM_STAGES} stages", found=repr(values))
        for depth in self.depths:
            check_int("depth", depth, 0, 256)
        limits = as_list("max_widths", self.max_widths, NUM_STAGES)
        object.__setattr__(self, "max_widths", tuple(limits))
        if limits and (len(limits) != NUM_STAGES or min(limits) < min(self.widths)):
            found = repr(limits)
            raise SpecError("Illegal max_widths", expected=f"{NUM_STAGES} numbers from {min(self.widths)}", found=found)
        sizes = as_list("input sizes", self.input_sizes, 16)
        object.__setattr__(self, "input_sizes", tuple(as_pair("input size", size) for size in sizes))
        for size, stride, ratio in self.choices():  # every choice must describe networks
            blocks = [_blocks(self, stage, 1, 0, ratio) for stage in range(NUM_STAGES)]
            for width in self.widths:
                _network(self, [width] * NUM_STAGES, blocks, size, stride)

    def stage_widths(self, stage: int) -> tuple[int, ...]:
        """Return the widths a stage may have."""
        return tuple(width for width in self.widths if not self.max_widths or width <= self.max_widths[stage])

    def choices(self) -> Iterator[tuple[tuple[int, int], int, float]]:
        """Yield every combination of input size, stem stride and expansion ratio."""
        return product(self.input_sizes, self.stem_strides, self.expansions)


def _network(
    space: TableSpace, widths: Sequence[int], blocks: Sequence[tuple[BlockSpec, ...]], size: Grid, stride: int
) -> ArchSpec:
    stages = tuple(StageSpec(*stage) for stage in zip(widths, blocks, space.embeddings, strict=True))
    return ArchSpec(space.family, stages, size, space.in_chans, space.num_classes, False, stride, space.attention)


def _blocks(space: TableSpace, stage: int, depth: int, attention: int, ratio: float) -> tuple[BlockSpec, ...]:
    """Return ``depth`` blocks, the last ``attention`` of them with attention where the stage may have it."""
    plain, attending = BLOCK_KINDS[space.family]
    attention = attention if stage in ATTENTION_STAGES else 0
    stride = space.stage3_stride if attending == "attn_ffn" and stage == 2 else 1
    return (BlockSpec(plain, ratio),) * (depth - attention) + (BlockSpec(attending, ratio, stride),) * attention


def sample(space: TableSpace, rng: random.Random) -> ArchSpec:
    """Draw one network: every width, depth, ratio, input size and stride of the space equally likely.

    Raises:
        SpecError: If no network of the space works on its input sizes.
    """
    for _ in range(MAX_TRIES):
        widths = [rng.choice(space.stage_widths(stage)) for stage in range(NUM_STAGES)]
        if rng.random() < SORTED_SHARE:
            widths.sort()
            widths = [max(w for w in space.stage_widths(i) if w <= widths[i]) for i in range(NUM_STAGES)]
        blocks = []
        for stage, depth in enumerate(space.depths):
            count = rng.randint(0, depth)
            # attention in stage 3 in half of the networks: published ones have it in stage 4 first
            attention = rng.randint(0, count) if stage == NUM_STAGES - 1 or rng.random() < 0.5 else 0
            blocks.append(_blocks(space, stage, count, attention, rng.choice(space.expansions)))
        try:
            return _network(space, widths, blocks, rng.choice(space.input_sizes), rng.choice(space.stem_strides))
        except InputSizeError:  # V2's strided attention needs an even map
            continue
    raise SpecError("No network of the space works on its input sizes", found=str(space.input_sizes))


def design(space: TableSpace, networks: int, *, seed: int = 0) -> tuple[ArchSpec, ...]:
    """Return the networks to measure: a random sample in which every block of the space occurs.

    A share of them is shallow: embeddings are told from blocks only where there are few blocks, and random networks of
    a deep space hardly ever have few.

    Args:
        space: The space.
        networks: How many to measure at least; more are added while a block of the space occurs in none of them.
        seed: Of the sample.
    """
    rng = random.Random(seed)
    shallow = replace(space, depths=tuple(min(depth, 1) for depth in space.depths))
    few = round(SHALLOW_SHARE * networks)
    chosen = [sample(shallow if number < few else space, rng) for number in range(networks)]
    unseen = {part for part in all_parts(space) if part.is_block} - {part for spec in chosen for part in parts_of(spec)}
    for _ in range(MAX_TRIES):
        if not unseen:
            break
        spec = sample(space, rng)
        if new := unseen.intersection(parts_of(spec)):
            chosen.append(spec)
            unseen -= new
    return tuple(chosen)


def all_parts(space: TableSpace) -> tuple[Part, ...]:
    """Return every part that a network of the space may have, in a fixed order."""
    found: dict[Part, None] = {}
    every = [space.stage_widths(stage) for stage in range(NUM_STAGES)]
    pairs = [widths for i in range(NUM_STAGES) for widths in product(every[i - 1] if i else (every[0][0],), every[i])]
    for (size, stride, ratio), attention in product(space.choices(), (0, 1)):
        ones = (min(1, depth) for depth in space.depths)
        blocks = [_blocks(space, stage, depth, min(attention, depth), ratio) for stage, depth in enumerate(ones)]
        for before, width in dict.fromkeys(pairs):
            for stage in range(NUM_STAGES):
                # the stage and the one before it have these widths, all others their first
                widths = [each[0] for each in every]
                widths[stage], widths[stage - 1 if stage else 0] = width, before if stage else width
                if any(channels not in each for channels, each in zip(widths, every, strict=True)):
                    continue
                with suppress(InputSizeError):
                    found.update(dict.fromkeys(parts_of(_network(space, widths, blocks, size, stride))))
    return tuple(found)
