"""Who watches a download."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

Progress = Callable[[str, int, int | None], None]
"""Who watches a download: called with what is done, the bytes that are here, and all bytes (None: unknown)."""


@contextmanager
def terminal_progress(*, quiet: bool = False) -> Iterator[Progress | None]:
    """Give a bar with bytes, speed and time left on standard error; None if quiet, or if that is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    with ExitStack() as stack:
        bar: Any = None
        tasks = {}

        def report(label: str, done: int, total: int | None) -> None:
            nonlocal bar
            bar = bar or stack.enter_context(_new_bar())  # importing rich takes a while, and most runs fetch nothing
            if label not in tasks:  # begun where a resumed transfer begins, else the speed would count old bytes
                tasks[label] = bar.add_task(label, total=total, completed=done)
            bar.update(tasks[label], completed=done, total=total)

        yield report


def silent(label: str, done: int, total: int | None) -> None:
    """Print nothing, as a library should."""


def _new_bar() -> Any:  # noqa: ANN401 (rich is imported only where a bar is shown)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
