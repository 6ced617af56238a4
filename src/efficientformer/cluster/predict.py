"""Bulk prediction beyond one machine: pictures and results in a cluster's storage, Ray Data in between.

Each worker is a Ray actor with the network open; Ray gives it lists of paths, and a dead worker's lists to others.
A worker writes the rows of a list as a part file; a run that was killed goes on with the parts that are missing. (Ray's
own writers are a stage that gets no CPU before the workers are done.)
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from efficientformer.cluster.parts import DONE_FILE, PREFIX, Part, Parts
from efficientformer.cluster.storage import Place
from efficientformer.runtime.classifier import DECODINGS, Failed, FileClassifier, Prediction
from efficientformer.runtime.engines import ENGINES, PRECISIONS
from efficientformer.runtime.inputs import READERS, Input, read_ahead
from efficientformer.runtime.question import Question
from efficientformer.runtime.records import Record, arrow_row, arrow_schema
from efficientformer.spec.errors import EfficientFormerError, EngineError, ImageError, UsageError, require
from efficientformer.spec.fields import check_choice, check_count
from efficientformer.spec.habits import ENGINE_WORDS

FORMATS = ("parquet", "json")
PARTS_PER_WORKER = 8  # so that workers of different speed end together
CONNECT_SECONDS = 5.0
MAX_DEATHS = 2  # of workers over one picture, after which it is given up
PART_SIZE = 1000  # pictures of a part at most


@dataclass(frozen=True, slots=True)
class Options:
    """How each worker predicts.

    Attributes:
        engine: As in ``runtime.engines.ENGINES``.
        precision: As in ``runtime.engines.PRECISIONS``.
        threads: CPU threads of a worker, which Ray reserves for it.
        top_k: Classes per picture.
        decode: ``exact`` or ``fast``.

    Raises:
        UsageError: If there is no engine, precision or decoding of that name, or a number is not positive.
    """

    engine: str = "auto"
    precision: str = "auto"
    threads: int = 1
    top_k: int = 3
    decode: str = "exact"

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, ENGINES, ENGINE_WORDS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("decode", self.decode, DECODINGS)
        check_count("number of threads", self.threads)
        check_count("number of classes", self.top_k)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did.

    Attributes:
        pictures: Pictures in all.
        skipped: How many could not be classified; their rows say why.
        workers: Workers; 0 if no part was missing.
        output: Where the rows are.
        kept: Pictures whose rows were there already.
    """

    pictures: int
    skipped: int
    workers: int
    output: str
    kept: int = 0


class Attempts:
    """Counts, for the whole cluster, how often something was begun and not ended: how many workers died over it."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def begin(self, what: str) -> int:
        """Note that ``what`` begins; return how often it had begun before without an end."""
        self._open[what] += 1
        return self._open[what] - 1

    def end(self, what: str) -> None:
        """Note that ``what`` ended."""
        del self._open[what]


class Worker:
    """The stage that Ray runs: paths in, a part file out.

    A part that killed a worker is done again picture by picture, so that the one to blame is found and given up.

    Args:
        source: Where the pictures are.
        target: Where part files go.
        format_: As in ``FORMATS``.
        model: A Ray reference to the bytes of an exported file.
        attempts: The cluster's ``Attempts``, as a Ray actor.
        options: How to predict.
    """

    def __init__(
        self,
        source: Place,
        target: Place,
        format_: str,
        model: Any,  # noqa: ANN401 (a ray.ObjectRef)
        attempts: Any,  # noqa: ANN401 (a ray.ActorHandle)
        options: Options,
    ) -> None:
        import ray

        self._source, self._target, self._format = source, target, format_
        self._attempts, self._options = attempts, options
        self._readers = ThreadPoolExecutor(READERS)
        self._classify = _opened(ray.get(model), options)

    def __call__(self, part: Any) -> Any:  # noqa: ANN401 (pyarrow.Tables)
        """Classify the pictures of a table with the fields of ``Part``; returns how many there were."""
        import pyarrow as arrow

        return arrow.table({"pictures": [self._do(**row) for row in part.to_pylist()]})

    def _do(self, name: str, paths: Sequence[str]) -> int:
        with self._attempt(name) as deaths:
            outcomes = [self._one(path) for path in paths] if deaths else self.classify(paths)
        self._write([arrow_row(outcome.record(self._options.top_k)) for outcome in outcomes], name)
        return len(outcomes)

    def _write(self, rows: list[Record], name: str) -> None:
        import pyarrow as arrow
        from pyarrow import parquet

        data, schema = io.BytesIO(), arrow_schema()
        if self._format == "parquet":
            parquet.write_table(arrow.Table.from_pylist(rows, schema), data)
        else:
            empty = dict.fromkeys(schema.names)
            data.write("".join(f"{json.dumps(empty | row)}\n" for row in rows).encode())
        self._target.write(name, data.getvalue())

    def classify(self, paths: Sequence[str]) -> list[Prediction | Failed]:
        """Fetch and classify pictures."""
        pictures = read_ahead((Input(path, partial(self._source.read, path)) for path in paths), self._readers)
        # No more threads than Ray reserved: the node's other cores belong to other workers.
        threads = self._options.threads
        return list(self._classify.predict(pictures, decode=self._options.decode, workers=threads))

    def _one(self, path: str) -> Prediction | Failed:
        with self._attempt(path) as deaths:
            if deaths < MAX_DEATHS:
                return self.classify([path])[0]
            found = f"that {deaths} workers died over it"
            return Failed(ImageError(f"Gave up {path!r}", expected="a picture that can be decoded", found=found), path)

    @contextlib.contextmanager
    def _attempt(self, what: str) -> Iterator[int]:
        """Give how many workers died over ``what``."""
        import ray

        yield ray.get(self._attempts.begin.remote(what))
        ray.get(self._attempts.end.remote(what))


def _opened(network: bytes, options: Options) -> FileClassifier:
    """Open an exported file as each worker does."""
    with tempfile.TemporaryDirectory() as folder:  # engines read the file once and keep it in memory
        file = Path(folder) / "model.onnx"
        file.write_bytes(network)
        opened = FileClassifier(file, engine=options.engine, precision=options.precision, threads=options.threads)
        opened.open_for_many()  # while the file is there
    return opened


def predict_on_cluster(
    source: str,
    output: str,
    model: str | Path,
    options: Options | None = None,
    *,
    workers: int | None = None,
    format_: str = "parquet",
    part_size: int = PART_SIZE,
    quiet: bool = True,
    worker: type[Worker] = Worker,
) -> Summary:
    """Classify every picture of a folder on a Ray cluster.

    A cluster that runs is joined where ``RAY_ADDRESS`` says or ``ray.init`` was called; else the one that was started
    on this machine; else a new one is, for this run. The package must be installed on every node. Called again with the
    same pictures, network and options it goes on where a run was killed, with the parts that are not written.

    Args:
        source: Folder with pictures: a path all nodes see, or a URI such as ``s3://bucket/images``.
        output: New folder for the rows, likewise, or that of the run to go on with.
        model: An exported file on this machine; it is sent to the workers.
        options: How each worker predicts.
        workers: Workers at most; None takes as many as the cluster's CPUs allow.
        format_: ``parquet`` or ``json`` (lines).
        part_size: Pictures a worker is given at a time, and rows of a part file, at most; of a run that goes on, as it
            was begun.
        quiet: No progress.
        worker: The stage; a subclass may do more.

    Returns:
        The summary, which also stands in ``_SUCCESS.json`` in the output; a folder without that file is not complete.

    Raises:
        UsageError: If a number is not positive, the output belongs to another command or holds something else, a place
            cannot be opened, there is no cluster at ``RAY_ADDRESS``, or no node of it has the CPUs of a worker.
        DataError: If there is no picture.
        EngineError: If a node cannot open the network so, a worker fails for another reason than its death, or rows
            are missing.
        MissingExtraError: If the ray extra is not installed.
    """
    require("ray", "Prediction on a cluster", "pyarrow.parquet", "ray")
    import ray

    check_choice("format", format_, FORMATS)
    check_count("part size", part_size)
    if workers is not None:
        check_count("number of workers", workers)
    options, model = options or Options(), Path(model)
    place, target = Place.of(source), Place.of(output)
    paths, network = place.pictures(), model.read_bytes()
    parts = Parts(target, format_, _question(source, network, options), paths)
    count, missing = 0, parts.missing() if parts.number else []
    if not parts.number or missing:
        with _joined(), _told():
            count, handed = _workers(options.threads, workers), ray.put(network)
            if not parts.number:
                _check_opens(handed, options)
                parts.begin(min(max(count * PARTS_PER_WORKER, math.ceil(len(paths) / part_size)), len(paths)))
                missing = parts.missing()
            parts.tidy()
            _run(missing, (place, target, format_, handed, _attempts(), options), count, quiet, worker)
    kept = len(paths) - sum(len(part.paths) for part in missing)
    summary = Summary(*count_rows(target, format_), count, output, kept)
    if summary.pictures != len(paths):
        expected, found = f"{len(paths):,} rows", f"{summary.pictures:,}"
        raise EngineError(f"{output} is not complete", expected=expected, found=found, hint="Remove it and run again")
    if missing or DONE_FILE not in target.names():
        done = {**asdict(summary), "model": model.name, **asdict(options)}
        target.write(DONE_FILE, json.dumps(done, indent=2).encode())
    return summary


def _question(source: str, network: bytes, options: Options) -> Question:
    """Return what rows depend on; on how many threads they were computed is left out: a run may go on elsewhere."""
    named = {name: value for name, value in asdict(options).items() if name != "threads"}
    return {"source": source, "model": hashlib.sha256(network).hexdigest(), **named}


@contextlib.contextmanager
def _joined() -> Iterator[None]:
    """Join the cluster, or start one, and leave it again; the caller's own stays as it is."""
    import ray

    if ray.is_initialized():
        yield
        return
    _join()
    try:
        yield
    finally:
        ray.shutdown()


def _join() -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:  # a ConnectionError is an OSError
        problem = f"Cannot join the Ray cluster at {address!r}" if address else "Cannot start Ray on this machine"
        hint = "Check RAY_ADDRESS; without it a cluster is started on this machine" if address else ""
        raise UsageError(problem, expected="a running cluster", found=str(error).strip()[:300], hint=hint) from error


def _workers(threads: int, wanted: int | None) -> int:
    """Return how many workers there are to be; each must fit on a node, or Ray would wait for one without end."""
    import ray

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    if threads > max(nodes, default=0):
        found = f"{threads} threads; the largest node has {max(nodes, default=0)} CPUs"
        raise UsageError("No node has room for a worker", expected="threads of one node", found=found,
                         hint="Lower --threads")  # fmt: skip
    room = sum(cpus // threads for cpus in nodes)
    return min(wanted or room, room)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Tell in one line what a cluster says in many."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        found = str(error).strip().splitlines()[-1][:300]
        hint = "The same command goes on with the parts that are missing"
        raise EngineError("The cluster could not do it", found=found, hint=hint) from error


def _check_opens(network: Any, options: Options) -> None:  # noqa: ANN401 (a ray.ObjectRef)
    """Have a node open the network: where none can, every worker would fail and be started again, for minutes.

    Raises:
        EfficientFormerError: What keeps the node from it.
    """
    import ray
    from ray.exceptions import RayTaskError

    def opens(network: bytes) -> str:
        return _opened(network, options).engine

    try:
        ray.get(ray.remote(num_cpus=options.threads)(opens).remote(network))
    except RayTaskError as error:
        if isinstance(error.cause, EfficientFormerError):
            raise error.cause from error
        raise


def _attempts() -> Any:  # noqa: ANN401 (a ray.ActorHandle)
    """Start the cluster's count of attempts; lost with its node it begins anew, and the run goes on."""
    import ray

    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()


def _run(parts: Sequence[Part], arguments: tuple[Any, ...], count: int, quiet: bool, worker: type[Worker]) -> None:
    """Have so many workers, made with these arguments, write parts."""
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = not quiet
    if quiet:
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of its plans and of where its own log lies
    options: Options = arguments[-1]
    done = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts)).map_batches(
        worker,
        fn_constructor_args=arguments,
        batch_size=None,  # a whole block, which is a part
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=options.threads,
    )
    done.materialize()


def count_rows(target: Place, format_: str) -> tuple[int, int]:
    """Return how many rows the part files of a folder hold, and how many of them tell of an error."""
    from pyarrow import fs

    found = target.filesystem.get_file_info(fs.FileSelector(target.path))
    parts = [info for info in found if info.base_name.startswith(PREFIX)]
    with ThreadPoolExecutor(READERS) as readers:
        errors = list(readers.map(lambda part: _errors(target, part.path, format_), parts))
    return sum(map(len, errors)), sum(len(column) - column.null_count for column in errors)


def _errors(target: Place, path: str, format_: str) -> Any:  # noqa: ANN401 (a pyarrow.ChunkedArray)
    """Return the column ``error`` of a part file.

    Each file is read by itself: pyarrow's scanner of JSON data sets waits for the thread it runs in where pyarrow has
    one thread only, as it has with ``OMP_NUM_THREADS=1``.
    """
    from pyarrow import ArrowInvalid, parquet
    from pyarrow import json as arrow_json

    try:
        with target.filesystem.open_input_file(path) as file:
            if format_ == "parquet":
                return parquet.read_table(file, columns=["error"])["error"]
            parsing = arrow_json.ParseOptions(explicit_schema=arrow_schema())
            reading = arrow_json.ReadOptions(use_threads=False, block_size=max(1 << 20, file.size()))  # of whole rows
            return arrow_json.read_json(file, reading, parsing)["error"]
    except (ArrowInvalid, KeyError) as error:
        hint = "Remove it and run again: the same command goes on with the parts that are missing"
        raise EngineError(f"The part {path} is damaged", found=str(error)[:300], hint=hint) from error
