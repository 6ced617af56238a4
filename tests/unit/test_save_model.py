"""A network kept with what it needs: preprocessing and class names go where it goes."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from efficientformer import Classifier, PreprocessSpec, evaluate_model, get_model, save_model, transform
from efficientformer.data.transform import Transform
from efficientformer.models.fold import fold
from efficientformer.runtime.image import Image
from efficientformer.spec.errors import CheckpointError, SpecError, UsageError
from efficientformer.spec.labels import label_names
from efficientformer.spec.variants import v1_spec
from efficientformer.spec.zoo import CIFAR10_PREPROCESS, TIMM_PREPROCESS
from efficientformer.training.recipe import Recipe
from efficientformer.training.setup import build_network
from efficientformer.weights.checkpoint import WeightsWarning, load_checkpoint, save_foreign

OWN = "efficientformer_cifar10"
CAT = Path(__file__).parents[2] / "examples" / "cat.jpg"
SPEC = v1_spec((8, 12, 16, 24), (0, 1, 0, 0), 0, input_size=32, num_classes=1000)
FED = PreprocessSpec(input_size=(32, 32), resize_size=40, exif=True)


@pytest.fixture
def timm_file(tmp_path):
    """A network for ImageNet, in timm's layout."""
    save_foreign(tmp_path / "theirs.pth", get_model(SPEC).state_dict(), SPEC, "timm")
    return tmp_path / "theirs.pth"


class TestManifest:
    def test_a_network_of_a_file_is_fed_as_that(self, timm_file):
        manifest = get_model(timm_file, input_size=32).manifest
        assert manifest.preprocess == TIMM_PREPROCESS.with_input_size(32)
        assert manifest.labels == label_names("imagenet1k")
        assert manifest.provenance["layout"] == "timm"

    def test_a_network_without_weights_is_fed_as_its_weights_would_be_and_knows_no_classes(self):
        manifest = get_model("efficientformerv2_s0").manifest
        assert (manifest.preprocess, manifest.labels, manifest.metrics) == (TIMM_PREPROCESS, (), {})
        assert manifest.provenance == {"model": "efficientformerv2_s0"}

    def test_one_made_of_a_spec_has_none(self):
        assert get_model(SPEC).manifest is None

    def test_what_does_not_hold_of_a_changed_network_is_left_out(self):
        whole = get_model(OWN, pretrained=True).manifest
        assert (whole.preprocess, whole.labels) == (CIFAR10_PREPROCESS, label_names("cifar10"))
        assert whole.metrics
        with pytest.warns(WeightsWarning):
            network = get_model(OWN, pretrained=True, num_classes=3, input_size=64)
        found = network.manifest
        assert (found.spec, found.labels, found.metrics) == (network.spec, (), {})
        assert found.preprocess == CIFAR10_PREPROCESS.with_input_size(64)
        assert found.provenance == whole.provenance

    def test_grey_pictures_are_normalised_as_the_mean_of_the_colours(self):
        with pytest.warns(WeightsWarning, match="summed over the colours"):
            network = get_model(OWN, pretrained=True, in_chans=1)
        preprocess = network.manifest.preprocess
        assert preprocess.mode == "L"
        assert preprocess.mean == pytest.approx((np.mean(CIFAR10_PREPROCESS.mean),))
        assert preprocess.std == pytest.approx((np.mean(CIFAR10_PREPROCESS.std),))
        colour = get_model(OWN, pretrained=True)
        grey = Image.open(CAT).convert("L")
        difference = network(transform(network)(grey)[None]) - colour(transform(colour)(grey)[None])
        assert difference.abs().max() < 0.5  # of logits up to 10; 3.5 with a mean and a std of 0.5

    def test_grey_trainings_start_from_it(self):
        spec = dataclasses.replace(get_model(OWN).spec, in_chans=1)
        recipe = Recipe(model=OWN, spec=spec.to_dict(), pretrained=True)
        model, manifest = build_network(recipe, label_names("cifar10"), lambda _: None)
        assert (model.spec.in_chans, manifest.preprocess) == (1, CIFAR10_PREPROCESS.averaged())

    def test_a_head_left_out_changes_figures_but_no_names(self, timm_file):
        with pytest.warns(WeightsWarning, match="distillation head is left out"):
            network = get_model(timm_file, distilled=False)
        assert (network.manifest.spec, network.manifest.labels) == (network.spec, label_names("imagenet1k"))

    def test_new_heads_name_no_classes(self):
        network = get_model(OWN, pretrained=True)
        network.reset_classifier(10)
        assert (network.manifest.labels, network.manifest.metrics) == ((), {})
        assert network.manifest.preprocess == CIFAR10_PREPROCESS


class TestSaveModel:
    def test_the_file_is_the_network_for_everyone(self, tmp_path):
        network, path = get_model(OWN, pretrained=True), tmp_path / "mine.safetensors"
        save_model(network, path)
        again = get_model(path)
        assert again.manifest == dataclasses.replace(network.manifest, metrics={})
        x = torch.rand(2, 3, 32, 32)
        assert torch.equal(again(x), network(x))
        prediction = Classifier(path, engine="torch")(CAT)
        assert (prediction.name, prediction.manifest) == ("cat", again.manifest)
        (tmp_path / "photos" / "cat").mkdir(parents=True)
        Image.open(CAT).save(tmp_path / "photos" / "cat" / "0.png")
        evaluation = evaluate_model(path, tmp_path / "photos", engine="torch")
        assert (evaluation.top1, evaluation.manifest) == (100, again.manifest)
        trained = build_network(Recipe(model=str(path)), again.manifest.labels, lambda _: None)[1]
        assert (trained.preprocess, trained.labels) == (CIFAR10_PREPROCESS, again.manifest.labels)

    def test_a_foreign_file_keeps_its_preprocessing_but_is_not_the_published_one_any_more(self, timm_file, tmp_path):
        network = get_model(timm_file)
        save_model(network, tmp_path / "mine.safetensors")
        saved = load_checkpoint(tmp_path / "mine.safetensors").manifest
        assert (saved.preprocess, saved.labels) == (network.manifest.preprocess, network.manifest.labels)
        assert saved.provenance == {"started_from": network.manifest.provenance["sha256"]}

    def test_labels_and_preprocessing_are_those_given(self, tmp_path):
        path = tmp_path / "mine.safetensors"
        network = get_model(OWN, pretrained=True)
        network.reset_classifier(2)
        save_model(network, path)
        assert get_model(path).manifest.labels == ()
        save_model(network, path, labels=["left", "right"], preprocess=FED)
        assert get_model(path).manifest.labels == ("left", "right")
        assert get_model(path).manifest.preprocess == FED
        save_model(get_model(path), path, labels=())
        assert get_model(path).manifest.labels == ()

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"labels": ["one"]}, "Wrong number of labels; expected 10; found 1"),
            ({"labels": "0123456789"}, "Illegal labels"),
            ({"preprocess": PreprocessSpec()}, "Preprocessing and network disagree"),
        ],
    )
    def test_what_does_not_fit_is_refused_and_nothing_is_written(self, given, message, tmp_path):
        with pytest.raises(SpecError, match=message):
            save_model(get_model(OWN), tmp_path / "mine.safetensors", **given)
        assert not list(tmp_path.iterdir())

    def test_one_made_of_a_spec_is_told_how_it_is_fed(self, tmp_path):
        network, path = get_model(SPEC), tmp_path / "mine.safetensors"
        with pytest.raises(UsageError, match=r"Nothing says how this network is fed.*preprocess="):
            save_model(network, path)
        save_model(network, path, preprocess=FED)
        assert get_model(path).manifest.preprocess == FED

    @pytest.mark.parametrize("wrap", [torch.nn.DataParallel, fold])
    def test_what_is_no_network_in_train_form_is_refused(self, wrap, tmp_path):
        with pytest.raises(UsageError, match=r"cannot be saved.*network\.module, or network\._orig_mod"):
            save_model(wrap(get_model(OWN)), tmp_path / "mine.safetensors")

    def test_heads_that_were_replaced_by_hand_are_refused(self, tmp_path):
        network = get_model(OWN)
        network.head = torch.nn.Linear(network.head.in_features, 3)
        with pytest.raises(CheckpointError, match=r"head\.weight"):
            save_model(network, tmp_path / "mine.safetensors")


class TestTransform:
    def test_it_feeds_what_the_classifier_feeds(self):
        classify = Classifier(OWN, engine="torch")
        fed = transform(OWN)(CAT)
        assert (fed.dtype, fed.shape, fed.is_contiguous()) == (torch.float32, (3, 32, 32), True)
        scores = get_model(OWN, pretrained=True)(fed[None]).softmax(1)[0]
        assert np.allclose(scores.detach(), classify(CAT).scores, atol=1e-5)
        picture = Image.open(CAT).convert("RGB")
        for same in (CAT.read_bytes(), picture, np.asarray(picture), str(CAT)):
            assert torch.equal(transform(classify)(same), fed)

    def test_turned_and_grey_pictures(self, tmp_path):
        picture = Image.fromarray(np.arange(64 * 48, dtype=np.uint32).reshape(48, 64).astype(np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        picture.save(tmp_path / "turned.png", exif=exif)
        upright = Transform(FED.grey())(picture.transpose(Image.Transpose.ROTATE_270))
        assert upright.shape == (1, 32, 32)
        assert torch.equal(Transform(FED.grey())(tmp_path / "turned.png"), upright)
        assert not torch.equal(Transform(dataclasses.replace(FED.grey(), exif=False))(tmp_path / "turned.png"), upright)

    def test_a_name_without_weights_is_known_and_nothing_is_downloaded(self, monkeypatch):
        monkeypatch.delenv("EFFICIENTFORMER_OFFLINE")
        monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("a connection"))
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("a connection"))
        assert transform("L1") == Transform(TIMM_PREPROCESS)
        assert transform("efficientformer_l1_1000d").preprocess.resize_size == 256

    def test_of_several_weights_those_that_are_here_count(self, monkeypatch):
        from efficientformer.spec.zoo import resolve
        from efficientformer.weights.cache import Cache

        card = resolve("efficientformerv2_s0").card
        path = Cache().path(card.name, card.source("snap"))
        path.parent.mkdir(parents=True)
        save_foreign(path, get_model(card.name).state_dict(), card.spec, "snap")
        assert transform(card.name).preprocess == card.source("snap").preprocess
        assert transform("efficientformerv2_s0.snap_dist_in1k").preprocess == TIMM_PREPROCESS

    def test_files_networks_and_classifiers_say_theirs(self, tmp_path):
        from efficientformer.export.deployable import embedded_file

        path = tmp_path / "mine.safetensors"
        save_model(get_model(SPEC), path, preprocess=FED)
        for model in (path, str(path), get_model(path)):
            assert transform(model) == Transform(FED)
        assert transform(embedded_file()) == transform(Classifier(engine="onnxruntime")) == transform("")
        with pytest.raises(UsageError, match=r"Nothing says how this network is fed.*Transform\(PreprocessSpec"):
            transform(get_model(SPEC))
        with pytest.raises(UsageError, match="names no network"):
            transform(torch.nn.Linear(2, 2))

    def test_in_a_data_set_and_its_workers(self, tmp_path):
        from torchvision.datasets import ImageFolder

        (tmp_path / "cat").mkdir()
        Image.open(CAT).save(tmp_path / "cat" / "0.png")
        pictures = ImageFolder(tmp_path, transform=transform(OWN))
        ((images, labels),) = torch.utils.data.DataLoader(pictures, num_workers=1, multiprocessing_context="spawn")
        assert pickle.loads(pickle.dumps(pictures.transform)) == transform(OWN)
        assert torch.equal(images[0], transform(OWN)(tmp_path / "cat" / "0.png"))
        assert labels.tolist() == [0]
