"""Checkpoints: read from any layout, written in ours or in a foreign one.

Our own files are safetensors whose metadata holds the manifest (spec, preprocessing, labels, provenance). Foreign
ones are read as data only; their architecture is read off the shapes.
"""

from __future__ import annotations

import dataclasses
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import CheckpointError, EfficientFormerError, UsageError, reason_of
from efficientformer.spec.manifest import METADATA_KEY, Manifest
from efficientformer.weights.files import atomic_write, read_weights
from efficientformer.weights.formats.detect import LAYOUTS, detect_layout, get_layout
from efficientformer.weights.formats.infer import STEM_STRIDE, infer_spec
from efficientformer.weights.formats.translate import Report, from_ours, to_ours

STATISTICS = ("running_mean", "running_var")  # few, and of any size: a variance can exceed half precision
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".pkl", ".tar")


class WeightsWarning(UserWarning):
    """Weights were taken, left out or changed in a way the caller did not spell out."""


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one network and what is known about them.

    Attributes:
        state: Our names to tensors on the CPU: single or double precision, and int64 batch counters.
        spec: The architecture, from the manifest or read off the shapes.
        layout: The layout the file was in.
        manifest: What the file says about itself; None in foreign files.
        report: What became of every key of the file.
        sha256: SHA-256 of the file, in hex.
        labels: Class names that a foreign file gives, in order of the logits; empty if it gives none.
    """

    state: dict[str, Tensor]
    spec: ArchSpec
    layout: str
    manifest: Manifest | None
    report: Report
    sha256: str
    labels: tuple[str, ...] = ()

    @property
    def headless(self) -> bool:
        """Whether the file held no heads: ``spec`` then says which the network is to be given."""
        return "head.weight" not in self.state


def load_checkpoint(
    path: str | Path,
    *,
    layout: str = "auto",
    ema: bool | None = None,
    spec: ArchSpec | None = None,
    heads: ArchSpec | None = None,
) -> Checkpoint:
    """Read a weights file: ours, or one of the authors, timm, mmpretrain or transformers.

    No code in the file is ever run. Half precision is widened to single.

    Args:
        path: A .safetensors file or one written by ``torch.save``; the content decides, not the name.
        layout: ``auto``, or the layout the names must be in.
        ema: Take the averaged weights of a training checkpoint. None takes the plain ones, as the authors evaluate,
            and warns if the file holds both.
        spec: The architecture, where the file cannot say it all (stem stride, grids that are not square); one of ours
            says it.
        heads: A network whose heads are meant where the file has none; without it such a file is refused.

    Raises:
        UsageError: If ``layout`` is unknown.
        CheckpointError: If the file cannot be read safely, or not every key is accounted for; the message names it.
    """
    if layout not in ("auto", *LAYOUTS):
        raise UsageError("Unknown layout", expected=f"auto, {', '.join(LAYOUTS)}", found=repr(layout))
    path = Path(path)
    with _naming(path):
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no such file"
            raise CheckpointError("There is no weights file of this name", expected="a file", found=found)
        file = read_weights(path, ema)
        if layout == "auto":
            layout = detect_layout(file.state)
        manifest = None if file.manifest is None else Manifest.from_json(file.manifest)
        notes = file.notes
        if manifest is not None:
            spec = manifest.spec
        elif spec is None:
            spec = infer_spec(file.state, layout, heads)
            notes += (f"architecture read off the shapes, with a stem of stride {STEM_STRIDE}",)
        state, report = to_ours(file.state, layout, spec, headless=heads is not None, lenient=True)
        report.check()
    if file.ambiguous:
        how = f"For the others: efficientformer convert --ema {shlex.quote(str(path))} FILE"
        text = f"{path.name} holds averaged (EMA) weights too; took the plain ones. {how}"
        warnings.warn(text, WeightsWarning, stacklevel=2)
    report = dataclasses.replace(report, notes=(*notes, *report.notes))
    return Checkpoint(state, spec, layout, manifest, report, file.sha256, file.labels)


def save_native(
    path: str | Path, state: Mapping[str, Tensor], manifest: Manifest, *, dtype: torch.dtype | None = None
) -> None:
    """Write our own format: safetensors with the manifest in its metadata. The file appears whole or not at all.

    Args:
        path: The file, with suffix .safetensors.
        state: Our state dict of the network ``manifest.spec``.
        manifest: Architecture, preprocessing, labels, provenance.
        dtype: Storage type of floating-point tensors other than BatchNorm's statistics, such as ``torch.float16``; None
            keeps each as it is.

    Raises:
        UsageError: If the suffix or ``dtype`` is not what it must be.
        CheckpointError: If ``state`` is not the state dict of that network, or its values do not fit ``dtype``.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError("Our checkpoints are safetensors files", expected="a name in .safetensors", found=path.name)
    if dtype is not None and not dtype.is_floating_point:
        raise UsageError("Illegal storage type", expected="a floating-point type", found=str(dtype))
    to_ours(state, "native", manifest.spec)[1].check()
    _write(
        path,
        {name: _stored(name, tensor, None if name.endswith(STATISTICS) else dtype) for name, tensor in state.items()},
        {METADATA_KEY: manifest.to_json()},
    )


def save_foreign(
    path: str | Path, state: Mapping[str, Tensor], spec: ArchSpec, layout: str, labels: Sequence[str] = ()
) -> None:
    """Write weights as another project's code saves them: names, order, shapes, wrapper.

    Args:
        path: The file; .safetensors, or .pth, .pt, .bin, .pkl or .tar for ``torch.save``. A safetensors file is flat
            and keeps no order.
        state: Our state dict of the network ``spec``.
        spec: The network.
        layout: ``snap``, ``timm``, ``mmpretrain`` or ``transformers``.
        labels: Class names, which a pickle of mmpretrain's holds; other files hold none.

    Raises:
        UsageError: If the suffix is none of these, or the layout cannot say such a network.
        CheckpointError: If ``state`` is not the state dict of ``spec``, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
        expected = f"a name in .safetensors, {', '.join(PICKLE_SUFFIXES)}"
        raise UsageError("Unknown kind of weights file", expected=expected, found=path.name)
    if layout == "native":
        raise UsageError("Our own layout needs a manifest", hint="Use save_native")
    get_layout(layout, spec.family)
    _check_geometry(spec, layout)
    tensors = {name: _stored(name, tensor, None) for name, tensor in from_ours(state, layout, spec).items()}
    meta = {"dataset_meta": {"classes": list(labels)}} if labels else {}
    wrapped: dict[str, Any] = {"snap": {"model": tensors}, "mmpretrain": {"meta": meta, "state_dict": tensors}}
    _write(path, tensors, {"format": "pt"}, wrapped.get(layout, tensors))  # which older transformers insist on


def _check_geometry(spec: ArchSpec, layout: str) -> None:
    """Refuse what no tensor of a foreign file can say, and what its code would silently build otherwise."""
    if spec.stem_stride != STEM_STRIDE:
        found = f"stem stride {spec.stem_stride}"
    elif any(height != width for height, width in spec.attention_grids().values()):
        found = f"input {'x'.join(map(str, spec.input_size))}"
    else:
        return
    raise UsageError(
        f"The {layout} layout cannot say this network",
        expected=f"a stem of stride {STEM_STRIDE} and a square input",
        found=found,
        hint="The native layout can hold it",
    )


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a contiguous copy on the CPU that shares no memory with other tensors."""
    tensor = tensor.detach()
    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    stored = tensor.to("cpu", target, copy=True, memory_format=torch.contiguous_format)
    if not stored.isfinite().all():
        hint = "Use bfloat16, whose range is that of single precision" if tensor.isfinite().all() else ""
        raise CheckpointError(
            f"{name} holds values that are no numbers in {target}", expected="finite values", hint=hint
        )
    return stored


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], pickled: object = None) -> None:
    with atomic_write(path) as file:
        if path.suffix == ".safetensors":
            file.write(safetensors.torch.save(tensors, metadata))
        else:
            torch.save(pickled, file)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever is wrong with the content of a file into a CheckpointError that names the file."""
    try:
        yield
    except EfficientFormerError as error:
        raise CheckpointError(
            f"{path.name}: {error.problem}", expected=error.expected, found=error.found, hint=error.hint
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path.name}: The file cannot be read", found=reason_of(error)) from error
