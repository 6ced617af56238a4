"""Losses, by hand-worked values and against torch's own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficientformer.data.draws import Draws
from efficientformer.data.loader import Batch
from efficientformer.training.loop import _to_device, split
from efficientformer.training.recipe import Recipe
from efficientformer.training.task import Distilled, Supervised, balanced_weights, hits

K = 4


class Fixed(nn.Module):
    """Gives the logits it was made with."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = [nn.Parameter(each) for each in logits]

    def forward(self, x, return_heads=False):
        return tuple(self.logits) if return_heads else sum(self.logits) / len(self.logits)


def batch(count=8, cut=True):
    numbers = np.arange(count)
    draws = Draws(numbers, numbers.astype(np.uint64), numbers * 0, 0)
    rng = torch.Generator().manual_seed(0)
    return Batch(torch.rand(count, 3, 4, 4, generator=rng), torch.arange(count) % K, draws, cut)


def logits(count=8, seed=1):
    return torch.randn(count, K, generator=torch.Generator().manual_seed(seed))


def test_supervised_is_smoothed_cross_entropy():
    said = Supervised(Recipe(label_smoothing=0.2), K)(Fixed(logits()), batch())
    by_hand = -(0.8 * F.one_hot(batch().labels, K) + 0.05).mul(logits().log_softmax(1)).sum(1).mean()
    assert said.total.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert said.correct == (logits().argmax(1) == batch().labels).sum()


def test_balanced_weights():
    weights = balanced_weights(torch.tensor([10.0, 30.0, 0.0]))
    assert weights.tolist() == pytest.approx([2.0, 2 / 3, 0.0])
    assert (weights * torch.tensor([10.0, 30.0, 0.0])).sum() == pytest.approx(40.0)


def test_two_heads_without_a_teacher_are_averaged():
    a, b = logits(seed=1), logits(seed=2)
    said = Supervised(Recipe(label_smoothing=0.0), K)(Fixed(a, b), batch())
    assert said.total.item() == pytest.approx(F.cross_entropy((a + b) / 2, batch().labels).item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("two_heads", [True, False])
def test_distillation(kind, two_heads):
    recipe = Recipe(label_smoothing=0.0, teacher="x", distillation=kind, distill_alpha=0.3, distill_temperature=2.0)
    own, dist, said = logits(seed=1), logits(seed=2), logits(seed=3)
    model = Fixed(own, dist) if two_heads else Fixed(own)
    loss = Distilled(recipe, K, None, lambda b: said, two_heads=two_heads)(model, batch()).total
    learned = dist if two_heads else own
    if kind == "hard":
        teacher = F.cross_entropy(learned, said.argmax(1))
    else:
        p = (said / 2).softmax(1)
        teacher = 4 * (p * (p.log() - (learned / 2).log_softmax(1))).sum(1).mean()
    assert loss.item() == pytest.approx((0.7 * F.cross_entropy(own, batch().labels) + 0.3 * teacher).item(), rel=1e-5)


def test_a_student_that_copies_its_teacher_has_no_teacher_loss():
    recipe = Recipe(teacher="x", distillation="soft", distill_alpha=1.0)
    assert Distilled(recipe, K, None, lambda b: logits(), two_heads=False)(Fixed(logits()), batch()).total.abs() < 1e-6


def test_mixing_gives_shares_that_add_up_and_teachers_see_what_the_student_sees():
    recipe = Recipe(mixup=0.8, cutmix=1.0, teacher="x", distillation="hard", batch_size=8)
    seen = {}

    class Spy(Fixed):
        def forward(self, x, return_heads=False):
            seen["student"] = x
            return super().forward(x)

    def teacher(mixed):
        seen["teacher"] = mixed.images
        return logits()

    np.random.seed(0)
    task = Distilled(recipe, K, None, teacher, two_heads=False)
    images, targets = task.mix(batch())
    assert targets.shape == (8, K)
    assert targets.sum(1).tolist() == pytest.approx([1.0] * 8)
    assert not torch.equal(images, batch().images)
    original = batch()
    task(Spy(logits()), original)
    assert torch.equal(seen["student"], seen["teacher"])
    assert torch.equal(original.images, batch().images), "the batch itself is left as it is"


def test_nothing_is_mixed_in_the_refinement():
    images, targets = Supervised(Recipe(mixup=1.0), K).mix(batch(cut=False))
    assert torch.equal(images, batch().images)
    assert targets.ndim == 1


def test_hits_of_shares_count_the_largest():
    assert hits(torch.eye(2), torch.tensor([[0.6, 0.4], [0.7, 0.3]])) == 1


def test_parts_of_a_batch_are_the_batch():
    parts = list(split(batch(), 4))
    assert [last for _, last in parts] == [False, False, False, True]
    assert torch.equal(torch.cat([p.images for p, _ in parts]), batch().images)
    assert np.concatenate([p.draws.indices for p, _ in parts]).tolist() == list(range(8))


def test_only_cuda_takes_pinned_memory():
    moved = _to_device(batch(), torch.device("meta"))  # stands for every device that is neither CUDA's nor the CPU
    assert {moved.images.device.type, moved.labels.device.type} == {"meta"}
