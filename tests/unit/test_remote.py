"""Networks of a repository of the hub, or at an address: fetched as they are named, with what lies beside them."""

import dataclasses
import hashlib
import io
import json
import threading
from contextlib import nullcontext
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from efficientformer import Classifier, evaluate_model, get_model, save_model
from efficientformer.export.deployable import embedded_file, ready_file
from efficientformer.slimming.start import decide, make_plan, start_network, with_start
from efficientformer.spec.errors import DownloadError, UnknownModelError, UsageError
from efficientformer.spec.zoo import EMBEDDED
from efficientformer.training.recipe import Recipe
from efficientformer.training.setup import build_network, rooted
from efficientformer.weights import remote
from efficientformer.weights.checkpoint import save_foreign
from tests.unit.test_download import use_hub
from tests.unit.test_save_model import SPEC

PETS = "hf-hub:me/pets"
CONFIG = {
    "architecture": "efficientformer_l1",
    "label_names": ["cat", "dog"],
    "pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 0.8},
}
DATA = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does, of files by repository and name."""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body):
        hub, path = self.server, self.path.partition("?")[0]
        hub.log.append((self.command, path))
        if path.startswith("/api/models/"):
            repo = "/".join(path.split("/")[3:5])
            found = None
            if repo in hub.files:
                siblings = [{"rfilename": name, "size": hub.said.get(name, len(data))}
                            for name, data in hub.files[repo].items()]  # fmt: skip
                found = json.dumps({"id": repo, "sha": hub.commit, "siblings": siblings}).encode()
        else:
            _, owner, name, _, _, *file = path.split("/")
            found = hub.files.get(f"{owner}/{name}", {}).get("/".join(file))
            if file[-1:] in hub.broken:
                self.send_error(403)  # which the hub's library does not try again for seconds
                return
        self.send_response(404 if found is None else 200)
        if found is None:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(found or b"")))
        self.send_header("X-Repo-Commit", hub.commit)
        self.send_header("ETag", f'"{hashlib.sha256(found or b"").hexdigest()}"')
        self.end_headers()
        if body and found:
            self.wfile.write(found)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network of two classes in timm's layout."""
    network = get_model(dataclasses.replace(SPEC, num_classes=2))
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    save_foreign(path, network.state_dict(), network.spec, "timm")
    return path.read_bytes()


@pytest.fixture
def hub(tmp_path, monkeypatch, weights):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.log, server.commit, server.said, server.broken = [], "a" * 40, {}, ()
        server.files = {"me/pets": {"config.json": json.dumps(CONFIG).encode(), "pytorch_model.bin": weights}}
        server.url = f"http://127.0.0.1:{server.server_port}"
        use_hub(monkeypatch, tmp_path / "hub", server.url)
        monkeypatch.setenv("EFFICIENTFORMER_OFFLINE", "0")
        monkeypatch.setattr(remote, "_FETCHED", {})
        threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
        yield server
        server.shutdown()


def new_process(monkeypatch):
    monkeypatch.setattr(remote, "_FETCHED", {})


def gone(monkeypatch):
    """Let nobody answer any more."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    new_process(monkeypatch)


@pytest.mark.parametrize("name", [PETS, "HF_HUB:me/pets@main", "https://huggingface.co/me/pets/blob/main/{}"])
def test_a_network_comes_with_what_lies_beside_it(hub, name):
    network = get_model(name.format("pytorch_model.bin"))
    assert network.manifest.labels == ("cat", "dog")
    assert network.manifest.preprocess.resize_size == 40
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_a_process_asks_once(hub):
    get_model(PETS)
    asked = len(hub.log)
    classify = Classifier(PETS, engine="torch")
    assert classify(DATA).name in ("cat", "dog")
    assert ready_file(PETS) is None
    assert len(hub.log) == asked
    fetched = [path.rpartition("/")[2] for method, path in hub.log if method == "GET" and "/resolve/" in path]
    assert fetched == ["config.json", "pytorch_model.bin"]


def test_the_next_process_takes_what_is_new(hub, monkeypatch):
    old = get_model(PETS)
    hub.files["me/pets"]["config.json"] = json.dumps(CONFIG | {"label_names": ["dog", "cat"]}).encode()
    hub.commit = "b" * 40
    assert get_model(PETS).manifest.labels == old.manifest.labels
    new_process(monkeypatch)
    assert get_model(PETS).manifest.labels == ("dog", "cat")


def test_a_commit_that_cannot_be_had_whole_leaves_what_is_here(hub, monkeypatch):
    get_model(PETS)
    hub.files["me/pets"]["config.json"] = b"{}"
    hub.commit, hub.broken = "b" * 40, (["pytorch_model.bin"],)
    for offline in (False, True):
        new_process(monkeypatch)
        with nullcontext() if offline else pytest.warns(UserWarning, match="as it was fetched before"):
            assert get_model(PETS, offline=offline).manifest.labels == ("cat", "dog")


def test_what_is_here_serves_without_the_hub(hub, monkeypatch):
    get_model(PETS)
    gone(monkeypatch)
    with pytest.warns(UserWarning, match="as it was fetched before"):
        assert get_model(PETS).manifest.labels == ("cat", "dog")
    new_process(monkeypatch)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    asked = len(hub.log)
    assert get_model(PETS, offline=True).manifest.labels == ("cat", "dog")
    assert len(hub.log) == asked


@pytest.mark.parametrize("model", ["hf-hub:timm/efficientformerv2_s0.snap_dist_in1k", "HF-hub:me/pets"])
def test_a_repository_is_never_built_with_random_weights(hub, model):
    """Also if it is one of those that the zoo knows, whose plain name means the architecture alone."""
    with pytest.raises(DownloadError):
        get_model(model, offline=True)


def test_what_is_not_here_is_told(hub, monkeypatch):
    with pytest.raises(DownloadError, match="not here, and the hub cannot be asked; found offline=True"):
        Classifier(PETS, offline=True)
    assert hub.log == []
    gone(monkeypatch)
    with pytest.raises(DownloadError, match="not here, and the hub cannot be asked"):
        get_model(PETS)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("hf-hub:me/cars", DownloadError, r"no hf-hub:me/cars for you.*HF_TOKEN"),
        ("hf-hub:me/empty", DownloadError, r"no weights in .*expected best\.safetensors or .*found README\.md"),
        ("hf-hub:me/large", DownloadError, "too large"),
        ("hf-hub:pets", UsageError, "hf-hub:OWNER/NAME"),
        ("hf-hub:me/../x", UsageError, "hf-hub:OWNER/NAME"),
        ("hf-hub:../..", UsageError, "hf-hub:OWNER/NAME"),
        ("hf-hub:-me/a--b", UsageError, "hf-hub:OWNER/NAME"),
        ("hf-hub:me/pets@x/../../../evil", UsageError, "no revision"),
        ("https://huggingface.co/me/pets/resolve/..%2f..%2fevil/pytorch_model.bin", UsageError, "no revision"),
        ("{url}/network.zip", UsageError, r"of no network; expected a file \(\.onnx"),
        ("{url}/a/b/c/d/none.onnx", DownloadError, "404"),
        ("me/pets", UnknownModelError, "hub is named hf-hub:me/pets"),
    ],
)
def test_what_cannot_be_had_is_refused(hub, name, error, message):
    hub.files |= {"me/empty": {"README.md": b"#"}, "me/large": {"model.safetensors": b"#"}}
    hub.said = {"model.safetensors": 3 << 30}
    with pytest.raises(error, match=message):
        get_model(name.format(url=hub.url))


def test_they_serve_as_weights_too(hub, tmp_path):
    save_model(get_model(EMBEDDED, pretrained=True), tmp_path / "model.safetensors")
    hub.files["me/ten"] = {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()}
    right = Classifier()(DATA).label
    assert get_model(EMBEDDED, pretrained="hf-hub:me/ten").manifest.labels[3] == "cat"
    for engine in ("torch", "onnxruntime"):
        assert Classifier(EMBEDDED, checkpoint="hf-hub:me/ten", engine=engine)(DATA).label == right
    hub.files["me/light"] = {"model.onnx": embedded_file().read_bytes()}
    Image.fromarray(DATA).save(tmp_path / "1.png")
    (tmp_path / "data.csv").write_text("file,label\n1.png,cat\n")
    found = evaluate_model("", tmp_path / "data.csv", checkpoint="hf-hub:me/light")
    assert (found.images, "torch" in found.engine) == (1, False)


def test_a_name_and_two_weights_are_refused_before_anything_is_fetched(hub, tmp_path):
    with pytest.raises(UsageError, match="Two weights files"):
        Classifier(PETS, checkpoint=tmp_path / "x.pth")
    assert hub.log == []


def test_an_exported_file_runs_from_a_repository_and_from_an_address(hub, monkeypatch):
    hub.files["me/light"] = {"model.onnx": embedded_file().read_bytes()}
    right = Classifier()(DATA)
    assert Classifier("hf-hub:me/light", engine="onnxruntime")(DATA).label == right.label
    address = f"{hub.url}/me/light/resolve/main/model.onnx"
    assert Classifier(address, engine="onnxruntime")(DATA).label == right.label
    asked = len(hub.log)
    new_process(monkeypatch)
    Classifier(address, engine="onnxruntime")
    assert len(hub.log) == asked, "what has an address is fetched once"


def test_verbs_take_them(hub, cli, tmp_path):
    save_model(get_model(EMBEDDED, pretrained=True), tmp_path / "model.safetensors")
    hub.files["me/ten"] = {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()}
    code, out, err = cli("download", "hf-hub:me/ten")
    assert (code, err) == (0, "")
    assert out.strip().endswith(f"models--me--ten/snapshots/{hub.commit}/model.safetensors")
    code, out, _ = cli("info", "hf-hub:me/ten", "--json")
    assert (code, json.loads(out)["layout"]) == (0, "native")
    code, out, _ = cli("convert", "hf-hub:me/ten", tmp_path / "ten.onnx")
    assert (code, Classifier(tmp_path / "ten.onnx").manifest.labels[3]) == (0, "cat")
    for label in ("airplane", "cat"):
        (tmp_path / "data" / label).mkdir(parents=True)
        Image.fromarray(DATA).save(tmp_path / "data" / label / "a.png")
    code, out, _ = cli("test", "hf-hub:me/ten", "--data", tmp_path / "data", "--json")
    assert (code, json.loads(out)["images"]) == (0, 2)
    code, out, _ = cli("predict", tmp_path / "data", "-m", "hf-hub:me/ten", "-f", "json", "--engine", "onnxruntime")
    assert (code, len(out.splitlines())) == (0, 2)
    code, _, err = cli("download", "hf-hub:me/ten", "--source", "timm")
    assert (code, "only networks of the zoo" in err.lower()) == (2, True)


@pytest.mark.parametrize(
    "name", ["my%20net.pth", "model_best.pth.tar", "last.ckpt", "_best.pth", "net(1).pth", "%E7%B6%B2.pth"]
)
def test_an_address_may_have_a_name_that_the_cache_does_not_take(hub, name):
    hub.files["me/web"] = {name: hub.files["me/pets"]["pytorch_model.bin"]}
    assert get_model(f"{hub.url}/me/web/resolve/main/{name}").stem.conv1.conv.weight.shape[1] == 3


def test_a_cache_that_cannot_be_written_is_named_and_not_a_file_in_it(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    save_model(get_model(EMBEDDED), tmp_path / "mine.safetensors")
    monkeypatch.setattr("efficientformer.export.deployable.tempfile.TemporaryFile", refuse)
    with pytest.raises(DownloadError, match=r"Cannot write to the cache folder(?s:.)*EFFICIENTFORMER_HOME"):
        Classifier(tmp_path / "mine.safetensors")


def test_a_run_notes_the_commit_it_starts_from(hub, monkeypatch):
    hub.files["me/web"] = {"start.pth": hub.files["me/pets"]["pytorch_model.bin"]}
    address = f"{hub.url}/me/web/resolve/main/start.pth"
    for model, noted in ((PETS, f"hf-hub:me/pets@{hub.commit}"), (address, address)):
        recipe = rooted(with_start(Recipe(teacher=model), model))
        assert (recipe.model, recipe.teacher) == (noted, noted)
        new_process(monkeypatch)
        network, manifest = build_network(recipe, ("dog", "cat"), lambda _: None)
        assert manifest.provenance["model"] == noted
        kept = torch.load(io.BytesIO(hub.files["me/web"]["start.pth"]))
        assert torch.equal(network.stem.conv1.conv.weight, kept["stem.conv1.weight"])


def test_a_run_that_slims_begins_with_the_network_of_a_repository(hub, tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number in range(2):
            Image.fromarray(DATA).save(tmp_path / label / f"{number}.png")
    plan = decide(make_plan(tmp_path, [1.0], model=PETS))
    assert plan.supernet.model == f"hf-hub:me/pets@{hub.commit}"
    assert start_network(plan).stages == SPEC.stages
