"""Weights into a network that need not be just the one they were trained in: other input sizes, other classes."""

from __future__ import annotations

import warnings

import torch.nn.functional as F
from torch import Tensor

from efficientformer.models.attention import OffsetAttention
from efficientformer.models.network import EfficientFormer, init_weights
from efficientformer.spec.errors import CheckpointError
from efficientformer.spec.geometry import Grid
from efficientformer.weights.checkpoint import Checkpoint, WeightsWarning
from efficientformer.weights.formats.layout import BIASES, skeleton
from efficientformer.weights.formats.translate import HEADS

STEM = "stem.conv1.conv.weight"


def load_into(
    model: EfficientFormer, checkpoint: Checkpoint, *, reset_head: bool = False, drop_dist_head: bool = False
) -> None:
    """Load weights into a network in train form; every tensor of both is accounted for.

    Where the input size of the network gives other attention grids than the checkpoint's, the bias tables are
    resampled (bilinear over the offsets; offset 0 stays offset 0); where the network takes grey pictures and the
    weights are for colours, the stem's kernels are summed over them. Warnings say so.

    Args:
        model: The network; changed in place.
        checkpoint: The weights.
        reset_head: Leave the checkpoint's heads out and initialise the network's anew, as for other classes.
        drop_dist_head: Leave the checkpoint's distillation head out, where the network has none.

    Raises:
        CheckpointError: If the weights do not fit the network; nothing is changed then.
    """
    state = dict(checkpoint.state)
    target = model.state_dict()
    said = []
    if reset_head:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(HEADS)}
        state |= {name: tensor for name, tensor in target.items() if name.startswith(HEADS)}
        said.append(f"the heads are new ({model.spec.num_classes} classes) and must be trained")
    elif drop_dist_head and model.head_dist is None:
        dropped = [name for name in state if name.startswith("head_dist.")]
        for name in dropped:
            del state[name]
        said += ["the distillation head is left out: logits are the classification head's alone"] if dropped else []
    said += _sum_colours(state, checkpoint, model)
    said += _resample(state, checkpoint, model)
    _check_fit(state, target, checkpoint, model)
    if checkpoint.spec.stem_stride != model.spec.stem_stride:
        change = f"{checkpoint.spec.stem_stride} to {model.spec.stem_stride}"
        said.append(f"the stem's stride goes from {change}: the network sees everything at another scale")
    model.load_state_dict(state)
    if reset_head:
        for head in filter(None, (model.head, model.head_dist)):
            init_weights(head)
    for sentence in said:
        warnings.warn(sentence[0].upper() + sentence[1:], WeightsWarning, stacklevel=2)


def resample_table(table: Tensor, grid: Grid, new_grid: Grid) -> Tensor:
    """Resample a bias table to another grid.

    Args:
        table: (H, h * w), entry ``|dy| * w + |dx|`` of each head.
        grid: (h, w).
        new_grid: (h', w').

    Returns:
        (H, h' * w'): offsets are stretched so that the farthest corresponds to the farthest, and 0 to 0.
    """
    offsets = table.reshape(1, -1, *grid)  # (H, h * w) -> (1, H, h, w)
    return F.interpolate(offsets, new_grid, mode="bilinear", align_corners=True)[0].flatten(1)


def _grids(model: EfficientFormer) -> dict[str, Grid]:
    """Return the grid of every bias table by the table's name."""
    return {
        f"{name}.{BIASES}": part.key_grid for name, part in model.named_modules() if isinstance(part, OffsetAttention)
    }


def _resample(state: dict[str, Tensor], checkpoint: Checkpoint, model: EfficientFormer) -> list[str]:
    """Resample, in ``state``, the tables whose grid the network changes; say it."""
    old, new = _grids(skeleton(checkpoint.spec)), _grids(model)
    changed = [name for name in old if name in new and old[name] != new[name]]
    for name in changed:
        state[name] = resample_table(state[name], old[name], new[name])
    if not changed:
        return []
    changes = sorted({f"{_size(old[name])} to {_size(new[name])}" for name in changed})
    return [
        f"{len(changed)} attention-bias tables are resampled from {', '.join(changes)}, because the network is for "
        f"{_size(model.spec.input_size)} pixels and the weights are for {_size(checkpoint.spec.input_size)}"
    ]


def _sum_colours(state: dict[str, Tensor], checkpoint: Checkpoint, model: EfficientFormer) -> list[str]:
    """Make the stem, in ``state``, one for grey pictures if the network takes those; say it."""
    if (checkpoint.spec.in_chans, model.spec.in_chans) != (3, 1):
        return []
    state[STEM] = state[STEM].sum(1, keepdim=True)  # (C, 3, 3, 3) -> (C, 1, 3, 3)
    return ["the stem's kernels are summed over the colours: the network sees grey pictures as it saw them before"]


def _size(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def _check_fit(
    state: dict[str, Tensor], target: dict[str, Tensor], checkpoint: Checkpoint, model: EfficientFormer
) -> None:
    """Raise CheckpointError unless names and shapes are equal; say the likely reasons by what to do about them."""
    old, new = checkpoint.spec, model.spec
    if state[STEM].shape[1] != new.in_chans:
        hint = f"Build the network with in_chans={old.in_chans}, or convert the images"
        raise CheckpointError("Other input channels", expected=str(new.in_chans), found=str(old.in_chans), hint=hint)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in target.items()}
    wrong = [name for name in wanted.keys() & shapes.keys() if wanted[name] != shapes[name]]
    body = [name for name in (*wrong, *(wanted.keys() ^ shapes.keys())) if not name.startswith(HEADS)]
    if body:
        first = min(body)
        raise CheckpointError(
            f"These weights are of another architecture: {len(body)} tensors do not fit",
            expected=f"{first} of shape {list(wanted[first])}" if first in wanted else f"no {first}",
            found=f"shape {list(shapes[first])}" if first in shapes else "none",
            hint="Build the network from the checkpoint's own spec",
        )
    if wrong:
        hint = "reset_head=True gives the network a new head to be trained"
        raise CheckpointError("Other classes", expected=str(new.num_classes), found=str(old.num_classes), hint=hint)
    if old.distilled and "head_dist.weight" in shapes.keys() - wanted.keys():
        hint = "drop_dist_head=True leaves it out; the logits are then the classification head's alone"
        raise CheckpointError("The weights have a distillation head (head_dist) and the network has none", hint=hint)
    if wanted.keys() != shapes.keys():
        hint = "Build it with distilled=False, or give reset_head=True for new heads to be trained"
        raise CheckpointError("The network has a distillation head (head_dist) and the weights have none", hint=hint)
