"""From a decoded picture to the network's input, without torch: resize, crop, normalise.

Every stage gives what torchvision's ``Resize``, ``CenterCrop``, ``ToTensor``, ``Normalize`` give, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from efficientformer.spec.errors import ImageError
from efficientformer.spec.preprocess import PreprocessSpec

# Elongated pictures grow when their short edge is resized: 256 MiB in Pillow, which for a short edge of 256 allows
# pictures 1,024 times as long as wide. Resizing also needs memory in proportion to the longer side it starts from.
MAX_RESIZED_PIXELS = 1 << 26
MAX_SIDE = 1 << 20


def resize_crop(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    """Resize and centre-crop a decoded picture in 8 bits, as torchvision does on Pillow images.

    Args:
        image: A picture in mode ``spec.mode``, as ``decode`` returns it.
        spec: The preprocessing.

    Returns:
        A picture of exactly ``spec.input_size``.

    Raises:
        ImageError: If the mode is wrong, or the picture is so elongated that resizing it would exhaust the memory.
    """
    if image.mode != spec.mode:
        expected, found = f"mode {spec.mode}", f"mode {image.mode}"
        raise ImageError(
            "Cannot preprocess this picture", expected=expected, found=found, hint="Decode it with decode()"
        )
    size = _resized_size(image.size, spec)
    if size != image.size:
        image = image.resize(size, Image.Resampling[spec.interpolation.upper()])
    height, width = spec.input_size
    if image.size == (width, height):
        return image
    # The resized short edge is never below the crop (PreprocessSpec sees to it), so no margin is negative.
    margins = image.width - width, image.height - height
    left, top = (margin // 2 if spec.crop_rounding == "floor" else round(margin / 2) for margin in margins)
    return image.crop((left, top, left + width, top + height))


def normalise(images: Sequence[Image.Image], spec: PreprocessSpec) -> npt.NDArray[np.float32]:
    """Turn pictures from ``resize_crop`` into one batch, (N, C, H, W) float32 and contiguous.

    Raises:
        ImageError: If a picture has not the mode or the size that ``spec`` asks for.
    """
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (spec.mean, spec.std))
    batch = np.empty((len(images), len(spec.mean), *spec.input_size), np.float32)
    for image, out in zip(images, batch, strict=True):
        if image.mode != spec.mode or image.size != spec.input_size[::-1]:
            expected, found = f"{spec.mode} {spec.input_size[::-1]}", f"{image.mode} {image.size}"
            raise ImageError("Cannot normalise this picture", expected=expected, found=found, hint="Use resize_crop()")
        pixels = np.asarray(image).reshape(*spec.input_size, -1)  # (H, W, C) uint8
        # These three steps in float32 are torchvision's own; one multiply-add would be faster by 0.02 ms but not equal.
        np.divide(np.ascontiguousarray(pixels.transpose(2, 0, 1)), np.float32(255), out=out)
        np.subtract(out, mean, out=out)
        np.divide(out, std, out=out)
    return batch


def preprocess_batch(images: Sequence[Image.Image], spec: PreprocessSpec) -> npt.NDArray[np.float32]:
    """Turn decoded pictures into one batch, (N, C, H, W) float32 and contiguous.

    Raises:
        ImageError: As ``resize_crop``.
    """
    return normalise([resize_crop(image, spec) for image in images], spec)


def preprocess(image: Image.Image, spec: PreprocessSpec) -> npt.NDArray[np.float32]:
    """Turn a decoded picture into the network's input, (C, H, W) float32 and contiguous.

    Raises:
        ImageError: As ``resize_crop``.
    """
    return cast("npt.NDArray[np.float32]", preprocess_batch([image], spec)[0])


def least_size(size: tuple[int, int], spec: PreprocessSpec) -> tuple[int, int]:
    """Return the least (W, H) to decode at; the picture may yet be turned by 90 degrees."""
    resized = _resized_size(size, spec)
    return (max(resized),) * 2 if spec.resize == "squash" else resized  # the short edge stays the short edge


def _resized_size(size: tuple[int, int], spec: PreprocessSpec) -> tuple[int, int]:
    """Return (W, H) after the resize, by torchvision's rule, if that fits into memory."""
    width, height = size
    if spec.resize == "squash":
        new_height, new_width = spec.input_size
    else:
        short, long = spec.resize_size, int(spec.resize_size * max(size) / min(size))
        new_width, new_height = (short, long) if width <= height else (long, short)
    limit = max(MAX_RESIZED_PIXELS, 4 * max(spec.resize_size, *spec.input_size) ** 2)
    # Pillow resizes rows first: its intermediate picture is new_width x height.
    if max(size) > MAX_SIDE or new_width * max(new_height, height) > limit:
        expected = f"at most {limit:,} pixels after the resize and no side above {MAX_SIDE:,}"
        found, hint = f"{width} x {height}, which becomes {new_width} x {new_height}", "Cut it into parts"
        raise ImageError("Cannot resize a picture this elongated", expected=expected, found=found, hint=hint)
    return new_width, new_height
