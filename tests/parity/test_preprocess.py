"""Preprocessing: the same bytes as torchvision, timm and transformers give, and the limits of our own."""

import functools
import os
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from efficientformer.runtime import preprocess as module
from efficientformer.runtime.image import decode
from efficientformer.runtime.preprocess import normalise, preprocess, preprocess_batch, resize_crop
from efficientformer.spec.errors import ImageError
from efficientformer.spec.preprocess import INTERPOLATIONS, PreprocessSpec

SPEC = PreprocessSpec()
OFFICIAL, TIMM, MMPRETRAIN = SPEC, PreprocessSpec(resize_size=235), PreprocessSpec(resize_size=248)
WHITE = (np.float32(1) - np.float32(SPEC.mean)) / np.float32(SPEC.std)
SQUASH = PreprocessSpec(resize="squash", resize_size=0)
# The sizes where half-even and floor crop offsets differ (fidelity notes), enlargement, lines, points, no-ops.
SIZES = [(343, 256), (1600, 1067), (150, 113), (7, 5), (1, 1), (1, 300), (300, 1), (225, 224), (224, 225), (256, 256)]
SIZES += [(500, 375), (375, 500), (224, 224), (235, 235), (640, 427), (2, 511)]


def photo(width, height, seed=0):
    """Return smooth colour with some noise, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(small).astype(int) + rng.integers(-40, 41, (height, width, 3)), 0, 255).astype(np.uint8)


@functools.cache
def encoded(width, height, fmt):
    out = BytesIO()
    Image.fromarray(photo(width, height)).save(out, fmt)
    return out.getvalue()


def torchvision_transform(spec):
    """Return torchvision's transform on Pillow images for ``spec``: the uint8 stage and the float stage."""
    transforms = pytest.importorskip("torchvision.transforms")
    filters = transforms.InterpolationMode
    size = list(spec.input_size) if spec.resize == "squash" else spec.resize_size
    stages = [transforms.Resize(size, filters[spec.interpolation.upper()]), transforms.CenterCrop(spec.input_size)]
    values = transforms.Compose([transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)])
    return transforms.Compose(stages), values


def assert_equals_torchvision(data, spec):
    """Compare both stages to the last bit, starting from the encoded file."""
    crop, values = torchvision_transform(spec)
    theirs = crop(Image.open(BytesIO(data)).convert("RGB"))
    ours = decode(data)
    np.testing.assert_array_equal(np.asarray(resize_crop(ours, spec)), np.asarray(theirs))
    np.testing.assert_array_equal(preprocess(ours, spec), values(theirs).numpy())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fmt", ["JPEG", "PNG"])
def test_equals_torchvision(fmt, size):
    for spec in (OFFICIAL, TIMM, MMPRETRAIN, SQUASH):
        assert_equals_torchvision(encoded(*size, fmt), spec)


def test_equals_torchvision_on_random_sizes():
    rng = np.random.default_rng(11)
    for _ in range(60):
        width, height = (int(2 ** rng.uniform(2, 9.5)) for _ in range(2))
        input_size = tuple(int(side) for side in rng.integers(1, 200, 2))
        spec = PreprocessSpec(
            input_size,
            resize_size=max(input_size) + int(rng.integers(0, 60)),
            interpolation=str(rng.choice(INTERPOLATIONS)),
        )
        assert_equals_torchvision(encoded(width, height, "PNG"), spec)


@pytest.mark.parametrize(
    ("crop_pct", "spec"), [(0.95, TIMM), (0.875, OFFICIAL), (1.0, PreprocessSpec(resize_size=224))]
)
def test_equals_timm(crop_pct, spec):
    pytest.importorskip("timm")
    from timm.data import create_transform

    transform = create_transform(
        224, is_training=False, interpolation="bicubic", crop_pct=crop_pct, mean=spec.mean, std=spec.std
    )
    for size in SIZES:
        data = encoded(*size, "JPEG")
        theirs = transform(Image.open(BytesIO(data)).convert("RGB")).numpy()
        np.testing.assert_allclose(preprocess(decode(data), spec), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_equals_transformers_formula(size):
    """The crop of transformers' image_transforms.center_crop: ``top = (height - crop) // 2``."""
    spec = PreprocessSpec(crop_rounding="floor")
    picture = decode(encoded(*size, "PNG"))
    short, long = sorted(size)
    new = {short: 256, long: int(256 * long / short)} if short != long else {short: 256}
    resized = np.asarray(picture.resize((new[size[0]], new[size[1]]), Image.Resampling.BICUBIC))
    top, left = ((side - 224) // 2 for side in resized.shape[:2])
    pixels = resized[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(np.asarray(resize_crop(picture, spec)), pixels)
    want = ((pixels / 255 - spec.mean) / spec.std).transpose(2, 0, 1)
    np.testing.assert_allclose(preprocess(picture, spec), want, rtol=0, atol=1e-6)


def test_the_crop_rules_differ_where_the_notes_say():
    """343x256, 1600x1067 and 150x113 are off by one pixel between the two rules, 500x375 is not."""
    floor = PreprocessSpec(crop_rounding="floor")
    for size, differs in [((343, 256), True), ((1600, 1067), True), ((150, 113), True), ((500, 374), False)]:
        picture = Image.fromarray(photo(*size))
        same = np.array_equal(np.asarray(resize_crop(picture, SPEC)), np.asarray(resize_crop(picture, floor)))
        assert same is not differs, size


@pytest.mark.parametrize(
    ("source", "spec", "resized"),
    [
        ((500, 375), SPEC, (341, 256)),
        ((375, 500), SPEC, (256, 341)),
        ((256, 256), SPEC, (256, 256)),
        ((7, 5), SPEC, (358, 256)),
        ((1, 1), SPEC, (256, 256)),
        ((500, 375), PreprocessSpec(resize_size=248), (330, 248)),
        ((500, 375), PreprocessSpec(resize_size=224), (298, 224)),
        ((500, 375), PreprocessSpec(input_size=(96, 224), resize_size=224), (298, 224)),
        ((500, 375), PreprocessSpec(input_size=(96, 224), resize="squash", resize_size=0), (224, 96)),
        ((1, 60000), PreprocessSpec(resize="squash", resize_size=0), (224, 224)),
    ],
)
def test_sizes(source, spec, resized):
    picture = Image.fromarray(photo(*source))
    cropped = resize_crop(picture, spec)
    assert cropped.size == spec.input_size[::-1]
    whole = picture.resize(resized, Image.Resampling.BICUBIC)
    left, top = (round((have - want) / 2) for have, want in zip(resized, cropped.size, strict=True))
    box = (left, top, left + cropped.width, top + cropped.height)
    np.testing.assert_array_equal(np.asarray(cropped), np.asarray(whole.crop(box)))


@pytest.mark.parametrize(("rounding", "offsets"), [("half_even", [0, 2, 2]), ("floor", [0, 1, 2])])
def test_odd_margins(rounding, offsets):
    """Margins of 1, 3 and 5 pixels: half-even leaves 0, 2, 2 at the left, transformers' floor 0, 1, 2."""
    columns = np.tile(np.arange(40, dtype=np.uint8), (8, 1))
    for margin, offset in zip((1, 3, 5), offsets, strict=True):
        spec = PreprocessSpec((8, 8), resize_size=8, crop_rounding=rounding, mean=(0.5,), std=(0.5,))
        assert np.asarray(resize_crop(Image.fromarray(columns[:, : 8 + margin]), spec))[0, 0] == offset


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_interpolations(interpolation):
    spec = PreprocessSpec((32, 32), resize_size=32, interpolation=interpolation)
    picture = Image.fromarray(photo(43, 43))
    want = picture.resize((32, 32), getattr(Image.Resampling, interpolation.upper()))
    np.testing.assert_array_equal(np.asarray(resize_crop(picture, spec)), np.asarray(want))


def test_values_layout_and_batches():
    pictures = [Image.fromarray(photo(90, 70, seed)) for seed in range(3)]
    spec = PreprocessSpec((48, 64), resize_size=66)
    batch = preprocess_batch(pictures, spec)
    assert batch.shape == (3, 3, 48, 64)
    assert batch.dtype == np.float32
    assert batch.flags.c_contiguous
    for row, picture in zip(batch, pictures, strict=True):
        single = preprocess(picture, spec)
        assert single.flags.c_contiguous
        np.testing.assert_array_equal(single, row)
        pixels = np.asarray(resize_crop(picture, spec)).astype(np.float64)
        want = ((pixels / 255 - spec.mean) / spec.std).transpose(2, 0, 1)
        np.testing.assert_allclose(single, want, rtol=0, atol=1e-6)
    assert preprocess_batch([], spec).shape == (0, 3, 48, 64)


def test_grey_networks():
    spec = PreprocessSpec((32, 32), resize_size=32, mean=(0.25,), std=(0.5,))
    picture = decode(encoded(61, 43, "PNG"), mode=spec.mode)
    got = preprocess(picture, spec)
    assert got.shape == (1, 32, 32)
    np.testing.assert_allclose(got[0], (np.asarray(resize_crop(picture, spec)) / 255 - 0.25) / 0.5, atol=1e-6)


def test_a_wrong_mode_is_refused():
    for mode in ("RGBA", "L", "P", "I", "F", "1", "CMYK"):
        picture = Image.new(mode, (300, 300))
        with pytest.raises(ImageError, match="mode RGB"):
            preprocess(picture, SPEC)


def test_only_cropped_pictures_are_normalised():
    """448x112 has as many pixels as 224x224: reshaped without a check it would be garbage."""
    np.testing.assert_array_equal(normalise([Image.new("RGB", (224, 224), "white")], SPEC)[0, :, 0, 0], WHITE)
    for size, mode in [((448, 112), "RGB"), ((225, 224), "RGB"), ((224, 224), "L")]:
        with pytest.raises(ImageError, match="resize_crop"):
            normalise([Image.new(mode, size)], SPEC)


def test_elongated_pictures_are_refused_before_they_grow(monkeypatch):
    for size in ((1, 65535), (65535, 1)):
        with pytest.raises(ImageError, match="elongated"):
            preprocess(Image.new("RGB", size), SPEC)
    with pytest.raises(ImageError, match="no side above"):
        preprocess(Image.new("RGB", (module.MAX_SIDE + 1, 1)), PreprocessSpec(resize="squash", resize_size=0))
    with pytest.raises(ImageError, match="elongated"):  # rows first: 8192 x 60000 on the way to 8192 x 8192
        preprocess(Image.new("RGB", (1, 60000)), PreprocessSpec((8192, 8192), resize="squash", resize_size=0))
    monkeypatch.setattr(module, "MAX_RESIZED_PIXELS", 1 << 20)
    preprocess(Image.new("RGB", (1, 16)), SPEC)
    with pytest.raises(ImageError, match="256 x 4352"):
        preprocess(Image.new("RGB", (1, 17)), SPEC)


def test_torch_is_not_imported():
    code = "import sys, efficientformer.runtime.image, efficientformer.runtime.inputs; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
