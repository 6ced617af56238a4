"""Cold start and memory: whole processes from nothing to the label of one photo, ours and timm's, in turns.

    make bench          (or: .venv/bin/python benchmarks/cold_start.py [RUNS])

Ours is ``efficientformer predict photo.jpg`` with the network in the package, and with EfficientFormer-L1 as an
exported file; timm's is its documented script with L1. The L1 rows have random weights and need torch (and timm); where
that is missing they are skipped with the reason. Wall time, CPU time and peak resident memory are the operating
system's own accounting of each finished process. One run of each is thrown away first, so that files are in the page
cache and compiled modules on disk.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from common import random_network, save, spread

ROOT = Path(__file__).parents[1]
L1 = "efficientformer_l1"
TIMM = """
import sys, timm, torch
from PIL import Image
model = timm.create_model("efficientformer_l1", pretrained=False).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
with torch.inference_mode():
    output = model(transform(Image.open(sys.argv[1]).convert("RGB")).unsqueeze(0))
print(torch.topk(output.softmax(dim=1) * 100, k=5))
"""


# A process counts the memory of the one it was forked from: a small one in between keeps ours out of the figure.
LAUNCH = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, status)
"""


def run_once(command: list[str]) -> tuple[float, float, float]:
    """Run a process; return wall seconds, CPU seconds and peak MiB."""
    launch = [sys.executable, "-I", "-S", "-c", LAUNCH, *command]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    said = subprocess.run(launch, capture_output=True, check=True, text=True, env=kept).stdout
    wall, cpu, memory, status = map(float, said.split())
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed with status {status:.0f}")
    return wall, cpu, memory


def commands(photo: Path, scratch: Path) -> dict[str, list[str]]:
    """Return what is compared, by name; says what is left out, and why."""
    predict = [str(Path(sys.executable).parent / "efficientformer"), "predict", str(photo)]
    found = {"efficientformer predict": predict}
    missing = [name for name in ("torch", "timm", "onnxscript") if find_spec(name) is None]
    if missing:
        print(f"skipped L1 and timm: {', '.join(missing)} not installed")
        return found
    exported = random_network(L1, scratch).exported
    return {
        **found,
        "efficientformer predict --model l1.onnx": [*predict, "--model", str(exported)],
        "timm, L1": [sys.executable, "-c", TIMM, str(photo)],
    }


def main() -> None:
    """Measure, print and save."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    photo = sorted((ROOT / "examples").glob("*.jpg"))[0]
    with tempfile.TemporaryDirectory() as scratch:
        compared = commands(photo, Path(scratch))
        for command in compared.values():
            run_once(command)
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in compared}
        for _ in range(runs):
            for name, command in compared.items():
                found[name].append(run_once(command))
    figures: dict[str, object] = {"photo": str(photo.relative_to(ROOT))}
    for name, measured in found.items():
        wall, cpu, memory = zip(*measured, strict=True)
        figures[name] = {
            "wall_s": spread([round(value, 3) for value in wall]),
            "cpu_s": spread([round(value, 3) for value in cpu]),
            "peak_mib": spread([round(value, 1) for value in memory]),
        }
        print(name, figures[name])
    packages = ("efficientformer", "numpy", "onnxruntime", "openvino", "pillow", "timm", "torch")
    print("saved", save("cold_start", figures, packages).relative_to(ROOT))


if __name__ == "__main__":
    main()
