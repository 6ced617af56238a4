"""Names of tensors as wrappers save them: what they put in front is cut off, and what was left out is put in front."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from efficientformer.spec.errors import CheckpointError
from efficientformer.weights.formats.detect import detect_layout

_WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile", "model.": "Lightning, or another"}
_BODIES = {"backbone.": "mmpretrain", "efficientformer.": "transformers"}  # before all names but the heads'
_AVERAGED = "n_averaged"  # the one name beside the network's in torch's AveragedModel
_MAX_NESTING = 4


def without_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return a state dict under the names of its layout, and notes on what was done to them.

    What a wrapper puts before every name is cut off; what mmpretrain and transformers put before a body is put before
    one that was saved alone. Names that fit no layout either way stay, and are an error later.
    """
    notes: tuple[str, ...] = ()
    for _ in range(_MAX_NESTING):
        if _fits(state):
            return state, notes
        first = {name.partition(".")[0] for name in state} - {_AVERAGED}
        prefix = f"{first.pop()}." if len(first) == 1 else ""
        if len(prefix) < 2 or not all(name.startswith(prefix) or name == _AVERAGED for name in state):
            break
        notes += (f"left out {_AVERAGED!r}, how often was averaged",) if _AVERAGED in state else ()
        state = {name.removeprefix(prefix): value for name, value in state.items() if name != _AVERAGED}
        notes += (f"cut {prefix!r} ({_WRAPPERS.get(prefix, 'a wrapper')}) off {len(state)} names",)
    for prefix, library in _BODIES.items():
        whole = {prefix + name: value for name, value in state.items()}
        if not _fits(state) and _fits(whole):
            return whole, (*notes, f"put {prefix!r} before {len(state)} names: they are of a body of {library}")
    return state, notes


def _fits(names: Collection[str]) -> bool:
    try:
        return bool(detect_layout(names))
    except CheckpointError:
        return False
