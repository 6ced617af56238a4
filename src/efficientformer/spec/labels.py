"""Class names of the data sets the zoo's networks were trained on, in the order of their logits."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def label_names(data_set: str) -> tuple[str, ...]:
    """Return the class names of ``imagenet1k`` (WordNet lemmas, ILSVRC-2012 order) or ``cifar10``."""
    return tuple(line.rpartition("\t")[2] for line in _lines(data_set))


@cache
def synsets() -> tuple[str, ...]:
    """Return ImageNet-1k's WordNet ids (``n01440764`` ...), the folder names of its usual layout, in class order."""
    return tuple(line.partition("\t")[0] for line in _lines("imagenet1k"))


def _lines(data_set: str) -> list[str]:
    return (files("efficientformer") / "assets" / "labels" / f"{data_set}.txt").read_text("utf-8").splitlines()
