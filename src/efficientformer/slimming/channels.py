"""Which channels every tensor of a network has, so that a stage can be made narrower with the weights it has.

A tensor's first two axes are named by what lies on them: ``stream`` is the residual stream of a stage (C channels),
``before`` that of the stage before, ``hidden`` the hidden units of a block's MLP, ``half`` the stem's inner channels.
Attention keeps its own width: heads and keys do not depend on the stage's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from efficientformer.spec.arch import ArchSpec, StageSpec
from efficientformer.spec.errors import CheckpointError

# What a part's tensors have on their first and second axis; the first rule that matches counts.
_RULES: tuple[tuple[str, str, str], ...] = (
    (r"stem\.conv1\.", "half", ""),
    (r"stem\.conv2\.", "stream", "half"),
    (r"embedding\.attn\.q\.local\.", "before", ""),
    (r"embedding\.attn\.(q\.proj|k|v)\.", "", "before"),
    (r"embedding\.attn\.proj\.", "stream", ""),
    (r"embedding\.attn\.", "", ""),
    (r"embedding\.", "stream", "before"),
    (r"mlp\.fc1\.", "hidden", "stream"),
    (r"mlp\.mid\.", "hidden", ""),
    (r"mlp\.fc2\.", "stream", "hidden"),
    (r"token_mixer\.stride_conv\.", "stream", ""),
    (r"token_mixer\.(qkv|q|k|v)\.", "", "stream"),
    (r"token_mixer\.proj\.", "stream", ""),
    (r"token_mixer\.", "", ""),
    (r"(layer_scale|norm)", "stream", ""),
    (r"head(_dist)?\.", "", "stream"),
    (r"alpha$", "", ""),
)
_BLOCK = re.compile(r"stages\.(\d)\.blocks\.(\d+)\.(?:candidates\.(\w+)\.)?")
_STAGE = re.compile(r"stages\.(\d)\.")

# The channels of an axis (weights, its name, C) as indices (C,), those that stay longest first.
Order = Callable[[Mapping[str, Tensor], str, int], Tensor]
Cut = dict[str, Tensor]  # axis (``stream.2``, ``hidden.2.0.mb4d``, ``half``) to the indices that stay, in order


@dataclass(frozen=True, slots=True)
class Axes:
    """What lies on a tensor's first and second axis; empty for what no cut touches."""

    first: str
    second: str

    def cut(self, tensor: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor with only those channels that stay."""
        if self.first in kept and tensor.ndim > 0:
            tensor = tensor.index_select(0, kept[self.first].to(tensor.device))
        if self.second in kept and tensor.ndim > 1:
            tensor = tensor.index_select(1, kept[self.second].to(tensor.device))
        return tensor


def axes_of(name: str) -> Axes:
    """Return what lies on the axes of a tensor, by its name in a network or a supernet.

    Raises:
        CheckpointError: If no rule knows the name.
    """
    stage, rest, hidden = 3, name, ""  # the final norm and the heads follow stage 4
    if found := _STAGE.match(name):
        stage, rest = int(found[1]), name[found.end() :]
    elif name.startswith("stem."):
        stage = 0
    if block := _BLOCK.match(name):
        hidden = f"hidden.{block[1]}.{block[2]}.{block[3] or ''}"
        rest = name[block.end() :]
    names = {"stream": f"stream.{stage}", "before": f"stream.{stage - 1}", "hidden": hidden, "half": "half", "": ""}
    for pattern, first, second in _RULES:
        if re.match(pattern, rest):
            return Axes(names[first], names[second])
    raise CheckpointError(f"No slimming rule for {name}", hint="It belongs to no EfficientFormer")


def plan_cut(
    state: Mapping[str, Tensor], old: ArchSpec, new: ArchSpec, order: Order, used: Mapping[str, Tensor] | None = None
) -> Cut:
    """Choose which channels and hidden units stay when ``old`` becomes the narrower ``new``.

    Args:
        state: The weights of ``old``, of a network or a supernet.
        old: What they are of.
        new: The same blocks at smaller widths or expansions.
        order: Which channels stay longest.
        used: Those of a supernet's weights that write and read the channels all blocks share; by default all. A block's
            hidden units are its own, whether it is used or not.

    Returns:
        Only the axes that shrink; indices in increasing order, so that nothing is reordered.
    """
    shared = state if used is None else used
    return {
        axis: order(state if axis.startswith("hidden.") else shared, axis, size).narrow(0, 0, wanted).sort().values
        for axis, (size, wanted) in _sizes(state, old, new).items()
        if wanted < size
    }


def by_importance(state: Mapping[str, Tensor], axis: str, size: int) -> Tensor:
    """Return the channels (C,) of an axis by their scores, largest first; the earlier one of equals."""
    return channel_scores(state, axis, size).sort(descending=True, stable=True).indices


def by_position(state: Mapping[str, Tensor], axis: str, size: int) -> Tensor:
    """Return the channels (C,) of an axis as they are: narrow networks that share weights use the first ones."""
    return torch.arange(size)


def by_chance(seed: int) -> Order:
    """Return an order that knows nothing of the weights: what slimming without channel importance would keep."""

    def order(state: Mapping[str, Tensor], axis: str, size: int) -> Tensor:
        return torch.randperm(size, generator=torch.Generator().manual_seed(seed))

    return order


def channel_scores(state: Mapping[str, Tensor], axis: str, size: int) -> Tensor:
    """Score the channels of an axis: how strongly they are written times how strongly they are read.

    A channel's strength in one tensor is the norm of its weights over the mean norm of all channels there, so that
    every layer counts the same. What is written into channels is scaled by the BatchNorm behind the convolution, which
    counts as a tensor of its own.

    Returns:
        (C,) float32; at least 0.
    """
    written, read = torch.ones(size), torch.ones(size)
    for name, tensor in state.items():
        axes = axes_of(name)
        if not tensor.is_floating_point() or name.endswith(("bias", "running_mean", "running_var")):
            continue
        if axes.first == axis and tensor.ndim > 0:
            written += _strength(tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None])
        if axes.second == axis and tensor.ndim > 1:
            read += _strength(tensor.transpose(0, 1).flatten(1))
    return written * read


def _strength(rows: Tensor) -> Tensor:
    norms: Tensor = rows.detach().float().cpu().norm(dim=1)
    return norms / norms.mean().clamp(min=1e-12)


def _sizes(state: Mapping[str, Tensor], old: ArchSpec, new: ArchSpec) -> dict[str, tuple[int, int]]:
    """Return the size of every axis before and after."""
    sizes = {"half": (old.stages[0].width // 2, new.stages[0].width // 2)}
    for index, (stage, narrow) in enumerate(zip(old.stages, new.stages, strict=True)):
        sizes[f"stream.{index}"] = (stage.width, narrow.width)
        for position in range(len(stage.blocks)):
            for kind in _kinds(state, index, position):
                both = (_hidden(stage, position), _hidden(narrow, position))
                sizes[f"hidden.{index}.{position}.{kind}"] = both
    return sizes


def _hidden(stage: StageSpec, position: int) -> int:
    return stage.hidden(stage.blocks[position])


def _kinds(state: Mapping[str, Tensor], stage: int, position: int) -> list[str]:
    """Return the candidates at a position of a supernet; one without a name for a network."""
    prefix = f"stages.{stage}.blocks.{position}."
    found = (_BLOCK.match(name) for name in state if name.startswith(prefix))
    return list(dict.fromkeys(match[3] or "" for match in found if match and not match.string.endswith("alpha")))
