"""``efficientformer profile``: where the time of a network goes on an engine, and the paper's observations there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from efficientformer.cli.targets import prepare_folder
from efficientformer.runtime.engines import ENGINES, PRECISIONS
from efficientformer.spec.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from efficientformer.latency.observations import Observations
    from efficientformer.latency.profile import Profile
    from efficientformer.spec.arch import ArchSpec


def profile(
    model: Annotated[str, typer.Argument(help="Zoo name, weights file, exported file, or spec in JSON.")] = "",
    checkpoint: Annotated[str | None, typer.Option(help="Weights to use instead of the zoo's; any layout.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Random weights for a zoo name: nothing is downloaded.")
    ] = False,
    engine: Annotated[str, typer.Option(help=f"Engine: {', '.join(ENGINES)}.")] = "auto",
    precision: Annotated[str, typer.Option(help=f"Precision: {', '.join(PRECISIONS)}.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine.")] = None,
    observations: Annotated[
        bool, typer.Option("--observations", help="Repeat the paper's four latency comparisons instead.")
    ] = False,
    table: Annotated[
        Path | None, typer.Option(help="Predict from a latency table instead, perhaps of another device.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for an HTML page and JSON.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> None:
    """Show where the time of a network goes: by block and by kind of operator; or test the paper's observations."""
    if observations == bool(model or checkpoint):
        expected = "a network, or --observations"
        raise UsageError("Nothing to profile" if not observations else "Too much to do at once", expected=expected)
    if observations and random_weights:
        raise UsageError("The observations have networks of their own", hint="Leave --random-weights out")
    if table is not None:
        if observations or random_weights or output or threads or {engine, precision} != {"auto"}:
            raise UsageError("A table says what its own engine takes", hint="Leave other options than --json out")
        _predict(_spec_of(model, checkpoint, offline), table, as_json=as_json)
        return
    if output is not None:
        from efficientformer.reporting.page import require_libraries

        prepare_folder(output)
        require_libraries()
    from efficientformer.cli.progress import step_bars

    if observations:
        from efficientformer.latency.observations import observe

        with step_bars(quiet) as progress:
            found = observe(engine=engine, precision=precision, threads=threads, progress=progress)
        typer.echo(json.dumps(found.to_dict(), indent=2)) if as_json else _print_observations(found)
    else:
        from efficientformer.export.deployable import deployable
        from efficientformer.latency.measure import write_untrained
        from efficientformer.latency.profile import profile_file
        from efficientformer.weights.progress import terminal_progress

        spec = _untrained(model, checkpoint, random_weights)
        with TemporaryDirectory(prefix="efficientformer-") as scratch:
            if spec is not None:
                file = write_untrained(spec, Path(scratch) / "network.onnx", precision, name=Path(model).name)
            else:
                with terminal_progress(quiet=quiet) as downloading:
                    file = deployable(
                        model,
                        checkpoint=checkpoint,
                        offline=offline or None,
                        precision=precision,
                        progress=downloading,
                    )
            with step_bars(quiet) as progress:
                result = profile_file(file, engine=engine, precision=precision, threads=threads, progress=progress)
        typer.echo(json.dumps(result.to_dict(), indent=2)) if as_json else _print_profile(result)
    if output is None:
        return
    from efficientformer.latency.report import write_observations, write_profile

    written = write_observations(found, output) if observations else write_profile(result, output)
    for path in () if quiet else written:
        typer.echo(f"Wrote {path}", err=True)


def _untrained(model: str, checkpoint: str | None, random_weights: bool) -> ArchSpec | None:
    """Return the architecture to profile with random weights; None if the network has weights of its own."""
    from efficientformer.spec.arch import read_spec
    from efficientformer.spec.zoo import resolve

    if checkpoint is not None and (random_weights or model.endswith(".json")):
        raise UsageError("A checkpoint and random weights", hint="Leave one out")
    if model.endswith(".json"):
        return read_spec(Path(model))
    return resolve(model).card.spec if random_weights else None


def _spec_of(model: str, checkpoint: str | None, offline: bool) -> ArchSpec:
    """Return the architecture of a zoo network, of a spec, or of a file; weights are not fetched for it."""
    from efficientformer.export.deployable import deployable, file_of
    from efficientformer.runtime.engines import open_engine

    if checkpoint is None and (model.endswith(".json") or file_of(model, offline=offline or None) is None):
        spec = _untrained(model, None, random_weights=True)
    else:
        file = deployable(model, checkpoint=checkpoint, offline=offline or None)
        spec = open_engine(file, "onnxruntime").manifest.spec
    assert spec is not None
    return spec


def _predict(spec: ArchSpec, path: Path, *, as_json: bool) -> None:
    """Print what a table predicts for a network, and of what."""
    from efficientformer.latency.table import LatencyTable

    table = LatencyTable.load(path)
    predicted, shares = table.predict(spec), table.shares(spec)
    if as_json:
        found = {"ms": predicted.ms, "error_ms": predicted.error_ms, "engine": table.engine,
                 "precision": table.precision, "threads": table.threads, "origin": table.origin,
                 "shares": [dataclasses.asdict(share) for share in shares]}  # fmt: skip
        typer.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(
        f"  latency {predicted.ms:.3f} ms, predicted within {predicted.error_ms:.3f}; {table.engine} in "
        f"{table.precision}, {table.origin}",
        soft_wrap=True,
        markup=False,
    )
    rows = [(each.part, f"{each.count} x" if each.count > 1 else "", each.ms) for each in shares]
    _print_shares(console, "part", rows, predicted.ms)


def _print_profile(result: Profile) -> None:
    from rich.console import Console
    from rich.markup import escape

    from efficientformer.data.listing import counted

    console = Console(highlight=False)
    timing = result.latency
    console.print(f"[bold]{escape(result.model)}[/bold]  {escape(result.engine)}", soft_wrap=True)
    console.print(
        f"  latency {timing.ms:.3f} ms (while measured {timing.p10_ms:.3f} to {timing.p90_ms:.3f}); "
        f"operators {result.operators_ms:.3f} ms by the engine's own counters",
        soft_wrap=True,
    )
    if result.unseen:
        console.print(f"  {result.unseen_note}", soft_wrap=True)
    total = result.operators_ms
    _print_shares(console, "part", [(part.name, part.kind, part.ms) for part in result.parts()], total)
    _print_shares(
        console, "kind", [(kind, counted(count, "operator"), ms) for kind, ms, count in result.kinds()], total
    )


def _print_shares(console: Console, title: str, rows: list[tuple[str, str, float]], total: float) -> None:
    """Print what each part, with a note, takes in milliseconds and of the total."""
    from efficientformer.cli.tables import print_table

    shares = [(name, note, f"{ms:.4f}", f"{ms / (total or 1.0):.1%}") for name, note, ms in rows]
    console.print()
    print_table(console, (title, "", "ms", "share"), shares, left=2)


def _print_observations(found: Observations) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[bold]The paper's observations[/bold]  {found.engine}", soft_wrap=True)
    console.print(f"  {found.note}", soft_wrap=True)
    for each in found.observations:
        console.print(f"\n[bold]{each.title}[/bold]: {each.reason}", soft_wrap=True)
        console.print(f"  paper  {each.claim}", soft_wrap=True, markup=False)
        console.print(f"  here   {each.verdict}", soft_wrap=True, markup=False)
