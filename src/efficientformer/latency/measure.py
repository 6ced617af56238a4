"""Networks without trained weights, timed on the engine a user will run; and latency tables made of such timings.

Networks are timed together in passes, every pass in another order, with many short turns rather than few long ones:
what disturbs a shared machine lasts longer than a turn, so that one turn tells little more if it is longer. Small
networks, which it disturbs most, have more turns. What the turns around one say of the machine's speed is taken out of
it (see ``latency.drift``), and passes are added until latencies are known well enough. A turn counts with its median,
which means the same of two runs of a large network and of a hundred of a small one.
"""

from __future__ import annotations

import dataclasses
import math
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from efficientformer.latency.design import TableSpace, all_parts, design
from efficientformer.latency.drift import without_drift
from efficientformer.latency.fit import fit_parts
from efficientformer.latency.graph import weights_in_graph, write_network
from efficientformer.latency.groups import COPIES, SHARE, divide, free_memory, scale_to_first
from efficientformer.latency.table import MAX_PARTS, Cost, LatencyTable
from efficientformer.runtime.engines import Engine, open_engine
from efficientformer.runtime.timing import environment, time_turn
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import SpecError, UsageError
from efficientformer.spec.fields import check_number
from efficientformer.spec.progress import Progress

NETWORKS = 160
TURN_RUNS, TURN_S = 2, 0.010  # a turn has so many runs and lasts so long at least
SHORT_MS, MOST_TURNS = 2.0, 3  # a network below it has as many turns in a pass as go into it, at most so many
MIN_PASSES, MAX_PASSES = 8, 48
LEAST_S = 2.0  # a measurement lasts so long at least: one of few networks, too, should meet quiet moments and others
MAX_SPREAD = 0.01


@dataclass(frozen=True, slots=True)
class Latency:
    """How long a network takes, in milliseconds.

    Attributes:
        ms: Median of its runs, where the machine is as fast as in the fastest quarter of the measurement.
        error_ms: Its standard error, relative to networks measured together with it.
        p10_ms: 10th percentile of its turns as they were, whatever the machine did beside them.
        p90_ms: 90th percentile.
        runs: How many runs were timed.
    """

    ms: float
    error_ms: float
    p10_ms: float
    p90_ms: float
    runs: int

    @classmethod
    def of(cls, turns: Sequence[Sequence[float]], ms: float, error_ms: float) -> Latency:
        """Return one figure for a network from the durations of the runs of its turns, in seconds."""
        p10, p90 = (float(value) for value in np.percentile([1000 * np.median(turn) for turn in turns], (10, 90)))
        return cls(ms, error_ms, p10, p90, sum(map(len, turns)))

    def scaled(self, factor: float, error: float) -> Latency:
        """Return it times a factor of a relative standard error; the percentiles stay as they were seen."""
        ms = self.ms * factor
        return dataclasses.replace(self, ms=ms, error_ms=math.hypot(self.error_ms * factor, ms * error))

    def to_dict(self) -> dict[str, float]:
        """Return plain numbers, rounded to a tenth of a microsecond."""
        return {name: round(value, 4) for name, value in dataclasses.asdict(self).items()}


def measure_specs(
    specs: Sequence[ArchSpec],
    *,
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    passes: int = MIN_PASSES,
    max_spread: float = MAX_SPREAD,
    progress: Progress | None = None,
) -> list[Latency]:
    """Time networks with random weights, one picture at a time, in turns.

    Args:
        specs: The networks.
        engine: As for ``open_engine``.
        precision: As for ``open_engine``; for ``int8`` the networks are quantised on random pictures.
        threads: As for ``open_engine``.
        passes: Passes over the networks at least, each of two runs or more; two are the least.
        max_spread: Passes are added, up to 48 or six times ``passes``, until the relative standard error of a latency
            is at most this for half of the networks.
        progress: Told how it goes.

    Returns:
        The latency of each network; ``ms`` is what a latency table predicts.

    Raises:
        UsageError: If there is nothing to measure.
        SpecError: If ``max_spread`` is no share.
        EngineError: If the engine cannot run a network.
        MissingExtraError: If a library is not installed.
    """
    return _time_specs(specs, engine, precision, threads, passes, max_spread, progress)[0]


def _time_specs(
    specs: Sequence[ArchSpec],
    engine: str,
    precision: str,
    threads: int | None,
    passes: int,
    max_spread: float,
    progress: Progress | None,
) -> tuple[list[Latency], Engine]:
    """Time networks in as many groups as memory asks for; return their latencies, and one of the engines."""
    groups = divide([4 * COPIES * weights_in_graph(spec) for spec in specs], SHARE * free_memory())
    found: list[list[Latency]] = []
    for number, group in enumerate(groups, 1):
        told = progress if len(groups) == 1 else _of_group(progress, f"group {number} of {len(groups)}")
        with opened([specs[each] for each in group], engine, precision, threads, told) as engines:
            found.append(time_engines(engines, min_passes=passes, max_spread=max_spread, progress=told))
            one = engines[0]
            engines.clear()  # before the next group is opened
    latencies: dict[int, Latency] = {}
    scales = scale_to_first([[latency.ms for latency in each] for each in found])
    for group, measured, (factor, error) in zip(groups, found, scales, strict=True):
        for each, latency in zip(group, measured, strict=True):
            latencies.setdefault(each, latency.scaled(factor, error))
    return [latencies[number] for number in range(len(specs))], one


def _of_group(progress: Progress | None, group: str) -> Progress | None:
    return progress and (lambda what, done, total: progress(f"{what} ({group})", done, total))


def build_table(
    space: TableSpace,
    *,
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    networks: int = NETWORKS,
    max_spread: float = MAX_SPREAD,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure a sample of a space and fit what each part costs.

    Args:
        space: The networks the table is for.
        engine: As for ``open_engine``.
        precision: As for ``measure_specs``.
        threads: As for ``open_engine``.
        networks: How many networks to measure.
        max_spread: As for ``measure_specs``.
        progress: Told how it goes.

    Raises:
        EfficientFormerError: As ``measure_specs``.
    """
    if (parts := len(all_parts(space))) > MAX_PARTS:
        expected, hint = f"at most {MAX_PARTS:,}", "Give fewer widths, expansions, input sizes or stem strides"
        raise SpecError("Too many parts for one latency table", expected=expected, found=f"{parts:,}", hint=hint)
    specs = design(space, networks)
    latencies, opened_one = _time_specs(specs, engine, precision, threads, MIN_PASSES, max_spread, progress)
    return table_of(space, specs, [latency.ms for latency in latencies], opened_one, threads=threads)


def table_of(
    space: TableSpace, specs: Sequence[ArchSpec], ms: Sequence[float], engine: Engine, *, threads: int | None
) -> LatencyTable:
    """Fit a table to measured networks.

    Args:
        space: The networks the table is for.
        specs: The networks that were measured.
        ms: Their latencies in milliseconds.
        engine: What ran them.
        threads: Its threads; None if it chose.
    """
    fit = fit_parts(specs, ms, all_parts(space))
    return LatencyTable(
        engine=engine.key,
        precision=engine.precision,
        threads=threads,
        family=space.family,
        attention=space.attention,
        base=Cost(*fit.base),
        costs={part.key: Cost(*cost) for part, cost in fit.parts.items()},
        weights={bend: Cost(*cost) for bend, cost in fit.weights.items()},
        spread=fit.spread,
        networks=len(specs),
        environment={**environment(engine.key), "engine": engine.name},
        input_sizes=space.input_sizes,
        smallest=fit.smallest,
    )


def write_untrained(spec: ArchSpec, path: Path, precision: str, *, name: str = "") -> Path:
    """Write a network with random weights, ``write_network``'s or for ``int8`` its quantised form; return its path.

    Raises:
        MissingExtraError: If it is to be quantised and onnx is not installed.
    """
    file = write_network(spec, path, name=name)
    if precision == "int8":
        from efficientformer.latency.int8 import quantise

        quantise(file)
    return file


@contextmanager
def opened(
    specs: Sequence[ArchSpec], engine: str, precision: str, threads: int | None, progress: Progress | None = None
) -> Iterator[list[Engine]]:
    """Write each network and open it with an engine, for as long as the context lasts."""
    if not specs:
        raise UsageError("No networks to measure", expected="at least one")
    with tempfile.TemporaryDirectory(prefix="efficientformer-", ignore_cleanup_errors=True) as folder:
        engines = []
        for index, spec in enumerate(specs):
            file = write_untrained(spec, Path(folder) / f"{index}.onnx", precision)
            engines.append(open_engine(file, engine, precision=precision, threads=threads))
            with suppress(OSError):  # hundreds of large ones would fill a small disk; some systems keep what is open
                file.unlink()
            if progress is not None:
                progress("opening networks", index + 1, len(specs))
        yield engines


def time_engines(
    engines: Sequence[Engine],
    *,
    min_passes: int = MIN_PASSES,
    max_spread: float = MAX_SPREAD,
    progress: Progress | None = None,
) -> list[Latency]:
    """Time opened networks in turns, pass by pass, until their latencies are known well enough.

    Args:
        engines: The opened networks.
        min_passes: Passes at least.
        max_spread: See ``measure_specs``.
        progress: Told how it goes.
    """
    check_number("spread of latencies", max_spread, 1e-6, 10)
    rng = np.random.default_rng(0)
    subjects = []
    for each in engines:
        spec = each.manifest.spec
        picture = rng.standard_normal((1, spec.in_chans, *spec.input_size), dtype=np.float32)
        subjects.append(_Subject.of(partial(each.run, picture)))
    numbers = [number for number, subject in enumerate(subjects) for _ in range(subject.turns)]
    shuffle = random.Random(0).shuffle
    order: list[int] = []  # the network of each turn
    turns: list[list[float]] = []  # how long its runs took, in seconds
    most = max(MAX_PASSES, 6 * min_passes)
    start = time.perf_counter()
    for done in range(1, most + 1):
        shuffle(numbers)
        order += numbers
        turns += [subjects[number].turn() for number in numbers]
        latencies, errors = without_drift(order, [1000 * float(np.median(turn)) for turn in turns])
        spread = float(np.median(errors / latencies))
        least = max(2, min_passes, math.ceil(done * LEAST_S / (time.perf_counter() - start)))
        missing = _passes_missing(done, spread / max_spread, min(least, most), most)
        if progress is not None:
            progress("timing", done, done + missing)
        if not missing:
            break
    if spread > max_spread and len(engines) > 1:  # a single network says nothing of how well latencies repeat
        found = f"latencies repeat within {spread:.2%}, {max_spread:.2%} wanted"
        warnings.warn(f"This machine is busy: {found}", stacklevel=2)
    return [
        Latency.of([turn for each, turn in zip(order, turns, strict=True) if each == number], *values)
        for number, values in enumerate(zip(latencies.tolist(), errors.tolist(), strict=True))
    ]


def _passes_missing(done: int, excess: float, least: int, most: int) -> int:
    """Return how many passes are missing after ``done`` that left the error ``excess`` times what is wanted."""
    wanted = done if excess <= 1 else most
    if 1 < excess < math.inf:
        wanted = min(most, max(done + 1, math.ceil(done * excess**2)))  # errors fall with the root of the passes
    return max(wanted, least, done) - done


@dataclass(frozen=True)
class _Subject:
    """A network to time: what runs it, the runs of a turn, and its turns in a pass."""

    run: Callable[[], object]
    runs: int
    turns: int

    @classmethod
    def of(cls, run: Callable[[], object]) -> _Subject:
        ms = 1000 * min(time_turn(run, 3))
        return cls(run, max(TURN_RUNS, math.ceil(1000 * TURN_S / ms)), min(MOST_TURNS, math.ceil(SHORT_MS / ms)))

    def turn(self) -> list[float]:
        return time_turn(self.run, self.runs)
