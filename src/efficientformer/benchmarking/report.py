"""A benchmark for people: the rows as text, the plot, the HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from efficientformer.benchmarking.benchmark import Benchmark, Row
from efficientformer.reporting.page import Page, new_figure, plain, png
from efficientformer.spec.errors import UsageError, reason_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("network", "engine", "batch", "median ms", "p10-p90 ms", "images/s", "relative")
STEP_COLUMNS = ("step", "median ms", "p10-p90 ms")
RANDOM = "random weights"
HINT = "relative: time over that of the fastest row of the same batch size"


def cells(row: Row) -> tuple[str, ...]:
    """Return a row's cells, in the order of ``COLUMNS``."""
    timing = row.timing
    return (
        f"{row.model} ({RANDOM})" if row.is_random else row.model,
        row.name,
        str(row.batch),
        f"{timing.median_ms:.2f}",
        f"{timing.p10_ms:.2f}-{timing.p90_ms:.2f}",
        f"{row.images_per_s:,.1f}",
        f"{row.relative:.2f}",
    )


def draw(benchmark: Benchmark) -> Figure:
    """Draw images per second of every row, with bars from the 10th to the 90th percentile."""
    rows = benchmark.rows[::-1]
    figure = new_figure(9.0, 1.2 + 0.34 * max(1, len(rows)))
    axes = figure.subplots()
    names = [f"{row.model}, {row.name}, batch {row.batch}" for row in rows]
    speeds = [row.images_per_s for row in rows]
    low = [speed - 1000 * row.batch / row.timing.p90_ms for speed, row in zip(speeds, rows, strict=True)]
    high = [1000 * row.batch / row.timing.p10_ms - speed for speed, row in zip(speeds, rows, strict=True)]
    batches = sorted({row.batch for row in rows})
    colours = [f"C{batches.index(row.batch)}" for row in rows]
    axes.barh(range(len(rows)), speeds, xerr=(low, high), color=colours, ecolor="0.3", capsize=2)
    axes.set_yticks(range(len(rows)), [plain(name) for name in names], fontsize=8)
    axes.set_xlabel(f"images per second ({benchmark.environment['hardware']})")
    axes.grid(axis="x", alpha=0.3)
    return figure


def write_report(benchmark: Benchmark, folder: Path) -> tuple[Path, ...]:
    """Write ``benchmark.json``, ``benchmark.png`` and ``benchmark.html`` into a folder; return their paths.

    Raises:
        MissingExtraError: If the report extra is not installed.
        UsageError: If the folder cannot be written.
    """
    figure = draw(benchmark)
    page = Page("Benchmark", f"{benchmark.environment['hardware']}, {benchmark.environment['date']}")
    if any(row.is_random for row in benchmark.rows):
        page.text("Networks marked so have random weights: their speed is real, their results mean nothing.")
    page.heading("Networks and engines")
    page.figure(figure, "Images per second at the median; whiskers from the 10th to the 90th percentile")
    page.table(COLUMNS, [cells(row) for row in benchmark.rows])
    page.text(HINT)
    for each in benchmark.pictures:
        width, height = each.size
        page.heading(f"One picture of {width}x{height}: {each.model}, {each.name}")
        steps = each.steps.items()
        page.table(STEP_COLUMNS, [(k, f"{t.median_ms:.2f}", f"{t.p10_ms:.2f}-{t.p90_ms:.2f}") for k, t in steps])
    if benchmark.unavailable:
        page.heading("Not available here")
        rows = [(each.model, each.engine, each.precision, each.reason) for each in benchmark.unavailable]
        page.table(("network", "engine", "precision", "reason"), rows)
    page.heading("Measured with")
    facts = {
        **benchmark.environment,
        "threads": benchmark.threads or "each engine's choice",
        "rounds": benchmark.rounds,
    }
    page.table(("what", "value"), [(key, str(value)) for key, value in facts.items()])
    paths = tuple(folder / f"benchmark.{kind}" for kind in ("json", "png", "html"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(benchmark.to_json() + "\n", "utf-8")
        paths[1].write_bytes(png(figure))
    except OSError as error:
        raise UsageError(f"Cannot write to {folder}", found=reason_of(error)) from error
    page.write(paths[2])
    return paths
