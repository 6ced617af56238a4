"""Map sizes of a network: every stride-2 convolution is 3x3 with padding 1, so a side ``n`` becomes ``ceil(n / 2)``."""

from __future__ import annotations

from itertools import count

NUM_STAGES = 4


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


def stage_grids(size: tuple[int, int], stem_stride: int) -> tuple[tuple[int, int], ...]:
    """Return (height, width) of each stage's map for an input size in pixels."""
    heights, widths = (stage_sides(side, stem_stride) for side in size)
    return tuple(zip(heights, widths, strict=True))


def is_legal_side(side: int, stem_stride: int, strided_stages: tuple[int, ...]) -> bool:
    """Whether an input side works: no smaller than the total stride, and even maps where attention is strided."""
    sides = stage_sides(side, stem_stride)
    return side >= stem_stride * 2 ** (NUM_STAGES - 1) and all(sides[stage] % 2 == 0 for stage in strided_stages)


def nearest_legal_side(side: int, stem_stride: int, strided_stages: tuple[int, ...]) -> int:
    """Return the legal input side nearest to ``side``, the larger one where two are as near."""
    for distance in count():
        for candidate in (side + distance, side - distance):
            if candidate > 0 and is_legal_side(candidate, stem_stride, strided_stages):
                return candidate
    raise AssertionError("unreachable: legal sides have no upper end")


def describe_legal_sides(stem_stride: int, strided_stages: tuple[int, ...]) -> str:
    """Say in words which input sides are legal."""
    least = stem_stride * 2 ** (NUM_STAGES - 1)
    if not strided_stages:
        return f"sides of at least {least} pixels"
    step = stem_stride * 2 ** max(strided_stages)
    return (
        f"sides of at least {least} pixels whose map at stride {step} has an even side "
        f"(every multiple of {2 * step} does: {', '.join(str(2 * step * n) for n in range(6, 9))})"
    )
