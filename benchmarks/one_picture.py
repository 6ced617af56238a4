"""One JPEG file to label, warm, EfficientFormer-L1: ours, timm as documented, mmpretrain; in turns of one run.

    python benchmarks/one_picture.py PHOTO.jpg [--rounds 60]

mmpretrain lives in the environment that ``make parity`` makes; without it, its rows are skipped with the reason. Every
subject has a process of its own. Weights are random.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from common import PARITY, ours, peer, plot, random_network, save, show, start
from PIL import Image

from efficientformer.runtime.timing import take_turns

L1, MMPRETRAIN = "efficientformer_l1", "efficientformer-l1_3rdparty_8xb128_in1k"
REFERENCE = "timm: file to label"


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    photo = str(options.photo.resolve())
    with ExitStack() as stack:
        l1 = random_network(L1, Path(stack.enter_context(tempfile.TemporaryDirectory()))).exported
        commands = {
            "timm": peer("timm_picture", model=L1, picture=photo),
            "mmpretrain": peer("mmpretrain_picture", PARITY, model=MMPRETRAIN, picture=photo),
            "ours": ours(l1, picture=photo),
            "ours, ONNX Runtime fp32": ours(l1, "onnxruntime", "fp32", picture=photo),
        }
        subjects, skipped = start(commands, stack)
        turns = {f"{k}: {run}": partial(each.turn, run) for k, each in subjects.items() for run in each.facts["runs"]}
        timings = take_turns(turns, rounds=options.rounds)
        engines = {name: subject.facts["name"] for name, subject in subjects.items() if "name" in subject.facts}
    print(engines)
    size = list(Image.open(photo).size)
    figures: dict[str, object] = {"picture_size": size, "weights": "random", "engines": engines, "skipped": skipped}
    figures["timings"] = show(timings, REFERENCE)
    path = save("one_picture", figures, ("efficientformer", "timm", "torch", "pillow", "onnxruntime", "openvino"))
    plot(path, timings, f"One JPEG file of {size[0]}x{size[1]} to its label")
    print("saved", path)


if __name__ == "__main__":
    main()
