"""CIFAR-10 and CIFAR-100 as they are published: the binary version, and the Python version, whose pickles are data.

Shapes: N pictures of a file, 3 colours, 32 x 32 pixels, planes of colours first.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from efficientformer.data.arrays import MAX_BYTES, ArraySource, damaged
from efficientformer.data.folders import Folder
from efficientformer.data.listing import some
from efficientformer.spec.errors import DataError, reason_of

PIXELS = 3 * 32 * 32
MAX_CLASSES = 256  # the binary version has a byte for a label


@dataclass(frozen=True)
class _Layout:
    """How one of the four archives is laid out.

    Attributes:
        parts: The files of ``train`` and ``test``.
        names: The file with the names of the classes.
        labels: Of the Python version, under which key a file has its labels; empty for the binary version.
        names_key: And under which the names are.
        label_bytes: Of the binary version, how many bytes before a picture say what it is; the last one counts.
    """

    parts: Mapping[str, tuple[str, ...]]
    names: str
    labels: str = ""
    names_key: str = ""
    label_bytes: int = 0


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_LAYOUTS = (
    _Layout({"train": _BATCHES, "test": ("test_batch",)}, "batches.meta", "labels", "label_names"),
    _Layout({"train": ("train",), "test": ("test",)}, "meta", "fine_labels", "fine_label_names"),
    _Layout(
        {"train": tuple(f"{each}.bin" for each in _BATCHES), "test": ("test_batch.bin",)},
        "batches.meta.txt",
        label_bytes=1,
    ),
    _Layout({"train": ("train.bin",), "test": ("test.bin",)}, "fine_label_names.txt", label_bytes=2),
)


def cifar_parts(folder: Folder) -> list[str]:
    """Return which of ``train`` and ``test`` a folder holds as CIFAR's files."""
    layout = _layout(folder)
    return [] if layout is None else _parts(layout, folder)


def open_cifar(folder: Folder, part: str) -> ArraySource:
    """Open one part of CIFAR-10, or of CIFAR-100 with its fine labels.

    Raises:
        DataError: If a file is missing, damaged, or holds anything but pictures and labels.
    """
    layout = _layout(folder)
    assert layout is not None
    wanted = layout.parts[part]
    if missing := [name for name in wanted if name not in folder.files]:
        raise DataError(f"The part {part!r} of {str(folder.path)!r} is not whole", expected=f"{len(wanted)} files",
                        found=f"no {some(missing)}", hint="Unpack the archive again")  # fmt: skip
    names = folder.path / layout.names
    classes = _binary_names(names) if layout.label_bytes else _python_names(names, layout.names_key)
    files = [folder.path / name for name in wanted]
    read = [_read(file, layout, len(classes)) for file in files]
    planes = np.concatenate([images for images, _ in read]).reshape(-1, 3, 32, 32)  # (N, 3072) -> (N, 3, 32, 32)
    if not len(planes):
        raise damaged(files[0], "pictures", "none")
    images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))  # (N, 32, 32, 3)
    return ArraySource(images, np.concatenate([labels for _, labels in read]), classes, part)


def _layout(folder: Folder) -> _Layout | None:
    files = set(folder.files)
    return next((each for each in _LAYOUTS if each.names in files and _parts(each, folder)), None)


def _parts(layout: _Layout, folder: Folder) -> list[str]:
    return [part for part, names in layout.parts.items() if set(names) & set(folder.files)]


def _read(path: Path, layout: _Layout, classes: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return pictures (N, 3072) and labels (N,) of one file."""
    read = _read_binary(path, layout.label_bytes) if layout.label_bytes else _read_python(path, layout.labels)
    labels = read[1]
    if len(labels) and labels.max() >= classes:
        raise damaged(path, f"labels of {classes} classes", f"label {labels.max()}")
    return read


def _bytes_of(path: Path) -> bytes:
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise damaged(path, f"at most {MAX_BYTES:,} bytes", f"{size:,}")
        return path.read_bytes()
    except OSError as error:
        raise damaged(path, "a readable file", reason_of(error)) from error


def _read_binary(path: Path, label_bytes: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return pictures (N, 3072) and labels (N,) of one file."""
    data, record = _bytes_of(path), label_bytes + PIXELS
    if len(data) % record:
        raise damaged(path, f"pictures of {record:,} bytes with their label", f"{len(data):,} bytes")
    rows = np.frombuffer(data, np.uint8).reshape(-1, record)
    return rows[:, label_bytes:], rows[:, label_bytes - 1].astype(np.int64)


def _binary_names(path: Path) -> tuple[str, ...]:
    text = _bytes_of(path).decode(errors="replace")
    return _checked(path, [line.strip() for line in text.splitlines() if line.strip()])


_MAX_TUPLES = 20  # an array takes five; each that holds another twice doubles what a hash or a text of it takes
_ARRAY_NAMES = ("_reconstruct", "ndarray", "dtype")


class _Array:
    """Stands for what NumPy's pickles call, and keeps what it is told: nothing of NumPy's is run."""

    def __init__(self, *told: object) -> None:
        self.told: tuple[object, ...] = told
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """Reads a pickle of plain values and arrays; anything else is refused, and nothing is imported."""

    def find_class(self, module: str, name: str) -> type[_Array]:
        """Return the stand-in for NumPy's names.

        Raises:
            UnpicklingError: For any other.
        """
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in _ARRAY_NAMES:
            return _Array
        raise pickle.UnpicklingError(f"{module}.{name}, which is not read")


def _check_claims(data: bytes) -> None:
    """Raise UnpicklingError for a pickle that Python would take memory for, or time, before it finds it wrong."""
    tuples = 0
    for opcode, argument, _ in pickletools.genops(data):  # which reads what there is, whatever is claimed
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(data):
            raise pickle.UnpicklingError(f"a claim of {argument:,} values")
        tuples += "TUPLE" in opcode.name
    if tuples > _MAX_TUPLES:
        raise pickle.UnpicklingError(f"{tuples:,} tuples")


def _unpickle(path: Path) -> dict[Any, Any]:
    """Read one of the Python version's files: a dict, whose keys Python 2 wrote as bytes."""
    data = _bytes_of(path)
    try:
        _check_claims(data)
        found = _Reader(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise damaged(path, "a file of CIFAR's Python version", str(error) or type(error).__name__) from error
    if not isinstance(found, dict):
        raise damaged(path, "a dict", f"a {type(found).__name__}")
    return {key.decode(errors="replace") if isinstance(key, bytes) else key: value for key, value in found.items()}


def _read_python(path: Path, key: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return pictures (N, 3072) and labels (N,) of one file."""
    found = _unpickle(path)
    images, labels = _pixels(found.get("data")), found.get(key)
    if images is None:
        raise damaged(path, f"pictures under 'data': an array (N, {PIXELS}) of bytes", "something else")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < MAX_CLASSES for label in labels):
        raise damaged(path, f"a list of labels under {key!r}", "something else")
    if len(labels) != len(images):
        raise damaged(path, "a label for each picture", f"{len(images):,} pictures and {len(labels):,} labels")
    return images, np.array(labels, np.int64)


def _pixels(found: object) -> npt.NDArray[np.uint8] | None:
    """Return what a pickled array of bytes held, (N, 3072); None if it is anything else."""
    state = found.state if isinstance(found, _Array) else None
    if not isinstance(state, tuple) or len(state) != 5:  # version, shape, type, column-major, data
        return None
    _, shape, kind, column_major, data = state
    is_bytes = isinstance(kind, _Array) and kind.told[:1] in ((b"u1",), ("u1",)) and isinstance(data, bytes)
    if not is_bytes or len(data) % PIXELS or shape != (len(data) // PIXELS, PIXELS):
        return None
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if column_major else "C")


def _python_names(path: Path, key: str) -> tuple[str, ...]:
    names = _unpickle(path).get(key)
    # the text of anything else may be endless: tuples that hold each other twice double it at every level
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise damaged(path, f"a list of names under {key!r}", "something else")
    return _checked(path, [name.decode(errors="replace") if isinstance(name, bytes) else name for name in names])


def _checked(path: Path, names: list[str]) -> tuple[str, ...]:
    if not 0 < len(set(names)) == len(names) <= MAX_CLASSES:
        raise damaged(path, f"the names of up to {MAX_CLASSES} classes, each once", some(names) or "none")
    return tuple(names)
