"""``efficientformer test`` as a user runs it, on a small folder of pictures, with the network in the package."""

import csv
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import efficientformer
from efficientformer.export.deployable import quantised_file
from efficientformer.weights.checkpoint import save_native
from efficientformer.weights.pretrained import load_named

EXAMPLES = Path(__file__).parents[2] / "examples"
ASSETS = Path(str(files("efficientformer") / "assets"))
ONNX, CHECKPOINT = ASSETS / "efficientformer_cifar10.onnx", ASSETS / "efficientformer_cifar10.safetensors"
CROPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set with a val and a train part; val holds crops of the example photographs in a folder a class."""
    root = tmp_path_factory.mktemp("data")
    for photo in sorted(EXAMPLES.glob("*.jpg")):
        image = Image.open(photo).convert("RGB")
        side = min(image.size)
        folder = root / "val" / photo.stem
        folder.mkdir(parents=True)
        for index in range(CROPS):
            left = (image.width - side) * index // CROPS
            image.crop((left, 0, left + side, side - 8 * index)).resize((64, 64)).save(folder / f"{index}.png")
    for name in ("cat", "dog"):
        (root / "train" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(root / "train" / name / "black.png")
    return root


@pytest.fixture
def damaged(data):
    """The same with a file that is no picture, for one test."""
    path = data / "val" / "cat" / "broken.jpg"
    path.write_bytes(b"no picture")
    yield path
    path.unlink()


def images(data):
    return len(list(data.glob("val/*/*.png")))


def result(cli, *arguments):
    code, out, err = cli("test", *arguments, "--json", "--quiet")
    assert code == 0, err
    return json.loads(out)


def test_the_exported_file_and_the_checkpoint_agree(cli, data):
    exported = result(cli, ONNX, "--data", data)
    checkpoint = result(cli, CHECKPOINT, "--data", data)
    named = result(cli, "efficientformer_cifar10", "--data", data, "--batch-size", 5, "--workers", 1)
    assert exported["engine"].endswith("(fp32)")
    assert checkpoint["engine"].startswith("torch")
    assert exported["images"] == checkpoint["images"] == images(data) == 24
    for other in (checkpoint, named):
        assert other["confusion"] == exported["confusion"]
        assert other["loss"] == pytest.approx(exported["loss"], abs=1e-3)
    assert exported["top1"] > 60  # photographs of just these things
    assert exported["data"].endswith("(val)")
    assert (named["model"], checkpoint["model"]) == ("efficientformer_cifar10", CHECKPOINT.name)


def test_the_int8_file_of_a_network_is_measured(cli, data):
    code, out, err = cli("test", "efficientformer_cifar10", "--data", data, "--precision", "int8", "--json", "--quiet")
    assert code == 0, err
    assert "int8" in json.loads(out)["engine"]


def test_a_folder_that_quantize_wrote_is_measured(cli, data, tmp_path):
    (tmp_path / "small-int8").mkdir()
    shutil.copy(quantised_file(""), tmp_path / "small-int8" / "model.onnx")
    found = result(cli, tmp_path / "small-int8", "--data", data)
    assert "int8" in found["engine"]
    assert found["model"] == "small-int8"


def test_the_figures_are_those_of_predict(cli, data):
    code, out, _ = cli("predict", data / "val", "--model", ONNX, "--format", "json")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    right = np.mean([line["pred_class"] == Path(line["path"]).parent.name for line in lines])
    assert result(cli, ONNX, "--data", data)["top1"] == pytest.approx(100 * right)


def test_a_damaged_picture_is_named_and_the_exit_code_is_1(cli, data, damaged, tmp_path):
    output, report = tmp_path / "result.json", tmp_path / "report.html"
    code, out, err = cli("test", ONNX, "--data", data, "--output", output, "--report", report)
    assert code == 1
    assert "skipped cat/broken.jpg" in err
    assert "1 of 25 pictures were skipped" in err
    saved = json.loads(output.read_text())
    assert saved["images"] == 24
    assert saved["skipped_list"][0]["name"] == "cat/broken.jpg"
    page = report.read_text()
    assert "cat/broken.jpg" in page
    assert f"{saved['top1']:.2f} %" in page
    assert f"{saved['top1']:.2f} %" in out
    assert "automobile" in out  # the table of classes
    assert "{" not in out


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_names_that_are_no_utf8_are_stored(cli, data, tmp_path, ending):
    odd = data / "val" / "cat" / "caf\udce9.png"
    shutil.copy(data / "val" / "cat" / "0.png", odd)
    try:
        assert cli("test", ONNX, "--data", data, "--output", tmp_path / f"p.{ending}", "--quiet")[0] == 0
    finally:
        odd.unlink()
    assert r"cat/caf\udce9.png" in (tmp_path / f"p.{ending}").read_text("utf-8").replace("\\\\", "\\")


def test_names_in_csv_are_those_of_files(cli, data, tmp_path):
    odd = data / "val" / "cat" / "a\u202fb.png"
    shutil.copy(data / "val" / "cat" / "0.png", odd)
    try:
        assert cli("test", ONNX, "--data", data, "--output", tmp_path / "p.csv", "--quiet")[0] == 0
    finally:
        odd.unlink()
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        assert "cat/a\u202fb.png" in [row["path"] for row in csv.DictReader(file)]


def test_what_was_predicted_of_each_picture(cli, data, damaged, tmp_path):
    lines, table = tmp_path / "p.jsonl", tmp_path / "p.csv"
    for file in (lines, table):
        assert cli("test", ONNX, "--data", data, "--output", file, "--quiet")[0] == 1
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(rows) == images(data)
    assert all(row["path"].startswith(row["true_class"]) for row in rows)
    _, out, _ = cli("predict", data / "val" / rows[0]["path"], "--model", ONNX, "--format", "json", "--quiet")
    alone = json.loads(out)
    assert (alone["pred_class"], round(alone["pred_score"], 3)) == (
        rows[0]["pred_class"],
        round(rows[0]["pred_score"], 3),
    )
    with table.open() as file:
        assert [row["pred_class"] for row in csv.DictReader(file)] == [row["pred_class"] for row in rows]


def test_the_part_of_the_data(cli, data):
    assert result(cli, ONNX, "--data", data, "--split", "train")["images"] == 2
    assert result(cli, ONNX, "--data", data / "train")["images"] == 2
    assert result(cli, ONNX, "--data", data, "--split", "test")["data"].endswith("(val)")
    code, _, err = cli("test", ONNX, "--data", data, "--split", "night")
    assert code == 2
    assert "train, val, test" in err


def test_measuring_what_a_network_was_trained_on_is_noted(cli, data, tmp_path):
    weights, manifest = load_named(CHECKPOINT, True)
    file = tmp_path / "own.safetensors"
    save_native(file, weights.state, dataclasses.replace(manifest, provenance={"source": "trained"}))
    shutil.copytree(data / "train", tmp_path / "data" / "train")
    for noted, *arguments in [(False, data), (True, data, "--split", "train"), (True, tmp_path / "data")]:
        notes = result(cli, file, "--data", *arguments)["notes"]
        assert any("training part: pictures that this network was trained on may" in note for note in notes) == noted


@pytest.mark.parametrize("folder", ["", "configs/efficientformer/"])
@pytest.mark.parametrize("ending", ["", ".py"])
def test_called_as_the_old_tool(cli, data, folder, ending):
    config = f"{folder}efficientformer_cifar10{ending}"
    found = result(cli, config, CHECKPOINT, "--data", data, "--engine", "torch")
    assert found["model"] == f"efficientformer_cifar10 with {CHECKPOINT.name}"
    code, _, err = cli("test", f"{folder}efficientformer-l1_8xb128_in1k{ending}", CHECKPOINT, "--data", data)
    assert code == 1
    assert "holds another network than efficientformer_l1" in err  # so the config's name was understood


def test_a_config_that_exists_is_no_weights_file(cli, data, tmp_path, monkeypatch):
    (tmp_path / "efficientformer_cifar10.py").write_text("model = dict()")
    monkeypatch.chdir(tmp_path)
    assert result(cli, "efficientformer_cifar10.py", ONNX, "--data", data)["images"] == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("efficientformer_cifar11",), "efficientformer_cifar10"),
        ((ONNX, "--engine", "torch"), "does not run in torch"),
        ((ONNX, "--device", "cuda"), "Only torch"),
        ((ONNX, "--engine", "abacus"), "'onnxruntime'"),
        ((CHECKPOINT, "--precision", "int4"), "'bf16'"),
        ((CHECKPOINT, CHECKPOINT), "Two weights files"),
        ((ONNX, CHECKPOINT, "--checkpoint", CHECKPOINT), "Two checkpoints"),
        ((ONNX, CHECKPOINT, CHECKPOINT), "Too many arguments"),
        ((ONNX, "--report", "/no/such/folder/report.html"), "Cannot write"),
        ((ONNX, "--output", "."), "a folder"),
        ((ONNX, "--output", "predictions.parquet"), ".json, .jsonl or .csv"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(cli, data, arguments, message):
    code, out, err = cli("test", *arguments, "--data", data)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("option", ["--output", "--report"])
def test_a_full_disk_does_not_cost_the_figures(cli, data, damaged, option):
    code, out, err = cli("test", ONNX, "--data", data, option, "/dev/full")
    assert code == 2
    assert "top-1" in out
    assert f"skipped cat/{damaged.name}" in err
    assert "error: Cannot write /dev/full; found No space left on device" in err
    assert "Wrote" not in err


def test_a_file_that_is_not_to_be_written_is_refused_before_the_work(cli, tmp_path, monkeypatch):
    output = closed(tmp_path / "mine.json", monkeypatch)
    code, _, err = cli("test", ONNX, "--data", tmp_path / "no data", "--output", output)
    assert code == 2
    assert f"Cannot write {output}; expected a file in a writable folder; found a file that" in err


def test_a_file_may_be_written_in_a_folder_that_may_not(cli, data, tmp_path, monkeypatch):
    """As /dev/stdout is for most users."""
    output = tmp_path / "mine.json"
    output.touch()
    closed(tmp_path, monkeypatch)
    assert cli("test", ONNX, "--data", data, "--output", output, "--quiet")[0] == 0
    assert json.loads(output.read_text())["images"] == images(data)


def closed(path, monkeypatch):
    """Take a file or folder the right to be written, for root too, who may run the tests."""
    if not path.exists():
        path.touch()
    access = os.access
    monkeypatch.setattr(os, "access", lambda at, mode: access(at, mode) and not (at == path and mode & os.W_OK))
    return path


def test_names_are_no_markup(cli, data, tmp_path):
    for name in ("[old].onnx", ":car:.onnx"):
        path = Path(shutil.copy(ONNX, tmp_path / name))
        code, out, err = cli("test", path, "--data", data, "--quiet")
        assert code == 0, err
        assert out.startswith(f"{path.name}\n")


def test_data_of_other_classes(cli, tmp_path):
    for name in ("cat", "unicorn"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / name / "a.png")
    code, _, err = cli("test", ONNX, "--data", tmp_path)
    assert code == 2
    assert "unicorn" in err


def test_weights_without_class_names_are_noted(cli, tmp_path):
    from safetensors.numpy import load_file, save_file

    save_file(load_file(CHECKPOINT), tmp_path / "bare.safetensors")
    for name in efficientformer.Classifier().manifest.labels:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "data" / name / "a.png")
    note = "do not name their classes"
    code, _, err = cli("test", tmp_path / "bare.safetensors", "--data", tmp_path / "data")
    assert code == 0, err
    assert note in err
    assert note not in cli("test", CHECKPOINT, "--data", tmp_path / "data")[2]


def test_from_python(data):
    seen = []
    found = efficientformer.evaluate_model(
        "", data, engine="onnxruntime", batch_size=10, progress=lambda *at: seen.append(at)
    )
    assert found.images == 24
    assert seen == [(10, 24), (20, 24), (24, 24)]
    assert found.result.confusion.sum() == 24


def test_two_processes_give_the_figures_of_one(cli, data, damaged, tmp_path, monkeypatch):
    """This process is the first and another one the second, in the environment that torchrun makes."""
    from torch import distributed

    alone = json.loads(cli("test", ONNX, "--data", data, "--json", "--quiet")[1])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    patient = partial(distributed.init_process_group, timeout=timedelta(seconds=240))  # not for half an hour
    monkeypatch.setattr(distributed, "init_process_group", patient)
    arguments = ["test", ONNX, "--data", data, "--batch-size", "4", "--output"]
    command = [sys.executable, "-m", "efficientformer", *arguments, tmp_path / "second.json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "RANK": "1"}, **pipes) as second:
        try:
            code, out, err = cli(*arguments, tmp_path / "first.json")
            said, warned = second.communicate(timeout=240)
        finally:
            second.kill()
    assert (code, second.returncode) == (1, 0), warned  # at another code torchrun would stop the first
    assert out.count("images/s)") == 1
    assert err.count("skipped cat/broken.jpg") == 1
    assert (said, "broken.jpg" in warned) == ("", False), "the first speaks, and it alone"
    assert not (tmp_path / "second.json").exists()
    shared = json.loads((tmp_path / "first.json").read_text())
    for key in ("confusion", "images", "skipped_list", "top1", "top5", "per_class"):
        assert shared[key] == alone[key], key
    assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-6)
    assert [each["name"] for each in shared["worst"]] == [each["name"] for each in alone["worst"]]
