"""The preprocess spec: how a decoded picture becomes the network's input. It travels with every set of weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from efficientformer.spec.errors import SpecError
from efficientformer.spec.fields import as_list, as_pair, check_bool, check_choice, check_int, check_keys, check_number

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class PreprocessSpec:
    """Resize, centre crop, scale to [0, 1], normalise.

    Attributes:
        input_size: Height and width after the crop: the network's input.
        resize: ``short_edge`` keeps the aspect ratio, ``squash`` resizes to ``input_size`` without a crop.
        resize_size: Length of the short edge after the resize; 0 with ``squash``.
        interpolation: Pillow's filter, always antialiased.
        crop_rounding: Offset of an odd margin: ``half_even`` (torchvision, timm, mmcv) or ``floor`` (transformers).
        mean: Per-channel mean of the [0, 1] values; three channels mean RGB, one means grey.
        std: Per-channel standard deviation of the [0, 1] values.
        exif: Whether the EXIF orientation is applied (mmpretrain does; torchvision, timm and transformers do not).
    """

    input_size: tuple[int, int] = (224, 224)
    resize: str = "short_edge"
    resize_size: int = 256
    interpolation: str = "bicubic"
    crop_rounding: str = "half_even"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    exif: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", as_pair("input size", self.input_size))
        for side in self.input_size:
            check_int("input side", side, 1, 8192)
        check_choice("resize", self.resize, ("short_edge", "squash"))
        least, most = (0, 0) if self.resize == "squash" else (max(self.input_size), 16384)
        check_int("resize_size", self.resize_size, least, most)
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        check_choice("crop_rounding", self.crop_rounding, ("half_even", "floor"))
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(as_list(name, getattr(self, name), 3)))
            for value in getattr(self, name):
                check_number(f"preprocessing {name}", value, 1e-6 if name == "std" else -1e3, 1e3)
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            found = f"{len(self.mean)} means, {len(self.std)} stds"
            raise SpecError("Illegal normalisation", expected="a mean and a std for 1 or 3 channels", found=found)
        check_bool("exif", self.exif)

    @property
    def mode(self) -> str:
        """Pillow mode of the decoded picture: ``RGB`` or ``L``."""
        return "RGB" if len(self.mean) == 3 else "L"

    def with_input_size(self, size: int | tuple[int, int]) -> PreprocessSpec:
        """Return the same preprocessing for another input size: the resize grows in proportion."""
        height, width = as_pair("input size", size)
        if self.resize == "squash":
            return dataclasses.replace(self, input_size=(height, width))
        short = max(height, width) * self.resize_size // max(self.input_size)
        return dataclasses.replace(self, input_size=(height, width), resize_size=short)

    def grey(self) -> PreprocessSpec:
        """Return the same preprocessing for grey pictures."""
        return dataclasses.replace(self, mean=(0.5,), std=(0.5,))

    def averaged(self) -> PreprocessSpec:
        """Return the same preprocessing for grey pictures in a network that knew colours, its stem summed over them.

        The mean of the colours' normalisations keeps what the network sees near the scale it was trained on, which
        ``grey`` does not.
        """
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return dataclasses.replace(self, mean=(mean,), std=(std,))

    def describe(self) -> str:
        """Say the whole preprocessing in one line."""
        crop = "x".join(map(str, self.input_size))
        resize = (
            f"squash to {crop}" if self.resize == "squash" else f"short edge {self.resize_size}, centre crop {crop}"
        )
        exif = "EXIF orientation applied" if self.exif else "EXIF orientation ignored"
        return f"{resize}, {self.interpolation}, {self.mode}, mean {self.mean}, std {self.std}, {exif}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; ``from_dict`` gives the equal spec back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> PreprocessSpec:
        """Build a spec from what ``to_dict`` returned, trusting nothing in it.

        Raises:
            SpecError: On unknown fields and on illegal values.
        """
        return cls(**check_keys("the preprocess spec", data, cls))
