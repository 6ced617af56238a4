"""``efficientformer predict``: classify pictures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from efficientformer.runtime.engines import ENGINES

if TYPE_CHECKING:
    from efficientformer.cli.results import Result
    from efficientformer.runtime.classifier import FileClassifier
    from efficientformer.runtime.inputs import Input


class Format(StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


def predict(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Files, folders, globs, URLs; - reads a picture from stdin.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="Zoo name, weights file or exported file.")] = "",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to use instead of the zoo's; any layout.")] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Classes per picture.")] = 3,
    format_: Annotated[Format, typer.Option("--format", "-f", help="Table, JSON lines or CSV.")] = Format.TABLE,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write results to a file instead.")] = None,
    annotate: Annotated[Path | None, typer.Option(help="Folder for copies with their label written on.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per run of the engine.")] = 16,
    engine: Annotated[str, typer.Option(help=f"Engine: {', '.join(ENGINES)}.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default all.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> None:
    """Classify pictures. Exits 0 if all were classified, 1 if some were skipped, 2 for wrong usage."""
    from efficientformer.cli.results import open_writer, prepare_folder

    with ExitStack() as stack:
        if annotate is not None:
            prepare_folder(annotate)
        writer = stack.enter_context(open_writer(format_.value, top_k, output))
        classifier = _load(model, checkpoint, engine, threads, offline, quiet)
        skipped = total = 0
        for result in _classify(classifier, inputs, batch_size, quiet):
            writer.write(result)
            total += 1
            if result.error:
                skipped += 1
                typer.secho(f"skipped {result.path}: {result.error}", fg="yellow", err=True)
            elif annotate is not None:
                from efficientformer.cli.annotate import annotate as draw

                draw(result, annotate)
    if skipped:
        typer.echo(f"{skipped} of {total} inputs were skipped", err=True)
        raise typer.Exit(1)


def _load(
    model: str, checkpoint: Path | None, engine: str, threads: int | None, offline: bool, quiet: bool
) -> FileClassifier:
    from efficientformer.export.deployable import deployable
    from efficientformer.runtime.classifier import FileClassifier
    from efficientformer.spec.zoo import EMBEDDED

    if not model and checkpoint is None and not quiet:
        typer.echo(
            f"Using {EMBEDDED}, shipped in the package (10 classes). For 1,000 ImageNet classes: "
            "--model efficientformer_l1 (or l3, l7, efficientformerv2_s0, s1, s2, l).",
            err=True,
        )
    if not model and checkpoint is None:
        path = deployable()
    else:
        from efficientformer.weights.cache import terminal_progress

        with terminal_progress(quiet=quiet) as progress:
            path = deployable(model, checkpoint=checkpoint, offline=offline or None, progress=progress)
    return FileClassifier(path, engine=engine, threads=threads)


def _classify(classifier: FileClassifier, inputs: list[str], batch_size: int, quiet: bool) -> Iterator[Result]:
    from efficientformer.cli.results import Result
    from efficientformer.runtime.classifier import Failed
    from efficientformer.runtime.inputs import gather

    gathered = list(gather(inputs, stdin=sys.stdin.buffer))
    predictions = classifier.predict(gathered, batch_size=batch_size)
    progress = not quiet and len(gathered) > batch_size and sys.stderr.isatty()
    for each, outcome in zip(_track(gathered) if progress else gathered, predictions, strict=True):
        if isinstance(outcome, Failed):
            yield Result(each.name, None, str(outcome.error), each)
        else:
            yield Result(each.name, outcome, "", each)


def _track(gathered: list[Input]) -> Iterator[Input]:
    from rich.console import Console
    from rich.progress import track

    yield from track(gathered, "classifying", console=Console(stderr=True), transient=True)
