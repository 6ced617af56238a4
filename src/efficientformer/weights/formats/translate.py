"""Tensors from a foreign layout to our names and back, with a report that accounts for every key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import CheckpointError
from efficientformer.weights.formats.detect import get_layout
from efficientformer.weights.formats.layout import Entry, entries

HEADS = ("head.", "head_dist.")  # what our names of the heads' tensors begin with
INDEX_RULE = "bias index: equal to the one computed from the grid"
AVERAGED_RULE = "bias index: computed from the grid; averaging has cut its fractions off"
COUNTER = "num_batches_tracked"  # what BatchNorm's counter of batches is called in every layout


@dataclass(frozen=True)
class Report:
    """What became of every key of a file.

    Attributes:
        mapped: (their name, our name) of every tensor taken over.
        dropped: (their name, rule) of every tensor left out on purpose.
        missing: Names the architecture needs and the file does not have.
        unexpected: Names in the file that no rule covers.
        mismatched: Sentences on tensors whose shape, type or value is not what it must be.
        notes: What else a user should know: which of several state dicts was taken, which prefix was cut off.
    """

    mapped: tuple[tuple[str, str], ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise CheckpointError, naming the first few keys, unless every key was mapped or dropped by a rule."""
        problems = [
            f"{len(names)} {title}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
            for title, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("of the wrong shape, type or value", self.mismatched),
            )
            if names
        ]
        if problems:
            raise CheckpointError(
                "The tensors do not make up the network",
                expected=f"{len(self.mapped) + len(self.missing) + len(self.mismatched)} of certain names and shapes",
                found="; ".join(problems),
            )


def to_ours(
    state: Mapping[str, Tensor], layout: str, spec: ArchSpec, *, headless: bool = False, lenient: bool = False
) -> tuple[dict[str, Tensor], Report]:
    """Translate a state dict into our names and shapes; nothing is copied.

    Args:
        state: Tensors under the names of ``layout``.
        layout: ``native``, ``snap``, ``timm``, ``mmpretrain`` or ``transformers``.
        spec: The network they make up.
        headless: Whether its heads may be missing, all of them.
        lenient: Whether integers may be what scripts that average or halve whole files make of them: floating point,
            cut off, or missing. Counters of batches begin at 0 then. The report's notes say so.

    Returns:
        Our state dict, and the report; the former is complete only if ``report.check()`` raises nothing.

    Raises:
        UsageError: If the layout has no names for such a network.
    """
    ours: dict[str, Tensor] = {}
    mapped, dropped, missing, mismatched = [], [], [], []
    listing = entries(get_layout(layout, spec.family), spec)
    rest, notes = _with_integers(state, listing) if lenient else (dict(state), ())
    for entry in listing:
        tensor = rest.pop(entry.theirs, None)
        if tensor is None:
            if entry.ours:  # the derived index may be there or not
                missing.append(entry.theirs)
        elif tuple(tensor.shape) != entry.shape:
            mismatched.append(f"{entry.theirs} (expected {list(entry.shape)}, found {list(tensor.shape)})")
        elif entry.floating != tensor.is_floating_point() or not (entry.floating or tensor.dtype == torch.int64):
            expected = "floating point" if entry.floating else "int64"
            mismatched.append(f"{entry.theirs} (expected {expected}, found {tensor.dtype})")
        elif entry.index is None:
            ours[entry.ours] = tensor.reshape(tensor.shape[:1]) if entry.ours.endswith(".gamma") else tensor
            mapped.append((entry.theirs, entry.ours))
        elif torch.equal(tensor, entry.index):
            dropped.append((entry.theirs, INDEX_RULE))
        elif lenient and ((entry.index - tensor) & ~1 == 0).all():  # timm's ModelEma makes 10 of 11
            dropped.append((entry.theirs, AVERAGED_RULE))
        else:
            mismatched.append(f"{entry.theirs} (its values are not |dy| * width + |dx|)")
    heads = [entry.theirs for entry in listing if entry.ours.startswith(HEADS)]
    if headless and set(heads) <= set(missing):
        missing = [name for name in missing if name not in heads]
    report = Report(tuple(mapped), tuple(dropped), tuple(missing), tuple(rest), tuple(mismatched), notes)
    return ours, report


def _with_integers(state: Mapping[str, Tensor], listing: Sequence[Entry]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return a state dict with integers as such and every counter of batches, and notes on what was changed."""
    found, rounded, added = dict(state), 0, 0
    for entry in listing:
        tensor = found.get(entry.theirs)
        if tensor is None and entry.ours.endswith(COUNTER):
            found[entry.theirs], added = torch.zeros(entry.shape, dtype=torch.int64), added + 1
        elif tensor is not None and not entry.floating and tensor.is_floating_point():
            found[entry.theirs], rounded = tensor.round().to(torch.int64), rounded + 1
    notes = (f"rounded {rounded} tensors of integers that were floating point",) if rounded else ()
    missing = (f"{added} counters of batches are not in the file: they begin at 0",) if added else ()
    return found, notes + missing


def from_ours(state: Mapping[str, Tensor], layout: str, spec: ArchSpec) -> dict[str, Tensor]:
    """Translate our state dict into a layout: names, order, shapes and derived tensors as its own code saves them.

    Args:
        state: Our state dict of the network ``spec``.
        layout: ``native``, ``snap``, ``timm``, ``mmpretrain`` or ``transformers``.
        spec: The network.

    Raises:
        UsageError: If the layout has no names for such a network.
        CheckpointError: If ``state`` is not the state dict of ``spec``.
    """
    target = get_layout(layout, spec.family)
    listing = entries(target, spec)
    to_ours(state, "native", spec)[1].check()
    theirs: dict[str, Tensor] = {}
    for entry in listing:
        if entry.index is None:
            theirs[entry.theirs] = state[entry.ours].reshape(entry.shape)
        elif target.saves_index:
            theirs[entry.theirs] = entry.index.clone()
    return theirs
