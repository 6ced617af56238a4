"""Peak memory of a bulk prediction over the number of pictures: is it steady?

    python benchmarks/bulk_memory.py PHOTOS [--counts 1000,10000,100000]

Whole processes of ``efficientformer predict FOLDER --output FILE`` with the network in the package; the photos are
repeated by links until there are enough. Peak resident memory is the operating system's own accounting.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from cold_start import run_once
from common import save
from folder import fill


def measured(scratch: Path, photos: Path, count: int) -> float:
    """Return the peak, in MiB, of predicting so many pictures."""
    folder, output = fill(scratch / str(count), photos, count), scratch / f"{count}.jsonl"
    _, _, peak = run_once([sys.executable, "-m", "efficientformer", "predict", str(folder), "-o", str(output), "-q"])
    with output.open() as lines:
        written = sum(1 for _ in lines)
    if written != count:
        raise SystemExit(f"{written} lines for {count} pictures")
    return round(peak, 1)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--counts", default="1000,10000,100000")
    options = parser.parse_args()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        measured(Path(scratch), options.photos, 100)  # the engines are compared once, and the choice is remembered
        for count in map(int, options.counts.split(",")):
            found[str(count)] = measured(Path(scratch), options.photos, count)
            print(f"{count} pictures: {found[str(count)]} MiB", flush=True)
    packages = ("efficientformer", "numpy", "onnxruntime", "openvino", "pillow")
    print("saved", save("bulk-memory", {"peak_mib_by_pictures": found}, packages))


if __name__ == "__main__":
    main()
