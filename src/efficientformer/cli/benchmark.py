"""``efficientformer benchmark``: how fast networks run on this machine, in each engine and precision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from efficientformer.cli.progress import step_bars
from efficientformer.cli.targets import check_folder
from efficientformer.spec.errors import UsageError

if TYPE_CHECKING:
    from efficientformer.benchmarking.benchmark import Benchmark

_WIDTH = 120  # of the tables, if the terminal is not wider


def benchmark(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Zoo names, weights files or exported files.")
    ],
    engine: Annotated[str, typer.Option(help="all, auto, onnxruntime, openvino, torch or torch-compile.")] = "all",
    precision: Annotated[
        str, typer.Option(help="all (fp32, bf16, int8 of a quantised file), one of them, fp16, or auto.")
    ] = "all",
    batch: Annotated[str, typer.Option(help="Images per run; several with commas: 1,16.")] = "1",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default each engine's choice.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each combination.")] = 50,
    compiled: Annotated[bool, typer.Option("--compile", help="Time compiled torch too (slow to start).")] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Random weights for zoo names: nothing is downloaded.")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="Time this picture, from file to label.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for JSON, plot, HTML report.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> None:
    """Time networks side by side on this machine. Exits 0, 1 if nothing could be timed, 2 for wrong usage."""
    batches = _batches(batch)
    if output is not None:
        from efficientformer.reporting.page import require_libraries

        require_libraries()
        check_folder(output)
    from efficientformer.benchmarking.benchmark import benchmark as measure
    from efficientformer.weights.progress import terminal_progress

    with terminal_progress(quiet=quiet) as downloading, step_bars(quiet) as progress:
        found = measure(
            models,
            engine=engine,
            precision=precision,
            batches=batches,
            threads=threads,
            rounds=rounds,
            random_weights=random_weights,
            compiled=compiled,
            picture=picture,
            offline=offline or None,
            progress=progress,
            download_progress=downloading,
        )
    if as_json:
        typer.echo(found.to_json())
    else:
        _print(found)
    if output is not None:
        from efficientformer.benchmarking.report import write_report

        for path in write_report(found, output):
            if not quiet:
                typer.echo(f"Wrote {path}", err=True)
    if not found.rows:
        raise typer.Exit(1)


def _batches(text: str) -> list[int]:
    """Return the batch sizes of an option such as ``1,16``."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError("Illegal --batch", expected="whole numbers from 1, such as 1,16", found=text)
    return [int(part) for part in parts]


def _print(found: Benchmark) -> None:
    from rich.console import Console
    from rich.text import Text

    from efficientformer.benchmarking.report import COLUMNS, HINT, STEP_COLUMNS, cells
    from efficientformer.cli.tables import print_table

    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    head = Text.assemble((found.environment["hardware"], "bold"), f", {found.rounds} runs each, in turns")
    console.print(head)  # Text: a name such as "[b].onnx" is no markup
    if any(row.is_random for row in found.rows):
        console.print("[yellow]random weights: the speed is real, the results mean nothing[/yellow]")
    console.print()
    if found.rows:
        print_table(console, COLUMNS, [cells(row) for row in found.rows], left=2)
        console.print(HINT, style="dim")
    for each in found.pictures:
        width, height = each.size
        console.print(Text(f"\none picture of {width}x{height}, {each.model}, {each.name}"))
        steps = [(k, f"{t.median_ms:.2f}", f"{t.p10_ms:.2f}-{t.p90_ms:.2f}") for k, t in each.steps.items()]
        print_table(console, STEP_COLUMNS, steps, left=1)
    if found.unavailable:
        console.print("\nnot available here")
        rows = [(each.model, each.engine, each.precision, each.reason) for each in found.unavailable]
        print_table(console, ("network", "engine", "precision", "reason"), rows, left=4)
