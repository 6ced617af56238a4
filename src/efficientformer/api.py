"""The Python interface: what ``import efficientformer`` offers. Torch is imported by what needs it, when called."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientformer.export.deployable import deployable
from efficientformer.runtime.classifier import FileClassifier
from efficientformer.runtime.image import Source
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import missing_extra
from efficientformer.spec.zoo import resolve

if TYPE_CHECKING:
    from efficientformer.models.network import EfficientFormer


class Classifier(FileClassifier):
    """Classifies pictures with a zoo network, a checkpoint of any layout, or an exported file.

    The first use of a zoo name or checkpoint builds an exported file, which needs the torch extra, and caches it.

    Args:
        model: A zoo name or alias, a weights file, or an exported file; by default the network in the package.
        checkpoint: A weights file to use instead of the zoo's weights.
        engine: ``auto`` or an engine's name.
        threads: CPU threads of the engine; None lets it choose.
        offline: Forbid (True) or allow (False) connections; None asks the environment.

    Raises:
        EfficientFormerError: Of the kind that says what is wrong: an unknown name, missing weights, a damaged file.

    Examples:
        >>> classify = Classifier()
        >>> classify("cat.jpg").name
        'cat'
    """

    def __init__(
        self,
        model: str = "",
        *,
        checkpoint: str | Path | None = None,
        engine: str = "auto",
        threads: int | None = None,
        offline: bool | None = None,
    ) -> None:
        super().__init__(deployable(model, checkpoint=checkpoint, offline=offline), engine=engine, threads=threads)


def inference_model(model: str | FileClassifier, image: Source) -> dict[str, Any]:
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
    classifier = model if isinstance(model, FileClassifier) else _classifier(str(model))
    return classifier(image).to_dict()


@lru_cache(maxsize=4)
def _classifier(model: str) -> Classifier:
    return Classifier(model)


def get_model(
    model: str | ArchSpec,
    *,
    pretrained: bool | str | Path = False,
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
        model: A zoo name or alias, an ArchSpec, or a weights file of any layout (which is then loaded).
        pretrained: True for the published weights; a path for those of a checkpoint of any layout.
        input_size: Side in pixels, or (height, width), if other than the weights'; attention-bias tables are resampled
            for it, with a warning.
        num_classes: Classes, if other than the weights'; the heads are then new, with a warning.
        in_chans: Input channels.
        distilled: Whether to have a distillation head; False leaves a checkpoint's out, with a warning.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        head_dropout: Dropout before the heads, in training.
        layer_scale_init: First value of the layer scales, without weights.
        offline: Forbid (True) or allow (False) connections; None asks the environment.

    Returns:
        The network in train form and evaluation mode: images (B, in_chans, H, W) to logits (B, num_classes).

    Raises:
        MissingExtraError: If torch is not installed.
        UnknownModelError: If no network has that name.
        SpecError: If the network asked for is illegal.
        CheckpointError: If the weights cannot be read or do not fit.
        DownloadError: If the weights cannot be fetched.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise missing_extra("torch", "Building a network in torch", error) from error
    from efficientformer.weights.cache import terminal_progress
    from efficientformer.weights.pretrained import Overrides, build, load_named

    size = tuple(input_size) if isinstance(input_size, Sequence) else input_size
    overrides = Overrides(size, num_classes, in_chans, distilled)  # type: ignore[arg-type]  # checked by apply
    checkpoint = None
    if pretrained is False and not (isinstance(model, str) and Path(model).is_file()):
        spec = model if isinstance(model, ArchSpec) else resolve(model).card.spec
    else:
        with terminal_progress() as progress:
            checkpoint, manifest = load_named(model, pretrained, offline=offline, progress=progress)
        spec = manifest.spec
    network = build(
        overrides.apply(spec),
        checkpoint,
        drop_path_rate=drop_path_rate,
        head_dropout=head_dropout,
        layer_scale_init=layer_scale_init,
    )
    return network.eval()
