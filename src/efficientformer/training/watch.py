"""What a person sees of a run while it goes on: one progress line, a log file, TensorBoard."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from efficientformer.spec.errors import missing_extra
from efficientformer.spec.text import printable

LINE_EVERY_S = 30.0  # between lines where no terminal can redraw one
SHOWN = 20  # unreadable pictures that are named at once


class Watch:
    """Tells how a run goes, on standard error and in its folder; a quiet one only writes the log.

    Args:
        folder: The run folder; None in processes that say nothing.
        total: Steps of the whole run.
        first: Step the run starts or goes on from.
        images_per_step: Pictures of a step over all processes.
        quiet: Say nothing on the terminal.

    Raises:
        MissingExtraError: If tensorboard is not installed.
    """

    def __init__(self, folder: Path | None, total: int, first: int, images_per_step: int, *, quiet: bool) -> None:
        self._total, self._images_per_step, self._quiet = total, images_per_step, quiet or folder is None
        self._began, self._first, self._said = time.monotonic(), first, time.monotonic()
        self._done = 0  # pictures of this part of the run
        self._newest = ""  # figures, which come less often than steps
        self._log = self._events = self._bar = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise missing_extra("train", "Training", error) from error
            self._log = (folder / "train.log").open("a", encoding="utf-8", errors="backslashreplace")
            self._events = SummaryWriter(folder / "tensorboard", purge_step=first)
        if not self._quiet and sys.stderr.isatty():
            self._bar = new_bar()
            self._task = self._bar.add_task("training", total=self._total, completed=first)
            self._bar.start()

    @property
    def images_per_s(self) -> float:
        """Pictures a second since this part of the run began, evaluations included."""
        return self._done / max(1e-9, time.monotonic() - self._began)

    def step(self, step: int, epoch: int, epochs: int, figures: Mapping[str, float], best: float | None) -> None:
        """Take note of a step done, of its figures if it has any, and of the best validation top-1 so far."""
        self._done = (step - self._first) * self._images_per_step
        text = f"epoch {epoch + 1}/{epochs}  {self.images_per_s:,.0f} images/s"
        if figures:
            self._newest = f"  loss {figures['loss']:.3f}  top-1 {figures['train_top1']:.2f} %"
        text += self._newest
        text += f"  best val top-1 {best:.2f} %" if best is not None else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif not self._quiet and time.monotonic() - self._said > LINE_EVERY_S:
            self._said = time.monotonic()
            left = (self._total - step) / max(1, step - self._first) * (self._said - self._began)
            sys.stderr.write(f"{text}  step {step}/{self._total}  {duration(left)} left\n")

    def log(self, text: str) -> None:
        """Write one line to the log, and nowhere else."""
        with self._tolerating():
            if self._log is not None:
                self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
                self._log.flush()

    def note(self, text: str) -> None:
        """Say one line and log it."""
        self.log(text)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._quiet:
            sys.stderr.write(f"{text}\n")

    def left_out(self, part: str, skipped: Sequence[tuple[str, str]]) -> None:
        """Name the pictures that could not be read, the first twenty of them."""
        for name, reason in skipped[:SHOWN]:
            self.note(printable(f"left out of the {part} pictures: {name}: {reason}"))
        if len(skipped) > SHOWN:
            self.note(f"... and {len(skipped) - SHOWN:,} more; efficientformer data check names them all")

    def scalars(self, values: Mapping[str, float | int | None], step: int) -> None:
        """Add values to TensorBoard."""
        with self._tolerating():
            for name, value in values.items():
                if self._events is not None and value is not None and name not in ("step", "epoch"):
                    self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish the line and the files."""
        if self._bar is not None:
            self._bar.stop()
        for file in (self._events, self._log):
            with self._tolerating():
                if file is not None:
                    file.close()

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        """Go without log and events where they cannot be written: the run itself matters more, and says so itself."""
        try:
            yield
        except OSError as error:
            self._log = self._events = None
            sys.stderr.write(f"warning: the log cannot be written any more: {error}\n")


def new_bar() -> Any:  # noqa: ANN401 (rich is imported only where there is a terminal)
    """Return a bar for one long job: the share done, the time left, and what is done now as far as there is room."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    return Progress(
        TextColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True, min_width=4)),
        BarColumn(12, table_column=Column(min_width=12)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("left", table_column=Column(no_wrap=True, min_width=4)),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        console=Console(stderr=True),
        expand=True,
    )


def duration(seconds: float) -> str:
    """Return a time as hours:minutes:seconds."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
