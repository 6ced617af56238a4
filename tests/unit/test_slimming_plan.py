"""What a slimming run is asked to do, what is refused before it begins, and what its folder holds on to."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from efficientformer.slimming import device, run
from efficientformer.slimming.check import check_run
from efficientformer.slimming.device import Measured
from efficientformer.slimming.judging import check_pictures
from efficientformer.slimming.plan import SUPERNET, Options, Plan
from efficientformer.slimming.search import PathFile, reachable
from efficientformer.slimming.space import Space
from efficientformer.slimming.start import decide, make_plan
from efficientformer.slimming.subject import SupernetSubject
from efficientformer.spec.errors import DataError, EfficientFormerError, SpecError, UsageError
from efficientformer.spec.variants import v1_spec
from efficientformer.training.loop import Run
from efficientformer.training.recipe import Recipe
from efficientformer.training.setup import build_network, prepare
from efficientformer.training.state import RunFolder
from tests.pictures import write_folders
from tests.unit.test_slimming_search import SPACE, WORTH, Blocks, Ledger, search

START = v1_spec((16, 16, 32, 32), (1, 1, 1, 2), 1, input_size=16, num_classes=3, distilled=False, stem_stride=1)
SCRATCH = Recipe(pretrained=False, spec=START.to_dict())


def plan_of(data="data", supernet=SCRATCH, **final):
    return Plan(str(data), (1.0,), supernet, Recipe(**final))


@pytest.mark.parametrize(
    ("final", "says"),
    [
        ({"opt": "adamww"}, "final: timm cannot build the optimiser 'adamww'"),
        ({"opt_args": {"nonsense": 1}}, "nonsense"),
        ({"randaugment": "much", "crop": "rrc"}, "final: Illegal randaugment"),
        ({"randaugment": "rand-m9"}, "final: RandAugment works on decoded pictures"),  # at 16 pixels they are padded
        ({"mixup": 0.2, "batch_size": 9}, "final: The batch cannot be divided"),
        ({"teacher": "none.safetensors"}, "final: There is no file 'none.safetensors'"),
        ({"teacher": "efficientformer_l9"}, "final: Unknown model 'efficientformer_l9'"),
        ({"teacher": "timm:local-dir:none"}, "final: There is no such teacher; .*found none"),
        ({"teacher": "timm:resnet18", "teacher_weights": "none.pth"}, "no such weights of the teacher; .*none.pth"),
        ({"freeze": ("stem", "steem")}, "final: freeze='steem' matches nothing. Parts are body, stem"),
        ({"freeze": ("stages.0.blocks.7",)}, "matches nothing"),
        ({"freeze": ("body", "norm", "head")}, "final: Everything is frozen"),
    ],
)
def test_what_the_final_recipe_cannot_do_is_refused_before_the_supernet_is_trained(final, says):
    with pytest.raises(EfficientFormerError, match=says):
        check_run(plan_of(**final), Space(START))


def test_what_the_supernet_s_recipe_cannot_do_is_refused_by_its_name():
    for changes, says in (({"opt": "adamww"}, "supernet: timm"), ({"freeze": ["steem"]}, "supernet: freeze='steem'")):
        with pytest.raises(UsageError, match=says):
            check_run(plan_of(supernet=SCRATCH.with_changes(**changes)), Space(START))


def test_recipes_that_can_work_are_not_refused(tmp_path):
    (tmp_path / "teacher.pth").touch()
    parts = ("body", "stages.3.blocks.1.candidates.mb4d", "stages.3.blocks.1.candidates.mb3d.mlp", "stages.0.blocks.0")
    for final in ({"freeze": parts}, {"teacher": SUPERNET}, {"teacher": str(tmp_path / "teacher.pth")}):
        check_run(plan_of(supernet=SCRATCH.with_changes(freeze=("body", "norm", "head")), **final), Space(START))


def test_a_start_network_that_takes_no_pictures_is_refused():
    with pytest.raises(SpecError, match=r"1 or 3 channels; .*found 4"):
        check_run(plan_of(), Space(dataclasses.replace(START, in_chans=4)))
    check_run(plan_of(), Space(dataclasses.replace(START, in_chans=1)))


@pytest.mark.parametrize("size", [32, 64])
def test_a_grey_network_of_a_spec_takes_grey_pictures(size):
    spec = dataclasses.replace(START, in_chans=1).with_input_size(size)
    recipe = Recipe(pretrained=False, spec=spec.to_dict())
    assert build_network(recipe, ("a", "b"), print)[1].preprocess.mode == "L"
    supernet, manifest = SupernetSubject(Options()).build(recipe, ("a", "b"), print)
    assert (manifest.preprocess.mode, supernet.spec.in_chans) == ("L", 1)


def test_files_of_both_recipes_are_named_from_the_root(tmp_path, monkeypatch):
    for name in ("teacher.pth", "weights.pth"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    settings = ["supernet.teacher=timm:local-dir:folder", "teacher_weights=weights.pth", "final.teacher=teacher.pth",
                "final.views=2", "final.teacher_cache=cache"]  # fmt: skip
    plan = decide(make_plan("data", [1.0], model="efficientformer_l1", settings=settings))
    assert (plan.supernet.teacher, plan.final.teacher) == (
        f"timm:local-dir:{tmp_path}/folder", f"{tmp_path}/teacher.pth"
    )  # fmt: skip
    assert plan.supernet.teacher_weights == plan.final.teacher_weights == f"{tmp_path}/weights.pth"
    assert plan.final.teacher_cache == f"{tmp_path}/cache"
    taught = decide(make_plan("data", [1.0], model="efficientformer_l1", settings=["final.teacher=supernet"]))
    assert taught.final.teacher == SUPERNET


@pytest.mark.parametrize("name", ["epochs", "final_epochs"])
@pytest.mark.parametrize("value", [0, 2.5])
def test_no_epochs_are_no_default(name, value):
    with pytest.raises(SpecError, match=f"Illegal {name}; expected a whole number from 1"):
        make_plan("data", [1.0], model="efficientformer_l1", **{name: value})


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        ((), (10, 20)),
        (("supernet.pretrained=false",), (20, 40)),
        (("supernet.pretrained=false", "refine_epochs=15"), (20, 40)),
        (("final.pretrained=false",), (10, 20)),
    ],
)
def test_a_supernet_from_scratch_is_trained_longer_whatever_makes_it_so(settings, epochs):
    plan = make_plan("data", [1.0], model="efficientformer_l1", settings=iter(settings))
    assert (plan.supernet.epochs, plan.final.epochs) == epochs


def test_a_single_picture_has_no_statistics():
    with pytest.raises(SpecError, match="Illegal calibration; expected a whole number from 2"):
        Options(calibration=1)


def test_pictures_that_moved_are_the_same_others_are_not(tmp_path):
    """Also where some cannot be read: of those decoded into memory, a run notes the rest."""
    for name, per_class in (("data", 8), ("moved", 8), ("other", 9)):
        write_folders(tmp_path / name, per_class=per_class)
        (tmp_path / name / "red" / "001.png").write_bytes(b"no picture")
    plan, supernet = plan_of(tmp_path / "moved"), tmp_path / "supernet"
    subject = SupernetSubject(plan.options, final=plan.final)
    check_pictures(supernet, plan)
    prepared = prepare(plan.supernet, tmp_path / "data", 0, 1, subject=subject)
    RunFolder(supernet).create(prepared.recipe, prepared.describe_data(tmp_path / "data"))
    assert prepared.loader.skipped
    check_pictures(supernet, plan)
    with pytest.raises(UsageError, match=r"other pictures; found .*other changed"):
        check_pictures(supernet, dataclasses.replace(plan, data=str(tmp_path / "other")))
    with pytest.raises(DataError):
        check_pictures(supernet, dataclasses.replace(plan, data=str(tmp_path / "typo")))


def slimming(folder, target, monkeypatch, factor):
    """A run whose engine is slower than its table by a factor, and a bench that notes what it saves."""
    plan = Plan("data", (target,), Recipe(), Recipe(teacher=SUPERNET))

    def measured(_, specs, start):
        return [Measured(ms, ms) for ms in (factor(spec) * Blocks().predict(spec).ms for spec in specs)]

    def save(steps, number, path):
        saved.append((number, path.name))
        path.parent.mkdir(exist_ok=True)
        path.touch()

    saved = []
    monkeypatch.setattr(device, "measured", measured)
    return run._SlimRun(folder, plan, SPACE, Blocks(), True), SimpleNamespace(save=save), saved


def test_a_target_is_given_up_only_once_the_smallest_network_was_measured(tmp_path, monkeypatch):
    low, _ = reachable(SPACE, Blocks())
    smallest, target = SPACE.smallest.spec, 1.2 * low
    run_, bench, saved = slimming(tmp_path, target, monkeypatch, lambda spec: 1.1 if spec == smallest else 1.4)
    searching = search(tmp_path / "path.json", Ledger(WORTH))
    run_._choose(searching, bench, target)
    assert searching.steps[-1].candidate.spec == smallest
    assert saved[0] == (searching.steps[-1].number, f"sliced-{target:g}ms.safetensors")
    run_, bench, saved = slimming(tmp_path / "other", target, monkeypatch, lambda _: 1.4)
    with pytest.raises(run.TrainingError, match=r"measured within .* with all gone that can be cut"):
        run_._choose(search(tmp_path / "other.json", Ledger(WORTH)), bench, target)
    assert not saved
    assert run.read_latencies(run_.folder / run.MEASURED) == {}, "all is measured again"


def test_the_teacher_out_of_the_supernet_is_the_same_for_every_target(tmp_path, monkeypatch):
    """Where a computation cannot be repeated to the last bit, another one would be refused by its kept logits."""
    run_, bench, saved = slimming(tmp_path, 1.8, monkeypatch, lambda _: 0.9)
    searching = search(tmp_path / "path.json", Ledger(WORTH))
    for target in (1.8, 1.5):
        run_._choose(searching, bench, target)
    assert [name for _, name in saved] == ["sliced-1.8ms.safetensors", "start.safetensors", "sliced-1.5ms.safetensors"]


def test_what_was_measured_is_known_where_it_cannot_be_measured(tmp_path, monkeypatch):
    run_, *_ = slimming(tmp_path, 1.8, monkeypatch, lambda _: 1.0)
    searching = search(tmp_path / "path.json", Ledger(WORTH))
    steps = searching.run(1.8)
    run_._measure(steps[:2])
    monkeypatch.setattr(device, "measured", lambda *_: None)
    known = [None if each is None else each.ms for each in run_._measure(steps)]
    assert known == [*(pytest.approx(step.predicted_ms) for step in steps[:2]), *[None] * (len(steps) - 2)]
    assert json.loads((tmp_path / run.MEASURED).read_text()).keys() == {run._digest(step) for step in steps[:2]}
    assert PathFile(tmp_path / "path.json", SPACE).read() == steps


def test_a_part_of_a_larger_run_is_begun_again_by_that(tmp_path):
    """What a supernet's training leaves is no network that --model takes."""
    command = "efficientformer slim --resume runs/slim"
    for name in ("state.pt", "last.safetensors"):
        (tmp_path / name).write_bytes(b"damaged")
    hints = []
    for folder in (RunFolder(tmp_path), RunFolder(tmp_path, command)):
        with pytest.raises(run.TrainingError) as error:
            folder.load_state({"model": torch.nn.Linear(1, 1)})
        hints.append((error.value.hint, Run.advice.fget(SimpleNamespace(folder=folder))))
    (alone, advice), (part, other) = hints
    assert "--model" in alone
    assert "--model" in advice
    assert part == f"Remove {tmp_path}, and it begins again: {command}"
    assert other.startswith("Start a new run with a lower learning rate")
    assert "--model" not in other
