"""The process that runs one network in one engine and precision: ``python -m efficientformer.benchmarking.worker``.

Its argument is a JSON object: ``model``, ``engine``, ``precision``, ``threads``, ``offline`` if it is not left to the
environment, and either ``batches`` (the engine alone is run, on noise) or ``picture`` (from the file to the label, and
its parts).
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from efficientformer.benchmarking.subject import Runs, serve
from efficientformer.runtime.choice import choose
from efficientformer.runtime.classifier import EngineClassifier
from efficientformer.runtime.engines import Engine, open_engine
from efficientformer.runtime.engines.openvino import OpenVinoEngine
from efficientformer.runtime.image import decode
from efficientformer.runtime.preprocess import normalise, resize_crop
from efficientformer.spec.errors import missing_extra

DECODE, RESIZE, NORMALISE, ENGINE, WHOLE = "decode", "resize and crop", "normalise", "engine", "file to label"


def prepare(job: dict[str, Any]) -> tuple[dict[str, Any], Runs]:
    """Open what a job asks for; return what it is, and its runs by name."""
    engine = _open(job)
    facts = {"engine": engine.key, "name": engine.name, "precision": engine.precision}
    runs = _picture_runs(engine, Path(job["picture"])) if "picture" in job else _batch_runs(engine, job["batches"])
    return facts, runs


def _open(job: dict[str, Any]) -> Engine:
    engine, precision, threads = job["engine"], job["precision"], job["threads"]
    if engine.startswith("torch"):
        return _open_torch(job["model"], precision, threads, job.get("offline"), compiled=engine == "torch-compile")
    path = Path(job["model"])
    if engine == "auto":
        choice = choose(path, precision, threads=threads)
        engine, precision = choice.engine, choice.precision
    return open_engine(path, engine, precision=precision, threads=threads)


def _open_torch(model: str, precision: str, threads: int | None, offline: bool | None, *, compiled: bool) -> Engine:
    """Open a network in torch, in deploy form, on the CPU: the machine all other engines run on."""
    try:
        import torch
    except ImportError as error:
        raise missing_extra("torch", "Running a network in torch", error) from error
    from efficientformer.evaluation.torch_predictor import TorchPredictor, use_threads
    from efficientformer.models.fold import fold
    from efficientformer.weights.pretrained import build, load_named

    use_threads(threads)
    weights, manifest = load_named(model, model if Path(model).is_file() else True, offline=offline)
    network = fold(build(manifest.spec, weights)).to(memory_format=torch.channels_last)
    return TorchPredictor(network, manifest, "cpu", precision, compiled=compiled)


def _batch_runs(engine: Engine, batches: list[int]) -> Runs:
    if isinstance(engine, OpenVinoEngine):
        engine.exact = True  # else a batch might run as part of a larger one
    spec = engine.manifest.spec
    rng = np.random.default_rng(0)
    shapes = {str(batch): (batch, spec.in_chans, *spec.input_size) for batch in batches}
    images = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {name: partial(engine.run, batch) for name, batch in images.items()}


def _picture_runs(engine: Engine, picture: Path) -> Runs:
    """Return the steps from a file to its label, each alone on the result of the one before, and all together."""
    spec, classifier = engine.manifest.preprocess, EngineClassifier(engine)

    def decoded() -> Any:  # noqa: ANN401 (a Pillow image)
        return decode(picture, mode=spec.mode, exif=spec.exif)

    image = decoded()
    cropped = resize_crop(image, spec)
    batch = normalise([cropped], spec)
    return {
        DECODE: decoded,
        RESIZE: lambda: resize_crop(image, spec),
        NORMALISE: lambda: normalise([cropped], spec),
        ENGINE: lambda: engine.run(batch),
        WHOLE: lambda: classifier(picture),
    }


if __name__ == "__main__":
    serve(lambda: prepare(json.loads(sys.argv[1])))
