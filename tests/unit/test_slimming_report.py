"""What a slimming run's report draws, and what it reads for it."""

import dataclasses
import json
from pathlib import Path

import pytest

from efficientformer.cli.slim import _line
from efficientformer.latency.table import Cost, LatencyTable
from efficientformer.reporting.page import Page, png
from efficientformer.slimming.device import Measured
from efficientformer.slimming.report import (
    Comparison,
    Finished,
    _add_speed,
    _add_use,
    _importances,
    _summary,
    draw_path,
    path_rows,
    read_comparisons,
)
from efficientformer.slimming.search import Step
from efficientformer.spec.arch import AttentionSpec
from efficientformer.spec.errors import SpecError, UsageError
from tests.unit.test_slimming_search import SPACE

STEP = Step(0, "start", SPACE.largest, 1.0, 0.1, 90.0)


def axis(measured, network):
    axes = draw_path([STEP], measured, [network], [], "engine").axes[0]
    return axes.get_xlabel(), axes.get_lines()[0].get_label()


def test_the_axis_says_what_was_measured():
    """Networks that were finished where the engine is may have a path that was not measured."""
    network = Finished(0.9, STEP, Path("x"), 91.0, Measured(0.8, 0.8))
    predicted = dataclasses.replace(network, measured=None)
    assert axis([Measured(1.0, 1.0)], network) == (
        "latency of one picture, engine (ms)",
        "path, inherited weights (held out)",
    )
    label = "path, predicted, inherited weights (held out)"
    assert axis([None], network) == ("latency of one picture, engine (ms)", label)
    assert axis([None], predicted) == ("predicted latency of one picture, engine (ms)", label)


@pytest.mark.parametrize(("measured", "quiet", "share"), [(2.0, 0.8, "40%"), (None, 0.8, "50%"), (2.0, None, "50%")])
def test_a_measured_latency_is_compared_with_a_measured_one(tmp_path, measured, quiet, share):
    page, half = Page("Slimming"), dataclasses.replace(STEP, predicted_ms=0.5)
    start, found = (None if ms is None else Measured(ms, ms) for ms in (measured, quiet))
    _summary(page, [STEP], [start], [Finished(0.9, half, Path("x"), 91.0, found)])
    page.write(tmp_path / "page.html")
    assert share in (tmp_path / "page.html").read_text()


def test_what_was_not_measured_is_null():
    rows = path_rows([STEP, STEP], [None, Measured(1.2, 1.0)])
    assert [(row["measured_ms"], row["quiet_ms"]) for row in rows] == [(None, None), (1.2, 1.0)]


def drawn(comparisons):
    network = Finished(0.9, STEP, Path("x"), 91.0, Measured(0.9, 0.8))
    figure = draw_path([STEP], [Measured(1.1, 1.0)], [network], comparisons, "engine")
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}


def test_networks_named_by_numbers_are_drawn_as_one_kind():
    others = [Comparison("random 1", 1.0, 80.0), Comparison("by hand", 2.0, 85.0), Comparison("random 2", 1.5, 82.0)]
    lines = drawn(others)
    assert lines["random (2)"] == [[1.0, 80.0], [1.5, 82.0]]
    assert lines["by hand"] == [[2.0, 85.0]]


def test_names_are_no_formulas(tmp_path):
    path = tmp_path / "comparisons.json"
    path.write_text('[{"name": "a $b_{ \\udc80 $", "latency_ms": 1, "top1": 1}]')
    figure = draw_path([STEP], [None], [], read_comparisons(path), "engine")
    assert png(figure)


@pytest.mark.parametrize("text", ['{"paths": 3}', '{"paths": [["much"]]}', "[]", "{}", '{"paths": [[1]]}'])
def test_damaged_importances_are_refused(tmp_path, text):
    (tmp_path / "importances.json").write_text(text)
    with pytest.raises(SpecError, match=r"importances\.json"):
        _importances(tmp_path, STEP)


def test_a_busy_machine_is_taken_off_what_is_drawn():
    assert drawn([])["slimmed, trained"] == [[0.8, 91.0]]


@pytest.mark.parametrize(
    "entries", [[{"name": "x"}], [{"name": "x", "latency_ms": "fast", "top1": 1}], ["x"], {"name": "x"}]
)
def test_comparisons_that_are_none_are_refused(tmp_path, entries):
    path = tmp_path / "comparisons.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(SpecError):
        read_comparisons(path)


def test_a_budget_that_is_not_held_is_said():
    network = Finished(0.9, STEP, Path("x"), 91.0, Measured(1.0, 0.95))
    assert _line(network, "") == (
        "0.9 ms: top-1 91.00 %, predicted 1.000 ms, measured 1.000 ms, 0.950 at the table's speed; budget NOT held; "
        "--resume measures again, on a quieter machine perhaps"
    )
    quiet = dataclasses.replace(network, measured=Measured(0.8, 0.8))
    assert _line(quiet, "").endswith("measured 0.800 ms; budget held")
    line = _line(dataclasses.replace(network, measured=None), "a phone, 2026-11-29")
    assert line.endswith("not measured: the table is from elsewhere (a phone, 2026-11-29)")


def test_a_budget_missed_by_far_is_never_held():
    """However slow the start network was beside it: the table may be wrong."""
    assert Finished(0.9, STEP, Path("x"), 91.0, Measured(2.5, 0.8)).holds is False
    assert Finished(0.9, STEP, Path("x"), 91.0, Measured(0.85, 0.3)).holds


def speed(tmp_path, start, network):
    page = Page("Slimming")
    _add_speed(page, STEP, [start], [Finished(0.9, STEP, Path("x"), 91.0, network)])
    page.write(tmp_path / "page.html")
    return (tmp_path / "page.html").read_text()


def test_a_machine_slower_than_its_table_is_said(tmp_path):
    scaled, plain, slow = Measured(1.1, 1.0), Measured(1.0, 1.0), Measured(2.0, 1.0)
    for start, network in ((scaled, plain), (plain, scaled)):
        assert "machine was busy" in speed(tmp_path, start, network)
    assert "machine was busy" not in speed(tmp_path, plain, plain)
    assert "table may be wrong" not in speed(tmp_path, plain, scaled)
    assert "takes 2.000 ms here, and 1.000 by the table" in speed(tmp_path, slow, plain)


def test_a_folder_in_the_place_of_comparisons_is_refused(tmp_path):
    (tmp_path / "comparisons.json").mkdir()
    with pytest.raises(UsageError, match=r"Cannot read .*comparisons\.json"):
        read_comparisons(tmp_path / "comparisons.json")


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_what_to_do_with_it_is_what_the_budget_was_for(tmp_path, precision):
    table = LatencyTable(
        "openvino", precision, 1, "v1", AttentionSpec(), Cost(1, 0), {"mb4d 8 x4 at 4x4": Cost(1, 0)}, {}, 0.01, 9
    )
    page = Page("Slimming")
    _add_use(page, [Finished(0.5, STEP, Path("run/x.safetensors"), 91.0)], table, low=0.39)
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert f"--engine openvino --precision {precision} --threads 1" in text
    assert "--target-latency 0.4ms" in text
    assert ("x.safetensors --data DIR --output slimmed-int8" in text) == (precision == "int8")
    assert ("efficientformer quantize" in text) == ("not quantised yet" in text) == (precision == "int8")


def test_no_budget_is_suggested_that_would_be_refused(tmp_path):
    costs = {"mb4d 8 x4 at 4x4": Cost(1, 0)}
    table = LatencyTable("openvino", "fp32", None, "v1", AttentionSpec(), Cost(1, 0), costs, {}, 0.01, 9)
    page = Page("Slimming")
    _add_use(page, [Finished(0.5, STEP, Path("run/x.safetensors"), 91.0)], table, low=0.41)
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "efficientformer convert" in text
    assert "--target-latency" not in text
    assert "--threads" not in text


def test_a_network_is_short_in_print():
    assert len(repr(Finished(0.9, STEP, Path("x"), 91.0))) < 200
