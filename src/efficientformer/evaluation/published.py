"""What was published of a network, beside what was measured: only where the two can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from efficientformer.spec.errors import UnknownModelError
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.spec.zoo import ModelCard, WeightsSource, cards, resolve

VALIDATION_IMAGES = 50_000  # ImageNet-1k's validation set, which every published figure of the zoo is of
TOLERANCE = 0.1  # points; decoders and libraries differ by a few hundredths


@dataclass(frozen=True)
class Published:
    """The figures published with a network's weights, and whether a measurement confirms them.

    Attributes:
        source: Whose figures: the name of a source in the zoo.
        top1: Published top-1 in percent.
        top5: Published top-5 in percent, if there is one.
        preprocess: The preprocessing they belong to.
        same_preprocess: Whether the measurement used it.
        whole: Whether the measurement is of the whole validation set; only then do the figures compare.
        agrees: Whether every published figure is within ``TOLERANCE`` of the measured; None if not ``whole``.
    """

    source: str
    top1: float
    top5: float | None
    preprocess: PreprocessSpec
    same_preprocess: bool
    whole: bool
    agrees: bool | None

    def describe(self) -> str:
        """Say in one sentence what was published and how the measurement stands to it."""
        figures = f"top-1 {self.top1:g} %" + (f", top-5 {self.top5:g} %" if self.top5 is not None else "")
        text = f"Published ({self.source}): {figures}, with {self.preprocess.describe()}"
        text += "" if self.same_preprocess else " (NOT the preprocessing used here)"
        if self.agrees is None:
            return f"{text}. Not comparable: these pictures are not the {VALIDATION_IMAGES:,} of the validation set."
        return f"{text}. Measured: {'agrees' if self.agrees else 'DIFFERS'} ({TOLERANCE} points are allowed)."

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**vars(self), "preprocess": self.preprocess.to_dict(), "tolerance": TOLERANCE}


def compare(manifest: Manifest, counts: Sequence[int], top1: float, top5: float | None) -> Published | None:
    """Return what was published of these weights, or None if they are not known to be of a published source.

    Args:
        manifest: Of the network that was measured.
        counts: How many pictures of each class were counted: 50 in the validation set.
        top1: Measured top-1 in percent.
        top5: Measured top-5 in percent.
    """
    source = _source_of(manifest)
    if source is None or source.top1 is None:
        return None
    whole = set(counts) == {VALIDATION_IMAGES // len(counts)}
    pairs = [(source.top1, top1), (source.top5, top5)]
    agrees = all(abs(a - b) <= TOLERANCE + 1e-9 for a, b in pairs if a is not None and b is not None)
    same = manifest.preprocess == source.preprocess
    return Published(source.name, source.top1, source.top5, source.preprocess, same, whole, agrees if whole else None)


def _source_of(manifest: Manifest) -> WeightsSource | None:
    """Return the source of the weights: what the manifest says, else the one whose file has this digest or name."""
    said = manifest.provenance
    if "published_top1" in manifest.metrics:
        card = _card(said.get("model", ""))
        return card.source(said.get("source", "")) if card else None
    digest, file, layout = (said.get(key, "") for key in ("sha256", "file", "layout"))
    for source in (source for card in cards() for source in card.sources if card.spec == manifest.spec):
        if source.sha256 and digest.startswith(source.sha256):
            return source
        if not source.sha256 and source.filename == file and source.layout == layout:
            return source
    return None


def _card(name: str) -> ModelCard | None:
    try:
        return resolve(name).card
    except UnknownModelError:
        return None
