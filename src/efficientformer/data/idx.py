"""The idx files of MNIST and Fashion-MNIST, packed with gzip or not."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from efficientformer.data.arrays import MAX_BYTES, ArraySource, damaged
from efficientformer.data.folders import Folder
from efficientformer.spec.errors import DataError

PARTS = {"train": "train", "test": "t10k"}
MAX_PICTURES = 20_000_000  # each needs a name and a label, however small it is; MNIST has 60,000
DIGITS = tuple(map(str, range(10)))
FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_IMAGES, _LABELS = 0x803, 0x801


def idx_parts(folder: Folder) -> list[str]:
    """Return which of ``train`` and ``test`` a folder holds as idx files."""
    return [part for part, prefix in PARTS.items() if _spellings(f"{prefix}-images-idx3-ubyte") & set(folder.files)]


def open_idx(folder: Folder, part: str) -> ArraySource:
    """Open one part of a data set in idx files.

    Class names are Fashion-MNIST's where the folder's name says so, and digits elsewhere.

    Raises:
        DataError: If a file is missing, damaged, or not what its header says.
    """
    prefix = PARTS[part]
    images = _read(_find(folder, f"{prefix}-images-idx3-ubyte"), _IMAGES)
    labels = _read(_find(folder, f"{prefix}-labels-idx1-ubyte"), _LABELS)
    if len(images) != len(labels):
        found = f"{len(images):,} pictures and {len(labels):,} labels"
        raise DataError(f"The idx files of {part!r} in {str(folder.path)!r} do not belong together", found=found)
    if images.size == 0:
        raise DataError(f"The idx files of {part!r} in {str(folder.path)!r} are empty", found=f"shape {images.shape}")
    path = folder.path.absolute()
    title = (path.parent if path.name == "raw" else path).name.lower()  # torchvision's FashionMNIST/raw
    classes = FASHION if "fashion" in title else DIGITS
    if labels.max() >= len(classes):  # EMNIST and its like
        classes = tuple(map(str, range(int(labels.max()) + 1)))
    return ArraySource(images, labels.astype(np.int64), classes, part)


def _find(folder: Folder, name: str) -> Path:
    for each in sorted(_spellings(name) & set(folder.files)):
        return folder.path / each
    raise DataError(f"A part of {str(folder.path)!r} is missing", expected=f"{name} or {name}.gz")


def _spellings(name: str) -> set[str]:
    """Return the names that an idx file goes by: packed or not, and with a dot before ``idx``, as mirrors have it."""
    return {f"{each}{packed}" for each in (name, name.replace("-idx", ".idx")) for packed in ("", ".gz")}


def _read(path: Path, magic: int) -> npt.NDArray[np.uint8]:
    """Read one file; nothing is taken into memory before its header was believed."""
    header = 16 if magic == _IMAGES else 8
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(header)
            fields = np.frombuffer(start[: len(start) // 4 * 4], ">u4").tolist()
            if len(fields) != header // 4 or fields[0] != magic:
                raise damaged(path, f"a header that begins with {magic:#010x}", f"{start[:16]!r}")
            size = int(np.prod([1, *fields[1:]], dtype=object))
            if size > MAX_BYTES:
                raise damaged(path, f"at most {MAX_BYTES:,} bytes", f"a header that claims {size:,}")
            if fields[1] > MAX_PICTURES:
                raise damaged(path, f"at most {MAX_PICTURES:,} pictures", f"a header that claims {fields[1]:,}")
            data = bytearray()
            while len(data) <= size and (block := file.read(1 << 20)):
                data += block
    except (OSError, EOFError, zlib.error) as error:  # gzip's own errors are OSErrors
        raise damaged(path, "a readable idx file", os.fsdecode(str(error) or type(error).__name__)) from error
    if len(data) != size:
        found = "more" if len(data) > size else f"{len(data):,}"
        raise damaged(path, f"{size:,} bytes, as its header says", found)
    return np.frombuffer(bytes(data), np.uint8).reshape(fields[1:])
