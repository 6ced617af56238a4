"""Networks, engines, precisions and batch sizes side by side on this machine, in turns of one run."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file
from pathlib import Path
from typing import Any

from efficientformer.benchmarking.networks import Network, open_networks
from efficientformer.benchmarking.subject import Subject
from efficientformer.runtime.engines import ENGINE_KEYS, ENGINE_PRECISIONS, ENGINES
from efficientformer.runtime.image import decode
from efficientformer.runtime.samples import photographs
from efficientformer.runtime.timing import Timing, environment, take_turns
from efficientformer.spec.errors import EfficientFormerError, EngineError, UsageError
from efficientformer.spec.fields import check_choice
from efficientformer.spec.habits import ENGINE_WORDS
from efficientformer.spec.progress import Progress
from efficientformer.weights.progress import Progress as DownloadProgress

TORCH, COMPILED = "torch", "torch-compile"
CHOICES = ("all", *ENGINES, TORCH, COMPILED)
PRECISIONS = ("all", "auto", *ENGINE_PRECISIONS)
ALL_PRECISIONS = ("fp32", "bf16", "int8")  # fp16 must be asked for: most processors only emulate it, very slowly
PACKAGES = ("efficientformer", "numpy", "onnxruntime", "openvino", "torch", "pillow")


@dataclass(frozen=True, slots=True)
class Row:
    """One network in one engine, precision and batch size.

    Attributes:
        model: The network.
        engine: The engine, as in ``CHOICES``.
        precision: What it computes in.
        batch: Images per run.
        name: The engine, its version and its precision, for people.
        is_random: Whether the weights are random.
        timing: How long a run took.
        relative: Time per image over that of the fastest row of the same batch size.
    """

    model: str
    engine: str
    precision: str
    batch: int
    name: str
    is_random: bool
    timing: Timing
    relative: float

    @property
    def images_per_s(self) -> float:
        """Images per second at the median."""
        return 1000 * self.batch / self.timing.median_ms

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "model": self.model,
            "engine": self.engine,
            "engine_name": self.name,
            "precision": self.precision,
            "batch": self.batch,
            "weights": "random" if self.is_random else "trained",
            **self.timing.to_dict(),
            "images_per_s": round(self.images_per_s, 2),
            "relative": round(self.relative, 3),
        }


@dataclass(frozen=True, slots=True)
class Unavailable:
    """A combination that could not be timed, and why."""

    model: str
    engine: str
    precision: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        """Return plain values."""
        return {"model": self.model, "engine": self.engine, "precision": self.precision, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class PictureSteps:
    """Where the time of one picture goes, from its file to its label.

    Attributes:
        model: The network.
        name: The engine that ran, its version and precision.
        picture: The file.
        size: Its width and height.
        steps: Timing of each step by name, and of all together.
    """

    model: str
    name: str
    picture: str
    size: tuple[int, int]
    steps: dict[str, Timing]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        steps = {name: timing.to_dict() for name, timing in self.steps.items()}
        head = {"model": self.model, "engine_name": self.name, "picture": self.picture, "size": list(self.size)}
        return {**head, "steps": steps}


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What was measured, where, and what could not be.

    Attributes:
        networks: The networks, their size and cost.
        rows: What was timed, by batch size, the fastest first.
        unavailable: What could not be, with reasons.
        pictures: The way of one picture, for each network.
        threads: CPU threads each engine was given; None: its own choice.
        rounds: Timed runs of each row.
        environment: Hardware, versions, date.
    """

    networks: tuple[Network, ...]
    rows: tuple[Row, ...]
    unavailable: tuple[Unavailable, ...]
    pictures: tuple[PictureSteps, ...]
    threads: int | None
    rounds: int
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            **self.environment,
            "threads": self.threads,
            "rounds": self.rounds,
            "networks": [network.to_dict() for network in self.networks],
            "rows": [row.to_dict() for row in self.rows],
            "unavailable": [each.to_dict() for each in self.unavailable],
            "pictures": [each.to_dict() for each in self.pictures],
        }

    def to_json(self) -> str:
        """Return ``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


@dataclass(frozen=True, slots=True)
class _Entry:
    network: Network
    engine: str
    precision: str

    def unavailable(self, reason: str) -> Unavailable:
        return Unavailable(self.network.name, self.engine, self.precision, reason)


@dataclass(slots=True)
class _Running:
    """An entry in its process; once that has died, ``problem`` says of what."""

    entry: _Entry
    subject: Subject
    problem: str = ""

    def turn(self, run: str, count: int) -> list[float]:
        """Give a turn; those of a dead process take no time and give no numbers."""
        if not self.problem:
            try:
                return self.subject.turn(run, count)
            except EngineError as error:
                self.problem = str(error)
        return [math.nan] * count


def benchmark(
    models: Sequence[str],
    *,
    engine: str = "all",
    precision: str = "all",
    batches: Sequence[int] = (1,),
    threads: int | None = None,
    rounds: int = 50,
    random_weights: bool = False,
    compiled: bool = False,
    picture: Path | None = None,
    offline: bool | None = None,
    progress: Progress | None = None,
    download_progress: DownloadProgress | None = None,
) -> Benchmark:
    """Time networks on this machine. Each engine runs in a process of its own, and all take turns.

    Args:
        models: Zoo names, weights files of any layout, exported files, folders that ``quantize`` wrote.
        engine: One of ``CHOICES``; ``all`` is every engine, torch (eager) among them.
        precision: One of ``PRECISIONS``; ``all`` is fp32, bf16 and int8, ``auto`` is the fastest of each engine.
        batches: Images per run.
        threads: CPU threads of each engine; None lets it choose.
        rounds: Timed runs of each.
        random_weights: Time zoo networks with random weights, without downloading theirs.
        compiled: Time compiled torch too.
        picture: The picture whose way from file to label is timed; by default one of the package's.
        offline: Forbid (True) or allow (False) connections; None asks the environment.
        progress: Told how the work goes.
        download_progress: Told how a download goes.

    Raises:
        UsageError: If a name, number or picture is wrong.
        EfficientFormerError: If a network cannot be built.
    """
    check_choice("engine", engine, CHOICES, ENGINE_WORDS)
    check_choice("precision", precision, PRECISIONS)
    if not models or not batches or min(batches) < 1 or rounds < 1:
        found = f"{len(models)} networks, batches {list(batches)}, {rounds} rounds"
        raise UsageError("Nothing to benchmark", expected="networks, batch sizes and rounds from 1", found=found)
    with ExitStack() as stack:
        photo = picture or stack.enter_context(as_file(photographs()[0]))
        size = decode(photo).size
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        networks = open_networks(
            list(dict.fromkeys(models)),
            scratch,
            random_weights=random_weights,
            offline=offline,
            progress=download_progress,
        )
        entries = _entries(networks, engine, precision, compiled)
        how = {"threads": threads, "offline": offline}
        rows, unavailable = _time_engines(entries, sorted(set(batches)), how, rounds, progress)
        pictures, lost = _time_pictures(entries, photo, size, how, rounds, progress)
    stamp = environment(*PACKAGES)
    unavailable += lost
    return Benchmark(tuple(networks), tuple(rows), tuple(unavailable), tuple(pictures), threads, rounds, stamp)


def _entries(networks: Sequence[Network], engine: str, precision: str, compiled: bool) -> list[_Entry]:
    engines = (*ENGINE_KEYS, TORCH) if engine == "all" else (engine,)
    if compiled and COMPILED not in engines:
        engines = (*engines, COMPILED)
    precisions = ALL_PRECISIONS if precision == "all" else (precision,)
    return [_Entry(network, each, kind) for network in networks for each in engines for kind in precisions]


def _start(entry: _Entry, how: dict[str, Any], **what: object) -> Subject:
    """Start the process of one network, engine and precision.

    Args:
        entry: Which.
        how: What all processes are told: ``threads``, ``offline``.
        what: What it is to run.

    Raises:
        EngineError: If there is no such combination here; the message is the reason.
    """
    network = entry.network
    model: str | None = str(network.quantised if entry.precision == "int8" else network.exported)
    if entry.engine in (TORCH, COMPILED):
        model = network.source
        if entry.precision == "int8":
            raise UsageError("int8 networks do not run in torch")
        if model is None:
            raise UsageError("An exported file does not run in torch", hint="Give its checkpoint")
    job = {"model": model, "engine": entry.engine, "precision": entry.precision, **how, **what}
    # -P: no module of the current folder is taken for one of ours or of a library
    return Subject((sys.executable, "-P", "-m", "efficientformer.benchmarking.worker", json.dumps(job)))


def _time_engines(
    entries: Sequence[_Entry], batches: Sequence[int], how: dict[str, Any], rounds: int, progress: Progress | None
) -> tuple[list[Row], list[Unavailable]]:
    unavailable = []
    with ExitStack() as stack:
        running: list[_Running] = []
        for index, entry in enumerate(entries):
            if progress is not None:
                progress("opening", index, len(entries))
            try:
                subject = stack.enter_context(_start(entry, how, batches=list(batches)))
                running.append(_Running(entry, subject))
            except EfficientFormerError as error:
                unavailable.append(entry.unavailable(str(error)))
        turns = {
            f"{index} {batch}": partial(each.turn, str(batch))
            for batch in batches
            for index, each in enumerate(running)
        }
        told = partial(progress, "timing") if progress is not None else None
        timings = take_turns(turns, rounds=rounds, progress=told) if turns else {}
    unavailable += [each.entry.unavailable(each.problem) for each in running if each.problem]
    alive = [(index, each) for index, each in enumerate(running) if not each.problem]
    rows = []
    for batch in batches:
        best = min((timings[f"{index} {batch}"].median_ms for index, _ in alive), default=1.0)
        found = [
            _row(each.entry, each.subject.facts, batch, timings[f"{index} {batch}"], best) for index, each in alive
        ]
        rows += sorted(found, key=lambda row: row.timing.median_ms)
    return rows, unavailable


def _row(entry: _Entry, facts: dict[str, Any], batch: int, timing: Timing, best_ms: float) -> Row:
    engine = facts["engine"] if entry.engine != COMPILED else COMPILED
    relative = timing.median_ms / best_ms
    network = entry.network
    return Row(network.name, engine, facts["precision"], batch, facts["name"], network.is_random, timing, relative)


def _time_pictures(
    entries: Sequence[_Entry],
    photo: Path,
    size: tuple[int, int],
    how: dict[str, Any],
    rounds: int,
    progress: Progress | None,
) -> tuple[list[PictureSteps], list[Unavailable]]:
    """Time the way of one picture in each network; return also those whose process died over it."""
    found, lost = [], []
    networks = list(dict.fromkeys(entry.network.name for entry in entries))
    for index, name in enumerate(networks):
        if progress is not None:
            progress("one picture", index, len(networks))
        entry = _for_picture([entry for entry in entries if entry.network.name == name])
        try:
            subject = _start(entry, how, picture=str(photo))
        except EfficientFormerError:
            continue  # what it would run in is among the unavailable, with the reason
        with subject:
            running = _Running(entry, subject)
            turns = {step: partial(running.turn, step) for step in subject.facts["runs"]}
            timings = take_turns(turns, rounds=rounds)
        if running.problem:
            lost.append(entry.unavailable(running.problem))
        else:
            found.append(PictureSteps(name, subject.facts["name"], photo.name, size, timings))
    return found, lost


def _for_picture(entries: Sequence[_Entry]) -> _Entry:
    """Return what runs the picture of a network: the engine and the precision that were asked for, else the default."""
    engines, precisions = {entry.engine for entry in entries}, {entry.precision for entry in entries}
    engine, precision = (each.pop() if len(each) == 1 else "auto" for each in (engines, precisions))
    return _Entry(entries[0].network, engine, precision)
