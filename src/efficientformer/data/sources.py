"""Which layout a folder has, found by looking into it, and the source that reads it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from efficientformer.data.align import Relabelled, describe_strangers, match_classes
from efficientformer.data.cifar import cifar_parts, open_cifar
from efficientformer.data.folders import (
    Folder,
    first_picture,
    list_folder,
    open_class_folders,
    open_synset_files,
    synset_files,
)
from efficientformer.data.idx import idx_parts, open_idx
from efficientformer.data.imagenet import is_validation, open_validation
from efficientformer.data.listing import counted, some
from efficientformer.data.lists import SUFFIXES, find_lists, is_list, list_parts
from efficientformer.data.parts import PARTS, WHOLE, Opener, is_no_class, is_part_name, noted, part_of
from efficientformer.data.shards import open_shards
from efficientformer.data.source import ImageSource, Subset
from efficientformer.spec.errors import DataError, UsageError, reason_of

LAYOUTS = (
    "class folders (DIR/CLASS/picture.jpg), train/ and val/ of these, tar shards, the files of MNIST or CIFAR, or lists"
)
VAL_FRACTION = 0.2  # of the pictures of such a data set, set aside to measure on

_FALLBACK = {"val": "test", "test": "val"}  # either serves for evaluation
_NESTED = (
    "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "FashionMNIST/raw", "MNIST/raw", "raw",
    "cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary",
)  # fmt: skip
_SHARD = re.compile(  # but ImageNet's own archives, which hold no samples
    r"(?!ILSVRC2012_img_)(?:.*[-_.])?(train|training|val|validation|valid|dev|test|testing)(?:[-_.].*|\d*)\.tar",
    re.IGNORECASE,
)
_ARCHIVE = re.compile(r"\.(tar(\.\w+)?|tgz)$", re.IGNORECASE)


@dataclass(frozen=True)
class Splits:
    """What a training needs of a data set.

    Attributes:
        train: The pictures to learn from.
        val: The pictures to measure on, with the same classes.
        note: Where the two come from.
        own: Whether the data set has two parts of its own; else one was divided.
    """

    train: ImageSource
    val: ImageSource
    note: str
    own: bool = False


def open_source(path: str | os.PathLike[str], split: str | None = None) -> ImageSource:
    """Open a data set, or one part of it.

    The layout is found by looking: class folders (ImageNet's synsets get its class names), ImageNet as published,
    tar shards, the files of MNIST and CIFAR, lists.

    Args:
        path: The folder.
        split: ``train``, ``val`` or ``test``; the last two stand in for each other where only one exists. None for a
            data set that is not split.

    Returns:
        The pictures; they are listed, not read.

    Raises:
        DataError: If there is no such data set, its layout is unknown, or it has not this part.
        UsageError: If ``split`` is none of the three.
    """
    if split is not None and split not in PARTS:
        raise UsageError("Unknown split", expected=f"one of {', '.join(PARTS)}", found=repr(split))
    parts = find_parts(path)
    if split is None and len(parts) == 1:
        return next(iter(parts.values()))()
    for name in (split, _FALLBACK.get(split or "")):
        if name in parts:
            return parts[name]()
    named = f"the parts {', '.join(parts)}" if WHOLE not in parts else "one set that is not split"
    raise DataError(
        f"Cannot choose a part of {os.fspath(path)!r}",
        expected=f"a part {split!r}" if split else "one set",
        found=named,
        hint="Name no split, or a folder that has it" if WHOLE in parts else f"Name one of: {', '.join(parts)}",
    )


def open_splits(path: str | os.PathLike[str], val_fraction: float = VAL_FRACTION, seed: int = 0) -> Splits:
    """Open a data set for training.

    Its own training and validation (or test) parts are used where it has them. Of a data set that is not split a part
    is set aside: the same pictures on every machine, from every class that has two or more (``split_indices`` says
    what new pictures change).

    Args:
        path: The folder.
        val_fraction: Part of the pictures to set aside if the data set is not split, above 0 and below 1.
        seed: Which ones.

    Returns:
        Both parts, with the same classes.

    Raises:
        DataError: As ``open_source``; or if the validation part has classes that the training part has not.
        UsageError: If ``val_fraction`` is not between 0 and 1.
    """
    if not 0 < val_fraction < 1:
        raise UsageError("Illegal val_fraction", expected="a number above 0 and below 1", found=repr(val_fraction))
    parts = find_parts(path)
    held_out = next((name for name in ("val", "test") if name in parts), None)
    if "train" in parts and held_out:
        train = parts["train"]()
        note = f"train and {held_out} as the data set has them"
        return Splits(train, _like(parts[held_out](), train), note, own=True)
    name = "train" if "train" in parts else next(iter(parts))
    if name not in ("train", WHOLE):
        hint = "Name the folder with its pictures to train on them"
        raise DataError(
            "There is no training part", expected="a part 'train'", found=f"only {', '.join(parts)}", hint=hint
        )
    source = parts[name]()
    train_indices, val_indices = split_indices(source, val_fraction, seed)
    if not len(val_indices):
        found = f"{counted(len(source), 'picture')} in {counted(len(source.classes), 'class', 'classes')}"
        raise DataError("Too few pictures to set any aside", expected="a class with two pictures or more", found=found)
    whole = "the one set" if name == WHOLE else f"the part {name!r}, the only one"
    note = f"{counted(len(val_indices), 'picture')} of {len(source):,} set aside from {whole} (seed {seed})"
    return Splits(Subset(source, train_indices), Subset(source, val_indices), note)


def split_indices(
    source: ImageSource, val_fraction: float, seed: int
) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Divide a source class by class; both parts keep its order.

    Of each class the same share is held out, those with the lowest hashes of their names: neither the machine nor the
    order of listing matters, nor do the other classes. New pictures move the cut of their class, and the pictures it
    passes change sides: at most as many go from training to validation as the class then holds out more.

    Returns:
        The indices for training and for validation.
    """
    ranks = np.empty(len(source), np.uint64)
    for index in range(len(source)):
        text = f"{seed}:{source.name(index)}".encode("utf-8", "surrogateescape")
        ranks[index] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    order = np.lexsort((ranks, source.labels))
    held_out = np.zeros(len(source), bool)
    starts = np.searchsorted(source.labels[order], np.arange(len(source.classes) + 1))
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        count = end - start
        if count >= 2:
            held_out[order[start : start + min(max(round(count * val_fraction), 1), count - 1)]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def find_parts(path: str | os.PathLike[str]) -> dict[str, Opener]:
    """Return the parts of a data set, ``train``, ``val`` and ``test`` or only ``all``, each with what opens it.

    Raises:
        DataError: If there is no such folder, or its layout is unknown.
    """
    root = Path(path)
    try:
        exists, is_folder = root.exists(), root.is_dir()
    except (OSError, ValueError) as error:  # a name that the system refuses
        raise DataError(f"Cannot open {os.fspath(path)!r}", expected="a folder", found=reason_of(error)) from error
    if is_list(root):
        return list_parts(root)
    if not is_folder:
        found = "a file" if exists else "nothing there"
        hint = "Unpack archives first; for tar shards name the folder that holds them" if exists else "Check the path"
        raise DataError(f"No data set at {str(root)!r}", expected=f"a folder with {LAYOUTS}", found=found, hint=hint)
    folder = list_folder(root)
    parts = _parts(folder) or _nested_parts(root) or find_lists(folder)
    return parts or {WHOLE: partial(_open_whole, folder)}


def _nested_parts(root: Path) -> dict[str, Opener]:
    """Return the parts that lie deeper, where an archive or torchvision puts them.

    Raises:
        DataError: If there are two data sets.
    """
    listed = {name: _parts(list_folder(root / name)) for name in _NESTED if (root / name).is_dir()}
    found = {name: parts for name, parts in listed.items() if parts}
    if len(found) > 1:
        hint = f"Name one of them: {root / next(iter(found))}"
        raise DataError(f"More than one data set in {str(root)!r}", expected="one", found=some(list(found)), hint=hint)
    return next(iter(found.values()), {})


def _parts(folder: Folder) -> dict[str, Opener]:
    """Return the parts a folder is split into, if it is."""
    idx = idx_parts(folder)
    if idx:
        return {name: partial(open_idx, folder, name) for name in idx}
    if cifar := cifar_parts(folder):
        return {name: partial(open_cifar, folder, name) for name in cifar}
    shards, folders = _split_shards(folder), _split_folders(folder)
    if folders and ("train" in folders or "train" not in shards):
        return noted(folders, [*filter(_SHARD.fullmatch, folder.files), *folder.pictures])
    return noted(shards, _beside_shards(folder)) if shards else {}


def _split_shards(folder: Folder) -> dict[str, Opener]:
    """Return the parts of tar shards whose names say where they belong; other shards are left out then."""
    groups: dict[str, list[Path]] = {}
    for name in folder.files:
        match = _SHARD.fullmatch(name)
        if match:
            groups.setdefault(part_of(match[1].lower()), []).append(folder.path / name)
    return {part: partial(open_shards, groups[part]) for part in PARTS if part in groups}


def _beside_shards(folder: Folder) -> list[str]:
    """Return the names of what else may hold pictures where the parts are tar shards."""
    named = [name for name in folder.folders if is_part_name(name)]
    unnamed = [name for name in folder.files if _ARCHIVE.search(name) and not _SHARD.fullmatch(name)]
    return [*named, *_pictures_beside(folder), *unnamed, *folder.pictures]


def _split_folders(folder: Folder) -> dict[str, Opener]:
    """Return the parts that subfolders named train, val or test hold.

    A class may have such a name too: then its folder, or a folder beside it, holds pictures.

    Raises:
        DataError: If that leaves it open whether they are parts or classes, or which of two folders is a part.
    """
    named = {name: list_folder(folder.path / name) for name in folder.folders if is_part_name(name)}
    if not named:
        return {}
    beside = _pictures_beside(folder)
    like_classes = [name for name, picture in beside.items() if picture.count("/") == 1]  # CLASS/picture.jpg
    if like_classes and not _is_split(folder, named, like_classes):
        return {}
    parts: dict[str, Opener] = {}
    for part in PARTS:
        # Loose pictures in val/ beside a good train/ are a mistake: opening that part says so.
        mistaken = part == "val" and "train" in parts
        called = [each for name, each in named.items() if part_of(name.lower()) == part]
        sets = [each for each in called if _can_be_set(each) or (mistaken and each.pictures)]
        if len({each.path.resolve() for each in sets}) > 1:  # a link to the other is the same
            raise _too_many(folder, part, sets)
        if sets:
            parts[part] = partial(_open_whole, sets[0])
        for each in sets:
            del named[each.path.name]
    unlabelled = [name for name, each in named.items() if each.pictures]  # a test part, as contests have it
    return noted(parts, [*beside, *unlabelled])


def _too_many(folder: Folder, part: str, sets: Sequence[Folder]) -> DataError:
    """Build the error for a part that several folders are named as, such as val and validation."""
    return DataError(
        f"More than one folder in {str(folder.path)!r} is the part {part!r}",
        expected="one",
        found=some(each.path.name for each in sets),
        hint="Put their pictures into one, or move the others elsewhere",
    )


def _pictures_beside(folder: Folder) -> dict[str, str]:
    """Return a picture of every subfolder that holds any, however deep, and is not named as a part."""
    found = {name: first_picture(folder.path, name) for name in folder.folders if not is_part_name(name)}
    return {name: picture for name, picture in found.items() if picture}


def _is_split(folder: Folder, named: Mapping[str, Folder], beside: Sequence[str]) -> bool:
    """Tell whether subfolders named as parts are parts, although there are pictures in folders beside them.

    Raises:
        DataError: If they may be parts as well as classes.
    """
    sets = [name for name, each in named.items() if _can_be_set(each)]
    parts = {part_of(name.lower()) for name in sets}
    if "train" not in parts and any(each.pictures for each in named.values()):
        return False
    if sets and not ("train" in parts and len(parts) > 1):
        raise DataError(
            f"It is open whether {sets[0]!r} in {str(folder.path)!r} is a part of a data set or one of its classes",
            expected=LAYOUTS,
            found=f"pictures beside it in {some(beside)}",
            hint="Move one of them elsewhere, or rename it if it is a class",
        )
    return bool(sets)


def _is_shard(name: str) -> bool:
    return name.lower().endswith(".tar")


def _holds_shards(path: Path) -> bool:
    try:
        return any(map(_is_shard, list_folder(path).files))
    except DataError:  # what cannot be read is nobody's data
        return False


def _can_be_set(folder: Folder) -> bool:
    """Tell whether a folder can be a labelled set of its own; the pictures of a test without labels are none."""
    if folder.pictures:
        return is_validation(folder) or synset_files(folder)
    return bool(folder.folders) or any(map(_is_shard, folder.files))


def _open_whole(folder: Folder) -> ImageSource:
    """Open a folder that is not split."""
    shards = [folder.path / name for name in folder.files if _is_shard(name)]
    if shards and not folder.pictures and not any(first_picture(folder.path, name) for name in folder.folders):
        source = open_shards(shards)  # beside pictures they are what these were unpacked from
        within = [f"{name}/" for name in folder.folders if _holds_shards(folder.path / name)]
        beside = [*(name for name in folder.files if _ARCHIVE.search(name) and not _is_shard(name)), *within]
        if beside:
            source.notes = (*source.notes, f"left out: {some(beside)}")
        return source
    if is_validation(folder):
        return open_validation(folder)
    if folder.folders:
        _refuse_sets_as_classes(folder)
        _refuse_parts_as_classes(folder)
        return open_class_folders(folder)
    if synset_files(folder):
        return open_synset_files(folder)
    found = f"{counted(len(folder.pictures), 'picture')} and no folder" if folder.files else "an empty folder"
    hint = "Sort the pictures into one folder for each class" if folder.pictures else "Check the path"
    raise DataError(f"No data set in {str(folder.path)!r}", expected=LAYOUTS, found=found, hint=hint)


def _refuse_sets_as_classes(folder: Folder) -> None:
    """Raise DataError if a folder that would be a class is a data set with parts of its own."""
    for name in folder.folders:
        inner = list_folder(folder.path / name)
        if not inner.pictures and inner.folders and all(is_part_name(each) for each in inner.folders):
            raise DataError(
                f"{name!r} in {str(folder.path)!r} is no class but a data set with parts of its own",
                expected=LAYOUTS,
                found=", ".join(inner.folders),
                hint=f"Name it instead: {folder.path / name}",
            )


def _refuse_parts_as_classes(folder: Folder) -> None:
    """Raise DataError if the folders hold pictures and none is named as a class: a list may say these."""
    if any(not is_no_class(name) and first_picture(folder.path, name) for name in folder.folders):
        return
    filled = [name for name in folder.folders if first_picture(folder.path, name)]
    if filled:
        lists = [name for name in folder.files if name.lower().endswith(SUFFIXES)]
        raise DataError(
            f"No folder in {str(folder.path)!r} is named as a class",
            expected=LAYOUTS,
            found=f"pictures in {some(filled)}" + (f", and {some(lists)}" if lists else ""),
            hint="Have a folder for each class, or a list with file and label on each line, paths from where it lies",
        )


def _like(source: ImageSource, train: ImageSource) -> ImageSource:
    """Give the validation part the labels of the training part."""
    same = source.classes == train.classes
    found = range(len(source.classes)) if same else match_classes(source.classes, train.classes)
    trained = set(np.unique(train.labels).tolist())
    strangers = [source.classes[label] for label in np.unique(source.labels) if found[label] not in trained]
    if strangers:
        count = counted(len(strangers), "class", "classes")
        raise DataError(
            f"The validation part has {count} without a picture in the training part",
            expected=f"some of the {len(train.classes):,} training classes",
            found=describe_strangers(strangers, train.classes),
            hint="Rename or remove these folders, or add training pictures",
        )
    return source if same else Relabelled(source, train.classes, found)
