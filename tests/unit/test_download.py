"""Fetching, against servers on the loopback that misbehave in every way a real one has been seen to."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from efficientformer.spec.errors import DownloadError
from efficientformer.weights import download
from efficientformer.weights.cache import Cache, CacheError, SourceFailedError
from efficientformer.weights.download import Limits, fetch

BODY = random.Random(0).randbytes(300_000)
DIGEST = hashlib.sha256(BODY).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FAST = Limits(timeout=15.0, attempts=3, backoff=0.01, max_bytes=1 << 20)


@dataclass(frozen=True)
class Source:
    url: str
    sha256: str = DIGEST
    name: str = "snap"
    filename: str = "l1.pth"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.log.append((self.command, self.path, dict(self.headers)))
        script = self.server.scripts[self.path]
        answer = script.pop(0) if len(script) > 1 else script[0]
        self.close_connection = True
        answer(self)

    do_HEAD = do_GET  # noqa: N815 (the library's name)

    def reply(self, code, body=b"", **headers):
        fixed = {"Content_Length": str(len(body)), "Content_Type": "application/octet-stream", "Connection": "close"}
        self.send_response(code)
        for name, value in (fixed | headers).items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args): ...


def whole(handler, body=BODY, etag='"v1"', **headers):
    """Answer as a good server does, ranges included."""
    begin = int((re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")) or [0, 0])[1])
    if not begin or handler.headers.get("If-Range", etag) != etag:
        return handler.reply(200, body, ETag=etag, **headers)
    if begin >= len(body):
        return handler.reply(416)
    span = f"bytes {begin}-{len(body) - 1}/{len(body)}"
    return handler.reply(206, body[begin:], ETag=etag, Content_Range=span, **headers)


def cut(handler, after=100_000, etag='"v1"'):
    """Promise the whole file and hang up in the middle."""
    handler.reply(200, BODY[:after], Content_Length=str(len(BODY)), ETag=etag)


def without_length(handler, body=BODY):
    handler.reply(200, body, Content_Length=None)


def endless(handler):
    handler.reply(200, Content_Length=None)
    for _ in range(100):  # ten times what is allowed: enough to see, too little to fill a disk
        handler.wfile.write(bytes(100_000))


def chunked(handler, end=b"0\r\n\r\n"):
    handler.reply(200, b"%x\r\n%b\r\n" % (len(BODY), BODY) + end, Content_Length=None, Transfer_Encoding="chunked")


def code(number, **headers):
    return lambda handler: handler.reply(number, **headers)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_): ...  # clients of these tests hang up

    def source(self, *script, path="/l1.pth", **fields):
        """Return a source whose requests are answered by ``script`` in turn, the last entry from then on."""
        self.scripts[path] = list(script)
        return Source(f"http://127.0.0.1:{self.server_port}{path}", **fields)

    def get(self, sources, limits=FAST, **options):
        return fetch("l1", sources, cache=self.cache, limits=limits, **options)

    def files(self):
        entries = (path for path in self.cache.root.rglob("*") if path.suffix != ".lock")
        return sorted(path.name for path in entries if path.is_file())

    def ranges(self):
        return [headers.get("Range", "") for _, _, headers in self.log]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    for name in ("EFFICIENTFORMER_OFFLINE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(tmp_path):
    with Server(("127.0.0.1", 0), Handler) as server:
        server.scripts, server.log, server.cache = {}, [], Cache(tmp_path)
        threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection was tried: {args}")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


DONE = ["l1.pth", "l1.pth.stamp.json"]


@pytest.mark.parametrize(
    ("script", "ranges"),
    [
        ([whole], [""]),
        ([code(500), code(429), whole], ["", "", ""]),
        ([cut, whole], ["", "bytes=100000-"]),
        ([cut, partial(cut, after=0), whole], ["", "bytes=100000-", ""]),
        ([cut, lambda h: h.reply(200, BODY)], ["", "bytes=100000-"]),  # Range ignored
        ([cut, code(416), whole], ["", "bytes=100000-", ""]),
        ([partial(cut, etag='"v0"'), whole], ["", "bytes=100000-"]),  # the file changed meanwhile
        ([partial(cut, etag=None), partial(whole, etag=None)], ["", "bytes=100000-"]),  # only the size can tell
        ([partial(cut, etag='W/"v1"'), partial(whole, etag='W/"v1"')], ["", "bytes=100000-"]),
        ([chunked], [""]),
        ([partial(chunked, end=b""), whole], ["", ""]),
        ([without_length], [""]),  # the digest tells that it is complete
        ([code(302, Location="/l1.pth"), whole], ["", ""]),
    ],
)
def test_faults_that_pass_are_overcome(script, ranges, server):
    path = server.get([server.source(*script)])
    assert path.read_bytes() == BODY
    assert server.ranges() == ranges
    assert server.files() == DONE


@pytest.mark.parametrize(("etag", "span"), [('"v2"', "100000-299999/300000"), (None, "100000-299999/300001")])
def test_a_server_that_resumes_another_file_is_asked_for_all_of_it(etag, span, server):
    def other(handler):
        handler.reply(206, BODY[100_000:], Content_Range=f"bytes {span}", ETag=etag)

    assert server.get([server.source(cut, other, whole)]).read_bytes() == BODY
    assert server.ranges() == ["", "bytes=100000-", ""]


@pytest.mark.parametrize("etags", [(None, None), ('W/"a"', 'W/"b"')], ids=["no tag", "weak tags"])
def test_without_a_digest_nothing_is_put_behind_what_may_be_another_version(etags, server):
    other = bytes(reversed(BODY))
    source = server.source(partial(cut, etag=etags[0]), partial(whole, body=other, etag=etags[1]), sha256="")
    assert server.get([source]).read_bytes() == other
    assert server.ranges() == ["", ""]


def test_a_server_that_falls_silent_is_left_and_asked_again(server):
    silent = threading.Event()

    def stall(handler):
        cut(handler)
        silent.wait(30)

    path = server.get([server.source(stall, whole)], replace(FAST, timeout=0.5))
    silent.set()
    assert path.read_bytes() == BODY
    assert server.ranges()[:2] == ["", "bytes=100000-"]


def test_old_bytes_that_went_bad_cost_one_more_download(server):
    source = server.source(cut, code(404), whole)
    with pytest.raises(DownloadError):
        server.get([source])
    part = server.cache.path("l1", source).with_name("l1.pth.part")
    part.write_bytes(b"!" + part.read_bytes()[1:])
    assert server.get([source]).read_bytes() == BODY
    assert server.ranges() == ["", "bytes=100000-", "bytes=100000-", ""]


def test_a_part_of_another_address_is_not_gone_on_with(server):
    with pytest.raises(DownloadError):
        server.get([server.source(cut, code(404))])
    assert server.get([server.source(whole, path="/moved")]).read_bytes() == BODY
    assert server.ranges()[-1] == ""


@pytest.mark.parametrize(
    ("answer", "sha256", "message", "left"),
    [
        (code(404), DIGEST, "404 Not Found", []),
        (code(503), DIGEST, "3 tries failed; found The server answers 503", []),
        (cut, "", "3 tries failed", ["l1.pth.part", "l1.pth.part.json"]),
        (whole, "0" * 8, f"digest is wrong; expected 00000000; found {DIGEST}", []),
        (partial(whole, Content_Type="text/html; charset=utf-8"), DIGEST, "web page", []),
        (partial(whole, body=b"\n<!DOCTYPE html>"), "", "web page", []),
        (partial(whole, body=b""), "", "empty", []),
        (partial(whole, Content_Encoding="gzip"), DIGEST, "compresses", []),
        (code(200, Content_Length=str(FAST.max_bytes + 1)), "", "too large", []),
        (endless, DIGEST, "too large", []),
        (without_length, "", "how long the file is", []),
        (partial(chunked, end=b""), "", "3 tries failed", ["l1.pth.part", "l1.pth.part.json"]),
        (code(302, Location="file:///etc/passwd"), DIGEST, "file:///etc/passwd", []),
        (code(302, Location="ftp://127.0.0.1/x"), DIGEST, "redirect was refused", []),
        (code(302, Location="/l1.pth"), DIGEST, "302", []),
        (code(302, Location="http://127.0.0.1:port/"), DIGEST, "127.0.0.1|port", []),
        (lambda handler: handler.wfile.write(b"SSH-2.0-x\r\n"), DIGEST, "No answer: BadStatusLine", []),
    ],
)
def test_what_is_not_the_file_never_gets_its_name(answer, sha256, message, left, server):
    with pytest.raises(DownloadError, match=message):
        server.get([server.source(answer, sha256=sha256)])
    assert server.files() == left


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "", "http://", "data:,weights"])
def test_addresses_that_are_not_of_the_web_are_not_opened(url, server):
    with pytest.raises(DownloadError, match="snap: "):
        server.get([Source(url)])


def test_a_redirect_never_leads_from_https_to_http(server):
    request = urllib.request.Request("https://example.invalid/a")
    with pytest.raises(SourceFailedError, match="never less safe"):
        download._Redirects().redirect_request(request, io.BytesIO(), 302, "", {}, "http://example.invalid/b")


def test_the_next_source_is_tried_and_the_cache_answers_from_then_on(server, tmp_path):
    sources = [server.source(code(404), path="/gone", name="timm"), server.source(whole)]
    path = server.get(sources)
    assert path == tmp_path / "weights/l1/snap/l1.pth"
    assert server.get(sources) == server.get(sources, offline=True) == path
    assert len(server.log) == 2


def test_when_all_fail_the_message_says_why_and_what_to_do(server):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = Source(f"http://127.0.0.1:{closed.getsockname()[1]}/x", name="timm")
        lost = server.source(code(404))
        with pytest.raises(DownloadError) as caught:
            server.get([dead, lost])
    text = str(caught.value)
    said = ("No weights for l1", "timm: No connection", "snap: The server answers 404", "Or give a weights file as")
    for part in said:
        assert part in text
    for source in (dead, lost):
        assert f"{source.url}\n    -> {server.cache.path('l1', source)}" in text
    by_hand = server.cache.path("l1", lost)
    by_hand.parent.mkdir(parents=True, exist_ok=True)
    by_hand.write_bytes(BODY)
    assert server.get([dead, lost]) == by_hand


@pytest.mark.parametrize("verify", [False, True])
def test_a_damaged_file_is_fetched_again(verify, server, caplog):
    source = server.source(whole)
    path = server.get([source])
    before = path.stat()
    path.write_bytes(BODY[::-1] if verify else BODY[:-1])
    if verify:  # damage that neither size nor time shows
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert server.get([source], verify=verify).read_bytes() == BODY
    assert "digest is wrong" in caplog.text


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("variables", "offline", "reason"),
    [
        ({"EFFICIENTFORMER_OFFLINE": "1"}, None, "EFFICIENTFORMER_OFFLINE=1"),
        ({"HF_HUB_OFFLINE": "true"}, None, "HF_HUB_OFFLINE=true"),
        ({}, True, "offline=True"),
    ],
)
def test_offline_means_no_connection(variables, offline, reason, server, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DownloadError, match=f"{reason} forbids connections"):
        server.get([Source(url) for url in ("http://127.0.0.1:9/x", HUB_SOURCE.url)], offline=offline)
    assert server.files() == []


def test_offline_false_beats_the_environment(server, monkeypatch):
    monkeypatch.setenv("EFFICIENTFORMER_OFFLINE", "1")
    assert server.get([server.source(whole)], offline=False).read_bytes() == BODY


@pytest.mark.parametrize("at", [50_000, len(BODY)])
def test_a_killed_download_leaves_only_its_part_and_is_taken_up_again(at, server, tmp_path):
    def kill(label, done, total):
        if done >= at:
            raise KeyboardInterrupt

    source = server.source(whole)
    with pytest.raises(KeyboardInterrupt):
        server.get([source], progress=kill)
    assert server.files() == ["l1.pth.part", "l1.pth.part.json"]
    here = next(tmp_path.rglob("*.part")).stat().st_size
    assert server.get([source]).read_bytes() == BODY
    assert server.ranges() == ["", f"bytes={here}-" if here < len(BODY) else ""]


def test_two_processes_fetch_once(server, tmp_path):
    def slowly(handler):
        time.sleep(0.8)
        whole(handler)

    url = server.source(slowly).url
    script = (
        "import sys, types; from efficientformer.weights.download import fetch\n"
        f"source = types.SimpleNamespace(name='snap', url=sys.argv[1], filename='l1.pth', sha256='{DIGEST}')\n"
        "print(fetch('l1', [source]), 'torch' in sys.modules)"
    )
    here = {"EFFICIENTFORMER_HOME": str(tmp_path), "PYTHONPATH": str(Path(download.__file__).parents[2])}
    start = partial(subprocess.Popen, [sys.executable, "-c", script, url], env=os.environ | here, text=True)
    processes = [start(stdout=subprocess.PIPE) for _ in range(2)]
    path = tmp_path / "weights/l1/snap/l1.pth"
    assert [process.communicate()[0] for process in processes] == [f"{path} False\n"] * 2
    assert path.read_bytes() == BODY
    assert len(server.log) == 1


def test_a_home_that_is_no_folder_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EFFICIENTFORMER_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(CacheError, match="EFFICIENTFORMER_HOME"):
        fetch("l1", [server.source(whole)])
    assert server.log == []


def test_a_disk_that_fills_up_stops_everything(server):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))  # the kernel refuses more in one file
    try:
        with pytest.raises(CacheError, match="Cannot write to the cache folder"):
            server.get([server.source(whole), server.source(whole, path="/second")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(server.log) == 1
    assert "l1.pth" not in server.files()


def test_a_disk_without_room_is_seen_before_the_download(server, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=9))
    with pytest.raises(CacheError, match="0 MB free where 0 MB are needed"):
        server.get([server.source(whole)])


def test_progress_tells_bytes_and_goes_on_where_a_resume_does(server):
    told = []
    server.get([server.source(cut, whole)], progress=lambda *report: told.append(report))
    assert {label for label, _, _ in told} == {"l1 (snap)"}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1] == ("l1 (snap)", len(BODY), len(BODY))


HUB_PATH = "/timm/l1.snap/resolve/{}/model.safetensors"
HUB_SOURCE = Source("https://huggingface.co" + HUB_PATH.format("main"), name="timm", filename="model.safetensors")
HUB_FACTS = {"X_Repo_Commit": COMMIT, "X_Linked_Etag": f'"{DIGEST}"', "X_Linked_Size": str(len(BODY))}


def use_hub(monkeypatch, home, url):
    """Have the hub's library keep its files in a folder of the test, and ask another server."""
    from huggingface_hub import constants

    for name, value in {"HF_HUB_CACHE": str(home), "HF_TOKEN_PATH": str(home / "token")}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # it would call home
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", url)


@pytest.fixture
def hub(server, tmp_path_factory, monkeypatch):
    """Make the server the hub: facts on the file's address, the bytes behind a redirect."""
    home = tmp_path_factory.mktemp("hub")
    use_hub(monkeypatch, home, f"http://127.0.0.1:{server.server_port}/")
    blob = f"http://localhost:{server.server_port}/blob"  # another host's name, as a content network is
    for revision in ("main", COMMIT):
        server.source(code(302, Location=blob, **HUB_FACTS), path=HUB_PATH.format(revision))
    server.source(partial(whole, **HUB_FACTS), path="/blob")
    server.home = home
    return server


def test_hub_addresses_go_through_the_hub_library_and_its_mirror(hub, tmp_path):
    told = []
    path = hub.get([HUB_SOURCE], progress=lambda *report: told.append(report))
    assert path == tmp_path / "weights/l1/timm/model.safetensors"
    assert path.read_bytes() == BODY
    assert hub.log[0][:2] == ("HEAD", HUB_PATH.format("main"))
    assert "hf_hub/" in hub.log[0][2]["user-agent"]
    assert told[-1] == ("l1 (timm)", len(BODY), len(BODY))
    assert hub.files() == ["model.safetensors", "model.safetensors.stamp.json"]
    assert not any(entry.is_dir() for entry in path.parent.iterdir())


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("", code(404, X_Error_Code="EntryNotFound"), "Entry Not Found"),
        ("", code(401, X_Error_Code="GatedRepo"), "GatedRepoError"),
        ("", code(503), "503"),
        ("", code(200), "huggingface_hub gave up"),  # not a hub: a portal, a plain file server
        ("", code(302, Location="http://localhost/", **HUB_FACTS | {"X_Linked_Size": str(1 << 30)}), "too large"),
        ("/blob", partial(whole, body=BODY[::-1], **HUB_FACTS), "digest is wrong"),
        ("/blob", partial(whole, body=b"<html>".ljust(len(BODY)), **HUB_FACTS), "web page"),
    ],
)
def test_what_the_hub_cannot_give_is_told(path, answer, message, hub):
    for address in [path] if path == "/blob" else [HUB_PATH.format("main"), HUB_PATH.format(COMMIT)]:
        hub.source(answer, path=address)
    with pytest.raises(DownloadError, match=message):
        hub.get([HUB_SOURCE])
    assert set(hub.files()) <= {".gitignore", "CACHEDIR.TAG"}  # with which its library marks a folder


def test_the_hubs_own_digest_is_used_where_the_zoo_knows_none(hub):
    unknown = replace(HUB_SOURCE, sha256="")
    hub.source(partial(whole, body=BODY[::-1], **HUB_FACTS), path="/blob")
    with pytest.raises(DownloadError, match=f"digest is wrong; expected {DIGEST}"):
        hub.get([unknown])
    hub.source(whole, path="/blob")
    assert hub.get([unknown]).read_bytes() == BODY


def test_a_hub_download_that_was_stopped_keeps_what_is_here(hub, monkeypatch):
    """Whether the part of a file is of use is for the hub's library to say; one that is whole is not fetched again."""
    with monkeypatch.context() as patch:
        patch.setattr(download, "sha256_of", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            hub.get([HUB_SOURCE])
    assert hub.get([HUB_SOURCE]).read_bytes() == BODY
    assert [method for method, path, _ in hub.log if path == "/blob"].count("GET") == 1
    assert hub.files() == ["model.safetensors", "model.safetensors.stamp.json"]


def test_a_dead_hub_gives_way_to_the_next_source_at_once(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    begin = time.monotonic()
    assert hub.get([HUB_SOURCE, hub.source(whole)]).name == "l1.pth"
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize("good", [True, False])
def test_what_another_program_fetched_from_the_hub_is_taken_over(good, hub, no_network):
    snapshot = hub.home / "models--timm--l1.snap" / "snapshots" / COMMIT / "model.safetensors"
    snapshot.parent.mkdir(parents=True)
    snapshot.write_bytes(BODY if good else BODY[::-1])
    (refs := snapshot.parents[2] / "refs").mkdir()
    (refs / "main").write_text(COMMIT)
    if not good:
        with pytest.raises(DownloadError, match="digest is wrong"):
            hub.get([HUB_SOURCE], offline=True)
        return
    path = hub.get([HUB_SOURCE], offline=True)
    assert path.read_bytes() == BODY
    assert path.stat().st_ino != snapshot.stat().st_ino
