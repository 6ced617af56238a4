"""What is refused before a run measures or trains anything: settings whose errors would surface hours later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from efficientformer.data.augment import SampleAugment
from efficientformer.models.network import EfficientFormer
from efficientformer.slimming.extract import frozen_parts
from efficientformer.slimming.plan import SUPERNET, Plan
from efficientformer.slimming.space import Space, table_space
from efficientformer.slimming.supernet import Supernet
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import EfficientFormerError, SpecError, UsageError
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.spec.variants import v1_spec
from efficientformer.spec.zoo import is_remote, resolve
from efficientformer.training.optim import build_optimizer, freeze
from efficientformer.training.processes import mixed_precision
from efficientformer.training.recipe import Recipe
from efficientformer.training.setup import augmentation_of, decide_crop, fit_batch
from efficientformer.training.teacher import TIMM, TIMM_FOLDER, check_weights

MANY = 1 << 40  # pictures: how many there are is looked at where they are opened


def check_run(plan: Plan, space: Space) -> None:
    """Raise what would end a new run later: its recipes cannot be changed once it has begun.

    Raises:
        SpecError, UsageError: If the start network takes no pictures, no table can cover the space, or something of a
            recipe cannot work.
        UnknownModelError: If there is no such teacher.
        MissingExtraError: If a library is missing.
    """
    if space.start.in_chans not in (1, 3):
        raise SpecError("Pictures have 1 or 3 channels", expected="a start network with in_chans 1 or 3",
                        found=str(space.start.in_chans), hint="Change in_chans in its spec")  # fmt: skip
    table_space(space)
    with torch.device("meta"):  # names are all that counts
        network, supernet = EfficientFormer(space.start), Supernet(space.start)
    with _naming("supernet"):
        freeze(supernet, plan.supernet.freeze)
        _check_recipe(plan.supernet, space.start)
    with _naming("final"):
        _check_final_freeze(plan.final, space, network, supernet)
        _check_recipe(plan.final, space.start)


@contextmanager
def _naming(part: str) -> Iterator[None]:
    """Name the recipe an error is of."""
    try:
        yield
    except EfficientFormerError as error:
        raise error.at(part) from error


def _check_final_freeze(final: Recipe, space: Space, network: EfficientFormer, supernet: Supernet) -> None:
    """Raise UsageError if a part is none of the start network's or of its supernet's, or nothing is left to learn."""
    names = [name for name, _ in supernet.named_parameters()]
    for prefix in final.freeze:
        if not any(f"{name}.".startswith(f"{prefix}.") for name in names):
            freeze(network, [prefix])  # which says what parts there are, if it has none of that name either
    freeze(network, frozen_parts(final.freeze, space.largest, network))


def _check_recipe(recipe: Recipe, start: ArchSpec) -> None:
    """Raise what the parts of a training would raise that need neither the network nor its pictures."""
    mixed_precision(recipe, "auto")
    fit_batch(recipe, MANY, 1)
    build_optimizer(EfficientFormer(v1_spec((8, 8, 8, 8), (1, 1, 1, 1), 0, input_size=32)), recipe)
    decided = decide_crop(recipe, start)
    augmentation = augmentation_of(decided)
    if decided.crop == "rrc":
        SampleAugment(augmentation, PreprocessSpec().with_input_size(start.input_size))
    _check_teacher(recipe)


def _check_teacher(recipe: Recipe) -> None:
    """Raise UsageError if a teacher's files are not there, or no network has its name."""
    teacher = recipe.teacher
    if teacher in ("", SUPERNET) or is_remote(teacher) or Path(teacher).is_file():
        return
    folder = teacher.removeprefix(TIMM_FOLDER)
    if teacher.startswith(TIMM_FOLDER) and not Path(folder).is_dir():
        raise UsageError("There is no such teacher", expected="a folder that timm.models.save_for_hf wrote",
                         found=folder, hint="Check the path")  # fmt: skip
    if not teacher.startswith(TIMM):
        resolve(teacher)
    check_weights(recipe)
