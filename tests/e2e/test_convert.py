"""``convert``, checkpoints in ``predict``, ``get_model``: weights of every layout, from file to label."""

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from efficientformer import Classifier, get_model
from efficientformer.export import onnx as onnx_module
from efficientformer.export.deployable import quantised_target
from efficientformer.export.onnx import export_onnx
from efficientformer.models.network import EfficientFormer
from efficientformer.spec import zoo
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import CheckpointError, ExportError, UsageError
from efficientformer.spec.labels import label_names
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.spec.variants import VARIANTS, v1_spec, v2_spec
from efficientformer.spec.zoo import TIMM_PREPROCESS, resolve
from efficientformer.weights.cache import Cache
from efficientformer.weights.checkpoint import WeightsWarning, load_checkpoint, save_foreign, save_native
from efficientformer.weights.pretrained import build, load_published
from tests.contract.test_torch_free import run_without_torch
from tests.parity.regimes import random_state
from tests.unit.test_fold import randomised

EXAMPLES = Path(__file__).parents[2] / "examples"
SPEC = v1_spec((16, 24, 32, 48), (1, 1, 2, 2), 1, input_size=64, num_classes=7)
# Tracing takes a second a block: one with no MB3D and with stages without blocks where the blocks are not the point.
SMALL = v1_spec((16, 24, 32, 48), (0, 1, 0, 1), 0, input_size=64, num_classes=7)
EXPORTED = {
    "V2-S0 as published": VARIANTS["efficientformerv2_s0"],
    "MB3D in stage 3": v1_spec((16, 32, 48, 64), (0, 0, 2, 2), (2, 1), input_size=64),
    "v2 with every part": v2_spec((16, 24, 32, 48), ((4,), (), (3,), (3,)), 1, input_size=64, num_classes=7),
}
LABELS = tuple("abcdefg")


def manifest_of(spec):
    return Manifest(spec, PreprocessSpec(input_size=(64, 64), resize_size=70), LABELS, {}, {"source": "test"})


@pytest.fixture(scope="module")
def model():
    return randomised(SPEC)


def written(path, network):
    save_native(path, network.state_dict(), manifest_of(network.spec))
    return path


@pytest.fixture
def native(tmp_path, model):
    return written(tmp_path / "net.safetensors", model)


@pytest.fixture(scope="module")
def small():
    return randomised(SMALL)


@pytest.fixture
def small_native(tmp_path, small):
    return written(tmp_path / "small.safetensors", small)


def shrink(monkeypatch, name, spec):
    """Put a small network in the place of one of the zoo, with its names, sources, preprocessing and labels."""
    cards = tuple(replace(card, spec=spec) if card.name == name else card for card in zoo.cards())
    assert cards != zoo.cards()
    monkeypatch.setattr(zoo, "cards", lambda: cards)


@pytest.mark.parametrize(
    ("layout", "suffix"), [("timm", ".safetensors"), ("snap", ".pth"), ("mmpretrain", ".pth"), ("transformers", ".bin")]
)
def test_round_trip_through_every_layout(cli, native, model, tmp_path, layout, suffix):
    there, back = tmp_path / f"there{suffix}", tmp_path / "back.safetensors"
    code, out, err = cli("convert", native, there, "--to", layout)
    assert code == 0, err
    assert out.strip() == str(there)
    assert load_checkpoint(there).layout == layout
    told = json.loads(cli("info", there, "--json")[1])
    digest = hashlib.sha256(there.read_bytes()).hexdigest()
    assert (told["layout"], told["sha256"]) == (layout, digest)
    assert ArchSpec.from_dict(told["spec"]) == SPEC
    assert told["params"] == sum(tensor.numel() for tensor in model.parameters())
    code, out, _ = cli("info", there)
    assert (code, f"layout      {layout}" in out, "without names" in out) == (0, True, layout != "mmpretrain")
    assert cli("convert", there, back)[0] == 0
    state = load_checkpoint(back).state
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert load_checkpoint(back).spec == SPEC


@pytest.mark.parametrize(("options", "size", "atol"), [((), 1.0, 1e-4), (("--half",), 0.5, 0.02)])
def test_exported_file_needs_nothing_beside_it(cli, small_native, small, tmp_path, options, size, atol):
    target = tmp_path / "net.onnx"
    code, _, err = cli("convert", small_native, target, *options)
    assert code == 0, err
    assert "compared with torch" in err
    whole = sum(4 * parameter.numel() for parameter in small.parameters())
    assert target.stat().st_size == pytest.approx(size * whole, rel=0.2)
    classify = Classifier(str(target), engine="onnxruntime", precision="fp32")
    manifest = manifest_of(SMALL)
    assert classify.manifest == manifest
    photo = EXAMPLES / "cat.jpg"
    from efficientformer.runtime.image import decode
    from efficientformer.runtime.preprocess import preprocess

    images = torch.from_numpy(preprocess(decode(photo), manifest.preprocess)[None])
    expected = small(images).softmax(1)[0].detach().numpy()
    np.testing.assert_allclose(classify(photo).scores, expected, atol=atol)


def test_nothing_is_overwritten_and_mistakes_are_usage_errors(cli, native, tmp_path):
    target = tmp_path / "there.safetensors"
    target.write_text("mine")
    code, _, err = cli("convert", native, target)
    assert (code, target.read_text()) == (2, "mine")
    assert "--force" in err
    assert cli("convert", native, target, "--force")[0] == 0
    assert load_checkpoint(target).spec == SPEC
    assert cli("convert", native, tmp_path / "x.pth", "--to", "snap", "--half")[0] == 2
    assert cli("convert", native, tmp_path / "x.pth", "--to", "keras")[0] == 2
    code, _, err = cli("convert", "l1", tmp_path / "x.xyz")  # before anything is fetched
    assert (code, "x.xyz has an unknown ending; expected .safetensors or .onnx" in err) == (2, True)
    assert cli("convert", native, tmp_path / "x.safetensors", "--model", "efficientformer_l1")[0] == 1
    assert not (tmp_path / "x.safetensors").exists()
    assert cli("convert", "efficientformer_cifar10", tmp_path / "x.safetensors", "--ema")[0] == 2
    code, _, err = cli("convert", "efficientformer_cifar10", tmp_path / "x.safetensors", "--model", "l3")
    assert (code, "is another network; expected efficientformer_l3" in err) == (2, True)
    (tmp_path / "folder").mkdir()
    for place in (target / "x.onnx", tmp_path / "folder"):  # below a file, and a folder
        code, _, err = cli("convert", native, place, "--to", "onnx", "--force")
        assert (code, "Cannot write" in err) == (2, True)
    code, _, err = cli("convert", tmp_path / "nothing.pth", tmp_path / "x.onnx")
    assert code == 2
    assert "There is no file" in err


def test_a_plain_state_dict_of_the_network_in_the_package_is_that_network_under_its_name(tmp_path):
    own = resolve("efficientformer_cifar10").card
    network = get_model(own.name, pretrained=True)
    torch.save(network.state_dict(), tmp_path / "mine.pth")
    again = get_model(own.name, pretrained=tmp_path / "mine.pth")
    x = torch.rand(1, 3, *own.spec.input_size)
    assert again.spec == own.spec
    assert torch.equal(again(x), network(x))
    manifest = Classifier(own.name, checkpoint=tmp_path / "mine.pth", engine="onnxruntime").manifest
    assert (manifest.preprocess, manifest.labels) == (own.manifest(None).preprocess, own.manifest(None).labels)
    with pytest.warns(WeightsWarning, match="stem's stride: 4 is assumed"):
        get_model(str(tmp_path / "mine.pth"))


def test_what_lies_beside_a_checkpoint_is_looked_at_again_once_it_changes(tmp_path, small):
    path = tmp_path / "model.safetensors"
    save_foreign(path, small.state_dict(), SMALL, "timm")
    assert Classifier(checkpoint=path, engine="onnxruntime").manifest.labels == ()
    names = [f"kind {number}" for number in range(SMALL.num_classes)]
    config = {"architecture": "efficientformer_l1", "label_names": names, "input_size": [3, *SMALL.input_size]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Classifier(checkpoint=path, engine="onnxruntime").manifest.labels == tuple(names)


@pytest.mark.parametrize("name", ["net.safetensors", "net.onnx"])
def test_names_of_classes_go_into_the_file(cli, tmp_path, small, name):
    foreign, names, target = tmp_path / "theirs.pth", tmp_path / "classes.txt", tmp_path / name
    save_foreign(foreign, small.state_dict(), SMALL, "snap")
    labels = [f"kind {number}" for number in range(SMALL.num_classes)]
    names.write_text("\n".join(labels) + "\n\n", "utf-8-sig")
    code, _, err = cli("convert", foreign, target, "--labels", names)
    assert code == 0, err
    assert json.loads(cli("info", target, "--json")[1])["labels"] == labels
    code, _, err = cli("convert", foreign, tmp_path / "b.pth", "--to", "snap", "--labels", names)
    assert (code, "holds no names of classes" in err) == (2, True)
    names.write_text("one\ntwo")
    code, _, err = cli("convert", foreign, target, "--labels", names, "--force")
    assert (code, f"expected {SMALL.num_classes} names" in err, "found 2" in err) == (2, True, True)


def test_another_input_size_takes_tables_and_preprocessing_along_but_no_figures(cli, tmp_path):
    target = tmp_path / "48.safetensors"
    code, _, err = cli("convert", "efficientformer_cifar10", target, "--input-size", "48")
    assert code == 0, err
    assert "resampled" in err
    manifest = load_checkpoint(target).manifest
    assert manifest.spec.input_size == manifest.preprocess.input_size == (48, 48)
    assert manifest.metrics == {}
    assert get_model(str(target))(torch.rand(1, 3, 48, 48)).shape == (1, 10)


def test_predicting_with_a_checkpoint_builds_once(cli, small_native, small, tmp_path, monkeypatch):
    foreign = tmp_path / "theirs.pth"
    save_foreign(foreign, small.state_dict(), SMALL, "snap")
    calls = []
    real = onnx_module.export_onnx
    monkeypatch.setattr(onnx_module, "export_onnx", lambda *a, **k: calls.append(1) or real(*a, **k))
    for _ in range(2):
        code, out, err = cli("predict", EXAMPLES / "cat.jpg", "--checkpoint", foreign, "-f", "json")
        assert code == 0, err
        assert json.loads(out)["pred_class"] in {str(i) for i in range(7)}  # a foreign file names no classes
    assert len(calls) == 1
    assert Classifier(checkpoint=foreign)(EXAMPLES / "cat.jpg").manifest.labels == ()
    _, out, _ = cli("predict", EXAMPLES / "cat.jpg", "--model", small_native, "-f", "json")
    assert json.loads(out)["pred_class"] in LABELS


def test_a_zoo_name_is_built_once_from_weights_put_by_hand_and_then_needs_no_torch(cli, monkeypatch):
    shrink(monkeypatch, "efficientformerv2_s0", v2_spec((16, 16, 24, 32), ((2,), (), (), ()), 0))
    card = resolve("s0").card
    source = card.source("timm")
    weights = Cache().path(card.name, source)
    weights.parent.mkdir(parents=True)
    save_foreign(weights, random_state(card.spec, 0), card.spec, "timm")
    photo = EXAMPLES / "dog.jpg"
    code, out, err = cli("predict", photo, "--model", "S0", "-f", "json")
    assert code == 0, err
    found = json.loads(out)
    assert found["pred_class"] == label_names("imagenet1k")[found["pred_label"]]
    manifest = Classifier("efficientformerv2_s0.snap_dist_in1k").manifest
    assert manifest.preprocess == TIMM_PREPROCESS
    assert manifest.metrics["published_top1"] == source.top1
    assert manifest.provenance["source"] == "timm"
    ((_, out, err),) = run_without_torch(("predict", photo, "--model", "efficientformerv2_s0", "-f", "json"))
    assert json.loads(out) == found, err
    int8 = quantised_target("efficientformerv2_s0")
    int8.write_bytes(b"what took an hour")
    os.utime(weights, (2**31, 2**31))  # as after a copy of the cache
    Classifier("efficientformerv2_s0")
    assert int8.exists(), "the weights are those it was made of"


def test_torch_and_engines_take_the_same_of_several_weights(monkeypatch, tmp_path):
    shrink(monkeypatch, "efficientformerv2_s0", v2_spec((16, 16, 24, 32), ((2,), (), (), ()), 0))
    card = resolve("s0").card
    second, first = card.sources[1], card.sources[0]
    for source in (second, first):
        path = Cache().path(card.name, source)
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest = Manifest(card.spec, PreprocessSpec(card.spec.input_size))  # as convert writes it, of any file
        save_native(tmp_path / "converted.safetensors", random_state(card.spec, 0), manifest)
        shutil.copy(tmp_path / "converted.safetensors", path)
        assert Classifier("efficientformerv2_s0").manifest.provenance["source"] == source.name
        assert load_published(card)[1].provenance["source"] == source.name


def test_a_file_that_differs_from_its_network_gets_no_name(small, tmp_path, monkeypatch):
    """Export another network than the one it is compared with: the comparison must notice, and leave nothing."""
    other = randomised(SMALL, seed=1)
    real = onnx_module.fold
    monkeypatch.setattr(onnx_module, "fold", lambda _: real(other))
    with pytest.raises(ExportError, match="differs"):
        export_onnx(small, manifest_of(SMALL), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", EXPORTED)
def test_networks_of_every_kind_export(name, tmp_path):
    spec = EXPORTED[name]
    manifest = Manifest(spec, PreprocessSpec(input_size=spec.input_size, resize_size=max(spec.input_size)))
    agreement = export_onnx(randomised(spec), manifest, tmp_path / "net.onnx")
    assert agreement.pictures >= 3
    assert agreement.max_difference < 1e-5 * max(100, agreement.largest_logit)


def test_a_network_in_half_precision_and_in_training_is_exported_and_left_as_it_is(tmp_path):
    half = randomised(SMALL).to(torch.bfloat16).train()
    half.stem.eval()  # as a frozen part is
    agreement = export_onnx(half, manifest_of(SMALL), tmp_path / "net.onnx")
    assert agreement.max_difference < 1e-3
    assert half.head.weight.dtype == torch.bfloat16
    assert [part.training for part in (half, half.stem, half.stages[0])] == [True, False, True]


def test_get_model_says_what_it_changes(native, model):
    same = get_model("efficientformer_cifar10", pretrained=False)
    assert not same.training
    loaded = get_model(str(native))
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded(images), model(images))
    with pytest.warns(UserWarning, match="(?i)table"):
        larger = get_model(str(native), input_size=96)
    assert larger(torch.rand(1, 3, 96, 96)).shape == (1, 7)
    with pytest.warns(UserWarning, match="(?i)head"):
        assert get_model(str(native), num_classes=3)(images).shape == (1, 3)
    with pytest.warns(UserWarning, match="distillation head"):
        single = get_model(str(native), distilled=False)
    torch.testing.assert_close(single(images), model(images, return_heads=True)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_model(SPEC, pretrained=native)
    with pytest.warns(UserWarning, match="(?i)table"):
        assert get_model(SPEC.with_input_size(96), pretrained=native).spec.input_size == (96, 96)
    with pytest.raises(CheckpointError, match="another network"):
        get_model("efficientformer_l1", pretrained=native)
    with pytest.raises(UsageError, match="Two weights files"):
        get_model(str(native), pretrained=native)
    with pytest.warns(UserWarning, match="summed over the colours"):
        assert get_model(str(native), in_chans=1)(images[:, :1]).shape == (1, 7)
    with pytest.raises(CheckpointError, match="Other input channels"):
        get_model(str(native), in_chans=2)


def test_build_without_weights_is_random():
    first, second = build(SPEC, None), build(SPEC, None)
    assert isinstance(first, EfficientFormer)
    assert not torch.equal(first.head.weight, second.head.weight)
