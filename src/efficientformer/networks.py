"""Networks in torch: from a name or a file to a module, from pictures to its input, and back to a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from efficientformer.export.deployable import check_weights, deployable, file_of
from efficientformer.runtime.engines import open_engine
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import DownloadError, UsageError, require
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.spec.zoo import EMBEDDED, Resolved, is_file, name_of, names_weights, resolve

if TYPE_CHECKING:
    from efficientformer.data.transform import Transform
    from efficientformer.models.network import EfficientFormer
    from efficientformer.runtime.classifier import EngineClassifier
    from efficientformer.weights.checkpoint import Checkpoint

_OF_A_FILE = ("file", "sha256", "layout", "url", "described_by")  # parts of a provenance that hold of one file only


def get_model(
    model: str | Path | ArchSpec,
    *,
    pretrained: bool | str | Path | None = False,
    input_size: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    distilled: bool | None = None,
    drop_path_rate: float = 0.0,
    head_dropout: float = 0.0,
    layer_scale_init: float = 1e-5,
    offline: bool | None = None,
) -> EfficientFormer:
    """Build a network in torch, with or without weights.

    Args:
        model: A zoo name or alias, an ArchSpec, or a weights file of any layout (which is then loaded), also as
            ``hf-hub:OWNER/NAME`` or an address, whose weights are loaded as well.
        pretrained: True for the published weights; a path for those of a checkpoint of any layout.
        input_size: Side in pixels, or (height, width), if other than the weights'; attention-bias tables are resampled
            for it, with a warning.
        num_classes: Classes, if other than the weights'; the heads are then new, with a warning. For a name, the
            weights may then have no heads.
        in_chans: Input channels. With 1, the stem of weights for colours is summed over them, with a warning.
        distilled: Whether to have a distillation head; False leaves a checkpoint's out, with a warning.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        head_dropout: Dropout before the heads, in training.
        layer_scale_init: First value of the layer scales, without weights.
        offline: Forbid (True) or allow (False) connections; None asks the environment.

    Returns:
        The network in train form and evaluation mode: images (B, in_chans, H, W) to logits (B, num_classes). Its
        ``manifest`` says how pictures are prepared for it (``transform``) and goes into its file (``save_model``).

    Raises:
        MissingExtraError: If torch is not installed.
        UnknownModelError: If no network has that name.
        UsageError: If two weights files are given.
        SpecError: If the network asked for is illegal.
        CheckpointError: If the weights cannot be read or do not fit.
        DownloadError: If the weights cannot be fetched.
    """
    require("torch", "Building a network in torch", "torch")
    from efficientformer.weights.pretrained import Overrides, build, load_named
    from efficientformer.weights.progress import terminal_progress

    if not isinstance(model, ArchSpec):
        model = file_of(name_of(model), offline=offline) or name_of(model)
    if not pretrained:
        pretrained = isinstance(model, str) and names_weights(model)
    if isinstance(model, str) and not isinstance(pretrained, bool):
        check_weights(model, pretrained)
    overrides = Overrides(input_size, num_classes, in_chans, distilled)
    checkpoint: Checkpoint | None = None
    manifest: Manifest | None = None
    if pretrained is not False or (isinstance(model, str) and is_file(model)):
        with terminal_progress() as progress:
            checkpoint, manifest = load_named(
                model, pretrained, offline=offline, progress=progress, num_classes=num_classes
            )
    elif isinstance(model, str):
        manifest = _untrained(resolve(model))
    spec = model if isinstance(model, ArchSpec) else cast("Manifest", manifest).spec
    network = build(
        overrides.apply(spec),
        checkpoint,
        drop_path_rate=drop_path_rate,
        head_dropout=head_dropout,
        layer_scale_init=layer_scale_init,
    )
    network.manifest = manifest and manifest.with_spec(network.spec)
    return network.eval()


def _untrained(found: Resolved) -> Manifest:
    """Return the manifest of a zoo network without weights: fed as those it would be given first are, no classes."""
    published = found.card.manifest(found.source or found.card.best_source)
    return dataclasses.replace(published, labels=(), metrics={}, provenance={"model": found.card.name})


def save_model(
    network: EfficientFormer,
    path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    preprocess: PreprocessSpec | None = None,
) -> None:
    """Write a network to a file that needs nothing beside it: weights, preprocessing and class names.

    ``get_model``, ``Classifier``, ``evaluate_model``, ``train`` and the commands take it. Figures measured before are
    left out: the weights may have been trained since.

    Args:
        network: A network in train form, as ``get_model`` returns it.
        path: The file, with suffix .safetensors; it appears whole or not at all.
        labels: Class names in order of the logits, such as ``ImageFolder``'s ``classes``; None keeps those known.
        preprocess: How pictures are prepared; None keeps what is known.

    Raises:
        UsageError: If it is no network in train form, nothing says how it is fed, or the suffix is another.
        SpecError: If names or preprocessing do not fit the network.
        CheckpointError: If parts of the network are no longer those of its spec, or hold no numbers.
    """
    from efficientformer.models.network import EfficientFormer
    from efficientformer.weights.checkpoint import save_native

    if not isinstance(cast("object", network), EfficientFormer):
        hint = "Of one that is wrapped give what is inside: network.module, or network._orig_mod of a compiled one"
        found = f"a {type(network).__name__}"
        raise UsageError(
            "This cannot be saved", expected="a network in train form, of get_model", found=found, hint=hint
        )
    known = network.manifest or Manifest(network.spec, preprocess or _preprocess_of(network))
    provenance = {name: text for name, text in known.provenance.items() if name not in _OF_A_FILE}
    if digest := known.provenance.get("sha256"):
        provenance["started_from"] = digest
    names: Any = known.labels if labels is None else labels  # the manifest checks them
    manifest = Manifest(network.spec, preprocess or known.preprocess, names, {}, provenance)
    save_native(path, network.state_dict(), manifest)


def transform(model: str | Path | EfficientFormer | EngineClassifier) -> Transform:
    """Return what turns a picture into a network's input, for loops of one's own: nothing is downloaded.

    Args:
        model: A zoo name or alias, a weights or exported file, a network of ``get_model``, or a classifier.

    Returns:
        A callable that takes a picture (a path, bytes, a binary file, a Pillow image, or a uint8 array in RGB order) to
        the tensor (C, H, W), float32, that ``Classifier`` feeds. It can be pickled.

    Raises:
        UnknownModelError: If no network has that name.
        UsageError: If nothing says how the network is fed.
        CheckpointError, EngineError: If the file cannot be read.

    Examples:
        >>> pictures = torchvision.datasets.ImageFolder("photos", transform=transform("efficientformer_l1"))
    """
    require("torch", "Turning pictures into tensors", "torch")
    from efficientformer.data.transform import Transform

    return Transform(_preprocess_of(model))


def _preprocess_of(model: object) -> PreprocessSpec:
    """Return how a network in memory, in a file, or of a name is fed."""
    from efficientformer.weights.pretrained import load_named

    if hasattr(model, "manifest"):
        if isinstance(model.manifest, Manifest):
            return model.manifest.preprocess
        raise UsageError(
            "Nothing says how this network is fed",
            expected="one of a name or a file",
            found="one made of a spec",
            hint="Say it: Transform(PreprocessSpec(...)) of efficientformer.data.transform; save_model(preprocess=...)",
        )
    name = name_of(model) or EMBEDDED
    file = file_of(name) or ""
    if file.endswith(".onnx"):
        return open_engine(deployable(file), "onnxruntime").manifest.preprocess
    try:
        return load_named(file or name, True, offline=True)[1].preprocess  # of several weights those that are here
    except DownloadError:
        return _untrained(resolve(name)).preprocess
