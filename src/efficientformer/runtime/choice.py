"""Which engine and precision runs a file fastest on this machine, and still right: measured once, then remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from efficientformer.runtime.classifier import check_finite
from efficientformer.runtime.engines import (
    ENGINE_KEYS,
    ENGINE_PRECISIONS,
    Engine,
    can_import,
    damaged_engines,
    file_stamp,
    installed_engines,
    no_engine,
    open_engine,
)
from efficientformer.runtime.samples import sample_batch
from efficientformer.runtime.timing import Timing, environment, time_together
from efficientformer.spec.errors import EngineError, PrecisionError
from efficientformer.spec.whole import whole_file

# Largest difference of a logit that half precision may make, relative to the largest logit: bf16 keeps 8 bits and
# makes 0.004 to 0.02 in the networks of both papers; a network it breaks is off by far more.
TOLERANCE = 0.05
REFERENCE = "onnxruntime"  # always installed, and what an export is verified through
ROUNDS = 20

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs a file.

    Attributes:
        engine: The engine, as in ``ENGINE_KEYS``.
        precision: What it computes in, as in ``ENGINE_PRECISIONS``.
        reason: Why, in words, with what was measured.
    """

    engine: str
    precision: str
    reason: str


def choose(path: Path, precision: str = "auto", *, threads: int | None = None, store: Path | None = None) -> Choice:
    """Choose the engine and precision that run a file fastest here.

    Every engine that can be imported runs the package's photographs in each precision it has; those that fail, or
    whose logits are not ONNX Runtime's in single precision (within half precision's rounding), are out, and the
    fastest for one picture wins.

    Args:
        path: An exported file.
        precision: ``auto``, or the one precision to choose an engine for.
        threads: CPU threads of the engine; None lets it choose.
        store: Folder in which choices are remembered, by file, machine and versions; None remembers nothing. A folder
            that cannot be written is as good as none.

    Raises:
        EngineError: If no engine can run the file so, or the network gives no numbers.
    """
    note = None if store is None else store / f"{_key(path, precision, threads)}.json"
    if note is not None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            kept = Choice(**json.loads(note.read_text()))
            if kept.engine in ENGINE_KEYS and can_import(kept.engine) and kept.precision in ENGINE_PRECISIONS:
                return kept
    choice, failed = _measure(path, precision, threads)
    if note is not None and not failed:  # one that is mended, or has memory again, is to be measured
        with contextlib.suppress(OSError):
            _write(note, json.dumps(asdict(choice)))
    return choice


def _measure(path: Path, precision: str, threads: int | None) -> tuple[Choice, bool]:
    """Return the choice, and whether an engine that failed had no part in it."""
    candidates, refused = _candidates(path, precision, threads)
    if not candidates:
        raise _telling([error for _, error in refused]) if refused else no_engine()
    best, reason, failed = _fastest(candidates)
    failed = [*(engine for engine, error in refused if not isinstance(error, PrecisionError)), *failed]
    damaged = damaged_engines()
    reason += _left_out("because it fails", failed) + _left_out("because the import fails", damaged)
    return Choice(best.key, best.precision, reason), bool(failed or damaged)


def _telling(errors: list[EngineError]) -> EngineError:
    """Return the error to show: that a precision is not to be had says nothing of the file if there are others."""
    return next((error for error in errors if not isinstance(error, PrecisionError)), errors[-1])


def _fastest(candidates: list[Engine]) -> tuple[Engine, str, list[str]]:
    """Return the engine that is right and fastest for one picture, why in words, and the names of those that fail."""
    if len(candidates) == 1:
        return candidates[0], "the only engine installed that runs this file so", []
    batch = sample_batch(candidates[0].manifest.preprocess)
    ran = _that_run(candidates, batch)
    right = _that_agree(ran)
    timings = _times(right, batch[:1])
    measured = ", ".join(f"{engine.name} {timing.median_ms:.2f} ms" for engine, timing in timings.items())
    wrong = [engine.name for engine, _ in ran if engine not in right]
    failed = [engine.name for engine in candidates if engine not in timings and engine.name not in wrong]
    best = min(timings, key=lambda engine: timings[engine].median_ms)
    return best, f"fastest here for one picture: {measured}{_left_out('for other results', wrong)}", failed


def _times(engines: Sequence[Engine], picture: npt.NDArray[np.float32]) -> dict[Engine, Timing]:
    """Time engines with one picture; those that fail over it have no timing.

    Raises:
        EngineError: If all do: why the last one fails.
    """
    failed: list[Engine] = []

    def run(engine: Engine) -> None:
        try:
            engine.run(picture)
        except EngineError:
            failed.append(engine)
            raise

    while True:
        left = [engine for engine in engines if engine not in failed]
        try:
            timings = time_together({engine.name: partial(run, engine) for engine in left}, rounds=ROUNDS)
        except EngineError:
            if len(left) == 1:
                raise
        else:
            return {engine: timings[engine.name] for engine in left}


def _left_out(why: str, names: Sequence[str]) -> str:
    return f"; left out {why}: {', '.join(dict.fromkeys(names))}" if names else ""


def _candidates(path: Path, precision: str, threads: int | None) -> tuple[list[Engine], list[tuple[str, EngineError]]]:
    """Open a file in every engine and precision; single precision comes first, and of its engines the reference.

    Returns:
        The engines, and why others did not open it.
    """
    opened, refused = [], []
    for each in ENGINE_PRECISIONS if precision == "auto" else (precision,):
        for engine in sorted(installed_engines(), key=lambda name: name != REFERENCE):
            try:
                opened.append(open_engine(path, engine, precision=each, threads=threads))
            except EngineError as error:
                refused.append((engine, error))
    return opened, refused


def _that_run(candidates: list[Engine], batch: npt.NDArray[np.float32]) -> list[tuple[Engine, Logits]]:
    """Return the engines that run a batch and its first picture alone, with their logits of the batch.

    Raises:
        EngineError: If none does: why the first one fails.
    """
    ran, failures = [], []
    for engine in candidates:
        try:
            engine.run(batch[:1])
            ran.append((engine, engine.run(batch)))
        except EngineError as error:
            failures.append(error)
    if not ran:
        raise failures[0]
    return ran


def _that_agree(ran: list[tuple[Engine, Logits]]) -> list[Engine]:
    """Return the engines whose logits are those of the first that gives numbers, within half precision's rounding.

    Where single precision gives none, nothing does: OpenVINO's fp16 makes its largest number, 65504, out of NaN.
    """
    references = [each for each in ran if each[0].precision == "fp32"] or ran
    first, expected = next((each for each in references if np.isfinite(each[1]).all()), references[0])
    check_finite(expected, first.name)
    limit = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    # NaN and infinity are within no limit
    return [engine for engine, found in ran if float(np.abs(found - expected).max()) <= limit]


def _key(path: Path, precision: str, threads: int | None) -> str:
    """Return what a choice depends on, as a file name: the file, the machine, the versions, the question."""
    here = environment("onnxruntime", "openvino", "efficientformer")
    here.pop("date")
    question = [str(path.resolve()), file_stamp(path), precision, threads, here]
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:32]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text)
