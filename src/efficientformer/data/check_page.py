"""The report of a data check as an HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from efficientformer.data.check import Balance, DataReport, Group, Picture
from efficientformer.reporting.page import Page, Thumbnail, new_figure, plain
from efficientformer.runtime.image import decode
from efficientformer.spec.errors import ImageError

MAX_GROUPS = 24  # shown with pictures
MAX_ROWS = 200  # of a table
MAX_BARS = 40  # classes by name; more become a curve

_KINDS = {"bytes": "same file", "pixels": "same pixels", "near": "look alike"}


def write_page(report: DataReport, path: str | Path) -> None:
    """Write a report with plots and pictures.

    Args:
        report: What ``check`` found.
        path: The file.

    Raises:
        MissingExtraError: If jinja2 or matplotlib is not installed.
        UsageError: If the file cannot be written.
    """
    page = Page("Check of a data set", f"{report.path}: {report.pictures:,} pictures")
    page.facts(
        [
            ("verdict", "nothing wrong" if report.ok else "something is wrong"),
            ("pictures", f"{report.pictures:,}"),
            ("unreadable", f"{len(report.corrupt):,}"),
            ("leaks", f"{len(report.leaks):,}"),
            ("contradictions", f"{len(report.contradictions):,}"),
            ("groups of copies", f"{len(report.groups):,}"),
        ]
    )
    for obstacle in report.obstacles:
        page.text(f"For a training: {obstacle}.")
    _add_groups(page, report)
    _add_bad(page, report)
    page.heading("Classes")
    for balance in report.balances:
        _add_balance(page, balance)
    page.heading("Pictures")
    (low_width, low_height), (high_width, high_height) = report.sizes
    page.text(f"Sizes from {low_width} x {low_height} to {high_width} x {high_height} (smallest and largest sides).")
    page.table(("format and mode", "pictures"), [(form, f"{count:,}") for form, count in report.forms])
    for note in report.notes:
        page.text(f"Note: {note}.")
    page.write(path)


def _add_groups(page: Page, report: DataReport) -> None:
    page.heading("Copies")
    if not report.groups:
        page.text("No picture occurs twice.")
        return
    rows = []
    for kind, title in _KINDS.items():
        groups = [group for group in report.groups if group.kind == kind]
        leaks, clashes = sum(group.leak for group in groups), sum(group.contradiction for group in groups)
        rows.append((title, f"{len(groups):,}", f"{leaks:,}", f"{clashes:,}"))
    page.table(("kind", "groups", "in training and evaluation", "with two labels"), rows)
    shown = report.groups[:MAX_GROUPS]
    if len(report.groups) > len(shown):
        page.text(f"The first {len(shown)} of {len(report.groups):,} groups, the ones that leak or contradict first:")
    page.thumbnails(_thumbnails(report, shown))


def _thumbnails(report: DataReport, groups: Iterable[Group]) -> Iterator[Thumbnail]:
    """Yield the first two pictures of every group that differ in what is wrong, side by side as one."""
    for number, group in enumerate(groups, 1):
        left, right = _telling(group)
        title = f"{number}: {group.verdict or 'copy'} ({_KINDS[group.kind]}, {len(group.pictures)} pictures)"
        yield Thumbnail(_side_by_side(report, left, right), f"{title}. {left} [{left.label}] = {right} [{right.label}]")


def _telling(group: Group) -> tuple[Picture, Picture]:
    """Return two pictures of a group that show what is wrong with it."""
    first = group.pictures[0]
    others = sorted(group.pictures[1:], key=lambda each: (each.label == first.label) + (each.split == first.split))
    return first, others[0]


def _side_by_side(report: DataReport, *pictures: Picture) -> Image.Image:
    canvas = Image.new("RGB", (160, 80), "white")
    for position, picture in enumerate(pictures):
        try:
            image = decode(report.sources[picture.split].read(picture.index), name=picture.name)
        except ImageError:  # gone since it was checked
            continue
        scale = 78 / max(image.size)
        canvas.paste(image.resize([max(1, round(side * scale)) for side in image.size]), (position * 82, 1))
    return canvas


def _add_bad(page: Page, report: DataReport) -> None:
    for title, findings in (("Unreadable pictures", report.corrupt), ("Odd sizes", report.odd)):
        if findings:
            page.heading(title)
            page.table(("picture", "reason"), [(each.picture, each.reason) for each in findings[:MAX_ROWS]])
            if len(findings) > MAX_ROWS:
                page.text(f"And {len(findings) - MAX_ROWS:,} more.")
    if report.unknown_classes:
        page.heading("Classes without training pictures")
        page.text(", ".join(report.unknown_classes[:MAX_ROWS]))


def _add_balance(page: Page, balance: Balance) -> None:
    """Add a plot of class sizes: bars with names while these can be read, else a curve of the sorted sizes."""
    figure = new_figure(height=3.2 if len(balance.classes) > MAX_BARS else 0.9 + 0.24 * len(balance.classes))
    axes = figure.subplots()
    counts = [count for _, count in balance.classes]
    if len(counts) > MAX_BARS:
        axes.plot(sorted(counts, reverse=True))
        axes.set_xlabel("classes, largest first")
        axes.set_ylabel("pictures")
        axes.set_ylim(bottom=0)
    else:
        names = [name if len(name) <= 30 else f"{name[:29]}…" for name, _ in balance.classes]
        axes.barh(range(len(counts)), counts)
        # A dollar sign would begin a formula.
        axes.set_yticks(range(len(counts)), [plain(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlabel("pictures")
    small = f"; {len(balance.small)} classes with fewer than 10" if balance.small else ""
    caption = f"{balance.split}: {balance.pictures:,} pictures in {len(counts):,} classes"
    page.figure(figure, f"{caption}; largest over smallest {balance.ratio:.1f}{small}")
