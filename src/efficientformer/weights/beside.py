"""What stands beside a network of another project: how it is fed, and the names of its classes.

timm's ``save_for_hf`` and ``push_to_hf_hub`` write a ``config.json``; transformers' ``save_pretrained`` writes a
``config.json`` and, for the processor, a ``preprocessor_config.json``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientformer.spec.arch import ArchSpec, load_json
from efficientformer.spec.errors import CheckpointError, SpecError, reason_of
from efficientformer.spec.fields import as_list, as_pair, check_bool, check_number
from efficientformer.spec.labels import label_names, synsets
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import IMAGENET_MEAN, PreprocessSpec
from efficientformer.spec.variants import VARIANTS, variant_of
from efficientformer.spec.zoo import LAYOUT_PREPROCESS

MAX_BYTES = 1 << 24
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm calls the weights in a folder or repository

_PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL.Image.Resampling
_TIMM_CROP_PCT = 0.875  # timm/data/constants.py, where a configuration says nothing


@dataclass(frozen=True, slots=True)
class Beside:
    """What the files beside a network say.

    Attributes:
        labels: Class names in order of the logits; empty if they say none.
        preprocess: The preprocessing; None if they say none. Its input size is the network's.
        files: Names of the files it is from.
    """

    labels: tuple[str, ...] = ()
    preprocess: PreprocessSpec | None = None
    files: tuple[str, ...] = ()


def read_beside(weights: Path, layout: str, spec: ArchSpec) -> Beside:
    """Read what timm or transformers wrote beside a weights file; files of anything else are not touched.

    Args:
        weights: The weights file.
        layout: The layout it is in.
        spec: The network in it.

    Raises:
        CheckpointError: If such a file is damaged, or asks for a preprocessing that cannot be had here.
    """
    if layout not in ("timm", "transformers"):
        return Beside()
    folder, files = weights.parent, []
    labels: tuple[str, ...] = ()
    preprocess = None
    try:
        config = _read(folder / CONFIG)
        ours = config is None or _is_efficientformer(config, layout)
        if config is not None and ours:
            files.append(CONFIG)
            labels = class_names(config.get("id2label" if layout == "transformers" else "label_names"))
            preprocess = _timm(config, spec) if layout == "timm" else None
        if layout == "transformers" and ours and (processor := _read(folder / PROCESSOR)) is not None:
            files.append(PROCESSOR)
            preprocess = _transformers(processor, spec)
    except SpecError as error:
        hint = "Mend it, or move it away: the network is then fed as its project feeds the published ones"
        raise CheckpointError(
            f"{' or '.join(files) or CONFIG} beside {weights.name}: {error.problem}",
            expected=error.expected, found=error.found, hint=error.hint or hint,
        ) from None  # fmt: skip
    return Beside(labels, preprocess, tuple(files))


def timm_config(manifest: Manifest) -> dict[str, Any] | None:
    """Return what timm writes into the ``config.json`` beside a network; None of one that timm cannot build or feed.

    ``timm.create_model("local-dir:FOLDER")`` and, of a repository of the hub, ``"hf-hub:OWNER/NAME"`` read it
    (timm/models/_hub.py: save_config_for_hf).
    """
    spec, preprocess = manifest.spec, manifest.preprocess
    architecture, (height, width) = variant_of(spec), spec.input_size
    squash = preprocess.resize == "squash"
    if architecture is None or not (squash or height == width):
        return None
    fed = {"crop_pct": 1.0 if squash else _crop_pct(height, preprocess.resize_size),
           "crop_mode": "squash" if squash else "center", "interpolation": preprocess.interpolation,
           "mean": list(preprocess.mean), "std": list(preprocess.std)}  # fmt: skip
    names = {"label_names": list(manifest.labels)} if manifest.labels else {}
    shape, classes = {"input_size": [spec.in_chans, height, width]}, {"num_classes": spec.num_classes}
    other: dict[str, Any] = {"in_chans": spec.in_chans} if spec.in_chans != len(IMAGENET_MEAN) else {}
    if (height, width) != VARIANTS[architecture].input_size:  # older ones of timm know no img_size
        other["img_size"] = [height, width]
    arguments = {"model_args": classes | other}
    return {"architecture": architecture} | classes | names | arguments | {"pretrained_cfg": shape | fed | classes}


def untold_by_timm(preprocess: PreprocessSpec) -> tuple[str, ...]:
    """Return which parts of a preprocessing no configuration of timm's says: it feeds the network otherwise in them."""
    usual = LAYOUT_PREPROCESS["timm"]
    return tuple(name for name in ("exif", "crop_rounding") if getattr(preprocess, name) != getattr(usual, name))


def _crop_pct(side: int, resized: int) -> float:
    """Return the share of which timm makes this resized side, which it rounds down, in as few digits as will do."""
    shares = (round(side / (resized + 0.5), digits) for digits in range(2, 9))
    return next(share for share in shares if math.floor(side / share) == resized)


def stamp_beside(weights: Path) -> str:
    """Return by what the files that ``read_beside`` may read are told from others of their names; empty for none."""
    found = [weights.parent / name for name in (CONFIG, PROCESSOR)]
    stats = [(path.name, path.stat()) for path in found if path.is_file()]
    return "|".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)


def known_labels(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return ImageNet-1k's names as ours, however a project writes them, and all others as they are."""
    ours = label_names("imagenet1k")
    if len(labels) != len(ours):
        return labels
    alike = sum(a.partition(",")[0].lower() == b.partition(",")[0].lower() for a, b in zip(labels, ours, strict=True))
    return ours if labels == synsets() or alike > 0.9 * len(ours) else labels


def class_names(named: object) -> tuple[str, ...]:
    """Return the class names of a configuration, given as a list or by their number, in order of the logits.

    None are returned for transformers' stand-ins ``LABEL_0`` ...; ImageNet-1k's are ours, however they are written.

    Raises:
        SpecError: If they are no texts, or their numbers leave gaps.
    """
    if isinstance(named, Mapping):
        keys = [str(number) for number in range(len(named))]
        if set(named) != set(keys):
            raise SpecError("The classes are not numbered", expected=f"0 to {len(keys) - 1}", found="other keys")
        named = [named[key] for key in keys]
    labels = tuple(as_list("class names", named or (), 1_000_000))
    if not all(isinstance(label, str) for label in labels):
        raise SpecError("Illegal class names", expected="texts", found="something else")
    return () if labels == tuple(f"LABEL_{number}" for number in range(len(labels))) else known_labels(labels)


def _read(path: Path) -> dict[str, Any] | None:
    """Return the JSON object of a file, None if there is no such file or it is no object."""
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SpecError(f"{path.name} is too large", expected=f"at most {MAX_BYTES >> 20} MB")
        content = load_json(path.name, path.read_bytes())
    except OSError as error:
        raise SpecError(f"{path.name} cannot be read", found=reason_of(error)) from error
    return content if isinstance(content, dict) else None


def _is_efficientformer(config: Mapping[str, Any], layout: str) -> bool:
    name = config.get("architecture" if layout == "timm" else "model_type")
    return isinstance(name, str) and name.startswith("efficientformer")


def _timm(config: Mapping[str, Any], spec: ArchSpec) -> PreprocessSpec:
    """Return what timm's evaluation transform does with a configuration (timm/data/transforms_factory.py)."""
    inner = config.get("pretrained_cfg")
    said = _given(inner if isinstance(inner, Mapping) else config)  # older ones have it all in one
    share, mode = said.get("crop_pct", _TIMM_CROP_PCT), said.get("crop_mode", "center")
    check_number("crop_pct", share, 0.05, 1.0)
    height, width = as_pair("input_size", as_list("input_size", said.get("input_size", (3, *spec.input_size)), 3)[1:])
    usual = LAYOUT_PREPROCESS["timm"]
    if mode == "squash" and share == 1:
        change: dict[str, Any] = {"resize": "squash", "resize_size": 0}
    elif mode == "center" and height == width:
        check_number("input_size", height, 1, 8192)
        change = {"resize_size": math.floor(height / share)}
    else:
        expected, found = "crop_mode center, of a square", f"{mode!r} of {height}x{width}, crop_pct {share}"
        raise SpecError("No such crop here", expected=expected, found=found)
    return _fitted(usual, spec, [height, width], change, said.get("interpolation"), said.get("mean"), said.get("std"))


def _transformers(said: Mapping[str, Any], spec: ArchSpec) -> PreprocessSpec:
    """Return what transformers' EfficientFormerImageProcessor does with a configuration."""
    usual = LAYOUT_PREPROCESS["transformers"]
    said = _given(said)
    for name in ("do_resize", "do_rescale", "do_normalize", "do_center_crop"):
        check_bool(name, said.get(name, True))
    factor = said.get("rescale_factor", 1 / 255)
    check_number("rescale_factor", factor, 0, 1)
    if not said.get("do_resize", True) or not said.get("do_rescale", True) or abs(factor * 255 - 1) > 1e-3:
        raise SpecError("No such preprocessing here", expected="pictures resized and rescaled by 1/255")
    size = said.get("size", {"height": spec.input_size[0], "width": spec.input_size[1]})
    crops = said.get("do_center_crop", True)
    crop = list(_sides("crop_size", said.get("crop_size", list(spec.input_size))) if crops else _sides("size", size))
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        change: dict[str, Any] = {"resize_size": size["shortest_edge"]}
    elif list(_sides("size", size)) == crop:
        change = {"resize": "squash", "resize_size": 0}
    else:
        raise SpecError("No such resize here", expected="the shortest edge, or the size of the crop", found=f"{size!r}")
    mean, std = said.get("image_mean"), said.get("image_std")
    if not said.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    return _fitted(usual, spec, crop, change, _PILLOW.get(said.get("resample", 3), "of another number"), mean, std)


def _given(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration says: null stands for what it does not."""
    return {name: value for name, value in said.items() if value is not None}


def _sides(name: str, said: object) -> tuple[int, int]:
    """Return height and width from transformers' ways to say them."""
    if isinstance(said, Mapping):
        if set(said) != {"height", "width"}:
            raise SpecError(f"Illegal {name}", expected="height and width", found=f"{dict(said)!r}"[:80])
        said = [said["height"], said["width"]]
    return as_pair(name, said)


def _fitted(
    usual: PreprocessSpec, spec: ArchSpec, size: object, change: dict[str, Any], interpolation: object,
    mean: object, std: object,
) -> PreprocessSpec:  # fmt: skip
    """Return ``usual`` as it is said to be."""
    height, width = as_pair("input size", size)
    if not spec.fits(spec.with_input_size((height, width)).input_size):
        expected = "x".join(map(str, spec.input_size))
        raise SpecError("The weights are for another input size", expected=expected, found=f"{height}x{width}")
    change |= {"input_size": (height, width)}
    change |= {"interpolation": interpolation} if interpolation is not None else {}
    said = {"mean": mean, "std": std}
    change |= {name: tuple(as_list(name, value, 3)) for name, value in said.items() if value is not None}
    preprocess = dataclasses.replace(usual, **change)
    if spec.in_chans == 1 and len(preprocess.mean) != 1:
        preprocess = preprocess.grey()
    return preprocess
