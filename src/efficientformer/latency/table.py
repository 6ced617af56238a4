"""A latency table: what each part of a network costs on one engine, and the prediction for whole networks.

Standard library only, so that a table can be read and asked where no engine is installed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from efficientformer.latency.parts import Part, doublings, parts_of, steps, weights_of
from efficientformer.runtime.engines import ENGINE_KEYS, ENGINE_PRECISIONS
from efficientformer.spec.arch import BLOCK_KINDS, ArchSpec, AttentionSpec, load_json
from efficientformer.spec.errors import SpecError, UsageError
from efficientformer.spec.fields import check_choice, check_int, check_keys, check_number
from efficientformer.spec.text import printable
from efficientformer.spec.variants import VARIANTS
from efficientformer.spec.whole import named_by, whole_file

SCHEMA = 3  # 1 had other costs of weights, and no parts for first blocks; 2 had no growth
READ_SCHEMAS = (2, SCHEMA)
MAX_PARTS = 200_000
MAX_MS = 1e6
_LIKES = ("efficientformer_l1", "efficientformerv2_s0")
HERE, ELSEWHERE = "measured here", "from elsewhere"


@dataclass(frozen=True, slots=True)
class Cost:
    """What one part adds to a network's latency.

    Attributes:
        ms: Marginal latency in milliseconds.
        error_ms: Its standard error.
        growth_ms: What each doubling of the network's weights adds to it.
    """

    ms: float
    error_ms: float
    growth_ms: float = 0.0

    def __post_init__(self) -> None:
        check_number("part's latency in ms", self.ms, 0, MAX_MS)
        check_number("part's error in ms", self.error_ms, 0, MAX_MS)
        check_number("part's growth in ms", self.growth_ms, 0, MAX_MS)

    def after(self, grown: float) -> Cost:
        """Return what it is in a network of so many doublings."""
        return Cost(self.ms + grown * self.growth_ms, self.error_ms) if self.growth_ms else self


@dataclass(frozen=True, slots=True)
class LatencyPrediction:
    """A predicted latency.

    Attributes:
        ms: The latency in milliseconds.
        error_ms: Half the width of the band that holds about 95 % of networks.
    """

    ms: float
    error_ms: float


@dataclass(frozen=True, slots=True)
class Share:
    """What one kind of part adds to a predicted latency.

    Attributes:
        part: Its key; ``base`` what every network costs, ``weights`` what all its weights cost.
        count: How many of it the network has.
        ms: What they add, in milliseconds.
    """

    part: str
    count: int
    ms: float


@dataclass(frozen=True)
class LatencyTable:
    """Latencies of the parts of a space of networks, on one engine of one machine.

    A network's latency is ``base`` plus the cost of each of its parts, more in a larger network, plus what its weights
    cost in all, which grows once they outgrow a cache. What was measured are whole networks; the costs were fitted to
    them, so a part costs what it adds to a network, not what it takes alone. All latencies are of one picture, medians
    of many runs.

    Attributes:
        engine: The engine, as in ``runtime.engines.ENGINE_KEYS``.
        precision: What it computed in.
        threads: Its threads; None if it was left to choose.
        family: Family of the networks.
        attention: Sizes of their attentions.
        base: What every network costs.
        costs: Cost of each part, by key (see ``latency.parts``).
        weights: Threshold in millions of weights, ascending, and the cost of each million from it to the next one.
        spread: Relative standard error of a prediction, from networks that the fit had not seen.
        networks: How many networks were measured.
        environment: Where it was measured: ``runtime.timing.environment`` and the engine's name.
        input_sizes: The input sizes (height, width) of those networks.
        smallest: Weights of the smallest of them in millions, from which doublings count; 0 for no growth.

    Raises:
        SpecError: If a value is illegal.
    """

    engine: str
    precision: str
    threads: int | None
    family: str
    attention: AttentionSpec
    base: Cost
    costs: Mapping[str, Cost]
    weights: Mapping[float, Cost]
    spread: float
    networks: int
    environment: Mapping[str, Any] = field(default_factory=dict)
    input_sizes: tuple[tuple[int, int], ...] = ()
    smallest: float = 0.0

    def __post_init__(self) -> None:
        check_choice("engine of a latency table", self.engine, ENGINE_KEYS)
        check_choice("precision of a latency table", self.precision, ENGINE_PRECISIONS)
        if self.threads is not None:
            check_int("threads of a latency table", self.threads, 1, 4096)
        check_choice("family of a latency table", self.family, tuple(BLOCK_KINDS))
        check_number("spread of a latency table", self.spread, 0, 10)
        check_int("networks of a latency table", self.networks, 0, 1_000_000)
        check_number("smallest network of a latency table in millions of weights", self.smallest, 0, 1e6)
        if not isinstance(self.attention, AttentionSpec) or not isinstance(self.base, Cost):
            raise SpecError("Illegal latency table", expected="an AttentionSpec and a base Cost")
        if not isinstance(self.costs, Mapping) or not 0 < len(self.costs) <= MAX_PARTS:
            raise SpecError("Illegal costs of a latency table", expected=f"1 to {MAX_PARTS} parts")
        for key, cost in self.costs.items():
            Part.parse(key)
            if not isinstance(cost, Cost):
                raise SpecError(f"Illegal cost of {key!r}", expected="a Cost", found=type(cost).__name__)
        for threshold, cost in self.weights.items():
            check_number("threshold of a latency table in millions of weights", threshold, 0, 1e6)
            if not isinstance(cost, Cost):
                raise SpecError("Illegal cost of weights", expected="a Cost", found=type(cost).__name__)
        object.__setattr__(self, "weights", MappingProxyType(dict(sorted(self.weights.items()))))
        object.__setattr__(self, "costs", MappingProxyType(dict(self.costs)))
        object.__setattr__(self, "environment", MappingProxyType(dict(self.environment)))

    @property
    def origin(self) -> str:
        """``measured here`` if hardware, cores, system and the engine's version are this machine's, else
        ``from elsewhere``.
        """  # noqa: D205 (one sentence)
        from efficientformer.runtime.timing import environment

        here = environment(self.engine)
        same = all(self.environment.get(name) == here[name] for name in ("hardware", "cores", "system"))
        versions = self.environment.get("versions")
        known = versions.get(self.engine) if isinstance(versions, Mapping) else None
        return HERE if same and known == here["versions"].get(self.engine) and known else ELSEWHERE

    @property
    def device(self) -> str:
        """Where and when it was measured, in words."""
        return ", ".join(printable(str(self.environment.get(name, f"unknown {name}"))) for name in ("hardware", "date"))

    def missing(self, spec: ArchSpec, *, interpolate: bool = False) -> tuple[str, ...]:
        """Return the keys a prediction for ``spec`` would lack, each once; empty if there is none."""
        found = (part for part in dict.fromkeys(parts_of(spec)) if self._lookup(part, interpolate) is None)
        return tuple(part.key for part in found)

    def predict(self, spec: ArchSpec, *, interpolate: bool = False) -> LatencyPrediction:
        """Predict the latency of one picture through a network.

        Args:
            spec: The network.
            interpolate: Whether a width between two measured ones may be read off the line between their costs.
                Engines work in steps of 8 or 16 channels, so this can be wrong by a whole step.

        Raises:
            UsageError: If the table lacks a part; the message names it and the command that measures it.
        """
        costs = self._costs(spec, interpolate)
        ms = sum(share.ms for share in self._shares(spec, costs))
        variance = sum((count * cost.error_ms) ** 2 for _, count, cost in costs)
        return LatencyPrediction(ms, 2 * math.sqrt(variance + (self.spread * ms) ** 2))

    def shares(self, spec: ArchSpec, *, interpolate: bool = False) -> tuple[Share, ...]:
        """Return what makes up a network's predicted latency, parts in the order of execution.

        Args:
            spec: The network.
            interpolate: As for ``predict``.

        Raises:
            UsageError: As ``predict``.
        """
        return tuple(self._shares(spec, self._costs(spec, interpolate)))

    def _shares(self, spec: ArchSpec, costs: list[tuple[Part, int, Cost]]) -> Iterator[Share]:
        yield Share("base", 1, self.base.ms)
        yield from (Share(part.key, count, count * cost.ms) for part, count, cost in costs)
        millions = steps(weights_of(spec) / 1e6, tuple(self.weights))
        priced = zip(millions, self.weights.values(), strict=True)
        yield Share("weights", 1, sum(share * cost.ms for share, cost in priced))

    def _costs(self, spec: ArchSpec, interpolate: bool) -> list[tuple[Part, int, Cost]]:
        """Return a network's parts, how many of each, and what one costs there; UsageError if one is missing."""
        self._check_kind(spec)
        if missing := self.missing(spec, interpolate=interpolate):
            raise UsageError(
                f"The latency table has no {missing[0]!r}",
                expected=f"every part of the network among its {len(self.costs):,}",
                found=f"{len(missing)} missing" + (f", also {missing[1]!r}" if len(missing) > 1 else ""),
                hint=f"Measure it: {self._command(spec)}",
            )
        counted = Counter(parts_of(spec)).items()
        grown = doublings(weights_of(spec) / 1e6, self.smallest)
        found = [(part, count, self._lookup(part, interpolate, grown)) for part, count in counted]
        return [(part, count, cost) for part, count, cost in found if cost is not None]

    def _check_kind(self, spec: ArchSpec) -> None:
        """Refuse networks whose parts have the same keys but other insides."""
        for name in ("family", "attention"):
            if getattr(spec, name) != getattr(self, name):
                raise UsageError(
                    f"The latency table is of networks with another {name}",
                    expected=str(getattr(self, name)),
                    found=str(getattr(spec, name)),
                    hint=f"Measure one: {self._command(spec)}",
                )

    def _lookup(self, part: Part, interpolate: bool, grown: float = 0.0) -> Cost | None:
        """Return the cost of a part in a network of so many doublings, or None."""
        cost = self.costs.get(part.key)
        if cost is not None:
            return cost.after(grown)
        if not interpolate:
            return None
        if part.kind != "head" and part.width not in self._channels:
            return self._between(part, "width", grown)
        if part.kind != "stem" and part.dim and part.dim not in self._channels:
            return self._between(part, "dim", grown)
        return None

    def _between(self, part: Part, name: str, grown: float) -> Cost | None:
        """Return the cost on the line between the nearest measured channels below and above, or None."""
        wanted: int = getattr(part, name)
        below = max((channels for channels in self._channels if channels < wanted), default=0)
        above = min((channels for channels in self._channels if channels > wanted), default=0)
        if not below or not above:
            return None
        low, high = (self._lookup(part.widened(**{name: channels}), True, grown) for channels in (below, above))
        if low is None or high is None:
            return None
        share = (wanted - below) / (above - below)
        # engines work in steps, so the truth may be either end's
        error = max(low.error_ms, high.error_ms) + abs(high.ms - low.ms) / 2
        return Cost((1 - share) * low.ms + share * high.ms, error)

    @cached_property
    def _channels(self) -> tuple[int, ...]:
        """Return the measured widths of blocks."""
        return tuple(sorted({part.width for part in map(Part.parse, self.costs) if part.is_block}))

    def _command(self, spec: ArchSpec) -> str:
        """Return the command that measures a table in which ``spec`` has all its parts."""
        widths = ",".join(str(width) for width in sorted({*self._channels, *(stage.width for stage in spec.stages)}))
        ratios = sorted({block.expansion for stage in spec.stages for block in stage.blocks}) or [4.0]
        return table_command(
            engine=self.engine,
            precision=self.precision,
            threads=self.threads,
            like=likeness(spec),
            widths=widths,
            depths=",".join(str(max(1, len(stage.blocks))) for stage in spec.stages),
            expansions=",".join(f"{ratio:g}" for ratio in ratios),
            input_size="x".join(map(str, spec.input_size)),
            stem_stride=spec.stem_stride,
            classes=spec.num_classes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; ``from_dict`` gives the equal table back."""
        return {
            "schema": SCHEMA,
            "engine": self.engine,
            "precision": self.precision,
            "threads": self.threads,
            "family": self.family,
            "attention": dataclasses.asdict(self.attention),
            "input_sizes": [list(size) for size in self.input_sizes],
            "networks": self.networks,
            "smallest": self.smallest,
            "spread": self.spread,
            "environment": dict(self.environment),
            "base": _as_pair(self.base),
            "weights": [[threshold, *_as_pair(cost)] for threshold, cost in self.weights.items()],
            "costs": {key: [*_as_pair(cost), round(cost.growth_ms, 7)] for key, cost in self.costs.items()},
        }

    @classmethod
    def from_dict(cls, data: object) -> LatencyTable:
        """Build a table from what ``to_dict`` returned, trusting nothing in it.

        Raises:
            SpecError: On unknown or missing fields and on illegal values.
        """
        if isinstance(data, dict):
            data = dict(data)
            if data.get("schema") == 1:
                raise SpecError("The latency table is of an older version", expected=f"schema {SCHEMA}",
                                found="schema 1", hint=f"Measure it again: {table_command()}")  # fmt: skip
            check_choice("latency table schema", data.pop("schema", None), READ_SCHEMAS)
        fields = check_keys("the latency table", data, cls)
        fields["attention"] = AttentionSpec(**check_keys("attention", fields["attention"], AttentionSpec))
        if not isinstance(fields["costs"], dict) or not isinstance(fields.get("environment", {}), dict):
            raise SpecError("Illegal latency table", expected="JSON objects for costs and environment")
        fields["base"] = _as_cost("base", fields["base"], (2,))
        fields["costs"] = {key: _as_cost(key, row, (2, 3)) for key, row in fields["costs"].items()}
        fields["weights"] = _as_weights(fields["weights"])
        fields["input_sizes"] = _as_sizes(fields.get("input_sizes", []))
        return cls(**fields)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; the file appears only once it is complete.

        Raises:
            UsageError: If it cannot be written.
        """
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table, from this machine or another.

        Raises:
            UsageError: If there is no such file.
            SpecError: If it is no latency table.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            hint = f"Measure one: {table_command()}"
            raise UsageError(f"Cannot read the latency table {path}", found=str(error), hint=hint) from error
        return cls.from_dict(load_json(f"the latency table {path}", text))


def likeness(spec: ArchSpec) -> str:
    """Return a zoo network that has all of a network's kind that no option gives; or a word for the spec's own file."""
    alike = (name for name in _LIKES if _kind(VARIANTS[name]) == _kind(spec))
    return next(alike, "START_NETWORK.json")


def _kind(spec: ArchSpec) -> tuple[object, ...]:
    strides = {block.stride for block in spec.stages[2].blocks if block.has_attention} or {1}
    return spec.family, spec.in_chans, spec.attention, strides, [stage.embedding for stage in spec.stages]


def table_command(**options: object) -> str:
    """Return the command that measures a table, from its options; those that are None are left out."""
    given = [f"--{name.replace('_', '-')} {value}" for name, value in options.items() if value is not None]
    return " ".join(("efficientformer latency-table", *given, "--output FILE.json"))


def _as_pair(cost: Cost) -> list[float]:
    return [round(cost.ms, 7), round(cost.error_ms, 7)]


def _as_cost(key: str, row: object, lengths: tuple[int, ...]) -> Cost:
    if not isinstance(row, list) or len(row) not in lengths:
        raise SpecError(f"Illegal cost of {key!r}", expected="[ms, error_ms, growth_ms]", found=repr(row)[:80])
    return Cost(*row)


def _as_weights(rows: object) -> dict[float, Cost]:
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 3 for row in rows) or len(rows) > 64:
        raise SpecError("Illegal weights", expected="a list of [millions, ms, error_ms]", found=repr(rows)[:80])
    for row in rows:
        check_number("threshold of a latency table in millions of weights", row[0], 0, 1e6)
    return {row[0]: Cost(row[1], row[2]) for row in rows}


def _as_sizes(sizes: object) -> tuple[tuple[int, int], ...]:
    if not isinstance(sizes, list) or not all(isinstance(size, list) and len(size) == 2 for size in sizes):
        raise SpecError("Illegal input sizes", expected="a list of [height, width]", found=repr(sizes)[:80])
    for size in sizes:
        for side in size:
            check_int("input side", side, 1, 8192)
    return tuple((height, width) for height, width in sizes)


def write_json(path: Path, data: object) -> None:
    """Write a file of JSON, which is there whole or not at all.

    Raises:
        UsageError: If the file cannot be written.
    """
    with named_by(path), whole_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
