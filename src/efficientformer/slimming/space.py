"""The search space: every network that can be cut out of a start network, as immutable values.

Position i of a stage is a MetaPath (paper section 4): V1 chooses from {MB4D, identity} where the start network has an
MB4D and from {MB3D, MB4D, identity} where it has an MB3D; V2 likewise from {FFN, identity} and {attention + FFN, FFN,
identity}. So the start network is the largest of its space, and one whose last two stages are all MB3D spans the
paper's. Kinds only ever move to the right in these lists, which keeps every MB4D of a stage before its first MB3D.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from efficientformer.latency.design import MAX_WIDTHS, TableSpace
from efficientformer.spec.arch import ArchSpec, BlockSpec, StageSpec
from efficientformer.spec.errors import SpecError
from efficientformer.spec.fields import as_list, check_int, check_keys, check_number

IDENTITY = "identity"
WITHOUT_ATTENTION = {"mb3d": "mb4d", "attn_ffn": "ffn"}
EXPANSION_STEP = 1.0

Kinds = tuple[tuple[str, ...], ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One network of a space.

    Attributes:
        start: The network it is cut out of.
        kinds: Per stage and position of the start network, what is there now: a block kind, or ``identity``.
        widths: Channels of the four stages.
        expansions: Per stage and position, the MLP expansion, also where the block is gone.
    """

    start: ArchSpec
    kinds: Kinds
    widths: tuple[int, ...]
    expansions: tuple[tuple[float, ...], ...]

    @property
    def spec(self) -> ArchSpec:
        """The network itself: what is identity is not in it."""
        return self._spec(self.kinds)

    @property
    def full(self) -> ArchSpec:
        """The start network at this width and these expansions, with all of its blocks."""
        return self._spec(tuple(tuple(block.kind for block in stage.blocks) for stage in self.start.stages))

    def _spec(self, kinds: Kinds) -> ArchSpec:
        stages = []
        for index, stage in enumerate(self.start.stages):
            blocks = tuple(
                BlockSpec(kind, expansion, block.stride if kind == block.kind else 1)
                for kind, expansion, block in zip(kinds[index], self.expansions[index], stage.blocks, strict=True)
                if kind != IDENTITY
            )
            stages.append(StageSpec(self.widths[index], blocks, stage.embedding))
        return dataclasses.replace(self.start, stages=tuple(stages))

    def positions(self, stage: int, *, attention: bool = False) -> tuple[int, ...]:
        """Return the positions of a stage that still hold a block; with ``attention`` only those that attend."""
        kinds = enumerate(self.kinds[stage])
        return tuple(i for i, kind in kinds if kind != IDENTITY and (not attention or kind in WITHOUT_ATTENTION))

    def with_kind(self, stage: int, position: int, kind: str) -> Candidate:
        """Return the network with another kind at one position."""
        row = self.kinds[stage]
        return self._with_row("kinds", stage, (*row[:position], kind, *row[position + 1 :]))

    def with_width(self, stage: int, width: int) -> Candidate:
        """Return the network with another width of one stage."""
        return self._with_row("widths", stage, width)

    def with_expansions(self, stage: int, expansions: Iterable[float]) -> Candidate:
        """Return the network with other MLP expansions in one stage."""
        return self._with_row("expansions", stage, tuple(expansions))

    def _with_row(self, field: str, stage: int, row: object) -> Candidate:
        rows = list(getattr(self, field))
        rows[stage] = row
        changes: dict[str, Any] = {field: tuple(rows)}
        return dataclasses.replace(self, **changes)

    @property
    def key(self) -> str:
        """A text that two candidates of a space share only if they are equal."""
        return json.dumps([self.kinds, self.widths, self.expansions], separators=(",", ":"))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values without the start network; ``Space.candidate`` gives the equal candidate back."""
        return {"kinds": self.kinds, "widths": self.widths, "expansions": self.expansions}


@dataclass(frozen=True, slots=True)
class Space:
    """All networks that can be cut out of a start network.

    Attributes:
        start: The largest network.
        width_step: Channels that a cut takes away, down to the next multiple of it (16 in the paper).
        min_width: No stage becomes narrower, unless the start network's is.
        min_expansion: No MLP expansion becomes smaller; expansions are cut in V2 only, as the papers vary them there.
        min_depth: Blocks every stage keeps, as far as the start network has as many.

    Raises:
        SpecError: If a bound is illegal.
    """

    start: ArchSpec
    width_step: int = 16
    min_width: int = 16
    min_expansion: float = 1.0
    min_depth: int = 0

    def __post_init__(self) -> None:
        check_int("min_depth", self.min_depth, 0, 256)
        check_int("width_step", self.width_step, 1, 4096)
        check_int("min_width", self.min_width, 2, 8192)
        check_number("min_expansion", self.min_expansion, 0.125, 16)

    @property
    def largest(self) -> Candidate:
        """The start network."""
        stages = self.start.stages
        kinds = tuple(tuple(block.kind for block in stage.blocks) for stage in stages)
        expansions = tuple(tuple(block.expansion for block in stage.blocks) for stage in stages)
        return Candidate(self.start, kinds, tuple(stage.width for stage in stages), expansions)

    @property
    def smallest(self) -> Candidate:
        """What is left when nothing more can be cut, as narrow as allowed: stem, embeddings, heads, the blocks to keep.

        Which blocks a search keeps is its choice; here they are those that keep the largest MLPs, so that every search
        comes to a network no larger.
        """
        largest = self.largest
        widths = tuple(self.widths(stage)[-1] for stage in range(len(largest.widths)))
        expansions = tuple(
            tuple(self.expansions(stage, position)[-1] for position in range(len(row)))
            for stage, row in enumerate(largest.expansions)
        )
        kinds = []
        for row, least in zip(largest.kinds, expansions, strict=True):
            largest_first = sorted(((ratio, at) for at, ratio in enumerate(least)), reverse=True)
            kept = {at for _, at in largest_first[: self.min_depth]}
            kinds.append(tuple(WITHOUT_ATTENTION.get(k, k) if at in kept else IDENTITY for at, k in enumerate(row)))
        return Candidate(self.start, tuple(kinds), widths, expansions)

    def removable(self, candidate: Candidate, stage: int) -> tuple[int, ...]:
        """Return the positions of a stage whose block a cut may remove."""
        kept = candidate.positions(stage)
        return kept if len(kept) > self.min_depth else ()

    def options(self, stage: int, position: int) -> tuple[str, ...]:
        """Return the kinds a MetaPath chooses from, the start network's own first, identity last."""
        kind = self.start.stages[stage].blocks[position].kind
        without = WITHOUT_ATTENTION.get(kind)
        return (kind, IDENTITY) if without is None else (kind, without, IDENTITY)

    def widths(self, stage: int) -> tuple[int, ...]:
        """Return the widths a stage can have, widest first."""
        widest = self.start.stages[stage].width
        below = range((widest - 1) // self.width_step * self.width_step, 0, -self.width_step)
        return (widest, *(width for width in below if width >= min(self.min_width, widest)))

    def expansions(self, stage: int, position: int) -> tuple[float, ...]:
        """Return the MLP expansions a block can have, largest first."""
        value = self.start.stages[stage].blocks[position].expansion
        found = [value]
        while self.start.family == "v2" and found[-1] - EXPANSION_STEP >= self.min_expansion:
            found.append(found[-1] - EXPANSION_STEP)
        return tuple(found)

    def covering(self) -> Iterator[ArchSpec]:
        """Yield networks that between them have every part that any network of the space has."""
        largest, stages = self.largest, range(len(self.start.stages))
        for stage in stages[1:]:  # embeddings: every width after every width
            for before in self.widths(stage - 1):
                for width in self.widths(stage):
                    yield largest.with_width(stage - 1, before).with_width(stage, width).spec
        plain = tuple(tuple(WITHOUT_ATTENTION.get(kind, kind) for kind in row) for row in largest.kinds)
        steps = max(len(self.widths(stage)) for stage in stages)
        levels = max((len(row) for stage in stages for row in self._ratios(stage)), default=1)
        for kinds, step, level in itertools.product((largest.kinds, plain), range(steps), range(levels)):
            widths = tuple(_at(self.widths(stage), step) for stage in stages)
            ratios = tuple(tuple(_at(row, level) for row in self._ratios(stage)) for stage in stages)
            yield Candidate(self.start, kinds, widths, ratios).spec

    def _ratios(self, stage: int) -> list[tuple[float, ...]]:
        """Return the MLP expansions that each block of a stage can have."""
        return [self.expansions(stage, position) for position in range(len(self.start.stages[stage].blocks))]

    def candidate(self, data: object) -> Candidate:
        """Build a candidate from what ``Candidate.to_dict`` returned, trusting nothing in it.

        Raises:
            SpecError: If it is no network of this space.
        """
        fields = check_keys("a candidate", data, _CandidateFields)
        rows = {name: as_list(name, fields[name], 4) for name in ("kinds", "widths", "expansions")}
        kinds = tuple(tuple(as_list("kinds", row, 256)) for row in rows["kinds"])
        expansions = tuple(tuple(as_list("expansions", row, 256)) for row in rows["expansions"])
        found = Candidate(self.start, kinds, tuple(rows["widths"]), expansions)
        self.check(found)
        return found

    def check(self, candidate: Candidate) -> None:
        """Raise SpecError unless a candidate is a network of this space."""
        largest = self.largest
        shapes = [[len(row) for row in each.kinds] for each in (candidate, largest)]
        shapes += [[len(row) for row in candidate.expansions]]
        if len(candidate.widths) != len(largest.widths):
            raise SpecError("This network is of another space", expected=f"{len(largest.widths)} widths",
                            found=f"{len(candidate.widths)}")  # fmt: skip
        if candidate.start != self.start or shapes[0] != shapes[1] or shapes[2] != shapes[1]:
            raise SpecError("This network is of another space", expected=f"{shapes[1]} positions", found=f"{shapes[0]}")
        for stage, row in enumerate(candidate.kinds):
            if candidate.widths[stage] not in self.widths(stage):
                raise SpecError(f"Width of stage {stage + 1} outside the space", expected=f"{self.widths(stage)}",
                                found=f"{candidate.widths[stage]}")  # fmt: skip
            if len(candidate.positions(stage)) < min(self.min_depth, len(row)):
                raise SpecError(f"Stage {stage + 1} has too few blocks", expected=f"at least {self.min_depth}",
                                found=f"{len(candidate.positions(stage))}")  # fmt: skip
            for position, kind in enumerate(row):
                legal = self.options(stage, position)
                if kind not in legal or candidate.expansions[stage][position] not in self.expansions(stage, position):
                    raise SpecError(f"Block {position + 1} of stage {stage + 1} outside the space",
                                    expected=f"one of {legal}", found=f"{kind!r}")  # fmt: skip
        _ = candidate.spec  # its own checks: the order of 4D and 3D


def table_space(space: Space) -> TableSpace:
    """Return what a latency table must cover to predict every network of a space.

    Raises:
        SpecError: If no table can: of several strides of attention in one stage, or of another than 1 in stage 4; of
            more widths than a table has.
    """
    start = space.start
    stages = range(len(start.stages))
    ratios = {
        value
        for stage in stages
        for position in range(len(start.stages[stage].blocks))
        for value in space.expansions(stage, position)
    }
    widths = {width for stage in stages for width in space.widths(stage)}
    if len(widths) > MAX_WIDTHS:
        hint = "Raise search.width_step or search.min_width"
        raise SpecError("Too many widths for a latency table", expected=f"at most {MAX_WIDTHS}", found=f"{len(widths)}",
                        hint=hint)  # fmt: skip
    return TableSpace(
        family=start.family,
        widths=tuple(sorted(widths)),
        depths=tuple(len(stage.blocks) for stage in start.stages),
        expansions=tuple(sorted(ratios)) or (4.0,),
        input_sizes=(start.input_size,),
        stem_strides=(start.stem_stride,),
        in_chans=start.in_chans,
        num_classes=start.num_classes,
        attention=start.attention,
        stage3_stride=_stage3_stride(start),
        max_widths=tuple(stage.width for stage in start.stages),
        embeddings=tuple(stage.embedding for stage in start.stages),
    )


def _stage3_stride(start: ArchSpec) -> int:
    """Return the one stride of the attention in stage 3."""
    third, fourth = ({b.stride for b in stage.blocks if b.has_attention} or {1} for stage in start.stages[2:])
    for number, strides, legal in ((3, third, ({1}, {2})), (4, fourth, ({1},))):
        if strides not in legal:
            raise SpecError(
                f"No latency table covers the attention of stage {number}",
                expected="one stride" if len(legal) > 1 else "stride 1",
                found=f"stride {' and '.join(map(str, sorted(strides)))}",
                hint="Choose another start network",
            )
    return third.pop()


def _at(values: Sequence[T], index: int) -> T:
    """Return a value by its index, the last one for indices beyond it."""
    return values[min(index, len(values) - 1)]


@dataclass(frozen=True)
class _CandidateFields:
    kinds: Kinds
    widths: tuple[int, ...]
    expansions: tuple[tuple[float, ...], ...]
