"""Figures of merit from logits and labels, counted so that the parts of a data set add up exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from efficientformer.spec.errors import DataError, EngineError, UsageError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BINS = 15  # of the calibration: as in Guo et al., "On calibration of modern neural networks"
TOP = 5


@dataclass(frozen=True, eq=False)
class Scores:
    """What one batch of logits says, picture by picture; each array is (N,).

    Attributes:
        predicted: Class with the largest logit; of equal ones the first.
        loss: Cross-entropy with the true class, in nats.
        confidence: Probability of the predicted class.
        rank: How many classes stand before the true one; 0 is a right answer. Equal logits rank by class number.
    """

    predicted: Ints
    loss: Floats
    confidence: Floats
    rank: Ints


@dataclass(frozen=True, eq=False)
class PerClass:
    """Figures of every class, each (K,), in percent but for ``count``; NaN where nothing defines a figure.

    Attributes:
        count: Pictures of the class.
        recall: Of its pictures, how many were given to it: the top-1 within the class.
        precision: Of the pictures given to it, how many are its own.
        f1: Harmonic mean of the two.
    """

    count: Ints
    recall: Floats
    precision: Floats
    f1: Floats

    @property
    def top1(self) -> Floats:
        """Top-1 within each class, which is its recall."""
        return self.recall

    @property
    def macro(self) -> dict[str, float]:
        """Mean recall (balanced accuracy), precision and F1 of the classes that occur, each class counting alike.

        A figure that nothing defines, as the precision of a class nothing was given to, counts as 0.
        """
        present = self.count > 0
        columns = {"recall": self.recall, "precision": self.precision, "f1": self.f1}
        return {name: float(np.nan_to_num(column[present]).mean()) for name, column in columns.items()}


@dataclass(frozen=True, eq=False)
class Calibration:
    """How far the network's confidence can be believed, in ``BINS`` equal steps of confidence.

    Attributes:
        ece: Expected calibration error in percent: the mean gap between confidence and accuracy.
        mean_confidence: Of all predictions, in percent.
        edges: Confidence at the bins' borders, 0 to 1, (BINS + 1,); a bin holds its upper border.
        count: Predictions in each bin, (BINS,).
        confidence: Their mean confidence, 0 to 1, (BINS,); NaN for an empty bin.
        accuracy: The share that is right, 0 to 1, (BINS,); NaN for an empty bin.
    """

    ece: float
    mean_confidence: float
    edges: Floats
    count: Ints
    confidence: Floats
    accuracy: Floats


@dataclass(frozen=True, eq=False)
class Result:
    """All figures of one evaluation.

    Attributes:
        images: Pictures counted.
        top1: Percent of pictures whose class came first.
        top5: Percent whose class was among the first five; None for five classes or fewer, where it says nothing.
        loss: Mean cross-entropy in nats.
        per_class: Figures of every class.
        confusion: Pictures by true (rows) and predicted class (columns), (K, K).
        calibration: How far confidence can be believed.
    """

    images: int
    top1: float
    top5: float | None
    loss: float
    per_class: PerClass
    confusion: Ints
    calibration: Calibration


def score(logits: npt.NDArray[np.floating[Any]], labels: npt.NDArray[np.integer[Any]]) -> Scores:
    """Score one batch, in double precision.

    Args:
        logits: (N, K), finite.
        labels: True classes, (N,).

    Raises:
        EngineError: If a logit is no finite number.
        UsageError: If the shapes do not belong together.
        DataError: If a label is no class of the logits.
    """
    values, true = np.asarray(logits, np.float64), np.asarray(labels, np.int64)
    _check(values, true)
    true_logit = np.take_along_axis(values, true[:, None], axis=1)  # (N, 1)
    earlier = np.arange(values.shape[1]) < true[:, None]  # (N, K)
    rank = ((values > true_logit) | ((values == true_logit) & earlier)).sum(axis=1)
    largest = values.max(axis=1, keepdims=True)
    total = np.exp(values - largest).sum(axis=1)  # at least 1: the largest term is exp(0)
    loss = np.log(total) + (largest - true_logit)[:, 0]
    return Scores(values.argmax(axis=1), loss, 1 / total, rank)


class Metrics:
    """Counts batch after batch; what several processes counted is added without loss.

    Args:
        num_classes: Classes of the network, K.

    Examples:
        >>> metrics = Metrics(3)
        >>> _ = metrics.update(np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), np.array([0, 1]))
        >>> metrics.result().top1
        50.0
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise UsageError("Illegal number of classes", expected="at least 1", found=str(num_classes))
        self.num_classes = num_classes
        self._confusion = np.zeros((num_classes, num_classes), np.int64)
        self._loss = np.zeros(1)
        self._in_top = np.zeros(1, np.int64)
        self._bin_count = np.zeros(BINS, np.int64)
        self._bin_right = np.zeros(BINS, np.int64)
        self._bin_confidence = np.zeros(BINS)

    @property
    def images(self) -> int:
        """Pictures counted so far."""
        return int(self._bin_count.sum())

    def update(self, logits: npt.NDArray[np.floating[Any]], labels: npt.NDArray[np.integer[Any]]) -> Scores:
        """Count one batch.

        Args:
            logits: (N, K), finite.
            labels: True classes, (N,).

        Returns:
            What was counted, picture by picture.

        Raises:
            EngineError, UsageError, DataError: As ``score``; nothing is counted then.
        """
        if np.ndim(logits) == 2 and np.shape(logits)[1] != self.num_classes:
            expected, found = f"logits (N, {self.num_classes})", f"{np.shape(logits)}"
            raise UsageError("These logits belong to another network", expected=expected, found=found)
        scores, true = score(logits, labels), np.asarray(labels, np.int64)
        np.add.at(self._confusion, (true, scores.predicted), 1)
        self._loss += scores.loss.sum()
        self._in_top += (scores.rank < TOP).sum()
        bins = np.clip(np.ceil(scores.confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
        self._bin_count += np.bincount(bins, minlength=BINS)
        self._bin_right += np.bincount(bins[scores.rank == 0], minlength=BINS)
        self._bin_confidence += np.bincount(bins, scores.confidence, minlength=BINS)
        return scores

    def merge(self, other: Metrics) -> Self:
        """Add what another process counted, and return the sum (this object).

        Raises:
            UsageError: If it counted another network's classes.
        """
        if other.num_classes != self.num_classes:
            expected, found = f"{self.num_classes} classes", f"{other.num_classes}"
            raise UsageError("These counts belong to another network", expected=expected, found=found)
        theirs = other._arrays()
        for name, array in self._arrays().items():
            np.add(array, theirs[name], out=array)
        return self

    def result(self) -> Result:
        """Return the figures of all that was counted.

        Raises:
            DataError: If that is nothing.
        """
        images = self.images
        if images == 0:
            raise DataError("No picture was evaluated", expected="at least one readable picture", found="none")
        return Result(
            images=images,
            top1=100 * float(np.trace(self._confusion)) / images,
            top5=100 * float(self._in_top[0]) / images if self.num_classes > TOP else None,
            loss=float(self._loss[0]) / images,
            per_class=_per_class(self._confusion),
            confusion=self._confusion.copy(),
            calibration=self._calibration(),
        )

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}

    def _calibration(self) -> Calibration:
        count, images = self._bin_count, self.images
        gaps = np.abs(self._bin_confidence - self._bin_right)  # of the sums, so an empty bin adds nothing
        return Calibration(
            ece=100 * float(gaps.sum()) / images,
            mean_confidence=100 * float(self._bin_confidence.sum()) / images,
            edges=np.linspace(0, 1, BINS + 1),
            count=count.copy(),
            confidence=_ratio(self._bin_confidence, count),
            accuracy=_ratio(self._bin_right, count),
        )


def _check(logits: Floats, labels: Ints) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        found = f"logits {logits.shape} and labels {labels.shape}"
        raise UsageError("Logits and labels do not belong together", expected="(N, K) and (N,)", found=found)
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        found = f"{int((~finite).sum())} of {len(logits)} pictures with NaN or infinite logits"
        hint = "In half precision numbers can overflow: try fp32; else the weights themselves are broken"
        raise EngineError("The network's answer is no number", expected="finite logits", found=found, hint=hint)
    if labels.size and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        expected, found = f"0 to {logits.shape[1] - 1}", f"{labels.min()} to {labels.max()}"
        raise DataError("Labels outside the network's classes", expected=expected, found=found)


def _per_class(confusion: Ints) -> PerClass:
    right, count, given = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    recall, precision = 100 * _ratio(right, count), 100 * _ratio(right, given)
    return PerClass(count, recall, precision, 100 * _ratio(2 * right, count + given))


def _ratio(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> Floats:
    """Divide, with NaN where the whole is 0."""
    out = np.full(len(whole), np.nan)
    np.divide(part, whole, out=out, where=whole > 0)
    return out
