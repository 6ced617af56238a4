"""``efficientformer quantize``: a smaller, faster file of a network, measured on the user's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from efficientformer.cli.progress import step_bars

if TYPE_CHECKING:
    from efficientformer.export.quantize import QuantisationReport


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Zoo name, weights file or exported file.")],
    data: Annotated[Path, typer.Option(help="Folder with pictures; folders named after classes give labels.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the file and its report.")],
    checkpoint: Annotated[str | None, typer.Option(help="Weights to use instead of the zoo's; any layout.")] = None,
    max_drop: Annotated[float, typer.Option(help="Points of top-1 that may be lost.")] = 0.5,
    pictures: Annotated[int, typer.Option(min=4, help="Pictures to calibrate on, at most.")] = 300,
    holdout: Annotated[int, typer.Option(min=4, help="Other pictures to measure on, at most.")] = 500,
    weights_only: Annotated[str, typer.Option(help="int8 or fp16: store weights so, compute in float.")] = "",
    engine: Annotated[str, typer.Option(help="all, or openvino: a little faster there.")] = "all",
    weight_bits: Annotated[int, typer.Option(help="7, or 8: finer, for processors with VNNI or the like only.")] = 7,
    seed: Annotated[int, typer.Option(min=0, help="Decides which pictures.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> None:
    """Quantise a network to int8. Exits 0, 1 if the allowed drop cannot be held, 2 for wrong usage."""
    from efficientformer.reporting.page import require_libraries
    from efficientformer.spec.errors import require

    require("quantize", "Quantising a network", "onnx")  # first: the extra that brings the report's libraries too
    require_libraries()
    from efficientformer.export.quantize import quantize as make

    with step_bars(quiet) as progress:
        report = make(
            model,
            data,
            output,
            checkpoint=checkpoint,
            weights_only=weights_only,
            engine=engine,
            weight_bits=weight_bits,
            pictures=pictures,
            holdout=holdout,
            max_drop=max_drop,
            seed=seed,
            offline=offline or None,
            progress=progress,
        )
    if not quiet:
        for name, reason in report.skipped:
            typer.secho(f"skipped {name}: {reason}", fg="yellow", err=True)
    if as_json:
        typer.echo(report.to_json())
    else:
        _print(report)


def _print(report: QuantisationReport) -> None:
    from rich.console import Console
    from rich.markup import escape

    from efficientformer.cli.tables import print_table
    from efficientformer.export.quantize_page import ACCURACY_COLUMNS, accuracy_rows, speed_rows

    console = Console(highlight=False)
    before, after = (size / 1e6 for size in report.sizes)
    name = f"[bold]{escape(str(report.path))}[/bold]"
    console.print(f"{name}: {report.kind}, {before:.2f} to {after:.2f} MB", soft_wrap=True)
    single = "" if report.top1 is None else f"; single precision: {report.top1:.2f} % top-1"
    measured = f"calibrated on {report.calibrated_on} pictures, measured on {report.held_out} others{single}"
    console.print(measured, soft_wrap=True)
    if report.kept:
        console.print(f"kept in float: {escape(', '.join(report.kept))}", soft_wrap=True)
    print_table(console, ACCURACY_COLUMNS, accuracy_rows(report), left=1)
    print_table(console, ("one picture", "median ms", "p10", "p90"), speed_rows(report), left=1)
