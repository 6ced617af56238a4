"""How much each part matters: MetaPaths and stages by the supernet's alphas, channels by their weights.

Shapes: C channels of a stage, H hidden units of an MLP.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from efficientformer.slimming.space import IDENTITY, Candidate

Probabilities = Sequence[Sequence[Mapping[str, float]]]


@dataclass(frozen=True, slots=True)
class Importances:
    """Scores of the MetaPaths of a start network.

    Attributes:
        paths: Per stage and position, alpha_4D / alpha_I or (alpha_4D + alpha_3D) / alpha_I, after the softmax.
    """

    paths: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, probabilities: Probabilities) -> Importances:
        """Return the paper's scores for the probabilities of the kinds at every MetaPath."""
        rows = [[(1 - each[IDENTITY]) / max(each[IDENTITY], 1e-9) for each in stage] for stage in probabilities]
        return cls(tuple(tuple(row) for row in rows))

    def stage(self, candidate: Candidate, stage: int) -> float:
        """Return a stage's score: the sum over those of its paths that still hold a block."""
        return sum(self.paths[stage][position] for position in candidate.positions(stage))

    def shuffled(self, seed: int) -> Importances:
        """Return the same scores dealt out to the paths by chance: what a search without importances would know."""
        values = [score for row in self.paths for score in row]
        random.Random(seed).shuffle(values)
        left = iter(values)
        return Importances(tuple(tuple(next(left) for _ in row) for row in self.paths))
