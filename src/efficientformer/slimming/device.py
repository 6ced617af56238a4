"""The device that slimming is for: its latency table, and its engine where that is on this machine."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientformer.latency.table import HERE, LatencyTable, likeness, table_command
from efficientformer.slimming.plan import TABLE, Plan
from efficientformer.slimming.space import Space, table_space
from efficientformer.slimming.watch import table_progress
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import SpecError, UsageError

# How much slower than its table a machine may be for its measured latencies to be scaled back. Small jobs beside a run
# made up to 17 % (docs/slim_cifar10.md); what is far beyond may as well be a table that is wrong, and taking that off
# would hide that a budget is missed.
MOST_BUSY = 1.25
ASKED = "asked for"  # in a measured table's environment: what the plan left to choose, and what it did not


@dataclass(frozen=True)
class Measured:
    """A measured latency.

    Attributes:
        ms: What was measured, in milliseconds.
        quiet_ms: What it would be at the speed the machine had when its table was made: if the start network, measured
            in the same turns, takes longer than predicted by more than twice the table's spread, the machine is busy,
            and both are scaled back by that. ``ms`` itself if they would be by more than ``MOST_BUSY``.
    """

    ms: float
    quiet_ms: float

    def __post_init__(self) -> None:
        if self.ms > MOST_BUSY * self.quiet_ms:
            object.__setattr__(self, "quiet_ms", self.ms)

    @property
    def scaled(self) -> bool:
        """Whether the machine was busy when it was measured."""
        return self.quiet_ms != self.ms

    def __str__(self) -> str:
        return f"{self.ms:.3f} ms" + (f", {self.quiet_ms:.3f} at the table's speed" if self.scaled else "")


def open_table(
    plan: Plan, space: Space, folder: Path, given: Path | None, *, quiet: bool, anew: bool = False
) -> LatencyTable:
    """Return the latency table of a run: the one given, the one in its folder, or a new one measured here.

    Args:
        plan: Names the engine, precision and threads.
        space: The networks it must predict.
        folder: The run folder; the table is kept there.
        given: A table from elsewhere.
        quiet: Show no progress.
        anew: Measure though there is a table in the folder, which is replaced then.

    Raises:
        UsageError: If the table is of another engine than the plan.
        SpecError: If it is none, or of an older version; or if none can cover the space.
        EngineError: If the engine is not on this machine.
    """
    kept = folder / TABLE
    if given is None and kept.exists() and not anew:
        return _kept_table(plan, kept)
    if given is not None:
        table = LatencyTable.load(given)
        _check_engine(plan, table, given)
    else:
        if not quiet:
            sys.stderr.write("Measuring the latency table: some minutes, more if anything else is at work here\n")
        table = measure_table(plan, space, quiet=quiet)
        table = dataclasses.replace(table, environment={**table.environment, ASKED: _asked(plan)})
    table.save(kept)
    return LatencyTable.load(kept)  # rounded as a resumed run reads it, whose search is to be the same


def keeps_table_for(plan: Plan, space: Space, path: Path) -> bool:
    """Whether there is a table that a run can begin with: of what it asks for, if a refused run measured it."""
    if not path.exists():
        return False
    try:
        table = LatencyTable.load(path)
    except SpecError:  # which is said where it is opened
        return True
    if ASKED not in table.environment:  # somebody put it there
        return True
    try:
        check_table(plan, space, table)
    except UsageError:
        return False
    return bool(table.environment[ASKED] == _asked(plan))


def _asked(plan: Plan) -> list[Any]:
    return [plan.engine, plan.precision, plan.threads]


def _kept_table(plan: Plan, path: Path) -> LatencyTable:
    """Read the table of a run's own folder; what rests on one that cannot be read is of no use with another."""
    try:
        table = LatencyTable.load(path)
    except SpecError as error:
        raise SpecError(f"{path}: {error.problem}", expected=error.expected, found=error.found,
                        hint="Start a new run in another folder") from error  # fmt: skip
    _check_engine(plan, table, path)
    return table


def check_table(plan: Plan, space: Space, table: LatencyTable) -> None:
    """Raise UsageError if a new run's table lacks a part of the space, or is of other threads than the plan."""
    if plan.threads not in (None, table.threads):
        raise UsageError(
            "The latency table is of another number of threads",
            expected=str(plan.threads),
            found=str(table.threads or "as many as the engine chooses"),
            hint="Leave --threads out to take the table's, or give another table",
        )
    missing = dict[str, None]()
    for spec in space.covering():  # a hole is found now, not hours into the search
        try:
            table.predict(spec)
        except UsageError as error:
            keys = table.missing(spec)
            if not keys or (table.family, table.attention) != (spec.family, spec.attention):  # of another kind
                raise UsageError(error.problem, expected=error.expected, found=error.found,
                                 hint=f"Measure one: {_command(table, space)}") from error  # fmt: skip
            missing |= dict.fromkeys(keys)
    if missing and table.input_sizes and space.start.input_size not in table.input_sizes:
        raise UsageError("The latency table is of another input size", expected=_sizes([space.start.input_size]),
                         found=_sizes(table.input_sizes), hint=f"Measure one: {_command(table, space)}")  # fmt: skip
    if missing:
        raise UsageError(
            f"The latency table lacks {len(missing)} parts of the networks that slimming may come to",
            expected="every block, stem, embedding and head at every width and expansion",
            found=f"no {next(iter(missing))!r}",
            hint=f"Measure it: {_command(table, space)}",
        )


def _sizes(sizes: Iterable[tuple[int, int]]) -> str:
    return ",".join(f"{height}x{width}" for height, width in sizes)


def _command(table: LatencyTable, space: Space) -> str:
    """Return the command that measures a table of the whole space on a table's engine."""
    wanted = table_space(space)
    return table_command(
        engine=table.engine,
        precision=table.precision,
        threads=table.threads,
        like=likeness(space.start),
        widths=",".join(map(str, wanted.widths)),
        depths=",".join(map(str, wanted.depths)),
        expansions=",".join(f"{ratio:g}" for ratio in wanted.expansions),
        input_size=_sizes(wanted.input_sizes),
        stem_stride=",".join(map(str, wanted.stem_strides)),
        classes=wanted.num_classes,
    )


def measure_table(plan: Plan, space: Space, *, quiet: bool) -> LatencyTable:
    """Measure a table for every network of a space on this machine's engine."""
    from efficientformer.latency.measure import build_table

    with table_progress(quiet=quiet) as progress:
        return build_table(
            table_space(space), engine=plan.engine, precision=plan.precision, threads=plan.threads, progress=progress
        )


def measured(table: LatencyTable, specs: Sequence[ArchSpec], start: ArchSpec) -> list[Measured] | None:
    """Measure networks on this machine's engine, together with the start network.

    Returns:
        A latency for each; None where the table is of another machine.
    """
    if table.origin != HERE:
        return None
    from efficientformer.latency.measure import measure_specs

    timings = measure_specs([*specs, start], engine=table.engine, precision=table.precision, threads=table.threads)
    *found, reference = [timing.ms for timing in timings]  # what the table predicts
    # a network the table knows as well as its start deviates by two standard errors at most; what is more, is load
    usual = table.predict(start).ms * (1 + 2 * table.spread)
    busy = max(1.0, reference / usual)
    return [Measured(round(ms, 5), round(ms / busy, 5)) for ms in found]


def _check_engine(plan: Plan, table: LatencyTable, path: Path) -> None:
    for name in ("engine", "precision"):
        wanted = getattr(plan, name)
        if wanted not in ("auto", getattr(table, name)):
            raise UsageError(
                f"{path} is of another {name}",
                expected=wanted,
                found=getattr(table, name),
                hint=f"Leave --{name} out to take the table's, or give another table",
            )
