"""``efficientformer profile`` and ``latency-table`` as a user runs them, with tiny networks."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from efficientformer.cli.latency_table import _space
from efficientformer.export.deployable import embedded_file
from efficientformer.latency import profile
from efficientformer.latency.design import all_parts
from efficientformer.latency.graph import write_network
from efficientformer.latency.int8 import quantise
from efficientformer.latency.parts import parts_of
from efficientformer.latency.table import Cost, LatencyTable
from efficientformer.slimming.space import Space
from efficientformer.spec.arch import AttentionSpec
from efficientformer.spec.count import count_parts
from efficientformer.spec.variants import VARIANTS, v1_spec, v2_spec

SMALL = {
    "v1": v1_spec((8, 16, 16, 24), (1, 1, 1, 2), 1, input_size=32, num_classes=10, stem_stride=2),
    "v2": v2_spec((8, 16, 16, 24), ((2,), (2,), (2, 2), (2,)), 1, input_size=64, num_classes=5, stem_stride=2),
}


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    """No test here depends on how well latencies are known."""
    monkeypatch.setattr("efficientformer.latency.measure.LEAST_S", 0.01)
    monkeypatch.setattr(profile, "PASSES", 3)
    monkeypatch.setattr(profile, "time_engines", partial(profile.time_engines, min_passes=2, max_spread=10))
    monkeypatch.setattr(profile, "profile_file", partial(profile.profile_file, runs=60))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", ["v1", "v2", "int8", "embedded"])
def test_a_profile_names_every_part(cli, tmp_path, engine, kind):
    pytest.importorskip(engine)
    file = embedded_file() if kind == "embedded" else write_network(SMALL.get(kind, SMALL["v1"]), tmp_path / "n.onnx")
    if kind == "int8":
        quantise(file)
    code, out, err = cli("profile", file, "--engine", engine, "--threads", 1, "--json", "--quiet")
    assert code == 0, err
    found = json.loads(out)
    times = {part["name"]: part["ms"] for part in found["parts"]}
    from efficientformer.spec.arch import ArchSpec

    spec = ArchSpec.from_dict(found["spec"])
    expected = [part.name for part in count_parts(spec) if part.name != "head_dist"]
    assert [name for name in times if name != "other"] == expected
    blocks = [ms for name, ms in times.items() if "blocks" in name]
    assert all(ms > 0 for ms in blocks)
    assert times.get("other", 0) < 0.2 * sum(times.values())
    assert sum(part["share"] for part in found["parts"]) == pytest.approx(1)
    assert sum(kind["ms"] for kind in found["kinds"]) == pytest.approx(found["operators_ms"], abs=1e-3)


def test_operators_that_the_engine_cannot_time_are_counted_and_said(cli, tmp_path):
    """OpenVINO counts whole microseconds, rounded down: those of this network take less."""
    pytest.importorskip("openvino")
    file = write_network(SMALL["v1"], tmp_path / "n.onnx")
    options = ("--engine", "openvino", "--threads", 1, "--output", tmp_path / "p", "--quiet")
    code, out, err = cli("profile", file, *options)
    assert code == 0, err
    found = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert found["unseen"] == sum(operator["ms"] == 0 for operator in found["operators"]) > 0
    assert sum(kind["operators"] for kind in found["kinds"]) == len(found["operators"])
    assert not {kind["kind"] for kind in found["kinds"]} & {"Const", "Input", "Output"}
    said = f"{found['unseen']} of {len(found['operators'])} operators count as 0"
    assert said in out
    assert said in (tmp_path / "p" / "profile.html").read_text()


@pytest.fixture
def phone(tmp_path):
    """A table of a device that is not here, of all that the network below is made of."""
    costs = {part.key: Cost(0.01 * number, 0.001) for number, part in enumerate(parts_of(SMALL["v1"]), 1)}
    path = tmp_path / "phone.json"
    LatencyTable("openvino", "bf16", 4, "v1", SMALL["v1"].attention, Cost(0.5, 0.001), costs, {0.0: Cost(2.0, 0.0)},
                 spread=0.01, networks=9).save(path)  # fmt: skip
    return path


@pytest.mark.parametrize("kind", ["network.json", "network.onnx", "folder/model.onnx"])
def test_a_table_says_what_a_network_takes_elsewhere(cli, tmp_path, phone, kind):
    spec, file = SMALL["v1"], tmp_path / kind
    file.parent.mkdir(exist_ok=True)
    file.write_text(spec.to_json()) if file.suffix == ".json" else write_network(spec, file)
    file = file if file.parent == tmp_path else file.parent  # as quantize leaves it
    code, out, err = cli("profile", file, "--table", phone, "--json")
    assert code == 0, err
    found = json.loads(out)
    predicted = LatencyTable.load(phone).predict(spec)
    assert (found["ms"], found["error_ms"]) == (predicted.ms, predicted.error_ms)
    assert (found["engine"], found["precision"], found["origin"]) == ("openvino", "bf16", "from elsewhere")
    assert sum(share["ms"] for share in found["shares"]) == pytest.approx(predicted.ms)
    counts = {share["part"]: share["count"] for share in found["shares"]}
    assert counts.pop("base") == counts.pop("weights") == 1
    assert counts == Counter(part.key for part in parts_of(spec))
    code, out, _ = cli("profile", file, "--table", phone)
    assert f"latency {predicted.ms:.3f} ms, predicted within" in out
    assert all(key in out for key in counts)


def test_a_table_predicts_only_what_it_holds_and_takes_no_engine(cli, phone):
    code, _, err = cli("profile", "efficientformer_l1", "--table", phone)
    assert (code, "latency table" in err) == (2, True)
    code, _, err = cli("profile", "efficientformer_l1", "--table", phone, "--engine", "openvino")
    assert (code, "its own engine" in err) == (2, True)


def test_a_profile_is_shown_and_written(cli, tmp_path):
    options = ("--engine", "onnxruntime", "--threads", 1, "--output", tmp_path / "p")
    code, out, err = cli("profile", "efficientformer_cifar10", *options)
    assert code == 0, err
    assert "stages.1.blocks.0" in out
    assert "Conv" in out
    page = (tmp_path / "p" / "profile.html").read_text()
    assert "data:image/png" in page
    assert "stages.1.blocks.0" in page
    assert json.loads((tmp_path / "p" / "profile.json").read_text())["model"] == "efficientformer_cifar10"


def test_the_int8_file_of_a_network_is_profiled(cli):
    options = ("--engine", "onnxruntime", "--threads", 1, "--precision", "int8", "--json", "--quiet")
    code, out, err = cli("profile", "efficientformer_cifar10", *options)
    assert code == 0, err
    assert any("Quantize" in kind["kind"] or "QLinear" in kind["kind"] for kind in json.loads(out)["kinds"])


def test_a_name_is_printed_as_it_is(cli, tmp_path):
    file = write_network(SMALL["v1"], tmp_path / "n.onnx", name="x[/y] [old]")
    code, out, err = cli("profile", file, "--engine", "onnxruntime", "--threads", 1, "--quiet")
    assert code == 0, err
    assert "x[/y] [old]" in out


def test_what_has_no_weights_yet_is_profiled_with_random_ones(cli, tmp_path):
    spec = v2_spec((16, 16, 24, 32), ((2,), (2,), (2, 2), (2,)), 1, input_size=32, num_classes=3, stem_stride=1)
    (tmp_path / "start.json").write_text(spec.to_json())
    for arguments, blocks in (((tmp_path / "start.json",), 5), (("v2_s0", "--random-weights", "--offline"), 14)):
        code, out, err = cli("profile", *arguments, "--engine", "onnxruntime", "--threads", 1, "--json", "--quiet")
        assert code == 0, err
        found = json.loads(out)
        assert found["model"] == f"{Path(arguments[0]).name}, random weights"
        assert sum(".blocks." in part["name"] for part in found["parts"]) == blocks


def test_what_has_no_weights_yet_is_profiled_in_int8(cli, tmp_path):
    spec = v1_spec((16, 16, 16, 16), (0, 1, 0, 0), 0, input_size=32, num_classes=3, stem_stride=2)
    (tmp_path / "start.json").write_text(spec.to_json())
    options = ("--engine", "onnxruntime", "--threads", 1, "--precision", "int8", "--json", "--quiet")
    code, out, err = cli("profile", tmp_path / "start.json", *options)
    assert code == 0, err
    assert any("Quantize" in kind["kind"] or "QLinear" in kind["kind"] for kind in json.loads(out)["kinds"])


def test_the_four_observations(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("efficientformer.latency.observations.PICTURE", (64, 64))
    monkeypatch.setattr("efficientformer.latency.observations.MIN_PASSES", 1)
    monkeypatch.setattr("efficientformer.latency.observations.MAX_SPREAD", 1.0)
    monkeypatch.setattr("efficientformer.latency.observations.BLOCKS", 1)
    code, out, err = cli("profile", "--observations", "--engine", "onnxruntime", "--threads", 1, "-o", tmp_path / "o")
    assert code == 0, err
    assert out.count("paper  ") == 4
    found = json.loads((tmp_path / "o" / "observations.json").read_text())
    assert [len(each["variants"]) for each in found["observations"]] == [4, 5, 2, 3]
    assert all(each["verdict"] for each in found["observations"])
    page = (tmp_path / "o" / "observations.html").read_text()
    assert "hard-swish" in page
    assert "Half of the latencies repeat within" in page
    assert "Half of the latencies repeat within" in out
    assert all(each["reason"] in page for each in found["observations"])
    assert found["spread"] > 0
    assert found["busy"] is False


@pytest.mark.parametrize("name", ["efficientformer_l1", "efficientformerv2_s0"])
def test_a_table_like_a_network_covers_what_slimming_can_make_of_it(name):
    space = Space(VARIANTS[name])
    keys = {part.key for part in all_parts(_space(name, "", "", "", "", "", None))}
    assert {part.key for spec in space.covering() for part in parts_of(spec)} <= keys


def test_a_table_of_a_spec_in_a_file(cli, tmp_path):
    spec = v1_spec((8, 16, 16, 24), (1, 0, 1, 1), 1, input_size=32, num_classes=10, stem_stride=2)
    spec = type(spec).from_dict(spec.to_dict() | {"attention": {"num_heads": 2, "key_dim": 8}})
    (tmp_path / "spec.json").write_text(spec.to_json())
    arguments = ("--like", tmp_path / "spec.json", "--engine", "onnxruntime", "--threads", 1, "--networks", 8)
    target = tmp_path / "table.json"
    code, out, err = cli("latency-table", *arguments, "--widths", "8:24:8", "--max-spread", 1, "--output", target)
    assert code == 0, err
    assert out.strip() == str(target)
    table = LatencyTable.load(target)
    assert table.predict(spec).ms > 0
    assert table.attention == AttentionSpec(2, 8)
    code, _, err = cli("latency-table", *arguments, "--output", target)
    assert code == 2
    assert "exists" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("profile",), "Nothing to profile"),
        (("profile", "x", "--observations"), "Too much"),
        (("profile", "no_such_network"), "no_such_network"),
        (("profile", "no_such_network", "--random-weights"), "no_such_network"),
        (("profile", "none.json"), "Cannot read the spec"),
        (("profile", "L1", "--random-weights", "--checkpoint", "x.pth"), "Leave one out"),
        (("profile", "--observations", "--precision", "int8"), "float graphs"),
        (("profile", "--observations", "--random-weights"), "Leave --random-weights out"),
        (("profile", "efficientformer_cifar10", "--engine", "tpu"), "Illegal engine"),
        (("latency-table", "-o", "t.json", "--widths", "a"), "--widths"),
        (("latency-table", "-o", "t.json", "--widths", "1:2"), "--widths"),
        (("latency-table", "-o", "t.json", "--input-size", "32x32x32"), "--input-size"),
        (("latency-table", "-o", "nowhere/t.json"), "nowhere"),
        (("latency-table", "-o", "t.json", "--like", "absent.json"), "absent.json"),
    ],
)
def test_wrong_usage(cli, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = cli(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_a_folder_that_cannot_be_written_is_found_before_measuring(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    code, _, err = cli("latency-table", "--output", tmp_path / "table.json")
    assert code == 2
    assert "no writable folder to put it in" in err


def test_a_file_of_another_graph_is_refused(cli, tmp_path):
    import onnx

    path = write_network(SMALL["v1"], tmp_path / "net.onnx")
    proto = onnx.load(path)
    gelu = next(node for node in proto.graph.node if node.op_type == "Gelu")
    gelu.op_type = "Relu"
    del gelu.attribute[:]
    onnx.save(proto, path)
    code, _, err = cli("profile", path, "--engine", "onnxruntime")
    assert code == 1
    assert "other operators" in err
