"""An EfficientFormer beside MobileNetV2 on CIFAR-10: same recipe, data, order, augmentation and number of epochs.

    python benchmarks/family.py --data cifar10 --epochs 6

MobileNetV2 (width 1.0 and 1.4) is timm's, with the same stem stride as the EfficientFormer: 1. Accuracy is top-1 on the
10,000 test pictures in single precision after the last epoch, of averaged weights; latency is one picture through ONNX
Runtime on one thread, all networks in turns. Writes the figures and a plot into benchmarks/results.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from common import save
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from efficientformer import Recipe, get_model, load_recipe
from efficientformer.data.loader import Loader, decode_all
from efficientformer.data.sources import open_splits
from efficientformer.evaluation.evaluate import evaluate
from efficientformer.evaluation.torch_predictor import TorchPredictor
from efficientformer.models.fold import fold
from efficientformer.reporting.page import new_figure, png
from efficientformer.runtime.timing import Timing, time_together
from efficientformer.spec.zoo import EMBEDDED, resolve
from efficientformer.training.loop import seed_everything
from efficientformer.training.optim import learning_rate
from efficientformer.training.setup import open_loader
from efficientformer.training.task import Supervised

RECIPE = Path(__file__).parents[1] / "recipes" / "cifar10.py"
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    EMBEDDED: lambda: get_model(EMBEDDED, layer_scale_init=0.1),
    "mobilenetv2_100": lambda: mobilenet("mobilenetv2_100"),
    "mobilenetv2_140": lambda: mobilenet("mobilenetv2_140"),
}


def mobilenet(name: str) -> nn.Module:
    """Return timm's MobileNetV2 with the stem stride of the EfficientFormer."""
    model = create_model(name, num_classes=10)
    stride = resolve(EMBEDDED).card.spec.stem_stride
    model.conv_stem.stride = (stride, stride)
    return model


def fit(model: nn.Module, loader: Loader, recipe: Recipe) -> tuple[nn.Module, float]:
    """Train a network, any network, and return its averaged weights and the seconds it took."""
    task, per_epoch = Supervised(recipe, 10), loader.plan.steps_per_epoch
    optimizer = create_optimizer_v2(
        model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, **recipe.opt_args
    )
    average = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
    averaged_from = (recipe.epochs - recipe.ema_epochs) * per_epoch
    start = time.perf_counter()
    for batch in loader.batches(0, recipe.epochs * per_epoch):
        step = batch.draws.step
        seed_everything(recipe.seed, step, 0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, per_epoch)
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = task(model, batch).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == averaged_from:
            average.set(model)
        if step >= averaged_from:
            average.update(model, step=step - averaged_from + 1)
        if (step + 1) % per_epoch == 0:
            done, minutes = (step + 1) // per_epoch, (time.perf_counter() - start) / 60
            print(f"epoch {done} of {recipe.epochs}, {minutes:.1f} minutes, last loss {loss.item():.3f}", flush=True)
    return average.module, time.perf_counter() - start


def fit_once(model: nn.Module, loader: Loader, recipe: Recipe, kept: Path | None) -> tuple[nn.Module, float]:
    """Train a network, or take what an earlier run of the same recipe kept."""
    if kept is None:
        return fit(model, loader, recipe)
    if not kept.exists():
        average, seconds = fit(model, loader, recipe)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"recipe": recipe.to_json(), "weights": average.state_dict(), "seconds": seconds}, kept)
    state = torch.load(kept, weights_only=True)
    if state["recipe"] != recipe.to_json():
        raise SystemExit(f"{kept} is of another recipe")
    model.load_state_dict(state["weights"])
    return model, state["seconds"]


def session(model: nn.Module, folder: Path, name: str) -> tuple[ort.InferenceSession, str]:
    """Export a network as its users would, and open it on one thread."""
    path = folder / f"{name}.onnx"
    torch.onnx.export(model.eval(), (torch.rand(1, 3, 32, 32),), path, opset_version=20, dynamo=True, verbose=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    opened = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return opened, opened.get_inputs()[0].name


def latencies(models: dict[str, nn.Module], rounds: int = 400) -> dict[str, Timing]:
    """Time one picture through every network, one run of each in turn."""
    picture = np.random.default_rng(0).random((1, 3, 32, 32), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        opened = {name: session(model, Path(folder), name) for name, model in models.items()}
        runs = {name: partial(engine.run, None, {port: picture}) for name, (engine, port) in opened.items()}
        return time_together(runs, rounds=rounds, warmup=20, burst=1)


def macs(model: nn.Module) -> float:
    """Return multiply-accumulates for one picture, in millions, as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.rand(1, 3, 32, 32))
    return counter.get_total_flops() / 2e6


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw top-1 over latency."""
    figure = new_figure(6.0, 4.0)
    axes = figure.subplots()
    for name, row in rows.items():
        axes.scatter(row["latency"]["median_ms"], row["top1"], s=20 * row["params_m"])
        text = f"{name}\n{row['params_m']:.2f} M, {row['macs_m']:.0f} MMACs"
        place = (row["latency"]["median_ms"], row["top1"])
        axes.annotate(text, place, textcoords="offset points", xytext=(8, -4))
    axes.margins(0.35, 0.25)
    axes.set_xlabel("latency of one picture, ONNX Runtime, one thread (ms)")
    axes.set_ylabel("top-1 on CIFAR-10's test pictures (%)")
    axes.grid(alpha=0.3)
    path.write_bytes(png(figure))


def main() -> None:
    """Train each network, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the trained networks; those it holds are not trained")
    options = parser.parse_args()
    changes = {"epochs": options.epochs, "warmup_epochs": options.epochs / 10, "refine_epochs": 1, "ema_epochs": 1}
    recipe = load_recipe(RECIPE).with_changes(**changes, seed=options.seed, workers=2, teacher="", teacher_cache="")
    splits = open_splits(options.data)
    manifest = resolve(EMBEDDED).card.manifest(None)
    images, source, _ = decode_all(splits.train, manifest.preprocess, recipe.workers)
    loader = open_loader(recipe, source, images, manifest.preprocess, 0, 1)
    rows: dict[str, dict[str, Any]] = {}
    trained: dict[str, nn.Module] = {}
    for name, build in NETWORKS.items():
        torch.manual_seed(options.seed)
        model = build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        average, seconds = fit_once(model, loader, recipe, options.keep and options.keep / f"{name}.pt")
        evaluation = evaluate(TorchPredictor(average, manifest), splits.val, batch_size=256, keep_worst=0)
        parameters: list[Tensor] = list(model.parameters())
        rows[name] = {"top1": evaluation.top1, "loss": evaluation.loss, "train_seconds": round(seconds, 1),
                      "params_m": sum(p.numel() for p in parameters) / 1e6, "macs_m": macs(average)}  # fmt: skip
        trained[name] = fold(average) if name == EMBEDDED else average
        print(name, rows[name], flush=True)
    for name, timing in latencies(trained).items():
        rows[name]["latency"] = timing.to_dict()
        print(f"{name}: {timing.median_ms:.3f} ms", flush=True)
    figures = {"recipe": recipe.to_dict(), "networks": rows}
    path = save("family_cifar10", figures, ("torch", "timm", "onnxruntime", "efficientformer"))
    plot(rows, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
