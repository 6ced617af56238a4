"""``efficientformer data check`` as a user runs it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    Image.fromarray(small).resize((40, 40), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def good(tmp_path):
    root = tmp_path / "data set"
    for seed in range(12):
        picture(root / ("train" if seed < 8 else "val") / ("cat" if seed % 2 else "dog") / f"{seed}.png", seed)
    return root


@pytest.fixture
def bad(good):
    shutil.copy(good / "train/cat/1.png", good / "val/dog/leak.png")
    (good / "train/dog/torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    return good


def test_a_good_data_set(cli, good):
    code, out, err = cli("data", "check", good)
    assert code == 0, err
    assert "12 pictures" in out
    assert "Nothing is wrong." in out
    assert cli("data", "check", good, "--quiet") == (0, "", "")


def test_a_bad_data_set(cli, bad):
    code, out, _ = cli("data", "check", bad)
    assert code == 1
    assert "train/dog/torn.jpg: " in out
    assert "LEAK, CONTRADICTION [bytes] train/cat/1.png (cat) = val/dog/leak.png (dog)" in out
    code, quiet, _ = cli("data", "check", bad, "--quiet")
    assert code == 1
    assert "torn.jpg" in quiet
    assert "Something is wrong" not in quiet


def test_json(cli, bad):
    code, out, _ = cli("data", "check", bad, "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["pictures"], len(found["corrupt"])) == (1, False, 14, 1)


def test_no_near(cli, good):
    Image.open(good / "train/cat/1.png").save(good / "val/cat/alike.jpg", quality=90)
    assert cli("data", "check", good)[0] == 1
    assert cli("data", "check", good, "--no-near")[0] == 0


def test_report(cli, bad, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "check.html"
    code, out, err = cli("data", "check", bad, "--report", page)
    assert code == 1
    assert "Something is wrong" in out
    assert str(page) in err
    text = page.read_text()
    assert "LEAK, CONTRADICTION (same file, 2 pictures)" in text
    assert "train/dog/torn.jpg" in text
    assert text.count("data:image/png") == 3  # the pair, and the classes of two parts
    assert "<script" not in text


def test_names_are_escaped_in_the_report_and_on_the_terminal(cli, good, tmp_path):
    pytest.importorskip("matplotlib")
    name = "<b>$x$ \x1b[31m.png"
    (good / "train/cat" / name).write_bytes(b"")
    (good / "train/<i>$a$").mkdir()
    shutil.copy(good / "train/cat/1.png", good / "train/<i>$a$/[bold].png")
    _, out, _ = cli("data", "check", good, "--report", tmp_path / "check.html")
    text = (tmp_path / "check.html").read_text()
    assert "&lt;b&gt;" in text
    assert "<b>$x$" not in text
    assert "\x1b" not in out
    assert "[bold].png" in out


def test_a_report_that_cannot_be_written_is_refused_before_the_data_set_is_read(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    code, out, err = cli("data", "check", tmp_path / "missing", "--report", tmp_path / "check.html")
    assert (code, out) == (2, "")
    assert f"Cannot write {tmp_path / 'check.html'}; expected a file in a writable folder" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing"], 2, "nothing there"),
        ([".", "--report", "no/such/folder/check.html"], 2, "a file in a writable folder"),
        ([], 2, "Missing argument 'DIR'"),
    ],
)
def test_wrong_usage(cli, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    found, out, err = cli("data", "check", *arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_page_that_cannot_be_written_does_not_cost_the_findings(cli, bad, options):
    code, out, err = cli("data", "check", bad, "--report", "/dev/full", *options)
    assert code == 2
    assert "No space left on device" in err
    assert "torn.jpg" in out


def test_a_class_whose_name_is_no_utf8_is_drawn(cli, good, tmp_path):
    for part in ("train", "val"):
        (good / part / "cat").rename(good / part / "caf\udce9")
    code, _, err = cli("data", "check", good, "--report", tmp_path / "page.html")
    assert code == 0, err
    assert "data:image/png" in (tmp_path / "page.html").read_text()  # the class is named in the plot
