"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from efficientformer.spec.text import printable

if TYPE_CHECKING:
    from rich.console import Console


def print_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> None:
    """Print a table whose first ``left`` columns stand left and all others right; cells are no markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)
