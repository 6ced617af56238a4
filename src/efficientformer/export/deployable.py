"""From a name, checkpoint or exported file to a file an engine can run, built once and then cached.

Only building needs torch. Finding what was built before does not, so a second prediction never imports it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from efficientformer.runtime.engines import open_engine
from efficientformer.spec.errors import CheckpointError, EngineError, UsageError, require
from efficientformer.spec.zoo import (
    EMBEDDED,
    FILE_SUFFIXES,
    ModelCard,
    WeightsSource,
    is_file,
    is_name,
    is_remote,
    networks_in,
    resolve,
)
from efficientformer.weights.beside import stamp_beside
from efficientformer.weights.cache import Cache, cache_root, writing_to
from efficientformer.weights.kinds import check_kind
from efficientformer.weights.progress import Progress, terminal_progress

if TYPE_CHECKING:
    from efficientformer.spec.manifest import Manifest
    from efficientformer.weights.checkpoint import Checkpoint

FORMAT = 1  # raised when the exporter changes what it writes, so that older cached files are built again
SUFFIX = ".onnx"


def deployable(
    model: str = "",
    *,
    checkpoint: str | Path | None = None,
    precision: str = "auto",
    offline: bool | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return an exported file for a network, building it from its weights if there is none yet.

    Args:
        model: A zoo name or alias, a weights file of any layout, or an exported file; without it and without a
            checkpoint, the network shipped in the package.
        checkpoint: A weights file or exported file to use instead of the zoo's weights.
        precision: ``int8`` asks for the file that ``quantize`` made of the network; all others get the float file.
        offline: Forbid (True) or allow (False) connections; None asks the environment.
        progress: Told how a download goes.

    Raises:
        UsageError: If two weights files are given.
        UnknownModelError: If ``model`` is neither in the zoo nor a file.
        EngineError: If the network was not quantised yet.
        MissingExtraError: If the file must be built and torch is not installed.
        CheckpointError, DownloadError, ExportError: If the weights cannot be read, fetched or exported.
    """
    model, checkpoint = _told_apart(model, checkpoint, offline)
    if precision == "int8" and not _is_exported(checkpoint):
        return _require_quantised(quantised_file(model, checkpoint=checkpoint), str(checkpoint or model or EMBEDDED))
    if (ready := ready_file(model, checkpoint=checkpoint)) is not None:
        return ready
    if checkpoint is not None:
        return _build_file(model, Path(checkpoint))
    found = resolve(model)
    return _build_named(found.card, found.source, offline, progress)


def ready_file(model: str = "", *, checkpoint: str | Path | None = None, offline: bool | None = None) -> Path | None:
    """Return the float file that ``deployable`` finds of a network; None if it would have to build one.

    Args:
        model: As for ``deployable``.
        checkpoint: As for ``deployable``.
        offline: As for ``deployable``.

    Raises:
        As ``quantised_file``; DownloadError if what lies elsewhere cannot be fetched.
    """
    model, checkpoint = _told_apart(model, checkpoint, offline)
    if checkpoint is not None:
        file = _existing(Path(checkpoint))
        kept = file if _is_exported(file) else _kept_for(model, file)
        return kept if kept.exists() else None
    found = resolve(model or EMBEDDED)
    return embedded_file() if found.card.name == EMBEDDED else _built_before(found.card, found.source)


def embedded_file() -> Path:
    """Return the exported file of the network shipped in the package."""
    return Path(__file__).parent.parent / "assets" / f"{EMBEDDED}{SUFFIX}"


def quantised_file(model: str, *, checkpoint: str | Path | None = None) -> Path | None:
    """Return the int8 file that ``quantize`` made of a network; None if there is none.

    Of the network in the package it is the user's own if there is one, else the one that is shipped.

    Args:
        model: As for ``deployable``.
        checkpoint: As for ``deployable``.

    Raises:
        UsageError: If two weights files are given.
        UnknownModelError: If ``model`` is neither in the zoo nor a file.
        CheckpointError: If there is no such file.
    """
    kept = quantised_target(model, checkpoint=checkpoint)
    if kept is None or kept.exists():
        return kept
    return embedded_file().with_name(f"{EMBEDDED}-int8{SUFFIX}") if kept.parent.name == EMBEDDED else None


def quantised_target(model: str, *, checkpoint: str | Path | None = None) -> Path | None:
    """Return where in the cache the int8 file of a network is to be kept, never in the package.

    Each set of weights has a place of its own: beside the float file that the name stands for now, or named after the
    weights file, under whatever model's name that was given.

    Args:
        model: As for ``deployable``.
        checkpoint: As for ``deployable``.

    Returns:
        The place; None for an exported file, and while there is no float file of the name.

    Raises:
        As ``quantised_file``.
    """
    model, checkpoint = _told_apart(model, checkpoint)
    if checkpoint is not None:
        file = _existing(Path(checkpoint))
        return None if _is_exported(file) else _kept_for("", file, "int8")
    found = resolve(model or EMBEDDED)
    if found.card.name == EMBEDDED:
        return _own_int8()
    built = _built_before(found.card, found.source)
    return None if built is None else _int8_beside(built)


def _own_int8() -> Path:
    """Return the place of the user's int8 file of the network in the package: of this one, not of another version's."""
    digest = hashlib.sha256(embedded_file().read_bytes()).hexdigest()[:16]
    return _folder() / EMBEDDED / f"{digest}-int8{SUFFIX}"


def _int8_beside(built: Path) -> Path:
    return built.with_name(f"{built.stem}-int8{SUFFIX}")


def check_weights(model: str, checkpoint: str | Path | None) -> None:
    """Check that a name and a weights file are not two weights files.

    Raises:
        UsageError: If they are.
        UnknownModelError: If the name beside a weights file is not in the zoo.
    """
    if checkpoint is None or not model:
        return
    if is_remote(model) or file_of(model) is not None:
        raise UsageError("Two weights files", expected="a name and a weights file", found=f"{model} and {checkpoint}")
    resolve(model)


def _told_apart(
    model: str, checkpoint: str | Path | None, offline: bool | None = None
) -> tuple[str, str | Path | None]:
    """Return name and weights file, also if the name is a file: one, or the folder that holds it."""
    check_weights(model, checkpoint)
    if checkpoint is not None and is_remote(os.fspath(checkpoint)):
        checkpoint = file_of(os.fspath(checkpoint), offline=offline)
    file = file_of(model, offline=offline)
    return ("", file) if checkpoint is None and file is not None else (model, checkpoint)


def file_of(model: str, *, offline: bool | None = None) -> str | None:
    """Return the file that a model's name is, or that is meant by the folder, repository or address of that name.

    That is the file that ``quantize`` leaves in a folder, or else the best weights of a run of training or slimming; of
    a run in a folder that is called as a network of the zoo is, the network is meant. What lies elsewhere is fetched
    when a process first names it.

    Args:
        model: Any name of a network.
        offline: Forbid (True) or allow (False) connections; None asks the environment.

    Returns:
        The file, which need not exist if the name is plainly meant as a path; None for a name of the zoo, and for the
        folder of a run with several networks.

    Raises:
        UsageError, DownloadError: If what lies elsewhere is no network or cannot be fetched.
    """
    if is_remote(model):
        from efficientformer.weights.remote import fetch_remote

        with terminal_progress() as progress:
            return str(fetch_remote(model, offline=offline, progress=progress))
    if is_name(model):  # ./l1 is a file or folder, l1 the network
        return None
    if is_file(model) or (model.endswith(FILE_SUFFIXES) and not os.path.isdir(model)):  # noqa: PTH112 (as below)
        return model
    if model and os.path.isfile(_inside(model)):  # noqa: PTH113 (as below)
        return str(_inside(model))
    networks = networks_in(model)
    return str(networks[0]) if len(networks) == 1 else None


def _inside(folder: str) -> Path:
    return Path(folder) / f"model{SUFFIX}"


def _is_exported(checkpoint: str | Path | None) -> bool:
    return checkpoint is not None and Path(checkpoint).suffix.lower() == SUFFIX


def _require_quantised(path: Path | None, name: str) -> Path:
    if path is not None:
        return path
    raise EngineError(
        f"{name} was not quantised yet",
        expected="an int8 file made on your pictures",
        hint=f"Make it: efficientformer quantize {name} --data PICTURES --output {Path(name).stem}-int8",
    )


def _existing(file: Path) -> Path:
    if not os.path.isfile(file):  # noqa: PTH113 (as above)
        raise CheckpointError(
            f"There is no weights file {file}",
            expected="a weights file (.safetensors, .pth, .bin) or an exported file (.onnx)",
            found="a folder" if os.path.isdir(file) else "nothing of that name that can be read",  # noqa: PTH112
        )
    return file


def _kept_for(model: str, file: Path, kind: str = "") -> Path:
    """Return where what is built of a weights file is kept: another name for another content."""
    stat = file.stat()
    parts = (str(file.resolve()), str(stat.st_size), str(stat.st_mtime_ns), model)
    identity = "|".join((*parts, *filter(None, (kind, stamp_beside(file)))))
    return _folder() / "files" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}{SUFFIX}"


def _build_file(model: str, file: Path) -> Path:
    check_kind(file)  # before torch is asked for, which would not help
    _require_torch(str(file))
    from efficientformer.weights.pretrained import load_named

    target = _kept_for(model, file)
    checkpoint, manifest = load_named(model or str(file), file)
    _export(checkpoint, manifest, target)
    return target


def _folder() -> Path:
    return cache_root() / "deploy" / f"v{FORMAT}"


def _target(card: ModelCard, source: WeightsSource) -> Path:
    return _folder() / card.name / f"{source.name}{SUFFIX}"


def _built_before(card: ModelCard, source: WeightsSource | None) -> Path | None:
    """Return a file built from the weights that are in the cache now (or were, if they have been removed)."""
    cache = Cache()
    for candidate in card.sources if source is None else (source,):
        target, weights = _target(card, candidate), cache.path(card.name, candidate)
        if weights.exists():  # those that torch takes, too, whatever was built of others
            return target if target.exists() and weights.stat().st_mtime <= target.stat().st_mtime else None
        if target.exists():
            return target
    return None


def _build_named(
    card: ModelCard, source: WeightsSource | None, offline: bool | None, progress: Progress | None
) -> Path:
    _require_torch(card.name)
    from efficientformer.weights.pretrained import load_published

    checkpoint, manifest = load_published(card, source, offline=offline, progress=progress)
    taken = card.source(manifest.provenance["source"])
    assert taken is not None
    target = _target(card, taken)
    if not _is_of(target, checkpoint):  # then neither is the int8 file beside it
        with writing_to(target.parent):
            _int8_beside(target).unlink(missing_ok=True)
    _export(checkpoint, manifest, target)
    return target


def _is_of(target: Path, checkpoint: Checkpoint) -> bool:
    """Whether a built file is of these weights: a copied cache has other times."""
    if not target.exists():
        return False
    try:
        built = open_engine(target, "onnxruntime").manifest.provenance
    except EngineError:
        return False
    return built.get("sha256") == checkpoint.sha256


def _export(checkpoint: Checkpoint, manifest: Manifest, target: Path) -> None:
    from efficientformer.export.onnx import export_onnx
    from efficientformer.weights.pretrained import build

    with writing_to(target.parent):  # found out here: export_onnx would name a file that nobody asked for
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
        export_onnx(build(manifest.spec, checkpoint), manifest, target)


def _require_torch(model: str) -> None:
    require("torch", f"Preparing {model} for its first prediction", "torch")
