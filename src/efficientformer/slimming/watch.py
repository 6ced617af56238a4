"""What a person sees of a search while it goes on: one progress line, and what was cut."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from efficientformer.slimming.search import Step
from efficientformer.spec.progress import Progress
from efficientformer.training.watch import new_bar


class SearchWatch:
    """Tells how a search goes, on standard error and in ``slim.log``.

    Args:
        folder: The run folder.
        start_ms: Predicted latency of the start network.
        target_ms: Where the search ends.
        quiet: Say nothing on the terminal.
    """

    def __init__(self, folder: Path, start_ms: float, target_ms: float, *, quiet: bool) -> None:
        self._folder, self._start, self._target, self._quiet = folder, start_ms, target_ms, quiet
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> SearchWatch:
        if not self._quiet and sys.stderr.isatty():
            self._bar = new_bar()
            self._task = self._bar.add_task("slimming", total=max(1e-9, self._start - self._target))
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: Step) -> None:
        """Take note of a new step."""
        text = f"{step.number:3d}  {step.predicted_ms:8.3f} ms  top-1 {step.top1:5.2f} %  {step.what}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._start - max(self._target, step.predicted_ms))
        self.note(text)

    def note(self, text: str) -> None:
        """Say one line and log it."""
        with (self._folder / "slim.log").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._quiet:
            sys.stderr.write(f"{text}\n")


@contextmanager
def table_progress(*, quiet: bool) -> Iterator[Progress | None]:
    """Show how far the measuring of a latency table is: told what is done, how much of it, and of how much."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    with new_bar() as bar:
        task = bar.add_task("latency table", total=1)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
