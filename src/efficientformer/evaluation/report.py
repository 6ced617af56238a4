"""An evaluation as a page to look at: figures, confusions, calibration, the worst classes and the worst mistakes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efficientformer.evaluation.metrics import BINS
from efficientformer.evaluation.result import Evaluation, Mistake
from efficientformer.reporting.page import Page, Thumbnail, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_HEAT_MAP = 100  # classes; beyond that a cell is smaller than a pixel of the report
_MAX_CELL_NUMBERS = 20
_MAX_TICK_NAMES = 40
_MAX_CLASS_ROWS = 50
_MAX_PAIRS = 15
_MAX_SKIPPED = 200
_FEW = 10  # predictions in a bin of the reliability diagram
_BELOW: dict[str, Any] = {"fontsize": 8, "loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "frameon": False}


def write_report(evaluation: Evaluation, path: str | Path) -> None:
    """Write an evaluation as one HTML file.

    Raises:
        MissingExtraError: If jinja2 or matplotlib is not installed.
        UsageError: If the file cannot be written.
    """
    page = Page(f"Test of {evaluation.model}", f"on {evaluation.data}, by {evaluation.engine}")
    add_evaluation(page, evaluation)
    page.write(path)


def add_evaluation(page: Page, evaluation: Evaluation) -> None:
    """Add all sections of an evaluation to a page.

    Raises:
        DataError: If not one picture was counted.
        MissingExtraError: If matplotlib is not installed.
    """
    page.facts(facts(evaluation))
    page.text(f"Preprocessing: {evaluation.manifest.preprocess.describe()}.")
    if evaluation.published is not None:
        page.text(evaluation.published.describe())
    for note in evaluation.notes:
        page.text(f"Note: {note}.")
    _add_confusions(page, evaluation)
    _add_calibration(page, evaluation)
    _add_classes(page, evaluation)
    _add_mistakes(page, evaluation)
    _add_skipped(page, evaluation)


def facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return the figures that matter most as (name, text)."""
    result = evaluation.result
    return [
        ("top-1", f"{result.top1:.2f} %"),
        *([("top-5", f"{result.top5:.2f} %")] if result.top5 is not None else []),
        ("macro F1", f"{result.per_class.macro['f1']:.2f} %"),
        ("loss", f"{result.loss:.4f}"),
        ("calibration error", f"{result.calibration.ece:.2f} %"),
        ("images", f"{result.images:,}"),
        ("skipped", f"{len(evaluation.skipped):,}"),
        ("images/s", f"{evaluation.images_per_s:,.0f}"),
    ]


def class_rows(evaluation: Evaluation, most: int | None = None) -> list[tuple[str, str, str, str, str]]:
    """Return (class, pictures, top-1, precision, F1) as texts, worst top-1 first, without classes that never occur.

    Args:
        evaluation: What was measured.
        most: How many to return; None for all.
    """
    per_class = evaluation.result.per_class
    present = np.flatnonzero(per_class.count)
    order = present[np.lexsort((per_class.f1[present], per_class.top1[present]))]
    return [
        (
            evaluation.classes[index],
            f"{per_class.count[index]:,}",
            *(_percent(figure[index]) for figure in (per_class.top1, per_class.precision, per_class.f1)),
        )
        for index in order[:most].tolist()
    ]


def confusion_figure(evaluation: Evaluation) -> Figure:
    """Draw the confusion matrix as a heat map: each row is a true class, coloured by the share of its pictures.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    confusion = evaluation.result.confusion
    classes = len(confusion)
    side = 6.5 if classes <= _MAX_CELL_NUMBERS else 8.5
    figure = new_figure(side + 0.6, side - 0.7)  # the map is square: the rest is the colour bar
    from matplotlib.colors import PowerNorm

    axes = figure.subplots()
    share = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)  # (K, K), percent of each row
    # A root scale: on a linear one everything but the diagonal of a good network is white.
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 100))
    figure.colorbar(image, ax=axes, shrink=0.75, label="% of the true class", ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    axes.set(xlabel="predicted", ylabel="true")
    if classes <= _MAX_TICK_NAMES:
        names = [plain(_short(name)) for name in evaluation.classes]
        axes.set_xticks(range(classes), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(classes), names)
    if classes <= _MAX_CELL_NUMBERS:
        for (row, column), count in np.ndenumerate(confusion):
            colour = "white" if share[row, column] > 35 else "#333"
            text = f"{count:,}" if count else ""
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return figure


def calibration_figure(evaluation: Evaluation) -> Figure:
    """Draw the reliability diagram: accuracy over confidence, and how many predictions stand behind each bar.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    figure = new_figure(8.4, 3.6)
    reliability, histogram = figure.subplots(1, 2)
    _draw_reliability(reliability, evaluation)
    calibration = evaluation.result.calibration
    shares = 100 * calibration.count / calibration.count.sum()
    histogram.bar(calibration.edges[:-1], shares, 1 / BINS, align="edge", color="#2a6fdb", edgecolor="white")
    mean = calibration.mean_confidence
    for value, colour, name in ((mean, "#d1495b", "mean confidence"), (evaluation.top1, "#333", "top-1")):
        histogram.axvline(value / 100, color=colour, linestyle="--", linewidth=1.4, label=f"{name} {value:.1f} %")
    histogram.set(xlabel="confidence", ylabel="% of the predictions", xlim=(0, 1))
    histogram.legend(**_BELOW, ncols=2)
    return figure


def _draw_reliability(axes: Axes, evaluation: Evaluation) -> None:
    calibration = evaluation.result.calibration
    filled = calibration.count > 0
    left, accuracy = calibration.edges[:-1][filled], calibration.accuracy[filled]
    confidence = calibration.confidence[filled]
    # Of a handful of pictures the accuracy is chance: such bars are pale.
    colours = np.where(calibration.count[filled] < _FEW, "#2a6fdb44", "#2a6fdb").tolist()
    axes.bar(left, accuracy, 1 / BINS, align="edge", color=colours, edgecolor="white")
    axes.bar(
        left,
        confidence - accuracy,
        1 / BINS,
        bottom=accuracy,
        align="edge",
        color="none",
        edgecolor="#d1495b",
        hatch="///",
        linewidth=0.6,
        label="gap between accuracy and confidence",
    )
    axes.plot((0, 1), (0, 1), color="#333", linestyle=":", linewidth=1.2)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.legend(**_BELOW)


def _add_confusions(page: Page, evaluation: Evaluation) -> None:
    page.heading("Confusions")
    if len(evaluation.classes) <= MAX_HEAT_MAP:
        page.figure(confusion_figure(evaluation), "Pictures by true and predicted class; colours on a root scale.")
    pairs = evaluation.confused(_MAX_PAIRS)
    if not pairs:
        page.text("No two classes were confused.")
        return
    count = evaluation.result.per_class.count
    rows = [
        (evaluation.classes[true], evaluation.classes[predicted], f"{images:,}", _percent(100 * images / count[true]))
        for true, predicted, images in pairs
    ]
    page.table(("true class", "taken for", "images", "% of the class"), rows)


def _add_calibration(page: Page, evaluation: Evaluation) -> None:
    calibration = evaluation.result.calibration
    side = "too sure of itself" if calibration.mean_confidence > evaluation.top1 else "not sure enough of itself"
    page.heading("Calibration")
    page.figure(
        calibration_figure(evaluation),
        f"Mean confidence {calibration.mean_confidence:.2f} %, top-1 {evaluation.top1:.2f} %: on the whole the network "
        f"is {side}. Expected calibration error {calibration.ece:.2f} % in {BINS} bins. Pale bars stand for fewer "
        f"than {_FEW} predictions.",
    )


def _add_classes(page: Page, evaluation: Evaluation) -> None:
    page.heading("Classes, worst first")
    rows = class_rows(evaluation, most=_MAX_CLASS_ROWS)
    page.table(("class", "images", "top-1 (recall) %", "precision %", "F1 %"), rows)
    present = int((evaluation.result.per_class.count > 0).sum())
    if present > len(rows):
        page.text(f"The worst {len(rows)} of {present:,} classes; the JSON output has all of them.")


def _add_mistakes(page: Page, evaluation: Evaluation) -> None:
    if not evaluation.worst:
        return
    page.heading("Worst mistakes")
    page.text("The pictures whose true class the network thought least of, as it saw them.")
    page.thumbnails(Thumbnail(each.image, _caption(each, evaluation.classes)) for each in evaluation.worst)


def _caption(mistake: Mistake, classes: tuple[str, ...]) -> str:
    names = f"{_short(classes[mistake.true])}, taken for {_short(classes[mistake.predicted])}"
    return f"{names} ({100 * mistake.probability:.1f} %)\n{mistake.name}"


def _add_skipped(page: Page, evaluation: Evaluation) -> None:
    if not evaluation.skipped:
        return
    page.heading("Pictures that could not be read")
    page.text("They count in no figure.")
    shown = evaluation.skipped[:_MAX_SKIPPED]
    page.table(("picture", "reason"), [(each.name, each.reason) for each in shown])
    if len(shown) < len(evaluation.skipped):
        page.text(f"{len(shown)} of {len(evaluation.skipped):,}; the JSON output has all of them.")


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _short(name: str) -> str:
    """Return the first of a class's names, as ImageNet lists several, cut to what a figure can hold."""
    first = name.partition(",")[0]
    return first if len(first) <= 24 else f"{first[:23]}…"
