"""Does distillation pay? A small EfficientFormer on CIFAR-10, alone and with a larger one of ours as its teacher.

    python benchmarks/distillation.py --data cifar10 --teacher runs/large/best.safetensors --epochs 8

Same network, data, order, augmentation and number of epochs; no teacher, hard and soft distillation. Top-1 on the
10,000 test pictures in single precision, of the averaged weights after the last epoch. Writes the figures and a plot
into benchmarks/results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from common import save

from efficientformer import Recipe, evaluate_model, load_recipe, train
from efficientformer.reporting.page import new_figure, png
from efficientformer.spec.arch import ArchSpec, AttentionSpec
from efficientformer.spec.count import count
from efficientformer.spec.variants import v2_spec

RECIPE = Path(__file__).parents[1] / "recipes" / "cifar10.py"
KINDS: dict[str, dict[str, object]] = {
    "none": {},
    "hard": {"distillation": "hard", "distill_alpha": 0.5},
    "soft": {"distillation": "soft", "distill_alpha": 0.7, "distill_temperature": 2.0},
}


def student() -> ArchSpec:
    """Return the student: an EfficientFormerV2 of about a quarter of the teacher's size, one head."""
    spec = v2_spec(
        (32, 64, 96, 128), ((2, 2), (2, 2), (2, 2), ()), 1,
        input_size=32, num_classes=10, distilled=False, stem_stride=2, stage3_stride=1,
    )  # fmt: skip
    return dataclasses.replace(spec, attention=AttentionSpec(num_heads=4, key_dim=16, value_ratio=2))


def run(recipe: Recipe, data: Path, folder: Path) -> dict[str, Any]:
    """Train once and return the last weights' figures, with the curve."""
    train(recipe, data, folder, quiet=False)
    last = evaluate_model(str(folder / "last.safetensors"), data)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["epoch"], line["val_top1"]) for line in lines if "val_top1" in line]
    return {"top1": last.top1, "loss": last.loss, "curve": curve, "images_per_s": lines[-1]["images_per_s"]}


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw top-1 over epochs."""
    figure = new_figure(6.0, 3.6)
    axes = figure.subplots()
    for kind, row in rows.items():
        axes.plot(*zip(*row["curve"], strict=True), marker=".", label=f"{kind}: {row['top1']:.2f} %")
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1 on CIFAR-10's test pictures (%)")
    axes.legend(title="distillation")
    axes.grid(alpha=0.3)
    path.write_bytes(png(figure))


def main() -> None:
    """Train the three, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    base = load_recipe(RECIPE).with_changes(
        spec=student().to_dict(), epochs=options.epochs, warmup_epochs=options.epochs / 10, refine_epochs=1,
        ema_epochs=1, eval_every=1, seed=options.seed, teacher="", teacher_cache="", views=0,
    )  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, changes in KINDS.items():
            recipe = base.with_changes(**changes, teacher=options.teacher if changes else "")
            rows[kind] = run(recipe, options.data, Path(folder) / kind)
            print(kind, rows[kind]["top1"], flush=True)
    teacher = evaluate_model(options.teacher, options.data)
    counts = {"student": count(student()), "teacher": count(teacher.manifest.spec)}
    sizes = {name: {"params": each.params, "macs": each.macs} for name, each in counts.items()}
    figures = {"recipe": base.to_dict(), "teacher_top1": teacher.top1, "sizes": sizes, "kinds": rows}
    path = save("distillation_cifar10", figures, ("torch", "timm", "efficientformer"))
    plot(rows, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
