"""Checks shared by the frozen value classes of this folder: every value from a file is hostile until it passed one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from types import MappingProxyType
from typing import Any

from efficientformer.spec.errors import SpecError, UsageError, nearest
from efficientformer.spec.habits import pointer

NO_WORDS: Mapping[str, str] = MappingProxyType({})


def check_int(name: str, value: object, low: int, high: int, hint: str = "") -> None:
    """Raise SpecError unless ``value`` is an int (not a bool) in ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SpecError(
            f"Illegal {name}", expected=f"a whole number from {low} to {high}", found=repr(value), hint=hint
        )


def check_count(name: str, value: object) -> None:
    """Raise UsageError unless ``value`` is a whole number (numpy's too, but not a bool) from 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise UsageError(f"Illegal {name}", expected="a whole number from 1", found=repr(value))


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raise SpecError unless ``value`` is a finite number in ``[low, high]``."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # the bounds first: a whole number beyond every fraction is none that isfinite can take
    if not number or not low <= value <= high or not math.isfinite(value):  # type: ignore[operator, arg-type]
        huge = isinstance(value, int) and value.bit_length() > 1024  # which Python may refuse to write out
        found = "a number of too many digits" if huge else repr(value)
        raise SpecError(f"Illegal {name}", expected=f"a number from {low} to {high}", found=found)


def check_choice(name: str, value: object, choices: Sequence[object], words: Mapping[str, str] = NO_WORDS) -> None:
    """Raise SpecError unless ``value`` is one of ``choices`` (and of the same type: True is not 1).

    Args:
        name: What is chosen, for the message.
        value: The choice.
        choices: The legal ones.
        words: What other libraries call them: a table of ``spec.habits``.
    """
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        legal = ", ".join(repr(choice) for choice in choices)
        close = nearest(str(value), [str(choice) for choice in choices], 1)
        hint = pointer(words, str(value)) or (f"Did you mean {close[0]}?" if close else "")
        raise SpecError(f"Illegal {name}", expected=f"one of {legal}", found=repr(value), hint=hint)


def check_bool(name: str, value: object) -> None:
    """Raise SpecError unless ``value`` is True or False."""
    check_choice(name, value, (True, False))


def check_keys(name: str, data: object, cls: type, words: Mapping[str, str] = NO_WORDS) -> dict[str, Any]:
    """Return ``data`` as a dict after checking that it is a mapping with just the fields of dataclass ``cls``.

    Args:
        name: What the mapping is, for messages.
        data: The mapping.
        cls: The dataclass.
        words: What other libraries call its fields: a table of ``spec.habits``.

    Raises:
        SpecError: If it is not.
    """
    if not isinstance(data, Mapping):
        raise SpecError(f"Illegal {name}", expected="a JSON object", found=type(data).__name__)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            close = nearest(str(key), fields)
            hint = f"Did you mean {close[0]!r}?" if close else f"The fields are {', '.join(fields)}"
            raise SpecError(f"Unknown field {key!r} in {name}", hint=pointer(words, str(key)) or hint)
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in data:
            raise SpecError(
                f"Field {key!r} is missing from {name}", found=f"only {', '.join(map(str, data)) or 'nothing'}"
            )
    return dict(data)


def as_list(name: str, value: object, max_len: int) -> list[Any]:
    """Return ``value`` as a list after checking that it is a sequence of at most ``max_len`` entries."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) > max_len:
        found = f"{len(value)} entries" if isinstance(value, Sequence) else type(value).__name__
        raise SpecError(f"Illegal {name}", expected=f"a list of at most {max_len} entries", found=found)
    return list(value)


def as_pair(name: str, value: object) -> tuple[int, int]:
    """Return ``(height, width)`` from one number (a square) or two."""
    value = as_plain(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    pair = [as_plain(side) for side in as_list(name, value, 2)]
    if len(pair) != 2:
        raise SpecError(f"Illegal {name}", expected="one number, or height and width", found=repr(value))
    return pair[0], pair[1]


def as_plain(value: Any) -> Any:  # noqa: ANN401
    """Return numpy's whole numbers, which come out of labels and shapes, as Python's; all else as it is."""
    if isinstance(value, bool):
        return value
    return int(value) if isinstance(value, Integral) else value
