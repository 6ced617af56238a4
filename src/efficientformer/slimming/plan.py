"""What a slimming run is asked to do, as one frozen value that its folder keeps."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficientformer.runtime.engines import ENGINES, PRECISIONS
from efficientformer.slimming.objective import Efficiency, Latency, Objective
from efficientformer.slimming.space import Space
from efficientformer.spec.arch import ArchSpec, AttentionSpec, load_json
from efficientformer.spec.errors import SpecError, UsageError, nearest, reason_of
from efficientformer.spec.fields import as_list, check_choice, check_int, check_keys, check_number
from efficientformer.spec.habits import ENGINE_WORDS
from efficientformer.spec.variants import v1_spec
from efficientformer.training.recipe import Recipe, override
from efficientformer.weights.files import write_json

# Files of a run folder that several modules read or write.
PLAN, TABLE, IMPORTANCES, PATH = "slim.json", "table.json", "importances.json", "search/path.json"
FOUND: dict[str, Any] = {"model": "auto", "spec": None, "input_size": 0}  # of the final recipe: the search finds them
LEAST_CALIBRATION = 2  # pictures: where a map has one pixel, a single one has no variance
SUPERNET = "supernet"  # as a teacher: the start network, trained as part of the supernet
# What trains a small network from scratch, as recipes/cifar10.py does.
FROM_SCRATCH: dict[str, Any] = {
    "pretrained": False, "batch_size": 256, "opt": "muon", "opt_args": {"fallback_lr_scale": 0.2}, "lr": 0.02,
    "lr_batch": 256, "warmup_lr": 0.0, "min_lr": 0.0, "layer_decay": 1.0, "layer_scale_init": 0.1, "cutout": 8,
}  # fmt: skip


# What counts with one objective only: an elastic supernet learns no importances, and has every cut scored.
_LATENCY_ONLY, _JOINT_ONLY = ("breadth", "importances", "shuffle_seed"), ("size_weight", "latency_weight")
# What an elastic supernet, whose networks are cut out anew for each step, can follow of a recipe.
_ELASTIC: dict[str, tuple[Any, ...]] = {
    "norm": ("batch", "sync"), "grad_checkpointing": (False,), "compile": (False,), "freeze": ((),),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """How the search goes about it.

    Attributes:
        width_step: Channels a width cut takes away (16 in the paper).
        min_width: No stage becomes narrower.
        min_expansion: No MLP expansion becomes smaller (V2).
        min_depth: Blocks that every stage keeps.
        breadth: Cuts of each kind that are scored for a step, the least important first; 1 as in the paper.
        recover_steps: Training steps after every cut, before the next is scored; 0 as in the paper.
        recover_lr: Their learning rate over the peak of the supernet's recipe.
        held_out: Training pictures set aside to score cuts with, at most a fifth of them all.
        calibration: Training pictures that BatchNorm statistics are estimated on before each score.
        importances: ``learned``, or ``shuffled`` to see what they are worth.
        shuffle_seed: Added to the supernet's seed when they are shuffled: another one, another shuffle.
        objective: ``latency`` (V1 paper: a supernet of MetaPaths, milliseconds), or ``mes`` (V2 paper: an elastic
            supernet, every cut scored, the mobile efficiency score).
        size_weight: How much size counts in the mobile efficiency score (0.5 in the paper).
        latency_weight: How much latency counts in it (1 in the paper).
        max_params: Parameters the networks may have, beside their latency; 0 for no limit.
    """

    width_step: int = 16
    min_width: int = 16
    min_expansion: float = 1.0
    min_depth: int = 0
    breadth: int = 1
    recover_steps: int = 20
    recover_lr: float = 0.1
    held_out: int = 2000
    calibration: int = 512
    importances: str = "learned"
    shuffle_seed: int = 0
    objective: str = "latency"
    size_weight: float = 0.5
    latency_weight: float = 1.0
    max_params: int = 0

    def __post_init__(self) -> None:
        limits = {"breadth": (1, 256), "held_out": (1, 1_000_000), "calibration": (LEAST_CALIBRATION, 1_000_000)}
        for name, (least, most) in limits.items():
            check_int(name, getattr(self, name), least, most)
        check_int("recover_steps", self.recover_steps, 0, 100_000)
        check_int("shuffle_seed", self.shuffle_seed, 0, 1_000_000)
        check_number("recover_lr", self.recover_lr, 0, 10)
        check_choice("importances", self.importances, ("learned", "shuffled"))
        check_choice("objective", self.objective, ("latency", "mes"))
        for name in ("size_weight", "latency_weight"):
            check_number(name, getattr(self, name), 0, 100)
        check_int("max_params", self.max_params, 0, 10**12)

    def check(self) -> None:
        """Raise SpecError if an option would have no effect, whatever the start network, or is illegal."""
        self._below(small_start())  # checks the bounds
        if self.joint and not self.size_weight and not self.latency_weight:
            raise SpecError("A mobile efficiency score of nothing", expected="size_weight or latency_weight above 0")
        for name in _LATENCY_ONLY if self.joint else _JOINT_ONLY:
            if getattr(self, name) != Options.__dataclass_fields__[name].default:
                raise SpecError(f"search.{name} means nothing with the objective {self.objective!r}",
                                hint=f"Leave search.{name} out")  # fmt: skip
        if self.shuffle_seed and self.importances == "learned":
            raise SpecError("search.shuffle_seed means nothing with learned importances",
                            hint="Leave it out, or set search.importances=shuffled")  # fmt: skip

    def space(self, start: ArchSpec) -> Space:
        """Return the space below a start network.

        Raises:
            SpecError: If an option is illegal, or means nothing for this family.
        """
        if start.family == "v1" and self.min_expansion != Options.__dataclass_fields__["min_expansion"].default:
            raise SpecError("search.min_expansion means nothing for V1, whose expansions are not cut",
                            hint="Leave search.min_expansion out")  # fmt: skip
        return self._below(start)

    def _below(self, start: ArchSpec) -> Space:
        return Space(start, self.width_step, self.min_width, self.min_expansion, self.min_depth)

    @property
    def joint(self) -> bool:
        """Whether size and latency are searched together, in an elastic supernet."""
        return self.objective == "mes"

    @property
    def goal(self) -> Objective:
        """What cuts are made for."""
        return Efficiency(self.size_weight, self.latency_weight) if self.joint else Latency()


@dataclass(frozen=True)
class Plan:
    """A slimming run.

    Attributes:
        data: The data set.
        targets: Latencies to reach, in milliseconds, largest first.
        supernet: How the supernet is trained; its model or spec is the start network.
        final: How each chosen network is trained.
        engine: The engine whose latency counts.
        precision: What it computes in.
        threads: Its CPU threads; None lets it choose.
        options: How the search goes about it.
        start: The start network, once a run has begun: a weights file that it came from may go.
    """

    data: str
    targets: tuple[float, ...]
    supernet: Recipe
    final: Recipe
    engine: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    options: Options = field(default_factory=Options)
    start: ArchSpec | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.data, str):
            raise SpecError("Illegal data set", expected="a path", found=type(self.data).__name__)
        if self.supernet.teacher == SUPERNET:
            raise UsageError("The supernet cannot teach itself", hint=f"Say --set final.teacher={SUPERNET}")
        for target in self.targets:
            check_number("target latency in ms", target, 1e-4, 1e6)
        if not self.targets:
            raise UsageError("No target", hint="Name one: --target-latency 2.0ms")
        targets = {float(f"{target:g}") for target in self.targets}  # as their files are named
        object.__setattr__(self, "targets", tuple(sorted(targets, reverse=True)))
        check_choice("engine", self.engine, ENGINES, ENGINE_WORDS)
        check_choice("precision", self.precision, PRECISIONS)
        if self.threads is not None:
            check_int("threads", self.threads, 1, 4096)

    def check(self) -> None:
        """Raise SpecError if something of a new run would have no effect."""
        self.options.check()
        if self.supernet.val_fraction != self.final.val_fraction:
            hint = "Say --set val_fraction=..., without a part before it"
            raise SpecError("Both trainings set the same pictures aside", expected="one val_fraction", hint=hint)
        if self.supernet.teacher_cache and self.supernet.teacher_cache == self.final.teacher_cache:
            hint = "Say --set supernet.teacher_cache=... and --set final.teacher_cache=..."
            raise SpecError("Both trainings keep their teacher's logits in one folder, and see other pictures",
                            expected="a teacher_cache for each", hint=hint)  # fmt: skip
        for name, legal in _ELASTIC.items() if self.options.joint else ():
            value = getattr(self.supernet, name)
            if value not in legal:
                hint = f"Leave that to the final training: --set supernet.{name}={json.dumps(legal[0])}"
                raise SpecError(f"An elastic supernet cannot be trained with {name}={value}", hint=hint)

    def with_targets(self, targets: Iterable[float]) -> Plan:
        """Return the plan with further targets."""
        return dataclasses.replace(self, targets=(*self.targets, *targets))

    def with_workers(self, workers: int) -> Plan:
        """Return the plan with another number of worker processes, which no result depends on."""
        supernet, final = (each.with_changes(workers=workers) for each in (self.supernet, self.final))
        return dataclasses.replace(self, supernet=supernet, final=final)

    def save(self, folder: Path) -> None:
        """Write the plan into a run folder.

        Raises:
            UsageError: If the folder cannot be made.
            CheckpointError: If the file cannot be written.
        """
        make_folder(folder)
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts: dict[str, Any] = {"supernet": self.supernet.to_dict(), "final": self.final.to_dict()}
        parts["start"] = None if self.start is None else self.start.to_dict()
        data = {**plain, **parts, "options": dataclasses.asdict(self.options)}
        write_json(folder / PLAN, data, indent=2)

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read the plan of a run folder.

        Raises:
            UsageError: If this is no folder of a slimming run.
            SpecError: If its plan is damaged.
        """
        try:
            text = (folder / PLAN).read_bytes()
        except OSError as error:
            hint = "Start a run: efficientformer slim --data DIR --target-latency 2.0ms --output FOLDER"
            raise UsageError(f"{folder} holds no slimming run", found=reason_of(error), hint=hint) from error
        fields = check_keys("the plan", load_json(f"the plan {folder / PLAN}", text), cls)
        for name in ("supernet", "final"):
            fields[name] = Recipe.from_dict(fields[name])
        fields["options"] = Options(**check_keys("the options", fields.get("options", {}), Options))
        fields["targets"] = tuple(as_list("targets", fields["targets"], 1000))
        if fields.get("start") is not None:
            fields["start"] = ArchSpec.from_dict(fields["start"])
        return cls(**fields)


def make_folder(folder: Path) -> None:
    """Make a run folder.

    Raises:
        UsageError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"Cannot write the run folder {folder}", found=reason_of(error)) from error


def small_start() -> ArchSpec:
    """Return the start network for pictures of at most 64 pixels: V1 blocks, attention at the end of stages 3 and 4."""
    spec = v1_spec(
        (48, 96, 192, 320), (3, 3, 6, 4), (2, 4), input_size=32, num_classes=10, distilled=False, stem_stride=2
    )
    return dataclasses.replace(spec, attention=AttentionSpec(num_heads=4, key_dim=16, value_ratio=2))


def milliseconds(text: str) -> float:
    """Return a latency such as ``2.0ms``, ``2`` or ``1.5 ms`` in milliseconds; ``us`` and ``s`` are understood too.

    Raises:
        UsageError: If it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|us|s)?\s*", text)
    value = float(found[1]) * {"us": 1e-3, "s": 1e3}.get(found[2] or "ms", 1.0) if found else 0.0
    if not value:
        raise UsageError("Illegal latency", expected="a time such as 2.0ms", found=repr(text))
    return value


def _check_free(name: str, part: str) -> None:
    """Raise SpecError if a setting is not one: the start network has an option, the final one is what is sought."""
    field_name = name.removeprefix(f"{part}.")
    if field_name in ("model", "spec"):
        raise SpecError(f"{name} is no setting", hint="Say --model: a zoo name, a weights file, or a spec in JSON")
    if part == "final" and field_name in FOUND:
        hint = f"Say --set supernet.{field_name}=... for the start network"
        raise SpecError(f"{name} is what the search finds", hint=hint)


def apply_settings(
    supernet: Recipe, final: Recipe, options: Options, settings: Iterable[str]
) -> tuple[Recipe, Recipe, Options]:
    """Apply ``NAME=VALUE`` texts: to both recipes, or with a prefix ``supernet.``, ``final.`` or ``search.`` to one.

    Raises:
        SpecError: On an unknown field or an illegal value.
    """
    parts: dict[str, list[str]] = {"supernet": [], "final": [], "search": []}
    for setting in settings:
        prefix, dot, rest = setting.partition(".")
        parted = bool(dot) and "=" not in prefix
        _check_free(setting.partition("=")[0], prefix if parted else "")
        if parted:
            if prefix not in parts:
                close = nearest(prefix, parts) or list(parts)
                raise SpecError(f"Unknown part {prefix!r} in --set", hint=f"Did you mean {close[0]}.{rest}?")
            parts[prefix].append(rest)
        else:
            parts["supernet"].append(setting)
            parts["final"].append(setting)
    changes: dict[str, Any] = {}
    for setting in parts["search"]:
        name, equals, text = setting.partition("=")
        if not equals:
            raise SpecError("Illegal setting", expected="search.NAME=VALUE", found=repr(setting))
        try:
            changes[name] = json.loads(text)
        except ValueError:
            changes[name] = text
    check_keys("the search's options", changes, Options)
    options = dataclasses.replace(options, **changes)
    options.check()
    final = override(final, parts["final"]).with_changes(**FOUND)
    return override(supernet, parts["supernet"]), final, options
