"""Kill a training run with SIGKILL at random moments, resume it, and compare the final weights bit by bit.

    python benchmarks/kill_resume.py --kills 20

Each trial: a run of its own in a process of its own, killed after a random time, resumed in another process (half of
them killed once more), and its weights, averaged weights and losses compared with those of a run nobody disturbed. The
network is small, its recipe has everything that has a state: drop path, mixup, cutout, erasing, averaging, warm-up.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
from common import save
from PIL import Image

from efficientformer import Recipe
from efficientformer.spec.variants import v2_spec

SPEC = v2_spec((8, 16, 16, 24), ((2,), (2,), (2, 2), (2,)), 1, input_size=32, num_classes=4, stem_stride=1)
RECIPE = Recipe(
    model="efficientformer_cifar10", pretrained=False, spec=SPEC.to_dict(), epochs=6, batch_size=16, lr=3e-3,
    layer_scale_init=0.1, drop_path=0.1, mixup=0.4, mix_prob=0.5, cutout=8, erasing=0.3, refine_epochs=1,
    ema_decay=0.95, save_every=4, workers=1,
)  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["efficientformer.training.run", "timm.utils.model_ema", "accelerate", "timm.data"])


def pictures(root: Path) -> Path:
    """Write four classes of 40 noisy pictures."""
    rng = np.random.default_rng(0)
    for label in range(4):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(40):
            pixels = rng.integers(40 * label, 40 * label + 120, (32, 32, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


def work(recipe: Recipe, data: Path, folder: Path) -> None:
    """Train, or go on with what there is."""
    from efficientformer.training.run import train

    if (folder / "state.pt").exists():
        train(resume=folder)
    else:  # also after a kill before the first checkpoint
        train(recipe, data, folder)


def start(data: Path, folder: Path) -> ForkServerProcess:
    """Start a process that trains."""
    process = CONTEXT.Process(target=work, args=(RECIPE, data, folder))
    process.start()
    return process


def result(folder: Path) -> tuple[bytes, bytes, list[object]]:
    """Return both weights files and the losses of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"], line.get("val_loss")) for line in lines]
    return (folder / "best.safetensors").read_bytes(), (folder / "last.safetensors").read_bytes(), list(losses)


def main() -> None:
    """Run the trials, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        data = pictures(root / "data")
        start(data, root / "warm").join()  # loads the libraries
        began = time.perf_counter()
        start(data, root / "whole").join()
        duration, expected = time.perf_counter() - began, result(root / "whole")
        kills, equal, trials = [], 0, 0
        while len(kills) < options.kills:
            folder, trials = root / f"trial{trials}", trials + 1
            for _ in range(1 + trials % 2):
                process = start(data, folder)
                process.join(rng.uniform(0.05, 0.7) * duration)  # a busy machine may have slowed the whole run down
                if process.is_alive():
                    process.kill()
                    log = folder / "metrics.jsonl"
                    lines = log.read_text().splitlines() if log.exists() else []
                    kills.append(json.loads(lines[-1])["step"] if lines else 0)
                process.join()
            start(data, folder).join() if not (folder / "report.html").exists() else None
            same = result(folder) == expected
            equal += same
            when = f"killed after step {kills[-1]}" if kills else "not killed"
            print(f"trial {trials}: {when}, {'equal' if same else 'DIFFERENT'}", flush=True)
    figures = {
        "kills": len(kills),
        "last_logged_step_before_each_kill": kills,
        "trials": trials,
        "bit_identical": equal,
    }
    print(figures, save("kill-resume", dict(figures), ("torch", "efficientformer")))
    if equal != trials:
        raise SystemExit("not every run ended with the same bits")


if __name__ == "__main__":
    main()
