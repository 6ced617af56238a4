"""What a run trains: by default the recipe's own network (``setup.PlainNetwork``).

Other rooms bring subjects of their own, such as a supernet, and share pictures, optimiser, loop and report with it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias

from efficientformer.data.sources import Splits
from efficientformer.models.network import EfficientFormer
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.manifest import Manifest
from efficientformer.training.recipe import Recipe
from efficientformer.training.task import Task

Note: TypeAlias = Callable[[str], None]


class Subject(Protocol):
    """What a run needs to know of the thing it trains."""

    @property
    def resume_command(self) -> str:
        """The command that goes on with the run; empty for that of ``efficientformer train``."""

    def splits(self, recipe: Recipe, path: Path) -> Splits:
        """Return the pictures to learn from and those to measure on."""

    def build(self, recipe: Recipe, classes: tuple[str, ...], note: Note) -> tuple[EfficientFormer, Manifest]:
        """Return the network a new run starts from, and its manifest without figures."""

    def rebuild(self, recipe: Recipe, spec: ArchSpec) -> EfficientFormer:
        """Return the network of a resumed run, whose weights come from the run's state."""

    def task(self, model: EfficientFormer, task: Task, steps: int) -> Task:
        """Return what a step minimises, given the recipe's task and the steps of the whole run."""

    def save(self, path: Path, model: EfficientFormer, manifest: Manifest) -> None:
        """Write weights."""

    def load(self, path: Path) -> tuple[EfficientFormer, Manifest]:
        """Read what ``save`` wrote."""
