"""The recipe: every choice of a training run as one flat, frozen, validated value.

A recipe file is data: a docstring (what it reached, where, with which command) and assignments of plain values, in
Python's or JSON's syntax. Nothing in it is executed. A run folder keeps the resolved recipe as ``recipe.json``.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientformer.spec.arch import ArchSpec, load_json
from efficientformer.spec.errors import SpecError, UsageError, reason_of
from efficientformer.spec.fields import check_choice, check_keys, check_number
from efficientformer.spec.habits import SETTINGS

MAX_RECIPE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one network is trained. The defaults fine-tune a published network on a folder of pictures.

    Attributes:
        model: Zoo name or alias, a weights file, or ``auto``: EfficientFormer-L1, or for pictures of at most 64
            pixels the small network in the package.
        pretrained: Start from the model's weights (False: from scratch).
        spec: An architecture as a mapping, instead of the zoo's: a slimmed or hand-made network.
        input_size: Side of the input in pixels; 0 keeps the model's.
        epochs: Passes over the training pictures (repeats counted).
        batch_size: Pictures per step over all devices, made smaller for a data set that has fewer; 0 takes 64, or an
            eighth of a small data set.
        accumulate: Parts a step's batch is cut into, to save memory; gradients are added up.
        opt: Optimiser by timm's name, such as ``adamw``, ``sgd``, ``muon``.
        opt_args: Further arguments of the optimiser.
        lr: Peak learning rate, of batches of ``lr_batch``.
        lr_batch: Batch size ``lr`` is meant for: other ones scale it in proportion; 0 takes ``lr`` as it is.
        weight_decay: Decoupled weight decay of matrices and kernels; everything else has none.
        layer_decay: Factor on the learning rate from each block to the one before it; 1 is none.
        schedule: Learning rate after the warm-up: ``cosine``, ``linear`` or ``constant``.
        warmup_epochs: Linear warm-up from ``warmup_lr``, over half the run at most.
        warmup_lr: Learning rate before the first step.
        min_lr: Learning rate after the last step.
        clip: Gradient clipping: ``agc`` (adaptive, heads left out), ``norm``, ``value`` or ``none``.
        clip_value: Its bound; 0 takes the usual one: 0.01 for ``agc`` (its paper's), 1 for the others.
        drop_path: Stochastic depth of the last block, rising linearly from 0.
        head_dropout: Dropout before the heads.
        layer_scale_init: First value of layer scales, from scratch.
        label_smoothing: Share of the label spread over all classes.
        class_weights: ``none``, or ``balanced``: the labels' loss weighted by the inverse frequency of the class;
            the teacher's is not.
        crop: ``rrc`` (random resized crop), ``pad`` (fixed size, padded and shifted; decoded pictures stay in memory)
            or ``auto``: ``pad`` for inputs below 64 pixels.
        crop_scale: Range of the area share of a random resized crop (``rrc`` only, as colour jitter and
            interpolation).
        padding: Pixels of reflected border for ``pad``.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        randaugment: timm's policy string, such as ``rand-m9-mstd0.5-inc1``; empty is none.
        color_jitter: Strength of the colour jitter, where there is no RandAugment.
        interpolation: Filter of the random resized crop: Pillow's name, or ``random``.
        erasing: Probability of erasing a rectangle (filled with noise).
        grayscale: Probability that a picture loses its colours, so that old and toned photographs are known, too.
        cutout: Side of a grey square cut out of every other picture, in pixels; 0 is none.
        mixup: Alpha of mixup; 0 is none.
        cutmix: Alpha of cutmix; 0 is none.
        mix_prob: Probability that a batch is mixed at all.
        refine_epochs: Last epochs without cutout, erasing, mixup and cutmix.
        repeats: Repeated augmentation: views of one picture per epoch, of so many fewer pictures.
        views: Different augmentations of a picture over the whole run, repeated in a cycle; 0 means new ones every
            epoch. A limited number makes a cached teacher exact.
        ema_decay: Decay of the averaged weights, which are the ones measured then; 0 keeps none. After n updates it is
            at most 1 - (1 + n)^(-2/3) (timm's warm-up): after 300 epochs of ImageNet-1k in batches of 1,024, 0.99981.
        ema_epochs: Last epochs over which weights are averaged; 0 means all.
        teacher: Teacher for distillation: ``timm:NAME``, ``timm:local-dir:FOLDER`` (as ``timm.models.save_for_hf``
            writes one), a zoo name, or a weights file; empty is none. If it names its classes they are found by name.
        teacher_weights: File with the weights of a teacher given by its name; empty takes the published ones.
        distillation: ``hard`` (the teacher's decision, as the papers) or ``soft`` (its probabilities).
        distill_alpha: Weight of the teacher's loss; the labels' has the rest.
        distill_temperature: Temperature of soft distillation.
        teacher_cache: Folder where the teacher's logits are kept, so that it sees every view once; needs ``views``
            and no mixing.
        precision: ``bf16``, ``fp16``, ``fp32``, or ``auto``: bf16 where the hardware computes in it, else fp16 on a GPU
            and fp32 on a CPU, which cannot train in fp16.
        channels_last: Keep maps with channels last.
        compile: Compile the network with torch.compile.
        grad_checkpointing: Recompute blocks in the backward pass to save memory.
        norm: BatchNorm: ``batch`` (statistics of each device's batch), ``sync`` (over all devices), ``frozen``
            (the pretrained statistics, for small batches).
        freeze: Parts that stay as they are, by prefix: ``stem``, ``stages.0``; ``body`` means all but the heads.
        val_fraction: Share of pictures held out where the data set has no validation part.
        eval_every: Epochs between evaluations; the last epoch is always evaluated.
        early_stopping: Evaluations without a better top-1, or the same at a lower loss, after which training ends;
            0 never.
        save_every: Steps between checkpoints; 0 saves after every epoch only.
        workers: Processes that read and augment pictures, shared by those of a run on a machine; -1 takes the cores
            there are, at most 16 for each of these.
        seed: Decides the order, the augmentation and the first weights.
    """

    model: str = "auto"
    pretrained: bool = True
    spec: Mapping[str, Any] | None = None
    input_size: int = 0
    epochs: int = 20
    batch_size: int = 0
    accumulate: int = 1
    opt: str = "adamw"
    opt_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lr: float = 5e-4
    lr_batch: int = 0
    weight_decay: float = 0.05
    layer_decay: float = 0.85
    schedule: str = "cosine"
    warmup_epochs: float = 1.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    clip: str = "none"
    clip_value: float = 0.0
    drop_path: float = 0.0
    head_dropout: float = 0.0
    layer_scale_init: float = 1e-5
    label_smoothing: float = 0.1
    class_weights: str = "none"
    crop: str = "auto"
    crop_scale: tuple[float, float] = (0.35, 1.0)
    padding: int = 4
    hflip: float = 0.5
    vflip: float = 0.0
    randaugment: str = ""
    color_jitter: float = 0.2
    interpolation: str = "random"
    erasing: float = 0.0
    grayscale: float = 0.0
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    refine_epochs: int = 0
    repeats: int = 1
    views: int = 0
    ema_decay: float = 0.998
    ema_epochs: int = 0
    teacher: str = ""
    teacher_weights: str = ""
    distillation: str = "hard"
    distill_alpha: float = 0.5
    distill_temperature: float = 1.0
    teacher_cache: str = ""
    precision: str = "auto"
    channels_last: bool = True
    compile: bool = False
    grad_checkpointing: bool = False
    norm: str = "batch"
    freeze: tuple[str, ...] = ()
    val_fraction: float = 0.2
    eval_every: int = 1
    early_stopping: int = 0
    save_every: int = 0
    workers: int = -1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in _TYPES.items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), kind))
        for name, (low, high) in _RANGES.items():
            check_number(name, getattr(self, name), low, high)
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        low, high = (*self.crop_scale, 0, 0)[:2]
        if len(self.crop_scale) != 2 or not 0 < low <= high <= 1:
            raise SpecError("Illegal crop_scale", expected="two shares of the area, 0 < low <= high <= 1",
                            found=repr(self.crop_scale))  # fmt: skip
        self._check_together()

    def _check_together(self) -> None:
        if self.batch_size % self.accumulate:
            raise SpecError(
                "batch_size must be a multiple of accumulate", found=f"{self.batch_size} and {self.accumulate}"
            )
        if self.refine_epochs > self.epochs or self.ema_epochs > self.epochs:
            raise SpecError(
                "refine_epochs and ema_epochs are among the epochs",
                expected=f"at most {self.epochs}",
                found=f"refine_epochs {self.refine_epochs}, ema_epochs {self.ema_epochs}",
                hint="Shorten them too: --set refine_epochs=1 --set ema_epochs=1",
            )
        if self.distillation == "none" and self.teacher:
            raise SpecError("A teacher without distillation", hint="Set distillation to hard or soft, or leave it out")
        if self.teacher_cache and (not self.teacher or not self.views or self.mixing):
            raise SpecError(
                "teacher_cache keeps the logits of unmixed views",
                expected="a teacher, views of at least 1, and mixup and cutmix of 0",
                found=f"teacher {self.teacher!r}, views {self.views}, mixup {self.mixup}, cutmix {self.cutmix}",
            )
        if self.views and self.repeats > 1:
            raise SpecError("views and repeats exclude each other", hint="Set one of them")
        if self.pretrained and self.spec is not None and self.model == "auto":
            raise SpecError("A spec has no published weights", hint="Set pretrained to false, or model to a file")

    @property
    def mixing(self) -> bool:
        """Whether batches are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def clip_at(self) -> float:
        """The bound of clipping: ``clip_value``, or else what is usual for this kind."""
        return self.clip_value or (0.01 if self.clip == "agc" else 1.0)

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings that differ from the defaults and change nothing beside the others, once ``crop`` is decided."""
        names = {"pad": ("crop_scale", "color_jitter", "interpolation"), "rrc": ("padding",)}.get(self.crop, ())
        cut_or_mixed = ("cutout", "erasing", "mixup", "cutmix")
        for unused, others in (
            (self.spec is not None and not self.pretrained, ("model",)),
            (not self.warmup_epochs, ("warmup_lr",)),
            (self.schedule == "constant", ("min_lr",)),
            (bool(self.randaugment), ("color_jitter",)),
            (self.refine_epochs == self.epochs, (*cut_or_mixed, "mix_prob")),
            (not any(getattr(self, name) for name in cut_or_mixed), ("refine_epochs",)),
            (not self.mix_prob, ("mixup", "cutmix")),
            (not self.teacher, ("distillation", "distill_alpha", "distill_temperature", "teacher_weights")),
            (Path(self.teacher).is_file(), ("teacher_weights",)),
            (self.distillation == "hard", ("distill_temperature",)),
            (not self.mixing, ("mix_prob",)),
            (self.clip == "none", ("clip_value",)),
            (not self.ema_decay, ("ema_epochs",)),
        ):
            names += others if unused else ()
        return self.changed(names)

    def changed(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return those of some settings that differ from the defaults, each once."""
        default = Recipe()
        return tuple(name for name in dict.fromkeys(names) if getattr(self, name) != getattr(default, name))

    @property
    def arch(self) -> ArchSpec | None:
        """The architecture the recipe carries itself, if any."""
        return None if self.spec is None else ArchSpec.from_dict(self.spec)

    @property
    def scaled_lr(self) -> float:
        """The peak learning rate of this batch size."""
        return self.lr * (self.batch_size / self.lr_batch if self.lr_batch and self.batch_size else 1.0)

    def with_changes(self, **changes: Any) -> Recipe:  # noqa: ANN401 (fields of several types, checked)
        """Return the recipe with some fields changed.

        Raises:
            SpecError: On an unknown field or an illegal value.
        """
        check_keys("the recipe", changes, Recipe, SETTINGS)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; ``from_dict`` gives the equal recipe back."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return the recipe as JSON text, a line for each setting."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: object) -> Recipe:
        """Build a recipe from a mapping, trusting nothing in it.

        Raises:
            SpecError: On unknown fields and on illegal values.
        """
        return cls(**check_keys("the recipe", data, cls, SETTINGS))


_RANGES: dict[str, tuple[float, float]] = {
    "input_size": (0, 8192), "epochs": (1, 100_000), "batch_size": (0, 1 << 20), "accumulate": (1, 4096),
    "lr": (0, 100), "lr_batch": (0, 1 << 20), "weight_decay": (0, 10), "layer_decay": (0.01, 1),
    "warmup_epochs": (0, 100_000), "warmup_lr": (0, 100), "min_lr": (0, 100), "clip_value": (0, 1e6),
    "drop_path": (0, 0.99), "head_dropout": (0, 0.99), "layer_scale_init": (0, 10), "label_smoothing": (0, 0.99),
    "padding": (0, 64), "hflip": (0, 1), "vflip": (0, 1), "color_jitter": (0, 2), "erasing": (0, 1),
    "grayscale": (0, 1), "cutout": (0, 1024), "mixup": (0, 100), "cutmix": (0, 100), "mix_prob": (0, 1),
    "refine_epochs": (0, 100_000), "repeats": (1, 16), "views": (0, 10_000), "ema_decay": (0, 0.999999),
    "ema_epochs": (0, 100_000), "distill_alpha": (0, 1), "distill_temperature": (0.01, 100),
    "val_fraction": (0.001, 0.9), "eval_every": (1, 10_000), "early_stopping": (0, 10_000),
    "save_every": (0, 10_000_000), "workers": (-1, 256), "seed": (0, 2**31 - 1),
}  # fmt: skip
_CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": ("cosine", "linear", "constant"),
    "clip": ("none", "agc", "norm", "value"),
    "class_weights": ("none", "balanced"),
    "crop": ("auto", "rrc", "pad"),
    "interpolation": ("random", "bilinear", "bicubic", "nearest"),
    "distillation": ("none", "hard", "soft"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "norm": ("batch", "sync", "frozen"),
}


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file (.py or .json) or the run folder that keeps one.

    Raises:
        UsageError: If there is no such file, or it is no recipe.
        SpecError: On unknown fields and on illegal values; the message names the file.
    """
    path = Path(path)
    file = path / "recipe.json" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise UsageError(
            f"{path} is no run folder: it holds no recipe", hint=f"To train on pictures in it: --data {path}"
        )
    if path.exists() and file.suffix not in (".py", ".json"):
        raise UsageError(f"{path} is no recipe", expected="a .py or .json file, or a run folder", found=path.suffix)
    try:
        data = file.read_bytes()[: MAX_RECIPE_BYTES + 1]
    except OSError as error:
        hint = "Recipes are .py or .json files; recipes/ holds those of the papers"
        raise UsageError(f"Cannot read the recipe {file}", found=reason_of(error), hint=hint) from error
    if len(data) > MAX_RECIPE_BYTES:
        raise UsageError(f"{file} is too large for a recipe", expected=f"at most {MAX_RECIPE_BYTES} bytes")
    try:
        return Recipe.from_dict(load_json("the recipe", data) if file.suffix == ".json" else _assignments(data))
    except SpecError as error:
        raise error.at(file) from error


def sets_workers(setting: str) -> bool:
    """Return whether a ``name=value`` text is the number of workers, which alone may be another in a resumed run."""
    return setting.partition("=")[0].strip() == "workers"


def override(recipe: Recipe, settings: Iterable[str], **changes: Any) -> Recipe:  # noqa: ANN401 (fields, checked)
    """Return a recipe with fields set from ``name=value`` texts, all at once with other changes.

    Args:
        recipe: The recipe.
        settings: Values are JSON, or text as it stands; a list may be written ``a,b``.
        **changes: Fields with their values.

    Raises:
        SpecError: On an unknown field or an illegal value.
    """
    for setting in settings:
        name, equals, text = setting.partition("=")
        if name.strip() in changes:
            raise SpecError(f"{name.strip()!r} is set twice", found=repr(setting))
        if not equals:
            raise SpecError("Illegal setting", expected="NAME=VALUE", found=repr(setting))
        changes[name.strip()] = _parsed(text, is_list=typing.get_origin(_TYPES.get(name.strip())) is tuple)
    return recipe.with_changes(**changes)


def _parsed(text: str, *, is_list: bool) -> object:
    """Return the value of a text that is JSON, a list without its brackets, or meant as it stands."""
    for json_text in (text, f"[{text}]") if is_list else (text,):
        with contextlib.suppress(ValueError):
            return load_json("a setting", json_text)
    return text.split(",") if is_list else {"True": True, "False": False, "None": None}.get(text, text)


def _assignments(data: bytes) -> dict[str, Any]:
    """Return the values of a flat Python file that holds a docstring and assignments of literals, nothing else."""
    try:
        statements = ast.parse(data).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SpecError("The recipe is no valid Python", found=str(error)) from None
    values: dict[str, Any] = {}
    for statement in statements:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        expected = "assignments of plain values, such as epochs = 300"
        if not isinstance(statement, ast.Assign) or not isinstance(target, ast.Name):
            raise SpecError(f"Line {statement.lineno} of the recipe is code", expected=expected)
        if target.id in values:
            raise SpecError(f"The recipe sets {target.id!r} twice", found=f"again in line {statement.lineno}")
        _refuse_keys_given_twice(target.id, statement.value)
        try:
            values[target.id] = ast.literal_eval(statement.value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise SpecError(f"Line {statement.lineno} of the recipe is code", expected=expected) from None
    return values


def _refuse_keys_given_twice(setting: str, value: ast.expr) -> None:
    """Raise SpecError if a dict anywhere in a value has a key twice; Python's own parser takes the last one."""
    for each in ast.walk(value):
        keys = each.keys if isinstance(each, ast.Dict) else []
        seen: set[object] = set()
        for key in keys:
            if not isinstance(key, ast.Constant):
                continue
            if key.value in seen:
                problem = f"The recipe sets {key.value!r} of {setting!r} twice"
                raise SpecError(problem, found=f"again in line {key.lineno}")
            seen.add(key.value)


def _typed(name: str, value: object, kind: Any) -> Any:  # noqa: ANN401 (whatever the field holds)
    """Return ``value`` as the field's type (whole numbers pass for fractions, lists for tuples), or raise SpecError."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise SpecError(
                f"Illegal {name}", expected="a number", found="a whole number beyond every fraction"
            ) from None
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise SpecError(f"Illegal {name}", expected="a list", found=repr(value))
        return tuple(_typed(name, each, item) for each in value)
    if kind in (bool, int, float, str):
        if type(value) is not kind:
            raise SpecError(f"Illegal {name}", expected=f"a value of type {kind.__name__}", found=repr(value))
        return value
    optional = type(None) in typing.get_args(kind)
    if isinstance(value, Mapping):
        return dict(value)
    if value is None and optional:
        return None
    raise SpecError(f"Illegal {name}", expected="a mapping of names to values", found=repr(value))


_TYPES: dict[str, Any] = typing.get_type_hints(Recipe)
