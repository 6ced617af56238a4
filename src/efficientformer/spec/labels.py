"""Class names in the order of the logits: of the data sets the zoo's networks were trained on, and of users'."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

from efficientformer.spec.errors import DataError

MAX_NAMES_BYTES = 1 << 20


@cache
def label_names(data_set: str) -> tuple[str, ...]:
    """Return the class names of ``imagenet1k`` (WordNet lemmas, ILSVRC-2012 order) or ``cifar10``."""
    return tuple(line.rpartition("\t")[2] for line in _lines(data_set))


@cache
def synsets() -> tuple[str, ...]:
    """Return ImageNet-1k's WordNet ids (``n01440764`` ...), the folder names of its usual layout, in class order."""
    return tuple(line.partition("\t")[0] for line in _lines("imagenet1k"))


def synset_labels() -> dict[str, int]:
    """Return the label of each of ImageNet-1k's synsets."""
    return {synset: label for label, synset in enumerate(synsets())}


def read_names(path: Path) -> tuple[str, ...]:
    """Read a user's class names: a text file in UTF-8, one name a line.

    Raises:
        DataError: If it cannot be read, is very large, or holds no names.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_NAMES_BYTES + 1).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {str(path)!r}", expected="class names in UTF-8", found=str(error)) from error
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names or len(text) > MAX_NAMES_BYTES:
        raise DataError(
            f"Cannot use {str(path)!r}", expected="one class name a line", found=f"{len(text):,} characters"
        )
    return names


def _lines(data_set: str) -> list[str]:
    return (files("efficientformer") / "assets" / "labels" / f"{data_set}.txt").read_text("utf-8").splitlines()
