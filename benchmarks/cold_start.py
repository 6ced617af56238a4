"""Cold start and memory: a whole ``efficientformer predict photo.jpg`` process, from nothing to the label.

    make bench          (or: .venv/bin/python benchmarks/cold_start.py [RUNS])

Wall time, CPU time and peak resident memory are the operating system's own accounting of each finished process. One
run is thrown away first, so that files are in the page cache and compiled modules on disk.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from common import save, spread

ROOT = Path(__file__).parents[1]


def run_once(command: list[str]) -> tuple[float, float, float]:
    """Run a process; return wall seconds, CPU seconds and peak MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    """Measure, print and save."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    photo = sorted((ROOT / "examples").glob("*.jpg"))[0]
    tool = Path(sys.executable).parent / "efficientformer"
    command = [str(tool), "predict", str(photo)]
    run_once(command)
    wall, cpu, memory = (list(column) for column in zip(*(run_once(command) for _ in range(runs)), strict=True))
    figures = {
        "command": f"efficientformer predict {photo.relative_to(ROOT)}",
        "wall_s": spread([round(value, 3) for value in wall]),
        "cpu_s": spread([round(value, 3) for value in cpu]),
        "peak_mib": spread([round(value, 1) for value in memory]),
    }
    for name, figure in figures.items():
        print(name, figure)
    print("saved", save("cold_start", figures, ("efficientformer", "numpy", "onnxruntime", "pillow")).relative_to(ROOT))


if __name__ == "__main__":
    main()
