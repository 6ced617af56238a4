"""The HTML report of a quantisation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from efficientformer.reporting.page import Page, new_figure

if TYPE_CHECKING:
    from efficientformer.export.quantize import QuantisationReport

SHOWN = 40  # layers in the plot, the worst
ACCURACY_COLUMNS = ("engine", "agreement, %", "labels changed", "top-1, %", "points lost")


def write_page(report: QuantisationReport, path: Path) -> None:
    """Write the report of a quantisation as one HTML file.

    Raises:
        MissingExtraError: If the report extra is not installed.
    """
    before, after = (size / 1e6 for size in report.sizes)
    page = Page(f"{report.model} in {report.kind}", f"{report.environment['hardware']}, {report.environment['date']}")
    worst = max(report.accuracy, key=lambda each: each.drop)
    page.facts(
        [
            ("size", f"{before:.2f} to {after:.2f} MB"),
            ("agreement, worst engine", f"{min(each.agreement for each in report.accuracy):.2f} %"),
            ("points lost, worst engine", f"{worst.drop:.2f} (allowed: {report.max_drop:g})"),
            ("layers kept in float", len(report.kept)),
        ]
    )
    page.heading("Accuracy")
    what = "top-1 against their labels" if report.labelled else "agreement with single precision (no labels)"
    single = "" if report.top1 is None else f" Single precision: {report.top1:.2f} % top-1."
    page.text(f"Scales set on {report.calibrated_on} pictures; measured on {report.held_out} others: {what}.{single}")
    page.text("Points lost are given with their standard error: as many other pictures would differ by about that.")
    page.table(ACCURACY_COLUMNS, accuracy_rows(report))
    page.heading("Speed of one picture")
    page.table(("", "median, ms", "p10", "p90"), speed_rows(report))
    if report.errors:
        _add_layers(page, report)
    if report.skipped:
        page.heading("Pictures that could not be read")
        page.table(("picture", "reason"), report.skipped)
    page.write(path)


def accuracy_rows(report: QuantisationReport) -> list[tuple[str, ...]]:
    """Return the rows of ``ACCURACY_COLUMNS``, one for each engine."""
    return [
        (
            each.engine,
            f"{each.agreement:.2f}",
            f"{each.changed} of {report.held_out}",
            "" if each.top1 is None else f"{each.top1:.2f}",
            f"{each.drop:.2f} ± {each.error:.2f}",
        )
        for each in report.accuracy
    ]


def speed_rows(report: QuantisationReport) -> list[tuple[str, str, str, str]]:
    """Return name, median, 10th and 90th percentile in milliseconds of each engine, before and after."""
    return [
        (name, f"{timing.median_ms:.3f}", f"{timing.p10_ms:.3f}", f"{timing.p90_ms:.3f}")
        for name, timing in report.timings.items()
    ]


def _add_layers(page: Page, report: QuantisationReport) -> None:
    page.heading("Layers")
    page.text(
        "All layers in int8 lost more than allowed, so each was made int8 alone and its error measured: the difference "
        "of the logits over their spread. The worst stay in float, as few as the allowed drop asks for."
    )
    ranked = sorted(report.errors.items(), key=lambda each: -each[1])[:SHOWN]
    figure = new_figure(8.0, 1.0 + 0.22 * len(ranked))
    axes = figure.subplots()
    colours = ["C1" if name in report.kept else "C0" for name, _ in ranked]
    axes.barh(range(len(ranked)), [error for _, error in ranked], color=colours)
    axes.set_yticks(range(len(ranked)), [name for name, _ in ranked], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("error of the layer alone in int8 (orange: kept in float)")
    page.figure(figure)
