"""A folder of 1,000 JPEG files, EfficientFormer-L1, images/s: our bulk path and timm's best documented one, in turns.

    python benchmarks/folder.py PHOTOS [--count 1000] [--rounds 3]

The photos are repeated by links until there are enough. timm's path is its dataset and a DataLoader; which number of
workers, compiled or not, bf16 or not is fastest here is found first, on a part of the folder. Our bulk labels are
compared with those of one file after the other. Weights are random.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from contextlib import ExitStack
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from common import peer, plot, random_network, save, show, start

from efficientformer import Classifier, Failed
from efficientformer.runtime.timing import Timing, take_turns

L1 = "efficientformer_l1"
SEARCHED = 100  # files on which timm's settings are compared
BATCH = 32
SETTINGS = {
    f"timm, {workers} workers{', compiled' if compiled else ''}{', bf16' if bf16 else ''}": {
        "workers": workers, "compile": compiled, "bf16": bf16,
    }
    for workers, compiled, bf16 in (
        (2, False, False), (1, False, False), (2, False, True), (2, True, False), (1, True, False), (2, True, True),
        (1, True, True),
    )
}  # fmt: skip


def fill(folder: Path, photos: Path, count: int) -> Path:
    """Put ``count`` files into one class of ``folder``, as hard links where the file system allows."""
    target = folder / "photos"
    target.mkdir(parents=True)
    for index, photo in enumerate(
        islice(cycle(sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))), count)
    ):
        link = target / f"{index:06d}.jpg"
        try:
            os.link(photo, link)
        except OSError:
            shutil.copy(photo, link)
    return folder


def passes(commands: dict[str, tuple[str, ...]], rounds: int, stack: ExitStack) -> dict[str, Timing]:
    """Time whole passes over a folder, in turns; each subject has warmed up on a few files."""
    subjects, _ = start(commands, stack)
    turns = {name: partial(subject.turn, "folder", wake=False) for name, subject in subjects.items()}
    return take_turns(turns, rounds=rounds, burst=1)


def best_of_timm(folder: Path) -> tuple[str, dict[str, float]]:
    """Return the name of timm's fastest setting, and the images/s of all."""
    with ExitStack() as stack:
        common = {"model": L1, "folder": str(folder), "warm_up_on": str(folder), "batch": BATCH, "warmup": 0}
        found = passes({k: peer("timm_folder", **common, **v) for k, v in SETTINGS.items()}, 1, stack)
    speeds = {name: round(1000 * SEARCHED / timing.median_ms, 1) for name, timing in found.items()}
    print("timm's settings, images/s:", speeds, flush=True)
    return max(speeds, key=lambda name: speeds[name]), speeds


def equality(model: Path, folder: Path) -> dict[str, float]:
    """Compare our bulk path with one file after the other."""
    classify = Classifier(str(model))
    paths = sorted(folder.rglob("*.jpg"))
    bulk = [each for each in classify.predict(paths) if not isinstance(each, Failed)]
    single = [classify(path) for path in paths]
    same = sum(a.label == b.label for a, b in zip(bulk, single, strict=True))
    difference = max(float(np.abs(a.scores - b.scores).max()) for a, b in zip(bulk, single, strict=True))
    labels = len({each.label for each in single})
    return {"files": len(paths), "same_label": same, "different_labels": labels, "max_score_difference": difference}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        l1 = random_network(L1, scratch).exported
        few = fill(scratch / "few", options.photos, SEARCHED)
        many = fill(scratch / "many", options.photos, options.count)
        best, speeds = best_of_timm(few)
        common = {"folder": str(many), "warm_up_on": str(few), "batch": BATCH, "warmup": 0}
        commands = {best: peer("timm_folder", model=L1, **common, **SETTINGS[best])}
        commands["ours"] = peer("our_folder", model=str(l1), **common)
        timings = passes(commands, options.rounds, stack)
        equal = equality(l1, many)
    figures: dict[str, object] = {"files": options.count, "batch": BATCH, "weights": "random", "timm_search": speeds}
    figures["passes"] = show(timings, best)
    rates = {name: round(1000 * options.count / timing.median_ms, 1) for name, timing in timings.items()}
    print("images/s:", rates, "\nbulk against one by one:", equal)
    path = save("folder", {**figures, "images_per_s": rates, "equality": equal}, ("efficientformer", "timm", "torch"))
    plot(path, timings, f"A folder of {options.count} JPEG files")
    print("saved", path)


if __name__ == "__main__":
    main()
