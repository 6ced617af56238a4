"""Who watches work that takes several steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is done now, how many of its steps are done, and how many there are."""
