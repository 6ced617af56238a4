"""The Python interface with what people pass it: paths, numpy's numbers, devices, networks in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from efficientformer import Classifier, evaluate_model, get_model, inference_model, quantize
from efficientformer.export.deployable import embedded_file
from efficientformer.models.network import EfficientFormer
from efficientformer.spec.errors import CheckpointError, UnknownModelError, UsageError
from efficientformer.spec.variants import v1_spec
from efficientformer.weights.checkpoint import save_foreign, save_native
from efficientformer.weights.pretrained import load_named

EXAMPLES = Path(__file__).parents[2] / "examples"
OWN = "efficientformer_cifar10"


@pytest.fixture
def saved(tmp_path):
    checkpoint, manifest = load_named(OWN, True)
    save_native(tmp_path / "own.safetensors", checkpoint.state, manifest)
    return tmp_path / "own.safetensors"


def test_paths_are_names(saved):
    assert get_model(saved).spec.num_classes == 10
    assert Classifier(saved, engine="torch")(EXAMPLES / "cat.jpg").name == "cat"
    assert Classifier(embedded_file(), engine="onnxruntime")(EXAMPLES / "cat.jpg").name == "cat"
    assert inference_model(saved, EXAMPLES / "cat.jpg")["pred_class"] == "cat"


@pytest.mark.parametrize("call", [
    Classifier,
    get_model,
    lambda model: inference_model(model, EXAMPLES / "cat.jpg"),
    lambda model: evaluate_model(model, EXAMPLES),
    lambda model: quantize(model, EXAMPLES, "out"),
])  # fmt: skip
def test_what_names_no_network_is_said_to(call):
    with pytest.raises(UsageError, match=r"names no network.*found a Linear.*save_model"):
        call(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("call", [Classifier, get_model, lambda name: inference_model(name, EXAMPLES / "cat.jpg")])
@pytest.mark.parametrize("name", ["x" * 300, "nul\0"])
def test_names_that_no_file_can_have_are_unknown(call, name):
    with pytest.raises(UnknownModelError, match="Unknown model"):
        call(name)


def test_numbers_of_numpy_and_devices_of_torch():
    model = get_model(OWN, num_classes=np.int64(3), input_size=np.int64(64))
    assert (model.spec.num_classes, model.spec.input_size) == (3, (64, 64))
    assert type(model.spec.num_classes) is int
    assert get_model(OWN, input_size=tuple(np.array([32, 64]))).spec.input_size == (32, 64)
    assert get_model(OWN, pretrained=None).spec == get_model(OWN).spec
    assert Classifier(OWN, engine="onnxruntime", device=torch.device("cpu"))(EXAMPLES / "cat.jpg").name == "cat"


def test_what_lies_beside_a_link_counts_not_beside_what_it_leads_to(tmp_path):
    """As the folders of Hugging Face's cache are made."""
    spec = v1_spec((16, 16, 16, 16), (0, 0, 0, 0), 0, input_size=32, num_classes=2)
    (tmp_path / "blob").mkdir()
    save_foreign(tmp_path / "blob" / "0.safetensors", EfficientFormer(spec).state_dict(), spec, "timm")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob" / "0.safetensors")
    config = {"architecture": "efficientformer_l1", "label_names": ["left", "right"], "input_size": [3, 32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inference_model(tmp_path / "model.safetensors", EXAMPLES / "cat.jpg")
    assert found["pred_class"] in ("left", "right")


def test_a_file_that_is_replaced_is_opened_again(tmp_path):
    file = tmp_path / "mine.onnx"
    shutil.copy(embedded_file(), file)
    assert inference_model(file, EXAMPLES / "cat.jpg")["pred_class"] == "cat"
    file.unlink()
    with pytest.raises(CheckpointError, match="There is no weights file"):
        inference_model(file, EXAMPLES / "cat.jpg")
