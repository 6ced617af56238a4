"""A quantisation as report.json and report.html."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from efficientformer.reporting.page import Page
from efficientformer.spec.errors import UsageError, missing_extra

if TYPE_CHECKING:
    from efficientformer.export.quantize import Quantisation


def require_libraries() -> None:
    """Find out before the work, not after it, that the report cannot be written.

    Raises:
        MissingExtraError: If a library is not installed.
    """
    try:
        import_module("jinja2")
    except ImportError as error:
        raise missing_extra("quantize", "The report of a quantisation", error) from error


def write_reports(result: Quantisation, folder: Path) -> None:
    """Write both files; each appears complete or not at all.

    Raises:
        UsageError: If a file cannot be written.
    """
    page = _page(result)
    texts = {"report.json": json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n"}
    for name in ("report.json", "report.html"):
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        try:
            if name in texts:
                temporary.write_text(texts[name], "utf-8", errors="backslashreplace")
            else:
                page.write(temporary)
            temporary.replace(folder / name)
        except OSError as error:
            raise UsageError(f"Cannot write {folder / name}", found=str(error)) from error
        finally:
            temporary.unlink(missing_ok=True)


def score_rows(result: Quantisation) -> list[tuple[str, str, str, str]]:
    """Return engine, top-1, agreement and points lost of each score, as text."""
    names = ["float", *["quantised"] * (len(result.scores) - 1)]
    return [
        (
            f"{name}: {each.engine}",
            "-" if each.top1 is None else f"{each.top1:.2f}",
            f"{each.agreement:.2f}",
            f"{each.drop:.2f}",
        )
        for name, each in zip(names, result.scores, strict=True)
    ]


def _page(result: Quantisation) -> Page:
    before, after = result.sizes
    page = Page(f"Quantisation of {result.path.name}", result.manifest.preprocess.describe())
    page.facts(
        [
            ("size", f"{after / 1e6:.2f} MB (float {before / 1e6:.2f} MB)"),
            ("points lost", f"{max(each.drop for each in result.scores):.2f}"),
            ("layers in float", f"{len(result.kept)} of {result.layers}"),
            ("pictures", f"{result.calibration} to calibrate, {result.held_out} held out"),
        ]
    )
    if result.note:
        page.text(result.note)
    page.heading("Accuracy on held-out pictures")
    page.table(("network and engine", "top-1 %", "agreement %", "points lost"), score_rows(result))
    page.heading("Latency of one picture")
    rows = [(name, f"{each.median_ms:.2f}", f"{each.p90_ms:.2f}") for name, each in result.timings.items()]
    page.table(("network and engine", "median ms", "90th percentile ms"), rows)
    if result.kept:
        page.heading("Layers kept in float")
        page.text("Quantising everything lost too much; these moved the logits most when quantised alone.")
        page.table(("layer", "relative change of the logits"), [(k.layer, f"{k.effect:.4f}") for k in result.kept])
    if result.skipped:
        page.heading("Pictures skipped")
        page.table(("picture", "reason"), result.skipped)
    return page
