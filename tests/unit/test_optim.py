"""Parameter groups, schedule, clipping, freezing."""

import json
from pathlib import Path

import pytest
import torch
from timm.optim import muon

from efficientformer import get_model
from efficientformer.slimming.supernet import ALPHA_LR, Supernet
from efficientformer.spec.errors import SpecError, UsageError
from efficientformer.spec.variants import VARIANTS, v1_spec, v2_spec
from efficientformer.training.optim import (
    build_optimizer,
    clip_gradients,
    depth_of,
    freeze,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)  # fmt: skip
from efficientformer.training.processes import mixed_precision
from efficientformer.training.recipe import Recipe

GOLDEN = Path(__file__).parents[1] / "fixtures" / "no_weight_decay.json"
V1 = v1_spec((8, 8, 16, 16), (1, 1, 1, 2), 1, input_size=32, num_classes=3)
V2 = v2_spec((8, 8, 16, 16), ((2,), (2,), (2, 2), (2,)), 1, input_size=64, num_classes=3)


@pytest.mark.parametrize("spec", [V1, V2], ids=["v1", "v2"])
def test_parameters_without_weight_decay_are_those_of_the_golden_file(spec):
    """Every kind of tensor of both families, by name: a new one must be put on one side on purpose."""
    groups = parameter_groups(get_model(spec), Recipe(weight_decay=0.1, layer_decay=1.0))
    found = sorted(name for group in groups if group["weight_decay"] == 0 for name in group["names"])
    assert found == json.loads(GOLDEN.read_text())[spec.family]


@pytest.mark.parametrize("spec", [V1, V2], ids=["v1", "v2"])
def test_every_parameter_is_in_one_group(spec):
    model = get_model(spec)
    groups = parameter_groups(model, Recipe(layer_decay=0.7))
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(names)


@pytest.mark.parametrize("opt", ["muon", "Muon", "nadamuon", "lookahead_muon"])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_muon_orthogonalises_in_the_precision_of_the_run(opt, precision, dtype, monkeypatch):
    """timm's own is bf16, which most processors emulate; it is timm's again between two steps."""
    found = []
    theirs = muon.zeropower_via_newtonschulz

    def spied(*arguments, **options):
        result = theirs(*arguments, **options)
        found.append(result.dtype)
        return result

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", spied)
    model = get_model(V1)
    optimizer = build_optimizer(model, Recipe(opt=opt, precision=precision))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert set(found) == {dtype}
    assert muon.zeropower_via_newtonschulz is spied


def test_layer_decay_falls_from_the_head_to_the_stem():
    model = get_model(V1)
    scale = {n: g["lr_scale"] for g in parameter_groups(model, Recipe(layer_decay=0.5)) for n in g["names"]}
    assert scale["head.weight"] == scale["norm.weight"] == 1
    assert scale["stages.3.blocks.1.mlp.fc1.weight"] == 0.5
    assert scale["stages.3.blocks.0.mlp.fc1.conv.weight"] == 0.25
    assert scale["stages.3.embedding.conv.weight"] == 0.25  # goes with the block after it
    assert scale["stages.0.blocks.0.mlp.fc1.conv.weight"] == 0.5**5
    assert scale["stem.conv1.conv.weight"] == 0.5**6


@pytest.mark.parametrize("name", ["efficientformer_l1", "efficientformerv2_s0", "efficientformer_cifar10"])
def test_depths_have_no_gap(name):
    model = get_model(VARIANTS[name])
    depths = {depth_of(n, model) for n, _ in model.named_parameters()}
    assert depths == set(range(sum(len(s.blocks) for s in VARIANTS[name].stages) + 2))


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.11), (8, 0.91), (9, 1.01), (10, 1.01), (55, 0.51), (99, 0.01 + 0.5 * (1 + -0.99939))],
)
def test_cosine_with_warmup(step, rate):
    recipe = Recipe(lr=1.01, warmup_lr=0.01, min_lr=0.01, warmup_epochs=1, epochs=10)
    assert learning_rate(recipe, step, 10) == pytest.approx(rate, abs=1e-3)


@pytest.mark.parametrize(("epochs", "warmup", "steps"), [(1, 1, 1), (1, 1, 3), (4, 0.3, 5)])
def test_a_warmup_that_ends_within_a_step_stays_below_the_peak(epochs, warmup, steps):
    recipe = Recipe(lr=1.0, warmup_lr=0.1, warmup_epochs=warmup, epochs=epochs)
    assert max(learning_rate(recipe, step, steps) for step in range(epochs * steps)) == 1.0


def test_other_schedules():
    recipe = Recipe(lr=1.0, warmup_epochs=0, min_lr=0.0, epochs=10, schedule="linear")
    assert learning_rate(recipe, 25, 10) == pytest.approx(0.75)
    assert learning_rate(recipe.with_changes(schedule="constant"), 99, 10) == 1.0


def test_groups_follow_the_schedule_by_their_own_factor():
    optimizer = build_optimizer(get_model(V1), Recipe(layer_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    assert {round(g["lr"] / g["lr_scale"], 9) for g in optimizer.param_groups} == {0.1}
    assert len({g["lr"] for g in optimizer.param_groups}) > 3


def test_importances_learn_alike_at_every_depth():
    supernet = Supernet(get_model(V1).spec)
    groups = parameter_groups(supernet, Recipe(lr=5e-4, layer_decay=0.8))
    rates = {name: 5e-4 * g["lr_scale"] for g in groups for name in g["names"]}
    alphas = {name: rate for name, rate in rates.items() if name.endswith(".alpha")}
    assert len(alphas) == sum(1 for _ in supernet.paths())
    assert set(alphas.values()) == {ALPHA_LR}
    assert max(rate for name, rate in rates.items() if name not in alphas) <= 5e-4


def test_unknown_optimizer_and_arguments():
    with pytest.raises(SpecError, match="adamz"):
        build_optimizer(get_model(V1), Recipe(opt="adamz"))
    with pytest.raises(SpecError, match="nonsense"):
        build_optimizer(get_model(V1), Recipe(opt_args={"nonsense": 1}))
    with pytest.raises(SpecError, match="opt_args"):
        build_optimizer(get_model(V1), Recipe(opt_args={"betas": 3}))
    with pytest.raises(SpecError, match="opt_args"):
        build_optimizer(get_model(V1), Recipe(opt_args={"betas": [0.9]}))
    assert build_optimizer(get_model(V1), Recipe(opt_args={"foreach": True})).defaults["foreach"]
    with pytest.raises(SpecError, match="second derivatives"):
        build_optimizer(get_model(V1), Recipe(opt="adahessian"))


@pytest.mark.parametrize("kind", ["agc", "norm", "value"])
def test_clipping_bounds_gradients(kind):
    model = get_model(V1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    clip_gradients(model, Recipe(clip=kind, clip_value=0.01))
    grads = {name: p.grad for name, p in model.named_parameters()}
    if kind == "norm":
        assert torch.stack([g.norm() for g in grads.values()]).norm() == pytest.approx(0.01, rel=1e-3)
    elif kind == "value":
        assert max(float(g.abs().max()) for g in grads.values()) <= 0.01 + 1e-7
    else:
        assert torch.equal(grads["head.weight"], torch.ones_like(grads["head.weight"])), "heads are left out"
        fc = "stages.3.blocks.1.mlp.fc1.weight"
        limit = 0.01 * dict(model.named_parameters())[fc].norm(dim=1).clamp(min=1e-3)
        assert (grads[fc].norm(dim=1) <= limit * 1.001).all()


def test_freezing():
    model = get_model(V2)
    still = freeze(model, ["stem", "stages.0"])
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not [n for n in learns if n.startswith(("stem", "stages.0"))]
    assert [n for n in learns if n.startswith("stages.1")]
    assert model.stem.conv1.norm in still
    assert model.stages[1].blocks[0].mlp.fc1.norm not in still
    names = [n for g in parameter_groups(model, Recipe()) for n in g["names"]]
    assert sorted(names) == sorted(learns)


def test_only_the_heads_learn():
    model = get_model(V1)
    freeze(model, ["body"])
    learns = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {"norm", "head", "head_dist"}


def test_freezing_nothing_or_everything_is_an_error():
    with pytest.raises(UsageError, match=r"matches nothing.* body, stem, stages.0, stages.1, .* norm, head, head_dist"):
        freeze(get_model(V1), ["stage.0"])
    with pytest.raises(UsageError, match="nothing is left"):
        freeze(get_model(V1), ["body", "norm", "head", "head_dist"])


@pytest.mark.parametrize(("hardware", "expected"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_that_only_emulates_bf16_trains_in_fp16(hardware, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or hardware
    )
    assert mixed_precision(Recipe(), "auto") == expected
