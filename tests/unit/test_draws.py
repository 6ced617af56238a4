"""Draws are pure functions of the step: complete, disjoint among processes, different where they should be."""

import numpy as np
import pytest

from efficientformer.data.draws import DrawPlan, mix, uniforms
from efficientformer.spec.errors import DataError


def epoch_of(plan, epoch=0):
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [plan.draws(step) for step in steps]


def test_an_epoch_sees_every_picture_once():
    drawn = np.concatenate([d.indices for d in epoch_of(DrawPlan(100, 10, 0))])
    assert sorted(drawn) == list(range(100))


def test_epochs_have_other_orders_and_other_seeds():
    plan = DrawPlan(64, 8, 0)
    first, second = epoch_of(plan, 0), epoch_of(plan, 1)
    assert any((a.indices != b.indices).any() for a, b in zip(first, second, strict=True))
    seeds = np.concatenate([d.seeds for d in first + second])
    assert len(np.unique(seeds)) == 128


def test_processes_share_a_batch_without_overlap():
    whole = DrawPlan(60, 12, 3).draws(7)
    shares = [DrawPlan(60, 12, 3, rank=rank, world=3).draws(7) for rank in range(3)]
    assert sorted(np.concatenate([s.indices for s in shares])) == sorted(whole.indices)
    assert sorted(np.concatenate([s.seeds for s in shares])) == sorted(whole.seeds)


def test_repeated_augmentation_shows_a_picture_several_times_differently():
    draws = epoch_of(DrawPlan(90, 9, 0, repeats=3))
    indices, seeds = (np.concatenate([getattr(d, name) for d in draws]) for name in ("indices", "seeds"))
    values, counts = np.unique(indices, return_counts=True)
    assert len(values) == 30
    assert set(counts) == {3}
    assert len(np.unique(seeds)) == 90


def test_limited_views_come_back():
    plan = DrawPlan(20, 5, 0, views=2)
    by_picture = [
        {int(i): int(s) for d in epoch_of(plan, epoch) for i, s in zip(d.indices, d.seeds, strict=True)}
        for epoch in range(4)
    ]
    assert by_picture[0] == by_picture[2]
    assert by_picture[1] == by_picture[3]
    assert all(by_picture[0][i] != by_picture[1][i] for i in range(20))
    assert {int(v) for d in epoch_of(plan, 3) for v in d.views} == {1}


def test_another_seed_is_another_run():
    a, b = DrawPlan(50, 10, 0).draws(3), DrawPlan(50, 10, 1).draws(3)
    assert (a.indices != b.indices).any()
    assert not set(a.seeds.tolist()) & set(b.seeds.tolist())


def test_too_few_pictures():
    with pytest.raises(DataError, match="Fewer training pictures"):
        DrawPlan(7, 8, 0)


def test_uniforms_are_uniform_and_independent():
    numbers = uniforms(mix(0, np.arange(20_000)), 3)  # (3, 20000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.allclose(numbers.mean(1), 0.5, atol=0.01)
    assert np.allclose(numbers.var(1), 1 / 12, atol=0.005)
    assert np.abs(np.corrcoef(numbers) - np.eye(3)).max() < 0.03
    assert np.abs(np.corrcoef(numbers[:, :-1], numbers[:, 1:])[:3, 3:]).max() < 0.03  # neighbouring pictures
