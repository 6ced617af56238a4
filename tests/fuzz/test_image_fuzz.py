"""Hostile pictures: cut, mutated, exploding. Either a correct array comes out or an ImageError, and nothing else."""

import os
import random
import struct
import threading
import warnings
import zlib
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from efficientformer.runtime.image import decode
from efficientformer.runtime.preprocess import preprocess
from efficientformer.spec.errors import ImageError
from efficientformer.spec.preprocess import PreprocessSpec

SPEC = PreprocessSpec((32, 32), resize_size=36)
CASES = int(os.environ.get("FUZZ_CASES", "6000"))
MAX_GROWTH_MIB = 512  # of the resident memory while fuzzing with at most 4 Mpx per picture


def photo(mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((37, 29)).convert(mode)


def save(fmt, mode="RGB", **options):
    out = BytesIO()
    photo(mode).save(out, fmt, **options)
    return out.getvalue()


def frames(fmt):
    return save(fmt, save_all=True, append_images=[photo(seed=1)], duration=50)


EXIF = Image.Exif()
EXIF[0x0112] = 6
DEEP = BytesIO()
Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(DEEP, "PNG")
SEEDS = {
    "JPEG": save("JPEG", exif=EXIF),
    "JPEG grey": save("JPEG", "L"),
    "JPEG CMYK": save("JPEG", "CMYK"),
    "JPEG progressive": save("JPEG", progressive=True),
    "MPO": frames("MPO"),
    "PNG": save("PNG", exif=EXIF),
    "PNG palette": save("PNG", "P", transparency=bytes(range(200))),
    "PNG RGBA": save("PNG", "RGBA"),
    "PNG 1-bit": save("PNG", "1"),
    "PNG 16-bit": DEEP.getvalue(),
    "APNG": frames("PNG"),
    "GIF": save("GIF"),
    "GIF animated": frames("GIF"),
    "WebP": save("WEBP", exif=EXIF),
    "WebP lossless": save("WEBP", "RGBA", lossless=True),
    "WebP animated": frames("WEBP"),
    "BMP": save("BMP"),
    "BMP palette": save("BMP", "P"),
    "TIFF": save("TIFF"),
    "TIFF LZW": save("TIFF", compression="tiff_lzw", tiffinfo={0x0112: 6}),
    "TIFF deflate": save("TIFF", "RGBA", compression="tiff_adobe_deflate"),
    "TIFF JPEG": save("TIFF", compression="jpeg"),
    "TIFF group 4": save("TIFF", "1", compression="group4"),
    "PPM": save("PPM"),
    "PGM": save("PPM", "L"),
    "PPM plain": b"P3 2 1 9 1 2 3 4 5 6",
}
if features.check("avif"):
    SEEDS |= {"AVIF": save("AVIF", exif=EXIF), "AVIF animated": frames("AVIF")}


def pillow(data):
    with warnings.catch_warnings(action="ignore"):
        return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


# --- cut files ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("label", SEEDS)
def test_a_cut_file_is_an_error_or_complete(label, lenient, monkeypatch):
    """Never grey filling: also if the host allows Pillow that, and also where only a trailer is missing."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    data = SEEDS[label]
    whole, refused = np.asarray(decode(data)), 0
    for keep in sorted({0, 1, *np.linspace(2, len(data) - 1, 40).astype(int), *range(len(data) - 12, len(data))}):
        try:
            got = np.asarray(decode(data[:keep]))
        except ImageError:
            refused += 1
        else:
            np.testing.assert_array_equal(got, whole, err_msg=f"{keep} of {len(data)} bytes")
    assert refused >= 3
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


# --- bombs and Pillow's global state --------------------------------------------------------------------------------


def patched(label, offset, layout, *values):
    data = bytearray(SEEDS[label])
    struct.pack_into(layout, data, offset, *values)
    return bytes(data)


def with_checksums(data):
    """Return a PNG whose chunks have valid checksums again, as far as its structure still holds."""
    data, at = bytearray(data), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if at + 12 + length > len(data):
            break
        struct.pack_into(">I", data, at + 8 + length, zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(data)


def webp_canvas(side):
    """Return an extended WebP file that claims a canvas of ``side`` by ``side``."""
    size = (side - 1).to_bytes(3, "little") * 2
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size + SEEDS["WebP lossless"][12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(side):
    """Return a TIFF header: width, height, 8 bits, no compression, grey, one strip."""
    tags = [(256, side), (257, side), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, side), (279, 9)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


BOMBS = {
    "PNG": with_checksums(patched("PNG", 16, ">2I", 60000, 60000)),
    "BMP": patched("BMP", 18, "<ii", 60000, 60000),
    "GIF": patched("GIF", 6, "<HH", 60000, 60000),
    "JPEG": patched("JPEG grey", SEEDS["JPEG grey"].index(b"\xff\xc0") + 5, ">HH", 60000, 60000),
    "TIFF": tiff(60000),
    "PPM": b"P6 60000 60000 255\n",
    "WebP": webp_canvas(60000),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("their_limit", [1, None])
@pytest.mark.parametrize("label", BOMBS)
def test_bombs_are_refused_from_the_header(label, their_limit, monkeypatch):
    def decoding(self):
        raise AssertionError("decoding began")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoding)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", their_limit)
    # Newer Pillows refuse a WebP canvas before we see it: its decoder would allocate at once.
    message = r"Refused the \d+ bytes by its size.*60000 x 60000" + ("|exceeds limit" if label == "WebP" else "")
    with pytest.raises(ImageError, match=message):
        decode(BOMBS[label])
    assert Image.MAX_IMAGE_PIXELS is their_limit


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("label", SEEDS)
def test_the_hosts_limit_and_warning_filters_have_no_influence(label, monkeypatch):
    whole = np.asarray(decode(SEEDS[label]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    filters = list(warnings.filters)
    np.testing.assert_array_equal(np.asarray(decode(SEEDS[label])), whole)
    assert Image.MAX_IMAGE_PIXELS == 1
    assert warnings.filters == filters


def test_threads_share_the_guard(monkeypatch):
    """While one thread leaves, the others must still be protected; the last one restores the host's state."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = {label: pillow(SEEDS[label]) for label in ("JPEG", "PNG palette", "GIF", "TIFF LZW")}
    wrong = []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(200):
            label, cut = rng.choice(list(whole)), rng.random() < 0.5
            try:
                got = np.asarray(decode(SEEDS[label][: len(SEEDS[label]) // 2] if cut else SEEDS[label]))
            except ImageError as error:
                wrong.extend([] if cut else [f"{label} was refused: {error}"])
            else:
                wrong.extend([f"half of {label} was accepted"] if cut else [])
                wrong.extend([] if cut or np.array_equal(got, whole[label]) else [f"{label} differs"])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    with warnings.catch_warnings(action="error"):
        filters = list(warnings.filters)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert warnings.filters == filters
    assert wrong == []
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


# --- mutations ------------------------------------------------------------------------------------------------------


def flip_bits(rng, data):
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def flip_header_bits(rng, data):
    for _ in range(rng.choice((1, 2, 4))):
        data[rng.randrange(min(64, len(data)))] ^= 1 << rng.randrange(8)
    return data


def delete(rng, data):
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 2, 4, 30))]
    return data


def truncate(rng, data):
    return data[: rng.randrange(len(data))]


def repeat(rng, data):
    start, length = rng.randrange(len(data)), rng.choice((1, 4, 60))
    return data[:start] + data[start : start + length] * rng.choice((2, 3, 50)) + data[start + length :]


def splice(rng, data):
    other = rng.choice(list(SEEDS.values()))
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def extreme_field(rng, data):
    layout = rng.choice(("<H", ">H", "<I", ">I"))
    most = 0xFFFF if layout[1] == "H" else 0xFFFFFFFF
    value = rng.choice((0, 1, most, most >> 1, (most >> 1) + 1, 60000, 4096))
    struct.pack_into(layout, data, rng.randrange(max(1, min(rng.choice((64, len(data))), len(data) - 4))), value)
    return data


def random_tail(rng, data):
    keep = rng.randrange(min(48, len(data)))
    return data[:keep] + rng.randbytes(rng.randrange(400))


MUTATIONS = (flip_bits, flip_header_bits, delete, truncate, repeat, splice, extreme_field, random_tail)


def mutant(case):
    """Return the label and bytes of one case; the same number gives the same bytes."""
    rng = random.Random(case)
    label = rng.choice(list(SEEDS))
    data = bytearray(SEEDS[label])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(MUTATIONS)(rng, data) if len(data) > 4 else data
    if rng.random() < 0.5 and bytes(data[:8]) == SEEDS["PNG"][:8]:  # or most mutants would fail at a checksum
        data = with_checksums(data)
    return label, bytes(data)


@pytest.mark.filterwarnings("error")
def test_mutants_give_an_array_or_an_image_error():
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = Counter()
    for case in range(CASES):
        label, data = mutant(case)
        try:
            array = preprocess(decode(data, exif=case % 2 == 0, max_pixels=1 << 22), SPEC)
        except ImageError:
            outcomes[label, "refused"] += 1
        except BaseException as error:
            raise AssertionError(f"case {case} ({label}): {type(error).__name__}: {error}") from error
        else:
            assert array.shape == (3, 32, 32), case
            assert np.isfinite(array).all(), case
            outcomes[label, "decoded"] += 1
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert outcomes.total() == CASES >= 5000
    assert growth < MAX_GROWTH_MIB
    for label in SEEDS:  # a seed whose mutants all end alike tests nothing
        assert outcomes[label, "refused"] > 0, label
        assert outcomes[label, "decoded"] > 0, label
    decoded = sum(count for (_, outcome), count in outcomes.items() if outcome == "decoded")
    print(f"{CASES} mutants: {decoded} decoded, {CASES - decoded} refused, {growth} MiB")
