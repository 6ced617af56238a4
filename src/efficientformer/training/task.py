"""Tasks: what a step minimises. The loop asks for a loss and does not know whether there is a teacher.

Shapes: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientformer.data.loader import Batch
from efficientformer.spec.errors import missing_extra
from efficientformer.training.recipe import Recipe

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # what a precision computes in; fp32 needs none


@dataclass(frozen=True)
class Loss:
    """What a task says of one batch; tensors stay on the device, so that nothing waits for them.

    Attributes:
        total: What is minimised, a scalar with a gradient.
        correct: Pictures whose own label the network found; of mixed pictures, the label with the larger share.
    """

    total: Tensor
    correct: Tensor


class Task(Protocol):
    """Turns a batch into a loss."""

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Run the network on a batch, on its device, in training mode."""


class Supervised:
    """Cross-entropy with smoothed labels; batches may be mixed; classes may be weighted.

    Args:
        recipe: The losses' and the mixing's strengths.
        num_classes: Classes.
        class_weights: Weight of each class, (K,); None for none.
    """

    def __init__(self, recipe: Recipe, num_classes: int, class_weights: Tensor | None = None) -> None:
        self.recipe, self.class_weights = recipe, class_weights
        self._mix = _mixer(recipe, num_classes) if recipe.mixing else None

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the labels' loss."""
        images, targets = self.mix(batch)
        logits: Tensor = model(images)
        return Loss(self.label_loss(logits, targets), hits(logits, targets))

    def mix(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return pictures and targets: labels (B,), or shares of the classes (B, K) if the batch is mixed."""
        if self._mix is None or not batch.cut:
            return batch.images, batch.labels
        return self._mix(batch.images.clone(), batch.labels)

    def label_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of logits (B, K) for labels (B,) or shares (B, K)."""
        smoothing = self.recipe.label_smoothing
        # the mean over pictures, not over weights as torch's own: else parts of a batch would not add up to it
        return F.cross_entropy(logits, targets, self.class_weights, label_smoothing=smoothing, reduction="none").mean()


class Distilled(Supervised):
    """The labels' loss and the teacher's. With two heads each head learns from one of them (as the papers, after DeiT).

    Args:
        recipe: Kind, weight and temperature of distillation, and what ``Supervised`` wants.
        num_classes: Classes.
        class_weights: Weight of each class, (K,); None for none.
        teacher: Gives logits (B, K) for a batch.
        two_heads: Whether the network has a distillation head.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        class_weights: Tensor | None,
        teacher: Callable[[Batch], Tensor],
        *,
        two_heads: bool,
    ) -> None:
        super().__init__(recipe, num_classes, class_weights)
        self._teacher, self._two_heads = teacher, two_heads

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Return (1 - alpha) times the labels' loss plus alpha times the teacher's."""
        images, targets = self.mix(batch)
        said = self._teacher(Batch(images, batch.labels, batch.draws, batch.cut))  # the teacher sees what we see
        if self._two_heads:
            own, learned = model(images, return_heads=True)
        else:
            own = learned = model(images)
        alpha = self.recipe.distill_alpha
        total = (1 - alpha) * self.label_loss(own, targets) + alpha * self._teacher_loss(learned, said)
        return Loss(total, hits(own, targets))

    def _teacher_loss(self, logits: Tensor, said: Tensor) -> Tensor:
        if self.recipe.distillation == "hard":
            return F.cross_entropy(logits, said.argmax(1))
        t = self.recipe.distill_temperature
        divergence = F.kl_div((logits / t).log_softmax(1), (said / t).log_softmax(1), log_target=True,
                              reduction="batchmean")  # fmt: skip
        return divergence * t * t  # gradients keep their size whatever the temperature (Hinton et al. 2015)


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return how many of the logits (B, K) are largest at the label (B,), or at the largest share (B, K)."""
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    return (logits.detach().argmax(1) == labels).sum()


def balanced_weights(counts: Tensor) -> Tensor:
    """Return class weights (K,) in inverse proportion to how often each class occurs; their mean per picture is 1."""
    present = counts > 0
    weights = counts.sum() / (present.sum() * counts.clamp(min=1))
    return torch.where(present, weights, torch.zeros_like(weights))


def _mixer(recipe: Recipe, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    try:
        from timm.data.mixup import Mixup
    except ImportError as error:
        raise missing_extra("train", "Mixup", error) from error
    mixer: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = Mixup(
        recipe.mixup, recipe.cutmix, prob=recipe.mix_prob, label_smoothing=0.0, num_classes=num_classes
    )
    return mixer
