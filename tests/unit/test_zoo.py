"""The zoo: every name resolves, every card is complete, unknown names are helped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from efficientformer.spec.errors import UnknownModelError
from efficientformer.spec.labels import label_names, synsets
from efficientformer.spec.manifest import METADATA_KEY
from efficientformer.spec.zoo import EMBEDDED, LAYOUT_PREPROCESS, cards, list_models, resolve
from efficientformer.weights.pretrained import find_weights


@pytest.mark.parametrize(
    ("name", "card", "source"),
    [
        ("efficientformer_l1", "efficientformer_l1", None),
        ("L1", "efficientformer_l1", None),
        ("efficientformer-l1", "efficientformer_l1", None),
        ("efficientformer-l1_3rdparty_8xb128_in1k", "efficientformer_l1", "mmpretrain"),
        ("efficientformer-l3_3rdparty_in1k", "efficientformer_l3", "mmpretrain"),
        ("efficientformer-l7_8xb128_in1k", "efficientformer_l7", None),
        ("efficientformer_l1.snap_dist_in1k", "efficientformer_l1", "timm"),
        ("timm/efficientformerv2_s0.snap_dist_in1k", "efficientformerv2_s0", "timm"),
        ("hf_hub:timm/efficientformerv2_s0.snap_dist_in1k", "efficientformerv2_s0", "timm"),
        ("hf-hub:snap-research/efficientformer-l1-300", "efficientformer_l1", "transformers"),
        ("snap-research/efficientformer-l1-300", "efficientformer_l1", "transformers"),
        ("efficientformer_l1_300d", "efficientformer_l1", "snap-300"),
        ("eformer_l_450", "efficientformerv2_l", "snap"),
        ("s2", "efficientformerv2_s2", None),
        ("efficientformer_v2_l", "efficientformerv2_l", None),
        (EMBEDDED, EMBEDDED, None),
    ],
)
def test_every_projects_name_resolves(name, card, source):
    found = resolve(name)
    assert found.card.name == card
    assert (found.source.name if found.source else None) == source


def test_no_two_cards_share_a_name():
    seen = {}
    for card in cards():
        for name in (card.name, *card.aliases):
            assert seen.setdefault(name.lower(), card.name) == card.name


@pytest.mark.parametrize("name", ["efficientformer_l2", "efficentformer_l1", "s9", "", "resnet50"])
def test_unknown_names_get_the_nearest_and_the_list(name):
    with pytest.raises(UnknownModelError, match="The zoo holds efficientformer_l1") as caught:
        resolve(name)
    if name == "efficentformer_l1":
        assert "Did you mean efficientformer_l1" in str(caught.value)


def test_patterns_match_names_and_aliases():
    assert list_models("*v2*") == [f"efficientformerv2_{v}" for v in ("s0", "s1", "s2", "l")]
    assert list_models("*3rdparty*") == ["efficientformer_l1", "efficientformer_l3", "efficientformer_l7"]
    assert list_models("nothing") == []
    assert len(list_models()) == 8


def test_short_names_are_names():
    assert [resolve(card.short).card for card in cards()] == list(cards())


@pytest.mark.parametrize("card", cards(), ids=lambda card: card.name)
def test_every_card_is_complete(card):
    for source in card.sources or (None,):
        manifest = card.manifest(source)
        assert len(manifest.labels) == card.spec.num_classes
    for source in card.sources:
        assert source.layout in LAYOUT_PREPROCESS
        assert source.url.startswith("https://")
        assert source.alias
        assert source.preprocess == LAYOUT_PREPROCESS[source.layout]
        assert 70 < source.top1 < 90
    if card.name != EMBEDDED:
        assert card.note
        assert card.training
        assert card.latency_ms


def test_openmmlab_digests_are_in_their_file_names():
    for card in cards():
        for source in card.sources:
            if source.name == "mmpretrain":
                assert len(source.sha256) == 8
                assert source.filename.endswith(f"-{source.sha256}.pth")
                assert source.url.endswith(source.filename)


def test_labels():
    assert len(label_names("imagenet1k")) == len(synsets()) == 1000
    assert len(set(synsets())) == 1000
    assert label_names("imagenet1k")[0] == "tench, Tinca tinca"
    assert synsets()[:2] == ("n01440764", "n01443537")
    assert label_names("cifar10")[3] == "cat"


def test_a_folder_is_told_from_a_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("net.onnx", "../" + tmp_path.name):
        Path(name).mkdir(exist_ok=True)
        with pytest.raises(UnknownModelError, match="is a folder without a network"):
            resolve(name)
    with pytest.raises(UnknownModelError, match=r"There is no file 'none\.onnx'"):
        resolve("none.onnx")


@pytest.mark.parametrize("file", ["best.safetensors", "model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_weights_says_how_to_name_them(file, tmp_path):
    (tmp_path / file).touch()
    with pytest.raises(UnknownModelError, match=f"is a folder. Name the weights in it: .*{file}"):
        resolve(str(tmp_path))


def test_several_patterns_are_one_or_the_other():
    assert list_models(["*_l1", "*_L3"]) == ["efficientformer_l1", "efficientformer_l3"]
    assert list_models([]) == []


def test_the_folder_of_several_networks_names_them(tmp_path):
    for name in ("slim.json", "slimmed-1ms.safetensors", "slimmed-2ms.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UnknownModelError, match=r"Name the weights in it: .*slimmed-1ms.* or .*slimmed-2ms"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["own.xml", "own.mlpackage", "own.engine"])
def test_deployed_files_of_other_tools_are_not_read(name):
    with pytest.raises(UnknownModelError, match=r"only \.onnx is read; efficientformer convert"):
        resolve(name)


def test_a_part_of_a_name_lists_all_that_have_it(cli):
    code, out, _ = cli("list", "V2", "--json")
    assert (code, len(out.splitlines())) == (0, 4)
    code, _, err = cli("list", "resnet")
    assert (code, "No network matches 'resnet'" in err) == (2, True)


def test_the_accuracy_of_the_network_in_the_package_is_its_files_own(cli):
    with safe_open(find_weights(resolve(EMBEDDED).card)[0], framework="np") as file:
        figures = json.loads(file.metadata()[METADATA_KEY])["metrics"]
    (row,) = [json.loads(line) for line in cli("list", "cifar10", "--json")[1].splitlines()]
    assert (row["top1"], row["top5"]) == (figures["top1"], figures["top5"])
    assert f"  {figures['top1']:.2f}  {figures['top5']:.2f}" in cli("list", "cifar10")[1]
    assert json.loads(cli("info", EMBEDDED, "--json")[1])["metrics"] == figures
    shown = f"in the package: top-1 {figures['top1']:.2f}, top-5 {figures['top5']:.2f}, measured on CIFAR-10\n"
    assert shown in cli("info", "cifar10")[1]


def test_the_accuracy_of_published_weights_is_that_of_the_first_source(cli):
    (row,) = [json.loads(line) for line in cli("list", "l1", "--json")[1].splitlines()]
    told = json.loads(cli("info", "l1", "--json")[1])
    assert row["top1"] == told["sources"][0]["top1"] == told["metrics"]["published_top1"]
    assert f"timm          top-1 {row['top1']:.2f}, top-5 {row['top5']:.2f}; " in cli("info", "l1")[1]


def test_listing_the_zoo_imports_no_array_library():
    code = "import sys, efficientformer.weights.embedded as e; e.embedded_manifest(); print('numpy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
