"""The journal of a bulk prediction: ``OUTPUT.part`` beside the output, so that a killed run goes on where it was.

Its first line says which question it answers; each further line is one record, whole or, if the process was killed
while writing it, cut off by the next run, as is a last one whose annotated copy is not there. When every input has its
line the output is written from them at once, and the journal removed. Inputs are told apart by their place in the fixed
order of ``runtime.inputs.gather``.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from efficientformer.cli.results import WRITERS, json_line
from efficientformer.runtime.lock import try_lock
from efficientformer.runtime.question import Question, check_same, parse
from efficientformer.runtime.records import Record
from efficientformer.spec.errors import UsageError
from efficientformer.spec.whole import named_by, whole_file

VERSION = 3
MAX_QUESTION = 1 << 26  # bytes of a first line; what is longer is no journal
_COPY = "copy"  # field of a journal's record, and of no result: the file that its annotated copy was to become
_AS_IT_IS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
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

    def __init__(self, output: Path, question: Question) -> None:
        self.path = _beside(output)
        self._output, self._question = output, {"efficientformer": VERSION, **question}
        self.done = self.failed = 0
        while not self._open():
            pass  # the process that was writing it ended in between, and removed it
        try:
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

    def write(self, record: Record, copy: Path | None = None) -> None:
        """Add a record; it is in the hands of the operating system when this returns.

        Args:
            record: The record.
            copy: The file that its annotated copy is written to next.
        """
        self._file.write(json_line(record | ({_COPY: str(copy.absolute())} if copy else {})).encode())
        self._file.flush()

    def finish(self, format_: str, top_k: int) -> None:
        """Write the output from the records, whole, and remove the journal.

        Raises:
            UsageError: If the output cannot be written; the journal stays.
        """
        with contextlib.ExitStack() as stack:
            with named_by(self._output):
                temporary = stack.enter_context(whole_file(self._output))
            writer = stack.enter_context(contextlib.closing(WRITERS[format_](temporary, top_k)))
            for record in self._records():
                writer.write(record)
        if not self._locked:  # Windows removes no open file, and has no lock that would end with it
            self._file.close()
        self.path.unlink()

    def _open(self) -> bool:
        """Open and lock what has the journal's name, or a new file; return whether it still has it then.

        Nothing is changed before the lock: another process may have created and filled the file by now.
        """
        with named_by(self._output):
            _is_there(self.path)
            self._file: BinaryIO = os.fdopen(os.open(self.path, _AS_IT_IS, 0o666), "r+b")
        self._locked = try_lock(self._file)
        if self._locked is False:
            self._file.close()
            raise UsageError(f"Another process is writing {self.path}", hint="Wait for it, or name another output")
        if self._locked is None:  # nothing tells whose it is
            return True
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                return True
        self._file.close()
        return False

    def _take_up(self) -> None:
        """Read what is there, cut off a torn last line, and stand at the end."""
        self._names: list[str] = []
        own, first = json_line(self._question).encode(), self._file.readline(MAX_QUESTION)
        if own.startswith(first) and first != own:  # new, or killed before its first line was whole
            self._file.write(own[len(first) :])
            self._file.flush()
            return
        check_same(str(self.path), parse(first), self._question, str(self.path))
        end, last, copy = self._file.tell(), 0, ""
        for line in self._file:
            record = parse(line) if line.endswith(b"\n") else None
            if record is None or not _is_whole(record):
                break
            self._names.append(str(record["path"]))
            self.failed += "error" in record
            last, copy = len(line), str(record.get(_COPY, ""))
            end += last
        if copy and not os.path.lexists(copy):
            self._names.pop()
            end -= last
        self.done = len(self._names)
        self._file.seek(end)
        self._file.truncate()

    def _records(self) -> Iterator[Record]:
        self._file.seek(0)
        self._file.readline()
        for line in self._file:
            record: Record = json.loads(line)
            record.pop(_COPY, None)
            yield record


def begun(output: Path) -> Record:
    """Return the question of the journal beside an output; {} if there is none that can be read."""
    with contextlib.suppress(OSError, UsageError):
        if _is_there(_beside(output)):
            with _beside(output).open("rb") as file:
                return parse(file.readline(MAX_QUESTION)) or {}
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
