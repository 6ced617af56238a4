"""Prediction on a Ray cluster of two workers: the same labels, nothing lost or doubled, also when one is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from unittest.mock import Mock

import pyarrow as arrow
import pytest
import ray
from pyarrow import dataset

from efficientformer.cluster import storage
from efficientformer.cluster.parts import BEGUN_FILE, DONE_FILE, Parts
from efficientformer.cluster.predict import Options, Worker, _attempts, _errors, count_rows, predict_on_cluster
from efficientformer.cluster.storage import UNFINISHED, Place
from efficientformer.export import deployable as deployable_module
from efficientformer.export.deployable import embedded_file
from efficientformer.runtime.classifier import FileClassifier, Prediction
from efficientformer.runtime.records import arrow_schema
from efficientformer.spec.errors import DataError, EngineError, UsageError
from tests.pictures import write_folders

OPTIONS = Options(engine="onnxruntime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = write_folders(tmp_path_factory.mktemp("cloud") / "images", per_class=40)
    (root / "broken\u202f.jpg").write_bytes(b"no picture")
    (root / ".hidden.png").write_bytes(b"")
    return root


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep
        )  # workers unpickle this module's classes by name
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
        yield
        ray.shutdown()


def rows(folder, format_="parquet"):
    files = [path for path in Path(folder).iterdir() if path.name not in (BEGUN_FILE, DONE_FILE)]
    if format_ == "json":
        found = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    else:
        found = dataset.dataset([str(path) for path in files], schema=arrow_schema()).to_table().to_pylist()
    return sorted(found, key=lambda row: row["path"])


def check(found, folder):
    paths = sorted(str(path) for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    assert [row["path"] for row in found] == paths  # each once
    classify = FileClassifier(embedded_file(), engine="onnxruntime", threads=1)
    for row in found:
        if row["path"].endswith("broken\u202f.jpg"):
            assert "Cannot decode" in row["error"]
            assert row["pred_label"] is None
        else:
            single = classify(row["path"])
            assert (row["error"], row["pred_label"], row["pred_class"]) == (None, single.label, single.name)
            assert [top["class"] for top in row["top_k"]] == [name for *_, name in single.top_k(3)]
            assert row["pred_score"] == pytest.approx(round(single.score, 6), abs=1e-6)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The output of a run, and its summary."""
    output = tmp_path_factory.mktemp("finished") / "labels"
    return output, predict_on_cluster(
        str(folder), output.as_uri(), embedded_file(), OPTIONS, workers=2, format_="json", part_size=8
    )


def test_two_workers_say_what_one_process_says(folder, finished):
    """In lines of JSON; the tests below have them write parquet."""
    output, summary = finished
    assert (summary.pictures, summary.skipped, summary.workers) == (121, 1, 2)
    assert json.loads((output / DONE_FILE).read_text())["pictures"] == 121
    found = rows(output, "json")
    check(found, folder)
    scores = [row["pred_score"] for row in found if row["error"] is None]
    assert scores == [round(score, 6) for score in scores]


COUNT = """
import sys
from efficientformer.cluster.predict import Place, count_rows
print(*count_rows(Place.of(sys.argv[1]), "json"))
"""


def test_rows_are_counted_where_pyarrow_has_one_thread(tmp_path):
    row = dict.fromkeys(arrow_schema().names)
    for part in range(16):
        lines = [json.dumps({**row, "path": f"{name}.png", "error": name or None}) for name in ("", "a", "b")]
        (tmp_path / f"part-{part:09d}.json").write_text("\n".join(lines) + "\n")
    line, one = [sys.executable, "-c", COUNT, str(tmp_path)], os.environ | {"OMP_NUM_THREADS": "1"}
    counted = subprocess.run(line, env=one, capture_output=True, text=True, timeout=60, check=True)
    assert counted.stdout.split() == ["48", "32"]


class Dies(Worker):
    """Is killed in the middle of its work: when it first meets one picture, and whenever it meets another."""

    def __call__(self, batch):
        note = Path(self._source.path).parent / "killed"
        if (
            any(path.endswith("green/020.png") for paths in batch["paths"].to_pylist() for path in paths)
            and not note.exists()
        ):
            note.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)

    def classify(self, paths):
        if any(path.endswith("red/020.png") for path in paths):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().classify(paths)


def test_killed_workers_lose_and_double_nothing_and_what_kills_every_one_is_given_up(folder, tmp_path):
    output, model = tmp_path / "labels", embedded_file()
    summary = predict_on_cluster(str(folder), str(output), str(model), OPTIONS, workers=3, part_size=8, worker=Dies)
    found = rows(output)
    assert (folder.parent / "killed").exists()
    assert (summary.pictures, summary.skipped, summary.workers) == (121, 2, 2)  # there is room for no third
    (given_up,) = (row for row in found if row["path"].endswith("red/020.png"))
    assert "2 workers died over it" in given_up["error"]
    (folder / "red" / "020.png").rename(folder.parent / "moved")
    try:
        check([row for row in found if row is not given_up], folder)
    finally:
        (folder.parent / "moved").rename(folder / "red" / "020.png")


def test_command(cli, folder, tmp_path):
    code, _, err = cli("predict", folder, "--ray", "-o", tmp_path / "labels", "--engine", "onnxruntime")
    assert code == 1, err
    assert "Inputs skipped: 1 of 121" in err
    assert "121 pictures by 2 workers" in err
    assert "Using efficientformer_cifar10, shipped in the package" in err
    check(rows(tmp_path / "labels"), folder)
    again, _, err = cli("predict", folder, "--ray", "-o", tmp_path / "labels", "--engine", "onnxruntime")
    assert again == code
    assert "121 were there already" in err
    code, _, err = cli("predict", folder, "--ray", "-o", tmp_path / "labels", "--top-k", 2)
    assert code == 2
    assert "found engine, top_k differ" in err


def test_a_folder_that_holds_something_else_is_spared(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        predict_on_cluster(str(folder), str(tmp_path), embedded_file(), OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_killed_run_goes_on_with_the_parts_that_are_missing(folder, finished, tmp_path):
    output = shutil.copytree(finished[0], tmp_path / "labels")
    parts = sorted(output.glob("part-*"))
    assert len(parts) == 16
    for path in (*parts[3:5], parts[-1]):  # as of a run that was killed
        path.unlink()
    (output / f".part-000000000.json.0{UNFINISHED}").write_bytes(b"{")
    before = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
    summary = predict_on_cluster(str(folder), str(output), embedded_file(), OPTIONS, workers=1, format_="json")
    assert (summary.pictures, summary.workers, summary.kept) == (121, 1, 121 - 7 - 8 - 8)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in parts}.items()
    assert sorted(output.iterdir()) == [output / BEGUN_FILE, output / DONE_FILE, *parts]
    check(rows(output, "json"), folder)


def test_a_part_is_missing_until_it_is_whole(tmp_path):
    place = Place.of(str(tmp_path))
    parts = Parts(place, "json", {}, ["a.png", "b.png"])
    parts.begin(2)
    opens = place.filesystem.open_output_stream
    stops = SimpleNamespace(type_name="local", open_output_stream=opens, move=Mock(side_effect=KeyboardInterrupt))
    for part in parts.missing():
        with pytest.raises(KeyboardInterrupt):
            replace(place, filesystem=stops).write(part.name, b"row")
    begun = Parts(place, "json", {}, ["a.png", "b.png"])
    assert [part.paths for part in begun.missing()] == [["a.png"], ["b.png"]]
    gone = next(path for path in tmp_path.iterdir() if path.name.endswith(UNFINISHED))
    gone.unlink()  # by a worker that has just ended it
    begun.tidy()
    assert [path.name for path in tmp_path.iterdir()] == [BEGUN_FILE]
    (tmp_path / parts.missing()[0].name).touch()  # what a machine that lost its power may leave
    assert [part.paths for part in Parts(place, "json", {}, ["a.png", "b.png"]).missing()] == [["a.png"], ["b.png"]]
    (tmp_path / "part-000000000.parquet").write_bytes(b"half")
    with pytest.raises(EngineError, match=r"part-000000000\.parquet is damaged"):
        count_rows(place, "parquet")


def test_rows_of_many_classes_are_read_back(tmp_path):
    top = [{"label": number, "score": 0.5, "class": f"class {number} of many"} for number in range(30_000)]
    row = {"path": "a.png", "pred_label": 0, "pred_score": 0.5, "pred_class": "class", "top_k": top}
    line = json.dumps(row) + "\n"
    assert len(line) > 1 << 20
    (tmp_path / "part-000000000.jsonl").write_text(2 * line)
    assert _errors(Place.of(str(tmp_path)), str(tmp_path / "part-000000000.jsonl"), "json").null_count == 2


def test_other_pictures_and_a_note_that_is_none_are_refused(tmp_path):
    place = Place.of(str(tmp_path))
    Parts(place, "json", {}, ["b.png"]).begin(1)
    note = tmp_path / BEGUN_FILE
    assert Parts(place, "json", {}, ["a.png"]).number == 0  # nothing is there that could be mixed
    Parts(place, "json", {}, ["a.png"]).begin(1)
    (tmp_path / "part-000000000.json").write_text("{}")
    with pytest.raises(UsageError, match="pictures differ"):
        Parts(place, "json", {}, ["b.png"])
    whole = note.read_text()
    for damaged, message in (("[]", "no journal"), (whole.replace('"parts": 1', '"parts": 0'), "number of parts")):
        note.write_text(damaged)
        with pytest.raises(UsageError, match=message):
            Parts(place, "json", {}, ["a.png"])


def test_the_count_of_attempts_outlives_its_node():
    attempts = _attempts()
    assert ray.get(attempts.begin.remote("x")) == 0
    ray.kill(attempts, no_restart=False)
    deadline = time.monotonic() + 60
    while ray.get(attempts.begin.remote("x")):  # it dies in its own time, and then counts from 0
        assert time.monotonic() < deadline


@pytest.mark.parametrize("option", [("--engine", "onnxruntim"), ("--precision", "fp23")])
def test_a_name_that_no_worker_knows_ends_at_once(cli, folder, tmp_path, monkeypatch, option):
    monkeypatch.setattr(deployable_module, "deployable", lambda *_, **__: pytest.fail("nothing is to be built"))
    code, _, err = cli("predict", folder, "--ray", "-o", tmp_path / "new", *option)
    assert code == 2
    assert "Did you mean" in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--ray",), 2, "--output"),
        (("more", "--ray", "-o", "x"), 2, "one folder"),
        (("--ray", "-o", "x", "-f", "csv"), 2, "'json'"),
        (("--ray", "-o", "x", "--annotate", "y"), 2, "--annotate"),
    ],
)
def test_wrong_usage(cli, folder, tmp_path, monkeypatch, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    found, _, err = cli("predict", folder, *arguments)
    assert found == code
    assert says in err


def test_what_no_worker_could_open_ends_at_once_and_leaves_nothing(cli, folder, tmp_path):
    code, _, err = cli("predict", folder, "--ray", "-o", tmp_path / "new", "--precision", "int8", "-m", embedded_file())
    assert (code, len(err.splitlines())) == (1, 1)
    assert "This file is not quantised" in err
    assert not (tmp_path / "new").exists()


ALONE = """
import sys
import ray
from efficientformer.cluster.predict import Options, predict_on_cluster
summary = predict_on_cluster(*sys.argv[1:4], Options(engine="onnxruntime"), workers=1)
print(summary.pictures, ray.is_initialized(), file=sys.stderr)
"""


def test_a_cluster_of_its_own_ends_with_the_call_and_says_nothing(folder, tmp_path):
    line = [sys.executable, "-c", ALONE, str(folder / "red"), str(tmp_path / "labels"), str(embedded_file())]
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(line, env=own, capture_output=True, text=True, timeout=300, check=True)
    said = [line for line in done.stderr.splitlines() if "core_worker.cc" not in line]  # Ray's core is not ours
    assert said == ["40 False"]


def test_more_threads_than_any_node_has(folder, tmp_path):
    with pytest.raises(UsageError, match=r"the largest node has 2 CPUs"):
        predict_on_cluster(str(folder), str(tmp_path / "new"), embedded_file(), Options(threads=3))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["threads", "top_k"])
def test_numbers_below_1(name):
    with pytest.raises(UsageError, match="a whole number from 1"):
        Options(**{name: 0})


def test_no_cluster_at_the_address(cli, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would try for minutes"))
    code, _, err = cli("predict", folder, "--ray", "-o", tmp_path / "new")
    assert code == 2, err
    assert "Cannot join the Ray cluster at '127.0.0.1:1'" in err
    assert not (tmp_path / "new").exists()


def test_a_worker_takes_the_threads_it_reserved(folder, tmp_path, monkeypatch):
    given = []
    original = FileClassifier.predict

    def spy(self, pictures, **options):
        given.append(options.get("workers"))
        return original(self, pictures, **options)

    monkeypatch.setattr(FileClassifier, "predict", spy)
    place = Place.of(str(folder))
    target, model = Place.of(str(tmp_path)), ray.put(embedded_file().read_bytes())
    worker = Worker(place, target, "parquet", model, _attempts(), Options(engine="onnxruntime", threads=3))
    done = worker(arrow.table({"name": ["part-0.parquet"], "paths": [place.pictures()]}))
    assert done.to_pylist() == [{"pictures": 121}]
    assert given[-1] == 3
    check(rows(tmp_path), folder)


def test_a_hidden_folder_is_taken_when_named(folder):
    hidden = write_folders(folder.parent / ".cache" / "images", per_class=1)
    (hidden / ".thumbnails").mkdir()
    (hidden / ".thumbnails" / "0.png").write_bytes(b"")
    names = sorted(str(path) for path in hidden.glob("[!.]*/*.png"))
    assert len(names) == 3
    assert Place.of(str(hidden)).pictures() == Place.of(f"{hidden.as_uri()}/").pictures() == names


def test_places_that_lead_nowhere(tmp_path):
    with pytest.raises(UsageError, match="s4"):
        Place.of("s4://bucket/images")
    with pytest.raises(DataError, match="Cannot list"):
        Place.of(str(tmp_path / "none")).pictures()
    with pytest.raises(DataError, match="No pictures"):
        Place.of(str(tmp_path)).pictures()


def test_a_name_that_is_no_text(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(b"")
    with pytest.raises(DataError, match="UTF-8"):
        Place.of(str(tmp_path)).pictures()


def test_circles_of_links_end(tmp_path):
    root = write_folders(tmp_path / "images", per_class=1)
    for name in ("back", "again"):
        (root / "green" / name).symlink_to(root, target_is_directory=True)
    names = sorted(str(path) for path in root.glob("*/*.png"))
    assert len(names) == 3
    assert Place.of(str(root)).pictures() == Place.of(root.as_uri()).pictures() == names


def test_a_local_path_has_the_slashes_of_pyarrow(monkeypatch):
    monkeypatch.setattr(storage, "Path", lambda name: SimpleNamespace(absolute=lambda: PureWindowsPath("C:\\", name)))
    assert Place.of("pictures").path == "C:/pictures"


@pytest.mark.parametrize("numbers", [{"part_size": 0}, {"part_size": -1}, {"workers": 0}, {"workers": -2}])
def test_numbers_of_parts_and_workers_below_1(folder, tmp_path, numbers):
    with pytest.raises(UsageError, match="a whole number from 1"):
        predict_on_cluster(str(folder), str(tmp_path / "new"), embedded_file(), OPTIONS, **numbers)
    assert not (tmp_path / "new").exists()


def test_the_engine_opens_a_file_that_is_open_nowhere_else(folder, monkeypatch):
    """Windows would refuse it."""
    original = FileClassifier.__init__

    def spy(self, path, **options):
        assert not any(os.path.realpath(entry) == str(path) for entry in Path("/proc/self/fd").iterdir())
        original(self, path, **options)

    monkeypatch.setattr(FileClassifier, "__init__", spy)
    place, model = Place.of(str(folder)), ray.put(embedded_file().read_bytes())
    worker = Worker(place, place, "parquet", model, None, OPTIONS)
    assert isinstance(worker.classify([str(folder / "green" / "000.png")])[0], Prediction)
