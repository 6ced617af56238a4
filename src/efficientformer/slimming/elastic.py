"""The elastic supernet: networks of every depth, width and expansion on the same weights (V2 paper, section 4).

A narrower network uses the first channels and hidden units of every layer. Each step trains the largest network, the
smallest and some drawn by chance (the sandwich rule), so that every network of the space can be judged with the weights
it finds, without a training of its own. BatchNorm's running statistics are kept for the largest network only; for any
other they are estimated when it is cut out.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from efficientformer.data.loader import Batch
from efficientformer.models.network import EfficientFormer
from efficientformer.slimming.baselines import drawn
from efficientformer.slimming.channels import axes_of, by_position, plan_cut
from efficientformer.slimming.extract import pool_names
from efficientformer.slimming.space import Candidate, Space
from efficientformer.slimming.supernet import Supernet
from efficientformer.training.task import Loss, Task

DRAWN = 2  # networks drawn by chance for every step
CERTAIN = 40.0  # alpha of a choice that is made: the others' share is 0 in single precision


class Sliced(nn.Module):
    """One network of a supernet's space, which computes with the supernet's own weights and trains them.

    Args:
        supernet: Holds the weights.
        candidate: The network.
        dtype: What it computes in, by autocast; None for single precision.
    """

    def __init__(self, supernet: Supernet, candidate: Candidate, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        state = supernet.state_dict(keep_vars=True)
        self._device, self._dtype = next(supernet.parameters()).device, dtype
        with self._device:
            self.network = EfficientFormer(candidate.spec, **supernet.rates)
        cut = plan_cut(state, supernet.spec, candidate.full, by_position)
        names = pool_names(candidate, self.network)
        self._weights = {name: axes_of(own).cut(state[own], cut) for name, own in names.items()}
        if candidate.spec != supernet.spec:  # what no axis cuts is still the supernet's own tensor
            statistics = {name for name, _ in self.network.named_buffers()}
            self._weights |= {name: self._weights[name].clone() for name in statistics & self._weights.keys()}

    def forward(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 (as the network)
        """Run the network as Accelerate runs what it prepared: images (B, C, H, W) to logits (B, K), in single."""
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            said = functional_call(self.network, self._weights, args, options)
        return tuple(head.float() for head in said) if isinstance(said, tuple) else said.float()


class Sandwich:
    """Any task, on the largest, the smallest and some random networks of a space; the loss is their mean.

    Args:
        task: The loss.
        supernet: Holds the weights.
        space: The networks.
        seed: With a step's number it decides which networks are drawn.
        dtype: What the networks compute in, by autocast; None for single precision.
    """

    def __init__(
        self, task: Task, supernet: Supernet, space: Space, seed: int, dtype: torch.dtype | None = None
    ) -> None:
        self._task, self._supernet, self._space, self._seed, self._dtype = task, supernet, space, seed, dtype

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the mean loss of the step's networks, and what the largest got right."""
        rng = random.Random(f"{self._seed}-{batch.draws.step}")
        networks = [self._space.largest, self._space.smallest, *(drawn(self._space, rng) for _ in range(DRAWN))]
        losses = [self._task(Sliced(self._supernet, candidate, self._dtype), batch) for candidate in networks]
        return Loss(torch.stack([loss.total for loss in losses]).mean(), losses[0].correct)


def choose_blocks(supernet: Supernet) -> None:
    """Make every MetaPath choose the start network's own block: the supernet computes what its largest network does."""
    for path in supernet.paths():
        with torch.no_grad():
            path.alpha.zero_()
            path.alpha[0] = CERTAIN
        path.alpha.requires_grad_(False)
