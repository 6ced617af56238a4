"""``efficientformer test``: measure a network on a labelled data set."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from efficientformer.cli.progress import count_bar
from efficientformer.cli.targets import check_file
from efficientformer.runtime.engines import ENGINE_KEYS
from efficientformer.runtime.records import arrow_row
from efficientformer.spec.errors import UsageError
from efficientformer.spec.text import printable
from efficientformer.spec.whole import write_text

if TYPE_CHECKING:
    from rich.console import Console

    from efficientformer.evaluation.result import Evaluation

_MAX_CLASS_ROWS = 20
_MAX_SKIPPED = 20


def test(
    model: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL [CHECKPOINT]", help="Zoo name, mmpretrain config, weights file or exported file; weights."
        ),
    ],
    data: Annotated[Path, typer.Option(help="The data set: a folder of class folders, tar shards, ...")],
    checkpoint: Annotated[str | None, typer.Option(help="Weights to use instead of the zoo's; any layout.")] = None,
    split: Annotated[
        str | None, typer.Option(help="train, val or test; by default the first there is of val, test and train.")
    ] = None,
    engine: Annotated[str, typer.Option(help=f"Engine: auto, torch, {', '.join(ENGINE_KEYS)}.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="fp32, bf16, fp16 or int8; auto is fp32, or int8 of a quantised file.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="In torch: auto, cpu, cuda, cuda:1, ...")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per run of the network.")] = 64,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that decode; by default one per CPU.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the JSON object; or to a .jsonl or .csv what each picture got."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> None:
    """Measure a network on labelled pictures. Exits 0, 1 if pictures were skipped, 2 for wrong usage."""
    name, weights = _arguments(model, checkpoint)
    _check_targets(output, report)
    from efficientformer.api import evaluate_model
    from efficientformer.evaluation.distributed import join
    from efficientformer.weights.progress import terminal_progress

    with join() as team:
        silent = quiet or not team.first
        with terminal_progress(quiet=silent) as downloading, count_bar("testing", silent) as progress:
            evaluation = evaluate_model(
                name,
                data,
                checkpoint=weights,
                split=split,
                engine=engine,
                precision=precision,
                device=device,
                batch_size=batch_size,
                workers=workers,
                keep_outcomes=output is not None and output.suffix.lower() in _OF_EACH_PICTURE,
                offline=offline or None,
                progress=progress,
                download_progress=downloading,
            )
    if not team.first:
        return  # with 0, whatever was skipped: at another code torchrun would stop the first while it still writes
    _deliver(evaluation, as_json, output, report, quiet)
    if evaluation.skipped:
        raise typer.Exit(1)


def _arguments(model: list[str], checkpoint: str | None) -> tuple[str, str | None]:
    """Return the network and its weights, which may stand second as in ``tools/test.py CONFIG CHECKPOINT``."""
    if len(model) > 2:
        raise UsageError("Too many arguments", expected="MODEL [CHECKPOINT]", found=" ".join(model))
    if len(model) == 2 and checkpoint is not None:
        raise UsageError("Two checkpoints", found=f"{model[1]} and {checkpoint}", hint="Leave one out")
    return model[0], model[1] if len(model) == 2 else checkpoint


def _check_targets(output: Path | None, report: Path | None) -> None:
    """Find out now, not after hours of work, that a file cannot be written."""
    if output is not None and output.suffix.lower() not in ("", ".json", *_OF_EACH_PICTURE):
        expected = "a name that ends in .json, .jsonl or .csv"
        raise UsageError(f"Cannot write {output}", expected=expected, found=output.suffix)
    for path in (output, report):
        if path is not None:
            check_file(path)
    if report is not None:
        from efficientformer.reporting.page import require_libraries

        require_libraries()


def _deliver(evaluation: Evaluation, as_json: bool, output: Path | None, report: Path | None, quiet: bool) -> None:
    try:
        _write(evaluation, output, report)
    finally:  # a disk that is full by now does not cost the figures too
        _tell(evaluation, as_json, quiet)
    for path in (output, report):
        if path is not None and not quiet:
            typer.echo(f"Wrote {path}", err=True)


def _write(evaluation: Evaluation, output: Path | None, report: Path | None) -> None:
    if output is not None:
        as_text = _OF_EACH_PICTURE.get(output.suffix.lower())
        rows = [dataclasses.asdict(each) for each in evaluation.outcomes]
        write_text(output, as_text(rows) if as_text is not None else evaluation.to_json() + "\n")
    if report is not None:
        from efficientformer.evaluation.report import write_report

        write_report(evaluation, report)


def _tell(evaluation: Evaluation, as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo(evaluation.to_json())
    else:
        _print(evaluation)
    for each in evaluation.skipped[:_MAX_SKIPPED]:
        typer.secho(printable(f"skipped {each.name}: {each.reason}"), fg="yellow", err=True)
    if len(evaluation.skipped) > _MAX_SKIPPED:
        typer.echo(f"... and {len(evaluation.skipped) - _MAX_SKIPPED:,} more, which --json names", err=True)
    if evaluation.skipped:
        total = evaluation.images + len(evaluation.skipped)
        typer.echo(f"{len(evaluation.skipped):,} of {total:,} pictures were skipped", err=True)
    if not quiet:
        for note in evaluation.notes:
            typer.echo(f"note: {note}", err=True)


def _json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(arrow_row(row)) + "\n" for row in rows)


def _csv(rows: list[dict[str, Any]]) -> str:
    from efficientformer.cli.results import csv_writer
    from efficientformer.evaluation.result import Outcome

    text = io.StringIO()
    writer = csv_writer(text)
    writer.writerow(field.name for field in dataclasses.fields(Outcome))
    writer.writerows(arrow_row(row).values() for row in rows)
    return text.getvalue()


_OF_EACH_PICTURE = {".jsonl": _json_lines, ".csv": _csv}  # endings of files that say what was predicted of each picture


def _print(evaluation: Evaluation) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    result = evaluation.result
    # Text: a name such as "[b].onnx" is no markup
    console.print(Text(printable(evaluation.model), "bold"), soft_wrap=True)
    lines = {
        "data": evaluation.data,
        "engine": evaluation.engine,
        "preprocess": evaluation.manifest.preprocess.describe(),
        "images": f"{result.images:,} in {evaluation.seconds:.1f} s ({evaluation.images_per_s:,.0f} images/s)",
        "top-1": f"{result.top1:.2f} %",
        "top-5": f"{result.top5:.2f} %" if result.top5 is not None else "",
        "macro": "recall {recall:.2f} %, precision {precision:.2f} %, F1 {f1:.2f} %".format(**result.per_class.macro),
        "loss": f"{result.loss:.4f}",
        "calibration": f"error {result.calibration.ece:.2f} %, mean confidence "
        f"{result.calibration.mean_confidence:.2f} %",
        "published": evaluation.published.describe() if evaluation.published else "",
    }
    for name, text in lines.items():
        if text:
            console.print(Text(printable(f"  {name:<12} {text}")), soft_wrap=True)
    if len(evaluation.classes) <= _MAX_CLASS_ROWS:
        _print_classes(console, evaluation)


def _print_classes(console: Console, evaluation: Evaluation) -> None:
    from efficientformer.cli.tables import print_table

    per_class, rows = evaluation.result.per_class, []
    for index, name in enumerate(evaluation.classes):
        figures = (float(column[index]) for column in (per_class.top1, per_class.precision, per_class.f1))
        cells = ("-" if math.isnan(value) else f"{value:.2f}" for value in figures)
        rows.append((name, f"{per_class.count[index]:,}", *cells))
    console.print()
    print_table(console, ("class", "images", "top-1", "precision", "F1"), rows, left=1)
