"""``efficientformer convert``: weights from any layout to any other, or to a file that needs no torch."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from efficientformer.spec.manifest import Manifest
    from efficientformer.weights.checkpoint import Checkpoint


class Layout(StrEnum):
    """What ``convert`` can write."""

    NATIVE = "native"
    TIMM = "timm"
    SNAP = "snap"
    MMPRETRAIN = "mmpretrain"
    TRANSFORMERS = "transformers"
    ONNX = "onnx"


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A weights file of any layout, or a zoo name.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    to: Annotated[
        Layout | None, typer.Option(help="Layout to write. By default: onnx for OUT in .onnx, else native.")
    ] = None,
    model: Annotated[str, typer.Option(help="Zoo network IN must hold; refuses anything else.")] = "",
    input_size: Annotated[int | None, typer.Option(help="Other input side in pixels.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Text file with the names of the classes, one per line.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take a training checkpoint's averaged weights.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Store weights in half precision (native and onnx).")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Convert weights between layouts; to ONNX they are folded, and the file is compared with the network."""
    from efficientformer.export.deployable import file_of
    from efficientformer.spec.errors import UsageError, require
    from efficientformer.spec.labels import read_names
    from efficientformer.spec.zoo import is_file

    source = file_of(source) or source
    if to is None:
        to = Layout.ONNX if target.suffix == ".onnx" else Layout.NATIVE
    _check_target(target, to, force)
    if ema and not is_file(source):
        raise UsageError("Published weights have no averaged ones beside them", hint="Leave --ema out")
    ours = to in (Layout.NATIVE, Layout.ONNX)
    if half and not ours:
        raise UsageError(f"The {to} layout is written in single precision", hint="Leave --half out")
    pickled = to is Layout.MMPRETRAIN and target.suffix != ".safetensors"
    if labels and not (ours or pickled or _has_config(target, to)):
        hint = "Leave --labels out; mmpretrain's go into a .pth file, and timm's beside one called model.safetensors"
        raise UsageError(f"This file of the {to} layout holds no names of classes", hint=hint)
    names = read_names(labels) if labels else ()
    require("torch", "Converting weights", "torch")
    from efficientformer.weights.pretrained import load_named
    from efficientformer.weights.progress import terminal_progress

    with terminal_progress() as progress:
        if is_file(source):
            checkpoint, manifest = load_named(model or source, source, ema=ema or None, progress=progress)
        else:
            _check_same(source, model)
            checkpoint, manifest = load_named(source, True, progress=progress)
    if names:
        manifest = _with_labels(manifest, names)
    report = checkpoint.report
    typer.echo(
        f"read {checkpoint.layout}: {len(report.mapped)} tensors, {len(report.dropped)} left out by rule", err=True
    )
    for note in report.notes:
        typer.echo(f"  {note}", err=True)
    if _has_config(target, to):  # a folder of its own
        target.parent.mkdir(parents=True, exist_ok=True)
    typer.echo(_write(checkpoint, manifest, target, to, input_size, half), err=True)
    typer.echo(target)


def _check_same(name: str, model: str) -> None:
    """Raise UsageError if a network of the zoo is not the one that ``--model`` names."""
    from efficientformer.spec.errors import UsageError
    from efficientformer.spec.zoo import resolve

    if model and (expected := resolve(model).card.name) != (found := resolve(name).card.name):
        raise UsageError(f"{name} is another network", expected=expected, found=found, hint="Leave --model out")


def _check_target(target: Path, to: Layout, force: bool) -> None:
    from efficientformer.spec.errors import UsageError
    from efficientformer.spec.zoo import FOREIGN_SUFFIXES
    from efficientformer.weights.beside import CONFIG

    if target.suffix in FOREIGN_SUFFIXES:
        hint = "Write an .onnx file: ONNX Runtime and OpenVINO run it as it is, and others' converters read it"
        raise UsageError(f"{target.suffix} files are not written", found=str(target), hint=hint)
    if to is Layout.NATIVE and target.suffix != ".safetensors":
        hint = "--to writes other projects' layouts, under other endings too"
        raise UsageError(f"{target.name} has an unknown ending", expected=".safetensors or .onnx",
                         found=repr(target.suffix), hint=hint)  # fmt: skip
    written = (target, target.with_name(CONFIG)) if _has_config(target, to) else (target,)
    if (there := next((path for path in written if path.exists()), None)) and not force:
        raise UsageError(f"{there} exists", hint="Choose another name, or --force to replace it")


def _with_labels(manifest: Manifest, names: tuple[str, ...]) -> Manifest:
    import dataclasses

    from efficientformer.spec.errors import UsageError

    if len(names) != manifest.spec.num_classes:
        expected = f"{manifest.spec.num_classes} names, in order of the logits"
        raise UsageError("Other names than classes", expected=expected, found=f"{len(names)}")
    return dataclasses.replace(manifest, labels=names)


def _write(
    checkpoint: Checkpoint, manifest: Manifest, target: Path, to: Layout, input_size: int | None, half: bool
) -> str:
    """Write the file and say what was written."""
    import torch

    from efficientformer.weights.checkpoint import save_foreign, save_native
    from efficientformer.weights.pretrained import build

    if input_size is not None:
        manifest = manifest.with_spec(manifest.spec.with_input_size(input_size))
    network = build(manifest.spec, checkpoint)
    if to is Layout.ONNX:
        from efficientformer.export.onnx import export_onnx

        agreement = export_onnx(network, manifest, target, half_storage=half)
        return (
            f"wrote onnx: {agreement.pictures} photographs compared with torch, largest difference of a logit "
            f"{agreement.max_difference:.1e} (largest logit {agreement.largest_logit:.2f})"
        )
    state = network.state_dict()
    if to is Layout.NATIVE:
        save_native(target, state, manifest, dtype=torch.float16 if half else None)
    else:
        save_foreign(target, state, manifest.spec, to.value, manifest.labels)
    return f"wrote {to}: {len(state)} tensors{_write_config(manifest, target) if _has_config(target, to) else ''}"


def _has_config(target: Path, to: Layout) -> bool:
    """Whether the file is one that timm finds in a folder of its own, with a configuration beside it."""
    from efficientformer.weights.beside import TIMM_FILES

    return to is Layout.TIMM and target.name in TIMM_FILES


def _write_config(manifest: Manifest, target: Path) -> str:
    """Write what timm wants beside a network, and say so."""
    from efficientformer.weights.beside import CONFIG, timm_config, untold_by_timm
    from efficientformer.weights.files import write_json

    config = timm_config(manifest)
    if config is None:
        return f"; no {CONFIG}, for timm can build or feed no such network"
    write_json(target.with_name(CONFIG), config)
    untold = untold_by_timm(manifest.preprocess)
    but = f", but for {' and '.join(untold)}, which timm has not" if untold else ""
    return f", and {CONFIG} with {'its classes and ' if manifest.labels else ''}how it is fed{but}"
