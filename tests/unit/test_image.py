"""Decoding: every kind of picture gives Pillow's pixels, and what is no picture gives an ImageError that says why."""

import os
import struct
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps, features

from efficientformer.runtime import image as module
from efficientformer.runtime.image import decode, in_turn_if_large
from efficientformer.spec.errors import ImageError, SpecError
from efficientformer.spec.preprocess import PreprocessSpec

SPEC = PreprocessSpec()


def photo(width=61, height=43, seed=0):
    """Return smooth colour with some noise, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(small).astype(int) + rng.integers(-9, 10, (height, width, 3)), 0, 255).astype(np.uint8)


RGB = photo()
GREY = photo()[..., 0]
ALPHA = photo(seed=1)[..., 1]


def save(picture, fmt, **options):
    out = BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(out, fmt, **options)
    return out.getvalue()


def palette(transparency=None):
    picture = Image.fromarray(RGB).quantize(32)
    return save(picture, "PNG", **({} if transparency is None else {"transparency": transparency}))


def frames(fmt, **options):
    first, second = (Image.fromarray(photo(seed=seed)) for seed in (3, 4))
    return save(first, fmt, save_all=True, append_images=[second], duration=50, **options)


def rgba():
    return Image.fromarray(np.dstack([RGB, ALPHA]))


def grey_alpha():
    return Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])


def png16(colour_type, samples):
    """Return a 16-bit PNG, which Pillow writes only in grey: colour type 2 is RGB, 4 grey and alpha, 6 RGBA."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    chunks = (b"IHDR", struct.pack(">2I5B", width, height, 16, colour_type, 0, 0, 0)), (b"IDAT", zlib.compress(rows))
    body = b"".join(
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))
        for tag, data in (*chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + body


WIDE = photo(seed=5).astype(np.uint16) * 257 + 77

# label -> encoded picture; Pillow's own convert is the expectation
FILES = {
    "JPEG 4:2:0": save(RGB, "JPEG", subsampling=2),
    "JPEG 4:4:4": save(RGB, "JPEG", subsampling=0, quality=95),
    "JPEG grey": save(GREY, "JPEG"),
    "JPEG CMYK": save(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
    "JPEG progressive": save(RGB, "JPEG", progressive=True),
    "MPO": frames("MPO"),
    "PNG": save(RGB, "PNG"),
    "PNG grey": save(GREY, "PNG"),
    "PNG palette": palette(),
    "PNG palette, one transparent entry": palette(3),
    "PNG palette, transparency per entry": palette(bytes(range(0, 256, 8))),
    "PNG RGBA": save(rgba(), "PNG"),
    "PNG grey with alpha": save(grey_alpha(), "PNG"),
    "PNG 1-bit": save(Image.fromarray(GREY).convert("1"), "PNG"),
    "PNG 16-bit RGB": png16(2, WIDE),
    "PNG 16-bit RGBA": png16(6, np.dstack([WIDE, WIDE[..., :1]])),
    "PNG 16-bit grey with alpha": png16(4, WIDE[..., :2]),
    "PNG with a transparent colour": save(RGB, "PNG", transparency=tuple(map(int, RGB[0, 0]))),
    "APNG": frames("PNG"),
    "GIF": save(RGB, "GIF"),
    "GIF grey": save(GREY, "GIF"),
    "GIF animated": frames("GIF"),
    "WebP": save(RGB, "WEBP"),
    "WebP lossless": save(RGB, "WEBP", lossless=True),
    "WebP RGBA": save(rgba(), "WEBP"),
    "WebP animated": frames("WEBP", lossless=True),
    "BMP": save(RGB, "BMP"),
    "BMP palette": save(Image.fromarray(RGB).quantize(16), "BMP"),
    "BMP 1-bit": save(Image.fromarray(GREY).convert("1"), "BMP"),
    "TIFF": save(RGB, "TIFF"),
    "TIFF LZW": save(RGB, "TIFF", compression="tiff_lzw"),
    "TIFF JPEG": save(RGB, "TIFF", compression="jpeg"),
    "TIFF CMYK": save(Image.fromarray(RGB).convert("CMYK"), "TIFF"),
    "TIFF RGBA": save(rgba(), "TIFF"),
    "TIFF group 4": save(Image.fromarray(GREY).convert("1"), "TIFF", compression="group4"),
    "TIFF pages": frames("TIFF"),
    "PPM": save(RGB, "PPM"),
    "PGM": save(GREY, "PPM"),
    "PBM": save(Image.fromarray(GREY).convert("1"), "PPM"),
    "PPM plain": b"P3 2 1 9 1 2 3 4 5 6",
}
if features.check("avif"):
    FILES |= {"AVIF": save(RGB, "AVIF"), "AVIF RGBA": save(rgba(), "AVIF"), "AVIF animated": frames("AVIF")}
LOSSLESS = ("PNG", "WebP lossless", "BMP", "TIFF", "TIFF LZW", "PPM")
ANIMATED = ("APNG", "WebP animated", "TIFF pages")


def pillow(data, mode="RGB"):
    with warnings.catch_warnings(action="ignore"):
        return np.asarray(Image.open(BytesIO(data)).convert(mode))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("label", FILES)
def test_every_format_gives_what_pillow_gives(label, mode):
    got = decode(FILES[label], mode=mode)
    assert got.mode == mode
    np.testing.assert_array_equal(np.asarray(got), pillow(FILES[label], mode))


@pytest.mark.parametrize("label", LOSSLESS)
def test_lossless_formats_give_the_original(label):
    np.testing.assert_array_equal(np.asarray(decode(FILES[label])), RGB)


@pytest.mark.parametrize("label", ANIMATED)
def test_the_first_frame_counts(label):
    np.testing.assert_array_equal(np.asarray(decode(FILES[label])), photo(seed=3))


def test_alpha_is_dropped_not_composed():
    np.testing.assert_array_equal(np.asarray(decode(FILES["PNG RGBA"])), RGB)


DEEP = np.array([[0, 128, 129, 257, 32896, 65406, 65407, 65535]], np.uint16)
DEEP_FILES = {
    "PNG": save(Image.fromarray(DEEP), "PNG"),
    "TIFF": save(Image.fromarray(DEEP), "TIFF"),
    "TIFF big-endian": save(Image.fromarray(DEEP.astype(">u2")), "TIFF"),
    "PGM": b"P5 8 1 65535\n" + DEEP.astype(">u2").tobytes(),
    "PGM plain": b"P2 8 1 65535\n" + " ".join(map(str, DEEP[0])).encode(),
}


@pytest.mark.parametrize("label", DEEP_FILES)
def test_16_bit_grey_is_rescaled_where_pillow_clips(label):
    """Pillow's convert makes nearly everything white: trap 38 of the fidelity notes."""
    want = [0, 0, 1, 1, 128, 254, 255, 255]
    assert np.asarray(decode(DEEP_FILES[label], mode="L")).tolist() == [want]
    assert np.asarray(decode(DEEP_FILES[label]))[..., 2].tolist() == [want]
    assert (pillow(DEEP_FILES[label], "L") == 255).sum() > 4


@pytest.mark.parametrize(
    ("label", "data"),
    [
        ("integers", save(Image.fromarray(GREY.astype(np.int32)), "TIFF")),
        ("floats", save(Image.fromarray(GREY.astype(np.float32)), "TIFF")),
        ("floats", b"Pf 1 1 -1.0\n" + struct.pack("<f", 0.5)),
    ],
)
def test_32_bit_grey_has_no_known_range(label, data):
    with pytest.raises(ImageError, match=f"32-bit {label}"):
        decode(data)


def tiff(zero_is, bits, data):
    """Return a TIFF of one row of 4 grey pixels, which Pillow writes neither in 12 bits nor with 0 for white."""
    zero = {"white": 0, "black": 1}[zero_is]
    entries = {256: 4, 257: 1, 258: bits, 259: 1, 262: zero, 273: 110, 277: 1, 279: len(data)}
    rows = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries.items())
    directory = struct.pack("<H", len(entries)) + rows + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8) + directory + data


@pytest.mark.parametrize(
    ("zero_is", "bits", "values", "want"),
    [
        ("black", 12, [0, 2047, 1024, 4095], [0, 127, 64, 255]),
        ("black", 16, [0, 257, 32896, 65535], [0, 1, 128, 255]),
        ("white", 16, [0, 257, 32896, 65535], [255, 254, 127, 0]),
        ("white", 8, [0, 1, 128, 255], [255, 254, 127, 0]),  # Pillow sees to it
    ],
)
def test_a_tiff_says_how_deep_its_grey_is_and_whether_0_is_white(zero_is, bits, values, want):
    packed = int("".join(f"{value:012b}" for value in values), 2).to_bytes(6, "big")
    data = packed if bits == 12 else np.array(values, f"<u{bits // 8}").tobytes()
    assert np.asarray(decode(tiff(zero_is, bits, data), mode="L")).tolist() == [want]


# --- EXIF -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(fmt, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(RGB, fmt, exif=exif)
    turned = decode(data, exif=True)
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data)))))
    assert turned.size == ((43, 61) if 5 <= orientation <= 8 else (61, 43))
    np.testing.assert_array_equal(np.asarray(decode(data)), pillow(data))


def test_tiff_is_turned_once():
    """Pillow's TIFF reader turns the picture by itself, whatever ``exif`` says."""
    data = save(RGB, "TIFF", tiffinfo={0x0112: 6})
    for exif in (True, False):
        np.testing.assert_array_equal(np.asarray(decode(data, exif=exif)), np.rot90(RGB, -1))


@pytest.mark.parametrize(
    "block", [b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_unreadable_exif_counts_as_none(fmt, block):
    data = save(RGB, fmt, exif=block)
    np.testing.assert_array_equal(np.asarray(decode(data, exif=True)), pillow(data))


# --- sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["str", "Path", "bytes", "bytearray", "memoryview", "file", "pipe", "Pillow", "lazy", "array"]
)
def test_every_kind_of_source(kind, tmp_path):
    data = FILES["PNG"]
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with path.open("rb") as file, os.fdopen(_pipe(data), "rb") as pipe:
        sources = {"str": str(path), "Path": path, "bytes": data, "bytearray": bytearray(data), "file": file}
        sources |= {"memoryview": memoryview(data), "Pillow": Image.fromarray(RGB), "lazy": Image.open(path)}
        sources |= {"pipe": pipe, "array": RGB}
        got = decode(sources[kind])
    np.testing.assert_array_equal(np.asarray(got), RGB)  # after the files are closed


def _pipe(data):
    reading, writing = os.pipe()
    os.write(writing, data)  # fits into a pipe's buffer
    os.close(writing)
    return reading


def test_a_pillow_image_that_needs_nothing_is_not_copied():
    picture = Image.fromarray(RGB)
    assert decode(picture) is picture


def test_a_pillow_image_keeps_its_size_when_files_are_shrunk():
    data = save(photo(640, 480), "JPEG")
    spec = PreprocessSpec(resize_size=235)
    assert decode(data, shrink_for=spec).size == (320, 240)
    opened = Image.open(BytesIO(data))
    assert decode(opened, shrink_for=spec).size == opened.size == (640, 480)


def test_a_pillow_image_may_be_given_to_several_threads_at_once():
    data = save(photo(1600, 1200), "JPEG", quality=95)
    right = np.asarray(decode(data))
    for _ in range(3):
        opened = Image.open(BytesIO(data))
        with ThreadPoolExecutor(4) as pool:
            for each in pool.map(decode, [opened] * 4):
                np.testing.assert_array_equal(np.asarray(each), right)


@pytest.mark.parametrize("kind", [str, Path])
def test_folders_patterns_and_addresses_are_not_read_and_the_hint_says_what_does(kind, tmp_path):
    pattern = str(tmp_path / "*.jpg")
    for name, found in ((str(tmp_path), "a folder"), ("https://host/a.jpg", "an address"), (pattern, "a pattern")):
        with pytest.raises(ImageError, match=f"found {found}") as caught:
            decode(kind(name))
        assert f"classify.predict(gather([{name!r}])), with gather from efficientformer.runtime.inputs" in str(
            caught.value
        )


@pytest.mark.parametrize(
    ("array", "shape"),
    [(RGB, (43, 61)), (GREY, (43, 61)), (RGB[::-1, ::2], (43, 31)), (np.asfortranarray(RGB), (43, 61))],
)
def test_arrays(array, shape):
    got = np.asarray(decode(array))
    assert got.shape == (*shape, 3)
    np.testing.assert_array_equal(got, array if array.ndim == 3 else np.repeat(array[..., None], 3, 2))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (RGB.astype(np.float32) / 255, r"\* 255"),
        (RGB.astype(np.int64), "int64"),
        (RGB.transpose(2, 0, 1), r"transpose\(1, 2, 0\)"),
        (np.dstack([RGB, ALPHA]), r"\[\.\.\., :3\]"),
        (GREY[..., None], r"\[\.\.\., 0\]"),
        (RGB[None], r"\(1, 43, 61, 3\)"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"),
        (np.zeros((), np.uint8), r"uint8 \(\)"),
        (np.zeros(7, np.uint8), r"\(7,\)"),
    ],
)
def test_arrays_that_are_no_pictures(array, message):
    with pytest.raises(ImageError, match=message) as caught:
        decode(array)
    assert "(H, W, 3)" in str(caught.value)


# --- what cannot be decoded -----------------------------------------------------------------------------------------

RUBBISH = {
    "empty": (b"", "empty"),
    "one byte": (b"P", "Cannot decode"),
    "text": (b"hello, world", "starts with b'hello, world'"),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "DOCTYPE"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "one of JPEG, PNG"),
    "PDF": (b"%PDF-1.7 ...", "one of JPEG"),
    "ICO": (save(RGB, "ICO"), "one of JPEG"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "one of JPEG"),
    "JPEG signature": (b"\xff\xd8\xff\xe0", "complete, undamaged"),
    "PNG signature": (b"\x89PNG\r\n\x1a\n", "complete, undamaged"),
    "no pixels": (b"P6 0 5 255\n", "Cannot decode|Refused"),
}


@pytest.mark.parametrize("label", RUBBISH)
def test_rubbish(label):
    data, message = RUBBISH[label]
    with pytest.raises(ImageError, match=message):
        decode(data)


def test_objects_that_are_no_sources():
    closed = BytesIO(FILES["PNG"])
    closed.close()
    text = (StringIO("text"), "binary mode; found one that gives no bytes")
    for source, message in [text, (closed, "found I/O operation on closed"), (None, "NoneType"), (3, "int")]:
        with pytest.raises(ImageError, match=message):
            decode(source)


def test_the_name_is_told():
    with pytest.raises(ImageError, match="upload 7"):
        decode(b"rubbish", name="upload 7")
    with pytest.raises(SpecError, match="mode"):
        decode(FILES["PNG"], mode="RGBA")


ERRORS = [struct.error, SyntaxError, ValueError, MemoryError, OverflowError, EOFError, zlib.error, IndexError, KeyError]
ERRORS += [RecursionError, AttributeError, AssertionError, ZeroDivisionError, OSError, NotImplementedError]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("method", ["load", "load_prepare"])
def test_whatever_a_plugin_raises_is_an_image_error(kind, method, monkeypatch):
    def fail(self):
        raise kind("boom")

    monkeypatch.setattr(ImageFile.ImageFile, method, fail)
    with pytest.raises(ImageError, match=r"Cannot decode .* undamaged picture; found \w") as caught:
        decode(FILES["BMP"])
    assert isinstance(caught.value.__cause__, kind)


SENSELESS = "contents that end too early or make no sense"
REASONS = [
    (OSError("Truncated File Read"), "Truncated File Read"),
    (OSError(5, "Input/output error"), "Input/output error"),
    (SyntaxError("no marker found"), "no marker found"),
    (RuntimeError("Failed to decode image: Missing item"), "Failed to decode image: Missing item"),
    (SyntaxError(KeyError(173)), SENSELESS),
    (struct.error("unpack requires a buffer of 4 bytes"), SENSELESS),
    (RecursionError("maximum recursion depth exceeded"), SENSELESS),
    (EOFError(), SENSELESS),
    (MemoryError(), "too little memory for it"),
]


@pytest.mark.parametrize(("error", "reason"), REASONS, ids=repr)
def test_damage_is_told_in_plain_words(error, reason, monkeypatch):
    def fail(self):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ImageError) as caught:
        decode(FILES["BMP"])
    assert caught.value.found == reason


@pytest.mark.parametrize("label", ["JPEG 4:2:0", "PNG"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_picture_is_told_in_plain_words(label, share):
    with pytest.raises(ImageError, match=r"found (image file is truncated|Truncated File|contents that end)") as caught:
        decode(FILES[label][: int(len(FILES[label]) * share)])
    assert "Error" not in str(caught.value)


# --- size limits and Pillow's global state --------------------------------------------------------------------------


def test_max_pixels_is_exact():
    for source in (FILES["PNG"], RGB, Image.fromarray(RGB)):
        decode(source, max_pixels=61 * 43)
        with pytest.raises(ImageError, match="61 x 43"):
            decode(source, max_pixels=61 * 43 - 1)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (torch.zeros(3, 8, 8), r"found Tensor\. Give a uint8 array"),
        (["a.jpg", "b.jpg"], r"classify\.predict\(\[\.\.\.\]\)"),
        (3, "found int.$"),
    ],
)
def test_what_is_no_picture_is_told_what_to_do(given, hint):
    with pytest.raises(ImageError, match=hint):
        decode(given)


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_deep_grey_is_rescaled_in_parts(fmt):
    deep = np.arange(600 * 130, dtype=np.uint16).reshape(600, 130)  # more rows than a part has
    data = save(Image.fromarray(deep), fmt)
    expected = (deep.astype(np.uint32) * 255 + 32767) // 65535
    assert (np.asarray(decode(data, mode="L")) == expected).all()


@pytest.mark.parametrize("alone", [True, False])
def test_large_pictures_are_held_one_at_a_time(monkeypatch, alone):
    """Of threads that decode within ``in_turn_if_large`` one has a large picture, small ones do not wait."""
    monkeypatch.setattr(module, "LARGE_PIXELS", 100 if alone else 10_000)
    data, inside, most = save(photo(), "PNG"), [], []
    barrier = threading.Barrier(3)

    def work():
        barrier.wait()
        with in_turn_if_large():
            decode(data)
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.1)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(10)
    assert max(most) == (1 if alone else 3)
    assert module._LargeTurn.lock.acquire(timeout=0)
    module._LargeTurn.lock.release()
