"""How good a candidate is: inherited weights, BatchNorm statistics estimated anew, top-1 on held-out pictures.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from efficientformer.data.loader import Batch, Loader
from efficientformer.data.source import ImageSource
from efficientformer.models.network import EfficientFormer
from efficientformer.runtime.preprocess import normalise
from efficientformer.slimming.channels import Order, by_importance
from efficientformer.slimming.extract import Pool, frozen_parts
from efficientformer.slimming.space import Candidate
from efficientformer.spec.errors import DataError, ImageError, TrainingError, UsageError
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.training.loop import seed_everything, split
from efficientformer.training.optim import BATCH_NORM, build_optimizer, clip_gradients, hold_still, set_learning_rate
from efficientformer.training.recipe import Recipe
from efficientformer.training.task import Task

BATCH = 256
ENDLESS = 1 << 40  # steps of a run that nobody trains to its end


@dataclass(frozen=True)
class Pictures:
    """Decoded, resized pictures in memory.

    Attributes:
        images: The pictures, in 8 bits.
        labels: Their labels, (N,) int64.
        preprocess: How they are normalised.
    """

    images: list[Image.Image]
    labels: npt.NDArray[np.int64]
    preprocess: PreprocessSpec

    @classmethod
    def read(
        cls, source: ImageSource, indices: npt.NDArray[np.int64], preprocess: PreprocessSpec, least: int = 1
    ) -> Pictures:
        """Read some pictures of a source; those that cannot be read are left out.

        Raises:
            DataError: If fewer than ``least`` can be read.
        """
        images, kept = [], []
        for index in indices.tolist():
            try:
                images.append(source.cropped(index, preprocess))
            except ImageError:  # named in the training's log
                continue
            kept.append(index)
        if len(images) < least:
            raise DataError("Too few of the pictures can be read", expected=f"at least {least} of {len(indices)}",
                            found=f"{len(images)}", hint="efficientformer data check says why")  # fmt: skip
        return cls(images, source.labels[kept], preprocess)

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (B, C, H, W) and labels (B,), in as few batches as there can be, of sizes as even as can be."""
        count = len(self.images)
        parts = math.ceil(count / BATCH)
        for part in range(parts):
            rows = slice(part * count // parts, (part + 1) * count // parts)
            images = torch.from_numpy(normalise(self.images[rows], self.preprocess))
            labels = torch.from_numpy(self.labels[rows])
            yield images.to(device, memory_format=torch.channels_last), labels.to(device)


@dataclass(frozen=True)
class Recovery:
    """A short training of what a cut has left.

    Attributes:
        steps: Steps after every cut; 0 for none.
        rate: Their learning rate over the recipe's peak.
        recipe: The supernet's recipe: optimiser, losses.
        task: Its loss.
        loader: Its batches.
    """

    steps: int
    rate: float
    recipe: Recipe
    task: Task
    loader: Loader


class PoolJudge:
    """Scores candidates with the weights they inherit from a pool, which is cut as the search goes on.

    Args:
        pool: The weights of the supernet.
        held_out: What accuracy is measured on.
        calibration: What BatchNorm statistics are estimated on.
        recovery: The training after every cut.
        device: Where to compute.
        dtype: What to compute in, by autocast; None for single precision.
        order: Which channels stay.
    """

    def __init__(
        self,
        pool: Pool,
        held_out: Pictures,
        calibration: Pictures,
        recovery: Recovery,
        device: torch.device,
        dtype: torch.dtype | None = None,
        order: Order = by_importance,
    ) -> None:
        self._pool, self._held_out, self._calibration, self._recovery = pool, held_out, calibration, recovery
        self._device, self._dtype, self._order = device, dtype, order
        self._batches: Generator[Batch] | None = None
        self._taken = 0
        self.candidate: Candidate | None = None

    def accuracy(self, candidate: Candidate) -> float:
        """Return the top-1, in percent, of a candidate reached from where the judge stands."""
        return self._top1(self._network(self._pool.slimmed(candidate, self._order), candidate))

    def take(self, candidate: Candidate) -> float:
        """Make a candidate the one further cuts are made from; return its top-1 in percent."""
        self.follow(candidate)
        return self._top1(self.network())

    def follow(self, candidate: Candidate) -> None:
        """Cut the pool to a candidate, and train what is left for a few steps."""
        self._pool, self.candidate = self._pool.slimmed(candidate, self._order), candidate
        if self._recovery.steps:
            network = self._network(self._pool, candidate)
            self._recover(network, candidate)
            self._pool = self._pool.updated(candidate, network)
        self._taken += 1

    def network(self) -> EfficientFormer:
        """Return the network the judge stands at, its BatchNorm statistics estimated, in evaluation mode."""
        assert self.candidate is not None
        return self._network(self._pool, self.candidate)

    def close(self) -> None:
        """Let go of the batches."""
        if self._batches is not None:
            self._batches.close()

    def _network(self, pool: Pool, candidate: Candidate) -> EfficientFormer:
        network = pool.network(candidate).to(self._device)
        network.to(memory_format=torch.channels_last)
        with self._autocast():
            estimate_statistics(network, self._calibration, self._device)
        return network.eval()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None)

    @torch.inference_mode()
    def _top1(self, network: EfficientFormer) -> float:
        right = 0
        with self._autocast():
            for images, labels in self._held_out.batches(self._device):
                right += int((network(images).argmax(1) == labels).sum())
        return 100 * right / len(self._held_out.labels)

    def _recover(self, network: EfficientFormer, candidate: Candidate) -> None:
        """Train a network in place at a constant, low learning rate, if the recipe lets anything of it learn."""
        recipe, first = self._recovery.recipe, self._taken * self._recovery.steps
        if self._batches is None:  # a new judge that follows a path sees the batches the first one saw
            self._batches = self._recovery.loader.batches(first, ENDLESS)
        frozen = frozen_parts(recipe.freeze, candidate, network)
        try:
            still = hold_still(network, recipe.with_changes(freeze=frozen))
        except UsageError:  # all is held; a part that is none was refused before the supernet was trained
            return
        network.train()
        for module in still:
            module.eval()
        network.set_grad_checkpointing(recipe.grad_checkpointing)
        optimizer = build_optimizer(network, recipe)
        set_learning_rate(optimizer, self._recovery.rate * recipe.scaled_lr)
        scaler = torch.amp.GradScaler(self._device.type, enabled=self._dtype is torch.float16)
        for number, batch in enumerate(islice(self._batches, self._recovery.steps)):
            seed_everything(recipe.seed, first + number, 0)
            images, labels = batch.images.to(self._device), batch.labels.to(self._device)
            for part, _ in split(Batch(images, labels, batch.draws, batch.cut), recipe.accumulate):
                with self._autocast():
                    loss = self._recovery.task(network, part).total
                scaler.scale(loss / recipe.accumulate).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            clip_gradients(network, recipe)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        if not all(bool(p.isfinite().all()) for p in network.parameters()):
            hint = "In a new run, lower it with --set search.recover_lr=0.03, or leave it: --set search.recover_steps=0"
            raise TrainingError(f"The weights are no numbers after cut {self._taken}", hint=hint)


@torch.no_grad()
def estimate_statistics(network: nn.Module, pictures: Pictures, device: torch.device) -> None:
    """Replace the statistics of every BatchNorm by those of some pictures: the mean over batches of even size.

    The pictures are to be in random order: a batch of one class says nothing of how the classes differ.
    """
    norms = [module for module in network.modules() if isinstance(module, BATCH_NORM)]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    for images, _ in pictures.batches(device):
        network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()
