"""Results of ``predict`` as a table, as JSON lines or as CSV, on the terminal or in a file."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from efficientformer.spec.errors import UsageError

if TYPE_CHECKING:
    from efficientformer.runtime.classifier import Prediction
    from efficientformer.runtime.inputs import Input


@dataclass(frozen=True)
class Result:
    """What became of one input.

    Attributes:
        path: Its name as the user knows it.
        prediction: The prediction, or None if it was skipped.
        error: Why it was skipped, or "".
        input: The input itself, to read it again.
    """

    path: str
    prediction: Prediction | None
    error: str
    input: Input


class Writer(ABC):
    """Takes results one by one; ``close`` finishes what is shown at the end.

    Args:
        file: Where to write.
        top_k: Classes per picture.
    """

    def __init__(self, file: TextIO, top_k: int) -> None:
        self._file, self._top_k = file, top_k

    @abstractmethod
    def write(self, result: Result) -> None:
        """Take one result."""

    @abstractmethod
    def close(self) -> None:
        """Finish."""


@contextlib.contextmanager
def open_writer(format_: str, top_k: int, output: Path | None) -> Iterator[Writer]:
    """Open the writer of a format on standard output, or on a file that gets its name once it is complete.

    Args:
        format_: ``table``, ``json`` or ``csv``.
        top_k: Classes per picture.
        output: The file, or None.

    Raises:
        UsageError: If the file cannot be created.
    """
    kinds: dict[str, type[Writer]] = {"table": TableWriter, "json": JsonWriter, "csv": CsvWriter}
    kind = kinds[format_]
    if output is None:
        writer = kind(sys.stdout, top_k)
        yield writer
        writer.close()
        return
    try:
        if output.is_dir():
            raise IsADirectoryError(f"{output} is a folder")
        handle, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.", suffix=".part", text=True)
    except OSError as error:
        raise UsageError(
            f"Cannot write {output}", found=str(error), hint="Choose a file in a writable folder"
        ) from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            writer = kind(file, top_k)
            yield writer
            writer.close()
        temporary.chmod(0o644)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def prepare_folder(folder: Path) -> None:
    """Create a folder for pictures, before any work is done.

    Raises:
        UsageError: If that is impossible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"Cannot create the folder {folder}", found=str(error)) from error


class JsonWriter(Writer):
    """One JSON object a line: path, pred_label, pred_score, pred_class, top_k; or path and error."""

    def write(self, result: Result) -> None:
        """Write one line."""
        prediction = result.prediction
        line: dict[str, object] = {"path": result.path}
        if prediction is None:
            line["error"] = result.error
        else:
            best = prediction.top_k(self._top_k)
            top = [{"label": i, "score": round(score, 6), "class": name} for i, score, name in best]
            line |= {
                "pred_label": prediction.label,
                "pred_score": round(prediction.score, 6),
                "pred_class": prediction.name,
                "top_k": top,
            }
        # names of files may hold bytes that are no text; ASCII escapes keep them, and every line stays valid JSON
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Nothing is held back."""


class CsvWriter(Writer):
    """A header, then one row a picture: path, error, and index, probability and name of each of the top classes."""

    def __init__(self, file: TextIO, top_k: int) -> None:
        super().__init__(file, top_k)
        self._csv = csv.writer(file, lineterminator="\n")
        columns = [f"{field}_{rank}" for rank in range(2, top_k + 1) for field in ("label", "score", "class")]
        self._csv.writerow(["path", "error", "pred_label", "pred_score", "pred_class", *columns])

    def write(self, result: Result) -> None:
        """Write one row."""
        top = result.prediction.top_k(self._top_k) if result.prediction else []
        values = [value for i, score, name in top for value in (i, f"{score:.6f}", name)]
        self._csv.writerow([_printable(result.path), _printable(result.error), *values])

    def close(self) -> None:
        """Nothing is held back."""


class TableWriter(Writer):
    """A table with one row a picture, shown at the end."""

    def __init__(self, file: TextIO, top_k: int) -> None:
        super().__init__(file, top_k)
        self._rows: list[tuple[str, ...]] = []

    def write(self, result: Result) -> None:
        """Keep one row."""
        if result.prediction is None:
            self._rows.append((_printable(result.path), "skipped", "", ""))
            return
        (_, score, name), *others = result.prediction.top_k(self._top_k)
        rest = ", ".join(f"{_short(other)} {share:.1%}" for _, share, other in others)
        self._rows.append((_printable(result.path), _short(name), f"{score:.1%}", rest))

    def close(self) -> None:
        """Print the table."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("picture", overflow="fold")
        table.add_column("class", style="green")
        table.add_column("score", justify="right")
        table.add_column("then", style="dim")
        for row in self._rows:
            table.add_row(*(Text(cell) for cell in row))  # Text: a name such as "[b].jpg" is no markup
        Console(file=self._file, highlight=False).print(table)


def _short(name: str) -> str:
    """Return the first of a class's synonyms."""
    return name.partition(",")[0]


def _printable(text: str) -> str:
    """Return text with bytes of file names that are no UTF-8, and control characters, made visible."""
    visible = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in visible)
