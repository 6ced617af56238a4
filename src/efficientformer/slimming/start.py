"""The start network of a run: named, given as a spec or as weights, or chosen for the size of the pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from efficientformer.data.sources import open_splits
from efficientformer.export.deployable import file_of
from efficientformer.slimming.plan import FOUND, FROM_SCRATCH, Options, Plan, apply_settings, small_start
from efficientformer.spec.arch import ArchSpec, read_spec
from efficientformer.spec.errors import UsageError
from efficientformer.spec.fields import check_int
from efficientformer.spec.zoo import FILE_SUFFIXES, is_remote, resolve
from efficientformer.training.recipe import Recipe
from efficientformer.training.setup import DEFAULT_MODEL, SMALL, rooted, typical_side
from efficientformer.weights.checkpoint import load_checkpoint
from efficientformer.weights.pretrained import Overrides

MOST_EPOCHS = 100_000  # that a recipe may have


def make_plan(
    data: str | Path,
    targets: Iterable[float],
    *,
    model: str = "",
    recipe: Recipe | None = None,
    epochs: int | None = None,
    final_epochs: int | None = None,
    settings: Iterable[str] = (),
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
) -> Plan:
    """Return the plan of a slimming run, with sound defaults for what is left open.

    Args:
        data: The data set.
        targets: Latencies to reach, in milliseconds.
        model: The start network: a zoo name, a weights file, or a file with a spec in JSON. By default
            EfficientFormer-L1, or for pictures of at most 64 pixels a network of its own, from scratch.
        recipe: How supernet and final network are trained; by default fine-tuning, or what suits small networks from
            scratch.
        epochs: Epochs of the supernet; by default 20 from scratch, 10 from weights.
        final_epochs: Epochs of the final training; by default twice as many.
        settings: ``NAME=VALUE`` for fields of both recipes; ``supernet.``, ``final.`` or ``search.`` before it for one
            part only.
        engine: The engine whose latency counts.
        precision: What it computes in.
        threads: Its CPU threads; None lets it choose.

    Raises:
        UsageError, SpecError: If anything is illegal.
        DataError: If the data set is missing or of no known layout.
    """
    for name, value in (("epochs", epochs), ("final_epochs", final_epochs)):
        if value is not None:
            check_int(name, value, 1, MOST_EPOCHS)
    base = recipe or Recipe()
    base = choose_start(with_start(base, model) if model else base, data)
    if recipe is None and base.spec is not None:
        base = base.with_changes(**FROM_SCRATCH)
    final = base.with_changes(pretrained=True, **FOUND)
    settings = tuple(settings)
    if recipe is None or epochs is not None:
        base = _with_epochs(base, _usual_epochs(base, final, settings) if epochs is None else epochs)
    if recipe is None or final_epochs is not None:
        final = _with_epochs(final, 2 * base.epochs if final_epochs is None else final_epochs)
    supernet, final, options = apply_settings(base, final, Options(), settings)
    return Plan(str(data), tuple(targets), supernet, final, engine, precision, threads, options)


def _usual_epochs(base: Recipe, final: Recipe, settings: tuple[str, ...]) -> int:
    """Return the epochs of a supernet that starts as the settings say: from scratch, or from weights."""
    base, final = (each.with_changes(epochs=MOST_EPOCHS) for each in (base, final))  # refine_epochs may be set, too
    supernet, *_ = apply_settings(base, final, Options(), settings)
    return 10 if supernet.pretrained else 20


def _with_epochs(recipe: Recipe, epochs: int) -> Recipe:
    last = {name: min(getattr(recipe, name), epochs) for name in ("refine_epochs", "ema_epochs")}
    return recipe.with_changes(epochs=epochs, **last)


def decide(plan: Plan) -> Plan:
    """Return the plan with the start network decided, if it was left open, and files named from the root.

    Raises:
        DataError: If the data set is missing or of no known layout.
    """
    return dataclasses.replace(plan, supernet=rooted(choose_start(plan.supernet, plan.data)), final=rooted(plan.final))


def choose_start(recipe: Recipe, data: str | Path) -> Recipe:
    """Return the recipe with a start network for the size of the pictures, if it names none."""
    if recipe.model != "auto" or recipe.spec is not None:
        return recipe
    train = open_splits(data, val_fraction=recipe.val_fraction, seed=recipe.seed).train
    if typical_side(train) <= SMALL:
        return recipe.with_changes(spec=small_start().to_dict(), pretrained=False)
    return recipe.with_changes(model=DEFAULT_MODEL)


def start_network(plan: Plan) -> ArchSpec:
    """Return the start network: the one a run began with; else one for the data set's classes, as training builds it.

    Raises:
        SpecError, CheckpointError: If the model describes no network, or its weights cannot be read.
        UnknownModelError: If no zoo card has the model's name.
    """
    if plan.start is not None:
        return plan.start
    recipe = plan.supernet
    splits = open_splits(plan.data, val_fraction=recipe.val_fraction, seed=recipe.seed)
    spec = recipe.arch
    file = Path(file_of(recipe.model) or recipe.model)
    if spec is None and file.is_file():
        spec = load_checkpoint(file).spec
    if spec is None:
        spec = resolve(recipe.model).card.spec
    classes = len(splits.train.classes)
    return Overrides(input_size=recipe.input_size or None, num_classes=classes).apply(spec)


def with_start(recipe: Recipe, model: str) -> Recipe:
    """Return the recipe for a start network: a zoo name, a weights file anywhere, or a file with a spec in JSON.

    Raises:
        UsageError: If there is no such file.
        SpecError: If the file holds no spec.
    """
    path = Path(model)
    if path.suffix == ".json":
        return recipe.with_changes(model="auto", spec=read_spec(path).to_dict(), pretrained=False)
    if path.suffix in FILE_SUFFIXES and not path.is_file() and not is_remote(model):
        raise UsageError(f"There is no weights file {path}", hint="Give a zoo name, a weights file or a spec in JSON")
    return recipe.with_changes(model=model, spec=None)
