"""The search space as values: what can be cut, in which order, and what no cut can make."""

import json
import random

import pytest

from efficientformer.latency.parts import parts_of
from efficientformer.slimming.baselines import drawn, drawn_at, scaled, scaled_to
from efficientformer.slimming.importance import Importances
from efficientformer.slimming.moves import Action, propose
from efficientformer.slimming.space import IDENTITY, Space, table_space
from efficientformer.spec.count import count
from efficientformer.spec.errors import SpecError, UsageError
from efficientformer.spec.variants import v1_spec, v2_spec

V1 = v1_spec((32, 48, 64, 96), (2, 1, 3, 2), (2, 2), input_size=32, num_classes=3, stem_stride=2)
V2 = v2_spec((32, 32, 48, 64), ((4,), (4, 3), (4, 3), (3, 4)), 1, input_size=32, num_classes=3, stem_stride=1)
NONE = v1_spec((32, 32, 64, 64), (0, 1, 0, 1), 0, input_size=32, stem_stride=1)  # empty stages, no MB3D at all
EVEN = Importances(((1.0, 2.0), (3.0,), (4.0, 5.0, 6.0), (7.0, 8.0)))


class Macs:
    """A device whose latency is a tenth of a millisecond plus one for each million MACs."""

    def predict(self, spec):
        return type("Prediction", (), {"ms": 0.1 + count(spec).macs / 1e6, "error_ms": 0.01})()


def test_the_largest_network_is_the_start_and_the_smallest_has_no_block():
    for start in (V1, V2, NONE):
        space = Space(start)
        assert space.largest.spec == space.largest.full == start
        smallest = space.smallest.spec
        assert not any(stage.blocks for stage in smallest.stages)
        assert {stage.width for stage in smallest.stages} == {16}
        space.check(space.smallest)


def test_options_of_a_position_keep_3d_after_4d():
    space = Space(V1)
    assert space.options(0, 0) == ("mb4d", IDENTITY)
    assert space.options(2, 0) == ("mb4d", IDENTITY)
    assert space.options(2, 1) == ("mb3d", "mb4d", IDENTITY)
    assert Space(V2).options(3, 1) == ("attn_ffn", "ffn", IDENTITY)


def test_more_widths_than_a_table_has_are_refused():
    start = v1_spec((64, 128, 256, 320), (1, 1, 1, 1), 0, input_size=32)
    assert len(table_space(Space(start, 2, 16)).widths) == 153
    with pytest.raises(SpecError, match=r"(?s)Too many widths.*width_step"):
        table_space(Space(start, 1, 16))


@pytest.mark.parametrize(
    ("width", "step", "least", "expected"),
    [(64, 16, 16, (64, 48, 32, 16)), (40, 16, 16, (40, 32, 16)), (8, 16, 16, (8,)), (24, 8, 16, (24, 16)),
     (64, 32, 48, (64,))],
)  # fmt: skip
def test_widths_go_down_by_the_step_to_its_multiples(width, step, least, expected):
    start = v1_spec((width, 32, 32, 32), (1, 1, 1, 1), 0, input_size=32)
    assert Space(start, step, least).widths(0) == expected


@pytest.mark.parametrize(
    ("action", "check"),
    [
        (Action("depth", 2, 1), lambda spec: [b.kind for b in spec.stages[2].blocks] == ["mb4d", "mb3d"]),
        (Action("type", 2, 1), lambda spec: [b.kind for b in spec.stages[2].blocks] == ["mb4d", "mb4d", "mb3d"]),
        (Action("width", 3), lambda spec: [s.width for s in spec.stages] == [32, 48, 64, 80]),
    ],
)
def test_actions(action, check):
    space = Space(V1)
    after = action.apply(space, space.largest)
    assert check(after.spec)
    space.check(after)
    assert Action.from_dict(json.loads(json.dumps(action.to_dict()))) == action


def test_expansion_is_cut_where_it_is_largest_and_in_v2_only():
    space = Space(V2)
    after = Action("expansion", 1).apply(space, space.largest)
    assert after.expansions[1] == (3.0, 3.0)
    assert Action("expansion", 1).apply(space, after).expansions[1] == (2.0, 2.0)
    with pytest.raises(SpecError, match="Nothing to cut"):
        Action("expansion", 1).apply(Space(V1), Space(V1).largest)


@pytest.mark.parametrize(
    "action", [Action("type", 0, 0), Action("depth", 1, 3), Action("type", 2, 0), Action("depth", 0, -1)]
)
def test_what_cannot_be_cut_is_refused(action):
    with pytest.raises(SpecError, match="Nothing to cut"):
        action.apply(Space(V1), Space(V1).largest)


def test_proposals_are_the_papers_three():
    """A1: the least important path; A2: the first MB3D; A3: the stage with the smallest sum."""
    found = propose(Space(V1), Space(V1).largest, EVEN, 1)
    assert found == [Action("depth", 0, 0), Action("type", 2, 1), Action("width", 0)]
    cut = Action("depth", 0, 0).apply(Space(V1), Space(V1).largest)
    assert propose(Space(V1), cut, EVEN, 1)[0] == Action("depth", 0, 1)
    wide = propose(Space(V1), Space(V1).largest, EVEN, 2)
    assert [action.stage for action in wide if action.kind == "width"] == [0, 1]


@pytest.mark.parametrize("start", [V1, V2, NONE])
@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_cuts_is_legal_all_the_way_down(start, seed):
    space, rng = Space(start), random.Random(seed)
    importances = Importances(tuple(tuple(rng.random() for _ in stage.blocks) for stage in start.stages))
    candidate, before = space.largest, count(start).params
    while actions := propose(space, candidate, importances, 100):
        candidate = rng.choice(actions).apply(space, candidate)
        space.check(candidate)
        assert count(candidate.spec).params <= before
        before = count(candidate.spec).params
        assert space.candidate(json.loads(json.dumps(candidate.to_dict()))) == candidate
    assert candidate.spec == space.smallest.spec


@pytest.mark.parametrize("seed", range(5))
def test_whichever_blocks_a_search_keeps_it_comes_below_the_smallest_network(seed):
    start = v2_spec((32, 48, 64, 96), ((4,), (4, 4), (3.5, 4), (4, 4)), 1, input_size=64, num_classes=3)
    space, rng = Space(start, min_depth=1), random.Random(seed)
    importances = Importances(tuple(tuple(rng.random() for _ in stage.blocks) for stage in start.stages))
    candidate = space.largest
    while actions := propose(space, candidate, importances, 100):
        candidate = rng.choice(actions).apply(space, candidate)
    space.check(space.smallest)
    assert count(candidate.spec).params <= count(space.smallest.spec).params


@pytest.mark.parametrize(
    "change",
    [
        {"widths": [32, 48, 64, 90]},
        {"widths": [32, 48, 64]},
        {"widths": [32, 48, 64, [96]]},
        {"kinds": [["mb4d", "mb4d"], ["mb4d"], ["mb4d", "mb3d", "mb4d"], ["mb3d", "mb3d"]]},
        {"kinds": [["mb4d"], ["mb4d"], ["mb4d", "mb3d", "mb3d"], ["mb3d", "mb3d"]]},
        {"kinds": [["mb4d", "mb3d"], ["mb4d"], ["mb4d", "mb3d", "mb3d"], ["mb3d", "mb3d"]]},
        {"expansions": [[4, 3], [4], [4, 4, 4], [4, 4]]},
        {"expansions": 4},
        {"more": 1},
    ],
)
def test_a_candidate_from_a_file_is_checked(change):
    space = Space(V1)
    good = json.loads(json.dumps(space.largest.to_dict()))
    assert space.candidate(good) == space.largest
    with pytest.raises(SpecError):
        space.candidate({**good, **change})


def test_importances_are_the_papers_scores():
    shares = [[{"mb4d": 0.75, IDENTITY: 0.25}], [{"mb3d": 0.5, "mb4d": 0.3, IDENTITY: 0.2}]]
    assert Importances.of(shares).paths == ((pytest.approx(3.0),), (pytest.approx(4.0),))
    candidate = Space(V1).largest
    assert EVEN.stage(candidate, 2) == 15
    assert EVEN.stage(candidate.with_kind(2, 0, IDENTITY), 2) == 11


def test_shuffled_importances_are_the_same_scores_elsewhere():
    other = EVEN.shuffled(0)
    assert other != EVEN
    assert sorted(sum(other.paths, ())) == sorted(sum(EVEN.paths, ()))
    assert [len(row) for row in other.paths] == [2, 1, 3, 2]
    assert other == EVEN.shuffled(0) != EVEN.shuffled(1)


def test_uniform_scaling_keeps_proportions_and_fits():
    space = Space(V1)
    assert scaled(space, 1.0) == space.largest
    half = scaled(space, 0.5)
    assert half.widths == (16, 32, 32, 48)
    assert [len(half.positions(stage)) for stage in range(4)] == [1, 1, 2, 1]
    target = Macs().predict(V1).ms / 2
    found = scaled_to(space, Macs(), target)
    assert 0.6 * target < Macs().predict(found.spec).ms <= target
    with pytest.raises(UsageError, match="No uniformly scaled network"):
        scaled_to(space, Macs(), 0.11)


@pytest.mark.parametrize("start", [V1, V2, NONE])
def test_a_few_networks_have_every_part_of_the_space(start):
    space, rng = Space(start), random.Random(0)
    parts = {part for spec in space.covering() for part in parts_of(spec)}
    found = {part for _ in range(300) for part in parts_of(drawn(space, rng).spec)}
    assert found <= parts
    assert len(found) > 0.8 * len(parts), "and hardly any other"


def test_uniform_scaling_keeps_the_least_depth():
    space = Space(V1, min_depth=2)
    for factor in (1.0, 0.5, 0.01):
        space.check(scaled(space, factor))


@pytest.mark.parametrize("start", [V1, V2, NONE])
def test_random_networks_are_legal_and_different(start):
    space, rng = Space(start), random.Random(0)
    found = [drawn(space, rng) for _ in range(50)]
    for candidate in found:
        space.check(candidate)
    assert len({candidate.key for candidate in found}) > 20


def test_random_networks_at_a_latency(monkeypatch):
    space, target = Space(V1), Macs().predict(V1).ms / 2
    found = drawn_at(space, Macs(), target, 5, seed=1)
    assert len({candidate.key for candidate in found}) == 5
    assert all(0.97 * target <= Macs().predict(candidate.spec).ms <= target for candidate in found)
    monkeypatch.setattr("efficientformer.slimming.baselines.MAX_DRAWS", 500)
    with pytest.raises(UsageError, match=r"Chance finds no 1 networks of 0\.01 ms; found 0 in 500"):
        drawn_at(space, Macs(), 0.01, 1, seed=1)
