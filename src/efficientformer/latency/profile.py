"""Where the time of one network goes: per operator as the engine itself measures it, summed by part and by kind."""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from efficientformer.export.proto import OUTPUT
from efficientformer.latency.measure import Latency, time_engines
from efficientformer.latency.names import name_nodes, part_in
from efficientformer.runtime.engines import Engine, open_engine
from efficientformer.runtime.engines.openvino import OpenVinoEngine, shared_core
from efficientformer.runtime.processor import available_cores
from efficientformer.runtime.timing import environment
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.count import count_parts
from efficientformer.spec.fields import check_int
from efficientformer.spec.progress import Progress

RUNS, WARMUP, PASSES = 200, 8, 5
OTHER = "other"


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """One operator of the network as the engine runs it, often several of the file's operators in one.

    Attributes:
        part: The part of the network it belongs to: ``stem``, ``stages.1.blocks.0``, ``head`` ...
        kind: The engine's name for what it does.
        name: The engine's name for the operator.
        ms: Mean time of one run in milliseconds; 0 if the engine, which counts whole microseconds, reports none.
    """

    part: str
    kind: str
    name: str
    ms: float


@dataclass(frozen=True, slots=True)
class PartTime:
    """One part of the network.

    Attributes:
        name: ``stem``, ``stages.1.blocks.0``, ``head`` ...
        kind: ``stem``, ``embedding``, a block kind, ``norm`` or ``head``.
        ms: Time of its operators.
        share: Of the time of all operators.
        macs: Its multiply-accumulates.
    """

    name: str
    kind: str
    ms: float
    share: float
    macs: int


@dataclass(frozen=True)
class Profile:
    """Where the time of a network goes.

    Attributes:
        model: The network's name.
        engine: The engine, its version and precision.
        threads: Its threads; None if it chose.
        latency: One picture through the whole network, without the engine's own measuring.
        operators: Every operator, in the order of execution.
        spec: The network.
        environment: Where it was measured.
    """

    model: str
    engine: str
    threads: int | None
    latency: Latency
    operators: tuple[OperatorTime, ...]
    spec: ArchSpec
    environment: dict[str, Any]

    @property
    def operators_ms(self) -> float:
        """Time of all operators: less than the latency by what the engine does between them."""
        return sum(operator.ms for operator in self.operators)

    @property
    def unseen(self) -> int:
        """How many operators the engine reports no time for."""
        return sum(operator.ms == 0 for operator in self.operators)

    @property
    def unseen_note(self) -> str:
        """What their times are taken for."""
        return (
            f"{self.unseen} of {len(self.operators)} operators count as 0: the engine reports whole microseconds, and "
            "these took less than one, or nothing."
        )

    def parts(self) -> tuple[PartTime, ...]:
        """Return the time of each part of the network, in the order of execution."""
        times: dict[str, float] = defaultdict(float)
        for operator in self.operators:
            times[operator.part] += operator.ms
        total = self.operators_ms or 1.0
        known = [part for part in count_parts(self.spec) if part.name != "head_dist"]
        found = [
            PartTime(part.name, part.kind, times[part.name], times[part.name] / total, part.count.macs)
            for part in known
        ]
        if times[OTHER] > 0:
            found.append(PartTime(OTHER, OTHER, times[OTHER], times[OTHER] / total, 0))
        return tuple(found)

    def kinds(self) -> tuple[tuple[str, float, int], ...]:
        """Return (kind, milliseconds, operators) of each kind of operator, the costliest first."""
        times: dict[str, list[float]] = defaultdict(list)
        for operator in self.operators:
            times[operator.kind].append(operator.ms)
        rows = [(kind, sum(values), len(values)) for kind, values in times.items()]
        return tuple(sorted(rows, key=lambda row: -row[1]))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "model": self.model,
            "engine": self.engine,
            "threads": self.threads,
            "latency": self.latency.to_dict(),
            "operators_ms": round(self.operators_ms, 4),
            "unseen": self.unseen,
            "parts": [asdict(part) for part in self.parts()],
            "kinds": [{"kind": kind, "ms": ms, "operators": count} for kind, ms, count in self.kinds()],
            "operators": [asdict(operator) for operator in self.operators],
            "spec": self.spec.to_dict(),
            "environment": self.environment,
        }


def profile_file(
    path: str | Path,
    *,
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    runs: int = RUNS,
    progress: Progress | None = None,
) -> Profile:
    """Profile an exported file.

    Args:
        path: The file.
        engine: As for ``open_engine``.
        precision: As for ``open_engine``.
        threads: As for ``open_engine``.
        runs: Runs that are measured operator by operator.
        progress: Told how it goes.

    Raises:
        EngineError: If it is no exported file, or the engine cannot run it.
        SpecError: If ``runs`` is below 5.
        MissingExtraError: If a library is not installed.
    """
    path = Path(path)
    opened = open_engine(path, engine, precision=precision, threads=threads)
    check_int("runs", runs, 5, 100_000)
    latency = time_engines([opened], progress=progress)[0]
    with tempfile.TemporaryDirectory(prefix="efficientformer-", ignore_cleanup_errors=True) as folder:
        named = Path(folder) / "named.onnx"
        spec = name_nodes(path, named)
        if isinstance(opened, OpenVinoEngine):
            operators = tuple(_run_openvino(named, opened, runs))
        else:
            operators = tuple(_run_onnxruntime(named, opened, threads, runs))
    name = opened.manifest.provenance.get("name") or opened.manifest.provenance.get("model") or path.name
    where = {**environment(opened.key), "engine": opened.name}
    return Profile(name, opened.name, threads, latency, operators, spec, where)


def _picture(spec: ArchSpec) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((1, spec.in_chans, *spec.input_size), dtype=np.float32)


def _run_openvino(path: Path, opened: OpenVinoEngine, runs: int) -> Iterator[OperatorTime]:
    """Run with OpenVINO's counters, in passes of which the median counts."""
    spec, core = opened.manifest.spec, shared_core()
    model = core.read_model(path)
    model.reshape([1, spec.in_chans, *spec.input_size])
    options = {**opened.options, "PERF_COUNT": True}
    passes = [_counters(core.compile_model(model, "CPU", options), spec, runs // PASSES) for _ in range(PASSES)]
    constant: set[str] = set()
    part = OTHER
    for node in core.compile_model(model, "CPU", options).get_runtime_model().get_ordered_ops():
        name, about = node.get_friendly_name(), node.get_rt_info()
        before = [each.get_node().get_friendly_name() for each in node.input_values()]
        kind = str(about["layerType"].astype(str))
        if kind in ("Input", "Output"):
            continue
        if kind == "Const" or (before and all(each in constant for each in before)):
            constant.add(name)  # weights brought into the engine's layout once, before the first run
            continue
        part = part_in(str(about["originalLayersNames"].astype(str))) or part_in(name) or part
        part = "head" if OUTPUT in name else part
        yield OperatorTime(part, kind, name, median(counters.get(name, 0.0) for counters in passes))


def _counters(compiled: Any, spec: ArchSpec, runs: int) -> dict[str, float]:  # noqa: ANN401 (a CompiledModel)
    """Return the milliseconds of each operator; counters hold means of all runs, so the warm-up is subtracted."""
    request, picture = compiled.create_infer_request(), _picture(spec)
    sums: list[dict[str, float]] = []
    for count in (WARMUP, runs):
        for _ in range(count):
            request.infer([picture])
        total = count + (WARMUP if sums else 0)
        nodes = compiled.get_runtime_model().get_ordered_ops()
        sums.append({node.get_friendly_name(): total * _microseconds(node) for node in nodes})
    return {name: max(0.0, value - sums[0].get(name, 0.0)) / runs / 1000 for name, value in sums[1].items()}


def _microseconds(node: Any) -> float:  # noqa: ANN401 (an openvino Node)
    text = str(node.get_rt_info()["execTimeMcs"].astype(str))
    return float(text) if text.isdigit() else 0.0  # else "not_executed"


def _run_onnxruntime(path: Path, opened: Engine, threads: int | None, runs: int) -> Iterator[OperatorTime]:
    """Run with ONNX Runtime's profiler, which writes every run of every operator into a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_profiling = True
    options.profile_file_prefix = os.fspath(path.with_suffix(""))
    options.intra_op_num_threads = threads or available_cores()  # as the engine that is timed
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    picture, port = _picture(opened.manifest.spec), session.get_inputs()[0].name
    for _ in range(WARMUP + runs):
        session.run(None, {port: picture})
    events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            times[name.removesuffix("_kernel_time"), str(event["args"]["op_name"])].append(event["dur"] / 1000)
    # a change of layout goes before the operator that needs it
    part, found = "head", []
    for (name, kind), values in reversed(times.items()):
        part = part_in(name) or part
        found.append(OperatorTime(part, kind, name, _mean_of_middle(values[WARMUP:])))
    yield from reversed(found)


def _mean_of_middle(values: Sequence[float]) -> float:
    """Return the mean without runs that took more than twice the median: those were disturbed."""
    limit = 2 * median(values) + 0.002
    kept = [value for value in values if value <= limit]
    return sum(kept) / len(kept)
