"""The parts of a bulk prediction: which pictures each holds, and which of them lie in the output already.

``_BEGUN.json`` lies there before the first part and says what was asked and how many parts there are. A part has its
name only once it is whole, so a run that was killed goes on with those that are missing. A folder without any is free
for another question.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

from efficientformer.cluster.storage import UNFINISHED, Place
from efficientformer.runtime.question import Question, check_same, parse
from efficientformer.spec.errors import UsageError
from efficientformer.spec.fields import check_int

BEGUN_FILE = "_BEGUN.json"
DONE_FILE = "_SUCCESS.json"
PREFIX = "part-"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Part:
    """Pictures that a worker is given at a time.

    Attributes:
        name: The file of their rows.
        paths: The pictures.
    """

    name: str
    paths: Sequence[str]


class Parts:
    """The parts of a run, which may have begun before.

    Args:
        target: The output folder.
        format_: The ending of part files.
        question: What the rows depend on beside the pictures. A folder of another question is refused.
        paths: All pictures, in their order.

    Attributes:
        number: How many there are; 0 if the run has not begun.

    Raises:
        UsageError: If the folder belongs to another command, holds something else, or cannot be listed.
    """

    def __init__(self, target: Place, format_: str, question: Question, paths: Sequence[str]) -> None:
        self._target, self._format, self._paths = target, format_, paths
        digest = hashlib.sha256("\0".join(paths).encode()).hexdigest()
        self._question = {"efficientformer": VERSION, **question, "format": format_, "pictures": digest}
        self._names = target.names()
        self.number = self._begun()

    def begin(self, number: int) -> None:
        """Make the folder and note what is asked.

        Args:
            number: Parts to make of the pictures. A run that goes on keeps to it, whatever its workers.

        Raises:
            UsageError: If the folder cannot be written.
        """
        self.number = number
        try:
            self._target.filesystem.create_dir(self._target.path, recursive=True)
            self._target.write(BEGUN_FILE, json.dumps({**self._question, "parts": number}, indent=2).encode())
        except OSError as error:
            raise UsageError(f"Cannot write to {self._target.name!r}", found=str(error)) from error

    def missing(self) -> list[Part]:
        """Return the parts that were not there."""
        starts = [place * len(self._paths) // self.number for place in range(self.number + 1)]
        parts = (
            Part(f"{PREFIX}{start:09d}.{self._format}", self._paths[start:end])
            for start, end in itertools.pairwise(starts)
        )
        return [part for part in parts if part.name not in self._names]

    def tidy(self) -> None:
        """Remove what does not hold while parts are missing: files that were being written, the note of the end."""
        for name in self._names:
            if name.endswith(UNFINISHED) or name == DONE_FILE:
                try:
                    self._target.filesystem.delete_file(f"{self._target.path}/{name}")
                except FileNotFoundError:  # a worker of the run that was killed has just ended it
                    continue
                except OSError as error:
                    raise UsageError(f"Cannot write to {self._target.name!r}", found=str(error)) from error

    def _begun(self) -> int:
        """Return how many parts the run was begun with, after checking that it was this one; 0 if there was none."""
        held = [name for name in self._names if not name.endswith(UNFINISHED)]
        if BEGUN_FILE in held:
            there = parse(self._target.load(BEGUN_FILE)) or {}
            number = there.pop("parts", None)
            if there != self._question and len(held) == 1:  # no row is there that would be mixed with others
                return 0
            name = f"{self._target.name}/{BEGUN_FILE}"
            check_same(name, there, self._question, self._target.name)
            check_int(f"number of parts in {name}", number, 1, len(self._paths))
            return int(number)
        if held:
            found, hint = f"{len(held)} entries", "Name a new folder, or remove what is there"
            raise UsageError(f"{self._target.name!r} is not empty", expected="a new folder", found=found, hint=hint)
        return 0
