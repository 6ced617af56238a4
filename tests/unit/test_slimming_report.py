"""What a slimming run's report draws, and what it reads for it."""

import dataclasses
import json
from pathlib import Path

import pytest

from efficientformer.cli.slim import _line
from efficientformer.latency.table import Cost, LatencyTable
from efficientformer.reporting.page import Page, png
from efficientformer.slimming.report import (
    Comparison,
    Finished,
    _add_use,
    _importances,
    draw_path,
    read_comparisons,
)
from efficientformer.slimming.search import Step
from efficientformer.spec.arch import AttentionSpec
from efficientformer.spec.errors import SpecError
from tests.unit.test_slimming_search import SPACE

STEP = Step(0, "start", SPACE.largest, 1.0, 0.1, 90.0)


def drawn(comparisons):
    network = Finished(0.9, STEP, Path("x"), 91.0, measured_ms=1.6, quiet_ms=0.8)
    figure = draw_path([STEP], [1.0], [network], comparisons, "engine")
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}


def test_networks_named_by_numbers_are_drawn_as_one_kind():
    others = [Comparison("random 1", 1.0, 80.0), Comparison("by hand", 2.0, 85.0), Comparison("random 2", 1.5, 82.0)]
    lines = drawn(others)
    assert lines["random (2)"] == [[1.0, 80.0], [1.5, 82.0]]
    assert lines["by hand"] == [[2.0, 85.0]]


def test_names_are_no_formulas(tmp_path):
    path = tmp_path / "comparisons.json"
    path.write_text('[{"name": "a $b_{ \\udc80 $", "latency_ms": 1, "top1": 1}]')
    figure = draw_path([STEP], [1.0], [], read_comparisons(path), "engine")
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
    network = Finished(0.9, STEP, Path("x"), 91.0, measured_ms=1.6, quiet_ms=0.95)
    assert _line(network) == (
        "0.9 ms: top-1 91.00 %, predicted 1.000 ms, measured 0.950 ms; budget NOT held; "
        "--resume measures again, on a quieter machine perhaps"
    )
    assert _line(dataclasses.replace(network, quiet_ms=0.8)).endswith("budget held")
    assert "not measured" in _line(dataclasses.replace(network, measured_ms=None, quiet_ms=None))


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_what_to_do_with_it_is_what_the_budget_was_for(tmp_path, precision):
    table = LatencyTable(
        "openvino", precision, 1, "v1", AttentionSpec(), Cost(1, 0), {"mb4d 8 x4 at 4x4": Cost(1, 0)}, {}, 0.01, 9
    )
    page = Page("Slimming")
    _add_use(page, [Finished(0.5, STEP, Path("run/x.safetensors"), 91.0)], table)
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert f"--engine openvino --precision {precision}" in text
    assert "--target-latency 0.4ms" in text
    assert ("x.safetensors --data DIR --output slimmed-int8" in text) == (precision == "int8")
    assert ("efficientformer quantize" in text) == ("not quantised yet" in text) == (precision == "int8")
