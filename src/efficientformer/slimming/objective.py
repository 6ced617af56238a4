"""What a cut gains: milliseconds (V1 paper, section 4), or the mobile efficiency score (V2 paper, section 4).

The score counts size and latency together: MES = 100 * (size / unit)^-size_weight * (latency / unit)^-latency_weight.
Units only scale it: they are those of MobileNetV2, 3 M parameters and 1 ms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

UNIT_PARAMS = 3e6
UNIT_MS = 1.0
BASE_SCORE = 100.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What a network costs.

    Attributes:
        ms: Predicted latency in milliseconds.
        params: Parameters.
    """

    ms: float
    params: int


class Objective(Protocol):
    """What cuts are made for."""

    def gain(self, before: Cost, after: Cost) -> float:
        """Return what a cut gains; at most 0 if it is not worth making."""


class Latency:
    """Milliseconds saved."""

    def gain(self, before: Cost, after: Cost) -> float:
        """Return the milliseconds saved."""
        return before.ms - after.ms


@dataclass(frozen=True, slots=True)
class Efficiency:
    """The mobile efficiency score.

    Attributes:
        size_weight: How much size counts.
        latency_weight: How much latency counts.
    """

    size_weight: float
    latency_weight: float

    def score(self, cost: Cost) -> float:
        """Return the score of a network; more is better."""
        size: float = (cost.params / UNIT_PARAMS) ** -self.size_weight
        latency: float = (cost.ms / UNIT_MS) ** -self.latency_weight
        return BASE_SCORE * size * latency

    def gain(self, before: Cost, after: Cost) -> float:
        """Return by how much the score rises."""
        return self.score(after) - self.score(before)
