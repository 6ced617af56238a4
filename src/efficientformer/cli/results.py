"""Results of ``predict`` as a table, as JSON lines, as CSV or as Parquet, on the terminal or in a file."""

from __future__ import annotations

import csv
import json
import os
import stat
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from efficientformer.runtime.records import Record, arrow_row, arrow_schema, record
from efficientformer.spec.errors import UsageError, reason_of, require
from efficientformer.spec.text import printable, storable

if TYPE_CHECKING:
    from efficientformer.cli.annotate import Copy
    from efficientformer.runtime.classifier import Prediction
    from efficientformer.runtime.inputs import Input

SUFFIXES = {
    ".json": "array", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "table",
}  # fmt: skip
ROWS = 8192  # rows of a Parquet file's row group
BLOCK = 256  # rows of a table that are laid out together
UNFOLDED = 1 << 20  # columns of what is no terminal: programs read names whole, and no name is longer


@dataclass(frozen=True)
class Result:
    """What became of one input.

    Attributes:
        path: Its name as the user knows it.
        prediction: The prediction, or None if it was skipped.
        error: Why it was skipped, or "".
        input: The input itself, to read it again.
        copy: Its annotated copy, which is written once the result is.
    """

    path: str
    prediction: Prediction | None
    error: str
    input: Input
    copy: Copy | None = None

    def record(self, top_k: int) -> Record:
        """Return the result as plain values, with ``top_k`` classes."""
        return record(self.path, self.prediction, self.error, top_k)


class Writer(ABC):
    """Takes records one by one; ``close`` finishes what is shown at the end.

    Args:
        path: The file to write; None for standard output.
        top_k: Classes per picture.
    """

    def __init__(self, path: Path | None, top_k: int) -> None:
        if path is None and sys.stdout is None:
            raise UsageError("Standard output is closed", hint="Name a file: --output labels.jsonl")
        self._file = sys.stdout if path is None else path.open("w", encoding="utf-8", newline="")
        self._top_k, self._on_terminal = top_k, path is None

    @abstractmethod
    def write(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Finish."""
        if not self._on_terminal:
            self._file.close()


def json_line(record: Record) -> str:
    """Return a record as one line of JSON.

    Names of files may hold bytes that are no text; ASCII escapes keep them, as Python alone reads them.
    """
    return json.dumps(record) + "\n"


class JsonWriter(Writer):
    """One record a line."""

    def write(self, record: Record) -> None:
        """Write one line."""
        self._file.write(json_line(arrow_row(record)))
        self._file.flush()


class ArrayWriter(Writer):
    """One array of all records, each on a line: a file's JSON must be one value for most who read it."""

    def __init__(self, path: Path | None, top_k: int) -> None:
        super().__init__(path, top_k)
        self._before = "[\n"

    def write(self, record: Record) -> None:
        """Write one line, and end the one before."""
        self._file.write(self._before + json.dumps(arrow_row(record)))
        self._before = ",\n"

    def close(self) -> None:
        """End the array."""
        self._file.write("[]\n" if self._before == "[\n" else "\n]\n")
        super().close()


class _Rows:
    """Ends rows of ``csv`` with a line feed; written as with both line breaks, either is quoted in their cells."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")


def csv_writer(file: TextIO) -> Any:  # noqa: ANN401 (csv's type has no public name)
    """Return a writer of CSV in which every name of a file can be told again."""
    return csv.writer(_Rows(file), lineterminator="\r\n")


class CsvWriter(Writer):
    """A header, then one row a picture: path, error, and index, probability and name of each of the top classes."""

    def __init__(self, path: Path | None, top_k: int) -> None:
        super().__init__(path, top_k)
        self._csv, self._text = csv_writer(self._file), printable if self._file.isatty() else storable
        rest = [f"{field}_{rank}" for rank in range(2, top_k + 1) for field in ("label", "score", "class")]
        self._columns = ["path", "error", "pred_label", "pred_score", "pred_class", *rest]
        self._csv.writerow(self._columns)

    def write(self, record: Record) -> None:
        """Write one row, as wide as the header: readers such as pyarrow's take no other."""
        top = record.get("top_k", [])
        values = [value for each in top for value in (each["label"], f"{each['score']:.6f}", self._text(each["class"]))]
        row = [self._text(record["path"]), self._text(record.get("error", "")), *values]
        self._csv.writerow(row + [""] * (len(self._columns) - len(row)))


class TableWriter(Writer):
    """A table with one row a picture, shown in blocks: columns are as wide as a block needs."""

    def __init__(self, path: Path | None, top_k: int) -> None:
        super().__init__(path, top_k)
        self._rows: list[tuple[str, ...]] = []
        self._begun = False

    def write(self, record: Record) -> None:
        """Keep one row, and print the rows kept when they are a block."""
        self._rows.append(_cells(record))
        if len(self._rows) == BLOCK:
            self._print()

    def close(self) -> None:
        """Print the rest."""
        if self._rows or not self._begun:
            self._print()
        super().close()

    def _print(self) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", pad_edge=False, show_header=not self._begun)
        table.add_column("picture", overflow="fold")
        table.add_column("class", style="green")
        table.add_column("score", justify="right")
        table.add_column("then", style="dim")
        for row in self._rows:
            table.add_row(*(Text(cell) for cell in row))  # Text: a name such as "[b].jpg" is no markup
        if self._file.isatty() and sys.stderr.isatty():
            self._file.write("\r\x1b[2K")  # a progress bar stands on this line, and is drawn anew on the next
        width = None if self._file.isatty() else UNFOLDED
        Console(file=self._file, highlight=False, width=width).print(table)
        self._begun = True
        self._rows.clear()


class ParquetWriter(Writer):
    """Columns of the records' fields; ``top_k`` is a list of structs, ``error`` is null for classified pictures.

    It is for files only, and needs the extra; ``choose_format`` looks after both.
    """

    def __init__(self, path: Path | None, top_k: int) -> None:
        import pyarrow as arrow
        from pyarrow import parquet

        self._schema = arrow_schema()
        self._table, self._rows = arrow.Table, list[Record]()
        self._parquet = parquet.ParquetWriter(path, self._schema)

    def write(self, record: Record) -> None:
        """Keep one row, and write the rows kept when they are many."""
        self._rows.append(arrow_row(record))
        if len(self._rows) >= ROWS:
            self._flush()

    def close(self) -> None:
        """Write the rest and the file's index."""
        self._flush()
        self._parquet.close()

    def _flush(self) -> None:
        self._parquet.write_table(self._table.from_pylist(self._rows, self._schema))
        self._rows.clear()


WRITERS: dict[str, type[Writer]] = {
    "table": TableWriter, "json": JsonWriter, "array": ArrayWriter, "csv": CsvWriter, "parquet": ParquetWriter,
}  # fmt: skip


def choose_format(wanted: str, output: Path | None) -> str:
    """Return the format asked for, or that of the output file's ending, or the table for the terminal.

    JSON in a file whose name ends in .json is an ``array``.

    Raises:
        UsageError: If Parquet is to go to the terminal, or the ending says nothing.
        MissingExtraError: If the library for Parquet is not installed.
    """
    named = SUFFIXES.get(output.suffix.lower(), "") if output else "table"
    chosen = named if (wanted, named) == ("json", "array") else wanted or named
    if not chosen:
        expected, hint = f"a name in {', '.join(SUFFIXES)}", "Or say which with --format"
        raise UsageError(f"The name {output} says no format", expected=expected, hint=hint)
    if chosen == "parquet":
        if output is None:
            raise UsageError("Parquet is not for a terminal", hint="Name a file: --output labels.parquet")
        require("parquet", "Writing Parquet", "pyarrow.parquet")
    return chosen


def output_file(name: str) -> Path:
    """Return the file that results go to, which need not exist yet; links are followed, and stay.

    Raises:
        UsageError: If what has this name is no regular file: a folder, a pipe, a device.
    """
    if name == "-":
        raise UsageError("No file has the name -", hint="Leave out --output: results go to standard output")
    try:
        regular = stat.S_ISREG(Path(name).stat().st_mode)
    except FileNotFoundError:
        regular = True  # it will be
    except OSError as error:
        raise UsageError(f"Cannot write {name}", found=reason_of(error), hint="Choose another name") from error
    if not regular:
        found, hint = "a folder, pipe or device", "Name a new file; without --output results go to standard output"
        raise UsageError(f"Cannot write {name}", expected="a regular file", found=found, hint=hint)
    return Path(os.path.realpath(name))


def _cells(record: Record) -> tuple[str, ...]:
    """Return a record's row of a table."""
    if "error" in record:
        return printable(record["path"]), "skipped", "", ""
    best, *others = record["top_k"]
    rest = ", ".join(f"{_short(other['class'])} {other['score']:.1%}" for other in others)
    return printable(record["path"]), _short(best["class"]), f"{best['score']:.1%}", rest


def _short(name: str) -> str:
    """Return the first of a class's synonyms."""
    return printable(name.partition(",")[0])
