"""Profiles and observations as files for people and programs: an HTML page with plots, and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientformer.latency.observations import Observation, Observations
from efficientformer.latency.profile import Profile
from efficientformer.latency.table import write_json
from efficientformer.reporting.page import Page, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "stem": "#7f7f7f", "embedding": "#bcbd22", "mb4d": "#1f77b4", "mb3d": "#d62728", "ffn": "#17becf",
    "attn_ffn": "#ff7f0e", "norm": "#9467bd", "head": "#8c564b", "other": "#c7c7c7",
}  # fmt: skip
COUNTED = (
    "Operator times are the engine's own counters. Counting slows an engine down and what it does between operators is "
    "not counted, so shares are to be trusted more than milliseconds."
)


def write_profile(profile: Profile, folder: Path) -> tuple[Path, Path]:
    """Write ``profile.html`` and ``profile.json`` into an existing folder; return their paths.

    Raises:
        MissingExtraError: If the report extra is not installed.
        UsageError: If a file cannot be written.
    """
    page = Page(f"Where the time of {profile.model} goes", _subtitle(profile.engine, profile.environment))
    timing = profile.latency
    page.facts(
        [
            ("latency", f"{timing.ms:.3f} ms"),
            ("while measured", f"{timing.p10_ms:.3f} to {timing.p90_ms:.3f} ms"),
            ("all operators", f"{profile.operators_ms:.3f} ms"),
        ]
    )
    page.text(COUNTED)
    if profile.unseen:
        page.text(profile.unseen_note)
    page.heading("By part")
    page.figure(draw_parts(profile), "Time of each part, in the order of execution")
    parts = [
        (part.name, part.kind, f"{part.ms:.4f}", f"{100 * part.share:.1f}", f"{part.macs / 1e6:.2f}")
        for part in profile.parts()
    ]
    page.table(("part", "kind", "ms", "share, %", "M MACs"), parts)
    page.heading("By kind of operator")
    page.figure(draw_kinds(profile), "Time of each kind of operator")
    total = profile.operators_ms or 1.0
    kinds = [(kind, f"{ms:.4f}", f"{100 * ms / total:.1f}", count) for kind, ms, count in profile.kinds()]
    page.table(("kind", "ms", "share, %", "operators"), kinds)
    page.heading("The costliest operators")
    costly = sorted(profile.operators, key=lambda operator: -operator.ms)[:20]
    page.table(("part", "kind", "ms", "engine's name"), [(o.part, o.kind, f"{o.ms:.4f}", o.name) for o in costly])
    return _write(page, profile.to_dict(), folder, "profile")


def write_observations(found: Observations, folder: Path) -> tuple[Path, Path]:
    """Write ``observations.html`` and ``observations.json`` into an existing folder; return their paths.

    Raises:
        MissingExtraError: If the report extra is not installed.
        UsageError: If a file cannot be written.
    """
    page = Page("The paper's four observations, here", _subtitle(found.engine, found.environment))
    page.text(found.note)
    for each in found.observations:
        page.heading(f"{each.title}: {each.reason}")
        page.text(f"The paper (arXiv 2206.01191, section 3.1): {each.claim}")
        page.text(each.verdict)
        page.figure(draw_observation(each), "Latency, and two standard errors")
        rows = [(variant.name, f"{variant.ms:.4f}", f"{variant.error_ms:.4f}") for variant in each.variants]
        page.table(("what", "ms", "within"), rows)
    return _write(page, found.to_dict(), folder, "observations")


def _subtitle(engine: str, environment: dict[str, Any]) -> str:
    return f"{engine} on {environment['hardware']}, {environment['system']}, {environment['date']}"


def _write(page: Page, data: dict[str, Any], folder: Path, name: str) -> tuple[Path, Path]:
    page.write(folder / f"{name}.html")
    write_json(folder / f"{name}.json", data)
    return folder / f"{name}.html", folder / f"{name}.json"


def draw_parts(profile: Profile) -> Figure:
    """Draw the time of each part as bars, coloured by kind."""
    parts = profile.parts()
    figure = new_figure(max(7.0, 0.28 * len(parts)), 3.6)
    axes = figure.subplots()
    seen = set()
    for index, part in enumerate(parts):
        label = part.kind if part.kind not in seen else None
        seen.add(part.kind)
        axes.bar(index, part.ms, color=COLOURS.get(part.kind, "#c7c7c7"), label=label)
    axes.set_xticks(range(len(parts)), [part.name.replace("stages.", "") for part in parts], rotation=90)
    axes.set_ylabel("ms")
    axes.legend()
    return figure


def draw_kinds(profile: Profile) -> Figure:
    """Draw the time of each kind of operator as bars."""
    kinds = profile.kinds()[:15]
    figure = new_figure(7.0, 0.6 + 0.3 * len(kinds))
    axes = figure.subplots()
    axes.barh([kind for kind, _, _ in kinds], [ms for _, ms, _ in kinds])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    return figure


def draw_observation(observation: Observation) -> Figure:
    """Draw what was compared as bars."""
    variants = observation.variants
    figure = new_figure(7.0, 0.6 + 0.4 * len(variants))
    axes = figure.subplots()
    errors = [variant.error_ms for variant in variants]
    axes.barh([variant.name for variant in variants], [variant.ms for variant in variants], xerr=errors)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    return figure
