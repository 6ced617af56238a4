"""The supernet and what is cut out of it: mixtures, inherited weights, channels by importance."""

import copy
import json

import pytest
import torch
from torch import nn

from efficientformer.data.draws import Draws
from efficientformer.data.loader import Batch
from efficientformer.models.network import EfficientFormer
from efficientformer.slimming.channels import axes_of, by_chance, by_importance, channel_scores, plan_cut
from efficientformer.slimming.extract import Pool
from efficientformer.slimming.importance import Importances
from efficientformer.slimming.judging import Bench
from efficientformer.slimming.moves import Action
from efficientformer.slimming.space import IDENTITY, WITHOUT_ATTENTION, Candidate, Space
from efficientformer.slimming.supernet import (
    COLD,
    HOT,
    Annealed,
    Supernet,
    load_supernet,
    save_supernet,
    without_attention,
)
from efficientformer.spec.errors import CheckpointError, SpecError
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.spec.variants import v1_spec, v2_spec
from efficientformer.training.optim import freeze, hold_still
from efficientformer.training.recipe import Recipe

V1 = v1_spec((32, 48, 64, 64), (2, 1, 2, 2), (1, 2), input_size=32, num_classes=3, stem_stride=1)
V2 = v2_spec((32, 32, 48, 64), ((4,), (4, 3), (4, 3), (3, 4)), 1, input_size=32, num_classes=3, stem_stride=1)
NONE = v1_spec((16, 16, 32, 32), (0, 1, 0, 1), 0, input_size=32, num_classes=3, stem_stride=2, distilled=False)
STARTS = pytest.mark.parametrize("spec", [V1, V2, NONE], ids=["v1", "v2", "without attention"])


def extract(supernet, candidate, order=by_importance):
    return Pool.of(supernet).slimmed(candidate, order).network(candidate)


def supernet_of(spec, seed=0):
    """A supernet whose every number matters: norms with statistics and factors, layer scales near 1."""
    torch.manual_seed(seed)
    supernet = Supernet(spec, layer_scale_init=0.7)
    for module in supernet.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return supernet.eval()


@pytest.mark.parametrize("spec", [V1, V2], ids=["v1", "v2"])
def test_freezing_holds_what_is_inherited_and_nothing_else(spec):
    supernet = Supernet(spec)
    freeze(supernet, ["body"])
    learning = {name for name, parameter in supernet.named_parameters() if parameter.requires_grad}
    body = {name for name in learning if name.startswith("stages")}
    assert {name for name in body if name.endswith(".alpha")} == {
        name for name, _ in supernet.named_parameters() if name.endswith(".alpha")
    }
    fresh = {name for name in body if not name.endswith(".alpha")}
    assert all(".candidates.mb4d." in name for name in fresh)
    assert bool(fresh) == (spec is V1), "V2's candidates without attention inherit all they have"


def test_norms_without_pretrained_statistics_are_not_frozen():
    supernet = Supernet(V1)
    still = {id(module) for module in hold_still(supernet, Recipe(norm="frozen"))}
    learning = [name for name, module in supernet.named_modules()
                if isinstance(module, nn.BatchNorm2d) and id(module) not in still]  # fmt: skip
    assert still
    assert learning
    assert all(".candidates.mb4d." in name and name.startswith(("stages.2", "stages.3")) for name in learning)


def lean_on(supernet, candidate):
    """Give one candidate of every MetaPath the whole mixture."""
    kinds = [kind for row in candidate.kinds for kind in row]
    with torch.no_grad():
        for path, kind in zip(supernet.paths(), kinds, strict=True):
            path.alpha.zero_()
            path.alpha[path.kinds.index(kind)] = 200


def pictures(spec, count=4):
    return torch.randn(count, 3, *spec.input_size, generator=torch.Generator().manual_seed(1))


@STARTS
@torch.no_grad()
def test_a_network_cut_out_computes_what_the_supernets_chosen_path_does(spec):
    supernet, space = supernet_of(spec), Space(spec)
    x = pictures(spec)
    second = tuple(
        tuple(space.options(stage, position)[1] for position in range(len(row)))
        for stage, row in enumerate(space.largest.kinds)
    )
    for candidate in (space.largest, Candidate(spec, second, space.largest.widths, space.largest.expansions)):
        lean_on(supernet, candidate)
        network = extract(supernet, candidate).eval()
        assert type(network) is EfficientFormer
        assert network.spec == candidate.spec
        assert torch.equal(network(x), supernet(x))


@torch.no_grad()
def test_shares_of_a_mixture_go_into_the_layer_scales():
    """V2's FFN has one branch, so that even a mixture with identity is an ordinary network."""
    spec = v2_spec((16, 16, 16, 16), ((2,), (2,), (2,), (2,)), 0, input_size=32, num_classes=3, stem_stride=1)
    supernet = supernet_of(spec)
    for number, path in enumerate(supernet.paths()):
        path.alpha[0] = number - 1.5
    network = extract(supernet, Space(spec).largest).eval()
    torch.testing.assert_close(network(pictures(spec)), supernet(pictures(spec)), rtol=1e-5, atol=1e-5)


@STARTS
def test_every_parameter_gets_a_gradient(spec):
    supernet = supernet_of(spec).train()
    supernet(pictures(spec)).square().sum().backward()
    missing = [name for name, p in supernet.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_noise_only_in_training_and_less_of_it_when_cold():
    supernet = supernet_of(V1)
    path = next(supernet.paths())
    assert path.shares().tolist() == [0.5, 0.5]
    path.train()
    torch.manual_seed(0)
    spread = {}
    for temperature in (HOT, COLD):
        supernet.set_temperature(temperature)
        spread[temperature] = torch.stack([path.shares().detach() for _ in range(200)])[:, 0].std()
    assert spread[COLD] > 2 * spread[HOT]


def test_temperature_falls_with_the_steps():
    supernet, seen = supernet_of(V1), []

    def task(model, batch):
        seen.append(next(supernet.paths()).temperature)

    annealed = Annealed(task, supernet, 11)
    for step in (0, 5, 10):
        empty = torch.empty(0)
        annealed(supernet, Batch(empty, empty, Draws(None, None, None, step), cut=False))
    assert seen == pytest.approx([HOT, (HOT * COLD) ** 0.5, COLD])


@STARTS
@torch.no_grad()
def test_inherited_weights_lead_the_mixture(spec):
    network = EfficientFormer(spec, layer_scale_init=0.5).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    rates = {"layer_scale_init": 0.1, "drop_path_rate": 0.0, "head_dropout": 0.0}
    supernet = Supernet.around(network, inherited=True, **rates).eval()
    assert all(row[0] > 0.9 - 0.05 * (len(row) - 2) for row in (p.alpha.softmax(0).tolist() for p in supernet.paths()))
    lean_on(supernet, Space(spec).largest)
    assert torch.equal(supernet(pictures(spec)), network(pictures(spec)))
    scratch = Supernet.around(network, inherited=False, **rates)
    assert not any(path.alpha.any() for path in scratch.paths())


def test_v2_inherits_the_mlp_of_a_block_that_loses_its_attention():
    network = EfficientFormer(V2)
    supernet = Supernet.around(network, inherited=True, layer_scale_init=0.1, drop_path_rate=0.0, head_dropout=0.0)
    attn, ffn = supernet.stages[3].blocks[1].candidates.values()
    assert torch.equal(ffn.mlp.fc1.conv.weight, attn.mlp.fc1.conv.weight)
    assert torch.equal(ffn.layer_scale2.gamma, attn.layer_scale2.gamma)


def test_without_attention():
    assert {block.kind for stage in without_attention(V2).stages for block in stage.blocks} == {"ffn"}


@STARTS
@torch.no_grad()
def test_every_width_and_expansion_can_be_cut(spec):
    space, supernet = Space(spec, 8, 8), supernet_of(spec)
    small = space.largest
    for stage in range(4):
        small = small.with_width(stage, space.widths(stage)[-1])
        small = small.with_expansions(stage, [space.expansions(stage, i)[-1] for i in range(len(small.kinds[stage]))])
    for candidate in (small, space.smallest, Action("width", 3).apply(space, space.largest)):
        network = extract(supernet, candidate).eval()
        assert network.spec == candidate.spec
        assert network(pictures(spec)).isfinite().all()


@torch.no_grad()
def test_channels_that_nothing_uses_go_first_and_cost_nothing():
    """Silence 16 channels of stage 3 and its hidden units everywhere: cutting 16 must cut just those."""
    supernet, space = supernet_of(V1), Space(V1)
    lean_on(supernet, space.largest)
    dead = torch.randperm(64, generator=torch.Generator().manual_seed(5))[:16]
    for name, tensor in supernet.state_dict().items():
        axes = axes_of(name)
        if axes.first == "stream.2" and name.endswith(("norm.weight", "norm.bias", "gamma", "conv.bias")):
            tensor[dead] = 0
        if axes.first == "stream.2" and name.endswith("running_mean"):
            tensor[dead] = 0
        if axes.second == "stream.2" and tensor.ndim > 1:
            tensor[:, dead] = 0
        if axes.first.startswith("hidden.2") and tensor.ndim > 0:
            tensor[192:] = 0 if "running_var" not in name else 1
        if axes.second.startswith("hidden.2") and tensor.ndim > 1:
            tensor[:, 192:] = 0
    narrow = space.largest.with_width(2, 48).with_kind(2, 1, "mb4d")  # LayerNorm of an MB3D would see the width
    wide = space.largest.with_kind(2, 1, "mb4d")
    lean_on(supernet, wide)
    state, kept = supernet.state_dict(), set(range(64)) - set(dead.tolist())
    assert set(plan_cut(state, wide.full, narrow.full, by_importance)["stream.2"].tolist()) == kept
    x = pictures(V1)
    torch.testing.assert_close(extract(supernet, narrow).eval()(x), extract(supernet, wide).eval()(x))
    assert not torch.allclose(extract(supernet, narrow, by_chance(0)).eval()(x), extract(supernet, wide).eval()(x))


def test_scores_follow_what_is_written_and_read():
    state = {
        "stages.1.embedding.conv.weight": torch.ones(4, 2, 3, 3),
        "stages.1.embedding.norm.weight": torch.tensor([1.0, 1.0, 0.01, 1.0]),
        "stages.2.embedding.conv.weight": torch.ones(2, 4, 3, 3) * torch.tensor([1.0, 3.0, 1.2, 0.0])[:, None, None],
    }
    scores = channel_scores(state, "stream.1", 4)
    assert by_importance(state, "stream.1", 4).tolist() == scores.argsort(descending=True).tolist() == [1, 0, 2, 3]


@torch.no_grad()
@pytest.mark.parametrize("spec", [V1, V2], ids=["v1", "v2"])
def test_blocks_a_candidate_lacks_have_no_say_in_its_channels(spec):
    """Make a removed block, and what would replace attention, lean hard on 16 channels: others must not stay for it."""
    space = Space(spec)
    narrow = space.largest.with_kind(2, 0, IDENTITY).with_width(2, space.widths(2)[1])
    removed, attends = space.largest.kinds[2]
    replacement = WITHOUT_ATTENTION[attends]

    def kept(loud):
        supernet = supernet_of(spec)
        for position, kind in loud:
            weight = next(supernet.stages[2].blocks[position].candidates[kind].mlp.fc1.parameters())
            weight[:, -16:] *= 1000
        return extract(supernet, narrow).stages[2].embedding.state_dict()

    first, *others = kept([]), kept([(0, removed), (1, replacement)]), kept([(1, attends)])
    same = [all(torch.equal(first[name], other[name]) for name in first) for other in others]
    assert same == [True, False]


def test_a_name_of_no_network_has_no_rule():
    with pytest.raises(CheckpointError, match="No slimming rule for backbone"):
        axes_of("backbone.weight")


@torch.no_grad()
def test_cutting_in_two_steps_is_cutting_what_was_cut():
    supernet, space = supernet_of(V1), Space(V1)
    half = space.largest.with_width(1, 32)
    pool = Pool.of(supernet).slimmed(half)
    assert pool.spec.stages[1].width == 32
    network = pool.network(half)
    nn.init.zeros_(network.head.weight)
    later = pool.updated(half, network).slimmed(half.with_width(1, 16))
    assert not later.network(half.with_width(1, 16)).head.weight.any()
    with pytest.raises(SpecError, match="do not reach"):
        later.slimmed(half)
    with pytest.raises(SpecError, match="do not reach"):
        pool.slimmed(Space(V2).largest)


def test_an_identity_leaves_the_rest_in_order():
    supernet, space = supernet_of(V1), Space(V1)
    network = extract(supernet, space.largest.with_kind(0, 0, IDENTITY))
    kept = supernet.stages[0].blocks[1].candidates["mb4d"].mlp.fc1.conv.weight
    assert torch.equal(network.stages[0].blocks[0].mlp.fc1.conv.weight, kept)


@torch.no_grad()
def test_a_supernet_file_is_read_back_and_a_damaged_one_refused(tmp_path):
    supernet = supernet_of(V2)
    manifest = Manifest(V2, PreprocessSpec().with_input_size(V2.input_size), ("a", "b", "c"))
    path = tmp_path / "supernet.safetensors"
    save_supernet(path, supernet, manifest)
    again, found = load_supernet(path)
    assert found == manifest
    assert torch.equal(again.eval()(pictures(V2)), supernet(pictures(V2)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="no supernet"):
        load_supernet(path)


@torch.no_grad()
def test_the_search_takes_what_the_supernet_learned_last(tmp_path):
    """The best epoch is an early one where the temperature was high, and was chosen by what scores the cuts."""
    manifest = Manifest(V2, PreprocessSpec().with_input_size(V2.input_size), ("a", "b", "c"))
    (tmp_path / "supernet").mkdir()
    supernet = supernet_of(V2)
    for name, alpha in (("best", 1.0), ("last", 2.0)):
        for path in supernet.paths():
            path.alpha[0] = alpha
        save_supernet(tmp_path / "supernet" / f"{name}.safetensors", supernet, manifest)
    Bench.write_importances(tmp_path)
    written = json.loads((tmp_path / "importances.json").read_text())["paths"]
    assert written == [list(row) for row in Importances.of(supernet.probabilities()).paths]


def test_copies_are_supernets_too():
    """The trainer averages weights in a copy."""
    assert isinstance(copy.deepcopy(supernet_of(V1)), Supernet)
