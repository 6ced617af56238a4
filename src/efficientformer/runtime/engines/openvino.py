"""OpenVINO: the faster engine on processors with AVX-512, bf16 or int8 instructions (extra ``openvino``)."""

from __future__ import annotations

import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from efficientformer.runtime.engines import OpenFile, check_ports, failed_run, reopen, settle_precision
from efficientformer.runtime.manifests import parse_manifest
from efficientformer.spec.errors import EngineError
from efficientformer.spec.manifest import METADATA_KEY

_PRECISION = "INFERENCE_PRECISION_HINT"
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
# OpenVINO's Python binding sets up its tables when an array first passes through it. Two threads that do so at once can
# wait for each other for ever, one holding Python's lock and the other that of the table.
_FIRST_RUN = threading.Lock()
_AFTER_FORK = threading.Lock()
_CORES: dict[int, Any] = {}  # the core of each process, by its number; that of its parent stays with a child
_ONE_CORE = threading.Lock()
MAX_COMPILED = 2  # batch sizes kept compiled at a time: one picture, and full batches


class OpenVinoEngine(OpenFile):
    """Runs an .onnx file on the CPU with OpenVINO.

    The network is compiled for each batch size that comes, at most two at a time: fixed shapes run faster than free
    ones, and compiling is quick. A batch smaller than one that is compiled is filled up.

    Args:
        path: The file.
        precision: ``auto`` takes the fastest this processor computes in; a quantised file runs its float remainder so,
            or in single precision where OpenVINO cannot.
        threads: Threads in all; None takes the cores this process may use.
        streams: Callers at a time; threads are shared among them.

    Raises:
        EngineError: If OpenVINO lacks a part of itself, or the file cannot be opened, has no manifest, its input and
            output are not what it says, or it cannot run in that precision.
    """

    key = "openvino"
    _has_run = False  # any engine of this process
    _forked: OpenVinoEngine | None = None  # what stands in for this one after a fork

    def __init__(self, path: Path, *, precision: str = "auto", threads: int | None = None, streams: int = 1) -> None:
        import openvino

        super().__init__(path, threads, streams)
        self._core, capabilities, frontends = _library()
        try:
            # read_model would show a file that is no network to each of its readers, and TensorFlow's complains aloud
            reader = frontends.load_by_framework("onnx")
            self._model = reader.convert(reader.load(str(path)))
        except Exception as error:  # OpenVINO's errors share no base class
            raise EngineError(
                f"OpenVINO cannot open {path}",
                expected="an .onnx file",
                found=str(error).strip().splitlines()[-1][:300],
                hint="Export it again: efficientformer convert CHECKPOINT FILE.onnx. One in the cache is made anew "
                "if you remove it",
            ) from error
        self.manifest = parse_manifest(path, _metadata(self._model))
        floats = tuple(name for name, mark in (("bf16", "BF16"), ("fp16", "FP16")) if mark in capabilities)
        available = (*floats, "fp32")
        self.precision = settle_precision(precision, self.manifest, available, "OpenVINO")
        self.name = f"OpenVINO {openvino.__version__.split('-')[0]} ({self.precision})"
        ports = (*self._model.inputs, *self._model.outputs)
        found: list[list[object]] = [[_side(side) for side in list(port.partial_shape)[1:]] for port in ports]
        check_ports(path, self.manifest, found, is_float=self._model.input(0).element_type == openvino.Type.f32)
        self.options = {
            _PRECISION: _HINTS[self.precision if self.precision in _HINTS else available[0]],
            "INFERENCE_NUM_THREADS": self._cores,
            "NUM_STREAMS": streams,
            # pinned threads of two processes, or of two networks in one, would sit on the same cores
            "ENABLE_CPU_PINNING": False,
        }
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._compiled: OrderedDict[int, queue.SimpleQueue[Any]] = OrderedDict()
        self.exact = False  # whether each batch size runs as it is, for those who time it: all are compiled and kept

    def run(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return logits (N, num_classes) for preprocessed images (N, C, H, W).

        Raises:
            EngineError: If OpenVINO fails.
        """
        try:
            return self._here()._run(batch)
        except RuntimeError as error:
            raise failed_run(self.name, batch.shape, error) from error

    def _here(self) -> OpenVinoEngine:
        """Return the engine that runs in this process: after a fork another one.

        A child has none of the threads that OpenVINO began in its parent, and would wait for them for ever. The engine
        that came with it is kept: taking it down waits for them too.
        """
        if os.getpid() == self._process:
            return self
        with _AFTER_FORK:
            if self._forked is None:
                self._forked = cast(OpenVinoEngine, reopen(*self._opened(self.streams)))
                self._forked.exact = self.exact
        return self._forked._here()  # a child may have children

    def _run(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        count = len(batch)
        size, requests = self._for_batch(count)
        if size > count:
            batch = np.concatenate([batch, np.zeros((size - count, *batch.shape[1:]), np.float32)])
        with _taken(requests) as request, nullcontext() if OpenVinoEngine._has_run else _FIRST_RUN:
            # inputs are shared for the duration of the call, outputs are copied: the request is used again
            request.infer([np.ascontiguousarray(batch)], share_inputs=True, share_outputs=True)
            logits: npt.NDArray[np.float32] = np.array(request.get_output_tensor(0).data[:count], np.float32)
            OpenVinoEngine._has_run = True
        return logits

    def _for_batch(self, count: int) -> tuple[int, queue.SimpleQueue[Any]]:
        """Return a compiled batch size of at least ``count`` and its free requests, compiling if need be.

        One picture never runs as a batch of many, and many never one by one.
        """
        with self._lock:
            fit = (size for size in self._compiled if size == count or (size > count > 1 and not self.exact))
            size = min(fit, default=0)
            if not size:
                size = count
                self._compiled[size] = self._compile(size)
                if len(self._compiled) > MAX_COMPILED and not self.exact:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(size)
            return size, self._compiled[size]

    def _compile(self, size: int) -> queue.SimpleQueue[Any]:
        spec = self.manifest.spec
        self._model.reshape([size, spec.in_chans, *spec.input_size])
        try:
            compiled = self._core.compile_model(self._model, "CPU", self.options)
        except RuntimeError:
            if self.precision != "int8" or self.options[_PRECISION] == _HINTS["fp32"]:
                raise
            # OpenVINO 2026.4 has no int8 convolution with a bf16 remainder for processors with AMX
            self.options[_PRECISION] = _HINTS["fp32"]
            compiled = self._core.compile_model(self._model, "CPU", self.options)
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(self.streams):
            requests.put(compiled.create_infer_request())
        return requests


def shared_core() -> Any:  # noqa: ANN401 (an openvino.Core)
    """Return OpenVINO's core, the same for all of a process and never taken down.

    A core's plugin for CPUs gives the thread that loads it a stack for signals, and takes it away as it ends. Of two,
    whichever ends last puts back that of the first, which is gone: the next signal, such as Ctrl-C, is then a
    segmentation fault.
    """
    import openvino

    with _ONE_CORE:
        if os.getpid() not in _CORES:
            _CORES[os.getpid()] = openvino.Core()
        return _CORES[os.getpid()]


def _library() -> tuple[Any, list[str], Any]:
    """Return OpenVINO's core, what this processor computes in, and its readers of files.

    Raises:
        EngineError: If a part of it, such as the plugin for CPUs, is missing or cannot be loaded.
    """
    try:
        from openvino.frontend import FrontEndManager

        core = shared_core()
        return core, core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"), FrontEndManager()
    except Exception as error:  # OpenVINO's errors share no base class, and a damaged library raises anything
        raise EngineError(
            "OpenVINO does not work here",
            expected="a whole installation, with its plugin for CPUs",
            found=" ".join(str(error).split())[-300:],
            hint="Install it anew, or take --engine onnxruntime",
        ) from error


def _renew_locks() -> None:
    """Free the locks in a forked child: a thread that held one was left behind."""
    global _FIRST_RUN, _AFTER_FORK, _ONE_CORE
    _FIRST_RUN, _AFTER_FORK, _ONE_CORE = threading.Lock(), threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_renew_locks)


@contextmanager
def _taken(requests: queue.SimpleQueue[Any]) -> Iterator[Any]:
    """Lend a free request; waits while all are in use."""
    request = requests.get()
    try:
        yield request
    finally:
        requests.put(request)


def _metadata(model: Any) -> str | None:  # noqa: ANN401 (an openvino.Model)
    """Return our entry of an .onnx file's metadata, which OpenVINO keeps under the name ``framework``."""
    path = ["framework", METADATA_KEY]
    return str(model.get_rt_info(path).value) if model.has_rt_info(path) else None


def _side(side: Any) -> object:  # noqa: ANN401 (an openvino.Dimension)
    return side.get_length() if side.is_static else "?"
