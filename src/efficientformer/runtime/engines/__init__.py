"""Inference engines behind one small protocol; ``open_engine`` opens a file with one of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from efficientformer.runtime.processor import available_cores, overflows
from efficientformer.spec.errors import EngineError, PrecisionError, missing_extra
from efficientformer.spec.fields import check_choice, check_count
from efficientformer.spec.habits import ENGINE_WORDS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from efficientformer.spec.manifest import Manifest

ENGINE_KEYS = ("onnxruntime", "openvino")
ENGINES = ("auto", *ENGINE_KEYS)
_FASTEST_FIRST = ("openvino", "onnxruntime")  # usually
ENGINE_PRECISIONS = ("fp32", "bf16", "fp16", "int8")
PRECISIONS = ("auto", *ENGINE_PRECISIONS)


class Engine(Protocol):
    """What runs an exported file. ``run`` may be called by as many threads at once as there are streams.

    Attributes:
        key: The engine, as in ``ENGINE_KEYS``.
        name: The engine, its version and its precision, for people.
        precision: What it computes in, as in ``ENGINE_PRECISIONS``; of an int8 file, ``int8``.
        manifest: What the file says about itself.
        streams: Callers at a time.
    """

    key: str
    name: str
    precision: str
    manifest: Manifest
    streams: int

    def run(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return logits (N, num_classes) for preprocessed images (N, C, H, W)."""

    def for_many(self) -> Engine:
        """Return the engine to run many pictures with: of the same results, for as many callers as serve it best."""


def installed_engines() -> tuple[str, ...]:
    """Return the engines that can be imported here, the ones usually faster first."""
    return tuple(name for name in _FASTEST_FIRST if can_import(name))


def damaged_engines() -> tuple[str, ...]:
    """Return the engines that are installed here and cannot be imported."""
    return tuple(name for name in _FASTEST_FIRST if _is_installed(name) and not can_import(name))


def no_engine() -> EngineError:
    """Build the error for a machine on which no engine can be imported."""
    found = ", ".join(damaged_engines()) or "none installed"
    return EngineError("No engine can be imported", expected="onnxruntime", found=found, hint=_anew("onnxruntime"))


def can_import(engine: str) -> bool:
    """Whether an engine's library is installed and whole: it is imported, which whoever asks is about to do.

    One that is damaged is warned of, since another will do its work.
    """
    if not _is_installed(engine):
        return False
    try:
        import_module(engine)
    except Exception as error:  # a damaged library raises anything
        warnings.warn(f"{engine} is installed, its import fails, and it is left out: {error}", stacklevel=3)
        return False
    return True


def _import(engine: str) -> None:
    """Import an engine's library, before the module that uses it does.

    Raises:
        MissingExtraError: If it is not installed, and an extra would.
        EngineError: If its import fails.
    """
    try:
        import_module(engine)
    except Exception as error:  # a damaged library raises anything
        if isinstance(error, ImportError) and engine == "openvino" and not _is_installed(engine):
            raise missing_extra("openvino", "The OpenVINO engine", error) from error
        raise EngineError(f"{engine} cannot be imported", found=str(error), hint=_anew(engine)) from error


def _anew(engine: str) -> str:
    return f"python -c 'import {engine}' says why; install it anew"


def _is_installed(engine: str) -> bool:
    spec = find_spec(engine)
    return spec is not None and spec.loader is not None  # a folder of its name, as in the working one, has no loader


def open_engine(
    path: str | Path, engine: str = "auto", *, precision: str = "auto", threads: int | None = None, streams: int = 1
) -> Engine:
    """Open an exported file.

    Args:
        path: The file, with a manifest in its metadata.
        engine: One of ``ENGINES``; ``auto`` takes OpenVINO if it is there and runs the file, else ONNX Runtime.
            (``runtime.choice`` measures instead.)
        precision: One of ``PRECISIONS``; ``auto`` takes the fastest the engine has on this processor. Whether a file
            is int8 is decided when it is made: here it can only be demanded.
        threads: CPU threads of the engine in all; None lets it take what the process may use.
        streams: How many threads of the caller's may run at the same time; each gets its share of ``threads``.

    Raises:
        UsageError: If there is no engine or precision of that name, or a number is not positive.
        MissingExtraError: If the engine is not installed.
        EngineError: If the file cannot be run, says nothing about itself, or the engine has not that precision or
            cannot be imported.
    """
    check_choice("engine", engine, ENGINES, ENGINE_WORDS)
    check_choice("precision", precision, PRECISIONS)
    check_threads(threads, streams)
    path = Path(path)
    if engine == "auto":
        return _open_first(path, precision, threads, streams)
    _import(engine)
    if engine == "openvino":
        from efficientformer.runtime.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(path, precision=precision, threads=threads, streams=streams)
    from efficientformer.runtime.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(path, precision=precision, threads=threads, streams=streams)


def _open_first(path: Path, precision: str, threads: int | None, streams: int) -> Engine:
    """Open a file in the first engine that runs an empty picture.

    Raises:
        EngineError: If none does: why the first one, which is usually the faster, does not.
    """
    failures: list[EngineError] = []
    for key in installed_engines():
        try:
            engine = open_engine(path, key, precision=precision, threads=threads, streams=streams)
            _try_out(engine)
        except EngineError as error:
            failures.append(error)
            continue
        for failure in failures:
            warnings.warn(f"{engine.name} runs instead: {failure}", stacklevel=3)
        return engine
    raise failures[0] if failures else no_engine()


def _try_out(engine: Engine) -> None:
    """Run one picture.

    Raises:
        EngineError: If the engine fails.
    """
    import numpy as np

    spec = engine.manifest.spec
    engine.run(np.zeros((1, spec.in_chans, *spec.input_size), np.float32))


def check_threads(threads: int | None, streams: int) -> None:
    """Check the numbers that ``open_engine`` takes.

    Raises:
        UsageError: If one is not positive.
    """
    if threads is not None:
        check_count("number of threads", threads)
    check_count("number of streams", streams)


def settle_precision(wanted: str, manifest: Manifest, available: tuple[str, ...], engine: str) -> str:
    """Return what an engine computes a file in.

    Args:
        wanted: What the caller asked for.
        manifest: What the file says about itself.
        available: Precisions the engine has on this processor for float files, the fastest first.
        engine: The engine, for messages.

    Raises:
        PrecisionError: If the file or the engine cannot do what was asked for.
    """
    is_int8 = manifest.provenance.get("precision") == "int8"
    if is_int8 and wanted not in ("auto", "int8"):
        hint = "Give the network it was quantised from"
        raise PrecisionError(f"This file cannot run in {wanted}", expected="a float network", found="int8", hint=hint)
    if wanted == "int8" and not is_int8:
        raise PrecisionError(
            "This file is not quantised",
            expected="an int8 network",
            found="a float network",
            hint="Make one: efficientformer quantize MODEL --data PICTURES --output FOLDER",
        )
    if is_int8 and manifest.provenance.get("weight_bits") != "7" and overflows():
        warnings.warn(
            "The weights of this int8 file use all 8 bits, and this processor has no VNNI: sums overflow, and top-1 is"
            " lost. Quantise the network again with --weight-bits 7, or run this file on another processor",
            stacklevel=4,
        )
    if is_int8 or wanted == "auto":
        return "int8" if is_int8 else available[0]
    if wanted not in available:
        raise PrecisionError(
            f"{engine} does not compute in {wanted} on this processor",
            expected=f"one of {', '.join(available)}",
            found=wanted,
            hint="Take another engine or precision, or leave both to auto",
        )
    return wanted


def file_stamp(path: Path) -> tuple[int, int] | None:
    """Return by what a file is told from another of its name; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def check_stamp(path: Path, stamp: tuple[int, int] | None) -> None:
    """Check that a file is the one that was opened before.

    Raises:
        EngineError: If it was changed, replaced or removed.
    """
    if file_stamp(path) != stamp:
        raise EngineError(
            f"{path} was changed or removed while it is in use",
            expected="the file that was opened",
            hint="Open the network anew",
        )


def reopen(
    path: Path, stamp: tuple[int, int] | None, engine: str, precision: str, threads: int | None, streams: int
) -> Engine:
    """Open a file that is open already once more: for other callers, or in another process.

    Args:
        path: The file.
        stamp: Its ``file_stamp`` when it was opened before.
        engine: As ``open_engine`` takes it, as the rest.
        precision: What the open one computes in.
        threads: What the open one was given.
        streams: Callers at a time.

    Raises:
        EngineError: If the file is no longer the one that was opened.
    """
    check_stamp(path, stamp)
    return open_engine(path, engine, precision=precision, threads=threads, streams=streams)


class OpenFile(Engine):
    """What every engine with a file open has in common; each makes its own ``run``.

    Made before the engine reads the file, so that a file replaced in between is told from the one that is open.

    Args:
        path: The file.
        threads: CPU threads in all; None takes the cores this process may use.
        streams: Callers at a time.
    """

    def __init__(self, path: Path, threads: int | None, streams: int) -> None:
        self._stamp = file_stamp(path)
        self._path, self._threads, self.streams = path.absolute(), threads, streams

    def __reduce__(self) -> tuple[Callable[..., Engine], tuple[object, ...]]:
        """Have a copy, or another process, open the file anew: what an engine made of it stays where it is."""
        return reopen, self._opened(self.streams)

    def for_many(self) -> Engine:
        """Return an engine in which each core takes a picture of its own: no core waits for another's layer.

        Raises:
            EngineError: If the file is no longer the one that was opened.
        """
        return self if self._cores == self.streams else reopen(*self._opened(self._cores))

    @property
    def _cores(self) -> int:
        """Cores for all callers together."""
        return self._threads or available_cores()

    def _opened(self, streams: int) -> tuple[Path, tuple[int, int] | None, str, str, int | None, int]:
        """Return what ``reopen`` takes."""
        return self._path, self._stamp, self.key, self.precision, self._threads, streams


def failed_run(engine: str, shape: tuple[int, ...], error: Exception | str, hint: str = "") -> EngineError:
    """Build the error for a batch that an engine does not run.

    Args:
        engine: The engine's name.
        shape: Of the batch.
        error: What the engine says.
        hint: What to do next.
    """
    problem = f"{engine} cannot run a batch of shape {list(shape)}"
    return EngineError(problem, found=" ".join(str(error).split())[-300:], hint=hint)


def check_ports(path: Path, manifest: Manifest, found: list[list[object]], *, is_float: bool) -> None:
    """Check that a graph takes and gives what its manifest says.

    Args:
        path: The file, for messages.
        manifest: What the file says about itself.
        found: Shape of each input, then of each output, without the batch.
        is_float: Whether the first input is float32.

    Raises:
        EngineError: If it does not.
    """
    spec = manifest.spec
    expected = [[spec.in_chans, *spec.input_size], [spec.num_classes]]
    if found != expected or not is_float:
        raise EngineError(
            f"{path} does not do what its manifest says", expected=f"shapes {expected}", found=f"shapes {found}"
        )
