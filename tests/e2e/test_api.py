"""The Python interface with what people pass it: paths, numpy's numbers, devices, networks in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from efficientformer import Classifier, Recipe, evaluate_model, get_model, inference_model, quantize, train
from efficientformer.export.deployable import embedded_file, file_of
from efficientformer.models.network import EfficientFormer
from efficientformer.runtime.engines import open_engine
from efficientformer.spec.errors import CheckpointError, DownloadError, UnknownModelError, UsageError
from efficientformer.spec.variants import v1_spec
from efficientformer.training.run import Outcome
from efficientformer.training.setup import rooted
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


@pytest.fixture
def run(saved, tmp_path, monkeypatch):
    """The folder of a training run, named from the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("run1").mkdir()
    Path("run1/recipe.json").write_text("{}")
    return Path(shutil.move(saved, "run1/best.safetensors")).parent


def test_the_folder_of_a_run_is_its_best_weights(run, cli):
    assert get_model(run).spec.num_classes == 10
    assert inference_model(run, EXAMPLES / "cat.jpg")["pred_class"] == "cat"
    assert json.loads(cli("info", run, "--json")[1])["file"] == "run1/best.safetensors"
    assert cli("convert", run, "own.onnx")[0] == 0
    assert rooted(Recipe(model="run1", teacher="run1")).model == str(run.absolute() / "best.safetensors")
    assert json.loads(cli("predict", EXAMPLES / "cat.jpg", "-m", run, "--engine", "torch", "-f", "json")[1])
    Path("run1/recipe.json").unlink()  # then it is another project's
    with pytest.raises(UnknownModelError, match=r"Name the weights in it: run1/best\.safetensors"):
        Classifier(run)


def test_a_run_in_a_folder_called_as_a_network_is_named_by_its_path(run):
    run.rename("l1")
    assert file_of("l1") is None
    assert file_of("./l1") == str(Path("l1/best.safetensors"))


def test_the_folder_of_a_slimming_run_with_one_network_is_that(run):
    (run / "best.safetensors").rename(run / "slimmed-2ms.safetensors")
    (run / "slim.json").touch()
    assert file_of("run1") == "run1/slimmed-2ms.safetensors"
    (run / "slimmed-1ms.safetensors").touch()
    assert file_of("run1") is None


def test_a_first_prediction_says_that_it_builds_a_file_and_the_next_one_not(run, cli):
    said = "Building the deployable file of run1; this is done once."
    assert [said in cli("predict", EXAMPLES / "cat.jpg", "-m", run)[2] for _ in range(2)] == [True, False]
    for quiet in (("-m", "run1/best.safetensors", "-q"), ("-m", run, "--engine", "torch"), ("--precision", "int8")):
        assert "Building" not in cli("predict", EXAMPLES / "cat.jpg", *quiet)[2]


def test_evaluations_and_outcomes_are_short_in_print(saved, tmp_path):
    for photo in EXAMPLES.glob("*.jpg"):
        (tmp_path / "data" / photo.stem).mkdir(parents=True)
        shutil.copy(photo, tmp_path / "data" / photo.stem)
    evaluation = evaluate_model(OWN, tmp_path / "data", engine="onnxruntime")
    assert repr(evaluation) == f"Evaluation({OWN!r}, {str(tmp_path / 'data')!r}, top-1 100.00 % of 8 pictures)"
    assert len(repr(Outcome(tmp_path, True, 3, evaluation))) < 400


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((OWN, "small"), rf"expected a Recipe; found '{OWN}'\. Recipe\(model='{OWN}'\)"),
        (({}, "small"), r"expected a Recipe; found a dict\. Recipe\(model=NAME\)"),
        ((Recipe(), [1, 2]), "no data set; expected the path of a folder.*found a list"),
    ],
)
def test_what_other_trainers_take_first_is_said_to_be_none(arguments, says):
    with pytest.raises(UsageError, match=says):
        train(*arguments)


def test_a_device_that_training_does_not_take_says_how_to_choose():
    with pytest.raises(UsageError, match="auto takes the GPUs there are; CUDA_VISIBLE_DEVICES") as caught:
        train(Recipe(), "small", device="cuda")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("call", [Classifier, lambda name: get_model(name, pretrained=True)])
def test_weights_that_cannot_be_fetched_may_be_named_as_the_model(call):
    with pytest.raises(DownloadError, match="Or give a weights file as the model"):
        call("l1")


def test_formats_that_are_not_written_are_said_to_be(cli, tmp_path):
    code, _, err = cli("convert", OWN, tmp_path / "own.tflite")
    assert (code, ".tflite files are not written" in err) == (2, True)


def test_an_engine_takes_a_path_as_text():
    for engine in ("onnxruntime", "openvino"):
        assert open_engine(str(embedded_file()), engine, precision="fp32").key == engine
