"""The one timing harness: every latency in reports, tables and PERF.md is measured here.

Subjects are compared in turns, so that what disturbs the machine disturbs all of them alike. Before each turn there is
a pause and an untimed run: inference engines keep their threads spinning for a few milliseconds after a run, and a
subject timed beside them would pay for its neighbour. Medians and percentiles are reported, never means.
"""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from efficientformer.runtime.processor import available_cores, hardware
from efficientformer.spec.errors import UsageError

SETTLE_S = 0.004
BURST = 5


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one subject took, in milliseconds.

    Attributes:
        median_ms: Median of the runs.
        p10_ms: 10th percentile.
        p90_ms: 90th percentile.
        min_ms: The fastest run.
        runs: How many runs were timed.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    min_ms: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarise the durations of single runs, in seconds."""
        ms = 1000 * np.asarray(seconds)
        p10, median, p90 = (float(value) for value in np.percentile(ms, (10, 50, 90)))
        return cls(median, p10, p90, float(ms.min()), len(seconds))

    def to_dict(self) -> dict[str, float]:
        """Return plain numbers, rounded to a tenth of a microsecond."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def time_together(
    subjects: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 50,
    warmup: int = 5,
    burst: int = BURST,
    settle_s: float = SETTLE_S,
    sync: Callable[[], object] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Time several subjects in turns.

    Args:
        subjects: What to run, by name. A subject must do all its work before it returns, or ``sync`` must wait for it.
        rounds: Timed runs of each subject.
        warmup: Untimed runs of each before anything is timed.
        burst: Timed runs of one subject in a row before it is the next one's turn.
        settle_s: Pause in seconds before each turn, in which other subjects' threads go to sleep.
        sync: Waits for the device, such as ``torch.cuda.synchronize``; called before each clock reading.
        progress: Told how many of the rounds are done, and how many there are.

    Returns:
        The timing of each subject, by name.

    Raises:
        UsageError: If there is nothing to time.
    """
    wait = sync or (lambda: None)
    for run in subjects.values():
        for _ in range(warmup):
            run()
        wait()
    turns = {name: partial(time_turn, run, settle_s=settle_s, sync=wait) for name, run in subjects.items()}
    return take_turns(turns, rounds=rounds, burst=burst, progress=progress)


def take_turns(
    turns: Mapping[str, Callable[[int], list[float]]],
    *,
    rounds: int = 50,
    burst: int = BURST,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Give subjects that time themselves, such as processes of their own, their turns one after the other.

    Args:
        turns: By name: given a number of runs, does them as ``time_turn`` does and returns their durations in seconds.
        rounds: Timed runs of each subject.
        burst: Timed runs of one subject in a row before it is the next one's turn.
        progress: Told how many of the rounds are done, and how many there are.

    Returns:
        The timing of each subject, by name.

    Raises:
        UsageError: If there is nothing to time.
    """
    if not turns or rounds < 1 or burst < 1:
        found = f"{len(turns)} subjects, {rounds} rounds, bursts of {burst}"
        raise UsageError("Nothing to time", expected="at least one subject, round and run", found=found)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    done = 0
    while done < rounds:
        count = min(burst, rounds - done)
        for name, turn in turns.items():
            seconds[name] += turn(count)
        done += count
        if progress is not None:
            progress(done, rounds)
    return {name: Timing.of(values) for name, values in seconds.items()}


def time_turn(
    run: Callable[[], object],
    count: int,
    *,
    settle_s: float = SETTLE_S,
    sync: Callable[[], object] | None = None,
    wake: bool = True,
) -> list[float]:
    """Pause, run once untimed, then return the durations of ``count`` runs in seconds.

    Args:
        run: The subject.
        count: Timed runs.
        settle_s: The pause in seconds.
        sync: Waits for the device.
        wake: Whether to run once untimed, which wakes threads and caches; of no use for runs of many seconds.
    """
    wait = sync or (lambda: None)
    time.sleep(settle_s)
    if wake:
        run()
        wait()
    return [_timed(run, wait) for _ in range(count)]


def _timed(run: Callable[[], object], wait: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def environment(*packages: str) -> dict[str, Any]:
    """Return what a measurement depends on: hardware, cores, system, Python, versions of packages, date (UTC).

    Args:
        packages: Distributions whose versions matter; those not installed are left out.
    """
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "hardware": hardware(),
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }
