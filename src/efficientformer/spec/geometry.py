"""Map sizes of a network: every stride-2 convolution is 3x3 with padding 1, so a side ``n`` becomes ``ceil(n / 2)``."""

from __future__ import annotations

from itertools import count

Grid = tuple[int, int]  # height and width of a map, or of an input in pixels

NUM_STAGES = 4
STEM_STRIDES = {4: (2, 2), 2: (2, 1), 1: (1, 1)}  # the stem's total stride to those of its two convolutions


def halve(side: int) -> int:
    """Return the side after a 3x3 convolution of stride 2 and padding 1: ``ceil(side / 2)``."""
    return (side + 1) // 2


def stage_sides(side: int, stem_stride: int) -> tuple[int, ...]:
    """Return one side of each stage's map for an input side in pixels."""
    for _ in range(stem_stride.bit_length() - 1):
        side = halve(side)
    sides = [side]
    for _ in range(NUM_STAGES - 1):
        sides.append(halve(sides[-1]))
    return tuple(sides)


def stage_grids(size: Grid, stem_stride: int) -> tuple[Grid, ...]:
    """Return (height, width) of each stage's map for an input size in pixels."""
    heights, widths = (stage_sides(side, stem_stride) for side in size)
    return tuple(zip(heights, widths, strict=True))


def least_side(stem_stride: int) -> int:
    """Return the smallest input side in pixels: the stride of the last stage's map."""
    return stem_stride << (NUM_STAGES - 1)


def is_legal_side(side: int, stem_stride: int, strided_stages: tuple[int, ...]) -> bool:
    """Whether an input side works: no smaller than the total stride, and even maps where attention is strided."""
    sides = stage_sides(side, stem_stride)
    return side >= least_side(stem_stride) and all(sides[stage] % 2 == 0 for stage in strided_stages)


def nearest_legal_side(side: int, stem_stride: int, strided_stages: tuple[int, ...]) -> int:
    """Return the legal input side nearest to ``side``, the larger one where two are as near."""
    candidates = (candidate for distance in count() for candidate in (side + distance, side - distance))
    return next(each for each in candidates if each > 0 and is_legal_side(each, stem_stride, strided_stages))


def describe_legal_sides(stem_stride: int, strided_stages: tuple[int, ...]) -> str:
    """Say in words which input sides are legal."""
    least = least_side(stem_stride)
    if not strided_stages:
        return f"sides of at least {least} pixels"
    step = stem_stride * 2 ** max(strided_stages)
    return (
        f"sides of at least {least} pixels whose map at stride {step} has an even side "
        f"(every multiple of {2 * step} does: {', '.join(str(2 * step * n) for n in range(6, 9))})"
    )
