"""The one tree of errors a user can meet.

Each message says what was expected, what was found and what to do next; the command line prints it without a
traceback and leaves with the class's ``exit_code`` (2 for wrong usage, 1 for a job that could not be done).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module
from typing import Self


class EfficientFormerError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        problem: What went wrong, in one sentence.
        expected: What would have been right.
        found: What was there instead.
        hint: What to do next.
    """

    exit_code = 1

    def __init__(self, problem: str, *, expected: str = "", found: str = "", hint: str = "") -> None:
        self.problem, self.expected, self.found, self.hint = problem, expected, found, hint
        parts = [problem.rstrip(".")]
        parts += [f"expected {expected.rstrip('.')}"] if expected else []
        parts += [f"found {found.rstrip('.')}"] if found else []
        text = "; ".join(parts) + "."
        end = "" if hint.endswith("?") else "."
        super().__init__(f"{text} {hint.rstrip('.')}{end}" if hint else text)

    def at(self, place: object) -> Self:
        """Return the error again, saying at which place, such as a file, it was met."""
        return type(self)(f"{place}: {self.problem}", expected=self.expected, found=self.found, hint=self.hint)


class UsageError(EfficientFormerError, ValueError):
    """The call or command itself is wrong: an unknown option value, an illegal combination."""

    exit_code = 2


class SpecError(UsageError):
    """An architecture, preprocessing or manifest value that describes nothing we can build."""


class InputSizeError(SpecError):
    """An input size the network cannot work on."""


class UnknownModelError(UsageError):
    """A model name that no zoo card carries."""


class MissingExtraError(EfficientFormerError, ImportError):
    """A job needs a library that only an extra installs; the message names the extra."""


class CheckpointError(EfficientFormerError):
    """A weights file that is damaged, hostile, of an unknown layout, or does not fit the network."""


class DownloadError(EfficientFormerError):
    """A file could not be fetched, or what came is not what was promised."""


class ImageError(EfficientFormerError):
    """A picture that cannot be decoded, or is too large to be decoded safely."""


class EngineError(EfficientFormerError):
    """An inference engine that is not installed or cannot run a file."""


class PrecisionError(EngineError):
    """A precision that an engine, this processor or a file does not compute in, which is no fault of any of them."""


class ExportError(EfficientFormerError):
    """An exported network that differs from the one it was made from."""


class DataError(EfficientFormerError):
    """A data set that is missing, empty, of no known layout, or does not fit the network."""

    exit_code = 2


class TrainingError(EfficientFormerError):
    """A training run that cannot go on: a loss that is no number, a full disk, a killed worker, another recipe."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return the entries of ``known`` that look most like ``name``, best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)


def missing_extra(extra: str, purpose: str, cause: ImportError) -> MissingExtraError:
    """Build the error for a library that ``efficientformer[extra]`` would have installed."""
    return MissingExtraError(
        f"{purpose} needs the extra '{extra}'",
        found=f"no module named {cause.name!r}" if cause.name else str(cause),
        hint=f"Install it with: pip install 'efficientformer[{extra}]'",
    )


def require(extra: str, purpose: str, *libraries: str) -> None:
    """Find out before any work whether libraries that ``efficientformer[extra]`` installs can be imported.

    Raises:
        MissingExtraError: If one cannot.
    """
    try:
        for library in libraries:
            import_module(library)
    except ImportError as error:
        raise missing_extra(extra, purpose, error) from error


def reason_of(error: BaseException) -> str:
    """Return what an error says; of the system's own, without its number and the file, which messages name anyway."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
