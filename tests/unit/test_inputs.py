"""What a user names on a command line: each name gives its pictures in order, or says why there is none."""

import contextlib
import http.server
import os
import pickle
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from efficientformer.runtime import image
from efficientformer.runtime.fetch import _in_ascii, fetch
from efficientformer.runtime.image import decode, read_file
from efficientformer.runtime.inputs import READERS, Input, _raise, gather, read_ahead
from efficientformer.spec.errors import ImageError


def picture():
    out = BytesIO()
    Image.new("RGB", (8, 6), "red").save(out, "PNG")
    return out.getvalue()


PNG = picture()
TREE = ("a.png", "B.JPG", "b/x.webp", "b/deep/er/z.tiff", "b/notes.txt", "c/.hidden.png", ".git/a.png", "odd[1].png")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder of pictures and other files, which is also the working directory."""
    root = tmp_path / "tree"
    for name in TREE:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
    (root / "empty").mkdir()
    monkeypatch.chdir(root)
    return root


def names(*given):
    return [item.name for item in gather(given)]


def problem(item):
    with pytest.raises(ImageError) as caught:
        item.read()
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (["a.png"], ["a.png"]),
        (["b/notes.txt"], ["b/notes.txt"]),  # whatever is named is tried
        (["odd[1].png"], ["odd[1].png"]),  # a file of just that name comes before the pattern
        (["a.png", "a.png"], ["a.png", "a.png"]),
        (["b"], ["b/x.webp", "b/deep/er/z.tiff"]),
        (["."], ["B.JPG", "a.png", "odd[1].png", "b/x.webp", "b/deep/er/z.tiff"]),
        (["b/", "a.png"], ["b/x.webp", "b/deep/er/z.tiff", "a.png"]),
        (["*.png"], ["a.png", "odd[1].png"]),
        (["?.*"], ["B.JPG", "a.png"]),
        (["[ab].png"], ["a.png"]),
        (["b*"], ["b/x.webp", "b/deep/er/z.tiff"]),  # as the shell: a folder that matches is a folder that is named
        (["*/x.webp"], ["b/x.webp"]),
        (["b/**"], ["b/notes.txt", "b/x.webp", "b/deep/er/z.tiff"]),
        (["**/*.tiff"], ["b/deep/er/z.tiff"]),
        (["**/er/../er/*"], ["b/deep/er/../er/z.tiff"]),
        (["**/**/**/*.webp"], ["b/x.webp"]),
        (["**/deep/**/*.tiff"], ["b/deep/er/z.tiff"]),
        (["**/**/er/**"], ["b/deep/er/z.tiff"]),
        (["**/*/**/*.tiff"], ["b/deep/er/z.tiff"]),  # reached in two ways, given once
        (["c/.h*"], ["c/.hidden.png"]),
    ],
)
def test_names(given, want, tree):
    found = list(gather(given))
    assert [item.name for item in found] == want
    for item in found:
        assert decode(item.read()).size == (8, 6)


def test_folders_come_sorted(tree):
    for name in ("a", "z", "k"):
        (tree / "b" / name).mkdir()
        (tree / "b" / name / "y.png").write_bytes(PNG)
    assert names("b") == ["b/x.webp", "b/a/y.png", "b/deep/er/z.tiff", "b/k/y.png", "b/z/y.png"]


def test_a_folder_that_is_written_to_is_left_out(tree):
    outside, link = tree / "b" / "deep", tree / "link"
    link.symlink_to(outside)
    for given, want in [
        (["b"], ["b/x.webp"]),
        (["b/**/*.*"], ["b/notes.txt", "b/x.webp"]),
        (["b/*"], ["b/notes.txt", "b/x.webp"]),
        (["link/er/z.tiff"], ["link/er/z.tiff"]),  # named one by one
    ]:
        assert [item.name for item in gather(given, outside=outside)] == want
    for given in ("b/deep", "link", "link/er/*"):
        (item,) = gather([given], outside=outside)
        assert f"outside {outside}" in problem(item)


def test_one_name_paths_and_absolute_patterns(tree):
    assert [item.name for item in gather("a.png")] == ["a.png"]
    assert names(Path("a.png")) == ["a.png"]
    assert names(str(tree / "*.JPG")) == [str(tree / "B.JPG")]
    assert names(str(tree / "**" / "*.webp")) == [str(tree / "b" / "x.webp")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("missing.png", "No such file"),
        ("empty", "a folder without any"),
        ("c", "a folder without any"),
        ("*.bmp", "no match"),
        ("nowhere/**/*.png", "no match"),
        ("a.png/*", "no match"),
        ("", "an empty name"),
        ("a\0b", "null"),
        ("a\0*", "no match"),
        ("x" * 5000, "too long"),
        ("file:///etc/passwd", "http:// or https://"),
        ("ftp://example.com/a.png", "http:// or https://"),
        ("http://", "Cannot download"),
        ("http://[::1", "Cannot download"),
        ("http://127.0.0.1:1/a.png", "refused"),
        ("http://127.0.0.1:99999/a.png", "Cannot download"),
    ],
)
def test_a_name_that_leads_nowhere_does_not_stop_the_others(given, message, tree):
    before, bad, after = gather(["a.png", given, "b/x.webp"])
    assert before.read() == after.read() == PNG
    assert message in problem(bad)


def test_gathering_reads_nothing(tree, monkeypatch):
    monkeypatch.setattr(Path, "open", None)
    assert len(names(".", "a.png", "*.png", "-", "http://127.0.0.1:1/a.png")) == 10


def test_inputs_travel_between_processes(tree):
    good, bad, url = pickle.loads(pickle.dumps(list(gather(["a.png", "*.bmp", "http://127.0.0.1:1/a.png"]))))
    assert good.read() == PNG
    assert "no match" in problem(bad)
    assert "refused" in problem(url)


def test_links_are_followed_without_circling(tree):
    outside = tree.parent / "outside"
    outside.mkdir()
    (outside / "o.png").write_bytes(PNG)
    links = {"up": tree, "self": ".", "deep/other": tree / "b", "linked": outside, "broken.png": "nowhere.png"}
    for name, target in links.items():
        (tree / "b" / name).symlink_to(target)
    found = names("b")
    want = ["x.webp", "z.tiff", "o.png", "broken.png", "a.png", "B.JPG", "odd[1].png"]
    assert sorted(Path(name).name for name in found) == sorted(want)
    assert len(names("b/**")) == len(found) + 1  # and notes.txt
    broken = next(item for item in gather(["b"]) if item.name.endswith("broken.png"))
    assert "No such file" in problem(broken)


def test_a_folder_that_cannot_be_listed(tree, monkeypatch):
    real = os.scandir

    def refuse(path):
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for given in ("b", "b/**/*.tiff", "b/deep/*"):
        found = {item.name: item for item in gather([given])}
        assert "Permission denied" in problem(found[str(Path("b/deep"))]), given


# --- files and standard input ---------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tmp_path):
    fifo, circle, huge = (tmp_path / name for name in ("fifo.jpg", "circle.jpg", "huge.jpg"))
    os.mkfifo(fifo)
    circle.symlink_to(circle)
    with huge.open("wb") as file:
        file.truncate(image.MAX_BYTES + 1)
    table = [(fifo, "device"), ("/dev/zero", "device"), (tmp_path / "missing", "No such file"), (tmp_path, "a folder")]
    table += [("a\0b", "null"), (circle, "symbolic links"), (huge, "too large"), ("x" * 5000, "too long")]
    for path, message in table:
        with pytest.raises(ImageError, match=message) as caught:
            read_file(path)
        assert repr(str(path)) in str(caught.value)


def test_a_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)

    def refuse(self, *_):  # root, who often runs tests, may read everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError, match=r"a\.png.*Permission denied"):
        decode(path)


def test_a_stream_without_end(monkeypatch):
    monkeypatch.setattr(image, "MAX_BYTES", 5_000_000)
    with Path("/dev/zero").open("rb") as endless, pytest.raises(ImageError, match="too large"):
        decode(endless)
    with pytest.raises(ImageError, match="too large"):
        decode(BytesIO(bytes(5_000_001)))


class Terminal(BytesIO):
    def isatty(self):
        return True


def test_standard_input(monkeypatch):
    first, second = gather(["-", "-"], stdin=BytesIO(PNG))
    assert (first.name, first.read()) == ("-", PNG)
    assert "once" in problem(second)
    monkeypatch.setattr("sys.stdin", None)
    for stream, message in [(Terminal(PNG), "a terminal"), (None, "no standard input")]:
        (item,) = gather(["-"], stdin=stream)
        assert message in problem(item)
    monkeypatch.setattr("sys.stdin", type("Text", (), {"buffer": BytesIO(PNG)}))
    (item,) = gather(["-"])
    assert item.read() == PNG


def test_what_comes_once_can_be_kept(server):
    for given in ("-", server + "/once"):
        (item,) = gather([given], stdin=BytesIO(PNG), keep=True)
        assert item.read() == item.read() == PNG


def test_inputs_are_read_ahead_a_bounded_number_and_in_order():
    begun, all_begun, drawn = [], threading.Event(), []

    def read(number):
        begun.append(number)
        if len(begun) == READERS:
            all_begun.set()
        assert all_begun.wait(10)  # none answers before as many are asked
        return number if number != 5 else _raise(ImageError("gone"))

    def numbered():
        for number in range(100):
            drawn.append(number)
            yield Input(str(number), partial(read, number))

    with ThreadPoolExecutor(READERS) as readers:
        inputs = read_ahead(numbered(), readers)
        assert next(inputs).read() == 0
        assert len(drawn) == 2 * READERS + 1
        found = list(inputs)
    assert [each.name for each in found] == [str(number) for number in range(1, 100)]
    assert [each.read() for each in found if each.name != "5"] == [number for number in range(1, 100) if number != 5]
    assert "gone" in problem(found[4])


# --- downloads ------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """A server with one path per way of answering."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/once":
            asked = self.server.__dict__.setdefault("asked", [])
            asked.append(path)
            return self.answer(200 if len(asked) == 1 else 410, PNG, {})
        if path == "/headers":
            return self.answer(200, b"", {}, drip_headers=True)
        if path == "/to/endless":  # a redirect whose own body has no end
            return self.answer(302, None, {"Location": "/picture"})
        if path.startswith("/to/"):
            targets = {"/to/picture": "/picture", "/to/file": "file:///etc/passwd", "/to/circle": "/to/circle"}
            targets |= {"/to/ftp": "ftp://127.0.0.1/a.png", "/to/data": "data:image/png;base64,AAAA"}
            return self.answer(302, b"", {"Location": targets[path]})
        if path == "/missing":
            return self.answer(404, b"not here", {})
        if path == "/slow":
            time.sleep(1.5)
        answers = {"/long": ({"Content-Length": str(1 << 40)}, PNG), "/cut": ({"Content-Length": "9999"}, PNG)}
        answers |= {"/endless": ({}, None), "/drip": ({}, b"."), "/agent": ({}, self.headers["User-Agent"].encode())}
        headers, body = answers.get(path, ({"Content-Length": str(len(PNG))}, PNG))
        return self.answer(200, body, headers, drip=path == "/drip")

    def answer(self, status, body, headers, drip=False, drip_headers=False):
        self.send_response(status)
        for number in range(20 if drip_headers else 0):
            self.send_header(f"X-{number}", "x")
            with contextlib.suppress(OSError):
                self.flush_headers()
            time.sleep(0.1)
        for item in headers.items():
            self.send_header(*item)
        self.end_headers()
        try:
            for _ in range(20 if drip else 0):
                self.wfile.write(b".")
                time.sleep(0.1)
            while body is None:
                self.wfile.write(bytes(1 << 16))
            self.wfile.write(body)
        except OSError:
            pass  # the client has had enough

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def server():
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.block_on_close = False
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.parametrize(
    "path", ["/picture", "/picture?size=[1]*", "/to/picture", "/to/endless", "/with space/\u00e9.png"]
)
def test_downloads(path, server):
    (item,) = gather([server + path])
    assert item.name == server + path
    assert decode(item.read(), name=item.name).size == (8, 6)


def test_downloads_say_who_asks(server):
    assert fetch(server + "/agent") == b"efficientformer"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing", "HTTP 404"),
        ("/to/file", "not allowed"),
        ("/to/data", "not allowed"),
        ("/to/ftp", "unknown url type: ftp"),
        ("/to/circle", "infinite loop"),
        ("/long", "1,099,511,627,776 or more"),
        ("/endless", "at most 1,000,000 bytes"),
        ("/cut", "before the connection ended"),
        ("/slow", "timed out"),
        ("/drip", "the deadline passed"),
        ("/headers", "the deadline passed"),
    ],
)
def test_downloads_that_fail(path, message, server):
    start = time.monotonic()
    with pytest.raises(ImageError, match=message) as caught:
        fetch(server + path, timeout=0.5, deadline=0.9, max_bytes=1_000_000)
    assert path in str(caught.value)
    assert time.monotonic() - start < 1.4


def test_an_address_of_bytes_that_are_no_text_is_asked_for(server):
    assert decode(fetch(server + "/caf\udce9.jpg")).size == (8, 6)


def test_a_host_is_asked_for_by_its_name_in_ascii():
    with pytest.raises(ImageError, match="Cannot download") as error:
        fetch("http://bücher.invalid/a b.jpg", timeout=1, deadline=5)
    assert "codec" not in str(error.value)
    assert _in_ascii("http://bücher.example:80/ä?q=ü") == "http://xn--bcher-kva.example:80/%C3%A4?q=%C3%BC"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_deadline_is_for_a_silent_server_too(scheme):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system connects; nothing is ever said
        start = time.monotonic()
        with pytest.raises(ImageError, match="the deadline passed"):
            fetch(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/", timeout=5, deadline=0.3)
        assert time.monotonic() - start < 2


def test_an_address_of_a_clusters_storage_names_the_option():
    (item,) = gather(["s3://bucket/images"])
    assert "--ray" in problem(item)


def test_offline_nothing_is_fetched(server):
    (item,) = gather([server + "/picture"], offline="offline=True")
    assert "while offline=True" in problem(item)


def test_the_default_size_limit(server):
    (item,) = gather([server + "/long"])
    assert "at most 67,108,864" in problem(item)
