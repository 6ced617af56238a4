"""What is wrong with a data set, before a training finds out: damage, copies, leaks, contradictions, imbalance."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from efficientformer.data.align import class_keys, match_classes
from efficientformer.data.fingerprint import FINGERPRINT, near_pairs, take
from efficientformer.data.listing import counted, some
from efficientformer.data.parts import WHOLE
from efficientformer.data.source import ImageSource
from efficientformer.data.sources import VAL_FRACTION, find_parts, split_indices
from efficientformer.runtime.image import in_turn_if_large
from efficientformer.runtime.pipeline import in_order
from efficientformer.runtime.processor import available_cores
from efficientformer.spec.errors import ImageError

FEW = 10  # pictures below which a class is called small
MIN_SIDE = 8  # pixels
MAX_ASPECT = 10.0

_BLOCK = 32  # pictures a thread takes at a time

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of the checked data set.

    Attributes:
        split: Its part: ``train``, ``val``, ``test`` or ``all``.
        index: Its number in that part.
        name: Its name there.
        label: Its class name.
    """

    split: str
    index: int
    name: str
    label: str

    def __str__(self) -> str:
        return self.name if self.split == "all" else f"{self.split}/{self.name}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One picture and what is wrong with it."""

    picture: Picture
    reason: str


@dataclass(frozen=True, slots=True)
class Group:
    """Pictures that are the same.

    Attributes:
        kind: ``bytes`` for equal files, ``pixels`` for different files that decode to the same, ``near`` for pictures
            that look alike (one picture stands for its exact copies there).
        pictures: All of them, in order.
    """

    kind: str
    pictures: tuple[Picture, ...]

    @property
    def leak(self) -> bool:
        """Whether they are in training and evaluation at once."""
        return len({each.split for each in self.pictures}) > 1

    @property
    def contradiction(self) -> bool:
        """Whether they carry different labels."""
        return len({each.label for each in self.pictures}) > 1

    @property
    def verdict(self) -> str:
        """What is wrong with them, in capitals; empty if they are only superfluous."""
        return ", ".join(["LEAK"] * self.leak + ["CONTRADICTION"] * self.contradiction)


@dataclass(frozen=True)
class Balance:
    """How the pictures of one part are spread over its classes.

    Attributes:
        split: The part.
        classes: Number of pictures of every class, by name in order of the labels.
    """

    split: str
    classes: tuple[tuple[str, int], ...]

    @property
    def pictures(self) -> int:
        """Number of pictures."""
        return sum(count for _, count in self.classes)

    @property
    def ratio(self) -> float:
        """Size of the largest class over that of the smallest that is not empty."""
        counts = [count for _, count in self.classes if count]
        return max(counts) / min(counts) if counts else 1.0

    @property
    def small(self) -> list[str]:
        """Names of the classes with fewer than ten pictures."""
        return [name for name, count in self.classes if count < FEW]


@dataclass(frozen=True)
class DataReport:
    """What ``check`` found.

    Attributes:
        path: The data set.
        balances: The classes of every part.
        corrupt: Pictures that cannot be decoded.
        odd: Pictures that can, but are tiny or very elongated.
        groups: Copies, the ones that leak or contradict first.
        sizes: Smallest and largest (width, height); zeros if nothing could be decoded.
        forms: How many pictures have each format and mode, most frequent first.
        unknown_classes: Classes of evaluation parts that the training part has not.
        obstacles: Why no honest training comes of this data set as it is.
        notes: What was left out of the listing or of the search.
        sources: The parts, to show pictures from.
    """

    path: str
    balances: tuple[Balance, ...]
    corrupt: tuple[Finding, ...]
    odd: tuple[Finding, ...]
    groups: tuple[Group, ...]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    forms: tuple[tuple[str, int], ...]
    unknown_classes: tuple[str, ...]
    obstacles: tuple[str, ...]
    notes: tuple[str, ...]
    sources: Mapping[str, ImageSource] = field(repr=False, compare=False)

    @property
    def pictures(self) -> int:
        """Number of pictures in all parts."""
        return sum(balance.pictures for balance in self.balances)

    @cached_property
    def leaks(self) -> tuple[Group, ...]:
        """Copies that are in training and evaluation at once."""
        return tuple(group for group in self.groups if group.leak)

    @cached_property
    def contradictions(self) -> tuple[Group, ...]:
        """Copies with different labels."""
        return tuple(group for group in self.groups if group.contradiction)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: no damage, leak, contradiction, class that cannot be learnt, or other obstacle."""
        return not (self.corrupt or self.leaks or self.contradictions or self.unknown_classes or self.obstacles)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures, ready for JSON."""
        return {
            "path": self.path,
            "ok": self.ok,
            "pictures": self.pictures,
            "splits": [
                {
                    "split": each.split,
                    "pictures": each.pictures,
                    "classes": [{"class": name, "pictures": count} for name, count in each.classes],
                    "largest_over_smallest": each.ratio,
                    "small_classes": each.small,
                }
                for each in self.balances
            ],
            "sizes": {"smallest": self.sizes[0], "largest": self.sizes[1]},
            "forms": dict(self.forms),
            "corrupt": [{"picture": str(each.picture), "reason": each.reason} for each in self.corrupt],
            "odd": [{"picture": str(each.picture), "reason": each.reason} for each in self.odd],
            "groups": [
                {
                    "kind": group.kind,
                    "leak": group.leak,
                    "contradiction": group.contradiction,
                    "pictures": [{"picture": str(each), "class": each.label} for each in group.pictures],
                }
                for group in self.groups
            ],
            "unknown_classes": self.unknown_classes,
            "obstacles": self.obstacles,
            "notes": self.notes,
        }


def check(path: str | os.PathLike[str], near: bool = True, progress: Progress | None = None) -> DataReport:
    """Read every picture of a data set and say what is wrong with it.

    Args:
        path: A data set in any layout that ``open_source`` knows; all its parts are checked together.
        near: Whether to look for pictures that are not the same but look alike.
        progress: Called with the number of pictures done and that of all.

    Returns:
        The report. Bad pictures are in it, they stop nothing.

    Raises:
        DataError: If there is no data set, or its layout is unknown or damaged.
    """
    sources = {name: opener() for name, opener in find_parts(path).items()}
    table = _Table(sources)
    prints, corrupt, forms = _read_all(table, progress)
    groups, complete = _groups(table, prints, near)
    notes = [f"{name}: {note}" for name, source in sources.items() for note in source.notes]
    if not complete:
        notes.append("some pictures have so many look-alikes that not all of these were compared")
    read = prints[prints["read"]]
    return DataReport(
        path=os.fspath(path),
        balances=tuple(_balance(name, source) for name, source in sources.items()),
        corrupt=tuple(corrupt),
        odd=tuple(_odd(table, prints)),
        groups=tuple(sorted(groups, key=lambda group: (not group.leak, not group.contradiction))),
        sizes=_sizes(read),
        forms=tuple(forms.most_common()),
        unknown_classes=_unknown_classes(sources),
        obstacles=tuple(_obstacles(sources, groups)),
        notes=tuple(notes),
        sources=sources,
    )


class _Table:
    """All pictures of all parts under one number each."""

    def __init__(self, sources: Mapping[str, ImageSource]) -> None:
        self.sources = sources
        self._splits = list(sources)
        self._classes = _comparable_classes(sources)
        self._ends = np.cumsum([len(source) for source in sources.values()])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Picture:
        part = int(np.searchsorted(self._ends, number, "right"))
        split = self._splits[part]
        source = self.sources[split]
        index = int(number - self._ends[part] + len(source))
        return Picture(split, index, source.name(index), self._classes[split][source.labels[index]])


def _read_all(table: _Table, progress: Progress | None) -> tuple[npt.NDArray[np.void], list[Finding], Counter[str]]:
    """Fingerprint every picture; Pillow and hashlib let other threads run while they work."""
    prints = np.zeros(len(table), FINGERPRINT)
    corrupt: list[Finding] = []
    forms: Counter[str] = Counter()

    def look(numbers: list[int]) -> list[str | Finding]:
        return [_look(table, number, prints[number : number + 1].reshape(())) for number in numbers]

    found = in_order(range(len(table)), look, workers=available_cores(), chunk=_BLOCK)
    for done, each in enumerate(found, 1):
        if isinstance(each, Finding):
            corrupt.append(each)
        else:
            forms[each] += 1
        if progress and (done % _BLOCK == 0 or done == len(table)):
            progress(done, len(table))
    return prints, corrupt, forms


def _look(table: _Table, number: int, out: npt.NDArray[np.void]) -> str | Finding:
    """Write a picture's fingerprint and return its form, or else what is wrong with it."""
    picture = table[number]
    try:
        with in_turn_if_large():
            return take(table.sources[picture.split].read(picture.index), str(picture), out)
    except ImageError as error:
        return Finding(picture, error.found or str(error))


def _groups(table: _Table, prints: npt.NDArray[np.void], near: bool) -> tuple[list[Group], bool]:
    """Return the copies, and whether the search for similar ones was complete."""
    numbers = np.flatnonzero(prints["read"])
    same_bytes = _equal(numbers, prints["file"][numbers])
    same_pixels = _equal(numbers, prints["pixels"][numbers])
    groups = [_group(table, "bytes", members) for members in same_bytes]
    groups += [_group(table, "pixels", each) for each in same_pixels if len(np.unique(prints["file"][each])) > 1]
    if not near:
        return groups, True
    first = np.sort(numbers[np.unique(prints["pixels"][numbers], return_index=True)[1]])
    pairs, complete = near_pairs(prints[first])
    return groups + [_group(table, "near", first[members]) for members in _connected(pairs)], complete


def _group(table: _Table, kind: str, numbers: npt.NDArray[np.int64]) -> Group:
    return Group(kind, tuple(table[int(number)] for number in numbers))


def _equal(numbers: npt.NDArray[np.int64], keys: npt.NDArray[np.uint64]) -> list[npt.NDArray[np.int64]]:
    """Return the numbers whose keys are equal, by twos or more."""
    order = np.argsort(keys, kind="stable")
    cuts = np.flatnonzero(np.diff(keys[order])) + 1
    return [numbers[each] for each in np.split(order, cuts) if len(each) > 1]


def _connected(pairs: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Return the connected components of a graph, each sorted."""
    parent: dict[int, int] = {}

    def root(node: int) -> int:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for one, other in pairs.tolist():
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    components: dict[int, list[int]] = {}
    for node in sorted(parent):
        components.setdefault(root(node), []).append(node)
    return [np.array(members) for members in components.values()]


def _odd(table: _Table, prints: npt.NDArray[np.void]) -> Iterator[Finding]:
    """Yield the pictures that hold too little, or too long a strip, for a square crop to show much."""
    short = np.minimum(prints["width"], prints["height"])
    long = np.maximum(prints["width"], prints["height"])
    for number in np.flatnonzero(prints["read"] & ((short < MIN_SIDE) | (long > short * MAX_ASPECT))).tolist():
        width, height = prints["width"][number], prints["height"][number]
        kind = "tiny" if short[number] < MIN_SIDE else "elongated"
        yield Finding(table[number], f"{kind}: {width} x {height}")


def _sizes(read: npt.NDArray[np.void]) -> tuple[tuple[int, int], tuple[int, int]]:
    if not len(read):
        return (0, 0), (0, 0)
    width, height = read["width"], read["height"]
    return (int(width.min()), int(height.min())), (int(width.max()), int(height.max()))


def _balance(split: str, source: ImageSource) -> Balance:
    counts = np.bincount(source.labels, minlength=len(source.classes)).tolist()
    return Balance(split, tuple(zip(source.classes, counts, strict=True)))


def _unknown_classes(sources: Mapping[str, ImageSource]) -> tuple[str, ...]:
    """Return the classes with pictures to evaluate on and none to learn from."""
    if "train" not in sources:
        return ()
    classes = _comparable_classes(sources)
    used = {name: {classes[name][label] for label in np.unique(source.labels)} for name, source in sources.items()}
    return tuple(sorted(set(chain.from_iterable(used.values())) - used["train"]))


def _obstacles(sources: Mapping[str, ImageSource], groups: Sequence[Group]) -> Iterator[str]:
    """Yield what stands in the way of a training, or makes its figures too good."""
    name = next((each for each in ("train", WHOLE) if each in sources), None)
    if name is None:
        return
    if len(sources[name].classes) < 2:
        yield "there is one class, and nothing to tell apart"
    empty = sorted({*range(len(sources[name].classes))} - set(sources[name].labels.tolist()))
    if empty and (name == "train" or sources[name].unnamed):
        found = some(sources[name].classes[label] for label in empty)
        yield f"{counted(len(empty), 'class', 'classes')} without a picture to learn from: {found}"
    if "val" in sources or "test" in sources:
        return
    held_out = set(split_indices(sources[name], VAL_FRACTION, 0)[1].tolist())
    if not held_out:
        yield "no class has two pictures, so that none can be set aside to measure on"
    torn = sum(0 < len(held_out & (members := {each.index for each in group.pictures})) < len(members)
               for group in groups)  # fmt: skip
    if torn:
        yield (
            f"a training sets {VAL_FRACTION:.0%} of the pictures aside to measure on, and {torn:,} of the groups of "
            "copies would be on both sides: remove the copies, or divide the data set into train/ and val/"
        )


def _comparable_classes(sources: Mapping[str, ImageSource]) -> dict[str, Sequence[str]]:
    """Return the class names of every part, in the words of the training part, or else the first: as training would."""
    reference = sources.get("train", next(iter(sources.values()))).classes
    keys = class_keys(reference)
    found: dict[str, Sequence[str]] = {}
    for part, source in sources.items():
        labels = match_classes(source.classes, reference)
        own = class_keys(source.classes)
        found[part] = [keys[label] if label >= 0 else name for label, name in zip(labels, own, strict=True)]
    return found
