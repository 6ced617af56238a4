"""Many pictures: in order, drawn lazily, nothing left running, the same labels as one by one."""

import functools
import json
import pickle
import shutil
import threading
import time
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from efficientformer import Classifier
from efficientformer.runtime.classifier import EngineClassifier, Failed
from efficientformer.runtime.image import decode
from efficientformer.runtime.inputs import gather
from efficientformer.runtime.pipeline import AHEAD, in_order
from efficientformer.runtime.preprocess import resize_crop
from efficientformer.runtime.records import record
from efficientformer.spec.errors import UsageError
from efficientformer.spec.preprocess import PreprocessSpec

PHOTOS = sorted((Path(__file__).parents[2] / "examples").glob("*.jpg"))


def test_results_come_in_order_whatever_takes_long():
    def work(chunk):
        time.sleep(0.02 if chunk[0] % 3 == 0 else 0)
        return [item * item for item in chunk]

    for chunk in (1, 4):
        assert list(in_order(range(30), work, workers=3, chunk=chunk)) == [item * item for item in range(30)]
    assert list(in_order([], work, workers=2)) == []


@pytest.mark.parametrize("chunk", [1, 5])
def test_inputs_are_drawn_a_bounded_number_ahead(chunk):
    drawn = []
    results = in_order((drawn.append(i) or i for i in range(10_000)), lambda taken: taken, workers=2, chunk=chunk)
    for done in range(1, 200):
        next(results)
        assert len(drawn) <= done + (AHEAD * 2 + 1) * chunk
    results.close()
    assert len(drawn) < 400


def until(true):
    """Wait for something, for a while."""
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.001)
    assert true()


def test_a_result_does_not_wait_for_a_stream_that_is_slow():
    """A frame comes when those before it are worked on, but for one that takes long: results then come at once."""
    drawn, done, go_on = [], set(), threading.Event()

    def frames():
        for number in range(24):
            if number == 10:
                go_on.set()
            until(lambda: {*range(number)} - {3 if number < 11 else -1} <= done)  # noqa: B023 (called here)
            time.sleep(0.02)
            drawn.append(number)
            yield number

    def work(taken):
        if taken == [3]:
            go_on.wait(10)
        done.update(taken)
        return taken

    behind = [drawn[-1] - number for number in in_order(frames(), work, workers=4)]
    assert max(behind[:3]) <= 1
    assert behind[10] <= 3
    assert max(behind[14:]) <= 1


def test_threads_have_work_while_the_caller_is_slow():
    done = []

    def work(taken):
        time.sleep(0.005)
        done.append(taken)
        return taken

    for number in in_order(range(30), work, workers=2):
        if number > 2:  # how long a draw and a chunk take is known from the first
            until(lambda: len(done) > min(number + AHEAD, 29))  # noqa: B023 (called here)


def test_an_error_comes_in_its_place_and_leaves_no_thread():
    before = threading.active_count()

    def work(chunk):
        if chunk == [3]:
            raise ZeroDivisionError
        return chunk

    results = in_order(range(100), work, workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert threading.active_count() == before


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_stream_that_fails_loses_nothing_that_came_before(chunk):
    def stream():
        yield from range(10)
        raise ZeroDivisionError

    done = []
    with pytest.raises(ZeroDivisionError):
        done.extend(in_order(stream(), lambda taken: time.sleep(0.01) or taken, workers=2, chunk=chunk))
    assert done == [*range(10)]


def test_stopping_early_waits_for_nothing():
    go_on = threading.Event()
    results = in_order(range(9), lambda taken: taken if taken == [0] else go_on.wait(5) and taken, workers=2)
    assert next(results) == 0
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 2
    go_on.set()


def test_stopping_early_drops_what_has_not_begun():
    begun = []
    results = in_order(range(1000), lambda taken: begun.append(taken) or taken, workers=1)
    next(results)
    results.close()
    assert len(begun) <= AHEAD + 1


@functools.cache
def open_classifier(engine):
    return Classifier(engine=engine)


@functools.cache
def one_by_one(engine):
    return {photo: open_classifier(engine)(photo) for photo in PHOTOS}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("options", [{}, {"workers": 3}, {"batch_size": 5}])
def test_many_give_the_labels_of_one_by_one(engine, options):
    pictures = [*PHOTOS, b"broken", *PHOTOS[::-1], Path("missing.jpg")]
    outcomes = list(open_classifier(engine).predict(pictures, **options))
    assert len(outcomes) == len(pictures)
    for picture, outcome in zip(pictures, outcomes, strict=True):
        if picture == b"broken" or picture == Path("missing.jpg"):
            assert isinstance(outcome, Failed)
        else:
            single = one_by_one(engine)[picture]
            assert outcome.label == single.label
            np.testing.assert_allclose(outcome.scores, single.scores, atol=2e-2)  # bf16 engines: batches round apart


def test_no_more_callers_than_streams(monkeypatch):
    class Counting:
        key, name, precision, streams = "x", "x", "fp32", 2
        manifest = open_classifier("onnxruntime").manifest
        inside = most = 0
        lock = threading.Lock()

        def for_many(self):
            return self

        def run(self, batch):
            with self.lock:
                self.inside += 1
                self.most = max(self.most, self.inside)
            time.sleep(0.003)
            with self.lock:
                self.inside -= 1
            return np.zeros((len(batch), 10), np.float32)

    engine = Counting()
    assert len(list(EngineClassifier(engine).predict(PHOTOS * 3, workers=6))) == 24
    assert engine.most == 2


@pytest.mark.parametrize(("count", "opened"), [(0, 0), (1, 0), (7, 0), (8, 1), (20, 1)])
def test_a_few_pictures_open_no_second_engine(count, opened, monkeypatch):
    engine, singles = open_classifier("onnxruntime"), one_by_one("onnxruntime")
    monkeypatch.setattr(engine, "_for_many", None)
    original, asked = engine._engine.for_many, []
    monkeypatch.setattr(engine._engine, "for_many", lambda: asked.append(1) or original())
    outcomes = list(engine.predict(islice(cycle(PHOTOS), count)))
    assert [outcome.label for outcome in outcomes] == [singles[photo].label for photo in islice(cycle(PHOTOS), count)]
    assert len(asked) == opened


def test_a_stream_is_not_asked_for_many_before_its_first_result(monkeypatch):
    classifier, drawn, done = open_classifier("onnxruntime"), [], []
    monkeypatch.setattr(classifier, "_for_many", None)
    original = classifier._scores
    monkeypatch.setattr(classifier, "_scores", lambda *given: (original(*given), done.append(1))[0])

    def frames():
        for number in range(12):
            until(lambda: len(done) == number)  # noqa: B023 (called here)
            time.sleep(0.1)
            drawn.append(number)
            yield PHOTOS[0]

    for number, _ in enumerate(classifier.predict(frames())):
        assert len(drawn) <= number + 2
    assert classifier._for_many is not None


def test_how_many_a_list_holds_decides_at_once(monkeypatch):
    classifier = open_classifier("onnxruntime")
    monkeypatch.setattr(classifier, "_for_many", None)
    classifier.predict(PHOTOS[:7])
    assert classifier._for_many is None
    classifier.predict([*PHOTOS, *PHOTOS])
    assert classifier._for_many is not None


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"workers": 0}, {"decode": "quick"}])
def test_illegal_options(options):
    with pytest.raises(UsageError):
        open_classifier("onnxruntime").predict(PHOTOS, **options)


def test_illegal_number_of_classes():
    prediction = one_by_one("onnxruntime")[PHOTOS[0]]
    assert len(prediction.top_k(np.int64(2))) == 2
    for count in (0, -1, True):
        with pytest.raises(UsageError, match="number of classes"):
            prediction.top_k(count)


@pytest.mark.parametrize(
    "one",
    [
        "cat.jpg",
        PHOTOS[0],
        b"\xff\xd8",
        BytesIO(),
        Image.new("RGB", (2, 2)),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((4, 4), np.uint8),
    ],
)
def test_one_picture_is_not_several(one):
    with pytest.raises(UsageError, match=r"classify\.predict\(\[picture\]\)"):
        open_classifier("onnxruntime").predict(one)


@pytest.mark.parametrize("shape", [(40, 50, 4), (40, 50, 1), (3, 40, 50), (4, 40, 50), (1, 40, 50)])
def test_one_picture_of_another_layout_is_not_a_stack_of_its_rows(shape):
    with pytest.raises(UsageError, match=r"stack of grey ones as a list: classify\.predict\(list\(stack\)\)"):
        open_classifier("onnxruntime").predict(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    "name", ["photos/", Path("photos"), "https://host/a.jpg", Path("https://host/a.jpg"), "photos/*"]
)
def test_the_name_of_a_folder_a_pattern_or_an_address_is_told_how_to_be_given(name, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"Use classify\.predict\(gather\(\['(photos/?\*?|https://host/a\.jpg)'\]\)\)"):
        open_classifier("onnxruntime").predict(name)


def test_arrays_of_pictures_and_of_paths_are_several():
    classify, singles = open_classifier("onnxruntime"), one_by_one("onnxruntime")
    small = [np.array(Image.open(photo).convert("RGB").resize((40, 40))) for photo in PHOTOS[:5]]
    stacked = classify.predict(np.stack(small))
    assert [each.label for each in stacked] == [classify(array).label for array in small]
    grey = [array[..., 0] for array in small]
    assert [each.label for each in classify.predict(np.stack(grey))] == [classify(array).label for array in grey]
    for paths in (np.array([str(photo) for photo in PHOTOS]), np.array(PHOTOS, object)):
        assert [each.label for each in classify.predict(paths)] == [singles[photo].label for photo in PHOTOS]


def jpeg(width, height):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (height // 16, width // 16, 3), np.uint8))
    file = BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((1600, 1200), (400, 300)),  # a quarter is still above 235
        ((960, 704), (480, 352)),
        ((480, 470), (240, 235)),  # just the size it is resized to
        ((480, 468), (480, 468)),  # a half would be 234
        ((320, 240), (320, 240)),
    ],
)
def test_fast_decoding_never_goes_below_the_resize(size, decoded):
    spec = PreprocessSpec(resize_size=235)
    data = jpeg(*size)
    assert decode(data).size == size
    small = decode(data, shrink_for=spec)
    assert small.size == decoded
    exact, fast = (np.asarray(resize_crop(image, spec), float) for image in (decode(data), small))
    assert np.abs(exact - fast).mean() < 4


def test_fast_decoding_counts_with_the_turn_that_follows():
    """A squashing network takes 64 x 256 (height, width); the picture is stored lying on its side."""
    spec = PreprocessSpec(input_size=(64, 256), resize="squash", resize_size=0, exif=True)
    file, exif = BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(BytesIO(jpeg(1024, 512))).save(file, "JPEG", exif=exif)
    assert decode(file.getvalue(), exif=True, shrink_for=spec).size == (256, 512)


def test_fast_decoding_leaves_other_formats_alone():
    file = BytesIO()
    Image.open(BytesIO(jpeg(1600, 1200))).save(file, "PNG")
    assert decode(file.getvalue(), shrink_for=PreprocessSpec(resize_size=235)).size == (1600, 1200)


def test_results_say_which_picture_they_are_of_in_a_line(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    shutil.copy(PHOTOS[0], tmp_path / "good.jpg")
    classify = open_classifier("onnxruntime")
    broken, good = classify.predict(gather([tmp_path]))
    assert (broken.source, good.source) == (str(tmp_path / "broken.jpg"), str(tmp_path / "good.jpg"))
    assert repr(good) == f"Prediction({good.name!r}, {good.score:.3f}, {good.source!r})"
    assert repr(broken) == f"Failed({broken.source!r}, {str(broken.error)!r})"
    assert pickle.loads(pickle.dumps(good)).source == good.source
    single = classify(PHOTOS[0])
    assert single.source == str(PHOTOS[0])
    (unnamed,) = classify.predict([PHOTOS[0].read_bytes()])
    assert repr(unnamed) == f"Prediction({single.name!r}, {single.score:.3f})"
    assert repr(next(classify.predict([b"no picture"]))).startswith('Failed("Cannot decode the 10 bytes')


@pytest.mark.parametrize("batch_size", [1, 3])
def test_names_stay_with_their_pictures_where_some_fail(batch_size):
    names = [*PHOTOS[:2], "absent.jpg", *PHOTOS[2:4], "absent too.jpg", *PHOTOS[4:]]
    found = list(open_classifier("onnxruntime").predict(names, batch_size=batch_size))
    assert [each.source for each in found] == list(map(str, names))


def test_records_are_those_of_the_command():
    prediction = open_classifier("onnxruntime")(PHOTOS[0])
    assert json.loads(json.dumps(prediction.record(2))) == record(str(PHOTOS[0]), prediction, "", 2)
    assert len(prediction.record()["top_k"]) == 3
    (failed,) = open_classifier("onnxruntime").predict(["absent.jpg"])
    assert failed.record() == {"path": "absent.jpg", "error": str(failed.error)}
