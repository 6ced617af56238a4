"""Results as they are shown and written: nothing that is known is lost, and what is shown does not pile up."""

import json
from unittest.mock import Mock

import pytest
from pyarrow import json as arrow_json

from efficientformer.cli.predict import _to_terminal
from efficientformer.cli.results import BLOCK, WRITERS, Result, TableWriter
from efficientformer.runtime.records import arrow_row
from efficientformer.spec.errors import UsageError


def result(number):
    return Result(f"{number}.jpg", None, "no picture", None)


@pytest.mark.parametrize("format_", ["table", "json", "csv"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_ends_a_run_loses_no_result(format_, error, capfd):
    def results():
        yield from map(result, range(3))
        raise error

    with pytest.raises(error):
        _to_terminal(results(), format_, 1)
    shown = capfd.readouterr().out
    assert all(f"{number}.jpg" in shown for number in range(3))


def test_a_table_is_shown_in_blocks_under_one_header(capfd):
    writer, shown = TableWriter(None, 1), ""
    for number in range(2 * BLOCK + 1):
        writer.write(result(number).record(1))
        assert len(writer._rows) < BLOCK
        if number == BLOCK:
            shown = capfd.readouterr().out
            assert len(shown.splitlines()) == 1 + BLOCK
    writer.close()
    rows = [line.split()[0] for line in (shown + capfd.readouterr().out).splitlines()]
    assert rows == ["picture", *(f"{number}.jpg" for number in range(2 * BLOCK + 1))]


@pytest.mark.parametrize("count", [0, BLOCK])
def test_a_table_has_its_header_once_whatever_it_holds(count, capfd):
    assert _to_terminal(map(result, range(count)), "table", 1) == (count, count)
    assert len(capfd.readouterr().out.splitlines()) == 1 + count


def test_a_progress_bar_makes_room_for_a_block(capfd, monkeypatch):
    writer = TableWriter(None, 1)
    monkeypatch.setattr(writer._file, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    writer.write(result(1).record(1))
    writer.close()
    assert capfd.readouterr().out.startswith("\r\x1b[2K")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_array_is_json_with_a_record_a_line(count, tmp_path):
    writer = WRITERS["array"](tmp_path / "x", 1)
    records = [{"path": f"{number}\udcff.jpg", "error": "x"} for number in range(count)]
    for record in records:
        writer.write(record)
    writer.close()
    assert json.loads((tmp_path / "x").read_text()) == [arrow_row(record) for record in records]
    assert len((tmp_path / "x").read_text().splitlines()) == (count + 2 if count else 1)


@pytest.mark.parametrize("format_", ["array", "json"])
def test_json_is_utf_8_for_every_reader(format_, tmp_path):
    writer = WRITERS[format_](tmp_path / "x", 1)
    writer.write({"path": "\udcff.jpg", "error": "no picture in '\udcff.jpg'"})
    writer.close()
    table = (
        arrow_json.read_json(tmp_path / "x").to_pylist()
        if format_ == "json"
        else json.loads((tmp_path / "x").read_text())
    )
    assert table == [{"path": "\\udcff.jpg", "error": "no picture in '\\udcff.jpg'"}]


@pytest.mark.parametrize("columns", ["20", "80"])
def test_a_table_that_goes_to_a_file_folds_no_name(columns, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", columns)
    writer, name = TableWriter(tmp_path / "x", 1), f"{'folder/' * 40}picture.jpg"
    writer.write({"path": name, "error": "no picture"})
    writer.close()
    assert (tmp_path / "x").read_text().splitlines()[1].split() == [name, "skipped"]


@pytest.mark.parametrize("format_", ["table", "csv"])
def test_names_of_classes_move_no_cursor(format_, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    name = "cat\x1b]0;title\x07\x1b[2J"
    prediction = Mock(label=1, score=0.9, top_k=lambda k: [(1, 0.9, name)])
    prediction.name = name
    _to_terminal(iter([Result("a.jpg", prediction, "", None)]), format_, 1)
    shown = capfd.readouterr().out
    assert "\x1b]" not in shown
    assert r"cat\x1b]0;title" in shown


@pytest.mark.parametrize("format_", ["csv", "parquet", "table", "array", "json"])
def test_names_of_classes_of_any_characters_are_written(format_, tmp_path):
    prediction = Mock(label=1, score=0.9, top_k=lambda k: [(1, 0.9, "a\ud800")])
    prediction.name = "a\ud800"
    writer = WRITERS[format_](tmp_path / "x", 1)
    writer.write(Result("a.jpg", prediction, "", None).record(1))
    writer.close()
    assert rb"a\ud800" in (tmp_path / "x").read_bytes().replace(rb"\\", b"\\")  # JSON doubles it


def test_a_closed_standard_output_is_told(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(UsageError, match="Standard output is closed"):
        WRITERS["csv"](None, 1)
