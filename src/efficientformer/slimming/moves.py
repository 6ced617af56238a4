"""The actions of gradual slimming (paper section 4): what can be cut next, proposed by importance.

A1 ``depth``: the least important MetaPath becomes identity. A2 ``type``: the first block with attention loses it. A3
``width``: the least important stage loses a step of channels. For V2 also ``expansion``: the MLPs of the least
important stage lose a step of their expansion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from efficientformer.slimming.importance import Importances
from efficientformer.slimming.space import IDENTITY, WITHOUT_ATTENTION, Candidate, Space
from efficientformer.spec.errors import SpecError
from efficientformer.spec.fields import check_choice, check_int, check_keys

ACTION_KINDS = ("depth", "type", "width", "expansion")


@dataclass(frozen=True, slots=True)
class Action:
    """One cut.

    Attributes:
        kind: ``depth``, ``type``, ``width`` or ``expansion``.
        stage: Zero-based stage.
        position: Zero-based position in the stage, for ``depth`` and ``type``; -1 for the others.
    """

    kind: str
    stage: int
    position: int = -1

    def __post_init__(self) -> None:
        check_choice("action", self.kind, ACTION_KINDS)
        check_int("stage of an action", self.stage, 0, 3)
        check_int("position of an action", self.position, -1, 255)

    def apply(self, space: Space, candidate: Candidate) -> Candidate:
        """Return the candidate after the cut.

        Raises:
            SpecError: If there is nothing to cut there.
        """
        stage, position = self.stage, self.position
        if self.kind == "width":
            narrower = [width for width in space.widths(stage) if width < candidate.widths[stage]]
            if narrower:
                return candidate.with_width(stage, narrower[0])
        elif self.kind == "expansion":
            if _can_lower(space, candidate, stage):
                return candidate.with_expansions(stage, _lowered(space, candidate, stage))
        elif position in self._blocks(space, candidate):
            kind = IDENTITY if self.kind == "depth" else WITHOUT_ATTENTION[candidate.kinds[stage][position]]
            return candidate.with_kind(stage, position, kind)
        raise SpecError(f"Nothing to cut: {self.describe(candidate)}", hint="The path belongs to another start network")

    def _blocks(self, space: Space, candidate: Candidate) -> tuple[int, ...]:
        """Return the positions a ``depth`` or ``type`` cut may be made at."""
        if self.kind == "depth":
            return space.removable(candidate, self.stage)
        return candidate.positions(self.stage, attention=True)

    def describe(self, before: Candidate) -> str:
        """Say the cut in words, for a candidate it is applied to."""
        where = f"stage {self.stage + 1}"
        if self.kind == "width":
            return f"{where} narrower than {before.widths[self.stage]} channels"
        if self.kind == "expansion":
            return f"smaller MLPs in {where}"
        block = f"block {self.position + 1} of {where}"
        return f"{block} removed" if self.kind == "depth" else f"{block} loses its attention"

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON values; ``from_dict`` gives the equal action back."""
        return {"kind": self.kind, "stage": self.stage, "position": self.position}

    @classmethod
    def from_dict(cls, data: object) -> Action:
        """Build an action from what ``to_dict`` returned, trusting nothing in it."""
        return cls(**check_keys("an action", data, cls))


def propose(space: Space, candidate: Candidate, importances: Importances, breadth: int) -> list[Action]:
    """Return the cuts worth scoring, in a fixed order.

    Args:
        space: What is legal.
        candidate: Where the search stands.
        importances: Scores of the MetaPaths.
        breadth: Cuts of each kind, the least important first; 1 as in the paper.
    """
    stages = range(len(candidate.widths))

    def least(actions: list[Action], score: Callable[[Action], float]) -> list[Action]:
        return sorted(actions, key=lambda action: (score(action), action.stage, action.position))[:breadth]

    def of_stage(action: Action) -> float:
        return importances.stage(candidate, action.stage)

    depth = [Action("depth", stage, position) for stage in stages for position in space.removable(candidate, stage)]
    kinds = [
        Action("type", stage, found[0]) for stage in stages if (found := candidate.positions(stage, attention=True))
    ]
    width = [Action("width", stage) for stage in stages if candidate.widths[stage] > space.widths(stage)[-1]]
    expansion = [Action("expansion", stage) for stage in stages if _can_lower(space, candidate, stage)]
    return [
        *least(depth, lambda action: importances.paths[action.stage][action.position]),
        *kinds[:breadth],
        *least(width, of_stage),
        *least(expansion, of_stage),
    ]


def _lowered(space: Space, candidate: Candidate, stage: int) -> tuple[float, ...]:
    """Return a stage's expansions after the largest of its blocks lost a step."""
    kept, values = candidate.positions(stage), candidate.expansions[stage]
    highest = max(values[position] for position in kept)

    def lowered(position: int) -> float:
        smaller = [value for value in space.expansions(stage, position) if value < values[position]]
        cut = position in kept and values[position] == highest and smaller
        return smaller[0] if cut else values[position]

    return tuple(lowered(position) for position in range(len(values)))


def _can_lower(space: Space, candidate: Candidate, stage: int) -> bool:
    kept = candidate.positions(stage)
    return bool(kept) and _lowered(space, candidate, stage) != candidate.expansions[stage]
