"""Prediction without torch: with torch blocked from import, everything a predicting user needs works."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

# Runs command lines, one after the other, with every module of the training side made unimportable.
BLOCKED = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
for name in ("torch", "torchvision", "timm", "onnx", "onnxscript"):
    sys.modules[name] = None
from efficientformer.cli.app import main
results = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, code = ["efficientformer", *arguments], 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    results.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(results))
"""


def run_without_torch(*lines):
    """Run command lines in a process that cannot import torch; return each one's exit code, output and errors."""
    command = [sys.executable, "-c", BLOCKED, json.dumps([[*map(str, line)] for line in lines])]
    env = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_of_every_verb():
    verbs = ("predict", "test", "list", "info", "convert", "download", "profile", "latency-table")
    for code, out, err in run_without_torch(*((verb, "--help") for verb in verbs)):
        assert code == 0, err
        assert "Usage" in out


def test_a_real_prediction():
    photo = sorted(EXAMPLES.glob("*.jpg"))[0]
    ((code, out, err),) = run_without_torch(("predict", photo, "--format", "json"))
    assert code == 0, err
    line = json.loads(out)
    assert line["path"] == str(photo)
    assert 0 < line["pred_score"] <= 1
    assert line["top_k"][0]["class"] == line["pred_class"]


def test_what_is_no_network_is_not_told_to_install_torch(tmp_path):
    (tmp_path / "empty.pth").touch()
    lines = [(verb, *rest) for name in (ROOT / "README.md", tmp_path / "empty.pth")
             for verb, rest in (("info", [name]), ("predict", [EXAMPLES, "--model", name]))]  # fmt: skip
    for code, out, err in run_without_torch(*lines):
        assert (code, out) == (1, "")
        assert "Not a weights file" in err or "The file is empty" in err
        assert "Building" not in err and "torch'" not in err


def test_a_folder_may_be_called_as_a_file(tmp_path):
    exported = ROOT / "src" / "efficientformer" / "assets" / "efficientformer_cifar10.onnx"
    (tmp_path / "net.onnx").mkdir()
    shutil.copy(exported, tmp_path / "net.onnx" / "model.onnx")
    lines = (("info", tmp_path / "net.onnx", "--json"), ("predict", EXAMPLES, "--model", tmp_path / "net.onnx"))
    assert [code for code, _, _ in run_without_torch(*lines)] == [0, 0]


def test_an_exported_file_is_measured(tmp_path):
    for photo in EXAMPLES.glob("*.jpg"):
        (tmp_path / photo.stem).mkdir()
        (tmp_path / photo.stem / photo.name).write_bytes(photo.read_bytes())
    exported = ROOT / "src" / "efficientformer" / "assets" / "efficientformer_cifar10.onnx"
    options = ("--data", tmp_path, "--json", "--report", tmp_path / "report.html")
    for code, out, err in run_without_torch(*(("test", model, *options) for model in (exported, exported.stem))):
        assert code == 0, err
        found = json.loads(out)
        assert found["images"] == 8
        assert found["engine"].endswith("(fp32)")
    assert "Worst" in (tmp_path / "report.html").read_text() or found["top1"] == 100


def test_list_and_info():
    assets = ROOT / "src" / "efficientformer" / "assets"
    files = [assets / f"efficientformer_cifar10{ending}" for ending in (".onnx", ".safetensors")]
    lines = (("list",), ("info", "L1", "--json"), *(("info", file, "--json") for file in files))
    (_, listed, _), (_, told, _), (_, exported, _), (code, _, err) = run_without_torch(*lines)
    assert "efficientformerv2_s0" in listed
    assert json.loads(told)["params"] == 12_289_928
    assert json.loads(exported)["provenance"]["source"] == "embedded"
    assert (code, "efficientformer[torch]" in err) == (1, True)


def test_what_needs_torch_names_the_extra():
    lines = [
        ("predict", "x.jpg", "--model", "l1"),
        ("convert", "l1", "out.onnx"),
        ("latency-table", "--like", "l1", "--output", "absent.json"),
    ]
    for line, (code, _, err) in zip(lines, run_without_torch(*lines), strict=True):
        assert code == 1, line
        assert "pip install 'efficientformer[torch]'" in err, line
        assert "Traceback" not in err


def test_importing_the_package_imports_no_library():
    code = "import sys, efficientformer; print([m for m in ('numpy', 'PIL', 'rich', 'torch') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
