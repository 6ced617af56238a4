"""The journal of a bulk prediction: ``OUTPUT.part`` beside the output, so that a killed run goes on where it was.

Its first line says which question it answers; each further line is one record, whole or, if the process was killed
while writing it, cut off by the next run. When every input has its line the output is written from them at once, and
the journal removed. Inputs are told apart by their place in the fixed order of ``runtime.inputs.gather``.
"""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from efficientformer.cli.results import WRITERS, json_line, whole_file
from efficientformer.runtime.lock import try_lock
from efficientformer.runtime.records import Record
from efficientformer.spec.errors import UsageError

VERSION = 2
MAX_QUESTION = 1 << 26  # bytes of a first line; what is longer is no journal
_CLASSIFIED = {"pred_label", "pred_score", "pred_class", "top_k"}


class Journal:
    """Records of a run that may have begun before.

    Args:
        output: The output file; the journal lies beside it.
        question: What the records depend on: the model, options, inputs. A journal of another question is refused.

    Attributes:
        done: Records that were there already.
        failed: How many of them are errors.

    Raises:
        UsageError: If it belongs to another command, another process is writing it, or it cannot be written.
    """

    def __init__(self, output: Path, question: dict[str, Any]) -> None:
        self.path = _beside(output)
        self._output, self._question = output, {"efficientformer": VERSION, **question}
        self.done = self.failed = 0
        try:
            self._file: BinaryIO = self.path.open("r+b" if _is_there(self.path) else "w+b")
        except OSError as error:
            hint = "Choose a file in a writable folder"
            raise UsageError(f"Cannot write {output}", found=str(error), hint=hint) from error
        try:
            if try_lock(self._file) is False:
                raise UsageError(f"Another process is writing {self.path}", hint="Wait for it, or name another output")
            self._take_up()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file; the journal stays unless it was finished."""
        self._file.close()

    def check(self, place: int, name: str) -> None:
        """Check that the record at a place is of the input that has it now.

        Raises:
            UsageError: If it is of another: pictures came or went since.
        """
        if self._names[place] != name:
            raise UsageError(
                f"The inputs are not those that {self.path} was begun with",
                expected=repr(self._names[place]),
                found=repr(name),
                hint=f"To begin anew, remove {self.path}",
            )

    def write(self, record: Record) -> None:
        """Add a record; it is in the hands of the operating system when this returns."""
        self._file.write(json_line(record).encode())
        self._file.flush()

    def finish(self, format_: str, top_k: int) -> None:
        """Write the output from the records, whole, and remove the journal.

        Raises:
            UsageError: If the output cannot be written; the journal stays.
        """
        with whole_file(self._output) as temporary:
            writer = WRITERS[format_](temporary, top_k)
            with contextlib.closing(writer):
                for record in self._records():
                    writer.write(record)
        self.path.unlink()

    def _take_up(self) -> None:
        """Read what is there, cut off a torn last line, and stand at the end."""
        self._names: list[str] = []
        own, first = json_line(self._question).encode(), self._file.readline(MAX_QUESTION)
        if own.startswith(first) and first != own:  # new, or killed before its first line was whole
            self._file.write(own[len(first) :])
            self._file.flush()
            return
        if _parse(first) != self._question:
            raise UsageError(
                f"{self.path} was begun by another command",
                expected="the same model, options and inputs",
                found=_difference(_parse(first), self._question),
                hint=f"Give the same command to go on; to begin anew, remove {self.path}",
            )
        end = self._file.tell()
        for line in self._file:
            record = _parse(line) if line.endswith(b"\n") else None
            if record is None or not _is_whole(record):
                break
            self._names.append(str(record["path"]))
            self.failed += "error" in record
            end += len(line)
        self.done = len(self._names)
        self._file.seek(end)
        self._file.truncate()

    def _records(self) -> Iterator[Record]:
        self._file.seek(0)
        self._file.readline()
        for line in self._file:
            yield json.loads(line)


def begun(output: Path) -> Record:
    """Return the question of the journal beside an output; {} if there is none that can be read."""
    with contextlib.suppress(OSError, UsageError):
        if _is_there(_beside(output)):
            with _beside(output).open("rb") as file:
                return _parse(file.readline(MAX_QUESTION)) or {}
    return {}


def _beside(output: Path) -> Path:
    return output.with_name(f"{output.name}.part")


def _is_there(path: Path) -> bool:
    """Tell whether there is a file that may be a journal.

    Raises:
        UsageError: If there is something else; a link could lead to a device without end, or to a file to be spared.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(mode):
        hint = "Remove it, or name another output"
        raise UsageError(
            f"{path} is no journal", expected="a regular file", found="a link, folder or device", hint=hint
        )
    return True


def _is_whole(record: Record) -> bool:
    """Tell whether a record says what became of a picture."""
    return "path" in record and ("error" in record or record.keys() >= _CLASSIFIED)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return a line's object; None if it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(line)
        return found if isinstance(found, dict) else None
    return None


def _difference(there: dict[str, Any] | None, here: dict[str, Any]) -> str:
    """Name what differs between two questions."""
    if there is None or "efficientformer" not in there:
        return "a file that is no journal"
    return ", ".join(name for name in {**there, **here} if there.get(name) != here.get(name)) + " differ"
