"""Augmentation. Per picture, by timm on Pillow images; per batch, vectorised. All of it is a function of seeds.

Shapes: B batch, C channels, H and W the input, P the padding.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from efficientformer.data.draws import Seeds, uniforms
from efficientformer.spec.errors import SpecError, missing_extra
from efficientformer.spec.preprocess import PreprocessSpec

ERASE_AREA = (0.02, 1 / 3)  # share of the picture, and aspect ratio, of an erased rectangle (paper's recipe; timm's)
ERASE_RATIO = (0.3, 1 / 0.3)
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's and torchvision's grey

# timm leaves out what it does not know in such a text, and trains with its defaults
_RANDAUGMENT = re.compile(r"rand(-(t(weights|3aw?)|(m|n|p|inc|mstd|mmax)\d+(\.\d+)?))*")


@dataclass(frozen=True)
class Augmentation:
    """What is done to training pictures; the fields of the recipe that say so.

    Attributes:
        crop: ``rrc`` or ``pad``.
        crop_scale: Area range of a random resized crop.
        padding: Border for ``pad``.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        randaugment: timm's policy string; it begins with ``rand``.
        color_jitter: Colour jitter where there is no RandAugment.
        interpolation: Filter of the random resized crop.
        erasing: Probability of an erased rectangle.
        cutout: Side of the grey square cut out of every other picture.
        grayscale: Probability that a picture loses its colours.
    """

    crop: str
    crop_scale: tuple[float, float]
    padding: int
    hflip: float
    vflip: float
    randaugment: str
    color_jitter: float
    interpolation: str
    erasing: float
    cutout: int
    grayscale: float

    def __post_init__(self) -> None:
        if self.randaugment and not _RANDAUGMENT.fullmatch(self.randaugment):
            expected = "timm's text for RandAugment, such as rand-m9-mstd0.5-inc1"
            raise SpecError("Illegal randaugment", expected=expected, found=repr(self.randaugment))
        if self.crop == "pad" and self.randaugment:
            raise SpecError("RandAugment works on decoded pictures, one by one", hint="Set crop to rrc")


class SampleAugment:
    """The part done per picture, in worker processes: random resized crop, flips, RandAugment or colour jitter.

    Args:
        augmentation: What to do.
        preprocess: Mode, size and mean of the input.

    Raises:
        MissingExtraError: If timm is not installed.
        SpecError: If timm knows no such RandAugment policy.
    """

    def __init__(self, augmentation: Augmentation, preprocess: PreprocessSpec) -> None:
        try:
            from timm.data.auto_augment import RandAugment
            from timm.data.transforms_factory import transforms_imagenet_train
        except ImportError as error:
            raise missing_extra("train", "Training", error) from error
        grey = preprocess.mode == "L"
        try:
            composed = transforms_imagenet_train(
                preprocess.input_size,
                scale=augmentation.crop_scale,
                hflip=augmentation.hflip,
                vflip=augmentation.vflip,
                color_jitter=0.0 if grey else augmentation.color_jitter,
                auto_augment=augmentation.randaugment or None,
                interpolation=augmentation.interpolation,
                mean=preprocess.mean,
                std=preprocess.std,
                use_prefetcher=True,  # uint8 out; normalising and erasing are done per batch
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise SpecError(f"timm knows no such policy: {augmentation.randaugment!r}", found=str(error)) from error
        for step in composed.transforms:
            for operation in step.ops if isinstance(step, RandAugment) else ():
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = posterize
        self._transform: Callable[[Image.Image], npt.NDArray[np.uint8]] = composed

    def __call__(self, image: Image.Image, seed: int) -> npt.NDArray[np.uint8]:
        """Return (C, H, W) uint8; the same for the same seed in any process."""
        random.seed(seed)  # timm draws from all three global generators
        np.random.seed(seed % (1 << 32))
        torch.manual_seed(seed % (1 << 63))
        pixels = np.asarray(self._transform(image))
        return pixels if pixels.ndim == 3 else pixels[None]


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep the highest ``bits`` bits of each pixel; none gives black.

    At the largest magnitudes RandAugment asks timm's for no bits, which Pillow refuses from version 13 on.
    """
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def pad_images(images: Tensor, padding: int) -> Tensor:
    """Return uint8 images (N, C, H, W) with a reflected border, (N, C, H + 2P, W + 2P).

    Raises:
        SpecError: If the border would be wider than the pictures.
    """
    if padding == 0:
        return images
    count, channels, height, width = images.shape
    if padding >= min(height, width):
        raise SpecError("The padding is a reflection", expected=f"less than {min(height, width)}", found=f"{padding}")
    padded = torch.empty(count, channels, height + 2 * padding, width + 2 * padding, dtype=torch.uint8)
    for start in range(0, count, 4096):  # in parts: reflection needs floating point
        part = images[start : start + 4096].float()
        padded[start : start + 4096] = F.pad(part, (padding,) * 4, mode="reflect").byte()
    return padded


def shift_flip(padded: Tensor, seeds: Seeds, augmentation: Augmentation) -> Tensor:
    """Cut a randomly shifted window out of each padded image, and flip some: (B, C, H + 2P, W + 2P) to (B, C, H, W)."""
    count, channels = padded.shape[:2]
    span = 2 * augmentation.padding
    height, width = padded.shape[2] - span, padded.shape[3] - span
    u = torch.from_numpy(uniforms(seeds, 4))  # (4, B)
    top, left = (u[:2] * (span + 1)).long()
    rows = top[:, None] + torch.arange(height)  # (B, H)
    columns = left[:, None] + torch.arange(width)  # (B, W)
    rows = torch.where((u[2] < augmentation.vflip)[:, None], rows.flip(1), rows)
    columns = torch.where((u[3] < augmentation.hflip)[:, None], columns.flip(1), columns)
    batch, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return padded[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


class Normaliser:
    """The part done per batch, last: colours taken away, uint8 to normalised floats, then cutout and erasing.

    Args:
        preprocess: Mean and standard deviation.
        augmentation: What is taken away; None for nothing.
    """

    def __init__(self, preprocess: PreprocessSpec, augmentation: Augmentation | None) -> None:
        self._mean = torch.tensor(preprocess.mean)[:, None, None] * 255
        self._scale = 1 / (torch.tensor(preprocess.std)[:, None, None] * 255)
        self._augmentation = augmentation

    def __call__(self, images: Tensor, seeds: Seeds, *, cut: bool) -> Tensor:
        """Return (B, C, H, W) float32 in channels-last order; ``cut`` says whether anything is cut out."""
        x = images.to(torch.float32, memory_format=torch.channels_last)
        if self._augmentation is not None and self._augmentation.grayscale:
            take_colours(x, seeds, self._augmentation.grayscale)
        x.sub_(self._mean).mul_(self._scale)
        if cut and self._augmentation is not None:
            if self._augmentation.cutout:
                cut_squares(x, seeds, self._augmentation.cutout)
            if self._augmentation.erasing:
                erase(x, seeds, self._augmentation.erasing)
        return x


def take_colours(images: Tensor, seeds: Seeds, probability: float) -> None:
    """Make some colour images (B, 3, H, W) grey, in place; pictures of one channel are so already."""
    if images.shape[1] != 3:
        return
    chosen = torch.from_numpy(uniforms(seeds, 13)[12] < probability)  # (B,); the first twelve are spent below
    grey = (images[chosen] * torch.tensor(LUMA)[:, None, None]).sum(1, keepdim=True)  # (of these, 1, H, W)
    images[chosen] = grey.expand(-1, 3, -1, -1)


def cut_squares(images: Tensor, seeds: Seeds, side: int) -> None:
    """Set a square of ``side`` pixels to the mean in half of the normalised images (B, C, H, W), in place."""
    height, width = images.shape[2:]
    u = torch.from_numpy(uniforms(seeds, 7)[4:])  # (3, B); the first four are spent on shift and flip
    top, left = (u[0] * max(1, height - side + 1)).long(), (u[1] * max(1, width - side + 1)).long()
    y, x = torch.arange(height), torch.arange(width)
    in_rows = (y >= top[:, None]) & (y < top[:, None] + side) & (u[2] < 0.5)[:, None]  # (B, H)
    in_columns = (x >= left[:, None]) & (x < left[:, None] + side)  # (B, W)
    images.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.0)


def erase(images: Tensor, seeds: Seeds, probability: float) -> None:
    """Fill a random rectangle of some normalised images (B, C, H, W) with noise, in place (random erasing)."""
    height, width = images.shape[2:]
    u = uniforms(seeds, 12)[7:]  # (5, B)
    for i in np.flatnonzero(u[0] < probability):
        area = (ERASE_AREA[0] + u[1, i] * (ERASE_AREA[1] - ERASE_AREA[0])) * height * width
        ratio = float(np.exp(np.log(ERASE_RATIO[0]) + u[2, i] * np.log(ERASE_RATIO[1] / ERASE_RATIO[0])))
        h, w = min(height, round((area * ratio) ** 0.5)), min(width, round((area / ratio) ** 0.5))
        top, left = int(u[3, i] * (height - h + 1)), int(u[4, i] * (width - w + 1))
        rng = torch.Generator().manual_seed(int(seeds[i]) % (1 << 63))
        images[i, :, top : top + h, left : left + w] = torch.randn(images.shape[1], h, w, generator=rng)
