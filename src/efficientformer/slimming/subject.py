"""The supernet as what a training run trains: pictures held out for the search; a mixture, or an elastic network."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from efficientformer.data.source import Subset
from efficientformer.data.sources import Splits, open_splits, split_indices
from efficientformer.models.network import EfficientFormer
from efficientformer.slimming.elastic import Sandwich, choose_blocks
from efficientformer.slimming.plan import Options
from efficientformer.slimming.supernet import Annealed, Supernet, load_supernet, save_supernet
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import DataError
from efficientformer.spec.manifest import Manifest
from efficientformer.training.recipe import Recipe
from efficientformer.training.setup import build_network
from efficientformer.training.subject import Note
from efficientformer.training.task import AUTOCAST, Supervised, Task

MOST_HELD_OUT = 0.2  # of the training pictures


@dataclasses.dataclass(frozen=True)
class SupernetSubject:
    """A supernet around the recipe's network.

    Attributes:
        options: How the search goes about it. Its ``held_out`` training pictures are set aside: the supernet never
            learns from them, and is measured on them, so that neither sees the pictures that the final networks are
            measured on.
        seed: Decides which networks of an elastic supernet each step trains.
        final: Recipe of the final trainings. What it sets aside of data without validation pictures is left out here.
        resume_command: The command that goes on with the run.
    """

    options: Options
    seed: int = 0
    final: Recipe = dataclasses.field(default_factory=Recipe)
    resume_command: str = ""

    def splits(self, recipe: Recipe, path: Path) -> Splits:
        """Divide the data set's training pictures into those to learn from and those held out for the search."""
        whole = open_splits(path, val_fraction=self.final.val_fraction, seed=self.final.seed).train
        share = min(MOST_HELD_OUT, self.options.held_out / max(1, len(whole)))
        learn, held = split_indices(whole, share, recipe.seed)
        if not len(held):
            raise DataError("Too few pictures to hold any out for the search", found=f"{len(whole)}")
        note = f"{len(held):,} of {len(whole):,} training pictures are held out to score cuts with (seed {recipe.seed})"
        return Splits(Subset(whole, learn), Subset(whole, held), note)

    def build(self, recipe: Recipe, classes: tuple[str, ...], note: Note) -> tuple[EfficientFormer, Manifest]:
        """Return the supernet of the recipe's network, with its weights if it starts from any."""
        network, manifest = build_network(recipe, classes, note, self.final)
        torch.manual_seed(recipe.seed)
        supernet = Supernet.around(
            network,
            inherited=recipe.pretrained,
            drop_path_rate=recipe.drop_path,
            head_dropout=recipe.head_dropout,
            layer_scale_init=recipe.layer_scale_init,
        )
        if self.options.joint:
            choose_blocks(supernet)
        provenance = {**manifest.provenance, "model": f"supernet of {manifest.provenance['model']}"}
        return supernet, dataclasses.replace(manifest, provenance=provenance)

    def rebuild(self, recipe: Recipe, spec: ArchSpec) -> EfficientFormer:
        """Return a supernet without weights."""
        supernet = Supernet(spec, drop_path_rate=recipe.drop_path, head_dropout=recipe.head_dropout)
        if self.options.joint:
            choose_blocks(supernet)
        return supernet

    def task(self, model: EfficientFormer, task: Task, steps: int) -> Task:
        """Return the recipe's task with the temperature's schedule, or by the sandwich rule."""
        assert isinstance(model, Supernet)
        if self.options.joint:
            assert isinstance(task, Supervised)
            dtype = AUTOCAST.get(task.recipe.precision)  # by now it is decided
            return Sandwich(task, model, self.options.space(model.spec), self.seed, dtype)
        return Annealed(task, model, steps)

    def save(self, path: Path, model: EfficientFormer, manifest: Manifest) -> None:
        """Write the supernet."""
        assert isinstance(model, Supernet)
        save_supernet(path, model, manifest)

    def load(self, path: Path) -> tuple[EfficientFormer, Manifest]:
        """Read the supernet."""
        return load_supernet(path)
