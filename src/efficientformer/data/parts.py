"""The parts of a data set, and what people call them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from efficientformer.data.listing import some
from efficientformer.data.source import ImageSource

WHOLE = "all"  # the name of the one part of a data set that is not split

Opener = Callable[[], ImageSource]
"""What opens a part."""

PARTS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}

_PILES = ("image", "images", "img", "imgs", "pictures", "photos", "data", *sum(PARTS.values(), ()))
_PILE = re.compile(f"({'|'.join(_PILES)})([-_ ].*)?", re.IGNORECASE)  # with what may follow, as in train_images


def is_part_name(name: str) -> bool:
    """Tell whether a folder is named as a part of a data set: train, val, test, or another word for these."""
    return any(name.lower() in aliases for aliases in PARTS.values())


def part_of(alias: str) -> str:
    """Return the part, ``train``, ``val`` or ``test``, that a folder's name means."""
    return next(part for part, aliases in PARTS.items() if alias in aliases)


def is_no_class(name: str) -> bool:
    """Tell whether a folder is named as a pile of pictures: as no class is, unless others beside it are."""
    return _PILE.fullmatch(name) is not None


def noted(parts: Mapping[str, Opener], beside: Sequence[str]) -> dict[str, Opener]:
    """Return parts whose sources note what lies beside them and is left out."""
    if not beside:
        return dict(parts)
    note = f"left out beside {', '.join(parts)}: {some(beside)}"
    return {name: partial(_open_noted, opener, note) for name, opener in parts.items()}


def _open_noted(opener: Opener, note: str) -> ImageSource:
    source = opener()
    source.notes += (note,)
    return source
