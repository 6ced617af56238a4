"""What every benchmark writes down: where, when, with which versions, and the spread."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

from efficientformer.runtime.timing import environment

RESULTS = Path(__file__).parent / "results"


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
