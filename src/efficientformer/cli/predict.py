"""``efficientformer predict``: classify pictures."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from enum import StrEnum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from efficientformer.runtime.engines import ENGINES, PRECISIONS
from efficientformer.spec.errors import UsageError

if TYPE_CHECKING:
    from efficientformer.api import Classifier
    from efficientformer.cli.results import Result
    from efficientformer.runtime.inputs import Input
    from efficientformer.runtime.records import Record

Tick: TypeAlias = Callable[[], None]
Gather: TypeAlias = "Callable[[], Iterator[Input]]"
ClassifyFrom: TypeAlias = "Callable[[int], Iterator[Result]]"

FEW = 32  # pictures up to which the engine that opens fastest beats the one that runs fastest


class Format(StrEnum):
    """How results are written."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"


class Decode(StrEnum):
    """How large JPEGs are decoded."""

    EXACT = "exact"
    FAST = "fast"


def predict(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Files, folders, globs, URLs; - reads a picture from stdin.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="Zoo name, weights file or exported file.")] = "",
    checkpoint: Annotated[str | None, typer.Option(help="Weights to use instead of the zoo's; any layout.")] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Classes per picture.")] = 3,
    format_: Annotated[
        Format | None, typer.Option("--format", "-f", help="By default that of the output's ending, or a table.")
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Write results to a file; a killed run goes on where it was.")
    ] = "",
    annotate: Annotated[Path | None, typer.Option(help="Folder for copies with their label written on.")] = None,
    decode: Annotated[Decode, typer.Option(help="fast: large JPEGs are decoded at reduced size.")] = Decode.EXACT,
    engine: Annotated[str, typer.Option(help=f"Engine: {', '.join(ENGINES)}, torch, torch-compile.")] = "auto",
    precision: Annotated[str, typer.Option(help=f"Precision: {', '.join(PRECISIONS)}.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default all.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="On a Ray cluster: one folder or URI in, one out.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> None:
    """Classify pictures. Exits 0 if all were classified, 1 if some were skipped, 2 for wrong usage."""
    from efficientformer.cli.results import choose_format, output_file
    from efficientformer.cli.targets import prepare_folder
    from efficientformer.spec.text import printable

    wanted = format_.value if format_ else ""
    if ray:
        if annotate is not None:
            raise UsageError("--annotate is for one machine", hint="Leave out --annotate or --ray")
        total, skipped = _on_cluster(
            inputs, output, wanted, model, checkpoint, top_k, decode, engine, precision, threads, offline, quiet
        )
        _finish(total, skipped)
        return
    target = output_file(output) if output else None
    chosen = choose_format(wanted, Path(output) if output else None)
    if annotate is not None:
        prepare_folder(annotate)
    listed = partial(_gather, inputs, annotate, offline)
    asked: Record = {
        "inputs": inputs, "folder": _folder_of(inputs), "annotate": annotate and str(annotate.resolve()),
        "model": model, "checkpoint": checkpoint, "top_k": top_k, "threads": threads,
        "decode": decode.value,
    }  # fmt: skip
    engine, precision = _begun_with(target, asked, engine, precision)
    classifier = _load(listed, model, checkpoint, engine, precision, threads, offline, quiet)
    top_k = min(top_k, classifier.manifest.spec.num_classes)
    question = asked | {
        "engine": classifier.key, "precision": classifier.precision, "version": classifier.engine,
        "network": classifier.manifest.to_json(),
        "weights": _digest(model, checkpoint, engine, precision) if target else "",
    }  # fmt: skip

    def classify(already: int) -> Iterator[Result]:
        coming = islice(listed(), already, None)
        with _fetched(coming, inputs) as pictures, _progress(listed, already, quiet) as tick:
            for result in _classify(classifier, pictures, decode.value, threads):
                told = _annotated(result, annotate) if annotate is not None else result
                if told.error:
                    line = f"skipped {printable(told.path)}: {printable(told.error)}"
                    typer.secho(line, fg="yellow", err=True)
                yield told
                if told.copy is not None:  # the journal holds its name by now: killed in between, a run writes it anew
                    told.copy.save()
                tick()

    if target is None:
        _finish(*_to_terminal(classify(0), chosen, top_k))
    else:
        _finish(*_to_file(classify, listed, target, chosen, top_k, question, quiet))


def _begun_with(target: Path | None, asked: Record, engine: str, precision: str) -> tuple[str, str]:
    """Return engine and precision; where they are left open, those that the run which now goes on was begun with.

    Measured again, another one may win: the journal would then be refused by chance.
    """
    from efficientformer.cli.journal import begun

    match begun(target) if target and engine == "auto" else {}:
        case {"engine": str(its_engine), "precision": str(its_precision), **rest} if asked.items() <= rest.items():
            return (its_engine, its_precision) if precision in ("auto", its_precision) else (engine, precision)
    return engine, precision


def _folder_of(inputs: list[str]) -> str:
    """Return the folder that relative names among inputs start from; '' if there are none: it then decides nothing."""
    from efficientformer.runtime.inputs import STDIN, is_url

    relative = any(not (each == STDIN or is_url(each) or Path(each).is_absolute()) for each in inputs)
    return str(Path.cwd()) if relative else ""


def _finish(total: int, skipped: int) -> None:
    """Leave with 1 if pictures were skipped."""
    if skipped:
        typer.echo(f"Inputs skipped: {skipped} of {total}", err=True)
        raise typer.Exit(1)


def _on_cluster(
    inputs: list[str],
    output: str,
    format_: str,
    model: str,
    checkpoint: str | None,
    top_k: int,
    decode: Decode,
    engine: str,
    precision: str,
    threads: int | None,
    offline: bool,
    quiet: bool,
) -> tuple[int, int]:
    """Predict with Ray; return how many pictures there were, and how many of them errors."""
    from efficientformer.cluster.predict import Options, predict_on_cluster
    from efficientformer.export.deployable import deployable
    from efficientformer.weights.progress import terminal_progress

    if len(inputs) != 1 or not output:
        found = f"{len(inputs)} inputs, output {output or 'none'}"
        raise UsageError("Illegal --ray", expected="one folder or URI, and --output FOLDER", found=found)
    options = Options(engine, precision, threads or 1, top_k, decode.value)
    if not quiet:
        _note(model, checkpoint, engine, precision, offline)
    with terminal_progress(quiet=quiet) as progress:
        path = deployable(model, checkpoint=checkpoint, precision=precision, offline=offline or None, progress=progress)
    summary = predict_on_cluster(
        inputs[0], output, path, options, format_=format_ or "parquet", quiet=quiet or not sys.stderr.isatty()
    )
    if not quiet:
        who = f" by {summary.workers} workers" if summary.workers else ""
        kept = f"; {summary.kept:,} were there already" if summary.kept else ""
        typer.echo(f"{summary.pictures:,} pictures{who}, rows in {summary.output}{kept}", err=True)
    return summary.pictures, summary.skipped


def _to_terminal(results: Iterable[Result], format_: str, top_k: int) -> tuple[int, int]:
    """Print results; return how many there were, and how many of them errors."""
    from efficientformer.cli.results import WRITERS

    total = skipped = 0
    with contextlib.closing(WRITERS[format_](None, top_k)) as writer:  # interrupted, it shows what there is
        for result in results:
            writer.write(result.record(top_k))
            total += 1
            skipped += bool(result.error)
    return total, skipped


def _to_file(
    classify: ClassifyFrom,
    listed: Gather,
    output: Path,
    format_: str,
    top_k: int,
    question: Record,
    quiet: bool,
) -> tuple[int, int]:
    """Write results to a file by way of its journal; return how many there are in all, and how many of them errors."""
    from efficientformer.cli.journal import Journal

    with contextlib.closing(Journal(output, question)) as journal:
        if journal.done and not quiet:
            typer.echo(f"Going on after {journal.done:,} pictures of {journal.path}", err=True)
        place = -1
        for place, picture in enumerate(islice(listed(), journal.done)):
            journal.check(place, picture.name)
        if place + 1 < journal.done:
            journal.check(place + 1, "nothing: there are fewer inputs")
        total, skipped = journal.done, journal.failed
        try:
            for result in classify(journal.done):
                journal.write(result.record(top_k), result.copy.path if result.copy else None)
                total += 1
                skipped += bool(result.error)
        except KeyboardInterrupt:
            typer.echo(f"{total:,} pictures are kept in {journal.path}; the same command goes on from there", err=True)
            raise
        journal.finish(format_, top_k)
    return total, skipped


def _load(
    listed: Gather,
    model: str,
    checkpoint: str | None,
    engine: str,
    precision: str,
    threads: int | None,
    offline: bool,
    quiet: bool,
) -> Classifier:
    from efficientformer.api import Classifier
    from efficientformer.runtime.engines import can_import
    from efficientformer.runtime.processor import available_cores
    from efficientformer.weights.progress import terminal_progress

    if not quiet:
        _note(model, checkpoint, engine, precision, offline)
    chosen, many = engine == "auto", any(True for _ in islice(listed(), FEW, None))
    if chosen and precision in ("auto", "fp32", "int8") and not many and can_import("onnxruntime"):
        engine = "onnxruntime"  # opens fastest
    streams = threads or available_cores() if many else 1
    with terminal_progress(quiet=quiet) as progress:
        classifier = Classifier(
            model,
            checkpoint=checkpoint,
            engine=engine,
            precision=precision,
            threads=threads,
            streams=streams,
            offline=offline or None,
            progress=progress,
        )
    if chosen and engine == "auto" and not quiet:
        typer.echo(f"{classifier.engine}: {classifier.reason}", err=True)
    return classifier


def _note(model: str, checkpoint: str | None, engine: str, precision: str, offline: bool) -> None:
    """Say on standard error what is used where no network is named, or that one is built for many seconds, once."""
    from importlib.util import find_spec

    from efficientformer.export.deployable import ready_file
    from efficientformer.runtime.engines import ENGINES
    from efficientformer.spec.zoo import EMBEDDED

    if not model and checkpoint is None:
        typer.echo(
            f"Using {EMBEDDED}, shipped in the package (10 classes). For 1,000 ImageNet classes: "
            "--model efficientformer_l1 (or l3, l7, v2_s0, v2_s1, v2_s2, v2_l).",
            err=True,
        )
        return
    built = engine in ENGINES and precision != "int8" and find_spec("torch") is not None
    if built and ready_file(model, checkpoint=checkpoint, offline=offline or None) is None:
        typer.echo(f"Building the deployable file of {checkpoint or model}; this is done once.", err=True)


def _gather(inputs: list[str], annotate: Path | None, offline: bool) -> Iterator[Input]:
    from efficientformer.runtime.inputs import gather, is_url

    reason = ""
    if any(map(is_url, inputs)):
        from efficientformer.weights.download import offline_reason

        reason = offline_reason(offline or None)
    stdin = sys.stdin.buffer if sys.stdin else None  # some schedulers close it
    return gather(inputs, stdin=stdin, outside=annotate, keep=annotate is not None, offline=reason)


@contextlib.contextmanager
def _fetched(pictures: Iterator[Input], inputs: list[str]) -> Iterator[Iterator[Input]]:
    """Give the pictures; if URLs are among the inputs, a few of them are being fetched before their turn.

    What was drawn can be read for as long as the context lasts.
    """
    from concurrent.futures import ThreadPoolExecutor

    from efficientformer.runtime.inputs import READERS, is_url, read_ahead
    from efficientformer.runtime.pipeline import THREADS

    if not any(map(is_url, inputs)):
        yield pictures
        return
    readers = ThreadPoolExecutor(READERS, thread_name_prefix=THREADS)
    try:
        yield read_ahead(pictures, readers)
    finally:
        readers.shutdown(wait=False, cancel_futures=True)  # a server that is slow holds nobody up


def _annotated(result: Result, folder: Path) -> Result:
    """Return a result with its picture's annotated copy; an error if the picture can no longer be read."""
    from efficientformer.cli.annotate import annotate
    from efficientformer.spec.errors import ImageError

    try:
        return result if result.error else replace(result, copy=annotate(result, folder))
    except ImageError as error:
        return replace(result, prediction=None, error=str(error))


def _digest(model: str, checkpoint: str | None, engine: str, precision: str) -> str:
    """Return the SHA-256 of the file that runs: what a manifest says can be true of other weights too."""
    from efficientformer.api import TORCH_ENGINES
    from efficientformer.export.deployable import deployable, file_of
    from efficientformer.weights.cache import sha256_of

    if engine not in TORCH_ENGINES:
        path = deployable(model, checkpoint=checkpoint, precision=precision, offline=True)  # there already
    elif (file := file_of(checkpoint or model)) is None or not (path := Path(file)).is_file():
        return ""  # a zoo name in torch, whose manifest holds the digest of its weights
    return sha256_of(path)


def _classify(classifier: Classifier, pictures: Iterator[Input], decode: str, threads: int | None) -> Iterator[Result]:
    """Yield the result of each input, in order; inputs are drawn no further ahead than the classifier does."""
    from collections import deque

    from efficientformer.cli.results import Result
    from efficientformer.runtime.classifier import Failed

    drawn: deque[Input] = deque()

    def noted() -> Iterator[Input]:
        for picture in pictures:
            drawn.append(picture)
            yield picture

    for outcome in classifier.predict(noted(), decode=decode, workers=threads):
        each = drawn.popleft()
        if isinstance(outcome, Failed):
            yield Result(each.name, None, str(outcome.error), each)
        else:
            yield Result(each.name, outcome, "", each)


@contextlib.contextmanager
def _progress(listed: Gather, already: int, quiet: bool) -> Iterator[Tick]:
    """Give a function to call after each picture: it moves a bar on standard error, if that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda: None
        return
    total = sum(1 for _ in listed())  # only names are listed, nothing is read
    if total - already <= FEW:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    speed = TextColumn("{task.fields[speed]} images/s")
    columns = (TextColumn("classifying"), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, completed=already, speed="-")

        def tick() -> None:
            at = bar.tasks[0]
            bar.update(task, advance=1, speed=f"{at.speed:.0f}" if at.speed else "-")

        yield tick
