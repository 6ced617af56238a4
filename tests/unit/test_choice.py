"""The engine is chosen by what was measured here, never at the price of other results, and remembered."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnx
import pytest

from efficientformer import Classifier
from efficientformer.export.deployable import embedded_file
from efficientformer.runtime import choice as module
from efficientformer.runtime import classifier
from efficientformer.runtime.choice import choose
from efficientformer.runtime.classifier import Failed
from efficientformer.runtime.engines.openvino import OpenVinoEngine
from efficientformer.runtime.timing import Timing
from efficientformer.spec.errors import EngineError, ImageError, PrecisionError, UsageError
from tests.unit.test_engines import break_openvino, without_plugin

FILE = embedded_file()
PHOTO = Path(__file__).parents[2] / "examples" / "cat.jpg"


def timed(**ms):
    """Return a stand-in for time_together: the figures of the engines whose name holds a word, else 9 ms."""

    def stand_in(subjects, **_):
        found = {name: next((v for word, v in ms.items() if word in name), 9.0) for name in subjects}
        return {name: Timing(v, v, v, v, 1) for name, v in found.items()}

    return stand_in


@pytest.mark.parametrize(
    ("word", "engine", "precision"), [("ONNX", "onnxruntime", "fp32"), ("bf16", "openvino", "bf16")]
)
def test_the_fastest_wins(monkeypatch, word, engine, precision):
    monkeypatch.setattr(module, "time_together", timed(**{word: 1.0}))
    if precision == "bf16":
        pytest.importorskip("openvino")
        capable = [each.precision for each in module._candidates(FILE, "auto", None)[0]]
        if "bf16" not in capable:
            pytest.skip("this processor does not compute in bf16")
    found = choose(FILE)
    assert (found.engine, found.precision) == (engine, precision)
    assert "1.00 ms" in found.reason


@pytest.mark.parametrize(
    ("wrong", "error", "right", "name"),
    [
        ("openvino", 3, "onnxruntime", "OpenVINO"),
        ("openvino", np.nan, "onnxruntime", "OpenVINO"),
        ("onnxruntime", np.nan, "openvino", "ONNX Runtime"),
        ("onnxruntime", np.inf, "openvino", "ONNX Runtime"),
    ],
)
def test_an_engine_with_other_results_is_out_however_fast(monkeypatch, wrong, error, right, name):
    real = module.open_engine

    def spoilt(path, engine, **options):
        opened = real(path, engine, **options)
        if engine == wrong:
            run = opened.run
            opened.run = lambda batch: run(batch) + np.float32([error, *[0] * 9])
        return opened

    monkeypatch.setattr(module, "open_engine", spoilt)
    monkeypatch.setattr(module, "time_together", timed(**{name.split()[0]: 1.0}))
    found = choose(FILE)
    assert found.engine == right
    assert f"left out for other results: {name}" in found.reason


def failing(monkeypatch, *engines):
    """Have engines open a file and fail to run it."""
    real = module.open_engine

    def spoilt(path, engine, **options):
        opened = real(path, engine, **options)
        if engine in engines:
            opened.run = lambda batch: (_ for _ in ()).throw(EngineError(f"{engine} cannot run this"))
        return opened

    monkeypatch.setattr(module, "open_engine", spoilt)


@pytest.mark.parametrize(
    ("broken", "right", "name"),
    [("openvino", "onnxruntime", "OpenVINO"), ("onnxruntime", "openvino", "ONNX Runtime")],
)
def test_an_engine_that_fails_leaves_the_choice_to_the_others(monkeypatch, broken, right, name):
    failing(monkeypatch, broken)
    found = choose(FILE)
    assert found.engine == right
    assert f"left out because it fails: {name}" in found.reason


def test_where_every_engine_fails_it_is_said_why(monkeypatch):
    failing(monkeypatch, "openvino", "onnxruntime")
    with pytest.raises(EngineError, match="onnxruntime cannot run this"):
        choose(FILE)


def test_a_damaged_engine_is_left_out_until_it_is_mended(monkeypatch, tmp_path):
    with monkeypatch.context() as damaged:
        break_openvino(damaged, tmp_path)
        found = choose(FILE, store=tmp_path / "notes")
        assert found.engine == "onnxruntime"
        assert "left out because the import fails: openvino" in found.reason
    monkeypatch.setattr(module, "time_together", timed(OpenVINO=1.0))
    assert choose(FILE, store=tmp_path / "notes").engine == "openvino"
    with monkeypatch.context() as damaged:
        break_openvino(damaged, tmp_path)
        assert choose(FILE, store=tmp_path / "notes").engine == "onnxruntime"  # whatever is remembered


def test_an_engine_that_fails_while_it_is_timed_is_left_out(monkeypatch):
    real, left = OpenVinoEngine.run, iter(range(8))

    def run(self, batch):
        if next(left, None) is None:
            raise EngineError("out of memory")
        return real(self, batch)

    monkeypatch.setattr(OpenVinoEngine, "run", run)
    found = choose(FILE, "fp32")
    assert found.engine == "onnxruntime"
    assert "left out because it fails: OpenVINO" in found.reason


def without_memory(monkeypatch):
    failing(monkeypatch, "openvino")


@pytest.mark.parametrize("spoil", [without_plugin, without_memory])
def test_a_choice_in_which_an_engine_failed_is_not_remembered(monkeypatch, tmp_path, spoil):
    with monkeypatch.context() as spoilt:
        spoil(spoilt)
        found = choose(FILE, store=tmp_path)
        assert found.engine == "onnxruntime"
        assert re.search("left out because it fails: openvino", found.reason, re.IGNORECASE)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(module, "time_together", timed(OpenVINO=1.0))
    assert choose(FILE, store=tmp_path).engine == "openvino"
    assert list(tmp_path.iterdir())  # that ONNX Runtime has no half precision is no failure


def test_a_network_without_numbers_is_no_choice_and_gives_no_labels(tmp_path):
    network, model = onnx.load(FILE), tmp_path / "nan.onnx"
    bias = next(each for each in network.graph.initializer if each.dims == [10])
    bias.raw_data = np.full(10, np.nan, np.float32).tobytes()
    onnx.save(network, model)
    classify = Classifier(str(model), engine="onnxruntime")
    for use in (lambda: choose(model), lambda: classify(PHOTO), lambda: list(classify.predict([PHOTO]))):
        with pytest.raises(EngineError, match="The network gives no numbers"):
            use()


def test_a_picture_without_numbers_fails_alone():
    classify = Classifier(engine="onnxruntime")
    run = classify._engine.run

    def bad_for_bright(batch):
        logits = run(batch)
        logits[batch.mean(axis=(1, 2, 3)) > 1] = np.nan
        return logits

    classify._engine.run = bad_for_bright
    white = np.full((32, 32, 3), 255, np.uint8)
    first, second, third = classify.predict([PHOTO, white, PHOTO], batch_size=3)
    assert first.name == third.name == "cat"
    assert isinstance(second, Failed)
    assert "no numbers for this picture" in str(second.error)
    with pytest.raises(ImageError, match="no numbers for this picture"):
        classify(white)


def test_a_picture_that_memory_does_not_hold_fails_alone(monkeypatch):
    crop = classifier.resize_crop

    def short(image, spec):
        if image.width == 33:
            raise MemoryError
        return crop(image, spec)

    monkeypatch.setattr(classifier, "resize_crop", short)
    large = np.zeros((33, 33, 3), np.uint8)
    first, second, third = Classifier(engine="onnxruntime").predict([PHOTO, large, PHOTO])
    assert first.name == third.name == "cat"
    assert "Too little memory" in str(second.error)


def test_numbers_in_half_precision_alone_are_none():
    """OpenVINO's fp16 makes 65504 out of NaN."""
    single, half = (Mock(precision=precision) for precision in ("fp32", "fp16"))
    nothing, numbers = np.full((1, 10), np.nan), np.full((1, 10), 65504.0)
    with pytest.raises(EngineError, match="The network gives no numbers"):
        module._that_agree([(single, nothing), (half, numbers)])
    assert module._that_agree([(half, nothing), (half, numbers)]) == [half], "where no other precision was asked for"


def test_a_choice_is_remembered_for_this_file_and_question(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "time_together", timed(ONNX=1.0))
    first = choose(FILE, store=tmp_path)
    monkeypatch.setattr(module, "time_together", timed(OpenVINO=1.0))
    assert choose(FILE, store=tmp_path) == first
    assert choose(FILE, "fp32", store=tmp_path).engine == "openvino"
    assert choose(FILE, threads=1, store=tmp_path).engine == "openvino"
    note = next(tmp_path.glob("*.json"))
    for damaged in ("{", json.dumps({"engine": "openvino"}), json.dumps({**asdict(first), "engine": "tensorrt"})):
        note.write_text(damaged)
        assert choose(FILE, store=tmp_path).engine in module.installed_engines()


def test_a_folder_that_cannot_be_written_is_as_good_as_none(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "time_together", timed())
    (tmp_path / "file").write_text("")
    assert choose(FILE, store=tmp_path / "file" / "below").engine


def test_one_engine_needs_no_measurement(monkeypatch):
    monkeypatch.setattr(module, "installed_engines", lambda: ("onnxruntime",))
    monkeypatch.setattr(module, "time_together", None)
    assert choose(FILE).engine == "onnxruntime"


def test_no_engine_for_a_precision():
    with pytest.raises(EngineError, match="not quantised"):
        choose(FILE, "int8")


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "torch"])
def test_classifier_runs_any_engine(engine):
    classify = Classifier(engine=engine, precision="fp32")
    assert classify.engine.endswith(("(fp32)", "fp32)"))
    assert classify(PHOTO).name == Classifier(engine="onnxruntime")(PHOTO).name


def test_classifier_chooses_and_says_why():
    classify = Classifier()
    assert classify.engine
    assert "fastest here" in classify.reason


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"engine": "onnx"}, "Here: onnxruntime"),
        ({"precision": "int4"}, "'int8'"),
        ({"device": "cuda", "engine": "openvino"}, "Only torch"),
        ({"device": "cuda:99"}, "Cannot use the device 'cuda:99'"),  # torch is taken for it
        ({"model": str(FILE), "engine": "torch"}, "does not run in torch"),
        ({"model": str(FILE), "checkpoint": FILE}, "Two weights files"),
        ({"model": str(FILE), "checkpoint": FILE, "engine": "torch"}, "Two weights files"),
    ],
)
def test_what_classifier_refuses(options, text):
    with pytest.raises(UsageError, match=text):
        Classifier(**options)


def test_a_file_that_nothing_opens_is_not_said_to_lack_a_precision(monkeypatch):
    def refuse(*_, precision, **__):
        raise PrecisionError("not quantised") if precision == "int8" else EngineError("damaged")

    monkeypatch.setattr(module, "open_engine", refuse)
    with pytest.raises(EngineError, match="damaged"):
        choose(FILE)


def test_no_engine_at_all_is_said(monkeypatch):
    monkeypatch.setattr(module, "installed_engines", tuple)
    with pytest.raises(EngineError, match="No engine can be imported"):
        choose(FILE)
