"""What timm and transformers write beside a network, and what mmpretrain writes into its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import create_model, save_for_hf

from efficientformer import get_model, save_model
from efficientformer.models.network import EfficientFormer
from efficientformer.spec.errors import CheckpointError
from efficientformer.spec.labels import label_names, synsets
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.variants import VARIANTS, v1_spec
from efficientformer.spec.zoo import TIMM_PREPROCESS
from efficientformer.weights.beside import known_labels, read_beside, timm_config
from efficientformer.weights.checkpoint import WeightsWarning, load_checkpoint, save_foreign
from efficientformer.weights.formats.translate import from_ours
from efficientformer.weights.pretrained import load_named

W = (8, 12, 16, 24)
SPEC = v1_spec(W, (1, 1, 1, 2), 1, input_size=64, num_classes=3)
STATE = EfficientFormer(SPEC).state_dict()
PETS = ("cat", "dog", "hamster")


def beside(folder: Path, layout: str, **files: object) -> Path:
    """Write weights, and JSON files beside them."""
    save_foreign(folder / "model.safetensors", STATE, SPEC, layout)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "model.safetensors"


class TestTimm:
    @pytest.mark.parametrize(
        "said",
        [
            {},
            {"crop_pct": 0.8, "interpolation": "bilinear"},
            {"crop_pct": 1.0, "crop_mode": "squash", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        ],
        ids=["as published", "smaller crop", "squashed"],
    )
    def test_a_folder_written_by_timm_says_what_its_transform_does(self, said, tmp_path):
        network = create_model("efficientformer_l1", num_classes=3)
        how = {"model_config": {"pretrained_cfg": said, "label_names": list(PETS)}, "safe_serialization": True}
        save_for_hf(network, tmp_path, **how)
        manifest = load_named(str(tmp_path / "model.safetensors"), str(tmp_path / "model.safetensors"))[1]
        config = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
        resize, crop, _, normalise = create_transform(**resolve_data_config({}, pretrained_cfg=config)).transforms
        ours = manifest.preprocess
        assert manifest.labels == PETS
        assert ours.input_size == tuple(crop.size)
        short = (0, tuple(resize.size)) if ours.resize == "squash" else (ours.resize_size, resize.size)
        assert short in ((0, ours.input_size), (resize.size, resize.size))
        assert ours.interpolation == resize.interpolation.value
        assert np.allclose([ours.mean, ours.std], [normalise.mean.tolist(), normalise.std.tolist()])
        assert manifest.provenance["described_by"] == "config.json"

    @pytest.mark.parametrize(
        ("name", "fed"),
        [
            ("efficientformer_l1", {}),
            ("efficientformerv2_s0", {"resize_size": 247, "interpolation": "bilinear", "mean": (0.5, 0.4, 0.3)}),
            ("efficientformer_l1", {"resize": "squash", "resize_size": 0}),
            ("efficientformerv2_s0", {"input_size": (160, 160), "resize_size": 161}),
        ],
    )
    def test_timm_builds_and_feeds_what_was_converted_for_it(self, name, fed, cli, tmp_path):
        torch.manual_seed(0)
        preprocess = dataclasses.replace(TIMM_PREPROCESS, **fed)
        network = get_model(name, num_classes=3, input_size=preprocess.input_size, layer_scale_init=0.1)
        save_model(network, tmp_path / "ours.safetensors", labels=PETS, preprocess=preprocess)
        folder = tmp_path / "for" / "timm"
        code, _, err = cli("convert", tmp_path / "ours.safetensors", folder / "model.safetensors", "--to", "timm")
        assert (code, err.rstrip().endswith("config.json with its classes and how it is fed")) == (0, True), err
        theirs = create_model(f"local-dir:{folder}", pretrained=True).eval()
        picture = Image.open(Path(__file__).parents[2] / "examples" / "cat.jpg")
        size, crop = create_transform(**resolve_data_config({}, model=theirs)).transforms[:2]
        assert (size.size, tuple(crop.size)) == (preprocess.resize_size or preprocess.input_size, preprocess.input_size)
        fed_by_them = create_transform(**resolve_data_config({}, model=theirs))(picture)[None]
        with torch.no_grad():
            torch.testing.assert_close(theirs(fed_by_them), network(fed_by_them), atol=1e-4, rtol=1e-4)
        assert tuple(theirs.pretrained_cfg["label_names"]) == PETS
        manifest = load_named(str(folder / "model.safetensors"), str(folder / "model.safetensors"))[1]
        assert (manifest.preprocess, manifest.labels) == (preprocess, PETS)

    def test_what_timm_does_not_do_is_told(self, cli, tmp_path):
        preprocess = dataclasses.replace(TIMM_PREPROCESS, exif=True)
        save_model(get_model("efficientformerv2_s0"), tmp_path / "ours.safetensors", preprocess=preprocess)
        _, _, err = cli("convert", tmp_path / "ours.safetensors", tmp_path / "model.safetensors", "--to", "timm")
        assert "with how it is fed, but for exif, which timm has not" in err

    def test_a_folder_that_was_described_before_is_left_alone(self, cli, tmp_path):
        save_model(get_model("cifar10", pretrained=True), tmp_path / "ours.safetensors")
        (tmp_path / "config.json").write_text("{}")
        code, _, err = cli("convert", "l1", tmp_path / "model.safetensors", "--to", "timm")
        assert (code, "config.json exists" in err, len(list(tmp_path.iterdir()))) == (2, True, 2)

    def test_what_timm_cannot_build_is_not_described(self):
        preprocess = dataclasses.replace(TIMM_PREPROCESS, input_size=(64, 64))
        assert timm_config(Manifest(SPEC, preprocess, (), {}, {})) is None
        wide = dataclasses.replace(TIMM_PREPROCESS, input_size=(224, 256), resize_size=256)
        spec = dataclasses.replace(VARIANTS["efficientformerv2_s0"], input_size=(224, 256))
        assert timm_config(Manifest(spec, wide, (), {}, {})) is None

    def test_a_size_that_the_weights_fit_is_taken_and_no_other(self, tmp_path):
        config = {"architecture": "efficientformer_l1", "crop_pct": 0.9, "crop_mode": None, "input_size": [3, 52, 52]}
        path = beside(tmp_path, "timm", config=config)  # 2x2 at the end, as for 64
        manifest = load_named(str(path), str(path))[1]
        assert (manifest.spec.input_size, manifest.preprocess.input_size) == ((52, 52), (52, 52))
        assert manifest.preprocess.resize_size == 57
        config["input_size"] = [3, 96, 96]
        beside(tmp_path, "timm", config=config)
        with pytest.raises(CheckpointError, match="are for another input size; expected 64x64; found 96x96"):
            load_named(str(path), str(path))

    def test_names_by_number(self, tmp_path):
        names = {str(number): name for number, name in enumerate(PETS)}
        path = beside(tmp_path, "timm", config={"architecture": "efficientformer_l1", "label_names": names})
        assert load_named(str(path), str(path))[1].labels == PETS

    def test_names_of_another_number_of_classes_are_left_out(self, tmp_path):
        path = beside(
            tmp_path,
            "timm",
            config={"architecture": "efficientformer_l1", "input_size": [3, 64, 64], "label_names": ["cat", "dog"]},
        )
        with pytest.warns(WeightsWarning, match="names of 2 classes are left out: the network has 3"):
            assert load_named(str(path), str(path))[1].labels == ()

    @pytest.mark.parametrize(
        "config", [{"architecture": "resnet18", "label_names": ["x"] * 3, "crop_pct": 9}, [], {"architecture": 3}]
    )
    def test_a_configuration_of_something_else_is_not_touched(self, config, tmp_path):
        path = beside(tmp_path, "timm", config=config)
        assert read_beside(path, "timm", SPEC).files == ()
        assert load_named(str(path), str(path))[1].preprocess.resize_size == 64 * 235 // 224

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ("{", "No valid JSON in config.json"),
            ({"crop_mode": "border"}, "No such crop here; expected crop_mode center, of a square; found 'border'"),
            ({"crop_pct": 0}, "Illegal crop_pct"),
            (
                {"input_size": [3, 52, 60]},
                "No such crop here; expected crop_mode center, of a square; found 'center' of 52x60",
            ),
            ({"interpolation": "random"}, "Illegal interpolation"),
            ({"input_size": "large"}, "Illegal input"),
            ({"mean": [1, 2]}, "Illegal normalisation"),
            ({"label_names": [1, 2, 3]}, "Illegal class names"),
            ({"label_names": {"0": "a", "2": "b"}}, "The classes are not numbered"),
        ],
    )
    def test_what_cannot_be_had_is_an_error_that_names_the_file(self, config, said, tmp_path):
        config = config if isinstance(config, str) else {"architecture": "efficientformer_l1", **config}
        path = beside(tmp_path, "timm", config=config)
        with pytest.raises(CheckpointError, match=f"^config.json beside model.safetensors: {said}"):
            load_named(str(path), str(path))


class TestTransformers:
    CONFIG = {"model_type": "efficientformer", "id2label": dict(enumerate(PETS))}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("processor", "expected"),
        [
            ({"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 64}}, ("short_edge", 80, "bicubic")),
            ({"size": {"shortest_edge": 72}, "crop_size": 64, "resample": 2}, ("short_edge", 72, "bilinear")),
            ({"size": {"height": 64, "width": 64}, "do_center_crop": False}, ("squash", 0, "bicubic")),
            ({"size": 64, "crop_size": 64, "do_center_crop": None}, ("squash", 0, "bicubic")),
        ],
    )
    def test_processor_and_names(self, processor, expected, tmp_path):
        mean = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
        path = beside(tmp_path, "transformers", config=self.CONFIG, preprocessor_config={**mean, **processor})
        manifest = load_named(str(path), str(path))[1]
        said = manifest.preprocess
        assert (said.resize, said.resize_size, said.interpolation) == expected
        assert (said.mean, said.std, said.crop_rounding) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "floor")
        assert manifest.labels == PETS
        assert manifest.provenance["described_by"] == "config.json, preprocessor_config.json"

    def test_no_normalisation(self, tmp_path):
        path = beside(tmp_path, "transformers", preprocessor_config={"do_normalize": False, "size": 64})
        said = load_named(str(path), str(path))[1].preprocess
        assert (said.mean, said.std) == ((0, 0, 0), (1, 1, 1))

    def test_a_processor_beside_the_configuration_of_something_else_is_not_touched(self, tmp_path):
        files = {"config": {"model_type": "resnet"}, "preprocessor_config": {"do_rescale": False}}
        assert read_beside(beside(tmp_path, "transformers", **files), "transformers", SPEC).files == ()

    def test_stand_ins_are_no_names(self, tmp_path):
        config = {**self.CONFIG, "id2label": {number: f"LABEL_{number}" for number in range(3)}}
        path = beside(tmp_path, "transformers", config=config)
        assert load_named(str(path), str(path))[1].labels == ()

    @pytest.mark.parametrize(
        ("processor", "said"),
        [
            ({"do_rescale": False}, "No such preprocessing here"),
            ({"rescale_factor": 1.0}, "No such preprocessing here"),
            ({"do_resize": "yes"}, "Illegal do_resize"),
            ({"size": {"height": 70, "width": 70}, "crop_size": 64}, "No such resize here"),
            ({"size": {"longest_edge": 70}}, "Illegal size"),
            ({"size": {"shortest_edge": "64"}}, "Illegal resize_size"),
            ({"resample": 17}, "Illegal interpolation"),
        ],
    )
    def test_what_cannot_be_had(self, processor, said, tmp_path):
        path = beside(tmp_path, "transformers", preprocessor_config=processor)
        with pytest.raises(CheckpointError, match=f"^preprocessor_config.json beside model.safetensors: {said}"):
            load_named(str(path), str(path))


def test_imagenet_by_any_name_is_imagenet():
    ours = label_names("imagenet1k")
    assert known_labels(synsets()) == ours
    assert known_labels(tuple(label.partition(",")[0] for label in ours)) == ours
    mine = tuple(f"part {number}" for number in range(1000))
    assert known_labels(mine) == mine


class TestMmpretrain:
    @staticmethod
    def checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch, meta: dict[str, object], **how: object) -> None:
        """Write what mmengine's runner writes: its log holds numpy arrays, numbers and its own methods."""

        class HistoryBuffer:
            def __init__(self) -> None:
                self.history = np.ones(3)

            def mean(self) -> None: ...

            def __getstate__(self) -> dict[str, object]:
                return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}

        module = types.ModuleType("mmengine.logging.history_buffer")
        module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
        HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
        HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
        for name in ("mmengine", "mmengine.logging", module.__name__):
            monkeypatch.setitem(sys.modules, name, module)
        log = {"log_scalars": {"loss": HistoryBuffer()}, "runtime_info": {"loss": np.float64(2), "dir": Path("x")}}
        state = from_ours(STATE, "mmpretrain", SPEC)
        torch.save({"meta": meta, "state_dict": state, "message_hub": log}, path, **how)
        monkeypatch.undo()  # who reads it need not have mmengine

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("meta", [{"dataset_meta": {"classes": PETS}}, {"CLASSES": list(PETS)}])
    def test_training_checkpoints_are_read_with_their_classes(self, meta, zipped, tmp_path, monkeypatch):
        path = tmp_path / "epoch_3.pth"
        self.checkpoint(path, monkeypatch, meta, _use_new_zipfile_serialization=zipped)
        checkpoint, manifest = load_named(str(path), str(path))
        assert manifest.labels == PETS
        assert all(torch.equal(checkpoint.state[name], tensor) for name, tensor in STATE.items())

    def test_what_is_written_for_mmpretrain_holds_the_classes(self, tmp_path):
        save_foreign(tmp_path / "a.pth", STATE, SPEC, "mmpretrain", PETS)
        held = torch.load(tmp_path / "a.pth", weights_only=True)
        assert held["meta"] == {"dataset_meta": {"classes": list(PETS)}}
        assert load_checkpoint(tmp_path / "a.pth").labels == PETS

    @pytest.mark.parametrize("meta", [{"dataset_meta": {"classes": 3}}, {"CLASSES": [1, 2, 3]}, {"dataset_meta": None}])
    def test_what_are_no_names_is_left_out(self, meta, tmp_path, monkeypatch):
        self.checkpoint(tmp_path / "a.pth", monkeypatch, meta)
        assert load_checkpoint(tmp_path / "a.pth").labels == ()

    def test_attributes_that_hide_methods_change_nothing(self, tmp_path):
        class Shadowed(OrderedDict):
            def __reduce__(self) -> tuple[object, ...]:
                return OrderedDict, (), {"get": torch.device, "items": torch.device}, None, iter(dict.items(self))

        meta = Shadowed(dataset_meta=Shadowed(classes=PETS))
        torch.save({"meta": meta, "state_dict": from_ours(STATE, "mmpretrain", SPEC)}, tmp_path / "a.pth")
        assert load_checkpoint(tmp_path / "a.pth").labels == PETS

    def test_what_stands_for_objects_does_nothing(self, tmp_path):
        """A pickle may ask for getattr, but gets nothing of what it asks it for."""

        class Attack:
            def __reduce__(self) -> tuple[object, ...]:
                return getattr, (torch.device, "index")

        torch.save({"state_dict": from_ours(STATE, "mmpretrain", SPEC), "x": Attack()}, tmp_path / "a.pth")
        load_checkpoint(tmp_path / "a.pth")
        torch.save({"state_dict": Attack()}, tmp_path / "b.pth")
        with pytest.raises(CheckpointError, match="no state dict"):
            load_checkpoint(tmp_path / "b.pth")
