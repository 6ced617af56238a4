"""Files that are there whole or not at all."""

import os

import pytest

from efficientformer.spec.whole import hidden_file, whole_file


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
