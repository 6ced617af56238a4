"""What an evaluation found: its figures, its worst mistakes, and the pictures that could not be read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from efficientformer.evaluation.metrics import Calibration, Metrics, PerClass, Result
from efficientformer.evaluation.published import Published, compare
from efficientformer.spec.errors import DataError
from efficientformer.spec.manifest import Manifest


@dataclass(frozen=True, order=True)
class Skipped:
    """A picture that could not be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Mistake:
    """A picture that was taken for another class.

    Attributes:
        name: The picture.
        true: Its class, as a number.
        predicted: The class it was given to.
        probability: What the network thought of that class, 0 to 1.
        loss: Cross-entropy: how sure the network was that the true class is wrong.
        image: What the network saw, made small.
    """

    name: str
    true: int
    predicted: int
    probability: float
    loss: float
    image: Image.Image


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a network said of one picture; the names are those of ``predict``'s results.

    Attributes:
        index: Its number in the data set, from 0.
        path: The picture.
        true_label: Its class, as a number.
        true_class: Its name.
        pred_label: The class it was given to.
        pred_class: Its name.
        pred_score: The probability of that class, 0 to 1.
        loss: Cross-entropy with the true class, in nats.
    """

    index: int
    path: str
    true_label: int
    true_class: str
    pred_label: int
    pred_class: str
    pred_score: float
    loss: float


def worst_of(mistakes: Iterable[Mistake], keep: int) -> tuple[Mistake, ...]:
    """Return the ``keep`` mistakes with the highest loss, worst first; equal ones by name."""
    return tuple(sorted(mistakes, key=lambda each: (-each.loss, each.name))[:keep])


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A network measured on a data set, or one process's share of that.

    Attributes:
        model: What the network is called.
        engine: What ran it.
        data: What the data set is called.
        manifest: Architecture, preprocessing and provenance of the network.
        classes: Names of the classes.
        metrics: The counts behind every figure.
        skipped: Pictures that could not be read; they count in no figure.
        worst: The mistakes with the highest loss, worst first.
        keep_worst: How many of them are kept.
        outcomes: Every picture counted, in the order of the data set; empty unless it was asked for.
        notes: What was noticed when the data set was opened: files that were left out.
        seconds: Time taken, decoding included; of several processes, the slowest.
    """

    model: str
    engine: str
    data: str
    manifest: Manifest
    classes: tuple[str, ...]
    metrics: Metrics
    skipped: tuple[Skipped, ...] = ()
    worst: tuple[Mistake, ...] = ()
    keep_worst: int = 24
    outcomes: tuple[Outcome, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def __repr__(self) -> str:
        """Return the network, the data and the top-1, short of the manifest and all counts."""
        figure = f"top-1 {self.top1:.2f} % of {self.images:,}" if self.images else "no"
        return f"Evaluation({self.model!r}, {self.data!r}, {figure} pictures)"

    @cached_property
    def result(self) -> Result:
        """All figures.

        Raises:
            DataError: If not one picture was counted.
        """
        if self.images == 0 and self.skipped:
            first = self.skipped[0]
            found = f"{len(self.skipped):,} that could not be, the first {first.name}: {first.reason}"
            raise DataError("No picture was evaluated", expected="at least one readable picture", found=found)
        return self.metrics.result()

    @property
    def images(self) -> int:
        """Pictures counted."""
        return self.metrics.images

    @property
    def top1(self) -> float:
        """Top-1 in percent."""
        return self.result.top1

    @property
    def top5(self) -> float | None:
        """Top-5 in percent; None for five classes or fewer."""
        return self.result.top5

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return self.result.loss

    @property
    def images_per_s(self) -> float:
        """Pictures a second, decoding included."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def published(self) -> Published | None:
        """What was published of these weights, compared with what was measured; None if nothing is known."""
        return compare(self.manifest, self.result.per_class.count.tolist(), self.top1, self.top5)

    def merge(self, other: Evaluation) -> Evaluation:
        """Return the evaluation of both shares together; neither is changed."""
        return dataclasses.replace(
            self,
            metrics=Metrics(self.metrics.num_classes).merge(self.metrics).merge(other.metrics),
            skipped=tuple(sorted((*self.skipped, *other.skipped))),
            worst=worst_of((*self.worst, *other.worst), self.keep_worst),
            outcomes=tuple(sorted((*self.outcomes, *other.outcomes), key=lambda each: each.index)),
            seconds=max(self.seconds, other.seconds),
        )

    def confused(self, most: int) -> list[tuple[int, int, int]]:
        """Return (true, predicted, pictures) of the pairs of classes most often confused, most often first."""
        cells = [cell for cell in _cells(self.result.confusion) if cell[0] != cell[1]]
        return sorted(cells, key=lambda cell: (-cell[2], cell))[:most]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but pictures and outcomes as plain JSON values.

        Figures are in percent but for the loss and what stands under ``calibration.bins``. ``confusion`` lists
        [true, predicted, pictures] of every pair of classes that occurs.
        """
        result, published = self.result, self.published
        return {
            "model": self.model,
            "engine": self.engine,
            "data": self.data,
            "top1": result.top1,
            "top5": result.top5,
            "loss": result.loss,
            "images": result.images,
            "skipped": len(self.skipped),
            "skipped_list": [dataclasses.asdict(each) for each in self.skipped],
            "notes": list(self.notes),
            "seconds": self.seconds,
            "images_per_s": self.images_per_s,
            "preprocess": {"description": self.manifest.preprocess.describe(), **self.manifest.preprocess.to_dict()},
            "provenance": dict(self.manifest.provenance),
            "published": published.to_dict() if published else None,
            "calibration": _calibration(result.calibration),
            "macro": result.per_class.macro,
            "per_class": _per_class(self.classes, result.per_class),
            "confusion": _cells(result.confusion),
            "worst": [_mistake(each, self.classes) for each in self.worst],
        }

    def to_json(self) -> str:
        """Return ``to_dict`` as one line of JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)


def _cells(confusion: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Return (true, predicted, pictures) of every entry that is not 0."""
    rows, columns = np.nonzero(confusion)
    counts = confusion[rows, columns]
    return list(zip(rows.tolist(), columns.tolist(), counts.tolist(), strict=True))


def _per_class(classes: tuple[str, ...], figures: PerClass) -> list[dict[str, Any]]:
    columns = {
        "count": figures.count,
        "top1": figures.top1,
        "precision": figures.precision,
        "recall": figures.recall,
        "f1": figures.f1,
    }
    return [
        {"class": name, **{key: _plain(column[index]) for key, column in columns.items()}}
        for index, name in enumerate(classes)
    ]


def _calibration(figures: Calibration) -> dict[str, Any]:
    bins = [
        {
            "from": float(figures.edges[index]),
            "to": float(figures.edges[index + 1]),
            "count": int(figures.count[index]),
            "confidence": _plain(figures.confidence[index]),
            "accuracy": _plain(figures.accuracy[index]),
        }
        for index in range(len(figures.count))
    ]
    return {"ece": figures.ece, "mean_confidence": figures.mean_confidence, "bins": bins}


def _mistake(mistake: Mistake, classes: tuple[str, ...]) -> dict[str, Any]:
    plain = {key: value for key, value in vars(mistake).items() if key != "image"}
    return {**plain, "true": classes[mistake.true], "predicted": classes[mistake.predicted]}


def _plain(value: np.generic) -> int | float | None:
    """Return a number for JSON, which knows no NaN."""
    number: int | float = value.item()
    return None if math.isnan(number) else number
