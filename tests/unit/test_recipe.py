"""The recipe: read as data, checked field by field, never executed."""

import json
from pathlib import Path

import pytest

from efficientformer.spec.errors import SpecError, UsageError
from efficientformer.spec.variants import VARIANTS
from efficientformer.training.recipe import Recipe, load_recipe, override

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda p: p.stem)
def test_every_recipe_of_the_repository_loads(path):
    recipe = load_recipe(path)
    assert recipe.spec is not None or recipe.model in VARIANTS
    assert path.name in path.read_text(), "the docstring shows the command"


def test_there_is_a_recipe_for_every_published_network():
    models = {load_recipe(path).model for path in RECIPES.glob("imagenet1k_*.py")}
    assert models == {name for name in VARIANTS if not name.endswith("cifar10")}


def test_round_trip_through_json(tmp_path):
    recipe = Recipe(epochs=3, freeze=("stem",), opt_args={"betas": [0.9, 0.99]}, lr=1e-3)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    assert load_recipe(tmp_path / "recipe.json") == recipe
    assert load_recipe(tmp_path) == recipe  # a run folder


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("import os", "is code"),
        ("epochs = open('/etc/passwd')", "is code"),
        ("epochs = [].__class__", "is code"),
        ("epochs = 3\nepochs = 4", "twice"),
        ("opt_args = {'a': 1,\n'b': 2,\n'a': 1}", "sets 'a' of 'opt_args' twice; found again in line 3"),
        ("opt_args = {'a': [{'b': 1, 'b': 2}]}", "sets 'b' of 'opt_args' twice; found again in line 1"),
        ("epoch = 3", "Did you mean 'epochs'"),
        ("epochs = '3'", "Illegal epochs"),
        ("epochs = True", "Illegal epochs"),
        ("epochs = 0", "from 1 to"),
        ("lr = float('nan')", "is code"),
        ("epochs = 3 if", "no valid Python"),
        ("x: int = 3", "is code"),
        ("a, b = 1, 2", "is code"),
        ("clip = 'agx'", "one of 'none', 'agc'"),
        ("crop_scale = (0.9, 0.1)", "low <= high"),
        ("crop_scale = 3", "a list"),
        ("freeze = 'stem'", "a list"),
        ("batch_size = 10\naccumulate = 3", "multiple of accumulate"),
        ("teacher_cache = 'x'", "unmixed views"),
        ("teacher = 'L1'\ndistillation = 'none'", "without distillation"),
        ("views = 2\nrepeats = 3", "exclude"),
        ("opt_args = 3", "a mapping"),
        ("spec = {}", "spec has no published weights"),
    ],
)
def test_what_is_no_recipe_is_refused_with_the_reason(tmp_path, text, match):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(SpecError, match=match) as caught:
        load_recipe(path)
    assert "mine.py" in str(caught.value)


def test_a_json_recipe_sets_nothing_twice(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"epochs": 3, "opt_args": {"nesterov": true, "nesterov": false}}')
    with pytest.raises(SpecError, match=r"mine\.json.*'nesterov' twice"):
        load_recipe(path)
    with pytest.raises(SpecError, match="Illegal opt_args"):
        override(Recipe(), ['opt_args={"nesterov": true, "nesterov": false}'])


def test_two_dicts_of_a_recipe_may_have_the_same_key(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("opt_args = {'a': {'a': 1}, 'b': [{'a': 1}, {'a': 2}]}")
    assert load_recipe(path).opt_args == {"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}]}


def test_nothing_in_a_recipe_is_executed(tmp_path):
    path, trace = tmp_path / "evil.py", tmp_path / "trace"
    path.write_text(f"epochs = 3\n__import__('pathlib').Path({str(trace)!r}).touch()\n")
    with pytest.raises(SpecError):
        load_recipe(path)
    assert not trace.exists()


def test_missing_and_oversized_files(tmp_path):
    with pytest.raises(UsageError, match="Cannot read the recipe"):
        load_recipe(tmp_path / "none.py")
    (tmp_path / "big.py").write_bytes(b"#" * (1 << 20) + b"\nepochs = 3")
    with pytest.raises(UsageError, match="too large"):
        load_recipe(tmp_path / "big.py")
    (tmp_path / "deep.py").write_text("epochs = " + "(" * 5000 + ")" * 5000)
    with pytest.raises(SpecError):
        load_recipe(tmp_path / "deep.py")


def test_overrides_are_typed():
    recipe = override(Recipe(), ["epochs=7", "randaugment=rand-m9", "pretrained=false", 'freeze=["stem"]', "lr=1"])
    assert (recipe.epochs, recipe.randaugment, recipe.pretrained) == (7, "rand-m9", False)
    assert recipe.freeze == ("stem",)
    assert recipe.lr == 1.0
    assert override(Recipe(), ["crop_scale=0.2,1.0", "freeze=stem,stages.0"]).crop_scale == (0.2, 1.0)
    assert override(Recipe(), ["freeze=stem,stages.0"]).freeze == ("stem", "stages.0")
    with pytest.raises(SpecError, match="NAME=VALUE"):
        override(Recipe(), ["epochs"])
    with pytest.raises(SpecError, match="batch_size"):
        override(Recipe(), ["batchsize=3"])


def test_learning_rate_scales_with_the_batch_where_asked():
    assert Recipe(lr=1e-3, batch_size=512).scaled_lr == 1e-3
    assert Recipe(lr=1e-3, lr_batch=1024, batch_size=512).scaled_lr == pytest.approx(5e-4)


def test_the_bound_of_clipping_is_the_usual_one_of_its_kind_unless_given():
    assert [Recipe(clip=kind).clip_at for kind in ("agc", "norm", "value")] == [0.01, 1, 1]
    assert Recipe(clip="agc", clip_value=0.3).clip_at == 0.3
    assert Recipe(clip="norm").with_changes(clip="agc").clip_at == 0.01


def test_settings_without_effect_are_named():
    assert Recipe.from_dict(json.loads(Recipe(crop="pad").to_json())).idle == ()
    changed = {"color_jitter": 0.0, "crop_scale": (0.5, 1.0), "distillation": "soft", "clip_value": 2.0, "padding": 2}
    assert Recipe(crop="pad", **changed).idle == ("crop_scale", "color_jitter", "distillation", "clip_value")
    assert Recipe(crop="rrc", **changed, teacher="timm:x", clip="norm").idle == ("padding",)
    assert Recipe(crop="rrc", randaugment="rand-m9", color_jitter=0.0).idle == ("color_jitter",)


def test_settings_of_phases_that_are_none_are_named():
    assert Recipe(warmup_epochs=0, warmup_lr=0.1, min_lr=0.1).idle == ("warmup_lr",)
    assert Recipe(schedule="constant", warmup_lr=0.1, min_lr=0.1).idle == ("min_lr",)
    assert Recipe(refine_epochs=2).idle == ("refine_epochs",)
    assert Recipe(refine_epochs=2, erasing=0.1).idle == ()
    assert Recipe(epochs=2, refine_epochs=2, erasing=0.1, mixup=1.0, mix_prob=0.5).idle == (
        "erasing", "mixup", "mix_prob",
    )  # fmt: skip
    assert Recipe(mixup=1.0, cutmix=1.0, mix_prob=0.0).idle == ("mixup", "cutmix")


def test_a_model_without_effect_is_named():
    spec = VARIANTS["efficientformer_l1"].to_dict()
    assert Recipe(model="efficientformer_l3", spec=spec, pretrained=False).idle == ("model",)
    assert Recipe(model="efficientformer_l3", spec=spec).idle == ()
    assert Recipe(model="efficientformer_l3", pretrained=False).idle == ()


def test_settings_of_a_teacher_without_effect_are_named(tmp_path):
    (tmp_path / "own.pth").touch()
    settings = {"teacher_weights": "x.pth", "distill_temperature": 3.0}
    assert Recipe(teacher="efficientformer_l1", **settings).idle == ("distill_temperature",)
    assert Recipe(teacher=str(tmp_path / "own.pth"), distillation="soft", **settings).idle == ("teacher_weights",)
    assert Recipe(teacher="timm:x", distillation="soft", **settings).idle == ()
