"""Bulk prediction: every format, and killed at any moment it goes on with no line lost or doubled."""

import csv
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import onnx
import pytest

from efficientformer import api
from efficientformer.cli import journal as journal_module
from efficientformer.cli.journal import Journal
from efficientformer.export.deployable import embedded_file
from efficientformer.runtime import classifier as classifier_module
from efficientformer.runtime.choice import Choice
from efficientformer.spec.errors import UsageError
from tests.pictures import write_folders

ENGINE = ("--engine", "onnxruntime")
RECORD = ["path", "pred_label", "pred_score", "pred_class", "top_k"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("many") / "pictures"
    write_folders(root, per_class=40)
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    return root


def run(folder, output, *options):
    command = [sys.executable, "-m", "efficientformer", "predict", folder, "-o", output, *ENGINE, *options]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "labels.jsonl"
    process = run(folder, output)
    _, err = process.communicate()
    assert process.returncode == 1, err  # one is broken
    assert "1 of" in err
    return output.read_text()


def test_every_format_says_the_same(cli, folder, undisturbed, tmp_path):
    records = [json.loads(line) for line in undisturbed.splitlines()]
    assert len(records) == len(list(folder.rglob("*.*")))
    for name in ("labels.csv", "labels.parquet"):
        code, _, _ = cli("predict", folder, "-o", tmp_path / name, *ENGINE)
        assert code == 1
    rows = list(csv.DictReader((tmp_path / "labels.csv").open()))
    from pyarrow import parquet

    table = parquet.read_table(tmp_path / "labels.parquet").to_pylist()
    for record, row, entry in zip(records, rows, table, strict=True):
        assert record["path"] == row["path"] == entry["path"]
        assert record.get("error", "") == row["error"] == (entry["error"] or "")
        if "error" not in record:
            assert record["pred_label"] == int(row["pred_label"]) == entry["pred_label"]
            assert record["pred_class"] == row["pred_class"] == entry["pred_class"]
            assert record["pred_score"] == pytest.approx(float(row["pred_score"]), abs=1e-6)
            assert [top["class"] for top in record["top_k"]] == [top["class"] for top in entry["top_k"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.csv", "labels.parquet"]


def test_killed_and_run_again_it_goes_on(folder, undisturbed, tmp_path):
    """Killed four times, at four moments."""
    output = tmp_path / "labels.jsonl"
    part = tmp_path / "labels.jsonl.part"
    done = 0
    for after in (0, 1, 25, 60):
        process = run(folder, output)
        while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") <= after):
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        if output.exists():
            break
        now = part.read_bytes().count(b"\n") - 1
        assert now >= done
        done = now
        with part.open("ab") as file:  # a line that was being written
            file.write(b'{"path": "torn')
    if not output.exists():
        again = run(folder, output)
        _, err = again.communicate()
        assert again.returncode == 1, err
        assert done <= 0 or "Going on after" in err
    assert output.read_text() == undisturbed
    assert not part.exists()


def test_ctrl_c_keeps_what_is_done_says_how_to_go_on_and_waits_for_no_slow_server(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("EFFICIENTFORMER_OFFLINE")
    monkeypatch.setenv("no_proxy", "*")
    many = tmp_path / "many"
    many.mkdir()
    picture = next(folder.rglob("*.png"))
    for number in range(300):
        os.link(picture, many / f"{number:04}.png")
    output, part = tmp_path / "labels.jsonl", tmp_path / "labels.jsonl.part"

    def interrupted(*inputs, lines, pause=0.0):
        """Run until so many lines are written, and press Ctrl-C; return what it said, and the seconds it took."""
        process = run(inputs[0], output, *inputs[1:])
        while not part.exists() or part.read_bytes().count(b"\n") < lines:
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(pause)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        err = process.communicate()[1]
        assert process.returncode == 130, err
        assert "Traceback" not in err
        return err, time.monotonic() - start

    with socket.create_server(("127.0.0.1", 0)) as silent:  # so that no run is through before the signal reaches it
        slow = f"http://127.0.0.1:{silent.getsockname()[1]}/cat.jpg"
        err, _ = interrupted(many, slow, lines=3)
        kept, told = part.read_bytes().count(b"\n") - 1, re.search(rf"(\d+) pictures are kept in {part}", err)
        assert told, err
        assert int(told[1]) in (kept - 1, kept)  # a line can be written and not yet counted
        assert kept < 300, "the signal came too late"
        err, seconds = interrupted(many, slow, lines=301, pause=0.5)  # it waits for nothing but the server
    assert seconds < 5
    assert "Going on after" in err
    assert "300 pictures are kept" in err
    found = [json.loads(line)["path"] for line in part.read_text().splitlines()[1:]]
    assert found == [str(many / f"{number:04}.png") for number in range(300)]


def test_another_command_never_goes_on(cli, folder, tmp_path):
    output = tmp_path / "labels.jsonl"
    part = Path(f"{output}.part")
    part.write_text('{"efficientformer": 1, "inputs": ["x"], "model": "L1"}\n{"path": "a.jpg", "error": "x"}\n')
    before = part.read_text()
    code, _, err = cli("predict", folder, "-o", output, *ENGINE)
    assert code == 2
    assert "begun by another command" in err
    assert "model" in err
    assert part.read_text() == before
    asked = {"inputs": [str(folder)], "model": "", "checkpoint": None, "top_k": 3, "threads": None, "decode": "exact"}
    part.write_text(json.dumps({"efficientformer": 1, **asked, "engine": "ONNX Runtime 1.20 (fp32)"}) + "\n")
    code, _, err = cli("predict", folder, "-o", output)  # of an earlier version
    assert code == 2
    assert "efficientformer, engine" in err
    part.write_text("something else entirely\n")
    code, _, err = cli("predict", folder, "-o", output, *ENGINE)
    assert code == 2
    assert "no journal" in err


@pytest.mark.parametrize("foreign", [b"my notes without an end", b'{"notes": 1', None])
def test_a_file_that_is_no_journal_is_spared(tmp_path, foreign):
    output, part = tmp_path / "labels.jsonl", tmp_path / "labels.jsonl.part"
    if foreign is None:
        part.symlink_to("/dev/full")  # a line of it has no end
    else:
        part.write_bytes(foreign)
    with pytest.raises(UsageError, match="no journal"):
        Journal(output, {"a": 1})
    assert foreign is None or part.read_bytes() == foreign


def test_a_torn_first_line_and_a_record_that_says_nothing_are_done_anew(tmp_path):
    output, part = tmp_path / "labels.jsonl", tmp_path / "labels.jsonl.part"
    Journal(output, {"a": 1}).close()
    whole = part.read_bytes()
    for torn in (b"", whole[:1], whole[:-1]):
        part.write_bytes(torn)
        Journal(output, {"a": 1}).close()
        assert part.read_bytes() == whole
    part.write_bytes(whole + b'{"path": "a.jpg"}\n{"path": "b.jpg", "error": "x"}\n')
    journal = Journal(output, {"a": 1})
    journal.close()
    assert journal.done == 0
    assert part.read_bytes() == whole


def test_a_run_goes_on_with_the_engine_it_was_begun_with(cli, folder, tmp_path, monkeypatch):
    output = tmp_path / "labels.jsonl"
    monkeypatch.setattr(api, "choose", lambda *_, **__: Choice("onnxruntime", "fp32", "fastest once"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "finish", lambda *_: None)
        assert cli("predict", folder, "-o", output)[0] == 1
    monkeypatch.setattr(api, "choose", lambda *_, **__: Choice("openvino", "fp32", "fastest now"))
    for options in (["--engine", "openvino"], ["--decode", "fast"]):
        code, _, err = cli("predict", folder, "-o", output, *options)
        assert code == 2
        assert "engine" in err
    code, _, err = cli("predict", folder, "-o", output)
    assert code == 1
    assert "Going on after" in err
    assert output.exists()


def test_other_weights_of_the_same_manifest_never_go_on(cli, folder, tmp_path):
    model, output = tmp_path / "model.onnx", tmp_path / "labels.jsonl"
    network = onnx.load(embedded_file())
    onnx.save(network, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "finish", lambda *_: None)
        assert cli("predict", folder, "-m", model, "-o", output, *ENGINE)[0] == 1
    before = Path(f"{output}.part").read_bytes()
    bias = next(each for each in network.graph.initializer if each.dims == [10])
    bias.raw_data = bias.raw_data[::-1]
    onnx.save(network, model)
    code, _, err = cli("predict", folder, "-m", model, "-o", output, *ENGINE)
    assert code == 2
    assert "weights differ" in err
    assert Path(f"{output}.part").read_bytes() == before
    assert not output.exists()


def test_what_relative_names_and_copies_depend_on_is_asked_too(cli, folder, tmp_path, monkeypatch):
    for name in ("one", "other"):
        shutil.copytree(folder / "red", tmp_path / name / "pictures")
    output = tmp_path / "labels.jsonl"
    monkeypatch.chdir(tmp_path / "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "finish", lambda *_: None)
        assert cli("predict", "pictures", "-o", output, *ENGINE)[0] == 0
    code, _, err = cli("predict", "pictures", "-o", output, "--annotate", "copies", *ENGINE)
    assert (code, "annotate differ" in err) == (2, True)
    monkeypatch.chdir(tmp_path / "other")
    code, _, err = cli("predict", "pictures", "-o", output, *ENGINE)
    assert (code, "folder differ" in err) == (2, True)
    monkeypatch.chdir(tmp_path / "one")
    assert cli("predict", "pictures", "-o", output, *ENGINE)[0] == 0


class Late(http.server.BaseHTTPRequestHandler):
    """Answers a while after it is asked."""

    picture = b""

    def do_GET(self):
        time.sleep(0.5)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.picture)

    def log_message(self, *_):
        """Say nothing."""


@pytest.mark.parametrize("threads", [1, 8])  # many threads draw far ahead of what is fetched
def test_urls_are_fetched_while_others_are_waited_for(cli, folder, tmp_path, monkeypatch, threads):
    monkeypatch.delenv("EFFICIENTFORMER_OFFLINE")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Late, "picture", next(folder.rglob("*.png")).read_bytes())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Late) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_port}/{number}.png" for number in range(20)]
        start = time.monotonic()
        code, out, err = cli("predict", *urls, "--threads", threads, "--format", "json", *ENGINE)
        seconds = time.monotonic() - start
        server.shutdown()
    assert code == 0, err
    assert [json.loads(line)["path"] for line in out.splitlines()] == urls
    assert seconds < 7  # one after the other: 10


def test_threads_are_for_decoding_too(cli, folder, monkeypatch):
    given = []
    original = classifier_module.in_order

    def spy(*arguments, **options):
        given.append(options["workers"])
        return original(*arguments, **options)

    monkeypatch.setattr(classifier_module, "in_order", spy)
    cli("predict", folder / "red", "--threads", 1, *ENGINE)
    cli("predict", folder / "red", "--threads", 3, *ENGINE)
    assert given == [1, 3]


def test_inputs_that_changed_are_noticed(cli, tmp_path):
    root = tmp_path / "pictures"
    write_folders(root, per_class=3)
    pictures = sorted(path for path in root.rglob("*") if path.is_file())
    output = tmp_path / "labels.jsonl"
    assert cli("predict", root, "-o", output, *ENGINE)[0] == 0
    whole = output.read_text()
    question = {"efficientformer": journal_module.VERSION}
    # the journal of a run that was killed after two pictures, then the first picture vanished
    saved = {}

    class Spy(Journal):
        def finish(self, format_, top_k):
            saved["journal"] = self.path.read_text()
            super().finish(format_, top_k)

    output.unlink()
    journal_module.Journal, kept = Spy, journal_module.Journal
    try:
        assert cli("predict", root, "-o", output, *ENGINE)[0] == 0
    finally:
        journal_module.Journal = kept
    assert output.read_text() == whole
    assert question.items() <= json.loads(saved["journal"].splitlines()[0]).items()
    output.unlink()
    lines = saved["journal"].splitlines(keepends=True)
    Path(f"{output}.part").write_text("".join(lines[:3]))
    pictures[0].unlink()
    code, _, err = cli("predict", root, "-o", output, *ENGINE)
    assert code == 2
    assert "not those" in err
    assert not output.exists()


def test_a_journal_has_one_writer(tmp_path):
    pytest.importorskip("fcntl")
    output = tmp_path / "labels.jsonl"
    first = Journal(output, {"a": 1})
    with pytest.raises(UsageError, match="Another process"):
        Journal(output, {"a": 1})
    first.close()
    Journal(output, {"a": 1}).close()


def test_a_journal_that_another_process_makes_in_between_is_left_as_it_is(tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    first = Journal(tmp_path / "labels.jsonl", {"a": 1})
    first.write({"path": "a.jpg", "error": "x"})
    before = first.path.read_bytes()
    monkeypatch.setattr(Path, "lstat", Mock(side_effect=FileNotFoundError))  # what there was a moment before
    with pytest.raises(UsageError, match="Another process"):
        Journal(tmp_path / "labels.jsonl", {"a": 1})
    assert first.path.read_bytes() == before
    first.close()


def test_a_journal_that_is_finished_in_between_is_not_written_to(tmp_path, monkeypatch):
    def late(file):
        monkeypatch.undo()
        Path(tmp_path / "labels.jsonl.part").unlink()
        return lock(file)

    lock = journal_module.try_lock
    monkeypatch.setattr(journal_module, "try_lock", late)
    Journal(tmp_path / "labels.jsonl", {"a": 1}).close()
    assert (tmp_path / "labels.jsonl.part").read_bytes()


def test_a_name_that_leaves_no_room_for_the_journals_is_refused(tmp_path):
    with pytest.raises(UsageError, match="Cannot write"):
        Journal(tmp_path / ("x" * 252), {"a": 1})


def test_where_there_are_no_locks_a_journal_is_closed_before_it_is_removed(tmp_path, monkeypatch):
    """Windows refuses to remove an open file."""
    unlink = Path.unlink

    def as_windows(path, **options):
        assert journal._file.closed or path != journal.path
        unlink(path, **options)

    monkeypatch.setattr(journal_module, "try_lock", lambda _: None)
    monkeypatch.setattr(Path, "unlink", as_windows)
    journal = Journal(tmp_path / "labels.jsonl", {"a": 1})
    journal.write({"path": "a.jpg", "error": "x"})
    journal.finish("json", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.jsonl"]


DIES = """
import os, sys
from pathlib import Path
from efficientformer.cli.annotate import Copy
from efficientformer.cli.app import main
save, write, killed = Copy.save, Path.write_bytes, sys.argv.pop(1)
def dies(copy):
    if copy.path.name != "x_label_2.jpg":
        return save(copy)
    if killed == "while":
        Path.write_bytes = lambda path, data: (write(path, data[:99]), os._exit(9))
    if killed != "before":
        save(copy)
    os._exit(9)
Copy.save = dies
main()
"""


@pytest.mark.parametrize("killed", ["before", "while", "after"])
def test_killed_around_a_copy_it_writes_each_copy_once_and_whole(cli, folder, tmp_path, killed):
    twins, output = [tmp_path / name / "x.png" for name in "abc"], tmp_path / "labels.jsonl"
    for twin in twins:
        twin.parent.mkdir()
        shutil.copy(folder / "red" / "000.png", twin)
    line = ["predict", *map(str, twins), "--annotate", str(tmp_path / "out"), "-o", str(output), *ENGINE]
    assert subprocess.run([sys.executable, "-c", DIES, killed, *line], timeout=60, check=False).returncode == 9
    assert cli(*line)[0] == 0
    copies = sorted((tmp_path / "out").glob("[!.]*"))
    assert [copy.name for copy in copies] == ["x_label.jpg", "x_label_2.jpg", "x_label_3.jpg"]
    assert len({copy.read_bytes() for copy in copies}) == 1
    assert [list(json.loads(line)) for line in output.read_text().splitlines()] == 3 * [RECORD]


def test_parquet_needs_a_file(cli, folder):
    code, _, err = cli("predict", folder, "-f", "parquet", *ENGINE)
    assert code == 2
    assert "--output" in err


def test_many_pictures_say_which_engine_runs_and_why(cli, folder, tmp_path):
    _, _, err = cli("predict", folder, "-o", tmp_path / "x.csv")
    assert "fastest here for one picture" in err
    _, _, err = cli("predict", folder, "-o", tmp_path / "y.csv", "--quiet")
    assert "fastest" not in err
