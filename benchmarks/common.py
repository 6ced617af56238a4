"""What every benchmark writes down: where, when, with which versions, and the spread."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from efficientformer.benchmarking.networks import Network, open_networks
from efficientformer.benchmarking.subject import Subject
from efficientformer.runtime.timing import Timing, environment
from efficientformer.spec.errors import EfficientFormerError

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PARITY = HERE.parent / ".venv-parity" / "bin" / "python"  # made by: make parity


def spread(values: list[float]) -> dict[str, float]:
    """Return minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "runs": len(values)}


def save(what: str, figures: dict[str, object], packages: tuple[str, ...]) -> Path:
    """Write ``results/<what>_<hardware>_<date>.json`` and return its path."""
    stamp = environment(*packages)
    slug = re.sub(r"[^a-z0-9]+", "-", stamp["hardware"].lower()).strip("-")
    path = RESULTS / f"{what}_{slug}_{stamp['date']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"what": what, **stamp, **figures}, indent=2) + "\n")
    return path


def random_network(name: str, scratch: Path) -> Network:
    """Return a zoo network with random weights as an exported file in ``scratch``."""
    return open_networks([name], scratch, random_weights=True, offline=True, progress=None)[0]


def ours(model: Path, engine: str = "auto", precision: str = "auto", **what: object) -> tuple[str, ...]:
    """Return the command of one of our networks in one of our engines."""
    job = {"model": str(model), "engine": engine, "precision": precision, "threads": None, "batches": [1], **what}
    return (sys.executable, "-m", "efficientformer.benchmarking.worker", json.dumps(job))


def peer(kind: str, python: Path | None = None, **job: object) -> tuple[str, ...]:
    """Return the command of a peer: a kind of ``peers.py``, in an environment of its own if need be."""
    return (str(python or sys.executable), str(HERE / "peers.py"), json.dumps({"kind": kind, **job}))


def start(commands: Mapping[str, tuple[str, ...]], stack: ExitStack) -> tuple[dict[str, Subject], dict[str, str]]:
    """Start subjects one after the other; return those that run, and why the others do not, by name."""
    running, skipped = {}, {}
    for name, command in commands.items():
        print(f"preparing {name}", file=sys.stderr, flush=True)
        try:
            paths = {"PYTHONPATH": str(HERE.parent / "src")}  # for environments in which we are not installed
            running[name] = stack.enter_context(Subject(command, paths))
        except (EfficientFormerError, OSError) as error:
            skipped[name] = str(error)
            print(f"skipped {name}: {error}", flush=True)
    return running, skipped


def plot(path: Path, timings: Mapping[str, Timing], title: str) -> None:
    """Draw medians with whiskers from the 10th to the 90th percentile beside a result, as .png."""
    from efficientformer.reporting.page import new_figure, png

    figure = new_figure(9.0, 1.2 + 0.34 * len(timings))
    axes = figure.subplots()
    names, found = list(timings)[::-1], list(timings.values())[::-1]
    whiskers = [each.median_ms - each.p10_ms for each in found], [each.p90_ms - each.median_ms for each in found]
    colours = ["C0" if name.startswith("ours") else "0.6" for name in names]
    axes.barh(range(len(names)), [each.median_ms for each in found], xerr=whiskers, color=colours, capsize=2)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("milliseconds, median; whiskers from the 10th to the 90th percentile")
    axes.set_title(title, fontsize=10)
    path.with_suffix(".png").write_bytes(png(figure))


def show(timings: Mapping[str, Timing], reference: str) -> dict[str, dict[str, float]]:
    """Print timings, each with how many times faster than ``reference`` it is; return them as plain numbers."""
    figures = {}
    for name, timing in timings.items():
        ratio = timings[reference].median_ms / timing.median_ms if reference in timings else float("nan")
        figures[name] = {**timing.to_dict(), "speedup": round(ratio, 3)}
        spread_ = f"{timing.p10_ms:.2f}-{timing.p90_ms:.2f}"
        print(f"{name:<44} {timing.median_ms:10.2f} ms  ({spread_})  {ratio:6.2f}x {reference}", flush=True)
    return figures
