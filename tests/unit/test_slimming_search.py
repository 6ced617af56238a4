"""Gradual slimming on made-up accuracies and latencies whose best path is known."""

import dataclasses
import json
import re

import pytest

from efficientformer.slimming.importance import Importances
from efficientformer.slimming.plan import Options, Plan, apply_settings, milliseconds, small_start
from efficientformer.slimming.search import PathFile, Search, check_targets, first_within, reachable, step_from_dict
from efficientformer.slimming.space import IDENTITY, Space
from efficientformer.slimming.start import make_plan, with_start
from efficientformer.spec.count import count
from efficientformer.spec.errors import SpecError, UsageError
from efficientformer.training.recipe import Recipe
from tests.unit.test_slimming_space import V1, Macs

SPACE = Space(V1)
EVEN = Importances(((1.0, 2.0), (3.0,), (4.0, 5.0, 6.0), (7.0, 8.0)))
BLOCK_MS = {"mb4d": 0.1, "mb3d": 0.3}


class Blocks:
    """A device on which only blocks take time."""

    def predict(self, spec):
        ms = 1 + sum(BLOCK_MS[block.kind] for stage in spec.stages for block in stage.blocks)
        return type("Prediction", (), {"ms": ms + sum(stage.width for stage in spec.stages) / 1e4, "error_ms": 0.05})()


class Ledger:
    """A judge who knows what every block is worth: points lost without it, and with its attention gone."""

    def __init__(self, worth, attention=1.0, channel=0.05, dies_at=None):
        self.worth, self.attention, self.channel, self.dies_at = worth, attention, channel, dies_at
        self.scored, self.stands_at = 0, []

    def accuracy(self, candidate):
        self.scored += 1
        if self.scored == self.dies_at:
            raise KeyboardInterrupt
        lost = self.channel * sum(stage.width - width for stage, width in zip(V1.stages, candidate.widths, strict=True))
        for stage, row in enumerate(candidate.kinds):
            for position, kind in enumerate(row):
                lost += self.worth[stage][position] if kind == IDENTITY else 0
                lost += self.attention if kind == "mb4d" and V1.stages[stage].blocks[position].kind == "mb3d" else 0
        return 90 - lost - 1e-3 * len(self.stands_at)  # what was cut before matters, as after a recovery

    def take(self, candidate):
        self.follow(candidate)
        return self.accuracy(candidate)

    def follow(self, candidate):
        self.stands_at.append(candidate.key)


WORTH = ((5.0, 0.2), (9.0,), (9.0, 9.0, 0.5), (9.0, 9.0))


def search(path, judge, importances=EVEN, breadth=100, device=None, identity="x"):
    return Search(SPACE, importances, device or Blocks(), judge, PathFile(path, SPACE, identity), breadth)


def test_the_cheapest_cut_per_millisecond_is_taken_first(tmp_path):
    """0.5 points for 0.3 ms is less than 0.2 for 0.1; attention (1 point for 0.2 ms) comes after both."""
    steps = search(tmp_path / "path.json", Ledger(WORTH, channel=99)).run(1.8)
    assert [step.what for step in steps] == [
        "start", "block 3 of stage 3 removed", "block 2 of stage 1 removed", "block 2 of stage 3 loses its attention",
        "block 1 of stage 4 loses its attention", "block 2 of stage 4 loses its attention",
    ]  # fmt: skip
    first = steps[1].considered[0]
    assert first.saved_ms == pytest.approx(0.3)
    assert first.lost == pytest.approx(0.5, abs=0.01)
    ratios = [max(0, cut.lost) / cut.saved_ms for cut in steps[1].considered]
    assert ratios == sorted(ratios)
    assert steps[-1].predicted_ms <= 1.8 < steps[-2].predicted_ms


def test_of_cuts_that_lose_nothing_the_largest_is_taken(tmp_path):
    steps = search(tmp_path / "path.json", Ledger(((0,) * 2, (0,), (0,) * 3, (0,) * 2), attention=0)).run(2.0)
    assert steps[1].considered[0].saved_ms == pytest.approx(0.3)


def test_the_last_cut_is_the_one_that_leaves_most(tmp_path):
    """Blocks of stage 1 go at 0.2 points for 0.1 ms, one of stage 3 at 0.5 for 0.3: 0.05 ms too much need no 0.3."""
    steps = search(tmp_path / "path.json", Ledger(WORTH, channel=99)).run(2.55)
    high = steps[0].predicted_ms
    assert high - 0.1 < 2.55 < high, "one cut of any kind is enough"
    assert steps[1].what == "block 2 of stage 1 removed"
    taken, *others = steps[1].considered
    assert taken.top1 == max(cut.top1 for cut in steps[1].considered)
    assert others[0].what == "block 3 of stage 3 removed", "the most accuracy per millisecond"
    further = search(tmp_path / "path.json", Ledger(WORTH, channel=99)).run(1.8)
    assert further[:2] == steps
    assert further[2].what == "block 3 of stage 3 removed"


def test_importance_decides_what_is_scored(tmp_path):
    """With the paper's one cut of a kind, a search that thinks the wrong block least important never sees the right."""
    right = Importances(((5.0, 0.2), (9.0,), (9.0, 9.0, 0.5), (9.0, 9.0)))
    wrong = right.shuffled(3)
    ends = {}
    for name, importances in (("right", right), ("wrong", wrong)):
        ledger = Ledger(WORTH, attention=20, channel=99)
        ends[name] = search(tmp_path / name, ledger, importances, breadth=1).run(2.0)[-1]
    assert ends["right"].top1 > ends["wrong"].top1 + 1
    assert ends["right"].candidate != ends["wrong"].candidate


def test_cuts_that_save_nothing_are_left_out(tmp_path):
    class Odd(Blocks):
        """A device that is no quicker without the block of stage 2."""

        def predict(self, spec):
            found = super().predict(spec)
            found.ms += 0.1 * (len(spec.stages[1].blocks) == 0)
            return found

    judge = Ledger(WORTH)
    steps = search(tmp_path / "path.json", judge, device=Odd()).run(1.5)
    cuts = [cut for step in steps for cut in step.considered]
    assert all(cut.saved_ms > 0 for cut in cuts)
    assert not [cut for cut in cuts if (cut.action.kind, cut.action.stage) == ("depth", 1)]


def test_the_same_search_takes_the_same_path(tmp_path):
    paths = [search(tmp_path / name, Ledger(WORTH)).run(1.5) for name in "ab"]
    assert paths[0] == paths[1]
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


@pytest.mark.parametrize("dies_at", [1, 2, 5, 17, 40, 61])
def test_a_search_that_was_killed_ends_with_the_same_path(tmp_path, dies_at):
    whole = search(tmp_path / "whole", Ledger(WORTH)).run(1.5)
    killed = Ledger(WORTH, dies_at=dies_at)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "killed", killed).run(1.5)
    again = Ledger(WORTH)
    assert search(tmp_path / "killed", again).run(1.5) == whole
    assert (tmp_path / "killed").read_text() == (tmp_path / "whole").read_text()
    assert again.stands_at == [step.candidate.key for step in whole]
    assert not list(tmp_path.glob(".*"))


def test_several_targets_lie_on_one_path(tmp_path):
    judge = Ledger(WORTH)
    one = search(tmp_path / "path.json", judge)
    first, further = one.run(2.0), one.run(1.5)
    assert further[: len(first)] == first
    assert judge.stands_at == [step.candidate.key for step in further]
    assert first_within(further, 2.0) == first[-1]
    assert first_within(further, 0.1) is None
    scored = judge.scored
    assert one.run(2.0) == further
    assert judge.scored == scored


@pytest.mark.parametrize("target", [0.9, 0.0001, 2.7, 99.0])
def test_an_unreachable_target_is_refused_with_the_range(tmp_path, target):
    judge = Ledger(WORTH)
    low, high = reachable(SPACE, Blocks())
    with pytest.raises(UsageError, match="cannot be reached") as refused:
        search(tmp_path / "path.json", judge).run(target)
    first, last = (float(number) for number in re.findall(r"(\d+\.\d{4}) ms", refused.value.expected))
    assert low <= first < low + 2e-4, "what is named can be asked for"
    assert high - 2e-4 < last <= high
    check_targets(SPACE, Blocks(), [first])
    assert judge.scored == 0
    assert not (tmp_path / "path.json").exists()


def test_the_smallest_network_can_be_reached(tmp_path):
    low, _ = reachable(SPACE, Macs())
    steps = search(tmp_path / "path.json", Ledger(WORTH), device=Macs(), breadth=1).run(low)
    assert steps[-1].candidate.spec == SPACE.smallest.spec


def test_a_path_of_another_search_is_refused(tmp_path):
    search(tmp_path / "path.json", Ledger(WORTH)).run(2.0)
    with pytest.raises(UsageError, match="another search"):
        search(tmp_path / "path.json", Ledger(WORTH), identity="y").run(2.0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data["steps"].pop(0),
        lambda data: data["steps"][1].update(top1="much"),
        lambda data: data["steps"][1]["candidate"].update(widths=[1, 2, 3, 4]),
        lambda data: data["steps"][1]["considered"][0]["action"].update(kind="magic"),
        lambda data: data.update(steps=3),
        lambda data: data["steps"][0].update(predicted_ms=0),
        *(lambda data, what=what: data["steps"][1].update(what=what) for what in ("\ud800", None, 5, ["a"])),
        lambda data: data["steps"][1]["considered"][0].update(what=None),
        lambda data: data["steps"][1]["considered"][0].update(lost="much"),
    ],
)
def test_a_damaged_path_is_refused(tmp_path, spoil):
    path = tmp_path / "path.json"
    search(path, Ledger(WORTH)).run(2.0)
    data = json.loads(path.read_text())
    spoil(data)
    path.write_text(json.dumps(data))
    with pytest.raises((SpecError, UsageError)):
        search(path, Ledger(WORTH)).run(2.0)


def test_a_folder_in_the_place_of_a_path_is_refused(tmp_path):
    (tmp_path / "path.json").mkdir()
    with pytest.raises(UsageError, match=r"Cannot read .*path\.json"):
        search(tmp_path / "path.json", Ledger(WORTH)).run(2.0)


def test_steps_come_back_from_json(tmp_path):
    steps = search(tmp_path / "path.json", Ledger(WORTH)).run(2.0)
    assert [step_from_dict(SPACE, json.loads(json.dumps(step.to_dict()))) for step in steps] == steps


@pytest.mark.parametrize(
    ("text", "ms"), [("2.0ms", 2.0), ("2", 2.0), ("1.5 ms", 1.5), ("800us", 0.8), (".5", 0.5), ("0.01s", 10.0)]
)
def test_latencies_are_read(text, ms):
    assert milliseconds(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["", "fast", "-1ms", "0", "2 min", "nan", "1e3"])
def test_what_is_no_latency_is_refused(text):
    with pytest.raises(UsageError, match="Illegal latency"):
        milliseconds(text)


def test_settings_reach_the_part_they_name():
    settings = ["seed=3", "final.lr=0.5", "supernet.epochs=4", "search.breadth=3", "search.importances=shuffled"]
    supernet, final, options = apply_settings(Recipe(), Recipe(), Options(), settings)
    assert (supernet.seed, final.seed, supernet.epochs, final.epochs) == (3, 3, 4, Recipe().epochs)
    assert (supernet.lr, final.lr) == (Recipe().lr, 0.5)
    assert options == Options(breadth=3, importances="shuffled")
    assert Options().breadth == 1, "as in the paper"


@pytest.mark.parametrize(
    "setting", ["finale.lr=1", "final.model=efficientformer_l1", "final.input_size=64", "search.size_weight=1",
                "search.recover_lr=1" + 400 * "0", "search.breadths=1", "search.breadth=0",
                "search.importances=none", "search.breadth", "search.width_step=0", "lr=1" + 400 * "0", "learning=1"],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(setting):
    with pytest.raises(SpecError):
        apply_settings(Recipe(), Recipe(), Options(), [setting])


def test_an_objective_takes_its_own_options_only():
    apply_settings(Recipe(), Recipe(), Options(), ["search.objective=mes", "search.size_weight=1"])
    for wrong in ("search.breadth=3", "search.latency_weight=0"):
        settings = ["search.objective=mes", "search.size_weight=0", wrong]
        with pytest.raises(SpecError):
            apply_settings(Recipe(), Recipe(), Options(), settings)


def test_what_the_search_finds_is_no_matter_of_the_final_recipe():
    supernet, final, _ = apply_settings(Recipe(), Recipe(), Options(), ["input_size=64"])
    assert (supernet.input_size, final.input_size) == (64, 0)


@pytest.mark.parametrize(
    ("supernet", "final", "options"),
    [
        ({"val_fraction": 0.3}, {}, {}),
        ({"norm": "frozen"}, {}, {"objective": "mes"}),
        ({"grad_checkpointing": True}, {}, {"objective": "mes"}),
        ({"freeze": ("stem",)}, {}, {"objective": "mes"}),
        ({}, {}, {"objective": "mes", "breadth": 3}),
    ],
)
def test_a_plan_that_would_not_do_what_it_says_is_refused(supernet, final, options):
    def plan(options):
        return Plan("data", (1.0,), Recipe(**supernet), Recipe(**final), options=Options(**options))

    with pytest.raises(SpecError):
        plan(options).check()
    if options:
        plan({}).check()


def test_epochs_of_the_supernet_leave_a_recipes_final_training_alone(tmp_path):
    (tmp_path / "spec.json").write_text(V1.to_json())
    recipe = Recipe(epochs=30, refine_epochs=5, spec=small_start().to_dict(), pretrained=False)
    plan = make_plan("data", [1.0], model=str(tmp_path / "spec.json"), recipe=recipe, epochs=2)
    assert (plan.supernet.epochs, plan.supernet.refine_epochs, plan.supernet.arch) == (2, 2, V1)
    assert (plan.final.epochs, plan.final.refine_epochs, plan.final.spec) == (30, 5, None)
    assert make_plan("data", [1.0], model="efficientformer_l1", recipe=recipe).supernet.spec is None


def test_a_start_that_is_quick_enough_may_be_too_large(tmp_path):
    largest = count(SPACE.largest.spec).params
    steps = dataclasses.replace(search(tmp_path / "path.json", Ledger(WORTH)), max_params=largest - 1).run(99.0)
    assert len(steps) > 1
    with pytest.raises(UsageError, match="cannot be reached"):
        check_targets(SPACE, Blocks(), [99.0], largest)


def test_a_plan_comes_back_from_its_folder(tmp_path):
    recipe = Recipe(spec=small_start().to_dict(), pretrained=False)
    plan = Plan("data", (1.0, 2.0, 1.0), recipe, Recipe(), "onnxruntime", "fp32", 1, Options(breadth=3))
    plan.save(tmp_path / "run")
    again = Plan.load(tmp_path / "run")
    again.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "slim.json").read_text() == (tmp_path / "run" / "slim.json").read_text()
    assert (again.targets, again.options, again.supernet.arch) == ((2.0, 1.0), plan.options, small_start())
    assert plan.with_targets([3.0]).targets == (3.0, 2.0, 1.0)
    (tmp_path / "run" / "slim.json").write_text('{"data": 1}')
    with pytest.raises(SpecError):
        Plan.load(tmp_path / "run")
    with pytest.raises(UsageError, match="holds no slimming run"):
        Plan.load(tmp_path)


def test_a_start_network_may_be_a_spec(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(V1.to_json())
    recipe = with_start(Recipe(), str(path))
    assert recipe.arch == V1
    assert not recipe.pretrained
    path.write_text("{}")
    with pytest.raises(SpecError, match=r"spec\.json"):
        with_start(Recipe(), str(path))
    for missing in ("none.json", "none.safetensors"):
        with pytest.raises(UsageError, match="none"):
            with_start(Recipe(), str(tmp_path / missing))
