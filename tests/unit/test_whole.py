"""Files that are there whole or not at all."""

import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from efficientformer.spec import whole
from efficientformer.spec.whole import half_written, hidden_file, whole_file, write_text


def test_a_file_gets_its_name_when_all_is_written(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("before")
    with whole_file(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_what_breaks_off_leaves_nothing(tmp_path, stop):
    with pytest.raises(stop), whole_file(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise stop
    with hidden_file(tmp_path / "b.json"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "a.json"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_a_folder_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(IsADirectoryError), whole_file(tmp_path):
        pytest.fail("the block must not begin")


def test_a_name_as_long_as_file_systems_allow(tmp_path):
    path = tmp_path / ("猫" * 83 + ".json")  # 254 bytes
    write_text(path, "all")
    assert path.read_text() == "all"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_leaves_is_known_by_its_name(tmp_path):
    with hidden_file(tmp_path / "a.json") as temporary:
        assert half_written(temporary)
    assert not half_written(tmp_path / ".a.json.partial")


def test_a_text_replaces_an_earlier_one_when_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half" + "\udce9")
    assert path.read_text() == "before"
    (tmp_path / "link.json").symlink_to(path)
    write_text(tmp_path / "link.json", "after")
    assert (path.read_text(), (tmp_path / "link.json").is_symlink()) == ("after", True)
    monkeypatch.setattr("os.access", lambda at, mode: at != tmp_path)  # for root too, who may run the tests
    monkeypatch.setattr(whole, "hidden_file", Mock(side_effect=PermissionError))
    write_text(path, "in place")
    assert path.read_text() == "in place"
    read, write = os.pipe()
    write_text(Path(f"/dev/fd/{write}"), "as it is")
    assert os.read(read, 100) == b"as it is"
    os.close(read)
    os.close(write)
