"""A network as the parts whose latencies add up: the keys of a latency table. Standard library only.

A part is named by all its latency depends on and by nothing else, so that the same block in another network, stage or
position has the same key: ``mb4d 64 x4 at 16x16``, ``embedding conv 32-64 at 8x8``, ``stem 3-32 stride 2 at 16x16``.
An embedding with attention has its input's map, too, over which its keys and values run: ``embedding attn 192-256 from
4x4 at 2x2``; a map of 3x3 leads to the same output.
What the first block of its kind in a stage costs beyond the others, such as a change of layout for attention, is a part
of its own: ``first mb3d 64 at 8x8``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from efficientformer.spec.arch import BLOCK_KINDS, ArchSpec
from efficientformer.spec.count import count_parts
from efficientformer.spec.errors import SpecError
from efficientformer.spec.geometry import Grid

BLOCKS = sum(BLOCK_KINDS.values(), ())
_KEY = re.compile(
    r"(?P<kind>stem|embedding conv|embedding attn|head|(?:first )?[a-z0-9_]+) "
    r"(?:(?P<dim>\d{1,5})-)?(?P<width>\d{1,7})"
    r"(?: x(?P<expansion>\d{1,2}(?:\.\d{1,6})?))?"
    r"(?: stride (?P<stride>[124]))?"
    r"(?: from (?P<from_height>\d{1,4})x(?P<from_breadth>\d{1,4}))?"
    r" at (?P<height>\d{1,4})x(?P<breadth>\d{1,4})"
)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a network.

    Attributes:
        kind: ``stem``, ``embedding conv``, ``embedding attn``, a block kind, ``first`` and a block kind, or ``head``
            (final norm, mean and head).
        dim: Input channels: of the picture, of the embedding's input; of a head, its input; 0 for all else.
        width: Output channels: of a head, the classes.
        grid: Height and width of its map: the output's, except for a head.
        expansion: For blocks: hidden width of the MLP over ``width``.
        stride: Total stride of a stem, or of the attention of ``attn_ffn``.
        source: Height and width of the map that an ``embedding attn`` takes; nothing for all else.
    """

    kind: str
    dim: int
    width: int
    grid: Grid
    expansion: float = 0.0
    stride: int = 1
    source: Grid | None = None

    @property
    def is_block(self) -> bool:
        """Whether it is a block, as opposed to stem, embedding, head and what first blocks add."""
        return self.kind in BLOCKS

    @property
    def key(self) -> str:
        """Its name in a table; ``parse`` gives the equal part back."""
        size = f"{self.dim}-{self.width}" if self.dim else str(self.width)
        ratio = f" x{self.expansion:g}" if self.is_block else ""
        stride = f" stride {self.stride}" if self.kind in ("stem", "attn_ffn") else ""
        source = f" from {self.source[0]}x{self.source[1]}" if self.source else ""
        return f"{self.kind} {size}{ratio}{stride}{source} at {self.grid[0]}x{self.grid[1]}"

    @classmethod
    def parse(cls, key: str) -> Part:
        """Read a key.

        Raises:
            SpecError: If it names no part.
        """
        match = _KEY.fullmatch(key)
        if match is None:
            raise SpecError("Illegal key of a latency table", expected="such as 'mb4d 64 x4 at 16x16'", found=repr(key))
        found = match.groupdict(default="0")
        grid = (int(found["height"]), int(found["breadth"]))
        stride = int(found["stride"]) or 1
        source = (int(found["from_height"]), int(found["from_breadth"])) if match["from_height"] else None
        part = cls(
            found["kind"], int(found["dim"]), int(found["width"]), grid, float(found["expansion"]), stride, source
        )
        if part.key != key:
            raise SpecError("Illegal key of a latency table", expected=repr(part.key), found=repr(key))
        return part

    def widened(self, *, dim: int | None = None, width: int | None = None) -> Part:
        """Return the same part with other channels."""
        new_dim, new_width = self.dim if dim is None else dim, self.width if width is None else width
        return dataclasses.replace(self, dim=new_dim, width=new_width)


def parts_of(spec: ArchSpec) -> tuple[Part, ...]:
    """Return the parts of a network in the order of execution; what remains is the table's ``base``."""
    width, grid = spec.stages[0].width, spec.grids[0]
    parts = [Part("stem", spec.in_chans, width, grid, stride=spec.stem_stride)]
    for stage, before, grid in zip(spec.stages, (None, *spec.grids[:-1]), spec.grids, strict=True):
        if stage.embedding != "stem":
            source = before if stage.embedding == "attn" else None
            parts.append(Part(f"embedding {stage.embedding}", width, stage.width, grid, source=source))
        width = stage.width
        parts += [Part(f"first {kind}", 0, width, grid) for kind in dict.fromkeys(b.kind for b in stage.blocks)]
        parts += [Part(b.kind, 0, width, grid, b.expansion, b.stride) for b in stage.blocks]
    parts.append(Part("head", width, spec.num_classes, spec.grids[-1]))
    return tuple(parts)


def weights_of(spec: ArchSpec) -> int:
    """Return the weights of a network as it is deployed: with one head."""
    return sum(part.count.params for part in count_parts(spec) if part.name != "head_dist")


def steps(size: float, bends: Sequence[float]) -> list[float]:
    """Return how much of ``size`` lies between each of the ascending ``bends`` and the next; the last has no end."""
    ends = (*bends, math.inf)[1:]
    return [max(0.0, min(size, end) - bend) for bend, end in zip(bends, ends, strict=True)]


def doublings(size: float, smallest: float) -> float:
    """Return how often ``smallest`` is to be doubled to get ``size``; 0 if ``size`` is smaller, or ``smallest`` 0."""
    return max(0.0, math.log2(size) - math.log2(smallest)) if smallest else 0.0
