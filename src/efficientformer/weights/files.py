"""Weights files as they lie on disk: told apart by content, read without running anything in them, written whole.

Everything here distrusts the file: it may be truncated, of another kind, or made to attack whoever reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from efficientformer.spec.errors import CheckpointError, reason_of
from efficientformer.spec.manifest import METADATA_KEY
from efficientformer.spec.whole import whole_file
from efficientformer.weights.formats.translate import COUNTER
from efficientformer.weights.kinds import kind_of
from efficientformer.weights.pickles import read_pickle
from efficientformer.weights.prefixes import without_prefixes

MAX_TENSORS = 100_000
MAX_NAME = 300  # letters


@dataclass(frozen=True)
class WeightsFile:
    """What one file holds.

    Attributes:
        state: Dense, finite tensors on the CPU, under the file's own names; none depends on the file any more.
        manifest: The manifest's JSON text, if the file carries one of ours.
        notes: What was chosen or cut off on the way.
        ambiguous: Whether the file holds averaged (EMA) weights too, and nobody said which ones to take.
        labels: Class names, where a pickle of mmpretrain's has them; else empty.
        sha256: SHA-256 of the file, in hex.
    """

    state: dict[str, Tensor]
    manifest: str | None
    notes: tuple[str, ...]
    ambiguous: bool
    labels: tuple[str, ...]
    sha256: str


def read_weights(path: Path, ema: bool | None) -> WeightsFile:
    """Read a safetensors file or a pickle written by ``torch.save``, told apart by their content.

    Args:
        path: The file.
        ema: Take the averaged weights of a training checkpoint; None takes the plain ones where there are both.

    Raises:
        CheckpointError: If it is no such file, wants to run code, or holds anything but plain finite numbers.
    """
    kind = kind_of(path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    size = path.stat().st_size
    if kind == "safetensors":
        if ema:
            raise CheckpointError(
                "There are no averaged (EMA) weights", found="a safetensors file, which holds one network"
            )
        found, manifest = _read_safetensors(path)
        state = _clean(found, size)
        state, notes = without_prefixes(state) if manifest is None else (state, ())
        return WeightsFile(state, manifest, notes, False, (), sha256)
    read = read_pickle(path, kind, ema)
    state, notes = without_prefixes(_clean(read.state, size))
    return WeightsFile(state, None, (*read.notes, *notes), read.ambiguous, read.labels, sha256)


def _read_safetensors(path: Path) -> tuple[dict[Any, Any], str | None]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata.get(METADATA_KEY)  # noqa: SIM118
    except Exception as error:  # the library raises its own type, but also what torch and the decoder raise
        raise CheckpointError("The safetensors file is damaged", found=f"{error}", hint="Fetch it again") from None


def _clean(found: Mapping[Any, Any], file_size: int) -> dict[str, Tensor]:
    """Return the tensors of ``found`` as fresh ones, after checking that they are nothing but numbers in the file."""
    if len(found) > MAX_TENSORS:
        raise CheckpointError("Too many entries", expected=f"at most {MAX_TENSORS}", found=str(len(found)))
    state: dict[str, Tensor] = {}
    for name, value in found.items():
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise CheckpointError(
                "An entry without a proper name", expected=f"a text of up to {MAX_NAME} letters", found=_describe(name)
            )
        state[name] = _plain(name, value)
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if claimed > 2 * file_size:  # two names may share their values, as tied heads do
        held = f"{claimed:,} bytes in {file_size:,}"
        raise CheckpointError("The tensors claim more values than the file holds", found=held)
    return {name: _finite(name, tensor) for name, tensor in state.items()}


def _describe(name: object) -> str:
    return f"{len(name)} letters" if isinstance(name, str) else type(name).__name__


def _plain(name: str, value: object) -> Tensor:
    """Return ``value`` without its attributes and its history, after checking that it is a dense tensor of numbers."""
    if not isinstance(value, Tensor) or type(value) not in (Tensor, torch.nn.Parameter):
        raise CheckpointError(f"{name} is not a tensor", expected="tensors only", found=type(value).__name__)
    tensor = Tensor.detach(value)  # not value.detach(): a pickle may give its tensors attributes of any name
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_neg() or tensor.device.type != "cpu":
        found = f"{tensor.layout} on {tensor.device.type}{', quantized' if tensor.is_quantized else ''}"
        raise CheckpointError(f"{name} is not a plain tensor", expected="dense values on the CPU", found=found)
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64):
        found = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{name} is of the wrong type", expected="floating point of 16 to 64 bits", found=found)
    return tensor


def _finite(name: str, tensor: Tensor) -> Tensor:
    """Return a copy in memory of our own, half precision in single, after checking that every value is a number."""
    if name.endswith(COUNTER):  # of batches seen, which nothing reads: half precision ends at 65504
        tensor = tensor.nan_to_num(0, posinf=torch.finfo(torch.float16).max)
    if not tensor.isfinite().all():
        raise CheckpointError(f"{name} holds NaN or infinity", expected="numbers", hint="These weights are of no use")
    if name.endswith("running_var") and (tensor < 0).any():
        raise CheckpointError(f"{name} holds negative variances", hint="These weights are of no use")
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(torch.float32 if half else tensor.dtype, copy=True, memory_format=torch.contiguous_format)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that gets its name only when all is written and on disk, or never.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    try:
        with whole_file(path) as temporary, temporary.open("wb") as file:
            yield file
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        raise CheckpointError(f"Cannot write {path}", found=reason_of(error)) from error


def write_json(path: Path, data: object, *, indent: int = 1) -> None:
    """Write a file of JSON, which is there whole or not at all.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    with atomic_write(path) as file:
        file.write((json.dumps(data, indent=indent) + "\n").encode())
