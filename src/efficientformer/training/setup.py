"""From a recipe and a data set to everything the loop needs: network, manifest, pictures, optimiser, task."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from efficientformer.data.augment import Augmentation
from efficientformer.data.draws import DrawPlan
from efficientformer.data.loader import Loader, MemoryLoader, WorkerLoader, decode_all
from efficientformer.data.source import ImageSource
from efficientformer.data.sources import open_splits
from efficientformer.models.network import EfficientFormer
from efficientformer.runtime.image import decode
from efficientformer.spec.errors import DataError, ImageError, UsageError
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.spec.zoo import EMBEDDED, FILE_SUFFIXES, resolve
from efficientformer.training.recipe import Recipe
from efficientformer.training.task import Distilled, Supervised, Task, balanced_weights
from efficientformer.training.teacher import open_teacher
from efficientformer.weights.loading import load_into
from efficientformer.weights.pretrained import Overrides, load_named

SMALL = 64  # inputs of at most this many pixels a side: shifted rather than cropped and resized
DEFAULT_MODEL = "efficientformer_l1"

Note = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """What a run starts from.

    Attributes:
        recipe: The recipe with everything decided that was left open.
        model: The network, in training mode on the CPU.
        manifest: What the network is, without figures.
        loader: The training batches.
        source: The training pictures.
        val: The validation pictures.
        notes: What a person should know about all this.
    """

    recipe: Recipe
    model: EfficientFormer
    manifest: Manifest
    loader: Loader
    source: ImageSource
    val: ImageSource
    notes: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """Which training pictures these are."""
        return self.source.digest()

    def describe_data(self, path: Path) -> dict[str, object]:
        """Return what a run folder notes of the data set."""
        return {
            "path": str(path),
            "digest": self.digest,
            "classes": list(self.source.classes),
            "train": len(self.source),
            "val": len(self.val),
            "notes": list(self.notes),
        }


def prepare(recipe: Recipe, path: Path, rank: int, world: int) -> Prepared:
    """Open the data set, decide what the recipe left open, build the network.

    Args:
        recipe: The recipe.
        path: The data set.
        rank: This process.
        world: Processes.

    Raises:
        DataError: If the data set is missing, empty, of no known layout, or too small.
        UsageError: If the batch cannot be divided among processes and parts.
        CheckpointError, DownloadError, SpecError: If the weights cannot be had, or do not fit.
    """
    splits = open_splits(path, val_fraction=recipe.val_fraction, seed=recipe.seed)
    recipe = _decide(recipe, splits.train)
    notes = [splits.note]
    model, manifest = build_network(recipe, splits.train.classes, notes.append)
    if recipe.crop == "auto":
        recipe = recipe.with_changes(crop="pad" if max(manifest.spec.input_size) < SMALL else "rrc")
    parts = world * recipe.accumulate
    if recipe.batch_size % parts:
        raise UsageError(
            "The batch cannot be divided among processes and parts",
            expected=f"a multiple of {parts}",
            found=f"batch_size {recipe.batch_size}",
        )
    loader, source = open_loader(recipe, splits.train, manifest.preprocess, rank, world)
    return Prepared(recipe, model, manifest, loader, source, splits.val, tuple(notes))


def _decide(recipe: Recipe, train: ImageSource) -> Recipe:
    """Return the recipe with model, batch size and workers decided."""
    changes: dict[str, object] = {}
    if recipe.model == "auto" and recipe.spec is None:
        changes["model"] = EMBEDDED if _typical_side(train) <= SMALL else DEFAULT_MODEL
    if len(train) < recipe.batch_size:
        step = 2 * recipe.accumulate  # mixing pairs pictures
        size = len(train) // step * step
        if size == 0:
            raise DataError("Too few training pictures", expected=f"at least {step}", found=f"{len(train)}")
        changes["batch_size"] = size
    if recipe.workers < 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        changes["workers"] = min(16, cores)
    return recipe.with_changes(**changes)


def build_network(recipe: Recipe, classes: tuple[str, ...], note: Note) -> tuple[EfficientFormer, Manifest]:
    """Build the network, with its weights if the recipe starts from any, for the classes of the data set.

    Returns:
        The network in training mode, and its manifest without figures.

    Raises:
        CheckpointError, DownloadError, SpecError: If the weights cannot be had, or do not fit.
    """
    is_file = recipe.model.endswith(FILE_SUFFIXES) or Path(recipe.model).is_file()
    checkpoint = None
    if recipe.pretrained:
        checkpoint, manifest = load_named(recipe.model, recipe.model if is_file else True)
        spec, preprocess = recipe.arch or manifest.spec, manifest.preprocess
    else:
        spec = recipe.arch or resolve(recipe.model).card.spec
        preprocess = _preprocess_from_scratch(recipe)
    spec = Overrides(input_size=recipe.input_size or None, num_classes=len(classes)).apply(spec)
    preprocess = preprocess.with_input_size(spec.input_size)
    torch.manual_seed(recipe.seed)
    model = EfficientFormer(
        spec,
        drop_path_rate=recipe.drop_path,
        head_dropout=recipe.head_dropout,
        layer_scale_init=recipe.layer_scale_init,
    )
    if checkpoint is not None:
        reset = manifest.labels != classes
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            load_into(model, checkpoint, reset_head=reset, drop_dist_head=not spec.distilled)
        for warning in said:
            note(str(warning.message))
    name = "custom" if recipe.spec is not None else Path(recipe.model).name if is_file else recipe.model
    provenance = {"model": name, "source": "trained", "seed": str(recipe.seed)}
    if checkpoint is not None:
        provenance["started_from"] = checkpoint.sha256
    return model.train(), Manifest(spec, preprocess, classes, {}, provenance)


def open_loader(
    recipe: Recipe, source: ImageSource, preprocess: PreprocessSpec, rank: int, world: int
) -> tuple[Loader, ImageSource]:
    """Open the training pictures.

    Returns:
        The loader, and the source of the pictures it draws from (unreadable ones may be left out).
    """
    augmentation = Augmentation(
        **{field.name: getattr(recipe, field.name) for field in dataclasses.fields(Augmentation)}
    )
    images, skipped = None, list[tuple[str, str]]()
    if recipe.crop == "pad":
        images, source, skipped = decode_all(source, preprocess, recipe.workers)
    plan = DrawPlan(len(source), recipe.batch_size, recipe.seed, recipe.repeats, recipe.views, rank, world)
    cut_until = (recipe.epochs - recipe.refine_epochs) * plan.steps_per_epoch
    loader: Loader
    if images is not None:
        loader = MemoryLoader(images, plan, source.labels, augmentation, preprocess, cut_until)
        loader.skipped = dict(skipped)
    else:
        workers = max(1, recipe.workers // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        loader = WorkerLoader(source, plan, augmentation, preprocess, cut_until, workers)
    return loader, source


def build_task(recipe: Recipe, manifest: Manifest, source: ImageSource, device: torch.device) -> Task:
    """Build the loss the recipe asks for, with its teacher if there is one, on a device."""
    classes = manifest.spec.num_classes
    weights = None
    if recipe.class_weights == "balanced":
        counts = torch.from_numpy(np.bincount(source.labels, minlength=classes)).float()
        weights = balanced_weights(counts).to(device)
    teacher = open_teacher(recipe, manifest, source.digest() if recipe.teacher_cache else "", len(source))
    if teacher is None:
        return Supervised(recipe, classes, weights)
    return Distilled(recipe, classes, weights, teacher.to(device), two_heads=manifest.spec.distilled)


def _preprocess_from_scratch(recipe: Recipe) -> PreprocessSpec:
    """Return the preprocessing of the model's card; for a spec of its own, the usual one for its size."""
    if recipe.spec is None:
        card = resolve(recipe.model).card
        return card.manifest(card.best_source).preprocess
    arch = recipe.arch
    assert arch is not None
    if max(arch.input_size) < SMALL:
        card = resolve(EMBEDDED).card
        return card.manifest(None).preprocess
    return PreprocessSpec()


def _typical_side(source: ImageSource) -> float:
    """Return the median of the shorter side of some pictures, in pixels."""
    sides = []
    for index in np.linspace(0, len(source) - 1, min(64, len(source))).astype(int):
        try:
            image = source.read(int(index))
            image = image if isinstance(image, Image.Image) else decode(image)
        except ImageError:
            continue
        sides.append(min(image.size))
    if not sides:
        raise DataError("None of the pictures looked at can be read", hint="efficientformer data check says why")
    return float(np.median(sides))
