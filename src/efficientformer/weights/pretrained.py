"""From a name or a file to a network with its weights, and to the manifest that goes with them."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from efficientformer.models.network import EfficientFormer
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import CheckpointError, SpecError, UsageError
from efficientformer.spec.fields import as_pair, as_plain
from efficientformer.spec.labels import label_names
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import IMAGENET_MEAN, PreprocessSpec
from efficientformer.spec.zoo import EMBEDDED, LAYOUT_PREPROCESS, ModelCard, WeightsSource, is_file, is_remote, resolve
from efficientformer.weights.beside import known_labels, read_beside
from efficientformer.weights.checkpoint import Checkpoint, WeightsWarning, load_checkpoint
from efficientformer.weights.download import fetch
from efficientformer.weights.embedded import embedded_weights
from efficientformer.weights.loading import load_into
from efficientformer.weights.progress import Progress
from efficientformer.weights.remote import fetch_remote


@dataclass(frozen=True, slots=True)
class Overrides:
    """What a caller wants other than the weights' network; None keeps what it has.

    Attributes:
        input_size: Side in pixels, or (height, width).
        num_classes: Classes; another number than the checkpoint's gives new heads.
        in_chans: Input channels.
        distilled: Whether to have a distillation head.
    """

    input_size: int | Sequence[int] | None = None
    num_classes: int | None = None
    in_chans: int | None = None
    distilled: bool | None = None

    def apply(self, spec: ArchSpec) -> ArchSpec:
        """Return ``spec`` with these changes.

        Raises:
            SpecError: If that is no legal network.
        """
        given = {field.name: as_plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if self.input_size is not None:
            given["input_size"] = as_pair("input size", self.input_size)
        return dataclasses.replace(spec, **{name: value for name, value in given.items() if value is not None})


def find_weights(
    card: ModelCard,
    source: WeightsSource | None = None,
    *,
    offline: bool | None = None,
    progress: Progress | None = None,
) -> tuple[Path, WeightsSource | None]:
    """Return a local file with a card's weights, downloading it if need be, and the source it is of.

    Args:
        card: The network.
        source: Whose weights; None tries all, best first.
        offline: Forbid (True) or allow (False) connections; None asks the environment.
        progress: Told how the download goes.

    Raises:
        DownloadError: If no source delivers.
    """
    if card.name == EMBEDDED:
        return embedded_weights(), None
    sources = card.sources if source is None else (source,)
    path = fetch(card.name, sources, offline=offline, progress=progress)
    return path, card.source(path.parent.name)  # the cache keeps each source in a folder of its name


def load_published(
    card: ModelCard,
    source: WeightsSource | None = None,
    *,
    offline: bool | None = None,
    progress: Progress | None = None,
    ema: bool | None = None,
) -> tuple[Checkpoint, Manifest]:
    """Read a card's own weights, downloading them if need be, with the preprocessing and figures of their source.

    Raises:
        DownloadError: If no source delivers.
        CheckpointError: If the file is damaged or holds another network.
    """
    path, taken = find_weights(card, source, offline=offline, progress=progress)
    checkpoint = load_checkpoint(path, ema=ema)
    _check_same_network(checkpoint, card, path)
    return checkpoint, describe(checkpoint, path, card, taken)


def describe(
    checkpoint: Checkpoint, path: Path, card: ModelCard | None = None, source: WeightsSource | None = None
) -> Manifest:
    """Return the manifest of a checkpoint: its own, or what its card, layout and shapes say.

    Args:
        checkpoint: The weights.
        path: Their file, for the provenance.
        card: The zoo card they are known to belong to, if any.
        source: The published source they came from, if any.
    """
    if (own := checkpoint.manifest) is not None:
        if source is None:
            return own
        return dataclasses.replace(own, provenance={**own.provenance, "source": source.name})  # put there by hand
    spec = checkpoint.spec
    provenance = {"file": path.name, "sha256": checkpoint.sha256, "layout": checkpoint.layout}
    if card is not None and source is not None:
        published = card.manifest(source)
        return dataclasses.replace(published, spec=spec, provenance={**published.provenance, **provenance})
    preprocess, usual_labels = LAYOUT_PREPROCESS.get(checkpoint.layout, PreprocessSpec()), label_names("imagenet1k")
    if card is not None and not card.sources:  # the network in the package, which is not for ImageNet
        own = card.manifest(None)
        preprocess, usual_labels = own.preprocess, own.labels
    if spec.in_chans == 1:
        preprocess = preprocess.grey()
    elif spec.in_chans != len(IMAGENET_MEAN):
        raise SpecError(
            "Pictures have 1 or 3 channels", expected="a network with in_chans 1 or 3", found=f"{spec.in_chans}"
        )
    beside = read_beside(path, checkpoint.layout, spec)
    provenance |= {"described_by": ", ".join(beside.files)} if beside.files else {}
    preprocess = beside.preprocess or preprocess.with_input_size(spec.input_size)
    spec = spec.with_input_size(preprocess.input_size)
    return Manifest(spec, preprocess, _class_names(checkpoint, beside.labels, usual_labels), {}, provenance)


def _class_names(checkpoint: Checkpoint, beside: tuple[str, ...], usual: tuple[str, ...]) -> tuple[str, ...]:
    """Return the class names said beside a file or in it; else the usual ones, if it has as many."""
    if checkpoint.headless:  # there are no classes yet
        return ()
    classes = checkpoint.spec.num_classes
    said = beside or known_labels(checkpoint.labels)
    if said and len(said) != classes:
        text = f"The names of {len(said)} classes are left out: the network has {classes}, so they are of another one"
        warnings.warn(text, WeightsWarning, stacklevel=3)
        said = ()
    return said or (usual if classes == len(usual) else ())


def load_named(
    model: str | ArchSpec,
    pretrained: bool | str | Path,
    *,
    offline: bool | None = None,
    progress: Progress | None = None,
    ema: bool | None = None,
    num_classes: int | None = None,
) -> tuple[Checkpoint, Manifest]:
    """Read the weights for ``get_model``: a zoo network's own, or those of a file that must fit it.

    Args:
        model: A zoo name, a weights file, also of a repository or an address, or a spec (for weights of that
            architecture).
        pretrained: True for the zoo's weights, or a weights file of any layout.
        offline: Forbid (True) or allow (False) connections; None asks the environment.
        progress: Told how a download goes.
        ema: Take the averaged weights of a training checkpoint.
        num_classes: Classes of the new heads, where a file for a zoo network has none.

    Raises:
        UsageError: If there is nothing to load.
        CheckpointError: If the file holds another network.
        DownloadError: If no source delivers.
    """
    if isinstance(model, str) and is_remote(model):
        model = str(fetch_remote(model, offline=offline, progress=progress))
    if not isinstance(pretrained, bool) and is_remote(os.fspath(pretrained)):
        pretrained = fetch_remote(os.fspath(pretrained), offline=offline, progress=progress)
    if isinstance(model, ArchSpec):
        if pretrained is True:
            raise UsageError("A spec has no published weights", hint="Give a file: pretrained='FILE'")
        path, card = Path(str(pretrained)), None
    elif is_file(model):
        path, card = Path(model), None
    else:
        found = resolve(model)
        if pretrained is True:
            return load_published(found.card, found.source, offline=offline, progress=progress, ema=ema)
        path, card = Path(str(pretrained)), found.card
    heads = Overrides(num_classes=num_classes).apply(card.spec) if card and num_classes is not None else None
    checkpoint = load_checkpoint(path, ema=ema, spec=model if isinstance(model, ArchSpec) else None, heads=heads)
    if card is not None:
        _check_same_network(checkpoint, card, path)
        checkpoint = _with_stem_of(checkpoint, card)
    elif checkpoint.layout == "native" and checkpoint.manifest is None and not isinstance(model, ArchSpec):
        text = f"{path.name} does not say its stem's stride: {checkpoint.spec.stem_stride} is assumed, as published"
        warnings.warn(f"{text}; name the network too if it has another", WeightsWarning, stacklevel=2)
    return checkpoint, describe(checkpoint, path, card)


def build(
    spec: ArchSpec,
    checkpoint: Checkpoint | None,
    *,
    drop_path_rate: float = 0.0,
    head_dropout: float = 0.0,
    layer_scale_init: float = 1e-5,
) -> EfficientFormer:
    """Build a network and load weights into it, if any; heads for other classes start anew and say so.

    Raises:
        CheckpointError: If the weights do not fit.
    """
    model = EfficientFormer(
        spec, drop_path_rate=drop_path_rate, head_dropout=head_dropout, layer_scale_init=layer_scale_init
    )
    if checkpoint is not None:
        new_heads = checkpoint.headless or checkpoint.spec.num_classes != spec.num_classes
        load_into(model, checkpoint, reset_head=new_heads, drop_dist_head=not spec.distilled)
    return model


def _with_stem_of(checkpoint: Checkpoint, card: ModelCard) -> Checkpoint:
    """Return the checkpoint with the stem stride of its card, which no foreign file says, and the size that fits it."""
    found, stride = checkpoint.spec, card.spec.stem_stride
    if checkpoint.manifest is not None or found.stem_stride == stride:
        return checkpoint
    height, width = (side * stride // found.stem_stride for side in found.input_size)
    return dataclasses.replace(
        checkpoint, spec=dataclasses.replace(found, stem_stride=stride, input_size=(height, width))
    )


def _check_same_network(checkpoint: Checkpoint, card: ModelCard, path: Path) -> None:
    found, expected = checkpoint.spec, card.spec
    if (found.family, found.stages, found.attention) == (expected.family, expected.stages, expected.attention):
        return
    widths = [stage.width for stage in found.stages], [stage.width for stage in expected.stages]
    depths = [len(stage.blocks) for stage in found.stages], [len(stage.blocks) for stage in expected.stages]
    raise CheckpointError(
        f"{path} holds another network than {card.name}",
        expected=f"{expected.family}, widths {widths[1]}, blocks {depths[1]}",
        found=f"{found.family}, widths {widths[0]}, blocks {depths[0]}",
        hint="To load it as what it is, give the file as the model: get_model('FILE')",
    )
