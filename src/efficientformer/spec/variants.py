"""The networks the papers publish, and ours for small images, as specs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from efficientformer.spec.arch import ArchSpec, AttentionSpec, BlockSpec, StageSpec
from efficientformer.spec.fields import as_pair

# Widths, blocks per stage, and how many last blocks of stage 4 are MB3D: V1 paper, table 5 (appendix).
_V1 = {
    "l1": ((48, 96, 224, 448), (3, 2, 6, 4), 1),
    "l3": ((64, 128, 320, 512), (4, 4, 12, 6), 4),
    "l7": ((96, 192, 384, 768), (6, 6, 18, 8), 8),
}

# Widths, expansion ratio of every block, and how many last blocks of stages 3 and 4 have attention: V2 paper,
# table 7 (appendix), and the authors' models/efficientformer_v2.py.
_V2: dict[str, tuple[tuple[int, ...], tuple[tuple[int, ...], ...], int]] = {
    "s0": ((32, 48, 96, 176), ((4,) * 2, (4,) * 2, (4, 3, 3, 3, 4, 4), (4, 3, 3, 4)), 2),
    "s1": ((32, 48, 120, 224), ((4,) * 3, (4,) * 3, (4, 4, 3, 3, 3, 3, 4, 4, 4), (4, 4, 3, 3, 4, 4)), 2),
    "s2": ((32, 64, 144, 288), ((4,) * 4, (4,) * 4, (4, 4, *(3,) * 6, *(4,) * 4), (4, 4, 3, 3, 3, 3, 4, 4)), 4),
    "l": (
        (40, 80, 192, 384),
        ((4,) * 5, (4,) * 5, (*(4,) * 4, *(3,) * 7, *(4,) * 4), (4, 4, 4, 3, 3, 3, 3, 4, 4, 4)),
        6,
    ),
}


def v1_spec(
    widths: Sequence[int],
    depths: Sequence[int],
    num_mb3d: int | Sequence[int],
    *,
    expansion: float = 4.0,
    input_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    distilled: bool = True,
    stem_stride: int = 4,
) -> ArchSpec:
    """Return a V1 network.

    Args:
        widths: Channels of the four stages.
        depths: Blocks of the four stages.
        num_mb3d: How many last blocks of stage 4 (or, as a pair, of stages 3 and 4) are MB3D; the rest are MB4D.
        expansion: MLP expansion of every block.
        input_size: Input side in pixels, or (height, width).
        in_chans: Input channels.
        num_classes: Classes.
        distilled: Whether there is a distillation head.
        stem_stride: Total stride of the stem, 1, 2 or 4.

    Raises:
        SpecError: If this describes no network.
    """
    last_two = (0, num_mb3d) if isinstance(num_mb3d, int) else tuple(num_mb3d)
    stages = []
    for index, (width, depth, tokens) in enumerate(zip(widths, depths, (0, 0, *last_two), strict=True)):
        kinds = ["mb4d"] * (depth - tokens) + ["mb3d"] * min(tokens, depth)
        blocks = tuple(BlockSpec(kind, expansion) for kind in kinds)
        stages.append(StageSpec(width, blocks, "stem" if index == 0 else "conv"))
    return ArchSpec(
        "v1",
        tuple(stages),
        as_pair("input size", input_size),
        in_chans=in_chans,
        num_classes=num_classes,
        distilled=distilled,
        stem_stride=stem_stride,
    )


def v2_spec(
    widths: Sequence[int],
    expansions: Sequence[Sequence[float]],
    num_attention: int,
    *,
    input_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    distilled: bool = True,
    stem_stride: int = 4,
    stage3_stride: int = 2,
) -> ArchSpec:
    """Return a V2 network.

    Args:
        widths: Channels of the four stages.
        expansions: MLP expansion ratio of every block of the four stages.
        num_attention: How many last blocks of stages 3 and 4 have attention.
        input_size: Input side in pixels, or (height, width).
        in_chans: Input channels.
        num_classes: Classes.
        distilled: Whether there is a distillation head.
        stem_stride: Total stride of the stem, 1, 2 or 4.
        stage3_stride: Stride of the attention in stage 3.

    Raises:
        SpecError: If this describes no network.
    """
    stages = []
    for index, (width, ratios) in enumerate(zip(widths, expansions, strict=True)):
        first = len(ratios) - (num_attention if index >= 2 else 0)
        blocks = tuple(
            BlockSpec("attn_ffn", ratio, stage3_stride if index == 2 else 1) if i >= first else BlockSpec("ffn", ratio)
            for i, ratio in enumerate(ratios)
        )
        stages.append(StageSpec(width, blocks, ("stem", "conv", "conv", "attn")[index]))
    return ArchSpec(
        "v2",
        tuple(stages),
        as_pair("input size", input_size),
        in_chans=in_chans,
        num_classes=num_classes,
        distilled=distilled,
        stem_stride=stem_stride,
    )


def _cifar10_spec() -> ArchSpec:
    """The embedded model: V2 blocks for 32-pixel images, first stage without blocks, small attention."""
    spec = v2_spec(
        widths=(64, 128, 192, 224),
        expansions=((), (1, 1, 1), (2, 2, 2), ()),
        num_attention=1,
        input_size=32,
        num_classes=10,
        distilled=False,
        stem_stride=1,
        stage3_stride=1,
    )
    return dataclasses.replace(spec, attention=AttentionSpec(num_heads=4, key_dim=16, value_ratio=2))


VARIANTS: dict[str, ArchSpec] = {
    **{f"efficientformer_{name}": v1_spec(*sizes) for name, sizes in _V1.items()},
    **{f"efficientformerv2_{name}": v2_spec(*sizes) for name, sizes in _V2.items()},
    "efficientformer_cifar10": _cifar10_spec(),
}


def variant_of(spec: ArchSpec) -> str | None:
    """Return which of the networks above a spec is, whatever its input, channels and classes; None of any other."""
    parts = (spec.family, spec.stages, spec.attention, spec.stem_stride, spec.distilled)
    for name, known in VARIANTS.items():
        if parts == (known.family, known.stages, known.attention, known.stem_stride, known.distilled):
            return name
    return None
