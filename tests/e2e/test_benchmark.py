"""``efficientformer benchmark`` as a user runs it, on the network in the package, with few rounds."""

import json
import shutil
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from efficientformer.benchmarking.benchmark import _entries, _for_picture, benchmark
from efficientformer.benchmarking.networks import open_networks
from efficientformer.benchmarking.subject import RefusedError, Subject
from efficientformer.benchmarking.worker import prepare
from efficientformer.export.deployable import quantised_file
from efficientformer.runtime.processor import computes_in
from efficientformer.spec.errors import DownloadError, EngineError
from efficientformer.spec.variants import v2_spec
from tests.e2e.test_convert import shrink

ONNX = Path(str(files("efficientformer") / "assets" / "efficientformer_cifar10.onnx"))
FAST = ("--rounds", "3", "--threads", "1", "--quiet")


def test_every_combination_is_timed_or_named_with_its_reason(cli):
    code, out, err = cli("benchmark", "efficientformer_cifar10", "--batch", "1,2", "--json", *FAST)
    assert code == 0, err
    found = json.loads(out)
    assert (found["rounds"], found["threads"]) == (3, 1)
    assert found["networks"][0]["macs"] == 122_977_472
    timed = {(row["engine"], row["precision"]) for row in found["rows"]}
    refused = {(each["engine"], each["precision"]) for each in found["unavailable"]}
    int8 = {("onnxruntime", "int8"), ("openvino", "int8")}  # of the file that is shipped
    assert {("onnxruntime", "fp32"), ("torch", "fp32"), *int8} <= timed
    assert {("onnxruntime", "bf16"), ("torch", "int8")} <= refused
    assert ("torch", "bf16") in (timed if computes_in("bf16") else refused)  # emulated it would take minutes
    engines, precisions = ("onnxruntime", "openvino", "torch"), ("fp32", "bf16", "int8")
    assert timed | refused == {(engine, precision) for engine in engines for precision in precisions}
    assert all(each["reason"] for each in found["unavailable"])
    for batch in (1, 2):
        rows = [row for row in found["rows"] if row["batch"] == batch]
        assert len(rows) == len(timed)
        assert rows[0]["relative"] == 1
        assert [row["median_ms"] for row in rows] == sorted(row["median_ms"] for row in rows)
        assert all(row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["runs"] == 3 for row in rows)
        assert all(row["images_per_s"] == pytest.approx(1000 * batch / row["median_ms"], rel=1e-2) for row in rows)
        assert {row["weights"] for row in rows} == {"trained"}
    steps = found["pictures"][0]["steps"]
    assert set(steps) == {"decode", "resize and crop", "normalise", "engine", "file to label"}


def test_random_weights_are_marked_everywhere(cli, tmp_path, monkeypatch):
    shrink(monkeypatch, "efficientformerv2_s0", v2_spec((16, 16, 24, 32), ((2,), (), (), ()), 0))
    options = (
        "--random-weights",
        "--engine",
        "onnxruntime",
        "--precision",
        "fp32",
        "--output",
        tmp_path / "new",
        *FAST,
    )
    code, out, err = cli("benchmark", "efficientformerv2_s0", *options)
    assert code == 0, err
    assert "efficientformerv2_s0 (random weights)" in out
    assert "results mean nothing" in out
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "benchmark.json", "benchmark.png", "benchmark.html",
    }  # fmt: skip
    found = json.loads((tmp_path / "new" / "benchmark.json").read_text())
    assert [row["weights"] for row in found["rows"]] == ["random"]
    assert "random weights" in (tmp_path / "new" / "benchmark.html").read_text()


def test_an_exported_file_does_not_run_in_torch_and_says_so(cli):
    code, out, err = cli("benchmark", ONNX, "--engine", "torch", "--precision", "fp32", *FAST)
    assert code == 1, err
    assert "An exported file does not run in torch" in out
    code, out, err = cli("benchmark", ONNX, "--engine", "onnxruntime", "--precision", "auto", *FAST)
    assert code == 0, err
    assert "efficientformer_cifar10.onnx" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no_such_network",), "Unknown model 'no_such_network'"),
        (("no_such.onnx",), "no_such.onnx"),
        ((ONNX, "--engine", "tensorrt"), "tensorrt"),
        ((ONNX, "--precision", "fp8"), "fp8"),
        ((ONNX, "--batch", "1,x"), "Illegal --batch"),
        ((ONNX, "--batch", "0"), "Illegal --batch"),
        ((ONNX, "--output", ONNX / "below"), "Cannot write"),
    ],
)
def test_wrong_usage(cli, arguments, message):
    code, _, err = cli("benchmark", *arguments, *FAST)
    assert code == (1 if "no_such.onnx" in arguments else 2)
    assert message in err
    assert "Traceback" not in err


def test_files_of_the_current_folder_are_not_run(cli, tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit('this is not numpy')")
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("benchmark", ONNX, "--engine", "onnxruntime", "--precision", "fp32", "--json", *FAST)
    assert code == 0, err
    assert len(json.loads(out)["rows"]) == 1


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (("all", "all"), ("auto", "auto")),
        (("openvino", "all"), ("openvino", "auto")),
        (("all", "fp32"), ("auto", "fp32")),
        (("torch", "bf16"), ("torch", "bf16")),
    ],
)
def test_the_picture_takes_the_engine_and_precision_asked_for(asked, expected):
    found = _for_picture(_entries([None], *asked, compiled=False))
    assert (found.engine, found.precision) == expected


def child(body):
    """Return the command of a subject whose ``prepare`` is this code."""
    head = (
        "from efficientformer.benchmarking.subject import serve\nfrom efficientformer.spec.errors import EngineError\n"
    )
    return (sys.executable, "-c", f"{head}def prepare():\n    {body}\nserve(prepare)")


def test_a_subject_runs_once_untimed_and_then_as_often_as_asked():
    body = "print('noise'); calls = []; return {'a': 1}, {'run': lambda: calls.append(1) or print(len(calls))}"
    with Subject(child(body)) as subject:
        assert subject.facts == {"a": 1, "runs": ["run"]}
        assert len(subject.turn("run", 3)) == 3


def test_a_subject_that_refuses_and_one_that_dies():
    with pytest.raises(RefusedError, match="not here"):
        Subject(child("raise EngineError('not here')"))
    with pytest.raises(EngineError, match=r"ended with code 1.*ValueError: broken"):
        Subject(child("raise ValueError('broken')"))


def test_a_subject_that_dies_is_named_and_the_others_are_kept(monkeypatch):
    """As one does that runs out of memory at a larger batch."""
    original = Subject.turn

    def turn(self, run, count, *, wake=True):
        if self.facts["engine"] == "onnxruntime" and run == "2":
            self._process.kill()
        return original(self, run, count, wake=wake)

    monkeypatch.setattr(Subject, "turn", turn)
    found = benchmark([str(ONNX)], precision="fp32", batches=(1, 2), rounds=6, threads=1)
    assert [(row.engine, row.batch) for row in found.rows] == [("openvino", 1), ("openvino", 2)]
    assert all(row.relative == 1 for row in found.rows)
    reasons = {each.engine: each.reason for each in found.unavailable}
    assert "ended with code -9" in reasons["onnxruntime"]
    assert set(reasons) == {"onnxruntime", "torch"}


def test_a_process_that_dies_over_the_picture_costs_its_steps_alone(monkeypatch):
    original = Subject.turn

    def turn(self, run, count, *, wake=True):
        if run == "file to label":
            self._process.kill()
        return original(self, run, count, wake=wake)

    monkeypatch.setattr(Subject, "turn", turn)
    found = benchmark([str(ONNX)], engine="onnxruntime", precision="fp32", rounds=3, threads=1)
    assert (len(found.rows), found.pictures) == (1, ())
    assert "ended with code -9" in found.unavailable[0].reason


def test_processes_are_told_to_stay_offline(monkeypatch):
    monkeypatch.delenv("EFFICIENTFORMER_OFFLINE")
    jobs = []

    def refuse(command):
        jobs.append(json.loads(command[-1]))
        raise RefusedError("not here")

    monkeypatch.setattr("efficientformer.benchmarking.benchmark.Subject", refuse)
    benchmark(["efficientformer_cifar10"], engine="torch", precision="fp32", offline=True)
    assert len(jobs) == 2  # the engine alone, and the way of one picture
    for job in jobs:
        with pytest.raises(DownloadError, match="offline"):
            prepare({**job, "model": "efficientformer_l1"})


def test_offline_holds_for_repositories_too(monkeypatch, tmp_path):
    monkeypatch.delenv("EFFICIENTFORMER_OFFLINE")
    with pytest.raises(DownloadError, match="offline=True"):
        open_networks(["hf-hub:me/none"], tmp_path, random_weights=False, offline=True, progress=None)


def test_int8_is_of_the_file_that_was_quantised(cli):
    options = ("--engine", "onnxruntime", "--precision", "int8", "--json", *FAST)
    code, out, err = cli("benchmark", "efficientformer_cifar10", *options)
    assert code == 0, err
    assert json.loads(out)["rows"][0]["precision"] == "int8"
    assert "int8" in json.loads(out)["pictures"][0]["engine_name"]
    code, out, err = cli("benchmark", ONNX, *options)  # a file is what it is
    assert code == 1, err
    assert "not quantised" in json.loads(out)["unavailable"][0]["reason"]


def test_a_folder_that_quantize_wrote_is_a_network(cli, tmp_path):
    for name in ("a-int8", "b-int8"):
        (tmp_path / name).mkdir()
        shutil.copy(quantised_file(""), tmp_path / name / "model.onnx")
    options = ("--engine", "onnxruntime", "--precision", "int8", "--json", *FAST)
    code, out, err = cli("benchmark", tmp_path / "a-int8", tmp_path / "b-int8", *options)
    assert code == 0, err
    found = json.loads(out)
    assert {row["model"] for row in found["rows"]} == {"a-int8", "b-int8"}
    assert found["unavailable"] == []
