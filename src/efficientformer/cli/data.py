"""``efficientformer data``: look at a data set before it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from efficientformer.cli.progress import count_bar
from efficientformer.cli.targets import check_file

if TYPE_CHECKING:
    from rich.console import Console

    from efficientformer.data.check import DataReport, Group

SHOWN = 10  # findings of a kind; the report and --json have more

data_app = typer.Typer(no_args_is_help=True, help="Look at a data set before it is used.")


@data_app.command("check")
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Data: class folders, tar, MNIST, CIFAR, CSV.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with every finding.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page with plots and pictures.")] = None,
    no_near: Annotated[bool, typer.Option("--no-near", help="Look for exact copies only.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; print only what is wrong.")] = False,
) -> None:
    """Find damaged pictures, copies, leaks and contradictions. Exits 0 if nothing is wrong, 1 if something is."""
    from efficientformer.data.check import check as check_data

    if report is not None:
        from efficientformer.reporting.page import require_libraries

        check_file(report)
        require_libraries()
    with count_bar("reading pictures", quiet) as progress:
        result = check_data(folder, near=not no_near, progress=progress)
    try:
        if report is not None:
            from efficientformer.data.check_page import write_page

            write_page(result, report)
    finally:  # a page that cannot be written does not cost the findings too
        if as_json:
            typer.echo(json.dumps(result.to_dict(), indent=2))
        else:
            _print(result, quiet)
    if report is not None and not (quiet or as_json):
        typer.echo(f"Report: {report}", err=True)
    raise typer.Exit(0 if result.ok else 1)


def _print(result: DataReport, quiet: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, emoji=False)
    if not quiet:
        _print_facts(console, result)
    _print_list(console, "unreadable", [f"{each.picture}: {each.reason}" for each in result.corrupt])
    _print_list(console, "classes without training pictures", list(result.unknown_classes))
    _print_list(console, "for a training", list(result.obstacles))
    wrong = [group for group in result.groups if group.verdict]
    _print_list(console, "copies that leak or contradict", [_line(group) for group in wrong])
    if not quiet:
        other = [group for group in result.groups if not group.verdict]
        _print_list(console, "other copies", [_line(group) for group in other], limit=3)
        _print_list(console, "odd sizes", [f"{each.picture}: {each.reason}" for each in result.odd], limit=3)
        _print_list(console, "notes", list(result.notes))
        console.print(
            "\n[green]Nothing is wrong.[/green]" if result.ok else "\n[red]Something is wrong: see above.[/red]"
        )


def _line(group: Group) -> str:
    pictures = " = ".join(f"{each} ({each.label})" for each in group.pictures[:3])
    more = f" and {len(group.pictures) - 3} more" if len(group.pictures) > 3 else ""
    return f"{group.verdict or 'copy'} [{group.kind}] {pictures}{more}"


def _print_facts(console: Console, result: DataReport) -> None:
    from efficientformer.cli.tables import print_table

    (low_w, low_h), (high_w, high_h) = result.sizes
    console.print(f"{result.path}: {result.pictures:,} pictures", markup=False)
    console.print(
        f"sizes {low_w} x {low_h} to {high_w} x {high_h}; " + ", ".join(f"{n:,} {f}" for f, n in result.forms)
    )
    splits = []
    for each in result.balances:
        counts = [count for _, count in each.classes]
        row = (each.pictures, len(counts), max(counts), min(counts))
        splits.append((each.split, *(f"{value:,}" for value in row), f"{each.ratio:.1f}", str(len(each.small))))
    console.print()
    print_table(console, ("split", "pictures", "classes", "largest", "smallest", "ratio", "below 10"), splits, left=1)
    console.print()
    copies = []
    for kind, title in (("bytes", "same file"), ("pixels", "same pixels"), ("near", "look alike")):
        groups = [group for group in result.groups if group.kind == kind]
        leaks, clashes = sum(group.leak for group in groups), sum(group.contradiction for group in groups)
        copies.append((title, *(f"{value:,}" for value in (len(groups), leaks, clashes))))
    print_table(console, ("copies", "groups", "leaks", "contradictions"), copies, left=1)


def _print_list(console: Console, title: str, lines: list[str], limit: int = SHOWN) -> None:
    """Print the first of many findings; names are not trusted to be fit for a terminal."""
    if not lines:
        return
    console.print(f"\n[bold]{title}[/bold]: {len(lines):,}")
    for line in lines[:limit]:
        console.print(f"  {line if line.isprintable() else ascii(line)}", markup=False)
    if len(lines) > limit:
        console.print(f"  ... and {len(lines) - limit:,} more; --json names all of them")
