"""The preprocessing on the zoo's cards is the one each project evaluates with."""

import math

import numpy as np
import pytest
import timm
from PIL import Image

from efficientformer.runtime.preprocess import preprocess
from efficientformer.spec.preprocess import IMAGENET_MEAN, IMAGENET_STD
from efficientformer.spec.zoo import LAYOUT_PREPROCESS, cards

TIMM_NAMES = [source.alias for card in cards() for source in card.sources if source.name == "timm"]


def test_every_published_network_has_a_timm_source():
    assert len(TIMM_NAMES) == 7


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_timms_own_transform_gives_the_same_tensor(name):
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    assert math.floor(224 / config["crop_pct"]) == LAYOUT_PREPROCESS["timm"].resize_size
    transform = timm.data.create_transform(**config, is_training=False)
    pixels = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
    image = Image.fromarray(pixels)
    np.testing.assert_allclose(preprocess(image, LAYOUT_PREPROCESS["timm"]), transform(image).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "short_edge", "rounding", "exif"),
    [
        ("snap", 256, "half_even", False),  # the authors' util/datasets.py
        ("mmpretrain", 248, "half_even", True),  # imagenet_bs128_poolformer_small_224.py, decoded by cv2
        ("transformers", 256, "floor", False),  # the processor its conversion script wrote
    ],
)
def test_the_others_as_their_sources_say(layout, short_edge, rounding, exif):
    spec = LAYOUT_PREPROCESS[layout]
    assert (spec.resize_size, spec.crop_rounding, spec.exif) == (short_edge, rounding, exif)
    assert (spec.resize, spec.interpolation, spec.input_size) == ("short_edge", "bicubic", (224, 224))
    assert (spec.mean, spec.std) == (IMAGENET_MEAN, IMAGENET_STD)
