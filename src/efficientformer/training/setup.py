"""From a recipe and a data set to what the loop needs but the optimiser: network, manifest, pictures, task."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from efficientformer.data.augment import Augmentation
from efficientformer.data.draws import DrawPlan
from efficientformer.data.loader import Loader, MemoryLoader, WorkerLoader, decode_all, read_classes
from efficientformer.data.source import ImageSource
from efficientformer.data.sources import Splits, open_splits
from efficientformer.export.deployable import file_of
from efficientformer.models.network import EfficientFormer
from efficientformer.runtime.image import decode
from efficientformer.runtime.processor import available_cores
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import DataError, ImageError, UsageError
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.spec.zoo import EMBEDDED, FILE_SUFFIXES, is_file, is_remote, resolve
from efficientformer.training.recipe import Recipe
from efficientformer.training.subject import Note, Subject
from efficientformer.training.task import Distilled, Supervised, Task, balanced_weights
from efficientformer.training.teacher import TIMM_FOLDER, open_teacher
from efficientformer.weights.checkpoint import load_checkpoint, save_native
from efficientformer.weights.loading import load_into
from efficientformer.weights.pretrained import Overrides, build, load_named
from efficientformer.weights.remote import pinned

SMALL = 64  # inputs of at most this many pixels a side: shifted rather than cropped and resized
DEFAULT_MODEL = "efficientformer_l1"


@dataclass(frozen=True)
class Prepared:
    """What a run starts from.

    Attributes:
        recipe: The recipe with everything decided that was left open.
        subject: What is trained.
        model: The network, in training mode on the CPU.
        manifest: What the network is, without figures.
        loader: The training batches.
        source: The training pictures.
        val: The validation pictures.
        notes: What a person should know about all this.
    """

    recipe: Recipe
    subject: Subject
    model: EfficientFormer
    manifest: Manifest
    loader: Loader
    source: ImageSource
    val: ImageSource
    notes: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """Which pictures these are, for training and for validation."""
        return f"{self.source.digest()}-{self.val.digest()}"

    def describe_data(self, path: Path) -> dict[str, object]:
        """Return what a run folder notes of the data set."""
        return {
            "path": str(path),
            "manifest": self.manifest.to_json(),
            "digest": self.digest,
            "classes": list(self.source.classes),
            "train": len(self.source),
            "val": len(self.val),
            "notes": list(self.notes),
        }


class PlainNetwork:
    """The recipe's network.

    Args:
        resume_command: The command that goes on with the run; empty for that of ``efficientformer train``.
    """

    def __init__(self, resume_command: str = "") -> None:
        self.resume_command = resume_command

    def splits(self, recipe: Recipe, path: Path) -> Splits:
        """Return the data set's own parts, or two made by the recipe's ``val_fraction`` and ``seed``."""
        return open_splits(path, val_fraction=recipe.val_fraction, seed=recipe.seed)

    def build(self, recipe: Recipe, classes: tuple[str, ...], note: Note) -> tuple[EfficientFormer, Manifest]:
        """Return the recipe's network with its weights, if it starts from any."""
        return build_network(recipe, classes, note)

    def rebuild(self, recipe: Recipe, spec: ArchSpec) -> EfficientFormer:
        """Return a network without weights."""
        return new_network(recipe, spec)

    def task(self, model: EfficientFormer, task: Task, steps: int) -> Task:
        """Return the recipe's task as it is."""
        return task

    def save(self, path: Path, model: EfficientFormer, manifest: Manifest) -> None:
        """Write a checkpoint of ours."""
        save_native(path, model.state_dict(), manifest)

    def load(self, path: Path) -> tuple[EfficientFormer, Manifest]:
        """Read a checkpoint of ours."""
        checkpoint = load_checkpoint(path)
        assert checkpoint.manifest is not None
        return build(checkpoint.spec, checkpoint), checkpoint.manifest


def prepare(
    recipe: Recipe, path: Path, rank: int, world: int, resumed: Manifest | None = None, subject: Subject | None = None
) -> Prepared:
    """Open the data set, decide what the recipe left open, build the network.

    Args:
        recipe: The recipe.
        path: The data set.
        rank: This process.
        world: Processes.
        resumed: What the network of a run with a checkpoint is; its weights come from the run's own state.
        subject: What is trained; by default the recipe's network.

    Raises:
        DataError: If the data set is missing, empty, of no known layout, or too small.
        UsageError: If the batch cannot be divided among processes and parts.
        CheckpointError, DownloadError, SpecError: If the weights cannot be had, or do not fit.
    """
    subject = subject or PlainNetwork()
    splits = subject.splits(recipe, path)
    _check_classes(splits.train.classes)
    recipe = _decide(recipe, splits.train)
    notes = list(dict.fromkeys((splits.note, *splits.train.notes, *splits.val.notes)))
    if resumed is not None:
        model, manifest = subject.rebuild(recipe, resumed.spec), resumed
    else:
        model, manifest = subject.build(recipe, splits.train.classes, notes.append)
    recipe = decide_crop(recipe, manifest.spec)
    images, source = None, splits.train
    if recipe.idle:
        notes.append(f"without effect beside the other settings: {', '.join(recipe.idle)}")
    if splits.own and recipe.changed(["val_fraction"]):
        notes.append("without effect: val_fraction, since the data set is divided already")
    if recipe.crop == "pad":
        images, source, skipped = decode_all(source, manifest.preprocess, recipe.workers)
        read = source
    elif resumed is None:
        read, skipped = read_classes(source, manifest.preprocess, _workers(recipe))
    else:
        read, skipped = source, []  # looked at when it began
    unreadable = dict(skipped)
    _check_classes_read(splits.train, read, tuple(unreadable.values()))
    _check_any_read(splits.val, manifest.preprocess)
    fitted = fit_batch(recipe, len(source), world)
    if recipe.batch_size not in (0, fitted):
        notes.append(f"batch_size {fitted} instead of {recipe.batch_size}: there are {len(source)} training pictures")
    recipe = recipe.with_changes(batch_size=fitted)
    loader = open_loader(recipe, source, images, manifest.preprocess, rank, world)
    loader.skipped |= unreadable
    return Prepared(recipe, subject, model.train(), manifest, loader, source, splits.val, tuple(notes))


def _check_classes(classes: tuple[str, ...]) -> None:
    if len(classes) < 2:
        raise DataError("There is nothing to tell apart", expected="two classes or more", found=f"{list(classes)}")
    for name in classes:
        if not name.isprintable() or name.encode("utf-8", "replace").decode() != name:
            raise DataError("The name of a class is no text", found=repr(name), hint="Rename its folder")


def _check_classes_read(listed: ImageSource, read: ImageSource, reasons: Sequence[str]) -> None:
    """Raise DataError if a class with pictures has none that can be read."""
    lost = sorted(set(np.unique(listed.labels).tolist()) - set(np.unique(read.labels).tolist()))
    if lost:
        raise DataError(
            f"No training picture of the class {listed.classes[lost[0]]!r} can be read",
            found=f"{len(reasons):,} unreadable pictures, such as: {reasons[0]}",
            hint="efficientformer data check names them all",
        )


def _check_any_read(source: ImageSource, preprocess: PreprocessSpec) -> None:
    """Raise DataError if not one validation picture can be read, before an epoch is spent on finding out."""
    reason = "none at all"
    for index in range(len(source)):
        try:
            source.image(index, preprocess)
        except ImageError as error:
            reason = str(error)
        else:
            return
    hint = "efficientformer data check names them all"
    raise DataError("No validation picture can be read", found=f"{len(source):,}, the last: {reason}", hint=hint)


def _decide(recipe: Recipe, train: ImageSource) -> Recipe:
    """Return the recipe with the model and the number of workers decided, and files named from the root."""
    changes: dict[str, object] = {}
    if recipe.model == "auto" and recipe.spec is None:
        changes["model"] = EMBEDDED if typical_side(train) <= SMALL else DEFAULT_MODEL
    if recipe.workers < 0:
        changes["workers"] = min(16 * _local_world(), available_cores(), 256)
    return rooted(recipe).with_changes(**changes)


def rooted(recipe: Recipe) -> Recipe:
    """Return the recipe with its files named from the root, and repositories with a commit: for a run that goes on."""
    changes: dict[str, object] = {}
    for name in ("model", "teacher", "teacher_weights", "teacher_cache"):
        value = getattr(recipe, name)
        if is_remote(value):
            changes[name] = pinned(value)
            continue
        if name in ("model", "teacher"):
            value = file_of(value) or value  # of the folder of a run
        if value and (name == "teacher_cache" or Path(value).is_file()):
            changes[name] = str(Path(value).absolute())
    if recipe.teacher.startswith(TIMM_FOLDER):
        changes["teacher"] = TIMM_FOLDER + str(Path(recipe.teacher.removeprefix(TIMM_FOLDER)).absolute())
    return recipe.with_changes(**changes)


def fit_batch(recipe: Recipe, pictures: int, world: int) -> int:
    """Return how many pictures a step has: what the recipe says, less where there are not so many.

    Raises:
        DataError: If there are too few pictures for a single step.
        UsageError: If the recipe's own number cannot be divided.
    """
    parts = recipe.accumulate * world
    unit = 2 * parts if recipe.mixing else parts  # mixing pairs the pictures of a part
    wanted = recipe.batch_size or min(64, max(8, pictures // 8)) // unit * unit or unit
    if wanted % unit:
        mixing = " of even size, which mixing pairs" if recipe.mixing else ""
        raise UsageError(
            f"The batch cannot be divided among {world} process(es) into {recipe.accumulate} part(s){mixing}",
            expected=f"a multiple of {unit}",
            found=f"batch_size {wanted}",
        )
    fitted = min(wanted, pictures // unit * unit)
    if fitted == 0:
        hint = "efficientformer data check names those that cannot be read"
        raise DataError("Too few training pictures", expected=f"at least {unit}", found=f"{pictures}", hint=hint)
    return fitted


def decide_crop(recipe: Recipe, spec: ArchSpec) -> Recipe:
    """Return the recipe with the crop decided, by the size of a network's input."""
    if recipe.crop != "auto":
        return recipe
    return recipe.with_changes(crop="pad" if max(spec.input_size) < SMALL else "rrc")


def build_network(
    recipe: Recipe, classes: tuple[str, ...], note: Note, divided: Recipe | None = None
) -> tuple[EfficientFormer, Manifest]:
    """Build the network, with its weights if the recipe starts from any, for the classes of the data set.

    Args:
        recipe: The recipe.
        classes: The classes.
        note: Told what the user should know.
        divided: The recipe whose seed and ``val_fraction`` divide the pictures, if that is another.

    Returns:
        The network in training mode, and its manifest without figures.

    Raises:
        CheckpointError, DownloadError, SpecError: If the weights cannot be had, or do not fit.
    """
    of_file = is_remote(recipe.model) or recipe.model.endswith(FILE_SUFFIXES) or is_file(recipe.model)
    checkpoint = None
    if recipe.pretrained or (of_file and recipe.spec is None):  # a file says at least what network it is
        found, manifest = load_named(recipe.model, recipe.model if of_file else True)
        checkpoint = found if recipe.pretrained else None
        spec, preprocess = recipe.arch or manifest.spec, manifest.preprocess
    else:
        spec = recipe.arch or resolve(recipe.model).card.spec
        preprocess = _preprocess_from_scratch(recipe)
    spec = Overrides(input_size=recipe.input_size or None, num_classes=len(classes)).apply(spec)
    preprocess = preprocess.with_input_size(spec.input_size)
    if spec.in_chans == 1:
        preprocess = preprocess.averaged()
    model = new_network(recipe, spec)
    if checkpoint is not None:
        reset = manifest.labels != classes
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            load_into(model, checkpoint, reset_head=reset, drop_dist_head=not spec.distilled)
        for warning in said:
            note(str(warning.message))
        if not reset:
            _note_other_split(divided or recipe, manifest, note)
    name = recipe.model if is_remote(recipe.model) or not of_file else Path(recipe.model).name
    provenance = {
        "model": "custom" if recipe.spec is not None else name,
        "source": "trained",
        "seed": str(recipe.seed),
        "val_fraction": f"{recipe.val_fraction:g}",
    }
    if checkpoint is not None:
        provenance["started_from"] = checkpoint.sha256
    return model, Manifest(spec, preprocess, classes, {}, provenance)


def _note_other_split(recipe: Recipe, start: Manifest, note: Note) -> None:
    """Say so if the weights were trained with another division of pictures, on which this run may be measured."""
    before = {name: start.provenance[name] for name in ("seed", "val_fraction") if name in start.provenance}
    now = {"seed": str(recipe.seed), "val_fraction": f"{recipe.val_fraction:g}"}
    if start.provenance.get("source") == "trained" and any(now[name] != value for name, value in before.items()):
        settings = " ".join(f"--set {name}={value}" for name, value in before.items())
        note(
            "the weights were trained with another seed or val_fraction: unless the data set has a validation part of "
            "its own, they know pictures that are now held out, and figures will be too good; "
            f"{settings} keeps these apart"
        )


def new_network(recipe: Recipe, spec: ArchSpec) -> EfficientFormer:
    """Return a network with new weights, decided by the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return EfficientFormer(
        spec,
        drop_path_rate=recipe.drop_path,
        head_dropout=recipe.head_dropout,
        layer_scale_init=recipe.layer_scale_init,
    )


def open_loader(
    recipe: Recipe, source: ImageSource, images: Tensor | None, preprocess: PreprocessSpec, rank: int, world: int
) -> Loader:
    """Open the training batches.

    Args:
        recipe: Says how pictures are drawn and augmented.
        source: The pictures.
        images: The same, decoded, (N, C, H, W) uint8, where they stay in memory; else they are read by workers.
        preprocess: Mode, size and normalisation of the input.
        rank: This process.
        world: Processes.

    Raises:
        SpecError: If the augmentation is illegal.
    """
    augmentation = augmentation_of(recipe)
    plan = DrawPlan(len(source), recipe.batch_size, recipe.seed, recipe.repeats, recipe.views, rank, world)
    cut_until = (recipe.epochs - recipe.refine_epochs) * plan.steps_per_epoch
    if images is not None:
        return MemoryLoader(images, plan, source.labels, augmentation, preprocess, cut_until)
    return WorkerLoader(source, plan, augmentation, preprocess, cut_until, _workers(recipe))


def augmentation_of(recipe: Recipe) -> Augmentation:
    """Return what a recipe, its crop decided, does to training pictures.

    Raises:
        SpecError: If it is illegal.
    """
    return Augmentation(**{field.name: getattr(recipe, field.name) for field in dataclasses.fields(Augmentation)})


def _workers(recipe: Recipe) -> int:
    """Return this process's share of the workers that a machine's processes have together."""
    return max(1, recipe.workers // _local_world())


def _local_world() -> int:
    """Return how many processes of this run are on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def build_task(
    recipe: Recipe,
    manifest: Manifest,
    source: ImageSource,
    device: torch.device,
    dtype: torch.dtype | None,
    given: nn.Module | None = None,
) -> Task:
    """Build the loss the recipe asks for, with its teacher, perhaps a given one, on a device and in its precision."""
    classes = manifest.spec.num_classes
    weights = None
    if recipe.class_weights == "balanced":
        counts = torch.from_numpy(np.bincount(source.labels, minlength=classes)).float()
        weights = balanced_weights(counts).to(device)
    digest = source.digest() if recipe.teacher_cache else ""
    teacher = open_teacher(recipe, manifest, digest, len(source), dtype, given)
    if teacher is None:
        return Supervised(recipe, classes, weights)
    return Distilled(recipe, classes, weights, teacher.to(device), two_heads=manifest.spec.distilled)


def _preprocess_from_scratch(recipe: Recipe) -> PreprocessSpec:
    """Return the preprocessing of the model's card; for a spec of its own, the usual one for its size and channels."""
    if recipe.spec is None:
        card = resolve(recipe.model).card
        return card.manifest(card.best_source).preprocess
    arch = recipe.arch
    assert arch is not None
    usual = PreprocessSpec()
    if max(arch.input_size) < SMALL:
        usual = resolve(EMBEDDED).card.manifest(None).preprocess
    return usual.grey() if arch.in_chans == 1 else usual


def typical_side(source: ImageSource) -> float:
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
