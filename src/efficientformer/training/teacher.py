"""Teachers for distillation: any timm network, any checkpoint of ours, any network in memory; logits kept on disk.

Shapes: B batch, K classes, N training pictures, V views.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientformer.data.align import match_classes
from efficientformer.data.loader import Batch
from efficientformer.models.fold import fold
from efficientformer.spec.errors import SpecError, TrainingError, UsageError, missing_extra, reason_of
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.training.recipe import Recipe
from efficientformer.weights.beside import class_names
from efficientformer.weights.files import atomic_write
from efficientformer.weights.pretrained import build, load_named

TIMM = "timm:"
TIMM_FOLDER = "timm:local-dir:"  # one that timm.models.save_for_hf wrote
GIVEN = "given:"  # and the first digits of its weights' digest: a network given to train()


class Teacher:
    """A network that says what it thinks of the student's training pictures.

    Args:
        network: Images (B, C, h, w) to logits (B, K), in evaluation mode.
        identity: Which weights these are.
        student: How the student's pictures are normalised.
        mean: What the teacher's are normalised with.
        std: The same.
        input_size: Height and width the teacher wants; None takes any.
        order: Class of the teacher for each of the student's; None if they agree.
        dtype: What it computes in, by autocast; None for single precision.
    """

    def __init__(
        self,
        network: nn.Module,
        identity: str,
        student: PreprocessSpec,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        input_size: tuple[int, int] | None,
        order: list[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.identity = f"{identity}|{dtype}" if order is None else f"{identity}|{dtype}|{order}"
        mine, theirs = (torch.tensor(v)[:, None, None] for v in (student.std, std))
        shift = torch.tensor(student.mean)[:, None, None] - torch.tensor(mean)[:, None, None]
        self._scale, self._offset = mine / theirs, shift / theirs  # (x * std + mean - mean') / std'
        self._renormalise = (student.mean, student.std) != (mean, std)
        self._size, self._order, self._dtype = input_size, order, dtype

    def to(self, device: torch.device) -> Teacher:
        """Move everything to a device."""
        self.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._scale, self._offset = self._scale.to(device), self._offset.to(device)
        return self

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Return logits (B, K) for the pictures of a batch, in the order of the student's classes."""
        x = batch.images
        if self._renormalise:
            x = x * self._scale + self._offset
        if self._size is not None and x.shape[-2:] != self._size:
            x = F.interpolate(x, self._size, mode="bicubic", antialias=True)
        with torch.autocast(x.device.type, self._dtype, enabled=self._dtype is not None):
            logits: Tensor = self.network(x)
        logits = logits.float()
        return logits if self._order is None else logits[:, self._order]


class CachedTeacher:
    """A teacher that sees each view of a picture once; what it said is kept in a folder, in half precision.

    Args:
        teacher: The teacher.
        folder: Where its logits go: N x V x K values of two bytes.
        identity: Which pictures and augmentation these are; a folder made for others is refused.
        shape: (2 V, N, K): every view with and without what is cut out.

    Raises:
        TrainingError: If the folder belongs to another teacher, data set or augmentation, or cannot be written.
    """

    def __init__(self, teacher: Teacher, folder: Path, identity: str, shape: tuple[int, int, int]) -> None:
        self._teacher = teacher
        self._half_views = shape[0] // 2
        note = {"identity": hashlib.sha256(f"{teacher.identity}|{identity}".encode()).hexdigest(), "shape": list(shape)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._claim(folder / "teacher.json", note)
            self._logits = _memory_map(folder / "logits.f16", np.dtype(np.float16), shape)
        except OSError as error:
            raise TrainingError(f"Cannot keep the teacher's logits in {folder}", found=reason_of(error)) from error

    @staticmethod
    def _claim(path: Path, note: dict[str, Any]) -> None:
        if not path.exists():  # several processes may write it at once: the same content, each file whole
            with atomic_write(path) as file:
                file.write(json.dumps(note).encode())
        elif path.read_text(errors="replace") != json.dumps(note):
            raise TrainingError(
                f"{path.parent} holds the logits of another teacher, data set, augmentation or seed",
                hint="Choose another folder for teacher_cache, or remove this one",
            )

    @property
    def identity(self) -> str:
        """Which weights these are."""
        return self._teacher.identity

    def to(self, device: torch.device) -> CachedTeacher:
        """Move the teacher to a device."""
        self._teacher.to(device)
        return self

    def __call__(self, batch: Batch) -> Tensor:
        """Return logits (B, K) for the pictures of a batch: those kept, or the teacher's, which are then kept."""
        views = batch.draws.views + (0 if batch.cut else self._half_views)
        rows, planned = batch.draws.indices, batch.draws.views >= 0  # others stand in for unreadable pictures
        said = self._logits[views, rows]  # (B, K)
        if not (planned.all() and said.any(1).all()):  # a row of zeros has not been written
            # rounded before it is used, so that a run which finds them on disk computes the same
            said = self._teacher(batch).cpu().numpy().astype(np.float16)
            self._logits[views[planned], rows[planned]] = said[planned]
        return torch.from_numpy(said.astype(np.float32)).to(batch.images.device)


def with_given(recipe: Recipe, network: nn.Module) -> Recipe:
    """Return the recipe with a network in memory as its teacher, in place of one that it names."""
    return recipe.with_changes(teacher=GIVEN + _digest(network)[:16], teacher_weights="")


def open_teacher(
    recipe: Recipe,
    student: Manifest,
    data_digest: str,
    pictures: int,
    dtype: torch.dtype | None,
    given: nn.Module | None = None,
) -> Teacher | CachedTeacher | None:
    """Open the recipe's teacher.

    Args:
        recipe: Says which.
        student: The student's classes and normalisation.
        data_digest: Which training pictures these are.
        pictures: How many.
        dtype: What it computes in, by autocast; None for single precision.
        given: The network, if the recipe's teacher is one in memory.

    Raises:
        UsageError: If the teacher knows other classes, is not the one the run began with, or several machines would
            write one cache.
        CheckpointError, DownloadError: If its weights cannot be read or fetched.
    """
    if given is not None and not recipe.teacher.startswith(GIVEN):
        found = f"that the teacher is {recipe.teacher}" if recipe.teacher else "that it has no teacher"
        raise UsageError("A resumed run keeps its recipe", found=found, hint="Leave the teacher out")
    if not recipe.teacher or recipe.distillation == "none":
        return None
    if recipe.teacher.startswith(GIVEN):
        teacher = _open_given(recipe, student, dtype, given)
    elif recipe.teacher.startswith(TIMM):
        teacher = _open_timm(recipe, student, dtype)
    else:
        teacher = _open_ours(recipe, student, dtype)
    if not recipe.teacher_cache:
        return teacher
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1"):
        raise UsageError("teacher_cache is for the processes of one machine", hint="Leave it out on several")
    fields = ("seed", "views", "crop", "crop_scale", "padding", "hflip", "vflip", "randaugment", "color_jitter",
              "interpolation", "erasing", "cutout", "grayscale")  # fmt: skip
    augmentation = json.dumps([getattr(recipe, name) for name in fields])
    identity = f"{data_digest}|{augmentation}|{json.dumps(student.preprocess.to_dict())}"
    shape = (2 * recipe.views, pictures, student.spec.num_classes)
    return CachedTeacher(teacher, Path(recipe.teacher_cache), identity, shape)


def check_weights(recipe: Recipe) -> None:
    """Raise UsageError if the file with the teacher's weights is not there."""
    weights = recipe.teacher_weights
    if weights and not Path(weights).is_file():
        hint = "Check the path; without teacher_weights the published ones are taken, or those in the teacher's folder"
        raise UsageError("There are no such weights of the teacher", expected="a file", found=weights, hint=hint)


def _open_given(recipe: Recipe, student: Manifest, dtype: torch.dtype | None, network: nn.Module | None) -> Teacher:
    """Open a copy of a network in memory, which is shown the student's pictures as they are."""
    if network is None or with_given(recipe, network) != recipe:
        found = "none" if network is None else "one with other weights"
        hint = "Go on from Python: train(resume=FOLDER, teacher=NETWORK)"
        raise UsageError("This run's teacher is a network given to train()", expected="it", found=found, hint=hint)
    spec, own = student.spec, student.preprocess
    teacher = Teacher(copy.deepcopy(network), recipe.teacher, own, own.mean, own.std, None, dtype=dtype)
    device = next((tensor.device for tensor in network.state_dict().values()), torch.device("cpu"))
    pictures = torch.zeros(2, spec.in_chans, *spec.input_size, device=device)
    expected = f"logits (2, {spec.num_classes}) for 2 pictures of the student, {tuple(pictures.shape)}"
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            said: Any = teacher.network(pictures)
    except Exception as error:  # somebody else's code
        raise UsageError("The teacher cannot be asked", expected=expected, found=str(error)[:300]) from error
    if not isinstance(said, Tensor) or said.shape != (2, spec.num_classes):
        found = str(tuple(said.shape)) if isinstance(said, Tensor) else f"a {type(said).__name__}"
        raise UsageError("The teacher's answer does not fit", expected=expected, found=found)
    return teacher


def _open_ours(recipe: Recipe, student: Manifest, dtype: torch.dtype | None) -> Teacher:
    name = recipe.teacher
    checkpoint, manifest = load_named(name, recipe.teacher_weights or True)
    _check_classes(name, len(student.labels) or student.spec.num_classes, manifest.spec.num_classes)
    order = _class_order(name, student.labels, manifest.labels)
    network, theirs = fold(build(manifest.spec, checkpoint).eval()), manifest.preprocess
    size = manifest.spec.input_size
    return Teacher(network, checkpoint.sha256, student.preprocess, theirs.mean, theirs.std, size, order, dtype)


def _open_timm(recipe: Recipe, student: Manifest, dtype: torch.dtype | None) -> Teacher:
    try:
        import timm
    except ImportError as error:
        raise missing_extra("train", "A timm teacher", error) from error
    name = recipe.teacher.removeprefix(TIMM)
    check_weights(recipe)
    own: dict[str, Any] = {"checkpoint_path": recipe.teacher_weights, "num_classes": student.spec.num_classes}
    try:
        network = timm.create_model(name, **(own if recipe.teacher_weights else {"pretrained": True}))
    except Exception as error:  # timm, huggingface_hub and torch.load each raise their own
        hint = "Put the weights into a file and name it with teacher_weights"
        raise TrainingError(f"timm cannot make the teacher {name!r}", found=str(error)[:300], hint=hint) from error
    _check_classes(recipe.teacher, student.spec.num_classes, int(str(network.num_classes)))
    order = _class_order(recipe.teacher, student.labels, _timm_labels(recipe.teacher, network))
    config = timm.data.resolve_model_data_config(network)
    size = (int(config["input_size"][1]), int(config["input_size"][2]))
    identity = f"{name}|{_digest(network)}"
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Teacher(network, identity, student.preprocess, mean, std, size, order, dtype)


def _timm_labels(name: str, network: nn.Module) -> tuple[str, ...]:
    """Return the class names that timm's configuration of a network, from wherever it is, says; empty for none."""
    config: Any = network.pretrained_cfg
    try:
        return class_names(config.get("label_names"))
    except SpecError as error:
        raise error.at(f"label_names of the teacher {name}") from error


def _class_order(name: str, student: tuple[str, ...], teacher: tuple[str, ...]) -> list[int] | None:
    """Return the teacher's class for each of the student's by its name; None if they agree, or go by their position."""
    if len(teacher) != len(student) or teacher == student:  # another number of names is of other weights, or of none
        return None
    order = match_classes(student, teacher)
    strangers = [label for label, found in zip(student, order, strict=True) if found < 0]
    if strangers:
        raise UsageError(f"The teacher {name} knows other classes", found=f"no {', '.join(strangers[:5])}")
    return order


def _check_classes(name: str, expected: int, found: int) -> None:
    if found != expected:
        raise UsageError(f"The teacher {name} knows other classes", expected=f"{expected}", found=f"{found}")


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _reserve(file: int, size: int) -> None:
    """Have the disk hold room for a file, where its file system can: older NFS and others cannot."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF):  # the last is glibc's, of files to append
            raise


def _memory_map(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """Open an array on disk, zeros at first; several processes may write different rows of it."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    with path.open("ab") as file:
        if file.tell() < size and hasattr(os, "posix_fallocate"):
            _reserve(file.fileno(), size)  # a full disk is an error now, not a crash later
        file.truncate(size)
    return np.memmap(path, dtype, "r+", shape=shape)
