"""What a bulk run was asked, as the run notes it: killed, it goes on only where the same is asked again."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from efficientformer.spec.errors import UsageError

Question = dict[str, Any]
"""Plain values that decide the answer; ``efficientformer`` is the version of what notes them."""


def parse(line: bytes) -> Question | None:
    """Return a line's JSON object; None if it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(line)
        return found if isinstance(found, dict) else None
    return None


def check_same(place: str, there: Question | None, here: Question, remove: str) -> None:
    """Check that what a run noted is what is asked now.

    Args:
        place: Where it was noted.
        there: What was noted; None if nothing that can be read.
        here: What is asked.
        remove: What to remove to begin anew.

    Raises:
        UsageError: If they differ; it names in what.
    """
    if there != here:
        raise UsageError(
            f"{place} was begun by another command",
            expected="the same model, options and inputs",
            found=_difference(there, here),
            hint=f"Give the same command to go on; to begin anew, remove {remove}",
        )


def _difference(there: Question | None, here: Question) -> str:
    """Name what differs between two questions."""
    if there is None or "efficientformer" not in there:
        return "a file that is no journal"
    return ", ".join(name for name in {**there, **here} if there.get(name) != here.get(name)) + " differ"
