"""Parameters and MACs of a network, counted from its spec alone, block by block.

Conventions (they differ between publications, so both numbers are always named): parameters are every learned value,
both heads and the normalisations' factors included, running statistics not; MACs are multiplications of convolutions,
linear layers and attention products at batch 1, both heads; normalisation, activation, pooling and upsampling count 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from efficientformer.spec import geometry
from efficientformer.spec.arch import ArchSpec, AttentionSpec, BlockSpec, StageSpec
from efficientformer.spec.geometry import Grid


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters, and multiply-accumulates by kind. Counts add up with ``+``."""

    params: int = 0
    conv_macs: int = 0
    linear_macs: int = 0
    attention_macs: int = 0

    @property
    def macs(self) -> int:
        """All MACs: convolutions, linear layers and attention products."""
        return self.conv_macs + self.linear_macs + self.attention_macs

    def __add__(self, other: Count) -> Count:
        return Count(
            self.params + other.params,
            self.conv_macs + other.conv_macs,
            self.linear_macs + other.linear_macs,
            self.attention_macs + other.attention_macs,
        )


@dataclass(frozen=True, slots=True)
class PartCount:
    """One named part of the network: ``stem``, ``stages.0.blocks.1``, ``head`` ...

    Attributes:
        name: The part's module name in the built network.
        kind: ``stem``, ``embedding``, a block kind, ``norm`` or ``head``.
        count: Its parameters and MACs.
        shape: Output shape without the batch: (channels, height, width), or (classes,) for heads.
    """

    name: str
    kind: str
    count: Count
    shape: tuple[int, ...]


def count_parts(spec: ArchSpec) -> tuple[PartCount, ...]:
    """Return the count of every part of the network, in the order of execution."""
    width, grid = spec.stages[0].width, spec.grids[0]
    parts = [PartCount("stem", "stem", _stem(spec), (width, *grid))]
    for index, (stage, grid) in enumerate(zip(spec.stages, spec.grids, strict=True)):
        prefix, shape = f"stages.{index}", (stage.width, *grid)
        if index > 0:
            embedding = _embedding(spec, stage, width, spec.grids[index - 1], grid)
            parts.append(PartCount(f"{prefix}.embedding", "embedding", embedding, shape))
        for number, block in enumerate(stage.blocks):
            parts.append(PartCount(f"{prefix}.blocks.{number}", block.kind, _block(spec, stage, block, grid), shape))
        width = stage.width
    parts.append(PartCount("norm", "norm", Count(2 * width), (width,)))
    for head in ("head", "head_dist") if spec.distilled else ("head",):
        parts.append(PartCount(head, "head", _linear(width, spec.num_classes, 1), (spec.num_classes,)))
    return tuple(parts)


def count(spec: ArchSpec) -> Count:
    """Return the parameters and MACs of the whole network."""
    return sum((part.count for part in count_parts(spec)), Count())


def _area(grid: Grid) -> int:
    return grid[0] * grid[1]


def _linear(dim: int, out_dim: int, positions: int) -> Count:
    return Count(dim * out_dim + out_dim, linear_macs=dim * out_dim * positions)


def _conv(dim: int, out_dim: int, grid: Grid, kernel: int = 1, groups: int = 1, norm: bool = True) -> Count:
    weights = dim // groups * out_dim * kernel * kernel
    affine = 2 * out_dim if norm else 0
    return Count(weights + out_dim + affine, conv_macs=weights * _area(grid))


def _stem(spec: ArchSpec) -> Count:
    width = spec.stages[0].width
    half = spec.input_size if spec.stem_stride == 1 else tuple(map(geometry.halve, spec.input_size))
    return _conv(spec.in_chans, width // 2, (half[0], half[1]), 3) + _conv(width // 2, width, spec.grids[0], 3)


def _embedding(spec: ArchSpec, stage: StageSpec, dim: int, grid: Grid, out_grid: Grid) -> Count:
    total = _conv(dim, stage.width, out_grid, 3)
    if stage.embedding == "conv":
        return total
    sizes = spec.attention
    keys = sizes.num_heads * sizes.embedding_key_dim
    values = keys * sizes.value_ratio
    return (
        total
        + _conv(dim, dim, out_grid, 3, groups=dim, norm=False)  # queries: local convolution, then projection
        + _conv(dim, keys, out_grid)
        + _conv(dim, keys, grid)
        + _conv(dim, values, grid)
        + _conv(values, values, out_grid, 3, groups=values)  # local values
        + _conv(values, stage.width, out_grid)
        + Count(sizes.num_heads * _area(grid), attention_macs=_area(out_grid) * _area(grid) * (keys + values))
    )


def _block(spec: ArchSpec, stage: StageSpec, block: BlockSpec, grid: Grid) -> Count:
    dim, hidden = stage.width, stage.hidden(block)
    if block.kind == "mb3d":
        tokens = _area(grid)
        mlp = _linear(dim, hidden, tokens) + _linear(hidden, dim, tokens)
        return mlp + _token_attention(dim, spec.attention, tokens) + Count(6 * dim)  # two LayerNorms, two layer scales
    mlp = _conv(dim, hidden, grid) + _conv(hidden, dim, grid)
    if spec.family == "v2":
        mlp += _conv(hidden, hidden, grid, 3, groups=hidden)
    if block.kind == "attn_ffn":
        mlp += _map_attention(dim, spec.attention, grid, block.stride)
    return mlp + Count(dim if block.kind == "ffn" else 2 * dim)  # layer scales: one per residual branch


def _token_attention(dim: int, sizes: AttentionSpec, tokens: int) -> Count:
    keys = sizes.num_heads * sizes.key_dim
    values = keys * sizes.value_ratio
    projections = _linear(dim, 2 * keys + values, tokens) + _linear(values, dim, tokens)
    return projections + Count(sizes.num_heads * tokens, attention_macs=tokens**2 * (keys + values))


def _map_attention(dim: int, sizes: AttentionSpec, grid: Grid, stride: int) -> Count:
    heads = sizes.num_heads
    keys = heads * sizes.key_dim
    values = keys * sizes.value_ratio
    inner = (grid[0] // stride, grid[1] // stride)
    positions = _area(inner)
    total = _conv(dim, keys, inner) + _conv(dim, keys, inner) + _conv(dim, values, inner)
    total += _conv(values, values, inner, 3, groups=values)  # local values
    talking_head = _conv(heads, heads, (positions, positions), norm=False)
    total += talking_head + talking_head + _conv(values, dim, grid)  # projected after the upsample
    if stride > 1:
        total += _conv(dim, dim, inner, 3, groups=dim)
    return total + Count(heads * positions, attention_macs=positions**2 * (keys + values))
