"""The elastic supernet and the joint search: shared weights, the sandwich rule, size and latency together."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from efficientformer.data.loader import Batch
from efficientformer.models.network import EfficientFormer
from efficientformer.slimming.baselines import drawn
from efficientformer.slimming.channels import by_position
from efficientformer.slimming.elastic import DRAWN, Sandwich, Sliced, choose_blocks
from efficientformer.slimming.extract import Pool, pool_names
from efficientformer.slimming.importance import Importances
from efficientformer.slimming.moves import Action, propose
from efficientformer.slimming.objective import Cost, Efficiency, Latency
from efficientformer.slimming.plan import Options
from efficientformer.slimming.search import PathFile, Search, first_within
from efficientformer.slimming.space import Space
from efficientformer.slimming.subject import SupernetSubject
from efficientformer.slimming.supernet import Supernet
from efficientformer.spec.count import count
from efficientformer.spec.errors import SpecError, UsageError
from efficientformer.training.recipe import Recipe
from efficientformer.training.task import Loss, Supervised
from tests.unit.test_slimming_search import EVEN, SPACE, WORTH, Blocks, Ledger
from tests.unit.test_slimming_supernet import NONE, V1, V2, pictures, supernet_of

STARTS = pytest.mark.parametrize("spec", [V1, V2, NONE], ids=["v1", "v2", "without attention"])


def elastic(spec):
    supernet = supernet_of(spec)
    choose_blocks(supernet)
    return supernet


@STARTS
@torch.no_grad()
def test_the_supernet_computes_what_its_largest_network_does(spec):
    supernet, x = elastic(spec), pictures(spec)
    assert torch.equal(Sliced(supernet, Space(spec).largest).eval()(x), supernet(x))


@STARTS
@torch.no_grad()
def test_a_slice_is_the_network_the_search_cuts_out(spec):
    """What is trained is what is judged: the same channels, blocks and expansions."""
    supernet, space, rng = elastic(spec), Space(spec, width_step=8, min_width=8), random.Random(3)
    pool = Pool.of(supernet, mixed=False)
    for candidate in (space.smallest, *(drawn(space, rng) for _ in range(4))):
        network = pool.slimmed(candidate, by_position).network(candidate).eval()
        assert torch.equal(Sliced(supernet, candidate).eval()(pictures(spec)), network(pictures(spec)))


def batch_of(spec, step):
    images = pictures(spec, count=6)
    return Batch(images, torch.arange(6) % 3, SimpleNamespace(step=step), cut=False)


class Recorder:
    """A task that remembers the networks it was given."""

    def __init__(self):
        self.specs = []

    def __call__(self, model, batch):
        self.specs.append(model.network.spec)
        logits = model(batch.images)
        return Loss(nn.functional.cross_entropy(logits, batch.labels), (logits.argmax(1) == batch.labels).sum())


def test_a_step_trains_the_largest_the_smallest_and_others():
    supernet, space, task = elastic(V2).train(), Space(V2), Recorder()
    sandwich = Sandwich(task, supernet, space, seed=0)
    before = supernet.stem.conv1.norm.running_mean.clone()
    loss = sandwich(supernet, batch_of(V2, step=5))
    assert task.specs[:2] == [space.largest.spec, space.smallest.spec]
    assert len(task.specs) == 2 + DRAWN
    loss.total.backward()
    grads = {name: p.grad for name, p in supernet.named_parameters() if p.requires_grad}
    shared = grads["stem.conv2.conv.weight"]
    assert shared[:16, :8].any(), "the narrow networks train the first channels"
    used = pool_names(space.largest, EfficientFormer(V2)).values()
    assert [name for name in used if name in grads and grads[name] is None] == []
    assert not torch.equal(before, supernet.stem.conv1.norm.running_mean), "the largest network keeps its statistics"
    alone = Recorder()
    largest = alone(Sliced(elastic(V2).train(), space.largest), batch_of(V2, step=5))
    assert torch.equal(loss.correct, largest.correct)


def test_only_the_largest_network_moves_the_statistics():
    """Also those of layers that a narrower network does not cut."""
    space, x, states = Space(V2), pictures(V2, count=6), []
    for others in ((), (space.smallest, space.largest.with_width(3, space.widths(3)[1]))):
        supernet = elastic(V2).train()
        for candidate in (space.largest, *others):
            Sliced(supernet, candidate).train()(x)
        states.append(dict(supernet.named_buffers()))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_slices_drop_what_the_recipe_drops():
    supernet = Supernet(V2, drop_path_rate=0.3, head_dropout=0.5)
    network = Sliced(supernet, Space(V2).largest).network
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.5]


def test_the_loss_is_the_mean_of_the_networks():
    supernet, values = elastic(V2).train(), iter((1.0, 2.0, 3.0, 6.0))
    sandwich = Sandwich(lambda *_: Loss(torch.tensor(next(values)), torch.tensor(0)), supernet, Space(V2), seed=0)
    assert sandwich(supernet, batch_of(V2, step=0)).total == 3


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_networks_compute_in_the_recipe_s_precision_and_their_loss_in_single(precision, dtype):
    """Accelerate's autocast is around the supernet's own forward, which is never called."""
    supernet, seen = elastic(V2).train(), set()
    task = SupernetSubject(Options(objective="mes")).task(supernet, Supervised(Recipe(precision=precision), 3), 10)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: seen.add(out.dtype) if isinstance(module, nn.Conv2d | nn.Linear) else None
    )
    with hook:
        loss = task(supernet, batch_of(V2, step=0)).total
    assert seen == {dtype}
    assert loss.dtype == torch.float32
    loss.backward()
    assert supernet.stem.conv1.conv.weight.grad.dtype == torch.float32


def test_which_networks_a_step_trains_is_decided_by_seed_and_step():
    def specs(seed, step):
        task = Recorder()
        Sandwich(task, elastic(V2).train(), Space(V2), seed)(nn.Identity(), batch_of(V2, step))
        return task.specs

    assert specs(0, 1) == specs(0, 1)
    assert specs(0, 1) != specs(0, 2)
    assert specs(0, 1) != specs(1, 1)


def test_the_score_counts_size_and_latency():
    score = Efficiency(size_weight=0.5, latency_weight=1.0).score
    assert score(Cost(1.0, 3_000_000)) == pytest.approx(100)  # MobileNetV2's units
    assert score(Cost(0.5, 3_000_000)) == pytest.approx(200)
    assert score(Cost(1.0, 750_000)) == pytest.approx(200)
    assert Efficiency(0.0, 1.0).score(Cost(2.0, 7)) == pytest.approx(50)
    assert Efficiency(0.5, 1.0).gain(Cost(1.0, 3_000_000), Cost(0.5, 750_000)) == pytest.approx(300)
    assert Latency().gain(Cost(2.0, 7), Cost(1.5, 9)) == 0.5


def searched(folder, objective, **limits):
    file = PathFile(folder / "path.json", SPACE, "x")
    return Search(SPACE, EVEN, Blocks(), Ledger(WORTH), file, 100, objective=objective, **limits)


def test_the_score_prefers_small_networks(tmp_path):
    """At the same latency, a search that counts size ends with fewer parameters than one that does not."""
    size = {}
    for weight in (0.0, 4.0):
        (tmp_path / str(weight)).mkdir()
        steps = searched(tmp_path / str(weight), Efficiency(weight, 1.0)).run(1.6)
        size[weight] = count(steps[-1].candidate.spec).params
    assert size[4.0] < 0.7 * size[0.0]


def test_a_search_goes_on_until_the_size_is_met(tmp_path):
    steps = searched(tmp_path, Latency(), max_params=60_000).run(2.0)
    sizes = [count(step.candidate.spec).params for step in steps]
    assert sizes[-1] <= 60_000 < sizes[-2]
    assert steps[-2].predicted_ms <= 2.0
    assert first_within(steps, 2.0, 60_000) == steps[-1]
    assert first_within(steps, 2.0).number < steps[-1].number


def test_a_size_nothing_has_is_refused(tmp_path):
    smallest = count(SPACE.smallest.spec).params
    with pytest.raises(UsageError, match=f"at most {smallest - 1:,} parameters"):
        searched(tmp_path, Latency(), max_params=smallest - 1).run(2.0)


def test_stages_keep_their_least_depth():
    space = Space(V1, min_depth=1)
    assert [len(stage.blocks) for stage in space.smallest.spec.stages] == [1, 1, 1, 1]
    assert not any(block.has_attention for stage in space.smallest.spec.stages for block in stage.blocks)
    even = Importances(tuple(tuple(1.0 for _ in stage.blocks) for stage in V1.stages))
    assert {action.kind for action in propose(space, space.smallest, even, 100)} == set()
    kinds = {(action.kind, action.stage) for action in propose(space, space.largest, even, 100)}
    assert ("depth", 0) in kinds
    assert ("depth", 1) not in kinds, "its only block"
    with pytest.raises(SpecError, match="Nothing to cut"):
        Action("depth", 1, 0).apply(space, space.largest)
    rng = random.Random(0)
    for _ in range(50):
        space.check(drawn(space, rng))
    with pytest.raises(SpecError, match="too few blocks"):
        space.check(Space(V1).smallest)


@pytest.mark.parametrize(
    "changes", [{"objective": "size"}, {"objective": "mes", "importances": "shuffled"}, {"size_weight": -1},
                {"max_params": -1}, {"min_depth": 999}, {"shuffle_seed": 1}],
)  # fmt: skip
def test_illegal_options_are_refused(changes):
    with pytest.raises(SpecError):
        options = Options(**changes)
        options.check()
        options.space(V1)
