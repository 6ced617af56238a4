"""The architecture spec: legal networks round-trip, illegal ones are refused with the legal values named."""

import json

import pytest

from efficientformer.spec.arch import ArchSpec, AttentionSpec, BlockSpec, StageSpec, load_json
from efficientformer.spec.errors import InputSizeError, SpecError
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.spec.variants import VARIANTS, v1_spec, v2_spec

SLIMMED = {
    "no MB3D at all": v1_spec((16, 32, 48, 64), (1, 1, 2, 2), 0, input_size=64),
    "MB3D in stage 3": v1_spec((16, 32, 48, 64), (1, 1, 3, 2), (2, 1), input_size=64),
    "stage without blocks": v1_spec((16, 32, 48, 64), (0, 1, 0, 2), 1, input_size=64),
    "own expansions": v2_spec((16, 32, 48, 64), ((2,), (1.5, 3), (4, 2.5), (3, 3)), 1, input_size=64),
    "rectangle": v1_spec((16, 32, 48, 64), (1, 1, 1, 1), 1, input_size=(96, 64)),
    "grey, 32 pixels": v1_spec((16, 32, 48, 64), (1, 1, 1, 1), 1, input_size=32, in_chans=1, stem_stride=1),
    "stem of stride 2": v2_spec((16, 32, 48, 64), ((4,),) * 4, 1, input_size=32, stem_stride=2, stage3_stride=2),
}
SPECS = {**VARIANTS, **SLIMMED}


@pytest.mark.parametrize("name", SPECS)
def test_spec_round_trips_through_json(name):
    spec = SPECS[name]
    assert ArchSpec.from_json(spec.to_json()) == spec
    assert hash(ArchSpec.from_json(spec.to_json())) == hash(spec)
    assert ArchSpec.from_json(json.dumps({"name": name, "spec": spec.to_dict()})) == spec  # as `info --json` prints it


def _edited(**changes):
    data = json.loads(VARIANTS["efficientformer_l1"].to_json())
    for path, value in changes.items():
        target = data
        *parents, last = path.split("__")
        for parent in parents:
            target = target[int(parent) if parent.isdigit() else parent]
        target[int(last) if last.isdigit() else last] = value
    return data


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"family": "v3"}, "'v1', 'v2'"),
        ({"schema": 2}, "one of 1"),
        ({"colour": 1}, "Unknown field 'colour'"),
        ({"num_clases": 10}, "Did you mean 'num_classes'"),
        ({"num_classes": 0}, "from 1 to 1000000"),
        ({"num_classes": True}, "whole number"),
        ({"num_classes": 10**30}, "from 1 to 1000000"),
        ({"in_chans": "3"}, "whole number"),
        ({"stem_stride": 3}, "one of 1, 2, 4"),
        ({"distilled": 1}, "True, False"),
        ({"input_size": [224]}, "height and width"),
        ({"input_size": [16, 224]}, "at least 32 pixels"),
        ({"stages__0__width": -1}, "from 2 to 8192"),
        ({"stages__0__embedding": "conv"}, "'stem'"),
        ({"stages__1__embedding": "attn"}, "'conv'"),
        ({"stages__0__blocks__0__kind": "ffn"}, "v1 network"),
        ({"stages__0__blocks__0__kind": "mb3d"}, "stages 3 and 4"),
        ({"stages__3__blocks__0__kind": "mb3d"}, "back from 3D to 4D"),
        ({"stages__0__blocks__0__stride": 2}, "no stride"),
        ({"stages__0__blocks__0__expansion": float("nan")}, "number from"),
        ({"stages__0__blocks": "mb4d"}, "list of at most"),
        ({"stages__0__blocks": [{}] * 300}, "300 entries"),
        ({"stages": []}, "4 StageSpecs"),
        ({"attention": {"num_heads": 0}}, "from 1 to 256"),
    ],
)
def test_illegal_spec_is_refused_and_the_legal_values_are_named(changes, says):
    with pytest.raises(SpecError, match=says):
        ArchSpec.from_dict(_edited(**changes))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "[" * 100_000, '{"family": "v1"}'])
def test_text_that_is_no_spec_is_a_spec_error(text):
    with pytest.raises(SpecError):
        ArchSpec.from_json(text)


def test_a_key_given_twice_is_a_spec_error_that_names_it():
    with pytest.raises(SpecError, match=r"No valid JSON in the plan; found the key 'epochs' twice\."):
        load_json("the plan", '{"final": [{"epochs": 3, "lr": 1, "epochs": 3}]}')


@pytest.mark.parametrize(
    ("name", "size", "legal"),
    [
        ("efficientformer_l1", (224, 224), True),
        ("efficientformer_l1", (200, 333), True),
        ("efficientformer_l1", (31, 224), False),
        ("efficientformerv2_s0", (256, 288), True),
        ("efficientformerv2_s0", (240, 240), False),
        ("efficientformerv2_s0", (224, 240), False),
        ("efficientformer_cifar10", (32, 32), True),
        ("efficientformer_cifar10", (40, 36), True),
        ("efficientformer_cifar10", (7, 32), False),
    ],
)
def test_legal_input_sizes(name, size, legal):
    spec = VARIANTS[name]
    assert spec.accepts(size) is legal
    if legal:
        assert spec.with_input_size(size).input_size == size
    else:
        with pytest.raises(InputSizeError) as caught:
            spec.with_input_size(size)
        nearest = spec.nearest_size(size)
        assert spec.accepts(nearest)
        assert "x".join(map(str, nearest)) in str(caught.value)


def test_grids_halve_rounding_up():
    assert VARIANTS["efficientformer_l1"].with_input_size((225, 200)).grids == ((57, 50), (29, 25), (15, 13), (8, 7))


def test_values_are_frozen_and_checked_when_built_by_hand():
    with pytest.raises(AttributeError):
        BlockSpec("mb4d").kind = "mb3d"
    for bad in (lambda: StageSpec(16, ("mb4d",)), lambda: ArchSpec("v1", ()), lambda: AttentionSpec(key_dim=0)):
        with pytest.raises(SpecError):
            bad()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"resize_size": 100}, "from 224"),
        ({"resize": "pad"}, "short_edge"),
        ({"resize": "squash"}, "from 0 to 0"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"mean": (0.5, 0.5)}, "means"),
        ({"std": (0.0, 1, 1)}, "std"),
        ({"std": (float("inf"), 1, 1)}, "std"),
        ({"exif": "yes"}, "exif"),
        ({"input_size": (0, 4)}, "input side"),
    ],
)
def test_illegal_preprocessing_is_refused(changes, says):
    with pytest.raises(SpecError, match=says):
        PreprocessSpec(**changes)


def test_preprocessing_round_trips_and_grows_with_the_input():
    spec = PreprocessSpec(resize_size=235, crop_rounding="floor")
    assert PreprocessSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.with_input_size(448).resize_size == 470
    assert PreprocessSpec(resize="squash", resize_size=0).with_input_size(64).resize_size == 0


def test_manifest_round_trips_and_its_parts_must_agree():
    spec = VARIANTS["efficientformer_cifar10"]
    preprocess = PreprocessSpec(input_size=(32, 32), resize_size=32)
    labels = tuple("abcdefghij")
    manifest = Manifest(spec, preprocess, labels, {"top1": 91.0}, {"source": "test"})
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.label(2) == "c"
    assert Manifest(spec, preprocess).label(2) == "2"
    assert Manifest(SPECS["grey, 32 pixels"], preprocess.grey()).preprocess.mode == "L"
    other_size, other_channels = {"preprocess": PreprocessSpec()}, {"preprocess": preprocess.grey()}
    for bad in ({"labels": labels[:9]}, other_size, other_channels, {"metrics": {"top1": "91"}}):
        with pytest.raises(SpecError):
            Manifest(**{"spec": spec, "preprocess": preprocess, **bad})
