"""Prediction on a Ray cluster of two workers: the same labels, nothing lost or doubled, also when one is killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pyarrow as arrow
import pytest
import ray
from pyarrow import dataset

from efficientformer.cluster import storage
from efficientformer.cluster.predict import DONE_FILE, Attempts, Options, Worker, predict_on_cluster
from efficientformer.cluster.storage import Place
from efficientformer.export.deployable import embedded_file
from efficientformer.runtime.classifier import FileClassifier, Prediction
from efficientformer.runtime.records import arrow_schema
from efficientformer.spec.errors import DataError, UsageError
from tests.pictures import write_folders

OPTIONS = Options(engine="onnxruntime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = write_folders(tmp_path_factory.mktemp("cloud") / "images", per_class=40)
    (root / "broken.jpg").write_bytes(b"no picture")
    (root / ".hidden.png").write_bytes(b"")
    return root


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # workers unpickle this module's classes by name
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
        yield
        ray.shutdown()


def rows(folder, format_="parquet"):
    files = [path for path in Path(folder).iterdir() if path.name != DONE_FILE]
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
        if row["path"].endswith("broken.jpg"):
            assert "Cannot decode" in row["error"]
            assert row["pred_label"] is None
        else:
            single = classify(row["path"])
            assert (row["error"], row["pred_label"], row["pred_class"]) == (None, single.label, single.name)
            assert [top["class"] for top in row["top_k"]] == [name for *_, name in single.top_k(3)]


def test_two_workers_say_what_one_process_says(folder, tmp_path):
    """In lines of JSON; the tests below have them write parquet."""
    output = tmp_path / "labels"
    summary = predict_on_cluster(
        str(folder), output.as_uri(), embedded_file(), OPTIONS, workers=2, format_="json", part_size=8
    )
    assert (summary.pictures, summary.skipped, summary.workers) == (121, 1, 2)
    assert json.loads((output / DONE_FILE).read_text())["pictures"] == 121
    check(rows(output, "json"), folder)


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
        if any(path.endswith("green/020.png") for path in batch["path"].to_pylist()) and not note.exists():
            note.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)

    def classify(self, paths):
        if any(path.endswith("red/020.png") for path in paths):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().classify(paths)


def test_killed_workers_lose_and_double_nothing_and_what_kills_every_one_is_given_up(folder, tmp_path):
    output, model = tmp_path / "labels", embedded_file()
    summary = predict_on_cluster(str(folder), str(output), model, OPTIONS, workers=2, part_size=8, worker=Dies)
    found = rows(output)
    assert (folder.parent / "killed").exists()
    assert (summary.pictures, summary.skipped) == (121, 2)
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
    assert "1 of 121 inputs were skipped" in err
    assert "121 pictures by 2 workers" in err
    check(rows(tmp_path / "labels"), folder)
    code, _, err = cli("predict", folder, "--ray", "-o", tmp_path / "labels")
    assert code == 2
    assert "not empty" in err


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
    attempts = ray.remote(num_cpus=0)(Attempts).remote()
    target, model = Place.of(str(tmp_path)), ray.put(embedded_file().read_bytes())
    worker = Worker(place, target, "parquet", model, attempts, Options(engine="onnxruntime", threads=3))
    pictures = place.pictures()
    done = worker(arrow.table({"place": range(len(pictures)), "path": pictures}))
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
