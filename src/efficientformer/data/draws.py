"""Which pictures a training step sees and with which random numbers, as pure functions of the step.

Nothing here has a state: a run that is resumed, or spread over other numbers of processes or workers, sees the same
pictures in the same order with the same augmentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from efficientformer.spec.errors import DataError

Seeds = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Draws:
    """A part of one step's batch.

    Attributes:
        indices: Pictures, (B,) int64.
        seeds: Seed of each one's augmentation, (B,) uint64.
        views: Number of each one's augmentation where there is a limited number of them, else 0; -1 for a picture that
            stands in for an unreadable one; (B,) int64.
        step: The step.
    """

    indices: npt.NDArray[np.int64]
    seeds: Seeds
    views: npt.NDArray[np.int64]
    step: int


@dataclass(frozen=True)
class DrawPlan:
    """The order of a whole training run.

    Attributes:
        length: Pictures of the data set.
        batch_size: Pictures of a step, over all processes.
        seed: Decides order and augmentation.
        repeats: Views of a picture within an epoch, of so many fewer pictures (repeated augmentation).
        views: Different augmentations of a picture over the whole run, in a cycle; 0 means new ones every epoch.
        rank: This process.
        world: Processes.

    Raises:
        DataError: If there are fewer pictures than a batch has.
    """

    length: int
    batch_size: int
    seed: int
    repeats: int = 1
    views: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.length < self.batch_size:
            raise DataError(
                "Fewer training pictures than one batch", expected=f"{self.batch_size}", found=f"{self.length}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one epoch; what is left over comes into play in other epochs."""
        return self.length // self.batch_size

    def draws(self, step: int) -> Draws:
        """Return this process's part of a step's batch: every ``world``-th of its pictures."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.batch_size
        positions = np.arange(start + self.rank, start + self.batch_size, self.world)
        indices = _order(self.length, self.seed, epoch, self.repeats)[positions]
        view = np.full(len(indices), epoch % self.views if self.views else 0, np.int64)
        # within one epoch a repeated picture is told apart by its position; with limited views only the view counts
        instance = view if self.views else epoch * np.int64(self.length) + positions
        return Draws(indices, mix(mix(self.seed, instance), indices), view, step)


def mix(seed: int | Seeds, values: npt.NDArray[np.int64] | int) -> Seeds:
    """Return well mixed 64-bit seeds made of ``seed`` and ``values`` (SplitMix64's finaliser), element by element."""
    with np.errstate(over="ignore"):
        state = np.asarray(seed, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = state + np.asarray(values).astype(np.uint64) * np.uint64(0xD1342543DE82EF95) + np.uint64(0x2545F4914F6CDD1D)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)), np.uint64)


def uniforms(seeds: Seeds, count: int) -> npt.NDArray[np.float64]:
    """Return ``count`` numbers in [0, 1) for every seed, (count, B)."""
    numbers = np.stack([mix(seeds, i + 1) for i in range(count)])
    return (numbers >> np.uint64(11)).astype(np.float64) / float(1 << 53)


@lru_cache(maxsize=2)
def _order(length: int, seed: int, epoch: int, repeats: int) -> npt.NDArray[np.int64]:
    order = np.random.default_rng((seed, epoch)).permutation(length)
    return np.repeat(order[: -(-length // repeats)], repeats)[:length] if repeats > 1 else order
