"""A new user's first minute: clone, ``make predict``, look at the size of what was installed.

    python benchmarks/fresh_clone.py [RUNS]

Measures wall seconds of ``make predict`` in a fresh clone (packages come from pip's cache or from the network,
whichever pip takes) and the size of the environment it made.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import spread

from efficientformer.runtime.processor import hardware

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Measure and print; the figures go into PERF.md by hand, with the date."""
    seconds, sizes = [], []
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
        with tempfile.TemporaryDirectory() as folder:
            clone = Path(folder) / "efficientformer"
            subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
            start = time.perf_counter()
            subprocess.run(["make", "predict"], cwd=clone, check=True, stdout=subprocess.DEVNULL)
            seconds.append(round(time.perf_counter() - start, 1))
            size = subprocess.check_output(["du", "-s", "--block-size=1", str(clone / ".venv")], text=True)
            sizes.append(round(int(size.split()[0]) / 1e6, 1))
    print(hardware())
    print("make predict, seconds:", spread(seconds))
    print("size of .venv, MB:", spread(sizes))


if __name__ == "__main__":
    main()
