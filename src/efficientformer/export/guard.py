"""The accuracy guard: how much int8 costs on held-out pictures, and which layers must stay in float to cost less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from efficientformer.export.calibration import Pictures
from efficientformer.runtime.engines import Engine
from efficientformer.spec.errors import ExportError

MAX_FLOAT_SHARE = 0.5  # of the layers: with more of them in float, a network is not worth being called quantised


@dataclass(frozen=True)
class Score:
    """What one engine makes of the held-out pictures.

    Attributes:
        engine: The engine, its version and precision.
        agreement: Pictures with the float network's answer, percent.
        top1: Top-1, percent; None where labels are not known.
        drop: Points lost: of top-1 where labels are known, else of agreement.
    """

    engine: str
    agreement: float
    top1: float | None
    drop: float


@dataclass(frozen=True)
class Kept:
    """A layer that stays in float.

    Attributes:
        layer: Its name in the graph.
        effect: How far the logits move when it alone is quantised, relative to their spread.
    """

    layer: str
    effect: float


def logits_of(engine: Engine, pictures: Pictures, limit: int | None = None) -> npt.NDArray[np.float32]:
    """Return logits (N, num_classes) of pictures."""
    return np.concatenate([engine.run(batch) for batch in pictures.batches(limit)])


def score(engine: Engine, pictures: Pictures, reference: npt.NDArray[np.float32]) -> Score:
    """Compare an engine with the float network's logits (N, num_classes) on the same pictures."""
    found, expected = logits_of(engine, pictures).argmax(1), reference.argmax(1)
    agreement = 100 * float((found == expected).mean())
    if pictures.labels is None:
        return Score(engine.name, agreement, None, 100 - agreement)
    labels = np.asarray(pictures.labels)
    top1, before = 100 * float((found == labels).mean()), 100 * float((expected == labels).mean())
    return Score(engine.name, agreement, top1, before - top1)


def effect(found: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
    """Return how far logits moved, relative to their spread over the classes."""
    spread = float(np.linalg.norm(reference - reference.mean(axis=1, keepdims=True)))
    return float(np.linalg.norm(found - reference)) / max(spread, 1e-12)


def hold(
    attempt: Callable[[Sequence[str]], list[Score]],
    rank: Callable[[], list[Kept]],
    max_drop: float,
) -> tuple[list[Score], list[Kept]]:
    """Find the fewest layers to keep in float, those with the largest effect first, so that the drop is allowed.

    Args:
        attempt: Quantises all layers but those named, and measures.
        rank: Measures every layer's effect, largest first; called only if quantising all of them costs too much.
        max_drop: Points that may be lost, on every engine.

    Returns:
        The scores, and the layers kept in float; the last attempt is the one returned.

    Raises:
        ExportError: If even with half of the layers in float too much is lost.
    """
    scores = attempt(())
    if _drop(scores) <= max_drop:
        return scores, []
    order = rank()
    low, high = 0, max(1, int(len(order) * MAX_FLOAT_SHARE))  # low layers are too few, high are enough
    scores = attempt([kept.layer for kept in order[:high]])
    if not _drop(scores) <= max_drop:
        raise ExportError(
            "Quantisation costs too much",
            expected=f"at most {max_drop:g} points lost",
            found=f"{_drop(scores):.2f} points with {high} of {len(order)} layers kept in float",
            hint="Calibrate with more pictures, allow more with --max-drop, or store small: --weights-only int8",
        )
    while high - low > 1:
        middle = (low + high) // 2
        if _drop(attempt([kept.layer for kept in order[:middle]])) <= max_drop:
            high = middle
        else:
            low = middle
    kept = order[:high]
    return attempt([each.layer for each in kept]), kept


def _drop(scores: list[Score]) -> float:
    return max(each.drop for each in scores)
