"""What of a picture is compared to find its copies: its bytes, its pixels, and what it looks like from afar."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import combinations

import numpy as np
import numpy.typing as npt
from PIL import Image

from efficientformer.runtime.image import decode, form
from efficientformer.runtime.preprocess import MAX_SIDE
from efficientformer.spec.errors import ImageError

# 256 bits of look in 16 bands: two pictures that differ in at most 14 bits agree in two bands at least.
NEAR_BITS = 14
BANDS = 16
MAX_COLOUR_DIFFERENCE = 16.0  # mean over 4 x 4 patches, of 255
MIN_STRUCTURE = 24  # set bits below which a picture is too plain for its look to say anything
MAX_BUCKET = 64  # neighbours each picture is compared with in a bucket: crowds must not cost quadratic time

_MIN_STEP = 3  # grey levels; smaller differences are noise of the compression
_EDGE, _PATCHES = 16, 4
_STRIP = 256  # rows

FINGERPRINT = np.dtype(
    [
        ("read", "?"),
        ("file", "<u8"),
        ("pixels", "<u8"),
        ("look", "<u2", (BANDS,)),
        ("colours", "u1", (_PATCHES * _PATCHES * 3,)),
        ("width", "<u4"),
        ("height", "<u4"),
    ]
)

_POPULATION = np.array([bin(value).count("1") for value in range(1 << 16)], np.uint8)
# One bit of every row, in ever other columns, to a band: plain rows such as skies would make all their bands alike.
_BAND_OF = (np.arange(_EDGE)[:, None] * 5 + np.arange(_EDGE)) % _EDGE
_BAND_ORDER = np.argsort(_BAND_OF, axis=None, kind="stable")


def take(data: bytes | Image.Image, name: str, out: npt.NDArray[np.void]) -> str:
    """Decode a picture and write its fingerprint.

    Args:
        data: As an ``ImageSource`` gives it.
        name: What messages call it.
        out: A scalar array of dtype ``FINGERPRINT``.

    Returns:
        Its format and mode, such as ``JPEG RGB``.

    Raises:
        ImageError: If it cannot be decoded, or no network could resize it.
    """
    image = decode(data, name=name)
    if max(image.size) > MAX_SIDE:  # its look takes memory in proportion to this side
        expected, found = f"no side above {MAX_SIDE:,}", f"{image.width} x {image.height}"
        raise ImageError(f"{name} is too elongated", expected=expected, found=found, hint="Cut it into parts")
    out["pixels"] = _hash(_parts(image))
    out["file"] = _hash([data]) if isinstance(data, bytes) else out["pixels"]
    out["look"], out["colours"] = _look(image), _colours(image)
    out["width"], out["height"] = image.size
    out["read"] = True
    return f"array {data.mode}" if isinstance(data, Image.Image) else form(data)


def _parts(image: Image.Image) -> Iterator[bytes]:
    """Yield a picture's size and pixels, in strips: a copy of all is large."""
    yield repr(image.size).encode()
    for top in range(0, image.height, _STRIP):
        yield image.crop((0, top, image.width, min(top + _STRIP, image.height))).tobytes()


def _hash(parts: Iterable[bytes]) -> int:
    """Return 64 bits: among ten million pictures two different ones agree with a probability of 3e-6."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


def _look(image: Image.Image) -> npt.NDArray[np.uint16]:
    """Return the difference hash of 16 x 16: where a patch is brighter than its left neighbour."""
    grey = image.convert("L").resize((_EDGE + 1, _EDGE), Image.Resampling.BILINEAR)
    values = np.asarray(grey, np.int16)
    bits = (values[:, 1:] - values[:, :-1]) >= _MIN_STEP
    return np.packbits(bits.ravel()[_BAND_ORDER]).view("<u2")


def _colours(image: Image.Image) -> npt.NDArray[np.uint8]:
    small = image.resize((_PATCHES, _PATCHES), Image.Resampling.BILINEAR)
    return np.asarray(small, np.uint8).ravel()


def near_pairs(prints: npt.NDArray[np.void]) -> tuple[npt.NDArray[np.int64], bool]:
    """Find all pairs that look alike: at most ``NEAR_BITS`` of 256 bits differ, and the colours hardly.

    Buckets of equal pairs of bands hold every such pair, so the time grows as the number of pictures. Pictures
    without structure are left out: their look says nothing.

    Args:
        prints: (N,) fingerprints.

    Returns:
        (P, 2) positions, each pair once, the smaller first; and whether every bucket could be searched in full.
    """
    rich = np.flatnonzero(_POPULATION[prints["look"]].sum(1) >= MIN_STRUCTURE)
    look, colours = prints["look"][rich], prints["colours"][rich]
    codes, complete = np.empty(0, np.int64), True
    for first, second in combinations(range(BANDS), 2):
        keys = look[:, first].astype(np.uint32) << 16 | look[:, second]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        found = [codes]
        starts = np.arange(len(keys))
        for shift in range(1, MAX_BUCKET + 1):
            starts = starts[starts + shift < len(keys)]
            starts = starts[keys[starts] == keys[starts + shift]]
            if not len(starts):
                break
            one, other = order[starts], order[starts + shift]
            alike = _alike(look, colours, one, other)
            low, high = np.minimum(one, other)[alike], np.maximum(one, other)[alike]
            found.append(rich[low] * len(prints) + rich[high])
        else:
            complete = False
        codes = np.unique(np.concatenate(found))  # most pairs are found in many tables
    return np.stack([codes // max(len(prints), 1), codes % max(len(prints), 1)], 1), complete


def _alike(
    look: npt.NDArray[np.uint16],
    colours: npt.NDArray[np.uint8],
    one: npt.NDArray[np.int64],
    other: npt.NDArray[np.int64],
) -> npt.NDArray[np.bool_]:
    """Tell which of the candidate pairs are alike; the colours are only looked at where the look agrees."""
    alike: npt.NDArray[np.bool_] = _POPULATION[look[one] ^ look[other]].sum(1) <= NEAR_BITS
    left, right = colours[one[alike]].astype(np.int16), colours[other[alike]].astype(np.int16)
    alike[alike] = np.abs(left - right).mean(1) <= MAX_COLOUR_DIFFERENCE
    return alike
