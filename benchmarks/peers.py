"""The peers' side of the benchmarks: each kind below is one subject in a process of its own.

    python benchmarks/peers.py '{"kind": "timm", "model": "efficientformer_l1"}'      (started by the scripts beside it)

Weights are random everywhere: speed does not depend on them, and nothing is downloaded. Each subject is used as its
own documentation says; building, exporting, loading and compiling happen before anything is timed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from efficientformer.benchmarking.subject import Runs, serve

Prepared = tuple[dict[str, Any], Runs]
SIDE = 224
MATRIX = 2048  # side of the square matrices whose product gives the machine's rate


def timm_model(name: str) -> Any:  # noqa: ANN401 (a torch module; timm has no types)
    """Return timm's network in evaluation mode, its BatchNorms with statistics that cannot be optimised away."""
    import timm
    import torch

    from efficientformer.benchmarking.networks import randomise_norms

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    randomise_norms(model)
    return model


def export_timm(name: str, path: Path) -> None:
    """Write timm's network with torch.onnx.export, as a user without this package would."""
    import torch

    torch.onnx.export(timm_model(name), (torch.randn(1, 3, SIDE, SIDE),), str(path), dynamo=True, verbose=False)


def in_torch(job: dict[str, Any]) -> Prepared:
    """The network of timm in torch, one image: eager, or compiled."""
    import torch

    model = timm_model(job["model"])
    model = torch.compile(model) if job.get("compile") else model
    images = torch.randn(1, 3, SIDE, SIDE)

    @torch.inference_mode()
    def run() -> None:
        model(images)

    return {}, {"1": run}


def in_onnxruntime(job: dict[str, Any]) -> Prepared:
    """A plain export in ONNX Runtime, with the session's own defaults."""
    import onnxruntime

    session = onnxruntime.InferenceSession(job["path"], providers=["CPUExecutionProvider"])
    name, images = (
        session.get_inputs()[0].name,
        np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE), np.float32),
    )
    return {}, {"1": lambda: session.run(None, {name: images})}


def in_openvino(job: dict[str, Any]) -> Prepared:
    """The network of timm through ov.convert_model, with OpenVINO's own defaults or in the precision asked for."""
    import openvino
    import torch

    example = torch.randn(1, 3, SIDE, SIDE)
    model = openvino.convert_model(timm_model(job["model"]), example_input=example, input=[1, 3, SIDE, SIDE])
    options = {"INFERENCE_PRECISION_HINT": job["precision"]} if job.get("precision") else {}
    compiled = openvino.Core().compile_model(model, "CPU", options)
    images = example.numpy()
    return {"precision": str(compiled.get_property("INFERENCE_PRECISION_HINT"))}, {"1": lambda: compiled(images)}


def gemm(job: dict[str, Any]) -> Prepared:
    """A large matrix product in torch (oneDNN): what the cores give at best."""
    import torch

    shape = (MATRIX, MATRIX)
    if job["precision"] == "int8":
        a, b = (torch.randint(-128, 127, shape, dtype=torch.int8) for _ in range(2))
        return {}, {"1": lambda: torch._int_mm(a, b)}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]
    c, d = (torch.randn(shape).to(dtype) for _ in range(2))
    return {}, {"1": lambda: c @ d}


def timm_picture(job: dict[str, Any]) -> Prepared:
    """One file to label as timm documents it: PIL, the network's transform, softmax, topk."""
    import timm
    import torch
    from PIL import Image

    model = timm_model(job["model"])
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))

    @torch.inference_mode()
    def run() -> None:
        image = Image.open(job["picture"]).convert("RGB")
        output = model(transform(image).unsqueeze(0))
        torch.topk(output.softmax(dim=1) * 100, k=5)

    return {}, {"file to label": run}


def mmpretrain_picture(job: dict[str, Any]) -> Prepared:
    """One file to label in mmpretrain, with an inferencer, and with inference_model and a model object."""
    from mmpretrain import ImageClassificationInferencer, get_model, inference_model

    model = get_model(job["model"], pretrained=False, device="cpu").eval()
    inferencer = ImageClassificationInferencer(model, device="cpu")
    return {}, {
        "inferencer": lambda: inferencer(job["picture"]),
        "inference_model": lambda: inference_model(model, job["picture"]),
    }


def timm_folder(job: dict[str, Any]) -> Prepared:
    """Every picture of a folder through timm's dataset and a DataLoader with workers."""
    import timm
    import torch

    model: Any = timm_model(job["model"])
    config = timm.data.resolve_data_config({}, model=model)
    model = model.to(memory_format=torch.channels_last)
    model = torch.compile(model) if job.get("compile") else model
    transform = timm.data.create_transform(**config)

    @torch.inference_mode()
    def classify(folder: str) -> None:
        dataset = timm.data.create_dataset("", root=folder, transform=transform)
        for images, _ in torch.utils.data.DataLoader(dataset, job["batch"], num_workers=job["workers"]):
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(job.get("bf16"))):
                model(images.contiguous(memory_format=torch.channels_last)).float().softmax(1).argmax(1).tolist()

    classify(job["warm_up_on"])
    return {}, {"folder": lambda: classify(job["folder"])}


def our_folder(job: dict[str, Any]) -> Prepared:
    """Every picture of a folder through our bulk path."""
    from efficientformer import Classifier, Failed

    network = Classifier(job["model"])

    def classify(folder: str) -> list[int]:
        paths = sorted(Path(folder).rglob("*.jpg"))
        found = network.predict(paths)
        return [each.label for each in found if not isinstance(each, Failed)]

    classify(job["warm_up_on"])
    return {"name": network.engine}, {"folder": lambda: classify(job["folder"])}


KINDS: dict[str, Callable[[dict[str, Any]], Prepared]] = {
    "torch": in_torch,
    "onnxruntime": in_onnxruntime,
    "openvino": in_openvino,
    "gemm": gemm,
    "timm_picture": timm_picture,
    "mmpretrain_picture": mmpretrain_picture,
    "timm_folder": timm_folder,
    "our_folder": our_folder,
}

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    serve(lambda: KINDS[asked["kind"]](asked), warmup=asked.get("warmup", 5))
