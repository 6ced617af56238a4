"""The zoo: one card per network, with every name it goes by, where its weights are and what was published of it."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import UnknownModelError, UsageError, nearest
from efficientformer.spec.labels import label_names
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.spec.variants import VARIANTS

EMBEDDED = "efficientformer_cifar10"
# A name that ends so is meant as a path.
FILE_SUFFIXES = (".onnx", ".safetensors", ".pth", ".pt", ".bin", ".pth.tar", ".ckpt")

# Deployed files of other tools, which are neither read nor written.
FOREIGN_SUFFIXES = (".xml", ".ort", ".tflite", ".pte", ".mlmodel", ".mlpackage", ".engine", ".plan", ".param")
ONNX_ONLY = "Of deployed files only .onnx is read; efficientformer convert CHECKPOINT FILE.onnx writes one"

# What a training run of ours, and timm's and transformers' ways to save a network, call the weights in their folders.
IN_FOLDERS = ("best.safetensors", "model.safetensors", "pytorch_model.bin")

# Evaluation preprocessing of each project, the one its published figures belong to. They differ in the short edge,
# in EXIF handling and in the rounding of the crop.
SNAP_PREPROCESS = PreprocessSpec(resize_size=256)  # util/datasets.py: int(256 / 224 * size)
TIMM_PREPROCESS = PreprocessSpec(resize_size=235)  # default_cfgs: crop_pct 0.95, floor(224 / 0.95)
MMPRETRAIN_PREPROCESS = PreprocessSpec(resize_size=248, exif=True)  # ResizeEdge(248); decoded by cv2
TRANSFORMERS_PREPROCESS = PreprocessSpec(resize_size=256, crop_rounding="floor")  # the conversion script's processor
CIFAR10_PREPROCESS = PreprocessSpec(
    input_size=(32, 32), resize_size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), exif=True
)

# What a checkpoint without a manifest was evaluated with: that of the project whose layout it has.
LAYOUT_PREPROCESS = {
    "snap": SNAP_PREPROCESS,
    "timm": TIMM_PREPROCESS,
    "mmpretrain": MMPRETRAIN_PREPROCESS,
    "transformers": TRANSFORMERS_PREPROCESS,
}

_HUB = "https://huggingface.co/{}/resolve/main/{}"
_DRIVE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"
_OPENMMLAB = "https://download.openmmlab.com/mmclassification/v0/efficientformer/{}"


@dataclass(frozen=True, slots=True)
class WeightsSource:
    """One place that holds weights of a network.

    Attributes:
        name: Whose they are: ``timm``, ``mmpretrain``, ``transformers`` or ``snap`` (the authors'); a network with
            two sets by the same project numbers them by epochs (``snap-300``).
        url: Where the file is.
        filename: Its name in the cache.
        layout: The checkpoint layout (a module of ``weights/formats``).
        preprocess: The evaluation preprocessing the accuracy belongs to.
        alias: The project's own name for these weights.
        sha256: The file's digest, or as many leading hex digits as are known.
        top1: Published ImageNet-1k top-1 in percent, with this preprocessing.
        top5: Published top-5 in percent.
    """

    name: str
    url: str
    filename: str
    layout: str
    preprocess: PreprocessSpec
    alias: str
    sha256: str = ""
    top1: float | None = None
    top5: float | None = None

    @property
    def aliases(self) -> set[str]:
        """The project's own names for these weights: mmpretrain's checkpoint and its old names lack the batch size."""
        return {self.alias, self.alias.replace("_8xb128", "")}


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the zoo knows of one network.

    Attributes:
        name: Canonical name.
        spec: The architecture.
        data_set: What the weights were trained on; names the labels.
        sources: Where weights are, best first; empty for the network shipped in the package.
        published_params: Parameters in millions as published.
        published_macs: MACs in billions as published.
        note: Where a published figure is wrong or follows another convention than ours, and which.
        latency_ms: Published latency on an iPhone 12 with Core ML, in milliseconds.
        training: How the weights were trained.
        paper: arXiv number.
    """

    name: str
    spec: ArchSpec
    data_set: str
    sources: tuple[WeightsSource, ...]
    published_params: float | None = None
    published_macs: float | None = None
    note: str = ""
    latency_ms: float | None = None
    training: str = ""
    paper: str = ""

    @property
    def short(self) -> str:
        """The shortest name that resolves to this card: ``l1``, ``s0``, ``v2_l``, ``cifar10``."""
        return "v2_l" if self._variant == "l" else self._variant

    @property
    def _variant(self) -> str:
        return self.name.rpartition("_")[2]

    @property
    def aliases(self) -> tuple[str, ...]:
        """Every other name that resolves to this card (matched without regard to case)."""
        short = {self.short}
        if self.paper == "2212.08059":
            short |= {f"v2_{self._variant}", f"efficientformer_v2_{self._variant}"}
        names = {self.name.replace("_", "-"), *short}.union(*(source.aliases for source in self.sources))
        names |= {source.alias.replace("3rdparty_", "") for source in self.sources if source.name == "mmpretrain"}
        return tuple(sorted(names - {self.name}))

    def source(self, name: str) -> WeightsSource | None:
        """Return the source called ``name``, or None."""
        return next((source for source in self.sources if source.name == name), None)

    @property
    def best_source(self) -> WeightsSource | None:
        """The source that is tried first, or None for the embedded network."""
        return self.sources[0] if self.sources else None

    def manifest(self, source: WeightsSource | None) -> Manifest:
        """Return the manifest of this network with the weights of ``source`` (None: the embedded network)."""
        preprocess = source.preprocess if source else CIFAR10_PREPROCESS
        figures = {"top1": source.top1, "top5": source.top5} if source else {}
        metrics = {f"published_{key}": value for key, value in figures.items() if value is not None}
        provenance = {"model": self.name, "source": source.name if source else "embedded"}
        if source:
            provenance["url"] = source.url
        return Manifest(self.spec, preprocess, label_names(self.data_set), metrics, provenance)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a name means: a card, and the source the name asks for (None: any, best first)."""

    card: ModelCard
    source: WeightsSource | None


@cache
def cards() -> tuple[ModelCard, ...]:
    """Return every card of the zoo, V1, V2, then the embedded network."""
    return (*_v1_cards(), *_v2_cards(), _cifar10_card())


def list_models(pattern: str | Iterable[str] = "*") -> list[str]:
    """Return the canonical names of the networks whose name or an alias matches a shell pattern, or one of several."""
    wanted = [each.lower() for each in ([pattern] if isinstance(pattern, str) else pattern)]
    return [
        card.name
        for card in cards()
        if any(fnmatch.fnmatch(name.lower(), each) for name in (card.name, *card.aliases) for each in wanted)
    ]


def name_of(model: object) -> str:
    """Return what names a network, as text: a path may be given as one.

    Raises:
        UsageError: If it is neither text nor a path.
    """
    if isinstance(model, str | os.PathLike):
        return os.fsdecode(model)
    raise UsageError(
        "This names no network",
        expected="a name of the zoo, or a weights or exported file",
        found=f"a {type(model).__name__}",
        hint="Of a network in memory give the file it was saved to: save_model(network, 'mine.safetensors')",
    )


def resolve(name: str) -> Resolved:
    """Find a network by its canonical name or any alias, without regard to case.

    Args:
        name: ``efficientformer_l1``, ``L1``, or another project's name for it, which also asks for its weights:
            ``efficientformer-l1_3rdparty_8xb128_in1k``, ``hf_hub:timm/efficientformer_l1.snap_dist_in1k``.

    Raises:
        UnknownModelError: If no card has that name; the message lists the nearest ones.
    """
    wanted, names = _bare(name), _names()
    if wanted in names:
        return names[wanted]
    if inside := networks_in(name) or [Path(name) / file for file in IN_FOLDERS if _holds(name, file)]:
        hint = f"Name the weights in it: {' or '.join(map(str, inside))}"
        raise UnknownModelError(f"{name!r} is a folder", hint=hint)
    if name and os.path.isdir(name) and not is_name(name):  # noqa: PTH112 (no error for names no folder can have)
        hint = "Name a weights file, or the folder of a run"
        raise UnknownModelError(f"{name!r} is a folder without a network", hint=hint)
    if name.lower().endswith(FILE_SUFFIXES):
        raise UnknownModelError(f"There is no file {name!r}, and no model of that name", hint="Check the path")
    if name.lower().endswith(FOREIGN_SUFFIXES):
        raise UnknownModelError(f"{name!r} is no network that can be read here", hint=ONNX_ONLY)
    close = nearest(wanted, names)
    known = ", ".join(card.name for card in cards())
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        hint += f"A repository of the Hugging Face hub is named hf-hub:{name}. "
    raise UnknownModelError(f"Unknown model {name!r}", hint=f"{hint}The zoo holds {known} (efficientformer list)")


def is_name(name: str) -> bool:
    """Tell whether ``resolve`` finds a network of this name."""
    return _bare(name) in _names()


def is_file(model: str | os.PathLike[str]) -> bool:
    """Tell whether a model is a file; a name of the zoo is none, whatever lies in the working directory."""
    return not is_name(os.fspath(model)) and os.path.isfile(model)  # noqa: PTH113 (no error for names no file can have)


def is_remote(model: str) -> bool:
    """Tell whether a model's name is an address or a repository of the hub, other than the zoo's."""
    return names_weights(model) and not is_name(model)


def names_weights(model: str) -> bool:
    """Tell whether a model's name is that of weights somewhere: an address, or any repository of the hub."""
    return model.lower().startswith(("hf-hub:", "hf_hub:", "http://", "https://"))


def networks_in(folder: str) -> list[Path]:
    """Return the networks in the folder of a run of ours: a training's best weights, or one for each slimming target.

    Args:
        folder: Any name; there are none in what is no such folder.
    """
    if _holds(folder, "slim.json"):
        return sorted(Path(folder).glob("slimmed-*.safetensors"))
    best = "best.safetensors"
    return [Path(folder) / best] if _holds(folder, best) and _holds(folder, "recipe.json") else []


def _holds(folder: str, file: str) -> bool:
    return bool(folder) and os.path.isfile(Path(folder) / file)  # noqa: PTH113 (no error for names no file can have)


def _bare(name: str) -> str:
    return re.sub("^(hf[-_]hub:)?(timm/)?", "", name.lower())


def _names() -> dict[str, Resolved]:
    """Return what each name in small letters means; a project's own name asks for its weights."""
    names = {alias.lower(): Resolved(card, None) for card in cards() for alias in (*card.aliases, card.name)}
    for card in cards():
        for source in card.sources:
            names |= {alias.lower(): Resolved(card, source) for alias in source.aliases}
    return names


def _timm(name: str, top1: float, top5: float | None) -> WeightsSource:
    repo = f"timm/{name}.snap_dist_in1k"
    url, file = _HUB.format(repo, "model.safetensors"), f"{name}.snap_dist_in1k.safetensors"
    return WeightsSource("timm", url, file, "timm", TIMM_PREPROCESS, f"{name}.snap_dist_in1k", top1=top1, top5=top5)


def _mmpretrain(short: str, sha256: str, top1: float, top5: float) -> WeightsSource:
    file = f"efficientformer-{short}_3rdparty_in1k_20220915-{sha256}.pth"
    alias = f"efficientformer-{short}_3rdparty_8xb128_in1k"
    url = _OPENMMLAB.format(file)
    return WeightsSource("mmpretrain", url, file, "mmpretrain", MMPRETRAIN_PREPROCESS, alias, sha256, top1, top5)


def _transformers(short: str, top1: float) -> WeightsSource:
    repo = f"snap-research/efficientformer-{short}-300"
    file = f"efficientformer-{short}-300.bin"
    url = _HUB.format(repo, "pytorch_model.bin")
    return WeightsSource("transformers", url, file, "transformers", TRANSFORMERS_PREPROCESS, repo, top1=top1)


def _snap(file: str, drive_id: str, top1: float, name: str = "snap") -> WeightsSource:
    alias = file.removesuffix(".pth")
    return WeightsSource(name, _DRIVE.format(drive_id), file, "snap", SNAP_PREPROCESS, alias, top1=top1)


_V1_TRAINING = (
    "ImageNet-1k, hard distillation from RegNetY-16GF (82.9), AdamW, cosine, RandAugment, mixup, cutmix, "
    "random erasing; 300 epochs{}"
)
_V2_TRAINING = "ImageNet-1k, the V1 recipe, 450 epochs (300 epochs: {} top-1)"


def _v1_cards() -> tuple[ModelCard, ...]:
    l1_note = (
        "mmpretrain publishes 12.28 M parameters: all 12,289,928 but the stem's 11,232. 1.30 G counts bias additions "
        "and normalisations and leaves out attention products and heads"
    )
    l3_note = (
        "3.74 G belongs to a network with one MB3D block; L3 has four, which the same counter puts at 3.93 G "
        "(the paper says 3.9)"
    )
    l7_note = "10.16 G counts bias additions and normalisations and leaves out attention products and heads"
    l1_sources = (
        _timm("efficientformer_l1", 80.498, 94.988),
        _mmpretrain("l1", "cc3e1ac6", 80.46, 94.99),
        _snap("efficientformer_l1_1000d.pth", "11SbX-3cfqTOc247xKYubrAjBiUmr818y", 80.2),
        _snap("efficientformer_l1_300d.pth", "1wtEmkshLFEYFsX5YhBttBOGYaRvDR7nu", 79.2, "snap-300"),
        _transformers("l1", 79.2),
    )
    l3_sources = (
        _timm("efficientformer_l3", 82.550, 96.248),
        _mmpretrain("l3", "466793d6", 82.45, 96.18),
        _snap("efficientformer_l3_300d.pth", "1OyyjKKxDyMj-BcfInp4GlDdwLu3hc30m", 82.4),
        _transformers("l3", 82.4),
    )
    l7_sources = (
        _timm("efficientformer_l7", 83.382, 96.536),
        _mmpretrain("l7", "185e30af", 83.40, 96.60),
        _snap("efficientformer_l7_300d.pth", "1cVw-pctJwgvGafeouynqWWCwgkcoFMM5", 83.3),
        _transformers("l7", 83.3),
    )
    long, short = _V1_TRAINING.format(" (L1 also 1000: timm's, mmpretrain's and snap's)"), _V1_TRAINING.format("")
    return (
        _v1_card("l1", l1_sources, 12.28, 1.30, l1_note, 1.6, long),
        _v1_card("l3", l3_sources, 31.41, 3.74, l3_note, 3.0, short),
        _v1_card("l7", l7_sources, 82.23, 10.16, l7_note, 7.0, short),
    )


def _v1_card(
    short: str, sources: tuple[WeightsSource, ...], params: float, macs: float, note: str, latency: float, training: str
) -> ModelCard:
    name = f"efficientformer_{short}"
    return ModelCard(
        name, VARIANTS[name], "imagenet1k", sources, params, macs, note, latency, training, paper="2206.01191"
    )


def _v2_cards() -> tuple[ModelCard, ...]:
    note = (
        "the authors' counter leaves out normalisations, layer scales and attention biases and miscounts convolution "
        "biases; the published MACs also count upsampling"
    )
    # short name, params, MACs, latency, 300-epoch top-1, 450-epoch top-1, timm's top-1 and top-5, Google Drive id
    rows = (
        ("s0", 3.5, 0.40, 0.9, 75.7, 76.2, 76.10, None, "1PXb7b9pv9ZB4cfkRkYEdwgWuVwvEiazq"),
        ("s1", 6.1, 0.65, 1.1, 79.0, 79.7, 79.688, 94.710, "1EKe1vt-3mG7iceVIMaET_DyISzVTJMn8"),
        ("s2", 12.6, 1.25, 1.6, 81.6, 82.0, 82.166, 95.910, "1gjbFyB5T_yAkmzHNuXEljqScYVQZafMQ"),
        ("l", 26.1, 2.56, 2.7, 83.3, 83.5, 83.632, 96.560, "1sRXNBHl_ewHBMwwYZVsOJo1k6JpcNJn-"),
    )
    result = []
    for short, params, macs, latency, top1_300, top1, timm_top1, timm_top5, drive_id in rows:
        name = f"efficientformerv2_{short}"
        sources = (_timm(name, timm_top1, timm_top5), _snap(f"eformer_{short}_450.pth", drive_id, top1))
        training = _V2_TRAINING.format(top1_300)
        result.append(
            ModelCard(
                name, VARIANTS[name], "imagenet1k", sources, params, macs, note, latency, training, paper="2212.08059"
            )
        )
    return tuple(result)


def _cifar10_card() -> ModelCard:
    training = "CIFAR-10, recipes/cifar10.py, then four times recipes/cifar10_cutmix.py"
    return ModelCard(EMBEDDED, VARIANTS[EMBEDDED], "cifar10", (), training=training)
