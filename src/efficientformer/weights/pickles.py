"""Pickles written by ``torch.save``, read as data: whatever would run code is refused and named.

Training checkpoints wrap the state dict in other things; this finds it.
"""

from __future__ import annotations

import argparse
import pickletools
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from efficientformer.spec.errors import CheckpointError

# Names under which state dicts lie in training checkpoints (the authors', timm's, mmpretrain's). mmengine's
# `ema_state_dict` is not among them: its hook swaps the two, so that one holds the weights that are *not* averaged.
_PLAIN = ("model", "state_dict")
_AVERAGED = ("model_ema", "state_dict_ema")
# Wrappers by what they put before every name; others, such as a module that has the network as a part, do it too.
_MAX_NESTING = 4

_UNSAFE_HINT = (
    "It was not run. If you trust the file, turn it into one without code where it is trusted: "
    "safetensors.torch.save_file(state_dict, 'weights.safetensors')"
)


class _Unread:
    """Stands for an object of a training checkpoint that is of no use here: made of anything, it does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# What frameworks put into training checkpoints beside the weights: paths among the options, and mmengine's log, whose
# objects hold numpy arrays and, by getattr, their own methods. No such thing is imported or called.
_STOOD_FOR = (
    *(f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"pathlib._local.{name}" for name in ("PosixPath", "WindowsPath")),  # Python 3.13
    "mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    "numpy.ndarray", "numpy.dtype",
)  # fmt: skip
_CLASSES = ("classes", "CLASSES")  # mmengine's name and mmcv's


@dataclass(frozen=True, slots=True)
class Pickled:
    """What one pickle holds.

    Attributes:
        state: The state dict as found.
        notes: What was chosen on the way.
        ambiguous: Whether averaged weights were passed over and nobody said which ones to take.
        labels: Class names in order of the logits, where mmpretrain wrote them; else empty.
    """

    state: dict[Any, Any]
    notes: tuple[str, ...]
    ambiguous: bool
    labels: tuple[str, ...]


def read_pickle(path: Path, kind: str, ema: bool | None) -> Pickled:
    """Read the state dict of a pickle.

    Args:
        path: The file.
        kind: ``zip``, or ``legacy`` for torch's format before 1.6.
        ema: Take the averaged weights; None takes the plain ones where there are both.

    Raises:
        CheckpointError: If the file is damaged, wants to run code, or holds no state dict.
    """
    if kind == "zip":
        _check_archive(path)
    content = _load(path, kind)
    state, taken, passed_over = _find_state(content, ema)
    beside = ", not the averaged weights beside it" if passed_over else ""
    notes = (f"took {'.'.join(taken)!r}{beside}",) if taken else ()
    return Pickled(state, notes, passed_over and ema is None, _labels(content))


def _check_archive(path: Path) -> None:
    """Refuse archives that torch.save does not write: compressed ones (bombs), and programs."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # zipfile lets many types out on damaged input
        raise CheckpointError(
            "The file is damaged", found=f"a zip archive with {error}", hint="Fetch it again"
        ) from None
    names = {member.filename.partition("/")[2] for member in members}
    if "constants.pkl" in names or any(name.startswith(("code/", "models/")) for name in names):
        raise CheckpointError(
            "Not a weights file",
            expected="a state dict",
            found="a program made by torch.jit or torch.export",
            hint="Save the weights it was made from: torch.save(model.state_dict(), ...)",
        )
    if "data.pkl" not in names or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(
            "Not a weights file", expected="an archive made by torch.save", found="another zip archive"
        )


def _load(path: Path, kind: str) -> object:
    # A namespace of training options is data only, and the authors' training checkpoints hold one.
    known: list[Any] = [argparse.Namespace, *((_Unread, name) for name in _STOOD_FOR)]
    with torch.serialization.safe_globals(known), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
        except Exception as error:  # damaged pickles make torch raise nearly any type
            text = str(error)
            wanted = re.search(r"GLOBAL (\S+)|unrecognized function (.+)", text)
            name = wanted[1] or wanted[2] if wanted else _first_global(path, kind)
            if name:
                raise CheckpointError(
                    "The file wants to run code", found=f"a call of {name}", hint=_UNSAFE_HINT
                ) from None
            # what torch says around this is advice to turn its protection off
            reason = re.search(r"(?:WeightsUnpickler error: )(.+)|\A(?!.*weights_only)(.+)", text, re.IGNORECASE)
            found = (reason[1] or reason[2])[:200] if reason else type(error).__name__
            raise CheckpointError("The file is damaged, or torch.save did not write it", found=found) from None


def _first_global(path: Path, kind: str) -> str | None:
    """Name the first global a plain pickle of a newer protocol asks for, which torch refuses before it gets there."""
    if kind == "zip":
        return None
    strings: list[str] = []
    with path.open("rb") as file:
        try:
            for opcode, argument, _ in pickletools.genops(file.read(2**20)):
                if opcode.name in ("GLOBAL", "INST"):
                    return str(argument).replace(" ", ".")
                if opcode.name == "STACK_GLOBAL":
                    return ".".join(strings[-2:])
                strings += [argument] if isinstance(argument, str) else []
        except Exception:  # damaged: there is no name to tell
            return None
    return None


def _find_state(content: object, ema: bool | None) -> tuple[dict[Any, Any], tuple[str, ...], bool]:
    """Return the state dict within ``content``, where it lay, and whether averaged weights were passed over."""
    taken: tuple[str, ...] = ()
    averaged = False
    entries = _entries(content)
    for _ in range(_MAX_NESTING):
        plain, average = (_first_dict(entries, names) for names in (_PLAIN, _AVERAGED))
        averaged = averaged or average is not None
        order = {True: (average, plain), False: (plain,), None: (plain, average)}[ema]
        chosen = next(filter(None, order), None)
        if chosen is None:
            break
        taken, entries = (*taken, chosen), _entries(entries[chosen])
    found = ", ".join(name[:40] for name in list(entries)[:6] if isinstance(name, str)) or "nothing of the kind"
    took_average = bool(set(taken) & set(_AVERAGED))
    if ema and not took_average:
        raise CheckpointError("There are no averaged (EMA) weights", expected=" or ".join(_AVERAGED), found=found)
    if not any(isinstance(value, torch.Tensor) for value in entries.values()):
        raise CheckpointError("The file holds no state dict", expected="tensors by name", found=found)
    return entries, taken, averaged and not took_average


def _labels(content: object) -> tuple[str, ...]:
    """Return the class names in mmpretrain's ``meta``: of the data set (mmengine), or its own (before)."""
    said = _entries(content).get("meta")
    for _ in range(2):  # meta, and the data set's within it
        entries = _entries(said) if isinstance(said, dict) else {}
        said = entries.get("dataset_meta", said)
    classes = next(filter(None, map(entries.get, _CLASSES)), ())
    fine = isinstance(classes, list | tuple) and all(isinstance(label, str) for label in classes)
    return tuple(classes) if fine else ()


def _entries(content: object) -> dict[Any, Any]:
    if not isinstance(content, dict):
        found = f"a {type(content).__name__}"
        raise CheckpointError("The file holds no state dict", expected="tensors by name", found=found)
    return dict(dict.items(content))  # dict's own method: a pickle may give an OrderedDict attributes that hide its own


def _first_dict(entries: dict[Any, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(entries.get(name), dict)), None)
