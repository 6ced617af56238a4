"""Puts a trained network into the package: checkpoint, exported file and int8 file, each compared or measured.

python tools/embed.py runs/final --data originals        # trained as recipes/cifar10.py says
efficientformer test efficientformer_cifar10 --data cifar10
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

import torch

from efficientformer import evaluate_model, quantize
from efficientformer.export.onnx import export_onnx
from efficientformer.spec.zoo import EMBEDDED, resolve
from efficientformer.training.recipe import load_recipe
from efficientformer.weights.checkpoint import load_checkpoint, save_native
from efficientformer.weights.pretrained import build

ASSETS = Path(str(files("efficientformer") / "assets"))
RECIPE = "recipes/cifar10.py, then four times recipes/cifar10_cutmix.py"
DATA = "CIFAR-10"


def main() -> None:
    """Write the three files, in half precision and int8; say what was compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder of the training")
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 in class folders, train/ and test/")
    options = parser.parse_args()
    checkpoint = load_checkpoint(options.run / "last.safetensors")
    assert checkpoint.manifest is not None
    if checkpoint.spec != resolve(EMBEDDED).card.spec:
        raise SystemExit(f"{options.run} holds another architecture than spec/variants.py has for {EMBEDDED}")
    seed = str(load_recipe(options.run).seed)
    provenance = {"model": EMBEDDED, "source": "embedded", "recipe": RECIPE, "data": DATA, "seed": seed}
    measured = evaluate_model(options.run / "last.safetensors", options.data, engine="torch")
    assert measured.top5 is not None  # of ten classes
    metrics = {"top1": round(measured.top1, 4), "top5": round(measured.top5, 4)}
    manifest = dataclasses.replace(checkpoint.manifest, provenance=provenance, metrics=metrics)
    network = build(manifest.spec, checkpoint)
    agreement = export_onnx(network, manifest, ASSETS / f"{EMBEDDED}.onnx", half_storage=True)
    print(f"largest difference of a logit {agreement.max_difference:.1e} of {agreement.largest_logit:.2f}")
    save_native(ASSETS / f"{EMBEDDED}.safetensors", network.state_dict(), manifest, dtype=torch.float16)
    with tempfile.TemporaryDirectory() as folder:
        report = quantize(EMBEDDED, options.data, Path(folder) / "int8", holdout=10_000)
        shutil.copy(Path(folder) / "int8" / "model.onnx", ASSETS / f"{EMBEDDED}-int8.onnx")
    print(report.accuracy, report.sizes)


if __name__ == "__main__":
    main()
