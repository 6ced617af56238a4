"""``efficientformer quantize``: files that both engines run and agree on, a guard that holds, nothing half-written."""

import json
import sys

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from efficientformer import quantize
from efficientformer.export import guard
from efficientformer.export.deployable import deployable, embedded_file
from efficientformer.export.guard import Kept, Score
from efficientformer.export.int8 import load_float
from efficientformer.runtime.engines import open_engine
from efficientformer.runtime.samples import sample_batch
from efficientformer.spec.errors import (
    CheckpointError,
    DataError,
    EngineError,
    ExportError,
    MissingExtraError,
    UsageError,
)

LOOSE = 20.0  # points: these pictures are noise, on which answers are near ties
ENGINES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Coloured noise of many kinds, in a flat folder."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(40):
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((40, 40)).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def quantised(pictures, tmp_path_factory):
    return quantize("", pictures, tmp_path_factory.mktemp("out"), max_drop=LOOSE, pictures=20, holdout=20)


def logits(path, engine):
    opened = open_engine(path, engine)
    return opened.run(sample_batch(opened.manifest.preprocess))


def change(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_both_engines_run_the_file_and_agree_with_the_float_network(quantised, engine):
    expected = logits(embedded_file(), "onnxruntime")
    found = logits(quantised.path, engine)
    assert change(found, expected) < 0.15
    assert (found.argmax(1) == expected.argmax(1)).all()
    assert open_engine(quantised.path, engine).precision == "int8"


def test_file_holds_int8_layers_and_says_what_it_is(quantised):
    proto = onnx.load(quantised.path)
    assert sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in proto.graph.initializer) >= quantised.layers
    made = open_engine(quantised.path, "onnxruntime").manifest
    float_manifest = open_engine(embedded_file(), "onnxruntime").manifest
    assert made.provenance["precision"] == "int8"
    assert len(made.provenance["quantised_from"]) == 64
    assert made.provenance["calibration"] == "20 pictures, seed 0"
    assert (made.spec, made.labels) == (float_manifest.spec, float_manifest.labels)
    assert made.metrics == {}  # the float network's figures are not this file's
    assert quantised.sizes[1] < 0.7 * quantised.sizes[0]


def test_reports_hold_size_speed_and_agreement(quantised):
    report = json.loads((quantised.path.parent / "report.json").read_text())
    assert len(report["scores"]) == 1 + len(ENGINES)
    assert len(report["latency"]) == 2 * len(ENGINES)
    assert report["pictures"] == {"calibration": 20, "held_out": 20}
    assert "agreement" in (quantised.path.parent / "report.html").read_text()
    names = sorted(each.name for each in quantised.path.parent.iterdir())
    assert names == ["efficientformer_cifar10-int8.onnx", "report.html", "report.json"]


def hurt(path, source):
    """Write a copy of a network in which one layer cannot be quantised, and return its name.

    One channel of the layer's input is blown up and the weights that read it are shrunk: nothing changes in float, but
    all other channels of the input share the first few steps of its 8 bits.
    """
    proto = load_float(source)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    producers = {name: node.op_type for node in proto.graph.node for name in node.output}
    index, layer = next(
        (index, node)
        for index, node in enumerate(proto.graph.node)
        if node.op_type == "Conv"
        and producers.get(node.input[0]) == "Gelu"
        and list(stored[node.input[1]].dims)[2:] == [1, 1]
    )
    weights = numpy_helper.to_array(stored[layer.input[1]])  # (out, in, 1, 1)
    factor = np.ones((1, weights.shape[1], 1, 1), np.float32)
    factor[0, 0] = 20_000
    stored[layer.input[1]].CopyFrom(numpy_helper.from_array(weights / factor, layer.input[1]))
    proto.graph.initializer.append(numpy_helper.from_array(factor, "outlier"))
    blow_up = helper.make_node("Mul", [layer.input[0], "outlier"], ["blown_up"], "blow_up")
    layer.input[0] = "blown_up"
    proto.graph.node.insert(index, blow_up)
    onnx.save(proto, path)
    return layer.name


@pytest.fixture(scope="module")
def fragile(tmp_path_factory):
    path = tmp_path_factory.mktemp("fragile") / "fragile.onnx"
    return path, hurt(path, embedded_file())


def test_guard_keeps_the_layer_that_hurts_in_float(fragile, pictures, tmp_path):
    path, layer = fragile
    expected = logits(embedded_file(), "onnxruntime")
    np.testing.assert_allclose(logits(path, "onnxruntime"), expected, atol=1e-2)
    result = quantize(str(path), pictures, tmp_path, max_drop=LOOSE, pictures=20, holdout=20)
    assert result.kept[0].layer == layer
    assert result.kept[0].effect > 0.3
    assert 1 <= len(result.kept) <= 4
    assert all(change(logits(result.path, engine), expected) < 0.2 for engine in ENGINES)
    page = (tmp_path / "report.html").read_text()
    assert layer in page


def test_guard_that_fails_writes_nothing(fragile, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "MAX_FLOAT_SHARE", 0.0)  # one layer may stay; the score below is never good
    monkeypatch.setattr("efficientformer.export.quantize.score", lambda *_: Score("x", 0.0, None, 100.0))
    with pytest.raises(ExportError, match="costs too much"):
        quantize(str(fragile[0]), pictures, tmp_path, pictures=4, holdout=2)
    assert not list(tmp_path.iterdir())


def test_hold_keeps_as_few_layers_as_the_drop_allows():
    order = [Kept(f"layer{index}", 1.0 / (index + 1)) for index in range(20)]

    def attempt(in_float):
        return [Score("a", 99.0, None, 0.0), Score("b", 99.0, None, 2.0 if len(in_float) < 7 else 0.4)]

    scores, kept = guard.hold(attempt, lambda: order, 0.5)
    assert kept == order[:7]
    assert scores[1].drop == 0.4
    assert guard.hold(attempt, lambda: order, 2.0)[1] == []


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.62), ("fp16", 1.01)])
def test_weights_only_is_small_and_agrees(pictures, tmp_path, kind, limit):
    result = quantize("", pictures, tmp_path, max_drop=LOOSE, weights_only=kind, holdout=10)
    # the shipped file is in half precision already
    assert result.path.stat().st_size < limit * embedded_file().stat().st_size
    expected = logits(embedded_file(), "onnxruntime")
    for engine in ENGINES:
        opened = open_engine(result.path, engine)
        assert opened.precision != "int8"
        assert opened.manifest.provenance["weights"] == kind
        assert change(opened.run(sample_batch(opened.manifest.preprocess)), expected) < 0.08


def test_labelled_pictures_give_top1(tmp_path):
    labels = open_engine(embedded_file(), "onnxruntime").manifest.labels
    rng = np.random.default_rng(1)
    for name in labels[:3]:
        for index in range(4):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "data" / name / f"{index}.png")
    result = quantize("", tmp_path / "data", tmp_path / "out", max_drop=100, pictures=6, holdout=6)
    assert result.note == ""
    assert all(each.top1 is not None for each in result.scores)
    assert result.manifest.metrics == {"top1": round(min(each.top1 for each in result.scores[1:]), 2)}


def test_a_checkpoint_is_found_by_its_precision(pictures, tmp_path):
    checkpoint = embedded_file().with_suffix(".safetensors")
    with pytest.raises(EngineError, match=r"efficientformer quantize .*efficientformer_cifar10\.safetensors"):
        deployable(str(checkpoint), precision="int8")
    result = quantize(str(checkpoint), pictures, tmp_path, max_drop=LOOSE, pictures=10, holdout=10)
    found = deployable(str(checkpoint), precision="int8")
    assert found.read_bytes() == result.path.read_bytes()
    assert deployable(str(checkpoint)) != found


def test_precision_lookup_of_names_and_files(quantised):
    with pytest.raises(EngineError, match="efficientformer quantize efficientformer_l1 --data"):
        deployable("efficientformer_l1", precision="int8")
    assert deployable(str(quantised.path), precision="int8") == quantised.path
    with pytest.raises(CheckpointError, match="no weights file"):
        deployable("missing.pth", precision="int8")


def test_the_shipped_int8_network():
    path = deployable(precision="int8")
    assert path.parent == embedded_file().parent
    manifest = open_engine(path, "onnxruntime").manifest
    assert manifest.metrics["top1"] > open_engine(embedded_file(), "onnxruntime").manifest.metrics["top1"] - 0.5
    for engine in ENGINES:
        assert (logits(path, engine).argmax(1) == logits(embedded_file(), "onnxruntime").argmax(1)).all()


def test_unreadable_pictures_are_listed_and_skipped(cli, pictures, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for each in sorted(pictures.iterdir())[:8]:
        (data / each.name).write_bytes(each.read_bytes())
    (data / "broken.png").write_bytes(b"no picture")
    command = ("quantize", embedded_file(), "--data", data, "--output", tmp_path / "out", "--max-drop", 100)
    code, out, err = cli(*command, "--pictures", 5, "--holdout", 4, "--json")
    assert code == 0, err
    assert [each["name"] for each in json.loads(out)["skipped"]] == [str(data / "broken.png")]
    assert "skipped" in err and "broken.png" in err


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_drop": -1}, UsageError),
        ({"max_drop": float("nan")}, UsageError),
        ({"pictures": 0}, UsageError),
        ({"weights_only": "int4"}, UsageError),
        ({"data": "missing"}, DataError),
        ({"data": "."}, DataError),
    ],
)
def test_bad_calls_are_refused(pictures, tmp_path, monkeypatch, options, error):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(error):
        quantize("", **{"data": pictures, "output": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_a_quantised_file_is_not_quantised_again(quantised, pictures, tmp_path):
    with pytest.raises(UsageError, match="already"):
        quantize(str(quantised.path), pictures, tmp_path / "out")


@pytest.mark.parametrize("library", ["onnx", "jinja2"])
def test_a_missing_library_names_its_extra(pictures, tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=r"efficientformer\[quantize\]"):
        quantize("", pictures, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_table_of_the_verb(cli, pictures, tmp_path):
    command = ("quantize", embedded_file(), "--data", pictures, "--output", tmp_path, "--max-drop", LOOSE)
    code, out, err = cli(*command, "--pictures", 10, "--holdout", 10)
    assert code == 0, err
    assert "layers in float: 0 of 47" in out
    assert "quantised: OpenVINO" in out
