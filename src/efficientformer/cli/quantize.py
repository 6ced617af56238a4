"""``efficientformer quantize``: a network's file in int8, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from efficientformer.export.quantize import Progress, Quantisation

_MAX_SKIPPED = 20


class Storage(StrEnum):
    """How weights alone are stored."""

    INT8 = "int8"
    FP16 = "fp16"


def quantize(
    model: Annotated[str, typer.Argument(help="Zoo name, weights file of any layout, or exported file.")],
    data: Annotated[Path, typer.Option(help="Pictures to calibrate and measure on: a data set or a plain folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the file and its report.")],
    max_drop: Annotated[float, typer.Option(help="Points of top-1 (or agreement) that may be lost.")] = 0.5,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures to calibrate on.")] = 300,
    holdout: Annotated[int, typer.Option(min=1, help="Other pictures, to measure on.")] = 500,
    weights_only: Annotated[
        Storage | None, typer.Option(help="Store the weights smaller and compute in float.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which pictures.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> None:
    """Quantise a network to int8. Layers that hurt stay in float until the allowed drop holds."""
    from efficientformer.export.quantize import quantize as run
    from efficientformer.weights.cache import terminal_progress

    with terminal_progress(quiet=quiet) as downloading, _status(quiet) as progress:
        result = run(
            str(model),
            data,
            output,
            max_drop=max_drop,
            pictures=pictures,
            holdout=holdout,
            weights_only=weights_only.value if weights_only else "",
            seed=seed,
            offline=offline or None,
            progress=progress,
            download_progress=downloading,
        )
    if as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        _print(result)
    for name, reason in result.skipped[:_MAX_SKIPPED]:
        typer.secho(f"skipped {name}: {reason}", fg="yellow", err=True)
    if len(result.skipped) > _MAX_SKIPPED:
        typer.echo(f"{len(result.skipped):,} pictures were skipped; report.json lists them all", err=True)
    if not quiet:
        if result.note:
            typer.echo(f"note: {result.note}", err=True)
        typer.echo(f"Wrote {result.path}, report.json and report.html", err=True)


@contextmanager
def _status(quiet: bool) -> Iterator[Progress | None]:
    """Show on standard error what is being done and for how long; nothing if quiet, or if that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)  # how many layers must stay in float, and so how long, is not known
        yield lambda text: bar.update(task, description=text)


def _print(result: Quantisation) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from efficientformer.export.quantize_report import score_rows

    console = Console(highlight=False)
    times = list(result.timings.items())
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("accuracy on held-out pictures")
    for heading in ("top-1 %", "agreement %", "points lost"):
        table.add_column(heading, justify="right")
    for row in score_rows(result):
        table.add_row(Text(row[0]), *row[1:])
    console.print(table)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("one picture")
    table.add_column("median ms", justify="right")
    for name, timing in times:
        table.add_row(Text(name), f"{timing.median_ms:.2f}")
    console.print(table)
    before, after = result.sizes
    console.print(f"size {after / 1e6:.2f} MB (float {before / 1e6:.2f} MB)")
    if result.layers:
        console.print(f"layers in float: {len(result.kept)} of {result.layers}")
