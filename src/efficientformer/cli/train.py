"""``efficientformer train``: from a folder of pictures, or by a recipe, to a network with figures and a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from efficientformer.training.recipe import Recipe


def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe file (.py or .json); by default one that fine-tunes.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Data: class folders, ImageNet, tar, MNIST, CIFAR, CSV.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder; by default runs/NAME.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to go on with, perhaps with --set workers=N.")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Zoo name or weights file to start from.")] = "",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the pictures.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pictures per step, over all devices.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Decides order, augmentation, first weights.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other field of the recipe; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    show: Annotated[bool, typer.Option("--show", help="Print the recipe as given and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> None:
    """Train or fine-tune. Ctrl-C saves and says how to go on; torchrun spreads it over devices and nodes."""
    from efficientformer.spec.errors import UsageError, require

    require("train", "Training", "torch")
    from efficientformer.training.recipe import sets_workers

    given = {"model": model or None, "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    changes = {name: value for name, value in given.items() if value is not None}
    others = [setting for setting in settings or () if not sets_workers(setting)]
    if resume is not None and (recipe is not None or output is not None or changes or others):
        hint = "Give --resume, and --data if it has moved; --set workers=N changes no result"
        raise UsageError("A resumed run keeps its recipe and folder", hint=hint)
    if resume is not None:
        from efficientformer.training.state import RunFolder

        resume = resume.parent if resume.is_file() else resume  # state.pt of the folder
        RunFolder(resume).data()
    chosen = _recipe(resume or recipe, changes, settings or [])
    if show:
        _print(chosen)
        return
    from efficientformer.training.run import train as run
    from efficientformer.training.state import RunFolder

    outcome = run(
        None if resume else chosen, data, output, resume=resume, workers=chosen.workers, device=device, quiet=quiet
    )
    if not outcome.finished:
        if quiet:  # how to go on is no note
            typer.echo(f"Go on: {RunFolder(outcome.folder).resume_command}", err=True)
        raise typer.Exit(130)
    if outcome.evaluation is not None:
        typer.echo(outcome.folder)


def _recipe(file: Path | None, changes: dict[str, Any], settings: list[str]) -> Recipe:
    from efficientformer.training.recipe import Recipe, load_recipe, override

    return override(Recipe() if file is None else load_recipe(file), settings, **changes)


def _print(recipe: Recipe) -> None:
    typer.echo(recipe.to_json())
