"""``efficientformer predict`` as a user runs it."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.csv
import pytest
from PIL import Image
from pyarrow import parquet

from efficientformer import Classifier, Failed, inference_model
from efficientformer.cli import annotate as annotate_module
from efficientformer.spec.errors import ImageError
from tests.unit.test_engines import break_import

EXAMPLES = Path(__file__).parents[2] / "examples"
PHOTOS = sorted(EXAMPLES.glob("*.jpg"))


@pytest.fixture
def photo(tmp_path):
    return Path(shutil.copy(EXAMPLES / "cat.jpg", tmp_path / "my cat.jpg"))


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


def test_standard_input_may_be_closed(cli, monkeypatch, photo):
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = cli("predict", photo)
    assert code == 0, err
    code, _, err = cli("predict", "-")
    assert code == 1
    assert "no standard input" in err


def test_the_examples_are_classified_rightly(cli):
    """Each example is named after the class it shows: cat.jpg, bird2.jpg ..."""
    code, out, err = cli("predict", EXAMPLES, "--format", "json")
    assert code == 0
    assert len(PHOTOS) >= 5
    found = {Path(line["path"]).stem: line["pred_class"] for line in lines(out)}
    assert found == {path.stem: path.stem.rstrip("0123456789") for path in PHOTOS}
    assert "efficientformer_cifar10" in err
    assert "efficientformer_l1" in err


def test_a_damaged_onnx_runtime_leaves_few_pictures_to_openvino(cli, photo, tmp_path, monkeypatch):
    break_import(monkeypatch, tmp_path, "onnxruntime")
    code, out, err = cli("predict", photo, "--format", "json")
    assert code == 0, err
    assert json.loads(out)["pred_class"] == "cat"
    assert "onnxruntime is installed, its import fails" in err


def test_table_names_every_picture_and_its_class(cli):
    code, out, _ = cli("predict", EXAMPLES)
    assert code == 0
    for path in PHOTOS:
        row = next(line for line in out.splitlines() if path.name in line)
        assert path.stem.rstrip("0123456789") in row
        assert "%" in row


def test_json_line_has_the_promised_fields(cli, photo):
    _, out, _ = cli("predict", photo, "-f", "json", "--top-k", "2", "-q")
    (line,) = lines(out)
    assert list(line) == ["path", "pred_label", "pred_score", "pred_class", "top_k"]
    assert line["path"] == str(photo)
    assert line["top_k"][0]["class"] == line["pred_class"] == "cat"
    assert len(line["top_k"]) == 2
    assert line["top_k"][0]["score"] >= line["top_k"][1]["score"]


def test_csv_has_a_row_per_picture(cli, photo, tmp_path):
    (tmp_path / "bad, name.png").write_bytes(b"no picture")
    code, out, _ = cli("predict", tmp_path, "-f", "csv", "-k", "2")
    assert code == 1
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [Path(row["path"]).name for row in rows] == ["bad, name.png", "my cat.jpg"]
    assert rows[0]["error"]
    assert not rows[0]["pred_class"]
    assert rows[1]["pred_class"] == "cat"
    assert float(rows[1]["pred_score"]) > float(rows[1]["score_2"])


@pytest.mark.parametrize("name", ["a\u202fb.png", "a\u00a0b.png", "a\u200db.png", "a\nb.png", "a\rb.png", 'a", "b.png'])
def test_names_in_data_files_are_those_of_files(cli, tmp_path, name):
    (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"no picture")
    assert cli("predict", tmp_path, "-o", tmp_path / "labels.parquet")[0] == 1
    assert cli("predict", tmp_path, "-o", tmp_path / "labels.csv")[0] == 1
    expected = [str(tmp_path / name), f"{tmp_path}/\\udcff.png"]
    with (tmp_path / "labels.csv").open(encoding="utf-8", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == expected
    assert parquet.read_table(tmp_path / "labels.parquet")["path"].to_pylist() == expected
    assert cli("predict", tmp_path, "-o", tmp_path / "labels.json")[0] == 1
    assert [row["path"] for row in json.loads((tmp_path / "labels.json").read_text())] == expected


def test_csv_is_a_rectangle_however_many_classes_are_asked_for(cli, photo, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    target = tmp_path / "labels.csv"
    assert cli("predict", tmp_path, "-o", target, "-k", "99")[0] == 1
    table = pyarrow.csv.read_csv(target)
    assert table.num_rows == 2
    assert table.column_names[-1] == "class_10"
    assert table["class_10"].to_pylist()[1]


def test_bad_inputs_are_named_and_the_rest_goes_on(cli, photo, tmp_path):
    files = {"empty.jpg": b"", "text.png": b"hello", "cut.jpg": photo.read_bytes()[:5000]}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    inputs = [*(tmp_path / name for name in files), tmp_path / "folder", tmp_path / "missing.jpg", photo, "/dev/zero"]
    code, out, err = cli("predict", *inputs, "-f", "json")
    assert code == 1
    results = {line["path"]: line for line in lines(out)}
    assert [path for path, line in results.items() if "pred_class" in line] == [str(photo)]
    for path, line in results.items():
        if "error" in line:
            assert f"skipped {path}" in err
    assert "Inputs skipped: 6 of 7" in err
    assert "Traceback" not in err


def test_globs_and_standard_input(cli, photo, tmp_path, monkeypatch):
    _, out, _ = cli("predict", f"{tmp_path}/*.jpg", "-f", "json")
    assert [line["pred_class"] for line in lines(out)] == ["cat"]

    class Stdin:
        buffer = io.BytesIO(photo.read_bytes())

    monkeypatch.setattr(sys, "stdin", Stdin)
    _, out, _ = cli("predict", "-", "-f", "json")
    assert lines(out)[0]["path"] == "-"
    assert lines(out)[0]["pred_class"] == "cat"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "INPUT"),
        (("x.jpg", "--format", "xml"), "xml"),
        (("x.jpg", "--top-k", "0"), "top-k"),
        (("x.jpg", "--engine", "tensorrt"), "onnxruntime"),
        (("x.jpg", "--model", "resnet50"), "efficientformer_l1"),
        (("x.jpg", "--output", "/nowhere/at/all.json"), "Cannot write"),
        (("x.jpg", "--nonsense"), "nonsense"),
        (("x.jpg", "--output", "labels.tsv"), ".json, .jsonl, .ndjson, .csv, .parquet, .txt"),
        (("x.jpg", "--output", "-"), "standard output"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_right(cli, arguments, says):
    code, _, err = cli("predict", *arguments)
    assert code == 2
    assert says in err
    assert "Traceback" not in err


def test_output_file_is_written_whole(cli, photo, tmp_path):
    target = tmp_path / "labels.jsonl"
    code, out, _ = cli("predict", photo, "-f", "json", "-o", target)
    assert (code, out) == (0, "")
    assert lines(target.read_text())[0]["pred_class"] == "cat"
    before = target.read_text()
    code, _, _ = cli("predict", photo, "-o", target, "--model", tmp_path / "missing.onnx")
    assert code == 1
    assert target.read_text() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


def test_the_ending_says_the_format_and_the_option_beats_it(cli, photo, tmp_path):
    assert cli("predict", photo, "-o", tmp_path / "labels.ndjson")[0] == 0
    assert lines((tmp_path / "labels.ndjson").read_text())[0]["pred_class"] == "cat"
    assert cli("predict", photo, "-o", tmp_path / "labels.tsv", "-f", "csv")[0] == 0
    assert (tmp_path / "labels.tsv").read_text().startswith("path,error")


@pytest.mark.parametrize("options", [(), ("-f", "json")])
def test_a_file_named_json_is_one_array(cli, photo, tmp_path, options):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    target = tmp_path / "labels.JSON"
    assert cli("predict", tmp_path, "-o", target, *options)[0] == 1
    bad, good = json.loads(target.read_text())
    assert "error" in bad
    assert good["pred_class"] == "cat"
    assert len(target.read_text().splitlines()) == 4


@pytest.mark.parametrize("format_", ["json", "csv"])  # written at once, and as the command ends
def test_a_full_disk_is_one_error_line(photo, format_):
    command = [sys.executable, "-m", "efficientformer", "predict", photo, "-q", "-f", format_]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "error: Cannot write the output: No space left on device\n"


def test_a_library_that_is_missing_is_said_before_any_picture(cli, photo, tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    code, _, err = cli("predict", photo, "-o", tmp_path / "labels.parquet")
    assert code == 1, err
    assert "Writing Parquet needs the extra" in err
    assert not list(tmp_path.glob("labels.parquet*"))


def test_weights_may_be_at_an_address(cli, photo):
    address = "https://example.org/l1.pth"
    code, _, err = cli("predict", photo, "--model", "l1", "--checkpoint", address, "--offline")
    assert code == 1
    assert f"put a file there by hand, save any of these under the name given:\n  {address}\n" in err


def test_a_file_that_may_not_be_read_is_one_error_line(cli, photo, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "/closed/labels.json")

    monkeypatch.setattr("efficientformer.cli.results.output_file", refuse)
    code, _, err = cli("predict", photo, "-o", "/closed/labels.json")
    assert (code, err) == (1, "error: Cannot access /closed/labels.json: Permission denied\n")


def test_an_output_that_is_no_file_is_spared(cli, photo, tmp_path):
    pipe, link = tmp_path / "pipe.json", tmp_path / "link.json"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for output in (pipe, link, tmp_path):
        code, _, err = cli("predict", photo, "-o", output, "-f", "json")
        assert code == 2
        assert f"error: Cannot write {output}; expected a regular file; found a folder, pipe or device." in err
    assert pipe.is_fifo()
    assert link.is_symlink()


def test_an_output_that_is_a_link_stays_one_and_files_have_the_permissions_of_the_umask(cli, photo, tmp_path):
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "labels.json", tmp_path / "there" / "real.json"
    link.symlink_to(target)
    before = os.umask(0o027)
    try:
        assert cli("predict", photo, "-o", link, "--annotate", tmp_path / "out")[0] == 0
    finally:
        os.umask(before)
    assert link.readlink() == target
    assert json.loads(target.read_text())[0]["pred_class"] == "cat"
    for path in (target, next((tmp_path / "out").iterdir())):
        assert path.stat().st_mode & 0o777 == 0o640


def test_annotated_copies(cli, photo, tmp_path):
    twin = tmp_path / "sub" / photo.name
    twin.parent.mkdir()
    shutil.copy(photo, twin)
    code, _, _ = cli("predict", photo, twin, "--annotate", tmp_path / "out")
    assert code == 0
    copies = sorted((tmp_path / "out").iterdir())
    assert [copy.name for copy in copies] == ["my cat_label.jpg", "my cat_label_2.jpg"]
    with pytest.MonkeyPatch.context() as patch:  # as where there are no links
        patch.setattr(Path, "hardlink_to", Mock(side_effect=PermissionError))
        assert cli("predict", photo, "--annotate", tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert (tmp_path / "out" / "my cat_label_3.jpg").read_bytes() == copies[0].read_bytes()
    with Image.open(photo) as original, Image.open(copies[0]) as copy:
        assert copy.width == original.width
        assert copy.height > original.height
        bar = np.asarray(copy)[original.height + 2 :]
        assert bar.max() > 200  # something is written in the dark bar


def test_copies_are_never_inputs(cli, photo, tmp_path):
    copies = tmp_path / "z"  # listed after the pictures, when copies lie in it
    for again in (1, 2):
        code, out, _ = cli("predict", tmp_path, "--annotate", copies, "-f", "json")
        assert code == 0
        assert [line["path"] for line in lines(out)] == [str(photo)]
        assert len(list(copies.iterdir())) == again


def test_standard_input_is_annotated(cli, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(photo.read_bytes())}))
    assert cli("predict", "-", "--annotate", tmp_path / "out")[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["stdin_label.jpg"]


def test_a_copy_that_cannot_be_drawn_is_an_error_of_its_picture(cli, photo, tmp_path, monkeypatch):
    original = annotate_module.decode

    def vanished(data, **options):
        if options["name"] == str(photo):
            raise ImageError("Cannot read it", found="it is gone")
        return original(data, **options)

    monkeypatch.setattr(annotate_module, "decode", vanished)
    code, out, err = cli("predict", photo, PHOTOS[0], "--annotate", tmp_path / "out", "-f", "json")
    assert code == 1
    assert [line.get("error", "") for line in lines(out)] == ["Cannot read it; found it is gone.", ""]
    assert f"skipped {photo}" in err


def test_a_folder_that_takes_no_copies(cli, photo):
    code, _, err = cli("predict", photo, "--annotate", "/proc/self")
    assert code == 2
    assert "Cannot write pictures into /proc/self" in err


@pytest.mark.parametrize("options", [("--offline",), ()])
def test_offline_a_url_is_an_error_line(cli, photo, monkeypatch, options):
    if options:
        monkeypatch.delenv("EFFICIENTFORMER_OFFLINE")
    code, out, err = cli("predict", photo, "http://127.0.0.1:1/cat.jpg", "-f", "json", *options)
    assert code == 1
    assert "pred_class" in lines(out)[0]
    assert "expected a file while" in lines(out)[1]["error"]
    assert "Inputs skipped: 1 of 2" in err


def test_a_name_with_markup_or_strange_bytes_is_printed_plainly(cli, photo, tmp_path):
    odd = tmp_path / "[bold]x\x1b[31m.jpg"
    shutil.copy(photo, odd)
    code, out, _ = cli("predict", odd)
    assert code == 0
    assert "[bold]x\\x1b[31m.jpg" in out
    assert "\x1b[31m" not in out
    odd = tmp_path / "x\b.jpg"
    odd.write_bytes(b"no picture")
    _, _, err = cli("predict", odd)
    assert "\\x08" in err
    assert "\b" not in err
    _, _, err = cli("predict", photo, "-o", tmp_path / "x\b")
    assert "\\x08" in err
    assert "\b" not in err


def test_python_interface_agrees_with_the_command(cli, photo):
    _, out, _ = cli("predict", photo, "-f", "json")
    (line,) = lines(out)
    classify = Classifier(engine="onnxruntime")  # what the command takes for a few pictures
    with Image.open(photo) as image:
        for source in (photo, str(photo), photo.read_bytes(), image, np.asarray(image)):
            prediction = classify(source)
            assert prediction.name == line["pred_class"]
            assert prediction.score == pytest.approx(line["pred_score"], abs=1e-6)
    result = inference_model("efficientformer_cifar10", photo)
    assert set(result) == {"pred_label", "pred_score", "pred_class", "pred_scores"}
    assert result["pred_scores"].shape == (10,)
    assert result["pred_scores"].sum() == pytest.approx(1, abs=1e-5)
    assert result["pred_scores"].argmax() == result["pred_label"] == line["pred_label"]


def test_batches_give_what_single_pictures_give(photo):
    classify = Classifier(engine="onnxruntime")
    outcomes = list(classify.predict([*PHOTOS, b"broken", *PHOTOS], batch_size=4))
    assert isinstance(outcomes[len(PHOTOS)], Failed)
    del outcomes[len(PHOTOS)]
    for path, outcome in zip([*PHOTOS, *PHOTOS], outcomes, strict=True):
        np.testing.assert_allclose(outcome.scores, classify(path).scores, atol=1e-6)
