"""Running networks from Python: on pictures and on data sets. Torch is imported by what needs it, when called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientformer.export.deployable import check_weights, deployable, file_of
from efficientformer.runtime.choice import choose
from efficientformer.runtime.classifier import EngineClassifier
from efficientformer.runtime.engines import (
    ENGINE_KEYS,
    ENGINES,
    PRECISIONS,
    Engine,
    check_threads,
    file_stamp,
    open_engine,
)
from efficientformer.runtime.image import Source
from efficientformer.spec.errors import UnknownModelError, UsageError, missing_extra
from efficientformer.spec.fields import check_choice
from efficientformer.spec.habits import ENGINE_WORDS
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.zoo import EMBEDDED, FILE_SUFFIXES, is_remote, name_of, resolve
from efficientformer.weights.beside import stamp_beside
from efficientformer.weights.cache import cache_root

if TYPE_CHECKING:
    from efficientformer.data.source import ImageSource
    from efficientformer.evaluation.evaluate import Progress
    from efficientformer.evaluation.result import Evaluation
    from efficientformer.weights.progress import Progress as DownloadProgress

_UNNAMED = "these weights do not name their classes: the data set's order of classes is taken for theirs"
_SEEN = (
    "pictures that this network was trained on may be among those measured; "
    "split val leaves them out, where it is the data set of the training"
)
_WHY_SEEN = {None: "the data set has no parts", "train": "this is the training part"}
_TRAINED_HERE = ("trained", "slimmed")  # sources of manifests whose training may have set its own pictures aside
TORCH_ENGINES = ("torch", "torch-compile")
EVALUATION_ENGINES = ("auto", "torch", *ENGINE_KEYS)


class Classifier(EngineClassifier):
    """Classifies pictures with a zoo network, a checkpoint of any layout, or an exported file.

    The first use of a zoo name or checkpoint builds an exported file, which needs the torch extra, and caches it. With
    ``engine="auto"`` the engines and precisions there are here are measured once for each file, and
    the fastest whose results are right is taken from then on; ``reason`` tells what was measured.

    One that runs an exported file can be copied, pickled, and used in forked processes: each opens the file anew, which
    must still be there unchanged.

    Args:
        model: A zoo name or alias, a weights file, an exported file, the folder of a run, ``hf-hub:OWNER/NAME``, or an
            address; by default the network in the package.
        checkpoint: A weights file to use instead of the zoo's weights.
        engine: ``auto`` or an engine's name: ``onnxruntime``, ``openvino``, ``torch``, ``torch-compile``. With a device
            other than the CPU, ``auto`` is ``torch``.
        precision: ``fp32``, ``bf16``, ``fp16``, ``int8`` (for a quantised network), or ``auto``.
        threads: CPU threads of the engine; None lets it choose.
        streams: Callers of an exported file's engine at a time, which share its threads. ``predict`` opens an engine
            with one stream a core when it is first given more than a few pictures; with as many here, the one that is
            open serves.
        device: For torch: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ...
        offline: Forbid (True) or allow (False) connections; None asks the environment.
        progress: Told how a download goes.

    Raises:
        EfficientFormerError: Of the kind that says what is wrong: an unknown name, missing weights, a damaged file.

    Examples:
        >>> classify = Classifier()
        >>> classify("cat.jpg").name
        'cat'
    """

    def __init__(
        self,
        model: str | Path = "",
        *,
        checkpoint: str | Path | None = None,
        engine: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        streams: int = 1,
        device: str = "auto",
        offline: bool | None = None,
        progress: DownloadProgress | None = None,
    ) -> None:
        model, device = name_of(model), str(device)  # torch.device is taken, too
        check_choice("engine", engine, (*ENGINES, *TORCH_ENGINES), ENGINE_WORDS)
        check_choice("precision", precision, PRECISIONS)
        check_threads(threads, streams)
        if engine == "auto" and device not in ("auto", "cpu"):
            engine = "torch"
        if engine in TORCH_ENGINES:
            compiled = engine == "torch-compile"
            in_torch = _in_torch(model, checkpoint, precision, device, offline, progress, threads, compiled=compiled)
            super().__init__(in_torch, reason="asked for")
            return
        _check_device(device)
        path = deployable(model, checkpoint=checkpoint, precision=precision, offline=offline, progress=progress)
        reason = "asked for"
        if engine == "auto":
            choice = choose(path, precision, threads=threads, store=cache_root() / "engines")
            engine, precision, reason = choice.engine, choice.precision, choice.reason
        opened = open_engine(path, engine, precision=precision, threads=threads, streams=streams)
        super().__init__(opened, reason=reason)


def inference_model(model: str | Path | EngineClassifier, image: Source) -> dict[str, Any]:
    """Classify one picture, as mmpretrain's function of this name does; a network named again is not built again.

    Args:
        model: A zoo name or alias, a weights or exported file, or a classifier.
        image: A path, the bytes of a file, an open binary file, a Pillow image, or a uint8 array (H, W, 3) in RGB
            order (mmpretrain's arrays are BGR).

    Returns:
        pred_label (index), pred_score (its probability), pred_class (its name) and pred_scores (every probability, an
        array of shape (num_classes,)).

    Raises:
        UnknownModelError: If no network has that name.
        ImageError: If the picture cannot be read.
    """
    if not isinstance(model, EngineClassifier):
        name = name_of(model)
        file = file_of(name)
        path = None if file is None else Path(file).absolute()  # not what a link leads to: its neighbours count
        model = _classifier(str(path or name), path and (file_stamp(path), stamp_beside(path)))
    return model(image).to_dict()


@lru_cache(maxsize=4)
def _classifier(model: str, _stamps: object) -> Classifier:
    """Open a network; one of a file, told from others of its name by stamps, is opened again once it changes."""
    return Classifier(model)


def evaluate_model(
    model: str | Path,
    data: str | Path,
    *,
    checkpoint: str | Path | None = None,
    split: str | None = None,
    engine: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    batch_size: int = 64,
    workers: int | None = None,
    keep_outcomes: bool = False,
    offline: bool | None = None,
    progress: Progress | None = None,
    download_progress: DownloadProgress | None = None,
) -> Evaluation:
    """Measure a network on a labelled data set: top-1, top-5, loss, per-class figures, confusions, calibration.

    Processes started by torchrun share the pictures; each returns the figures of the whole.

    Args:
        model: A zoo name or alias, mmpretrain's config (its name or path), a weights file of any layout, an exported
            file, or the folder that ``quantize`` wrote; empty for the network in the package.
        data: A data set in any layout that ``efficientformer.data.sources.open_source`` knows, such as a folder with a
            folder of pictures for each class.
        checkpoint: A weights file to use instead of the zoo's weights.
        split: Which part of the data: ``train``, ``val`` or ``test``; None takes val, test or train, the first there
            is, or else the whole. ``val`` of a data set without one is what the network's training set aside of it.
        engine: ``torch``, or the name of an engine for exported files; ``auto`` runs an exported file by its engine and
            all else in torch, or without torch as an exported file too.
        precision: ``fp32``, ``bf16`` or ``fp16``, where torch or the engine has it; ``int8`` runs the file that
            ``quantize`` made of the network; ``auto`` is single precision, or ``int8`` for a quantised file.
        device: ``auto``, ``cpu``, ``cuda``, ..., in torch.
        batch_size: Pictures per run of the network.
        workers: Threads that decode; None takes one per CPU, at most 16.
        keep_outcomes: Whether to keep what the network said of every picture, in ``outcomes``.
        offline: Forbid (True) or allow (False) connections; None asks the environment.
        progress: Told how many of this process's pictures are done, and how many there are.
        download_progress: Told how a download goes.

    Returns:
        The figures, the worst mistakes and the pictures that could not be read.

    Raises:
        UsageError: If the arguments make no sense together.
        DataError: If the data set is missing, empty, of no known layout, or of other classes than the network.
        EfficientFormerError: Of the kind that says what is wrong with the network.

    Examples:
        >>> evaluation = evaluate_model("efficientformer_l1", "imagenet", device="cuda")
        >>> evaluation.top1, evaluation.published.agrees
        (80.5, True)
    """
    from efficientformer.evaluation.distributed import join
    from efficientformer.evaluation.evaluate import evaluate

    name, device = _without_config(name_of(model)), str(device)
    part, source = _pictures(data, split)
    with join() as team:
        with team.first_alone():
            predictor = _predictor(name, checkpoint, engine, precision, device, offline, download_progress)
        source, notes = _for_network(predictor.manifest, data, part, source)
        team.check_same(source.digest)
        share = evaluate(
            predictor,
            source,
            batch_size=batch_size,
            workers=workers,
            rank=team.rank,
            world=team.world,
            progress=progress,
            keep_outcomes=keep_outcomes,
            model=_called(name, checkpoint),
            data=f"{data} ({part})" if part else str(data),
            notes=notes,
        )
        return team.merged(share)


def _pictures(data: str | Path, split: str | None) -> tuple[str | None, ImageSource | None]:
    """Return which part of a data set is measured, and its pictures.

    The part is the one asked for, or its stand-in; None if there are no parts. The pictures are None where ``val`` is
    asked for and there is neither it nor a stand-in: the network knows which its training set aside.
    """
    from efficientformer.data.sources import find_parts, open_source

    parts = find_parts(data)
    choice = {"val": ("val", "test"), "test": ("test", "val"), None: ("val", "test", "train")}.get(split, ())
    part = next((name for name in choice if name in parts), split)
    return part, None if part == "val" and part not in parts else open_source(data, part)


def _for_network(
    manifest: Manifest, data: str | Path, part: str | None, source: ImageSource | None
) -> tuple[ImageSource, list[str]]:
    """Return the pictures with a network's labels, and what a reader of its figures should know of them."""
    from efficientformer.data.align import align

    if source is None:
        source, note = _set_aside(data, manifest.provenance)
    else:
        seen = part in _WHY_SEEN and manifest.provenance.get("source") in _TRAINED_HERE
        note = f"{_WHY_SEEN[part]}: {_SEEN}" if seen else ""
    aligned = align(source, manifest.labels) if manifest.labels else source
    notes = (*aligned.notes, "" if manifest.labels else _UNNAMED, note)
    return aligned, [each for each in notes if each]


def _set_aside(data: str | Path, provenance: Mapping[str, str]) -> tuple[ImageSource, str]:
    """Return the pictures that a network's training set aside of a data set without a validation part, and a note.

    Raises:
        DataError: If the network does not say what was set aside.
    """
    from efficientformer.data.sources import open_source, open_splits

    try:
        fraction, seed = float(provenance["val_fraction"]), int(provenance["seed"])
    except (KeyError, ValueError):  # not trained here
        return open_source(data, "val"), ""
    splits = open_splits(data, fraction, seed)
    return splits.val, f"{splits.note}: what the network never learned from, if this is the data set of its training"


def _predictor(
    model: str,
    checkpoint: str | Path | None,
    engine: str,
    precision: str,
    device: str,
    offline: bool | None,
    progress: DownloadProgress | None,
) -> Engine:
    """Open a network in torch, or as an exported file; which of the two is settled here and nowhere else."""
    check_choice("engine", engine, EVALUATION_ENGINES, ENGINE_WORDS)
    exported = str(file_of(str(checkpoint or model), offline=offline)).endswith(".onnx")
    quantised = precision == "int8"  # a file that ``quantize`` made, whatever names the network
    if engine == "torch" or (engine == "auto" and not exported and not quantised and find_spec("torch") is not None):
        return _in_torch(model, checkpoint, precision, device, offline, progress)
    _check_device(device)
    path = deployable(model, checkpoint=checkpoint, precision=precision, offline=offline, progress=progress)
    opened = open_engine(path, engine, precision=precision)
    if precision == "auto" and opened.precision not in ("fp32", "int8"):  # figures are the network's, not a shortcut's
        return open_engine(path, opened.key, precision="fp32")
    return opened


def _check_device(device: str) -> None:
    """Raise UsageError if an exported file is to run on another device than the CPU."""
    if device not in ("auto", "cpu"):
        raise UsageError("Only torch lets you choose the device", found=f"device {device}", hint="Use engine torch")


def _in_torch(
    model: str,
    checkpoint: str | Path | None,
    precision: str,
    device: str,
    offline: bool | None,
    progress: DownloadProgress | None,
    threads: int | None = None,
    *,
    compiled: bool = False,
) -> Engine:
    """Open a network in torch, in deploy form."""
    check_weights(model, checkpoint)
    name = file_of(model, offline=offline) or model or str(checkpoint or EMBEDDED)
    if name.endswith(".onnx") or str(checkpoint).endswith(".onnx"):
        raise UsageError("An exported file does not run in torch", hint="Take another engine, or give its checkpoint")
    try:
        import torch
    except ImportError as error:
        raise missing_extra("torch", "Running a network in torch", error) from error
    from efficientformer.evaluation.torch_predictor import TorchPredictor, use_threads
    from efficientformer.models.fold import fold
    from efficientformer.weights.pretrained import build, load_named

    use_threads(threads)
    weights, manifest = load_named(name, checkpoint or True, offline=offline, progress=progress)
    network = fold(build(manifest.spec, weights)).to(memory_format=torch.channels_last)
    return TorchPredictor(network, manifest, device, precision, compiled=compiled)


def _without_config(model: str) -> str:
    """Return the network's name for mmpretrain's config, given as it was to tools/test.py: FOLDER/NAME.py."""
    name = model.removesuffix(".py")
    if model.endswith(FILE_SUFFIXES) or is_remote(model) or (name == model and Path(model).exists()):
        return model
    try:
        resolve(name or EMBEDDED)
    except UnknownModelError:
        return re.split(r"[\\/]", name)[-1]  # known or not: whoever resolves it says so
    return name


def _called(model: str, checkpoint: str | Path | None) -> str:
    """Return what to call a network in results: its canonical name, and the weights it was given."""
    weights = Path(checkpoint).name if checkpoint else ""
    if is_remote(model):
        return model
    if file_of(model) is not None:
        return Path(model).name
    if weights and not model:
        return weights
    name = resolve(model or EMBEDDED).card.name
    return f"{name} with {weights}" if weights else name
