"""Images per second of a training step, ours beside timm's: same network, batch, precision, augmentation, interleaved.

    python benchmarks/train_throughput.py --data photos --model efficientformer_l1 --batch 32 --rounds 5

Two figures each: the step alone (one batch kept in memory) and from files (decode, RandAugment, normalise, step).
timm's side is its library in the order of its train.py: create_model, create_loader, create_optimizer_v2, ModelEmaV3,
autocast, loss.backward, step, loss.item(). (The script itself is not part of timm's package.) Ours is the trainer's own
loop. Both run eagerly, and compiled with --compile. The pipeline alone (no step) is measured last. Each has a process
of its own: how a process manages its memory is a part of its speed.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import save, spread, start
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.utils.model_ema import ModelEmaV3

from efficientformer import Recipe
from efficientformer.benchmarking.subject import Runs, Subject, serve
from efficientformer.training.processes import make_accelerator
from efficientformer.training.run import _assemble
from efficientformer.training.setup import prepare
from efficientformer.training.state import RunFolder

# without -inc1 and -mstd, whose largest magnitudes make timm's own posterize fail with Pillow 13
RANDAUGMENT, SMOOTHING, EMA, LR, DECAY = "rand-m7", 0.1, 0.9999, 1e-3, 0.05
WORKERS = 2
JOBS = ("step", "fed_step", "pipeline")


class Ours:
    """The trainer's own loop, step by step."""

    def __init__(self, options: argparse.Namespace) -> None:
        recipe = Recipe(
            model=options.model, pretrained=False, epochs=100_000, batch_size=options.batch, lr=LR, layer_decay=1.0,
            weight_decay=DECAY, label_smoothing=SMOOTHING, randaugment=RANDAUGMENT, crop="rrc", crop_scale=(0.08, 1.0),
            interpolation="bicubic", ema_decay=EMA, precision=options.precision, compile=options.compile,
            opt=options.opt, workers=WORKERS,
        )  # fmt: skip
        prepared = prepare(recipe, options.data, 0, 1)
        self._run = _assemble(prepared, RunFolder(options.scratch), make_accelerator(recipe, "auto"), threading.Event())
        self._batches = self._run.loader.batches(0, 10**9)
        self._kept = next(self._batches)

    def step(self) -> None:
        """One step on a batch that is in memory."""
        self._run._step(self._kept)
        self._run.progress.step += 1
        if self._run.progress.step % 50 == 0:
            self._run._read_losses()

    def fed_step(self) -> None:
        """One step on the next batch from files."""
        self._kept = next(self._batches)
        self.step()

    def pipeline(self) -> None:
        """The next batch from files."""
        next(self._batches)


class Timm:
    """timm's pieces, as its train.py puts them together."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.precision)
        dataset = create_dataset("", root=str(options.data), split="train", is_training=True)
        classes = len(dataset.reader.class_to_idx)
        model: Any = create_model(options.model, num_classes=classes)
        model = model.to(self._device, memory_format=torch.channels_last).train()
        self._optimizer = create_optimizer_v2(model, opt=options.opt, lr=LR, weight_decay=DECAY)
        self._ema = ModelEmaV3(model, decay=EMA)
        self._raw, self._model = model, torch.compile(model) if options.compile else model
        self._loss = LabelSmoothingCrossEntropy(SMOOTHING)
        loader = create_loader(
            dataset, (3, 224, 224), options.batch, is_training=True, auto_augment=RANDAUGMENT, interpolation="bicubic",
            num_workers=WORKERS, device=self._device, scale=(0.08, 1.0), persistent_workers=True,
        )  # fmt: skip
        self._batches: Iterator[Any] = itertools.chain.from_iterable(itertools.repeat(loader))
        self._kept = next(self._batches)

    def step(self) -> None:
        """One step on a batch that is in memory."""
        images, labels = self._kept
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            output = self._model(images)
            output = (output[0] + output[1]) / 2 if isinstance(output, tuple) else output  # V1's two heads in training
            loss = self._loss(output, labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._ema.update(self._raw)
        loss.item()

    def fed_step(self) -> None:
        """One step on the next batch from files."""
        self._kept = next(self._batches)
        self.step()

    def pipeline(self) -> None:
        """The next batch from files."""
        next(self._batches)


SUBJECTS: dict[str, Callable[[argparse.Namespace], Ours | Timm]] = {"timm": Timm, "efficientformer": Ours}


def prepared(name: str, options: argparse.Namespace) -> tuple[dict[str, Any], Runs]:
    """Return what a subject can run: each call waits for its work."""
    subject = SUBJECTS[name](options)

    def run(job: str) -> None:
        getattr(subject, job)()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return {}, {job: partial(run, job) for job in JOBS}


def class_folders(photos: Path) -> Path:
    """Return class folders made of a flat folder of pictures whose names start with their class."""
    if any(path.is_dir() for path in photos.iterdir()):
        return photos
    root = Path(tempfile.mkdtemp())
    for path in sorted(photos.iterdir()):
        folder = root / "train" / path.name.split("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        for copy in range(4):  # so that an epoch of a few hundred pictures is longer than a batch
            shutil.copy(path, folder / f"{copy}_{path.name}")
    return root


def measure(subjects: Mapping[str, Subject], job: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return images per second of each subject, round by round, in turns."""
    found: dict[str, list[float]] = {name: [] for name in subjects}
    count = options.steps * (8 if job == "pipeline" else 1)  # more than are waiting in any queue
    for _ in range(options.rounds):
        for name, subject in subjects.items():
            found[name].append(options.batch * count / sum(subject.turn(job, count)))
    return found


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="class folders, or photos named CLASS_....jpg")
    parser.add_argument("--model", default="efficientformer_l1")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--steps", type=int, default=2, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--serve", choices=SUBJECTS, help=argparse.SUPPRESS)  # a subject's own process
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print, save."""
    options = parse()
    if options.serve:
        serve(partial(prepared, options.serve, options), warmup=2)
        return
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        data = class_folders(options.data)
        train = data / "train" if (data / "train").is_dir() else data
        commands = {
            name: (sys.executable, *sys.argv, "--scratch", scratch, "--serve", name, "--data", str(folder))
            for name, folder in (("timm", train), ("efficientformer", data))
        }
        subjects, skipped = start(commands, stack)
        if skipped:
            raise SystemExit(1)
        figures: dict[str, object] = {}
        for job in JOBS:
            found = measure(subjects, job, options)
            ratios = [b / a for a, b in zip(found["timm"], found["efficientformer"], strict=True)]
            figures[job] = {**{name: spread(values) for name, values in found.items()}, "ratio": spread(ratios)}
            medians = ", ".join(f"{name} {spread(values)['median']:.1f}" for name, values in found.items())
            print(f"{job}: {medians} images/s; ratio {spread(ratios)['median']:.2f}", flush=True)
    kind = f"{options.model}_b{options.batch}_{options.precision}"
    kind += ("" if options.opt == "adamw" else f"_{options.opt}") + ("_compiled" if options.compile else "")
    print(save(f"train-throughput_{kind}", figures, ("torch", "timm", "accelerate", "pillow", "efficientformer")))


if __name__ == "__main__":
    main()
