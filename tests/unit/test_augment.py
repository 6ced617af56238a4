"""Augmentation: functions of seeds, in range, and doing what their names say."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from efficientformer.data.augment import (
    Augmentation,
    Normaliser,
    SampleAugment,
    cut_squares,
    erase,
    pad_images,
    posterize,
    shift_flip,
    take_colours,
)  # fmt: skip
from efficientformer.data.draws import mix
from efficientformer.spec.errors import SpecError
from efficientformer.spec.preprocess import PreprocessSpec

PREPROCESS = PreprocessSpec(input_size=(8, 8), resize_size=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
PLAIN = Augmentation(
    crop="pad", crop_scale=(0.5, 1.0), padding=2, hflip=0.0, vflip=0.0, randaugment="", color_jitter=0.0,
    interpolation="bilinear", erasing=0.0, cutout=0, grayscale=0.0,
)  # fmt: skip


def seeds(count, start=0):
    return mix(start, np.arange(count))


def numbered(count=64, size=8):
    """Images whose pixels say where they come from: channel 0 the row, 1 the column, 2 the picture."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = torch.stack([y, x, torch.zeros_like(x)]).byte()[None].repeat(count, 1, 1, 1)
    images[:, 2] = torch.arange(count).byte()[:, None, None]
    return images


def test_padding_is_a_reflection():
    images = numbered(3)
    padded = pad_images(images, 2)
    assert padded.shape == (3, 3, 12, 12)
    assert torch.equal(padded[:, :, 2:-2, 2:-2], images)
    assert torch.equal(padded[0, 0, :, 2], torch.tensor([2, 1, 0, 1, 2, 3, 4, 5, 6, 7, 6, 5]).byte())
    assert pad_images(images, 0) is images


def test_windows_are_whole_shifted_and_cover_every_offset():
    padded = pad_images(numbered(400), 2)
    out = shift_flip(padded, seeds(400), PLAIN)
    assert out.shape == (400, 3, 8, 8)
    corners = set()
    for index in range(400):
        match = [
            (t, left)
            for t in range(5)
            for left in range(5)
            if torch.equal(out[index], padded[index, :, t : t + 8, left : left + 8])
        ]
        assert match, "a window that is no part of its picture"
        corners |= set(match[:1])
    assert len(corners) == 25


@pytest.mark.parametrize(("name", "axis"), [("hflip", 2), ("vflip", 1)])
def test_flips(name, axis):
    augmentation = dataclasses.replace(PLAIN, padding=0, **{name: 1.0})
    images = numbered(5)
    assert torch.equal(shift_flip(images, seeds(5), augmentation), images.flip(axis + 1))
    half = dataclasses.replace(augmentation, **{name: 0.5})
    out = shift_flip(numbered(1000 // 4), seeds(250), half)
    flipped = sum(not torch.equal(a, b) for a, b in zip(out, numbered(250), strict=True))
    assert 90 < flipped < 160


def test_the_same_seeds_give_the_same_in_any_company():
    padded = pad_images(numbered(32), 2)
    augmentation = dataclasses.replace(PLAIN, hflip=0.5, cutout=3, erasing=0.5, grayscale=0.5)
    normaliser, s = Normaliser(PREPROCESS, augmentation), seeds(32)
    whole = normaliser(shift_flip(padded, s, augmentation), s, cut=True)
    half = normaliser(shift_flip(padded[1::2], s[1::2], augmentation), s[1::2], cut=True)
    assert torch.equal(whole[1::2], half)
    assert not torch.equal(whole, normaliser(shift_flip(padded, seeds(32, 1), augmentation), seeds(32, 1), cut=True))


def test_normalising_equals_the_preprocessing_of_prediction():
    from efficientformer.runtime.preprocess import normalise

    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    expected = normalise([Image.fromarray(p) for p in pixels], PREPROCESS)
    found = Normaliser(PREPROCESS, None)(torch.from_numpy(pixels).permute(0, 3, 1, 2), seeds(4), cut=True)
    assert found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(found.numpy(), expected, atol=3e-6)


def test_cutout_takes_a_square_from_every_other_picture():
    images = torch.ones(2000, 3, 8, 8)
    cut_squares(images, seeds(2000), 3)
    holes = (images == 0).sum((1, 2, 3))
    assert set(holes.tolist()) == {0, 27}
    assert 900 < (holes > 0).sum() < 1100
    assert (images == 0).any(0).all(), "every place is hit"


def test_erasing_is_a_rectangle_of_noise_as_often_as_asked():
    images = torch.full((1000, 3, 16, 16), 7.0)
    erase(images, seeds(1000), 0.25)
    hit = (images != 7).any(1).flatten(1).any(1)
    assert 200 < hit.sum() < 300
    for mask in (images[hit] != 7).any(1)[:50]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert mask.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    noise = images[(images != 7)]
    assert abs(float(noise.mean())) < 0.05
    assert 0.9 < float(noise.std()) < 1.1


def test_colours_are_taken_as_often_as_asked_and_grey_is_pillows():
    pixels = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 3), np.uint8)
    before = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    images = before.clone(memory_format=torch.channels_last)
    take_colours(images, seeds(400), 0.25)
    changed = [index for index in range(400) if not torch.equal(images[index], before[index])]
    assert 70 < len(changed) < 130
    for index in changed:
        grey = np.asarray(Image.fromarray(pixels[index]).convert("L"), np.float32)
        for channel in images[index].numpy():
            np.testing.assert_allclose(channel, grey, atol=1)


def test_grey_pictures_have_no_colours_to_take():
    images = torch.rand(4, 1, 8, 8)
    before = images.clone()
    take_colours(images, seeds(4), 1.0)
    assert torch.equal(images, before)


def test_nothing_is_cut_in_the_refinement():
    augmentation = dataclasses.replace(PLAIN, cutout=4, erasing=1.0)
    images = numbered(16)
    assert torch.equal(
        Normaliser(PREPROCESS, augmentation)(images, seeds(16), cut=False),
        Normaliser(PREPROCESS, None)(images, seeds(16), cut=True),
    )


def test_per_picture_augmentation_follows_its_seed():
    augmentation = dataclasses.replace(PLAIN, crop="rrc", hflip=0.5, randaugment="rand-m9-mstd0.5-inc1")
    augment = SampleAugment(augmentation, PREPROCESS)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    first, again, other = augment(image, 5), augment(image, 5), augment(image, 6)
    assert first.shape == (3, 8, 8)
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert (first != other).any()


def test_grey_pictures():
    grey = PreprocessSpec(input_size=(8, 8), resize_size=8, mean=(0.5,), std=(0.5,))
    augment = SampleAugment(dataclasses.replace(PLAIN, crop="rrc", color_jitter=0.4), grey)
    assert augment(Image.new("L", (20, 20), 90), 1).shape == (1, 8, 8)


def test_the_strongest_policy_never_fails():
    """Posterize down to no bits at all is black, not an error (Pillow 13 refuses it)."""
    augmentation = dataclasses.replace(PLAIN, crop="rrc", randaugment="rand-m10-n6-mstd3-inc1")
    augment = SampleAugment(augmentation, PREPROCESS)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8))
    for seed in range(300):
        augment(image, seed)
    assert not np.asarray(posterize(image, 0)).any()
    assert posterize(image, 8) is image
    assert (np.asarray(posterize(image, 3)) == np.asarray(image) & 0b11100000).all()


def test_unknown_policy_and_illegal_combination():
    with pytest.raises(SpecError, match="no such policy"):
        SampleAugment(dataclasses.replace(PLAIN, crop="rrc", randaugment="rand-m9.5"), PREPROCESS)
    with pytest.raises(SpecError, match="Illegal randaugment"):
        dataclasses.replace(PLAIN, crop="rrc", randaugment="magic-m9")
    with pytest.raises(SpecError, match="Illegal randaugment"):
        dataclasses.replace(PLAIN, crop="rrc", randaugment="rand-tfoo")
    with pytest.raises(SpecError, match="one by one"):
        dataclasses.replace(PLAIN, randaugment="rand-m9")
