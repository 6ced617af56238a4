"""Two Ray workers on two cores against one process pinned to one core: pictures per second, without Ray's start.

    python benchmarks/ray_scaling.py --data photos --model L1.onnx [--count 1000] [--rounds 3]

Both classify the same pictures with ONNX Runtime in single precision, one thread a worker. In every round the two runs
follow each other; Ray's time is that of ``predict_on_cluster`` on a cluster that is up: opening the networks and
writing the rows are part of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray
from common import save, spread
from folder import fill

from efficientformer.cluster.predict import Options, predict_on_cluster

ALONE = """
import json, os, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from pathlib import Path
from efficientformer.runtime.classifier import FileClassifier
from efficientformer.runtime.inputs import gather
start = time.perf_counter()
classify = FileClassifier(sys.argv[1], engine="onnxruntime", threads=1)
count = sum(1 for _ in classify.predict(gather([sys.argv[2]])))
print(json.dumps({"count": count, "seconds": time.perf_counter() - start}))
"""


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    alone, together = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = fill(Path(scratch) / "pictures", options.data, options.count)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        for turn in range(options.rounds):
            command = [sys.executable, "-c", ALONE, str(options.model), str(folder)]
            done = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
            alone.append(done["count"] / done["seconds"])
            start = time.perf_counter()
            summary = predict_on_cluster(
                str(folder), f"{scratch}/rows{turn}", options.model, Options("onnxruntime", "fp32", 1), workers=2
            )
            together.append(summary.pictures / (time.perf_counter() - start))
            print(f"round {turn}: alone {alone[-1]:.1f}, two workers {together[-1]:.1f} pictures/s", flush=True)
        ray.shutdown()
    ratios = [two / one for one, two in zip(alone, together, strict=True)]
    figures: dict[str, object] = {"pictures": options.count, "alone_per_s": spread(alone)}
    figures |= {"two_workers_per_s": spread(together), "ratio": spread(ratios)}
    print(figures)
    print(save("ray-scaling", figures, ("efficientformer", "ray", "onnxruntime")))


if __name__ == "__main__":
    main()
