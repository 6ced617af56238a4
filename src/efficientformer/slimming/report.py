"""What a finished slimming run leaves for people: the path as CSV and JSON, a plot, an HTML page."""

from __future__ import annotations

import csv
import io
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientformer.latency.table import LatencyTable
from efficientformer.reporting.page import Page, new_figure, plain, png
from efficientformer.slimming.device import MOST_BUSY, Measured
from efficientformer.slimming.plan import IMPORTANCES, Plan
from efficientformer.slimming.search import Step, reachable, read_json
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.count import count
from efficientformer.spec.errors import SpecError
from efficientformer.spec.fields import as_list, check_number
from efficientformer.spec.text import storable
from efficientformer.weights.files import atomic_write, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARISONS = "comparisons.json"  # other networks on the same data, engine and recipe, put there by who trained them
_MARKERS = "soD^vPX"
SHOWN = 12  # steps of a longer path that the page's table shows


@dataclass(frozen=True)
class Finished:
    """A target's network.

    Attributes:
        target_ms: The budget.
        step: The step of the path it is.
        weights: Its checkpoint.
        top1: Accuracy after the final training, on the data set's validation pictures, in percent.
        measured: Its latency measured on this machine's engine; None where the table is of another machine.
    """

    target_ms: float
    step: Step = field(repr=False)  # long: it holds every cut that was scored
    weights: Path
    top1: float
    measured: Measured | None = None

    @property
    def measured_ms(self) -> float | None:
        """The latency that was measured."""
        return None if self.measured is None else self.measured.ms

    @property
    def quiet_ms(self) -> float | None:
        """The same at the speed the machine had when the table was made."""
        return None if self.measured is None else self.measured.quiet_ms

    @property
    def holds(self) -> bool | None:
        """Whether the budget holds on this machine's engine; None if that cannot be measured."""
        return None if self.quiet_ms is None else self.quiet_ms <= self.target_ms

    @property
    def latency_ms(self) -> float:
        """The best figure there is for its latency, at the speed the machine had when the table was made."""
        return self.step.predicted_ms if self.quiet_ms is None else self.quiet_ms


@dataclass(frozen=True)
class Comparison:
    """Another network: its name, latency (ms) and top-1 (percent)."""

    name: str
    latency_ms: float
    top1: float


def write_report(
    folder: Path,
    plan: Plan,
    table: LatencyTable,
    steps: Sequence[Step],
    measured: Sequence[Measured | None],
    networks: Sequence[Finished],
) -> None:
    """Write ``path.csv``, ``path.json``, ``accuracy_latency.png`` and ``report.html`` into a run folder.

    ``measured`` holds a latency for each step, or None where it was not measured. What is drawn and compared is at the
    speed the machine had when the table was made.
    """
    rows = path_rows(steps, measured)
    _write(folder / "path.csv", _csv(rows).encode())
    described = [{**row, "spec": step.candidate.spec.to_dict()} for row, step in zip(rows, steps, strict=True)]
    write_json(folder / "path.json", described)
    comparisons = read_comparisons(folder / COMPARISONS)
    figure = draw_path(steps, measured, networks, comparisons, f"{table.engine}, {table.precision}")
    _write(folder / "accuracy_latency.png", png(figure))
    where = f"{table.engine} in {table.precision}, {table.origin}: {table.device}"
    page = Page("Slimming for a device", f"{Path(plan.data).name}, {where}")
    _summary(page, steps, measured, networks)
    _add_speed(page, steps[0], measured, networks)
    page.heading("Accuracy against latency")
    page.figure(figure, "Line: networks of the path with the weights they inherit, on held-out training pictures. "
                "Stars: after their final training, on the validation pictures.")  # fmt: skip
    _add_networks(page, networks, comparisons)
    page.heading("How it was slimmed")
    gained = "point that the mobile efficiency score rises" if plan.options.joint else "millisecond saved"
    page.text(f"Every step takes the cut that loses the least accuracy per {gained}. Cuts that lose nothing count "
              f"alike; of these the one that {'raises it' if plan.options.joint else 'saves'} most is taken. Where the "
              "cut to take meets a budget, the most accurate of the cuts that meet it is made instead.")  # fmt: skip
    shown = _some(rows)
    page.table(_COLUMNS, [["" if row[name] is None else row[name] for name in _COLUMNS] for row in shown])
    if len(rows) > SHOWN:
        page.text(f"Every one of the {len(rows)} steps is in path.csv, with its architecture in path.json.")
    if not plan.options.joint:
        page.heading("What the supernet learned")
        page.text("Importance of every block: how much more its MetaPath leans on the block than on doing nothing. "
                  "Blocks that the smallest target's network has lost are pale.")  # fmt: skip
        page.figure(draw_importances(_importances(folder, steps[0]), networks[-1].step))
    low, _ = reachable(plan.options.space(steps[0].candidate.start), table)
    _add_use(page, networks, table, low)
    page.write(folder / "report.html")


BUSY = (
    "The machine was busy when a latency was measured: the start network, measured in turns with it, took longer than "
    f"its table says. Where that is no more than {MOST_BUSY - 1:.0%}, it is taken off: such a latency is said as it "
    "was measured, and at the table's speed, which is what is drawn and what budgets are judged by."
)
_COLUMNS = ("step", "cut", "predicted_ms", "measured_ms", "quiet_ms", "top1", "params_m", "macs_m", "widths", "depths",
            "attention")  # fmt: skip


def path_rows(steps: Sequence[Step], measured: Sequence[Measured | None]) -> list[dict[str, Any]]:
    """Return the path as plain values, one row for each step."""
    rows = []
    for step, found in zip(steps, measured, strict=True):
        spec = step.candidate.spec
        counts = count(spec)
        rows.append({
            "step": step.number, "cut": step.what,
            "predicted_ms": round(step.predicted_ms, 4), "error_ms": round(step.error_ms, 4),
            "measured_ms": None if found is None else round(found.ms, 4),
            "quiet_ms": None if found is None else round(found.quiet_ms, 4), "top1": round(step.top1, 2),
            "params_m": round(counts.params / 1e6, 3), "macs_m": round(counts.macs / 1e6, 2), **describe(spec),
        })  # fmt: skip
    return rows


def describe(spec: ArchSpec) -> dict[str, str]:
    """Return widths, depths and attention blocks of the four stages as short texts."""
    return {
        "widths": "-".join(str(stage.width) for stage in spec.stages),
        "depths": "-".join(str(len(stage.blocks)) for stage in spec.stages),
        "attention": "-".join(str(sum(block.has_attention for block in stage.blocks)) for stage in spec.stages),
    }


def read_comparisons(path: Path) -> list[Comparison]:
    """Read other networks to draw beside the path: a list of objects with ``name``, ``latency_ms`` and ``top1``.

    Raises:
        SpecError: If the file holds anything else.
    """
    if not path.exists():
        return []
    found = []
    for each in as_list("comparisons", read_json(path), 1000):
        if not isinstance(each, dict) or set(each) != {"name", "latency_ms", "top1"}:
            raise SpecError(f"Illegal entry in {path}", expected="name, latency_ms and top1", found=repr(each)[:80])
        for name in ("latency_ms", "top1"):
            check_number(name, each[name], 0, 1e6)
        found.append(Comparison(storable(str(each["name"])), each["latency_ms"], each["top1"]))
    return found


def draw_path(
    steps: Sequence[Step],
    measured: Sequence[Measured | None],
    networks: Sequence[Finished],
    comparisons: Sequence[Comparison],
    engine: str,
) -> Figure:
    """Draw top-1 over latency: the path, the trained networks, and others to compare them with."""
    figure = new_figure(10.0, 4.6)
    axes = figure.subplots()
    xs = [step.predicted_ms if each is None else each.quiet_ms for step, each in zip(steps, measured, strict=True)]
    predicted = all(each is None for each in measured)
    label = f"path{', predicted' if predicted else ''}, inherited weights (held out)"
    axes.plot(xs, [step.top1 for step in steps], ".-", color="#8aa", label=label)
    for each in networks:
        axes.axvline(each.target_ms, color="#2a6fdb", alpha=0.25, linestyle=":")
        place = (each.latency_ms, each.top1)
        axes.annotate(f"{each.top1:.2f} %", place, textcoords="offset points", xytext=(-6, 6), ha="right", fontsize=8)
    if networks:
        points = [(each.latency_ms, each.top1) for each in networks]
        axes.plot(*zip(*points, strict=True), "*", color="#2a6fdb", markersize=13, label="slimmed, trained")
    for index, (name, group) in enumerate(_grouped(comparisons).items()):
        places = [(other.latency_ms, other.top1) for other in group]
        label = plain(name if len(group) == 1 else f"{name} ({len(group)})")
        marker, colour = _MARKERS[index % len(_MARKERS)], f"C{(index + 1) % 10}"
        axes.plot(*zip(*places, strict=True), marker, color=colour, label=label)
    axes.margins(x=0.12)
    kind = "predicted latency" if predicted and all(each.measured is None for each in networks) else "latency"
    axes.set_xlabel(f"{kind} of one picture, {engine} (ms)")
    axes.set_ylabel("top-1 (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)  # beside the points, not over them
    return figure


def draw_importances(paths: Sequence[Sequence[float]], step: Step) -> Figure:
    """Draw the score of every MetaPath of the start network; those a network has lost are pale."""
    figure = new_figure(8.0, 2.8)
    axes = figure.subplots()
    colours = ("#2a6fdb", "#3aa17e", "#d2691e", "#8e5bb5")
    at, ticks = 0, []
    for stage, row in enumerate(paths):
        kept = step.candidate.positions(stage)
        for position, score in enumerate(row):
            axes.bar(at, score, color=colours[stage], alpha=1.0 if position in kept else 0.3)
            ticks.append((at, f"{stage + 1}.{position + 1}"))
            at += 1
        at += 1
    axes.axhline(1, color="#888", linewidth=0.8)
    if ticks:
        axes.set_xticks([place for place, _ in ticks], [text for _, text in ticks], fontsize=7)
    axes.set_xlabel("stage.block of the start network")
    axes.set_ylabel("importance")
    return figure


def _grouped(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """Put networks together whose names differ in a number at the end: "random 1", "random 2"."""
    groups: dict[str, list[Comparison]] = {}
    for each in comparisons:
        groups.setdefault(re.sub(r" \d+$", "", each.name), []).append(each)
    return groups


def _summary(
    page: Page, steps: Sequence[Step], measured: Sequence[Measured | None], networks: Sequence[Finished]
) -> None:
    best = networks[0]
    start = measured[0]
    if best.measured is None or start is None:  # a measured latency is compared with a measured one
        share = best.step.predicted_ms / steps[0].predicted_ms
    else:
        share = best.measured.quiet_ms / start.quiet_ms
    before, after = count(steps[0].candidate.spec), count(best.step.candidate.spec)
    page.facts(
        [
            ("top-1", f"{best.top1:.2f} %"),
            ("budget", f"{best.target_ms:g} ms"),
            ("predicted", f"{best.step.predicted_ms:.3f} ms"),
            ("measured", "not on this machine" if best.measured is None else str(best.measured)),
            ("of the start network's latency", f"{share:.0%}"),
            ("parameters", f"{after.params / 1e6:.2f} M"),
            ("of the start network's", f"{after.params / before.params:.0%}"),
        ]
    )


def _add_speed(page: Page, start: Step, measured: Sequence[Measured | None], networks: Sequence[Finished]) -> None:
    """Say it where the machine was slower than the table."""
    if any(each is not None and each.scaled for each in (*measured, *(network.measured for network in networks))):
        page.text(BUSY)
    if measured[0] is not None and measured[0].quiet_ms > MOST_BUSY * start.predicted_ms:
        page.text(f"The start network takes {measured[0].ms:.3f} ms here, and {start.predicted_ms:.3f} by the table. "
                  "So much is not taken as load, and nothing is taken off: the table may be wrong.")  # fmt: skip


def _add_networks(page: Page, networks: Sequence[Finished], comparisons: Sequence[Comparison]) -> None:
    rows = []
    for each in networks:
        spec, measured = each.step.candidate.spec, each.measured
        predicted = f"{each.step.predicted_ms:.3f} ± {each.step.error_ms:.3f}"
        held = {None: "", True: "yes", False: "no"}[each.holds]
        rows.append((f"{each.target_ms:g}", predicted, "" if measured is None else str(measured), held,
                     f"{each.top1:.2f}", *describe(spec).values(), each.weights.name))  # fmt: skip
    columns = ("budget (ms)", "predicted (ms)", "measured", "budget held", "top-1 (%)",
               "widths", "depths", "attention", "file")  # fmt: skip
    page.table(columns, rows)
    if comparisons:
        page.text("Other networks on the same pictures:")
        values = [(other.name, f"{other.latency_ms:.3f}", f"{other.top1:.2f}") for other in comparisons]
        page.table(("network", "latency (ms)", "top-1 (%)"), values)


def _add_use(page: Page, networks: Sequence[Finished], table: LatencyTable, low: float) -> None:
    """Say what to do next; ``low`` is the smallest budget, in milliseconds, that the search can meet."""
    file = shlex.quote(str(networks[0].weights))
    engine = f"--engine {table.engine} --precision {table.precision}"
    engine += f" --threads {table.threads}" if table.threads else ""
    folder, smaller = networks[0].weights.parent, f"{0.8 * min(each.target_ms for each in networks):.3g}"
    page.heading("What to do with it")
    quantise, again = [], []
    if float(smaller) >= low:
        command = f"efficientformer slim --resume {shlex.quote(str(folder))} --target-latency {smaller}ms"
        again = [("another budget from the same search", command)]
    if table.precision == "int8":
        quantise = [("quantise it", f"efficientformer quantize {file} --data DIR --output slimmed-int8")]
        page.text("The budgets are of int8; the networks here, and their top-1, are not quantised yet. The first "
                  "command does that, and says what int8 costs in accuracy.")  # fmt: skip
    page.table(
        ("to", "command"),
        [
            *quantise,
            ("classify pictures", f"efficientformer predict PICTURE --model {file} {engine}"),
            ("measure it on other pictures", f"efficientformer test {file} --data DIR"),
            ("train it further", f"efficientformer train --model {file} --data DIR"),
            ("deploy it", f"efficientformer convert {file} slimmed.onnx"),
            *again,
        ],
    )  # fmt: skip


def _some(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most ``SHOWN`` rows, evenly over the path, with its first and last."""
    if len(rows) <= SHOWN:
        return rows
    return [rows[round(index * (len(rows) - 1) / (SHOWN - 1))] for index in range(SHOWN)]


def _importances(folder: Path, start: Step) -> list[list[float]]:
    path = folder / IMPORTANCES
    data = read_json(path)
    rows = as_list(f"importances in {path}", data.get("paths") if isinstance(data, dict) else None, 4)
    found = [as_list(f"importances of a stage in {path}", row, 256) for row in rows]
    if [len(row) for row in found] != [len(row) for row in start.candidate.kinds]:
        raise SpecError(f"{path} is damaged", expected="an importance for every block of the start network")
    for value in (value for row in found for value in row):
        check_number(f"importance in {path}", value, 0, 1e12)
    return found


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write(data)
