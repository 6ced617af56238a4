"""The cache: where files lie, which are taken as they are, which are refused."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from efficientformer.spec.errors import UsageError
from efficientformer.weights import cache as room
from efficientformer.weights.cache import (
    Cache,
    CacheError,
    SourceFailedError,
    cache_root,
    check_file,
)
from efficientformer.weights.progress import silent, terminal_progress

BODY = bytes(range(256)) * 20
DIGEST = hashlib.sha256(BODY).hexdigest()


@dataclass(frozen=True)
class Source:
    sha256: str = ""
    name: str = "timm"
    url: str = "https://example.invalid/model.safetensors"
    filename: str = "model.safetensors"


def place(cache, source, body=BODY):
    """Put a file into the cache as a person would."""
    path = cache.path("l1", source)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    return path


@pytest.fixture
def hashed(monkeypatch):
    """Record every file that is read in full."""
    seen, real = [], room.sha256_of
    monkeypatch.setattr(room, "sha256_of", lambda path: seen.append(path.name) or real(path))
    return seen


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"EFFICIENTFORMER_HOME": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"EFFICIENTFORMER_HOME": "", "XDG_CACHE_HOME": "/b"}, "/b/efficientformer"),
        ({"EFFICIENTFORMER_HOME": "~/x"}, "/home/me/x"),
        ({}, "/home/me/.cache/efficientformer"),
    ],
)
def test_the_root_follows_the_environment(variables, expected, monkeypatch):
    for name in ("EFFICIENTFORMER_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"HOME": "/home/me"}).items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(expected)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def homeless(*_):
        raise RuntimeError("Could not determine home directory.")

    for name in ("EFFICIENTFORMER_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(CacheError, match="Set EFFICIENTFORMER_HOME to a folder"):
        cache_root()


def test_a_file_lies_under_model_and_source(tmp_path):
    assert Cache(tmp_path).path("l1", Source()) == tmp_path / "weights/l1/timm/model.safetensors"


@pytest.mark.parametrize("name", ["..", "a/b", "", "/etc", ".hidden", "a\\b", "a\n"])
def test_a_name_that_leads_elsewhere_is_refused(name, tmp_path):
    with pytest.raises(UsageError, match="Illegal name"):
        Cache(tmp_path).path(name, Source())
    with pytest.raises(UsageError, match="Illegal name"):
        Cache(tmp_path).path("l1", Source(filename=name))


def test_an_empty_cache_has_nothing(tmp_path):
    assert Cache(tmp_path / "absent").find("l1", Source()) is None


@pytest.mark.parametrize("sha256", ["", DIGEST, DIGEST[:8], DIGEST.upper()])
def test_a_file_placed_by_hand_is_read_once_and_then_known(sha256, tmp_path, hashed):
    cache, source = Cache(tmp_path), Source(sha256)
    path = place(cache, source)
    assert [cache.find("l1", source) for _ in range(3)] == [path] * 3
    assert hashed == [path.name]


def test_a_full_check_reads_the_file_again_and_sees_silent_damage(tmp_path, hashed):
    cache, source = Cache(tmp_path), Source()
    path = place(cache, source)
    cache.find("l1", source)
    before = path.stat()
    path.write_bytes(BODY[:-1] + b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.find("l1", source) == path
    with pytest.raises(SourceFailedError, match=f"digest is wrong; expected {DIGEST}; found"):
        cache.find("l1", source, verify=True)
    assert len(hashed) == 2


def test_a_file_that_changed_since_it_was_known_is_refused(tmp_path):
    cache, source = Cache(tmp_path), Source()
    path = place(cache, source)
    cache.find("l1", source)
    path.write_bytes(BODY[:100])
    with pytest.raises(SourceFailedError, match="digest is wrong") as caught:
        cache.find("l1", source)
    assert str(path) in str(caught.value)


def test_a_file_that_was_only_touched_is_accepted(tmp_path):
    cache, source = Cache(tmp_path), Source()
    path = place(cache, source)
    cache.find("l1", source)
    os.utime(path, (1, 1))
    assert cache.find("l1", source) == path


def test_a_known_file_is_read_again_when_the_expected_digest_is_another(tmp_path):
    cache = Cache(tmp_path)
    place(cache, Source())
    assert cache.find("l1", Source())
    with pytest.raises(SourceFailedError, match="digest is wrong"):
        cache.find("l1", Source("0" * 64))


@pytest.mark.parametrize("stamp", [b"", b"[]", b"\xff", b'{"size": "many"}'])
def test_a_damaged_stamp_costs_a_reading_and_nothing_else(stamp, tmp_path):
    cache, source = Cache(tmp_path), Source()
    path = place(cache, source)
    path.with_name(f"{path.name}.stamp.json").write_bytes(stamp)
    assert cache.find("l1", source) == path


def test_a_folder_under_the_files_name_is_refused(tmp_path):
    cache = Cache(tmp_path)
    cache.path("l1", Source()).mkdir(parents=True)
    with pytest.raises(SourceFailedError, match="not a file"):
        cache.find("l1", Source())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\xef\xbb\xbf\r\n <?xml version='1.0'?>", "web page"),
        (b"<html>" + b"x" * 1000, "web page"),
        (b"<a" + bytes(6) + b'{"__metadata__"', ""),  # a safetensors header whose length reads as '<a'
        (b"PK\x03\x04", ""),
        (b"< 3", ""),
    ],
)
def test_what_cannot_be_weights_is_refused(body, message, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(body)
    digest = hashlib.sha256(body).hexdigest()
    if not message:
        return check_file(path, digest, digest)
    with pytest.raises(SourceFailedError, match=message):
        check_file(path, digest, digest)
    return None


def test_storing_replaces_the_file_and_what_was_known_of_it(tmp_path):
    cache, source = Cache(tmp_path), Source()
    path = place(cache, source, b"old")
    cache.find("l1", source)
    fetched = path.with_name("fetched")
    fetched.write_bytes(BODY)
    assert cache.store(fetched, path, DIGEST) == cache.find("l1", source) == path
    assert path.read_bytes() == BODY
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, f"{path.name}.stamp.json"]


def test_a_stop_between_the_steps_of_storing_leaves_no_wrong_stamp(tmp_path, monkeypatch):
    cache, source = Cache(tmp_path), Source()
    path = place(cache, source, b"old")
    cache.find("l1", source)
    fetched = path.with_name("fetched")
    fetched.write_bytes(BODY)
    with monkeypatch.context() as patch:
        patch.setattr(room, "_write_stamp", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cache.store(fetched, path, DIGEST)
    assert cache.find("l1", source) == path


def test_a_copy_that_fails_half_way_is_not_left(tmp_path, monkeypatch):
    final = place(Cache(tmp_path), Source(), b"old")
    (other := tmp_path / "other").write_bytes(BODY)

    def full(path, target):
        target.write_bytes(BODY[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(CacheError, match="No space left"):
        Cache(tmp_path).adopt(other, final, DIGEST)
    assert [entry.name for entry in final.parent.iterdir()] == [final.name]


def test_a_cache_that_cannot_be_made_names_itself_and_the_variable(tmp_path):
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file" / "home")
    with (
        pytest.raises(CacheError, match="EFFICIENTFORMER_HOME") as caught,
        cache.lock(cache.path("l1", Source()), silent),
    ):
        pass
    assert str(cache.root) in str(caught.value)


def test_a_lock_that_is_never_given_back_ends_in_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_LOCK_TIMEOUT", 0.2)
    path, told = Cache(tmp_path).path("l1", Source()), []
    holder = "import sys, pathlib; from efficientformer.weights.cache import Cache\n" + (
        "with Cache().lock(pathlib.Path(sys.argv[1]), lambda *_: None): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(path)]
    env = os.environ | {"PYTHONPATH": str(Path(room.__file__).parents[2])}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(SourceFailedError, match="too long"),
            Cache(tmp_path).lock(path, lambda *report: told.append(report)),
        ):
            pass
        process.stdin.close()
    assert "waiting for another process" in told[0][0]


@pytest.mark.parametrize(
    ("terminal", "quiet", "shown"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_bar_is_shown_on_a_terminal_only(terminal, quiet, shown, monkeypatch, capsys):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", screen)
    with terminal_progress(quiet=quiet) as progress:
        assert (progress is not None) == shown
        for done in (100_000, 300_000) if progress else ():
            progress("l1 (snap)", done, 300_000)
    assert ("l1 (snap)" in screen.getvalue(), "300.0/300.0 kB" in screen.getvalue()) == (shown, shown)
    assert capsys.readouterr().out == ""
