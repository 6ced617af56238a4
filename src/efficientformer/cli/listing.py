"""``efficientformer list``: the zoo as a table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from efficientformer.spec.zoo import ModelCard


def list_(
    pattern: Annotated[
        str, typer.Argument(help="Names and aliases: a part of them, or a shell pattern such as '*v2*'.")
    ] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """List the networks of the zoo: names, sizes, published accuracy; with --json sources and aliases, too."""
    from efficientformer.spec.errors import UnknownModelError
    from efficientformer.spec.zoo import cards, list_models

    names = list_models(pattern) or list_models(f"*{pattern}*")
    if not names:
        known = ", ".join(card.name for card in cards())
        raise UnknownModelError(f"No network matches {pattern!r}", hint=f"The zoo holds {known}")
    rows = [_row(card) for card in cards() if card.name in names]
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
        return
    _print_table(rows)


def _row(card: ModelCard) -> dict[str, Any]:
    from efficientformer.spec.count import count
    from efficientformer.weights.embedded import embedded_manifest

    total, best = count(card.spec), card.best_source
    own = {} if best else embedded_manifest().metrics
    return {
        "name": card.name,
        "short": card.short,
        "aliases": list(card.aliases),
        "params": total.params,
        "macs": total.macs,
        "published_params_m": card.published_params,
        "published_macs_g": card.published_macs,
        "note": card.note,
        "top1": best.top1 if best else own.get("top1"),
        "top5": best.top5 if best else own.get("top5"),
        "data_set": card.data_set,
        "sources": [source.name for source in card.sources] or ["embedded"],
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("name", "short", "params", "(publ.)", "MACs", "(publ.)", "top-1", "top-5"):
        table.add_column(heading, justify="left" if heading in ("name", "short") else "right", no_wrap=True)
    notes: dict[str, list[str]] = {}
    for row in rows:
        mark = ""
        if row["note"]:
            notes.setdefault(row["note"], []).append(row["name"])
            mark = f" [{list(notes).index(row['note']) + 1}]"
        table.add_row(
            row["name"],
            row["short"],
            f"{row['params'] / 1e6:.2f} M",
            _published(row["published_params_m"]),
            f"{row['macs'] / 1e9:.3f} G",
            _published(row["published_macs_g"], mark),
            _published(row["top1"]),
            _published(row["top5"]),
        )
    # a figure cut short is worse than a line that wraps
    needed = Console(width=500).measure(table).maximum
    console = Console(width=max(Console().width, needed), soft_wrap=True)
    console.print(table)
    console.print()
    for number, note in enumerate(notes, 1):
        console.print(f"[{number}] {note}.", highlight=False, markup=False)
    console.print(
        "Parameters and MACs are counted from the architecture (both heads); (publ.) is what was published.\n"
        "Top-1 and top-5, in percent, are published for the weights tried first; for those in the package they are\n"
        "measured, on CIFAR-10. All names: efficientformer info NAME",
        highlight=False,
    )


def _published(value: float | None, mark: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{mark}".replace("[", r"\[")
