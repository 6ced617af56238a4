"""Quantised files: right in every engine, guarded, and found again by the network's name."""

import dataclasses
import errno
import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from efficientformer import Classifier, get_model
from efficientformer.cli.quantize import _print
from efficientformer.export import deployable as building
from efficientformer.export import quantize as module
from efficientformer.export.calibration import gather_pictures
from efficientformer.export.deployable import deployable, embedded_file, quantised_file, quantised_target
from efficientformer.export.proto import halve_weights
from efficientformer.export.qdq import Quantiser
from efficientformer.export.quantize import quantize
from efficientformer.latency.graph import network_proto, write_network
from efficientformer.latency.int8 import quantise
from efficientformer.runtime.engines import installed_engines, open_engine
from efficientformer.runtime.image import decode
from efficientformer.runtime.preprocess import preprocess
from efficientformer.runtime.processor import overflows
from efficientformer.runtime.samples import sample_batch
from efficientformer.spec.errors import (
    DataError,
    EngineError,
    ExportError,
    MissingExtraError,
    SpecError,
    UnknownModelError,
    UsageError,
)
from efficientformer.spec.manifest import METADATA_KEY, Manifest
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.spec.variants import v1_spec
from efficientformer.spec.zoo import resolve
from efficientformer.weights.cache import Cache
from efficientformer.weights.embedded import embedded_weights
from efficientformer.weights.pretrained import load_named
from tests.unit.test_engines import break_openvino
from tests.unit.test_packed_sources import write_tar

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = v1_spec((16, 16, 32, 32), (1, 0, 0, 1), 0, input_size=32, num_classes=10, stem_stride=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 24 pictures in folders named after their classes, and a broken one."""
    root = tmp_path_factory.mktemp("pictures")
    for photo in sorted(EXAMPLES.glob("*.jpg")):
        (root / photo.stem).mkdir()
        for copy in range(3):
            shutil.copy(photo, root / photo.stem / f"{copy}.jpg")
    (root / "cat" / "broken.jpg").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """A folder of 16 pictures that names no class."""
    root = tmp_path_factory.mktemp("pictures") / "flat"
    root.mkdir()
    for index, photo in enumerate(sorted(EXAMPLES.glob("*.jpg")) * 2):
        shutil.copy(photo, root / f"{index}.jpg")
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The cache that the networks made below are kept in."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def shipped(home):
    """The int8 file in the package, and what is in it before anything is quantised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFICIENTFORMER_HOME", str(home))
        path = quantised_file("")
        return path, path.read_bytes()


@pytest.fixture(scope="module")
def made(pictures, home, shipped, tmp_path_factory):
    """The network in the package, quantised."""
    output = tmp_path_factory.mktemp("made") / "small-int8"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFICIENTFORMER_HOME", str(home))
        return quantize("", pictures, output, max_drop=0.0), output


@pytest.fixture(scope="module")
def made_for_openvino(pictures, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFICIENTFORMER_HOME", str(tmp_path_factory.mktemp("home")))
        output = tmp_path_factory.mktemp("made") / "own"
        return quantize("", pictures, output, engine="openvino", pictures=8, holdout=8, max_drop=100)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A network of ten layers, stored in half precision and with labels as the one in the package is."""
    proto = network_proto(SMALL)
    halve_weights(proto)
    entry = next(each for each in proto.metadata_props if each.key == METADATA_KEY)
    manifest = Manifest.from_json(entry.value)
    entry.value = dataclasses.replace(manifest, labels=open_engine(embedded_file()).manifest.labels).to_json()
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    onnx.save(proto, str(path))
    return path


@pytest.fixture
def small(small_file, monkeypatch):
    """The small network takes the place of the one in the package, which takes four times as long to quantise."""
    monkeypatch.setattr(module, "deployable", lambda *_, **__: small_file)
    return small_file


def test_the_file_runs_in_int8_in_every_engine(made):
    report, output = made
    batch = sample_batch(open_engine(embedded_file()).manifest.preprocess)
    expected = open_engine(embedded_file(), "onnxruntime").run(batch)
    for name in installed_engines():
        engine = open_engine(output / "model.onnx", name)
        assert engine.precision == "int8"
        found = engine.run(batch)
        assert (found.argmax(1) == expected.argmax(1)).all()
        assert 0 < np.abs(found - expected).max() < 0.2 * np.abs(expected).max()
    assert report.sizes[1] < 0.7 * report.sizes[0]
    kinds = [node.op_type for node in onnx.load(str(output / "model.onnx")).graph.node]
    assert kinds.count("QuantizeLinear") > 40


def test_two_products_of_8_bits_never_overflow_16(made, made_for_openvino, shipped):
    """Processors without VNNI add them so (vpmaddubsw): what is right here would be wrong there."""
    for path in (made[0].path, made_for_openvino.path, shipped[0]):
        proto = onnx.load(str(path))
        tensors = [numpy_helper.to_array(each) for each in proto.graph.initializer]
        weights = [values.astype(int) for values in tensors if values.dtype == np.int8 and values.ndim > 1]
        assert len(weights) > 30
        assert max(np.abs(values).max() for values in weights) == 64
    assert np.iinfo(np.int16).max >= 2 * 255 * 64


def test_weights_of_all_8_bits_are_for_who_asks(pictures, small, shipped, tmp_path, recwarn):
    report = quantize("", pictures, tmp_path / "own", weight_bits=8, pictures=4, holdout=4, max_drop=100)
    tensors = [numpy_helper.to_array(each) for each in onnx.load(str(report.path)).graph.initializer]
    assert max(np.abs(values).max() for values in tensors if values.dtype == np.int8 and values.ndim > 1) == 127
    manifest = open_engine(report.path, "onnxruntime").manifest
    assert manifest.provenance["weight_bits"] == "8"
    warned = any("--weight-bits 7" in str(each.message) for each in recwarn)
    assert warned == overflows()
    recwarn.clear()
    assert open_engine(shipped[0]).manifest.provenance["weight_bits"] == "7"
    assert not recwarn.list


def test_the_shipped_file_is_never_replaced(made, shipped, home, monkeypatch):
    path, before = shipped
    assert path.read_bytes() == before
    monkeypatch.setenv("EFFICIENTFORMER_HOME", str(home))
    own = deployable(precision="int8")
    assert own != path
    assert own.read_bytes() == (made[1] / "model.onnx").read_bytes()
    assert own.stat().st_mode & 0o777 == 0o644


def simulated(path, batch):
    """Return what the graph of an int8 file says when its int8 values are computed with in float."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


def test_only_layers_with_weights_are_int8_and_tokens_come_out_right_in_every_engine(tmp_path):
    spec = v1_spec((48, 96, 224, 448), (1, 1, 1, 2), 1, num_classes=50)
    path = write_network(spec, tmp_path / "float.onnx")
    reference = open_engine(path, "onnxruntime")
    batch = sample_batch(reference.manifest.preprocess)
    expected = reference.run(batch)
    Quantiser(path, batch).write(tmp_path / "int8.onnx", reference.manifest)
    nodes = onnx.load(str(tmp_path / "int8.onnx")).graph.node
    widened = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    products = [node for node in nodes if node.op_type == "MatMul" and not set(node.input) & widened]
    assert len(products) == 2  # queries by keys, weights by values: of activations both
    spread = np.linalg.norm(expected - expected.mean(0))
    graph = simulated(tmp_path / "int8.onnx", batch)
    assert np.linalg.norm(graph - expected) < 0.35 * spread
    for name in installed_engines():  # sums that overflow: 0.26
        found = open_engine(tmp_path / "int8.onnx", name).run(batch)
        assert np.linalg.norm(found - graph) < 0.2 * spread, name


def test_a_file_for_openvino_has_no_zero_points_to_subtract(made_for_openvino):
    proto = onnx.load(str(made_for_openvino.path))
    values = {each.name: onnx.numpy_helper.to_array(each) for each in proto.graph.initializer}
    zeros = [values[node.input[2]] for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert len(zeros) > 40
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert all(each.agreement > 70 for each in made_for_openvino.accuracy)


def test_the_report_says_what_was_measured(made, pictures):
    report, output = made
    assert (report.calibrated_on, report.held_out, report.labelled) == (12, 12, True)
    assert [Path(name).name for name, _ in report.skipped] == ["broken.jpg"]
    assert {each.engine.split()[0] for each in report.accuracy} == {"ONNX", "OpenVINO"}
    assert all(each.drop <= 0 for each in report.accuracy)
    data = json.loads((output / "report.json").read_text())
    assert data == json.loads(report.to_json())
    assert sorted(path.name for path in output.iterdir()) == ["model.onnx", "report.html", "report.json"]
    assert "points lost" in (output / "report.html").read_text()


def test_what_chance_does_to_the_points_lost_is_told(small, monkeypatch):
    """Of 12 pictures one lost its right label, one won it, one changed from a wrong label to another."""
    work = Mock(pictures=Mock(labels=np.arange(12) % 10), target=small)
    work.pictures.held_out = np.zeros(12)
    said = work.pictures.labels.copy()
    said[[1, 2]] += 1
    work.expected = np.eye(12)[said]
    said[[0, 1, 2]] = [9, 1, 5]
    monkeypatch.setattr(module, "_logits", lambda *_: np.eye(12)[said])
    for each in module._Work._measure(work):
        assert (each.changed, each.drop) == (3, 0)
        assert each.error == pytest.approx(100 * (2 / 12) ** 0.5 / 12**0.5, abs=1e-4)


@pytest.mark.parametrize(("held_out", "max_drop", "warned"), [(199, 0.5, True), (200, 0.5, False), (8, 0, False)])
def test_a_guard_that_one_picture_trips_says_so(held_out, max_drop, warned, recwarn):
    module._warn_if_coarse(held_out, max_drop)
    assert [str(each.message).rpartition(": ")[2] for each in recwarn] == ["200 or more to measure on"] * warned


def test_manifest_and_names(made):
    report, output = made
    manifest = open_engine(output / "model.onnx").manifest
    assert manifest.metrics == {"top1": min(each.top1 for each in report.accuracy), "top1_pictures": 12}
    assert manifest.provenance["precision"] == "int8"
    assert manifest.labels == open_engine(embedded_file()).manifest.labels
    classify = Classifier(str(output), engine="onnxruntime")  # the folder is a model's name
    assert classify(EXAMPLES / "cat.jpg").name == "cat"
    with pytest.raises(EngineError, match="cannot run in fp32"):
        open_engine(output / "model.onnx", precision="fp32")


def test_precision_int8_finds_what_was_quantised(made, home, monkeypatch):
    monkeypatch.setenv("EFFICIENTFORMER_HOME", str(home))
    assert deployable("", precision="int8") == quantised_file("efficientformer_cifar10")
    assert deployable("", precision="int8").read_bytes() == (made[1] / "model.onnx").read_bytes()
    classify = Classifier(precision="int8", engine="onnxruntime")
    assert classify.engine.endswith("(int8)")
    with pytest.raises(EngineError, match="efficientformer quantize efficientformer_l1"):
        deployable("efficientformer_l1", precision="int8")


def place(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_each_set_of_weights_has_an_int8_file_of_its_own():
    long, short = "efficientformer_l1_1000d", "snap-research/efficientformer-l1-300"
    for name in (long, short):
        found = resolve(name)
        place(building._target(found.card, found.source))
    made = place(quantised_target(short))
    assert deployable(short, precision="int8") == made
    for name in (long, "efficientformer_l1"):  # which is the long one: it comes first of what there is
        with pytest.raises(EngineError, match="not quantised"):
            deployable(name, precision="int8")


def test_an_int8_file_of_weights_that_were_replaced_is_not_taken(monkeypatch):
    name = "efficientformer_l1_1000d"
    found = resolve(name)
    place(building._target(found.card, found.source))
    place(quantised_target(name))
    assert deployable(name, precision="int8").exists()
    weights = place(Cache().path(found.card.name, found.source))
    os.utime(weights, (2**32, 2**32))
    with pytest.raises(EngineError, match="not quantised"):
        deployable(name, precision="int8")
    loaded = None, found.card.manifest(found.source)
    monkeypatch.setattr("efficientformer.weights.pretrained.load_published", lambda *_, **__: loaded)
    monkeypatch.setattr(building, "_export", lambda checkpoint, manifest, target: place(target))
    weights.unlink()
    deployable(name).unlink()
    deployable(name)
    with pytest.raises(EngineError, match="not quantised"):
        deployable(name, precision="int8")


def test_the_int8_file_of_a_checkpoint_is_found_with_a_name_too(tmp_path):
    checkpoint = place(tmp_path / "my.safetensors")
    with pytest.raises(EngineError, match=rf"efficientformer quantize {checkpoint} .*--output my-int8"):
        deployable("efficientformer_cifar10", checkpoint=checkpoint, precision="int8")
    made = place(quantised_target(str(checkpoint)))
    for name in ("", "efficientformer_cifar10"):
        assert deployable(name, checkpoint=checkpoint, precision="int8") == made
    with pytest.raises(UnknownModelError, match="efficientformer_l1"):
        deployable("efficientformer_l9", checkpoint=checkpoint, precision="int8")


def test_a_folder_that_cannot_be_written_is_told_of_before_the_work(tmp_path):
    with pytest.raises(UsageError, match="Cannot write to /proc/q"):
        quantize("", tmp_path / "no pictures", "/proc/q")


def within_one_folder(self, target):
    """Rename as an output on another file system allows: a mount, a link to one."""
    if self.parent != Path(target).parent:
        raise OSError(errno.EXDEV, "Invalid cross-device link")
    self.rename(target)


def test_the_output_may_be_on_another_file_system(pictures, small, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "replace", within_one_folder)
    report = quantize("", pictures, tmp_path / "own", pictures=4, holdout=4, max_drop=100)
    assert open_engine(report.path).precision == "int8"
    assert sorted(path.name for path in report.path.parent.iterdir()) == ["model.onnx", "report.html", "report.json"]
    assert {path.stat().st_mode & 0o777 for path in report.path.parent.iterdir()} == {0o644}


def test_a_disk_that_fills_up_is_told_of_and_leaves_nothing(pictures, small, tmp_path, monkeypatch):
    def full(path, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ExportError, match="No space left on device"):
        quantize("", pictures, tmp_path / "own", pictures=4, holdout=4, max_drop=100)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_cache_that_cannot_be_written_costs_the_copy_alone(pictures, small, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFICIENTFORMER_HOME", str(place(tmp_path / "file") / "below"))
    with pytest.warns(UserWarning, match="Cannot write to the cache folder"):
        report = quantize("", pictures, tmp_path / "own", pictures=4, holdout=4, max_drop=100)
    assert report.path.exists()


def test_the_shipped_int8_network_needs_nothing():
    classify = Classifier(precision="int8")
    assert classify.engine.endswith("(int8)")
    assert classify.manifest.metrics["top1"] > 91.5
    for photo in EXAMPLES.glob("*.jpg"):
        assert classify(photo).name == photo.stem


def test_layers_that_hurt_stay_in_float(flat, small, tmp_path, monkeypatch):
    real = Quantiser.write
    names = Quantiser(small, sample_batch(open_engine(small).manifest.preprocess)[:2]).layers
    culprits = {names[3], names[7]}

    def write(self, target, manifest, *, keep=(), only=""):
        real(self, target, manifest, keep=keep, only=only)
        harmed = culprits - set(keep) if not only else culprits & {only}
        if harmed:  # as if int8 ruined these layers: the logits of all classes but one are lost
            proto = onnx.load(str(target))
            scale = numpy_helper.from_array(np.float32([1e-3 * len(harmed)] + [0] * 9), "ruin")
            proto.graph.initializer.append(scale)
            output = proto.graph.output[0].name
            head = next(node for node in proto.graph.node if output in node.output)
            head.output[list(head.output).index(output)] = "before_ruin"
            proto.graph.node.append(onnx.helper.make_node("Mul", ["before_ruin", "ruin"], [output]))
            onnx.save(proto, str(target))

    monkeypatch.setattr(Quantiser, "write", write)
    report = quantize("", flat, tmp_path / "out", max_drop=50)
    assert set(report.kept) == culprits
    assert set(report.errors) == set(names)
    assert set(sorted(names, key=lambda name: -report.errors[name])[:2]) == culprits
    assert "orange: kept in float" not in (tmp_path / "out" / "report.html").read_text()  # it stands in the picture
    assert "Layers" in (tmp_path / "out" / "report.html").read_text()


def test_a_file_without_a_layer_in_int8_is_none(pictures, small, tmp_path, monkeypatch):
    """As where every choice of layers loses too much, but for all of them in float."""
    layers = Quantiser(small, sample_batch(open_engine(small).manifest.preprocess)[:2]).layers
    found = []

    def holds(self, quantiser, manifest, keep):
        found.append(len(keep))
        self.accuracy = (module.Accuracy("X", 10.0, 10.0, 80.0),)
        return len(keep) == len(layers)

    monkeypatch.setattr(module._Work, "_holds", holds)
    with pytest.raises(ExportError, match="but one in float"):
        quantize("", pictures, tmp_path / "out")
    assert max(found) == len(layers) - 1


@pytest.mark.parametrize("weights_only", ["", "fp16"])
def test_a_network_without_numbers_is_not_quantised(pictures, tmp_path, weights_only):
    network, model = onnx.load(embedded_file()), tmp_path / "nan.onnx"
    bias = next(each for each in network.graph.initializer if each.dims == [10])
    bias.raw_data = np.full(10, np.nan, np.float32).tobytes()
    onnx.save(network, model)
    with pytest.raises(EngineError, match="The network gives no numbers"):
        quantize(str(model), pictures, tmp_path / "out", weights_only=weights_only)


def test_answers_that_are_no_numbers_are_lost(flat, small, tmp_path, monkeypatch):
    real = module._logits
    monkeypatch.setattr(module, "_logits", lambda engine, batch: real(engine, batch) * (
        np.nan if engine.precision == "int8" else 1))  # fmt: skip
    with pytest.raises(ExportError, match="No choice of layers"):
        quantize("", flat, tmp_path / "out", max_drop=50)


@pytest.mark.parametrize("part", ["train", "val"])
def test_pictures_in_an_only_part_are_labelled(pictures, shipped, tmp_path, part):
    shutil.copytree(pictures, tmp_path / part)
    found = gather_pictures(tmp_path, open_engine(shipped[0]).manifest, 8, 8, 0, None)
    assert found.labels is not None
    assert len(found.labels) == 8


def test_what_a_killed_quantisation_had_half_written_is_no_hindrance(pictures, small, tmp_path):
    place(tmp_path / "own" / ".model.onnx.0123abcd.partial")
    quantize("", pictures, tmp_path / "own", pictures=4, holdout=4, max_drop=100)
    place(tmp_path / "own" / "mine.txt")
    with pytest.raises(UsageError, match=r"something else.*found mine\.txt"):
        quantize("", pictures, tmp_path / "own", pictures=4, holdout=4, max_drop=100)


def test_the_users_int8_file_of_another_versions_network_is_not_taken(monkeypatch, tmp_path):
    own = place(quantised_target(""))
    assert quantised_file("") == own
    other = place(tmp_path / embedded_file().name, b"other weights")
    monkeypatch.setattr(building, "embedded_file", lambda: other)
    assert quantised_file("") == tmp_path / "efficientformer_cifar10-int8.onnx"


def test_a_drop_that_cannot_be_held_writes_nothing(pictures, small, tmp_path, monkeypatch):
    def ruined(self):
        return (module.Accuracy("X", 10.0, 10.0, 80.0),)

    monkeypatch.setattr(module._Work, "_measure", ruined)
    monkeypatch.setattr(module._Work, "_ranked", lambda self, quantiser, manifest: quantiser.layers[:4])
    with pytest.raises(ExportError, match=r"80\.00 points"):
        quantize("", pictures, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "share", "error"), [("int8", 0.7, 0.1), ("fp16", 1.05, 1e-6)])
def test_weights_only_makes_files_smaller_and_computes_in_float(pictures, small, tmp_path, kind, share, error):
    report = quantize("", pictures, tmp_path / "out", weights_only=kind)
    assert report.kind == f"{kind} weights"
    assert report.sizes[1] < share * report.sizes[0]  # the float file is in half precision already
    batch = sample_batch(open_engine(small).manifest.preprocess)
    expected = open_engine(small, "onnxruntime").run(batch)
    for name in installed_engines():
        engine = open_engine(tmp_path / "out" / "model.onnx", name, precision="fp32")
        assert np.abs(engine.run(batch) - expected).max() < max(1e-3, error * np.abs(expected).max())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"weights_only": "int4"}, SpecError, "'fp16'"),
        ({"weight_bits": 4}, SpecError, "one of 7, 8"),
        ({"max_drop": -1}, UsageError, "from 0 to 100"),
        ({"holdout": 0}, UsageError, "from 1"),
        ({"model": "efficientformer_l9"}, UsageError, "efficientformer_l7"),
    ],
)
def test_illegal_options(pictures, tmp_path, options, error, text):
    model = options.pop("model", "")
    with pytest.raises(error, match=text):
        quantize(model, pictures, tmp_path / "out", **options)


def test_too_few_pictures(tmp_path):
    (tmp_path / "few").mkdir()
    with pytest.raises(DataError, match="found an empty folder"):
        quantize("", tmp_path / "few", tmp_path / "out")
    shutil.copy(EXAMPLES / "cat.jpg", tmp_path / "few")
    with pytest.raises(DataError, match="at least 8"):
        quantize("", tmp_path / "few", tmp_path / "out")


def test_another_folder_is_left_alone(pictures, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="something else"):
        quantize("", pictures, tmp_path)


@pytest.mark.parametrize("names", [("train", "valid"), ("training", "dev"), ("Train", "Testing")])
def test_parts_have_the_names_that_data_sets_give_them(tmp_path, names):
    for part, photo in zip(names, ("cat", "dog"), strict=True):
        (tmp_path / part / photo / "images").mkdir(parents=True)
        for index in range(8):
            shutil.copy(EXAMPLES / f"{photo}.jpg", tmp_path / part / photo / "images" / f"{index}.jpg")
    manifest = open_engine(embedded_file()).manifest
    found = gather_pictures(tmp_path, manifest, 300, 500, 0, None)
    assert (len(found.calibration), len(found.held_out)) == (8, 8)
    assert found.labels.tolist() == [manifest.labels.index("dog")] * 8


@pytest.mark.parametrize("layout", ["list", "shards"])
def test_a_data_set_in_another_layout_is_read_as_training_reads_it(tmp_path, layout):
    parts = {"train": "cat", "val": "dog"}
    if layout == "list":
        rows = [f"{EXAMPLES}/{photo}.jpg,{photo},{part}" for part, photo in parts.items() for _ in range(8)]
        data = tmp_path / "data.csv"
        data.write_text("\n".join(["file,label,split", *rows]))
    else:
        data = tmp_path
        (data / "classes.txt").write_text("cat\ndog\n")
        for label, (part, photo) in enumerate(parts.items()):
            sample = [("jpg", (EXAMPLES / f"{photo}.jpg").read_bytes()), ("cls", str(label).encode())]
            members = [(f"{index}.{ending}", content) for index in range(8) for ending, content in sample]
            write_tar(data / f"{part}.tar", members)
    manifest = open_engine(embedded_file()).manifest
    found = gather_pictures(data, manifest, 300, 500, 0, None)
    assert (len(found.calibration), len(found.held_out)) == (8, 8)
    assert found.labels.tolist() == [manifest.labels.index("dog")] * 8


def test_pictures_are_kept_once_and_in_order(tmp_path):
    for index, photo in enumerate(sorted(EXAMPLES.glob("*.jpg")) * 3):
        shutil.copy(photo, tmp_path / f"{index:02}.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    large = PreprocessSpec((256, 256), resize_size=256)
    manifest = Manifest(dataclasses.replace(SMALL, input_size=large.input_size), large)
    tracemalloc.start()
    found = gather_pictures(tmp_path, manifest, 300, 500, 0, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [Path(name).name for name, _ in found.skipped] == ["broken.jpg"]
    assert len(found.calibration) + len(found.held_out) == 24
    assert peak < 1.5 * 24 * found.held_out[0].nbytes
    expected = {preprocess(decode(path), large).tobytes() for path in EXAMPLES.glob("*.jpg")}
    assert {picture.tobytes() for part in (found.calibration, found.held_out) for picture in part} == expected


def test_pictures_of_other_classes_have_no_labels(flat, small, tmp_path):
    report = quantize("", flat, tmp_path / "out", max_drop=100)
    assert not report.labelled
    assert report.top1 is None
    assert [each.drop for each in report.accuracy] == [round(100 - each.agreement, 4) for each in report.accuracy]


def test_a_missing_library_names_its_extra(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"efficientformer\[quantize\]"):
        quantize("", pictures, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_command_prints_a_table(cli, pictures, small, tmp_path):
    code, out, err = cli("quantize", "efficientformer_cifar10", "--data", pictures, "-o", tmp_path / "out[/y]")
    assert code == 0, err
    assert "points lost" in out
    assert re.search(r"\d of 12 .* ± ", out)
    assert "Of 12 held-out pictures each is 8.3 %" in err
    assert "broken.jpg" in err
    code, out, _ = cli("quantize", "efficientformer_cifar10", "--data", pictures, "-o", tmp_path / "out", "--json")
    assert json.loads(out)["kind"] == "int8"


def test_no_line_of_the_report_breaks_inside_a_value(made, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    report, _ = made
    _print(report)
    measured = f"calibrated on 12 pictures, measured on 12 others; single precision: {report.top1:.2f} % top-1\n"
    assert measured in capsys.readouterr().out


def test_reports_are_plain_data(made):
    report, _ = made
    assert dataclasses.is_dataclass(report)
    assert set(report.to_dict()["sizes"]) == {"float", "new"}


def test_an_engine_that_cannot_be_asked_is_an_error(monkeypatch, tmp_path):
    break_openvino(monkeypatch, tmp_path)
    with pytest.raises(EngineError, match=r"cannot be imported.*openvino"):
        quantize("efficientformer_cifar10", tmp_path, tmp_path / "int8")


def test_logits_are_not_rounded(tmp_path):
    path = write_network(v1_spec((16, 16, 32, 32), (1, 1, 1, 1), 1, input_size=32, num_classes=10), tmp_path / "n.onnx")
    quantise(path)
    for file in (path, quantised_file("efficientformer_cifar10")):
        assert next(node.op_type for node in onnx.load(file).graph.node if "logits" in node.output) == "Gemm"


def test_a_name_is_the_network_whatever_lies_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("l1", "efficientformer_cifar10"):
        place(tmp_path / name / "model.onnx")
        assert building.file_of(name) is None
        assert building.file_of(f"./{name}") == str(Path(name) / "model.onnx")
    place(tmp_path / "v2_s0", embedded_weights().read_bytes())
    assert building.file_of("v2_s0") is None
    assert get_model("v2_s0").spec.num_classes == 1000
    assert get_model("./v2_s0").spec.num_classes == 10
    assert load_named("./v2_s0", True)[1].spec.num_classes == 10
