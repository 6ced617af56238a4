"""``efficientformer slim``: a network cut down to a latency on the user's own device, and trained."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from efficientformer.slimming.plan import Plan
    from efficientformer.slimming.report import Finished


def slim(
    data: Annotated[Path | None, typer.Option(help="Data: class folders, ImageNet, tar, MNIST, CIFAR, CSV.")] = None,
    target_latency: Annotated[
        list[str] | None, typer.Option(metavar="TIME", help="Budget for one picture, such as 2.0ms; repeatable.")
    ] = None,
    engine: Annotated[str, typer.Option(help="Engine it is slimmed for: auto, onnxruntime, openvino.")] = "auto",
    precision: Annotated[str, typer.Option(help="What it computes in: auto, fp32, bf16, fp16, int8.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine.")] = None,
    table: Annotated[Path | None, typer.Option(help="Latency table of another device.")] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Start network: zoo name, weights file, or spec in JSON.")
    ] = "",
    recipe: Annotated[Path | None, typer.Option(help="Recipe file for supernet and final training.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of the supernet.")] = None,
    final_epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of the final training.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any field of the recipe; supernet., final. or search. before "
                     "it for one part only; repeatable."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder; by default runs/slim.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Run folder to go on with, perhaps with --set workers=N; new targets are added.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> None:  # fmt: skip
    """Slim a network to a latency: supernet, search, final training. Ctrl-C saves; --resume goes on."""
    from efficientformer.spec.errors import UsageError, require

    require("train", "Slimming", "torch")
    from efficientformer.slimming.plan import PLAN, milliseconds
    from efficientformer.slimming.run import slim as run

    targets = tuple(milliseconds(text) for text in target_latency or ())
    given = {"model": model, "recipe": recipe, "epochs": epochs, "final_epochs": final_epochs, "engine": engine,
             "precision": precision, "threads": threads, "settings": settings or ()}  # fmt: skip
    folder = resume or output or Path("runs/slim")
    others = resume is None and os.path.isfile(folder / PLAN)  # noqa: PTH113 (as in run.py)
    try:
        with _sigterm_as_ctrl_c():
            if resume is not None:
                workers, rest = _workers(settings or [])
                _refuse_changes({**given, "settings": rest, "table": table, "output": output})
                outcome = run(resume=resume, targets=targets, data=data, workers=workers, quiet=quiet)
            elif data is None:
                raise UsageError("Nothing to train on", hint="Name a data set: --data DIR")
            else:
                outcome = run(_plan(data, targets, given), folder, table=table, quiet=quiet)
    except KeyboardInterrupt:  # between the trainings: every step of the search is on disk
        if others or not (folder / PLAN).is_file():
            raise
        outcome = None
    if outcome is None or not outcome.finished:
        typer.echo(f"Stopped. Go on: efficientformer slim --resume {shlex.quote(str(folder))}", err=True)
        raise typer.Exit(130)
    for network in outcome.networks:
        if not quiet or network.holds is False:
            typer.secho(_line(network, outcome.device), fg="yellow" if network.holds is False else None, err=True)
        typer.echo(network.weights)
    if any(network.holds is False for network in outcome.networks):
        raise typer.Exit(1)


def _line(network: Finished, device: str) -> str:
    """Return what became of one budget; ``device`` is the latency table's."""
    said = f"{network.target_ms:g} ms: top-1 {network.top1:.2f} %, predicted {network.step.predicted_ms:.3f} ms"
    if network.measured is None:
        return f"{said}, not measured: the table is from elsewhere ({device})"
    said += f", measured {network.measured}; budget "
    return f"{said}held" if network.holds else f"{said}NOT held; --resume measures again, on a quieter machine perhaps"


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM interrupt what is between the trainings; those have handlers of their own."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _plan(data: Path, targets: tuple[float, ...], given: dict[str, Any]) -> Plan:
    from efficientformer.slimming.start import make_plan
    from efficientformer.training.recipe import load_recipe

    file = given["recipe"]
    return make_plan(data, targets, **{**given, "recipe": None if file is None else load_recipe(file)})


def _workers(settings: list[str]) -> tuple[int | None, list[str]]:
    """Return the number of workers that settings ask for, None for none, and the other settings."""
    from efficientformer.training.recipe import Recipe, override, sets_workers

    asked = [setting for setting in settings if sets_workers(setting)]
    others = [setting for setting in settings if not sets_workers(setting)]
    return (override(Recipe(), asked).workers if asked else None), others


def _refuse_changes(given: dict[str, Any]) -> None:
    """Raise UsageError if an option was given that a resumed run has decided already."""
    from efficientformer.spec.errors import UsageError

    changed = [name for name, value in given.items() if value and value != "auto"]
    if changed:
        hint = ("Give --resume, with --target-latency for a further target and --data if it has moved; "
                "--set workers=N changes no result")  # fmt: skip
        raise UsageError("A resumed run keeps its plan", found=", ".join(changed), hint=hint)
