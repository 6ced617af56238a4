"""Networks without trained weights, timed on the engine a user will run; and latency tables made of such timings.

A shared machine is quiet only now and then. So networks are timed together in passes; a pass in which all of them were
slow says nothing and is left out; each network's latency relative to the others is taken from each pass left, and
passes are added until these agree. Neighbours disturb single networks as well, and only ever make them slower: so a
turn lasts long enough to meet a quiet moment, and the lower quartile over the passes counts. What is reported as a
network's latency is the 10th percentile of its runs: of the figures one could report it repeats best from session to
session, and on a quiet machine the median is little higher.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from efficientformer.latency.design import TableSpace, all_parts, design
from efficientformer.latency.fit import fit_parts
from efficientformer.latency.graph import write_network
from efficientformer.latency.table import Cost, LatencyTable
from efficientformer.runtime.engines import open_engine
from efficientformer.runtime.timing import Timing, environment, take_turns, time_turn
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import UsageError

if TYPE_CHECKING:
    from efficientformer.runtime.engines import Engine

Progress = Callable[[str, int, int], None]  # told what is done, how much of it, and of how much

NETWORKS = 160
RUNS_PER_PASS = 10  # at least, in two turns
TURN_S = 0.025  # a turn lasts so long at least: small networks run more often
MIN_PASSES, MAX_PASSES = 4, 24
QUIET = 1.05  # a pass counts if the networks took no more than this times the quickest pass's time
MAX_SPREAD = 0.01
PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime",)}


def measure_specs(
    specs: Sequence[ArchSpec],
    *,
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    rounds: int = MIN_PASSES * RUNS_PER_PASS,
    max_spread: float = MAX_SPREAD,
    progress: Progress | None = None,
) -> list[Timing]:
    """Time networks with random weights, one picture at a time, in turns.

    Args:
        specs: The networks.
        engine: As for ``open_engine``.
        precision: As for ``open_engine``; for ``int8`` the networks are quantised on random pictures.
        threads: As for ``open_engine``.
        rounds: Runs of each network at least.
        max_spread: Passes are added, up to six times ``rounds``, until the relative standard error of a latency is
            below this for half of the networks.
        progress: Told how it goes.

    Returns:
        A timing for each network; ``p10_ms`` is what a latency table predicts.

    Raises:
        UsageError: If there is nothing to measure.
        EngineError: If the engine cannot run a network.
        MissingExtraError: If a library is not installed.
    """
    with opened(specs, engine, precision, threads, progress) as engines:
        passes = max(1, -(-rounds // RUNS_PER_PASS))
        return time_engines(engines, min_passes=passes, max_spread=max_spread, progress=progress)


def build_table(
    space: TableSpace,
    *,
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    networks: int = NETWORKS,
    max_spread: float = MAX_SPREAD,
    seed: int = 0,
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
        seed: Of the sample.
        progress: Told how it goes.

    Raises:
        As ``measure_specs`` does.
    """
    specs = design(space, networks, seed=seed)
    with opened(specs, engine, precision, threads, progress) as engines:
        timings = time_engines(engines, max_spread=max_spread, progress=progress)
        return table_of(space, specs, timings, engines[0], threads=threads)


def table_of(
    space: TableSpace, specs: Sequence[ArchSpec], timings: Sequence[Timing], engine: Engine, *, threads: int | None
) -> LatencyTable:
    """Fit a table to measured networks.

    Args:
        space: The networks the table is for.
        specs: The networks that were measured.
        timings: Their timings.
        engine: What ran them.
        threads: Its threads; None if it chose.
    """
    fit = fit_parts(specs, [timing.p10_ms for timing in timings], all_parts(space))
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
        environment={**environment(*PACKAGES[engine.key]), "engine": engine.name},
        input_sizes=space.input_sizes,
    )


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
            file = write_network(spec, Path(folder) / f"{index}.onnx")
            if precision == "int8":
                from efficientformer.latency.int8 import quantise

                quantise(file)
            engines.append(open_engine(file, engine, precision=precision, threads=threads))
            if progress is not None:
                progress("opening networks", index + 1, len(specs))
        yield engines


def time_engines(
    engines: Sequence[Engine],
    *,
    min_passes: int = MIN_PASSES,
    max_spread: float = MAX_SPREAD,
    progress: Progress | None = None,
) -> list[Timing]:
    """Time opened networks in turns, pass by pass, until enough quiet passes agree.

    Args:
        engines: The opened networks.
        min_passes: Quiet passes at least.
        max_spread: See ``measure_specs``.
        progress: Told how it goes.
    """
    rng = np.random.default_rng(0)
    subjects = {}
    for index, each in enumerate(engines):
        spec = each.manifest.spec
        picture = rng.standard_normal((1, spec.in_chans, *spec.input_size), dtype=np.float32)
        subjects[str(index)] = _turn(partial(each.run, picture))
    most = max(MAX_PASSES, 6 * min_passes)
    passes: list[list[Timing]] = []
    while len(passes) < most:
        timings = take_turns(subjects, rounds=RUNS_PER_PASS, burst=RUNS_PER_PASS // 2)
        passes.append([timings[name] for name in subjects])
        quiet = quiet_passes(passes)
        if progress is not None:
            progress("timing", min(len(quiet), min_passes), min_passes)
        if len(quiet) >= min_passes and median_error(quiet) <= max_spread:
            break
    else:
        found = f"{len(quiet)} of {len(passes)} passes quiet, {min_passes} wanted"
        if len(quiet) > 1 and len(engines) > 1:  # one pass, or one network, says nothing of how well latencies repeat
            found += f"; latencies repeat within {median_error(quiet):.2%}, {max_spread:.2%} wanted"
        warnings.warn(f"This machine is busy: {found}", stacklevel=2)
    return merge(quiet)


def _turn(run: Callable[[], object]) -> Callable[[int], list[float]]:
    """Return a network's turn: as many runs as it is asked for, or more if they are short."""
    least = math.ceil(TURN_S / min(time_turn(run, 3)))
    return lambda count: time_turn(run, max(count, least))


def quiet_passes(passes: Sequence[Sequence[Timing]]) -> list[Sequence[Timing]]:
    """Return the passes in which the machine was quiet: near the quickest in the geometric mean of all networks."""
    levels = [_level(each) for each in passes]
    return [each for each, level in zip(passes, levels, strict=True) if level <= QUIET * min(levels)]


def median_error(passes: Sequence[Sequence[Timing]]) -> float:
    """Return the relative standard error of a latency, relative to the other networks', of the median network."""
    ratios = _ratios(passes)
    if len(ratios) < 2:
        return float("inf")
    return float(np.median(ratios.std(0, ddof=1) / ratios.mean(0)) / np.sqrt(len(ratios)))


def merge(passes: Sequence[Sequence[Timing]]) -> list[Timing]:
    """Return one timing for each network from several passes: the lower quartile of its ratios, at the usual level."""
    level = float(np.median([_level(each) for each in passes]))
    p10 = np.quantile(_ratios(passes), 0.25, axis=0) * level
    columns = list(zip(*passes, strict=True))  # the passes of each network
    return [
        Timing(
            median_ms=float(np.median([timing.median_ms for timing in timings])),
            p10_ms=float(value),
            p90_ms=float(np.median([timing.p90_ms for timing in timings])),
            min_ms=min(timing.min_ms for timing in timings),
            runs=sum(timing.runs for timing in timings),
        )
        for timings, value in zip(columns, p10, strict=True)
    ]


def _level(timings: Sequence[Timing]) -> float:
    """Return the geometric mean of the networks' latencies in one pass."""
    return float(np.exp(np.mean(np.log([timing.p10_ms for timing in timings]))))


def _ratios(passes: Sequence[Sequence[Timing]]) -> npt.NDArray[np.float64]:
    """Return each network's latency over the level of its pass, (passes, networks)."""
    return np.array([[timing.p10_ms / _level(each) for timing in each] for each in passes])
