"""Which layout a set of tensor names is in, and of which family the network is."""

from __future__ import annotations

from collections.abc import Collection

from efficientformer.spec.errors import CheckpointError, UsageError
from efficientformer.weights.formats import mmpretrain, native, snap, timm, transformers
from efficientformer.weights.formats.layout import Layout, join

LAYOUTS: dict[str, dict[str, Layout]] = {
    "native": {"v1": native.V1, "v2": native.V2},
    "snap": {"v1": snap.V1, "v2": snap.V2},
    "timm": {"v1": timm.V1, "v2": timm.V2},
    "mmpretrain": {"v1": mmpretrain.V1},
    "transformers": {"v1": transformers.V1},
}


def get_layout(name: str, family: str) -> Layout:
    """Return a layout by source and family.

    Raises:
        UsageError: If there is no such source, or it has no such family.
    """
    if name not in LAYOUTS:
        raise UsageError("Unknown layout", expected=f"one of {', '.join(LAYOUTS)}", found=repr(name))
    if family not in LAYOUTS[name]:
        have = ", ".join(layout for layout, families in LAYOUTS.items() if family in families)
        raise UsageError(f"The {name} layout knows no {family} networks", expected=f"one of {have}", found=name)
    return LAYOUTS[name][family]


def detect_layout(keys: Collection[str]) -> str:
    """Return the name of the layout whose stem, embeddings and head are among ``keys``.

    A few missing names are forgiven, so that reading can go on to name them.

    Raises:
        CheckpointError: If no layout fits by more than half; the message says what each expects.
    """
    present = set(keys)
    score, name = max((_share(layout, present), layout.name) for layout in _all_layouts())
    if score <= 0.5:
        heads = "; ".join(f"{name}: {_landmarks(next(iter(f.values())))[0]}" for name, f in LAYOUTS.items())
        found = ", ".join(sorted(present)[:3]) or "no tensors"
        raise CheckpointError(
            "These are not the weights of an EfficientFormer in any layout we read",
            expected=f"names such as ({heads})",
            found=f"{len(present)} tensors: {found} ...",
        )
    return name


def detect_family(name: str, keys: Collection[str]) -> str:
    """Return ``v2`` if the network has V2's depthwise MLP layer or its final BatchNorm, else ``v1``."""
    families = LAYOUTS[name]
    if "v2" in families:
        final_norm = join(families["v2"].norm, "running_mean")
        if any(key == final_norm or ".mlp.mid." in key for key in keys):
            return "v2"
    return "v1"


def _all_layouts() -> list[Layout]:
    return [layout for families in LAYOUTS.values() for layout in families.values()]


def _landmarks(layout: Layout) -> list[str]:
    """Names every network has in this layout (a stage-4 embedding has several kinds, a stage may have no blocks)."""
    names = [join(layout.stem, theirs) for _, theirs in layout.tables["stem"]]
    names += [join(layout.embedding(1), theirs) for _, theirs in layout.tables["conv"]]
    return [f"{name}.weight" for name in (*names, layout.norm, layout.head)]


def _share(layout: Layout, present: set[str]) -> float:
    landmarks = _landmarks(layout)
    return sum(name in present for name in landmarks) / len(landmarks)
