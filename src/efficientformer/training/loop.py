"""The training loop.

Every random number is a function of the seed and the step, so a run that goes on from a checkpoint computes what the
uninterrupted one would have computed, to the last bit on a CPU.
"""

from __future__ import annotations

import random
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from efficientformer.data.draws import Draws, mix
from efficientformer.data.loader import Batch, Loader
from efficientformer.models.network import EfficientFormer
from efficientformer.spec.errors import DataError, TrainingError
from efficientformer.training.optim import clip_gradients, learning_rate, set_learning_rate
from efficientformer.training.recipe import Recipe
from efficientformer.training.state import Progress, RunFolder
from efficientformer.training.task import Task
from efficientformer.training.watch import Watch

if TYPE_CHECKING:
    from accelerate import Accelerator
    from timm.utils.model_ema import ModelEmaV3

LOG_EVERY = 50  # steps between lines of the metrics, and between looks at the loss
AGREE_EVERY = 10  # steps at most between the processes' agreeing to stop
AGREE_EVERY_S = 2.0  # seconds at most, where a step takes less


OnMetrics = Callable[[dict[str, Any]], object]
"""Told a line of the metrics: step, epoch, loss, train_top1, lr, and after an epoch val_loss, val_top1, val_top5."""


class Shell(nn.Module):
    """Holds the network for Accelerate, which patches what it is given; the network itself stays as it is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the network's own)
        """Call the network."""
        return self.network(*args, **kwargs)


@dataclass
class Run:
    """Everything a run is made of.

    Attributes:
        recipe: How to train.
        model: The network.
        shell: The same, as Accelerate prepared it.
        optimizer: The optimiser, as Accelerate prepared it.
        average: The averaged network, if any.
        loader: The batches.
        task: The loss.
        accelerator: Devices and processes.
        still: BatchNorms that keep their statistics.
        folder: Where everything is kept.
        stop: Set once somebody wants the run to end.
        progress: Where the run stands.
        watch: Where everything is told.
        evaluate: Called after an epoch with the network to measure; returns figures for the metrics.
        on_metrics: Told each line of the metrics, in the first process; the run ends if it returns True.
    """

    recipe: Recipe
    model: EfficientFormer
    shell: nn.Module
    optimizer: Any
    average: ModelEmaV3 | None
    loader: Loader
    task: Task
    accelerator: Accelerator
    still: list[nn.Module]
    folder: RunFolder
    stop: threading.Event
    progress: Progress = field(default_factory=Progress)
    watch: Watch = field(init=False)
    evaluate: Callable[[EfficientFormer], dict[str, float | None]] = field(init=False)
    on_metrics: OnMetrics | None = None
    _losses: list[Tensor] = field(default_factory=list)
    _hits: list[Tensor] = field(default_factory=list)
    _saved_at: int = -1
    _agreed: tuple[int, float] = (0, 0.0)  # step and time of the last agreement
    _agree_at: int = 0
    _skipped: dict[str, str] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return self.loader.plan.steps_per_epoch

    @property
    def at_once(self) -> int:
        """Pictures of a step that a process computes at once."""
        world: int = self.accelerator.num_processes
        return self.recipe.batch_size // (self.recipe.accumulate * world)

    @property
    def average_from(self) -> int:
        """Step from which on weights are averaged."""
        recipe = self.recipe
        return (recipe.epochs - recipe.ema_epochs) * self.steps_per_epoch if recipe.ema_epochs else 0

    @property
    def measured(self) -> EfficientFormer:
        """The network whose accuracy counts: the averaged one, once there is one."""
        if self.average is None or self.progress.step <= self.average_from:
            return self.model
        averaged: EfficientFormer = self.average.module
        return averaged

    @property
    def parts(self) -> dict[str, Any]:
        """What the state of the run consists of."""
        average = self.average.module if self.average is not None else None
        return {"model": self.model, "average": average, "optimizer": self.optimizer, "scaler": self.accelerator.scaler}

    def train(self) -> bool:
        """Train to the end, or until somebody wants it to end; everything is saved then.

        Returns:
            Whether it was trained to the end.

        Raises:
            TrainingError: If a loss is no number, or a checkpoint cannot be written; the message names the step.
        """
        total = self.recipe.epochs * self.steps_per_epoch
        if self._out_of_patience():
            return True
        began, seconds = time.monotonic(), self.progress.seconds
        self._agreed = (self.progress.step, began)
        batches = self.loader.batches(self.progress.step, total)
        self._gather_skipped()  # those decoded before the first step
        with ExitStack() as stack:
            stack.callback(lambda: self._name_skipped(self.loader.skipped))  # its own: other processes may be gone
            stack.callback(batches.close)
            for batch in self._naming_step(batches):
                self._step(batch)
                self.progress.step += 1
                self.progress.seconds = seconds + time.monotonic() - began
                finished = self._after_step()
                if finished or self._agree_to_stop():
                    self._save()
                    return finished
        if self.progress.step < total:
            self._save()
        return self.progress.step == total

    def _naming_step(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches on; where there is none, for a dead worker or unreadable pictures, say at which step."""
        try:
            yield from batches
        except DataError as error:
            if self.stop.is_set() and self.accelerator.num_processes == 1:  # what asked to stop ended the workers too
                return  # (where others are in the middle of a step, they cannot be joined in saving)
            raise TrainingError(
                f"No batch for step {self.progress.step}: {error.problem}",
                found=error.found,
                hint=f"{error.hint.rstrip('.')}. {self.folder.way_on}",
            ) from error

    def _step(self, batch: Batch) -> None:
        """Train on one batch."""
        recipe, step = self.recipe, self.progress.step
        seed_everything(recipe.seed, step, self.accelerator.process_index)
        self._set_modes()
        set_learning_rate(self.optimizer, learning_rate(recipe, step, self.steps_per_epoch))
        loss, correct = torch.zeros((), device=self.accelerator.device), None
        for part, last in split(_to_device(batch, self.accelerator.device), recipe.accumulate):
            with nullcontext() if last else self.accelerator.no_sync(self.shell):
                said = self.task(self.shell, part)
                self.accelerator.backward(said.total / recipe.accumulate)
            loss += said.total.detach() / recipe.accumulate
            correct = said.correct if correct is None else correct + said.correct
        if recipe.clip != "none":
            self.accelerator.unscale_gradients()
            clip_gradients(self.model, recipe)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None and step >= self.average_from:
            if step == self.average_from:
                self.average.set(self.model)
            self.average.update(self.model, step=step - self.average_from + 1)
        assert correct is not None
        self._losses.append(loss)
        self._hits.append(correct)

    def _set_modes(self) -> None:
        self.shell.train()
        for module in self.still:
            module.eval()

    def _after_step(self) -> bool:
        """Log, evaluate, save where it is time; return whether training is over."""
        step, recipe = self.progress.step, self.recipe
        end_of_epoch = step % self.steps_per_epoch == 0
        epoch = (step - 1) // self.steps_per_epoch
        figures: dict[str, Any] = {}
        if end_of_epoch or step % LOG_EVERY == 0:
            self._read_losses()
            figures = self._epoch_so_far()
        if end_of_epoch:
            self.progress.loss_sum = self.progress.hit_sum = 0.0
            self._gather_skipped()
            figures["skipped"] = len(self._skipped)
        last = step == recipe.epochs * self.steps_per_epoch
        if end_of_epoch and (last or (epoch + 1) % recipe.eval_every == 0):
            self._check_weights()
            figures |= self.evaluate(self.measured)
        best = self.progress.best_top1
        self.watch.step(step, epoch, recipe.epochs, figures, best if best >= 0 else None)
        if "val_top1" in figures:
            self.watch.note(
                f"epoch {epoch + 1}/{recipe.epochs}: loss {figures['loss']:.4f}, validation {figures['val_loss']:.4f}; "
                f"top-1 {figures['train_top1']:.2f} %, validation {figures['val_top1']:.2f} %; lr {figures['lr']:.2e}"
            )
        if figures and self.accelerator.is_main_process:
            figures = {"step": step, "epoch": epoch + 1, **figures, "images_per_s": round(self.watch.images_per_s, 1)}
            self.folder.log_metrics(figures)
            self.watch.scalars(figures, step)
            if self.on_metrics is not None and self.on_metrics(figures):
                self.stop.set()
        if end_of_epoch or (recipe.save_every and step % recipe.save_every == 0):
            self._save()
        return last or (end_of_epoch and self._out_of_patience())

    def _out_of_patience(self) -> bool:
        patience = self.recipe.early_stopping
        return bool(patience) and self.progress.evaluations_since_best >= patience

    def _epoch_so_far(self) -> dict[str, Any]:
        """Return the mean loss and the top-1 of the epoch's steps so far, and the learning rate of the last one."""
        steps = (self.progress.step - 1) % self.steps_per_epoch + 1
        rate = learning_rate(self.recipe, self.progress.step - 1, self.steps_per_epoch)
        top1 = 100 * self.progress.hit_sum / (steps * self.recipe.batch_size)
        return {"loss": self.progress.loss_sum / steps, "train_top1": top1, "lr": rate}

    def _read_losses(self) -> None:
        """Add the losses since the last look to the epoch's; the device is waited for only here.

        Raises:
            TrainingError: If one is no number.
        """
        losses, hits = torch.stack(self._losses), torch.stack(self._hits).float()
        if self.accelerator.num_processes > 1:
            losses, hits = self.accelerator.reduce(losses, "mean"), self.accelerator.reduce(hits, "sum")
        first = self.progress.step - len(self._losses)
        self._losses, self._hits = [], []
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            raise TrainingError(
                f"The loss of step {first + int(bad[0])} is no number",
                found=str(float(losses[int(bad[0])])),
                hint=self.advice,
            )
        for loss, hit in zip(losses.tolist(), hits.tolist(), strict=True):  # one by one: the same sum however split
            self.progress.loss_sum += loss
            self.progress.hit_sum += hit

    @property
    def advice(self) -> str:
        """What to do about a run whose numbers are none any more."""
        advice = "Start a new run with a lower learning rate, with gradients clipped, or in fp32"
        last = self.folder.weights("last")
        if not last.exists() or self.folder.is_part:  # what a larger run trains may be no network that can be named
            return advice
        return (
            f"The checkpoint before it stands. {advice}; --model {shlex.quote(str(last))} starts it from the last "
            "evaluated weights"
        )

    def _check_weights(self) -> None:
        """Raise TrainingError if a weight is no number, before it is measured or saved as good."""
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise TrainingError(
                    f"The weights are no numbers after step {self.progress.step - 1}",
                    found=f"NaN or infinity in {name}",
                    hint=self.advice,
                )

    def _gather_skipped(self) -> None:
        """Name the pictures that any process could not read and that were not named yet."""
        from accelerate.utils import gather_object

        found = dict(self.loader.skipped)  # a copy: the loader goes on meanwhile
        self._name_skipped(dict(gather_object(sorted(found.items() - self._skipped.items()))))

    def _name_skipped(self, found: Mapping[str, str]) -> None:
        new = {name: found[name] for name in sorted(found.keys() - self._skipped.keys())}
        self._skipped |= new
        self.watch.left_out("training", list(new.items()))

    def _agree_to_stop(self) -> bool:
        """Return whether any process was asked to stop; all learn it at the same step.

        Each time they also agree on the next one, by the mean time of their steps.
        """
        step = self.progress.step
        if self.accelerator.num_processes == 1:
            return self.stop.is_set()
        if step < self._agree_at:
            return False
        before, now = self._agreed, time.monotonic()
        said = torch.tensor([float(self.stop.is_set()), now - before[1]], device=self.accelerator.device)
        wishes, seconds = self.accelerator.reduce(said, "mean").tolist()
        steps = AGREE_EVERY_S / max(1e-9, seconds) * max(1, step - before[0])
        self._agreed, self._agree_at = (step, now), step + max(1, min(AGREE_EVERY, int(steps)))
        return bool(wishes > 0)

    def _save(self) -> None:
        """Write the state, once per step, after looking at what would go into it."""
        if self._saved_at == self.progress.step:
            return
        if self._losses:
            self._read_losses()
        self._check_weights()
        if self.accelerator.is_main_process:
            self.folder.save_state(self.parts, self.progress)
        self._saved_at = self.progress.step
        self.accelerator.wait_for_everyone()


def seed_everything(seed: int, step: int, process: int) -> None:
    """Set every global generator from the seed, the step and the process: nothing is carried from step to step."""
    value = int(mix(mix(seed, step), process))
    random.seed(value)
    np.random.seed(value % (1 << 32))
    torch.manual_seed(value % (1 << 63))


def split(batch: Batch, parts: int) -> Iterator[tuple[Batch, bool]]:
    """Yield a batch in equal parts, each with whether it is the last one."""
    size = len(batch.labels) // parts
    for index in range(parts):
        chosen = slice(index * size, (index + 1) * size)
        draws = Draws(
            batch.draws.indices[chosen], batch.draws.seeds[chosen], batch.draws.views[chosen], batch.draws.step
        )
        yield Batch(batch.images[chosen], batch.labels[chosen], draws, batch.cut), index == parts - 1


def _to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    tensors = batch.images, batch.labels
    if device.type == "cuda":  # no other device takes pinned memory
        tensors = tensors[0].pin_memory(), tensors[1].pin_memory()
    images, labels = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return Batch(images, labels, batch.draws, batch.cut)
