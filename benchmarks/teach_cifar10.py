"""Teaches the network in the package: trains a teacher of dense convolutions on CIFAR-10, then distils from it.

    python benchmarks/teach_cifar10.py --data cifar10 -o runs/taught

The teacher is no network of the family: where pictures are few and epochs dear, dense 3x3 convolutions learn most from
each picture, and processors with AMX or a GPU compute them at full speed. It is trained in two parts, as the student
was before: without cutmix, then with it. Its weights are kept beside the output after each; the same command goes on
with what is there. Top-1 is that of the 10,000 test pictures, of the teacher in bf16; no epoch of either is chosen by
it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from family import RECIPE, fit_once
from torch import Tensor, nn

from efficientformer import evaluate_model, load_recipe, train
from efficientformer.data.loader import decode_all
from efficientformer.data.sources import open_splits
from efficientformer.evaluation.evaluate import evaluate
from efficientformer.evaluation.torch_predictor import TorchPredictor
from efficientformer.spec.zoo import EMBEDDED, resolve
from efficientformer.training.allocator import freed_memory_kept
from efficientformer.training.setup import open_loader

PARTS: tuple[dict[str, Any], ...] = (
    {"epochs": 14, "refine_epochs": 2, "ema_epochs": 2, "seed": 0},
    {"epochs": 12, "refine_epochs": 1, "ema_epochs": 3, "seed": 1, "lr": 0.015, "cutmix": 1.0, "mix_prob": 0.8},
)
STUDENT = {"label_smoothing": 0.0, "distillation": "soft", "distill_alpha": 0.9, "distill_temperature": 2.0}


class DenseConv(nn.Sequential):
    """3x3 convolution, pooling if the map is halved, BatchNorm, GELU: (B, C, h, w) to (B, out, h', w')."""

    def __init__(self, dim: int, out_dim: int, *, halve: bool = False) -> None:
        pool = [nn.MaxPool2d(2)] if halve else []  # before what passes over the map, which is then a quarter
        conv = nn.Conv2d(dim, out_dim, 3, padding=1, bias=False)
        super().__init__(conv, *pool, nn.BatchNorm2d(out_dim), nn.GELU())


class Residual(nn.Sequential):
    """Two convolutions beside an identity: (B, C, h, w) to (B, C, h, w)."""

    def __init__(self, dim: int) -> None:
        super().__init__(DenseConv(dim, dim), DenseConv(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Refine a map."""
        return x + super().forward(x)


def dense_network(classes: int) -> nn.Sequential:
    """Return the teacher: pictures (B, 3, 32, 32) to logits (B, classes), 5.2 M parameters."""
    return nn.Sequential(
        DenseConv(3, 32),
        DenseConv(32, 128, halve=True), DenseConv(128, 128),
        DenseConv(128, 256, halve=True), Residual(256),
        DenseConv(256, 384, halve=True), Residual(384),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(384, classes),
    )  # fmt: skip


class BothWays(nn.Module):
    """A network asked twice, of the picture and its mirror image: the mean of both logits (B, K)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Classify pictures (B, 3, h, w)."""
        return (self.network(x) + self.network(x.flip(-1))) / 2


def make_teacher(data: Path, output: Path, short: dict[str, Any]) -> nn.Module:
    """Train the teacher, or take what an earlier run kept; print its top-1."""
    base = load_recipe(RECIPE).with_changes(warmup_epochs=1, workers=2)
    splits, manifest = open_splits(data), resolve(EMBEDDED).card.manifest(None)
    images, source, _ = decode_all(splits.train, manifest.preprocess, base.workers)
    torch.manual_seed(0)
    network: nn.Module = dense_network(len(source.classes)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for number, changes in enumerate(PARTS, 1):
        recipe = base.with_changes(**{**changes, **short})
        loader = open_loader(recipe, source, images, manifest.preprocess, 0, 1)
        with freed_memory_kept():
            kept = output.with_name(f"{output.name}-teacher-{number}.pt")
            network, seconds = fit_once(network, loader, recipe, kept)
        print(f"teacher, part {number}: {seconds / 60:.0f} minutes, top-1 of one look and of two:", flush=True)
        for teacher in (network, BothWays(network)):
            with torch.autocast("cpu", torch.bfloat16):
                evaluation = evaluate(TorchPredictor(teacher, manifest), splits.val, batch_size=256, keep_worst=0)
            print(f"{evaluation.top1:.2f} %", flush=True)
    return BothWays(network)


def main() -> None:
    """Make the teacher, and teach."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-m", "--model", default=EMBEDDED, help="the weights to go on from")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the student's run folder")
    parser.add_argument("--short", action="store_true", help="an epoch of each, to see that it runs")
    options = parser.parse_args()
    output: Path = options.output
    short = {"epochs": 1, "warmup_epochs": 0.5, "refine_epochs": 0, "ema_epochs": 1} if options.short else {}
    teacher = make_teacher(options.data, output, short)
    if output.exists():
        outcome = train(resume=output, teacher=teacher, quiet=False)
    else:
        recipe = load_recipe(RECIPE.with_name("cifar10_cutmix.py"))
        recipe = recipe.with_changes(**{**STUDENT, **short}, model=options.model)
        outcome = train(recipe, options.data, output, teacher=teacher, quiet=False)
    if outcome.finished:
        last = outcome.folder / "last.safetensors"
        print(f"student, last weights: {evaluate_model(last, options.data).top1:.2f} %")


if __name__ == "__main__":
    main()
