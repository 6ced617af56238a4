"""Networks that no search has chosen, to compare a slimmed one with: uniformly scaled, or drawn by chance."""

from __future__ import annotations

import random
from collections.abc import Sequence

from efficientformer.slimming.search import Device
from efficientformer.slimming.space import IDENTITY, WITHOUT_ATTENTION, Candidate, Space
from efficientformer.spec.errors import UsageError

FACTORS = tuple(1 - step / 200 for step in range(200))
MAX_DRAWS = 20_000
TOLERANCE = 0.03  # share of a latency that a network drawn for it may lie below it


def scaled(space: Space, factor: float) -> Candidate:
    """Return the start network with every width and every depth times a factor.

    Widths go to the nearest legal one; every stage keeps at least one block, or as many as the space demands; the first
    blocks of a stage go first, so that the share of attention stays about the same or grows.

    Args:
        space: What is legal.
        factor: Above 0 and at most 1.
    """
    candidate = space.largest
    for stage, width in enumerate(candidate.widths):
        nearest = min(space.widths(stage), key=lambda legal: (abs(legal - factor * width), -legal))
        candidate = candidate.with_width(stage, nearest)
        row = candidate.kinds[stage]
        attending = sum(kind in WITHOUT_ATTENTION for kind in row)
        keep = min(len(row), max(1, space.min_depth, round(factor * len(row))))
        keep_attending = min(keep, max(round(factor * attending), keep - (len(row) - attending)))
        plain = keep - keep_attending
        for position in range(len(row)):
            attends = row[position] in WITHOUT_ATTENTION
            left = keep_attending if attends else plain
            after = sum((kind in WITHOUT_ATTENTION) == attends for kind in row[position:])
            if after > left:
                candidate = candidate.with_kind(stage, position, IDENTITY)
    return candidate


def scaled_to(space: Space, device: Device, target_ms: float) -> Candidate:
    """Return the largest uniformly scaled network within a latency.

    Raises:
        UsageError: If none is.
    """
    for factor in FACTORS:
        candidate = scaled(space, factor)
        if device.predict(candidate.spec).ms <= target_ms:
            return candidate
    smallest = device.predict(scaled(space, FACTORS[-1]).spec).ms
    raise UsageError(f"No uniformly scaled network takes {target_ms:g} ms", found=f"the smallest takes {smallest:.3f}")


def drawn(space: Space, rng: random.Random) -> Candidate:
    """Return a legal network drawn by chance: every width, the blocks that stay, where attention begins."""
    candidate = space.largest
    for stage, row in enumerate(candidate.kinds):
        candidate = candidate.with_width(stage, rng.choice(space.widths(stage)))
        share = rng.random()
        for position in rng.sample(range(len(row)), len(row)):
            if rng.random() < share and position in space.removable(candidate, stage):
                candidate = candidate.with_kind(stage, position, IDENTITY)
        attending = candidate.positions(stage, attention=True)
        for position in attending[: rng.randint(0, len(attending))]:
            candidate = candidate.with_kind(stage, position, WITHOUT_ATTENTION[candidate.kinds[stage][position]])
        expansions = [rng.choice(space.expansions(stage, position)) for position in range(len(row))]
        candidate = candidate.with_expansions(stage, expansions)
    return candidate


def drawn_at(space: Space, device: Device, target_ms: float, count: int, seed: int) -> Sequence[Candidate]:
    """Return different random networks whose predicted latency is a target's, or a little (``TOLERANCE``) below it.

    Raises:
        UsageError: If chance finds too few.
    """
    rng = random.Random(seed)
    found: dict[str, Candidate] = {}
    for _ in range(MAX_DRAWS):
        candidate = drawn(space, rng)
        if (1 - TOLERANCE) * target_ms <= device.predict(candidate.spec).ms <= target_ms:
            found.setdefault(candidate.key, candidate)
        if len(found) == count:
            return list(found.values())
    raise UsageError(f"Chance finds no {count} networks of {target_ms:g} ms", found=f"{len(found)} in {MAX_DRAWS}")
