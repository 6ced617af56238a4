"""What every benchmark writes down: where, when, with which versions, and the spread."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def hardware() -> str:
    """Return the processor's name and the number of cores this process may use."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{found.group(1).strip() if found else platform.processor()}, {cores} cores"


def spread(values: list[float]) -> dict[str, float]:
    """Return minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "runs": len(values)}


def save(what: str, figures: dict[str, object], packages: tuple[str, ...]) -> Path:
    """Write ``results/<what>_<hardware>_<date>.json`` and return its path."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    stamp = {
        "what": what,
        "date": today,
        "hardware": hardware(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {package: version(package) for package in packages},
    }
    slug = re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-")
    path = RESULTS / f"{what}_{slug}_{today}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**stamp, **figures}, indent=2) + "\n")
    return path
