"""Labels of a data set in the order of a network's classes."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from efficientformer.data.source import ImageSource
from efficientformer.spec.errors import DataError, nearest
from efficientformer.spec.labels import label_names, synset_labels, synsets

_SHOWN = 5  # of the names that fit nothing


class Relabelled(ImageSource):
    """The pictures of a source with the labels of another list of classes.

    Args:
        source: The pictures.
        classes: The new class names.
        label_of: New label of every class of ``source``; those of classes without pictures are not looked at.
        notes: What to say of it, beside what is said of ``source``.
    """

    def __init__(self, source: ImageSource, classes: Sequence[str], label_of: Sequence[int], *notes: str) -> None:
        self.source, self.classes, self.notes = source, tuple(classes), (*source.notes, *notes)
        self.labels = np.asarray(label_of, np.int64)[source.labels]

    def name(self, index: int) -> str:
        """Return what people call a picture."""
        return self.source.name(index)

    def read(self, index: int) -> bytes | Image.Image:
        """Return a picture, encoded or decoded."""
        return self.source.read(index)


def align(source: ImageSource, labels: tuple[str, ...]) -> ImageSource:
    """Give a source the labels of a network.

    A class is found by its name, then without regard to case and to how accents are encoded, then, for a network with
    ImageNet-1k's labels, by its synset. A source may lack classes of the network. Where it has no class names (tar
    shards without ``classes.txt``) its labels are taken as the network's.

    Args:
        source: The pictures.
        labels: The network's class names in order of its logits.

    Returns:
        A source whose ``classes`` are ``labels``; ``source`` itself if they are so already.

    Raises:
        DataError: If a class with pictures has no counterpart; the message names those that do not fit.
    """
    if source.classes == labels:
        return source
    found = match_classes(source.classes, labels)
    used = sorted({int(label) for label in np.unique(source.labels)})
    strangers = [source.classes[label] for label in used if found[label] < 0]
    if not strangers:
        return Relabelled(source, labels, found)
    if source.unnamed and len(strangers) == len(used) and len(source.classes) <= len(labels):
        unnamed = "the data names no classes (classes.txt): their numbers are taken for the network's order"
        return Relabelled(source, labels, range(len(source.classes)), unnamed)
    hint = "Rename the class folders to the network's class names, or train a network on these classes"
    if len(source.classes) == len(labels):
        hint = f"The number of classes is the same, but an order cannot be guessed from that. {hint}"
    raise DataError(
        "The classes of the data are not those of the network",
        expected=f"some of its {len(labels):,} classes ({', '.join(map(repr, labels[:3]))} ...)",
        found=describe_strangers(strangers, labels),
        hint=hint,
    )


def class_keys(classes: Sequence[str]) -> Sequence[str]:
    """Return class names that tell every class apart: for ImageNet-1k's its synsets, else the names themselves."""
    return synsets() if classes == label_names("imagenet1k") else classes


def describe_strangers(strangers: Sequence[str], labels: Sequence[str]) -> str:
    """Say which class names fit nothing, each with the most similar of ``labels``."""
    parts = []
    for name in strangers[:_SHOWN]:
        close = nearest(name, labels, 1)
        parts.append(f"{name!r} (nearest: {close[0]!r})" if close else repr(name))
    more = f" and {len(strangers) - _SHOWN:,} more" if len(strangers) > _SHOWN else ""
    return ", ".join(parts) + more


def match_classes(classes: Sequence[str], labels: tuple[str, ...]) -> list[int]:
    """Return the label of every class by its name, -1 for those that have none; no label is given twice."""
    exact, folded = _unique(labels), _unique(map(_folded, labels))
    if labels == label_names("imagenet1k"):  # two of its classes share a name; synsets are unique
        exact |= synset_labels()
    found = [exact.get(key, -1) for key in class_keys(classes)]
    taken, names = Counter(found), _unique(classes)
    for index, name in enumerate(classes):
        label = exact.get(name, folded.get(_folded(name), -1)) if name in names else -1
        if found[index] < 0 <= label and not taken[label]:
            found[index] = label
            taken[label] += 1
    return found


def _folded(name: str) -> str:
    """Return a name without case, and with accents as one character each: macOS writes them as two."""
    return unicodedata.normalize("NFC", name).casefold()


def _unique(names: Iterable[str]) -> dict[str, int]:
    """Return the position of every name that occurs once."""
    listed = list(names)
    counts = Counter(listed)
    return {name: index for index, name in enumerate(listed) if counts[name] == 1}
