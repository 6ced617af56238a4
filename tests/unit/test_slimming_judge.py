"""What a candidate's score rests on: BatchNorm statistics of its own, and pictures that can be read."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from efficientformer.data.draws import Draws
from efficientformer.data.loader import Batch
from efficientformer.data.sources import open_source
from efficientformer.models.network import EfficientFormer
from efficientformer.slimming import judge
from efficientformer.slimming.extract import Pool, frozen_parts
from efficientformer.slimming.judge import Pictures, PoolJudge, Recovery, estimate_statistics
from efficientformer.slimming.space import IDENTITY, Space
from efficientformer.slimming.supernet import Supernet
from efficientformer.spec.errors import DataError
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.spec.variants import v1_spec
from efficientformer.training.recipe import Recipe
from efficientformer.training.task import Loss, Supervised
from tests.pictures import write_folders

SPEC = v1_spec((8, 8, 16, 16), (1, 1, 1, 1), 1, input_size=16, num_classes=3, stem_stride=1)
PREPROCESS = PreprocessSpec().with_input_size((16, 16))
CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path):
    root = write_folders(tmp_path, per_class=4)
    (root / "red" / "001.png").write_bytes(b"no picture")
    return open_source(root)


def test_unreadable_pictures_are_left_out_with_their_labels(source, tmp_path):
    pictures = Pictures.read(source, np.arange(len(source)), PREPROCESS)
    assert len(pictures.images) == len(pictures.labels) == 11
    assert pictures.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 3
    broken = [index for index in range(len(source)) if source.name(index).endswith("red/001.png")]
    with pytest.raises(DataError, match="Too few of the pictures can be read; expected at least 1 of 1; found 0"):
        Pictures.read(source, np.array(broken), PREPROCESS)
    with pytest.raises(DataError, match="expected at least 2 of 2; found 1"):
        Pictures.read(source, np.array([0, *broken]), PREPROCESS, least=2)


def recover(network, task, steps=1, dtype=None, candidate=None, **changes):
    """Train a network as a judge does after a cut, on batches of four pictures."""
    draws = Draws(*np.zeros((3, 4), np.int64), step=0)
    batch = Batch(torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]), draws, cut=False)
    loader = SimpleNamespace(batches=lambda first, end: iter([batch] * steps))
    recovery = Recovery(steps, 1.0, Recipe(opt="sgd", opt_args={}, **changes), task, loader)
    PoolJudge(None, None, None, recovery, CPU, dtype)._recover(network, candidate or Space(SPEC).largest)


class Watched:
    """A task whose gradient is the same for any pictures, and which remembers their number and what recomputes."""

    def __init__(self):
        self.sizes, self.recompute = [], set()

    def __call__(self, model, batch):
        self.sizes.append(len(batch.labels))
        self.recompute |= {stage.grad_checkpointing for stage in model.stages}
        return Loss(model.head.bias.sum(), None)


def test_a_recovery_goes_through_a_batch_in_the_recipe_s_parts():
    moved = []
    for parts in (1, 2):
        network, task = EfficientFormer(SPEC), Watched()
        recover(network, task, accumulate=parts)
        assert task.sizes == [4 // parts] * parts
        moved.append(network.head.bias)
    assert moved[0].all()
    assert torch.equal(*moved), "the loss is the mean of the parts'"


@pytest.mark.parametrize("wanted", [True, False])
def test_a_recovery_recomputes_blocks_where_the_recipe_does(wanted):
    task = Watched()
    recover(EfficientFormer(SPEC), task, grad_checkpointing=wanted)
    assert task.recompute == {wanted}


def test_a_recovery_in_half_precision_loses_no_small_gradients():
    """A gradient of 1e-10 is 0 in fp16, unless the loss is scaled."""
    network = EfficientFormer(SPEC)
    before = network.head.bias.detach().clone()
    recover(network, lambda model, _: Loss((model.head.bias.half() * 1e-5 * 1e-5).float().mean(), None),
            dtype=torch.float16)  # fmt: skip
    assert not torch.equal(before, network.head.bias)


def test_a_recovery_leaves_alone_what_the_recipe_freezes():
    network, before = EfficientFormer(SPEC), None
    task = Supervised(Recipe(), 3)
    for changes, moved in (({"norm": "frozen"}, False), ({"freeze": ("stem",)}, False), ({}, True)):
        before = copy.deepcopy(network.stem.state_dict())
        network.requires_grad_(True)
        recover(network, task, 2, **changes)
        assert torch.equal(before["conv1.norm.running_mean"], network.stem.conv1.norm.running_mean) is not moved
        stem = torch.equal(before["conv1.conv.weight"], network.stem.conv1.conv.weight)
        assert stem is (changes.get("freeze") == ("stem",))


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_a_recovery_goes_on_training_what_no_recipe_freezes(norm):
    """A block that lost its attention inherits nothing, and has no statistics of earlier training either."""
    pool, start = Pool.of(Supernet(SPEC)), Space(SPEC).largest
    everything, task = ("body", "norm", "head", "head_dist"), Supervised(Recipe(), 3)
    for candidate in (start, start.with_kind(3, 0, "mb4d")):
        network = pool.slimmed(candidate).network(candidate)
        before = copy.deepcopy(network.state_dict())
        recover(network, task, 2, candidate=candidate, freeze=everything, norm=norm)
        moved = {name for name, tensor in network.state_dict().items() if not torch.equal(before[name], tensor)}
        assert all(name.startswith("stages.3.blocks.0.") for name in moved)
        new = {"stages.3.blocks.0.mlp.fc1.conv.weight", "stages.3.blocks.0.mlp.fc1.norm.running_mean"}
        assert (new & moved) == (new if candidate is not start else set())


def test_frozen_parts_go_by_the_start_networks_numbers():
    spec = v1_spec((8, 8, 16, 16), (3, 1, 1, 1), 1, input_size=16, num_classes=3, stem_stride=1)
    cut = Space(spec).largest.with_kind(0, 0, IDENTITY).with_kind(3, 0, "mb4d")
    wanted = (
        "body",
        "stem",
        "stages.0",
        "stages.0.blocks.0",
        "stages.0.blocks.2.mlp",
        "stages.0.blocks.1.candidates.mb4d",
        "stages.3.blocks.0.candidates.mb3d",
        "stages.3.blocks.0.token_mixer.qkv",
        "steem",
    )
    assert frozen_parts(wanted, cut, EfficientFormer(cut.spec)) == (
        "body", "stem", "stages.0", "stages.0.blocks.1.mlp", "stages.0.blocks.0", "steem"
    )  # fmt: skip


def test_statistics_become_those_of_the_pictures(source, monkeypatch):
    """The plain mean over even batches of all of them, whatever the statistics were; nothing else changes."""
    monkeypatch.setattr(judge, "BATCH", 4)
    pictures = Pictures.read(source, np.arange(len(source)), PREPROCESS)
    network = EfficientFormer(SPEC, layer_scale_init=0.5)
    before = copy.deepcopy(network)
    first = network.stem.conv1.norm
    nn.init.normal_(first.running_mean, std=9)
    first.num_batches_tracked += 5
    estimate_statistics(network, pictures, CPU)
    with torch.no_grad():
        means = [before.stem.conv1.conv(images).mean((0, 2, 3)) for images, _ in pictures.batches(CPU)]
    assert sorted(len(labels) for _, labels in pictures.batches(CPU)) == [3, 4, 4]
    torch.testing.assert_close(first.running_mean, torch.stack(means).mean(0))
    assert not network.training
    assert first.momentum == before.stem.conv1.norm.momentum
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before.parameters(), strict=True))
