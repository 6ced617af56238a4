"""Slimming as a user meets it: one command to a network within a budget, gone on with after a kill at any stage."""

import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from efficientformer.cli.app import app
from efficientformer.data.sources import open_splits
from efficientformer.latency.design import TableSpace, all_parts
from efficientformer.latency.table import HERE, Cost, LatencyTable
from efficientformer.slimming import device, judge, judging, run
from efficientformer.slimming.device import Measured
from efficientformer.slimming.importance import Importances
from efficientformer.slimming.plan import Options, Plan
from efficientformer.slimming.search import Step
from efficientformer.slimming.space import Space
from efficientformer.slimming.subject import SupernetSubject
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.count import count
from efficientformer.spec.errors import DataError, TrainingError, UsageError
from efficientformer.spec.variants import v1_spec
from efficientformer.training import loop
from efficientformer.training.lock import alone_in
from efficientformer.training.recipe import Recipe, load_recipe
from efficientformer.weights.checkpoint import load_checkpoint
from tests.pictures import write_folders

START = v1_spec((16, 16, 32, 32), (1, 1, 1, 1), 1, input_size=16, num_classes=3, distilled=False, stem_stride=1)
SETTINGS = ("batch_size=8", "workers=1", "opt=adamw", "opt_args={}", "lr=0.003", "precision=fp32",
            "search.width_step=8", "search.min_width=8", "search.recover_steps=1", "search.held_out=9",
            "search.calibration=16")  # fmt: skip
BUDGET = 0.6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures, a start network, and the latency table of a device that is not here."""
    root = tmp_path_factory.mktemp("slim")
    write_folders(root / "data", per_class=20)
    (root / "start.json").write_text(START.to_json())
    space = TableSpace("v1", (8, 16, 24, 32), (1, 1, 1, 1), (4.0,), ((16, 16),), (1,), num_classes=3)
    by_kind = {"mb3d": 12e-3, "mb4d": 4e-3, "first mb3d": 0.0, "first mb4d": 0.0}  # ms a channel
    costs = {
        part.key: Cost(part.width * by_kind[part.kind] if part.kind in by_kind else 1e-2, 1e-3)
        for part in all_parts(space)
    }
    LatencyTable(
        "onnxruntime", "fp32", 1, "v1", START.attention, Cost(0.2, 1e-3), costs, weights={}, spread=0.01, networks=9
    ).save(root / "phone.json")
    whole = json.loads((root / "phone.json").read_text())
    del whole["costs"]["embedding conv 8-24 at 4x4"]
    (root / "hole.json").write_text(json.dumps(whole))
    return root


def command(place, *more):
    fixed = ("slim", "--data", place / "data", "--table", place / "phone.json", "--model", place / "start.json",
             "--epochs", 1, "--final-epochs", 1)  # fmt: skip
    return [*fixed, *(word for setting in SETTINGS for word in ("--set", setting)), *more]


@pytest.fixture(scope="module")
def finished(place):
    """A run to its end, and what the command printed."""
    line = command(place, "--target-latency", f"{BUDGET}ms", "--output", place / "whole", "--quiet")
    return place / "whole", in_process(line)


def in_process(line):
    """Run the command line here, and return what it printed."""
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, [str(word) for word in line], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def weights(folder):
    return load_file(folder / f"slimmed-{BUDGET:g}ms.safetensors")


def test_one_command_to_a_network_within_the_budget(place, finished):
    folder, out = finished
    file = folder / "slimmed-0.6ms.safetensors"
    assert out.strip() == str(file)
    names = {"slim.json", "table.json", "supernet", "importances.json", "search", "targets", "slim.log", file.name,
             "path.csv", "path.json", "accuracy_latency.png", "report.html"}  # fmt: skip
    assert {path.name for path in folder.iterdir()} == names
    table = LatencyTable.load(place / "phone.json")
    manifest = load_checkpoint(file).manifest
    predicted = table.predict(manifest.spec).ms
    assert predicted <= BUDGET < table.predict(START).ms
    assert manifest.metrics["predicted_ms"] == pytest.approx(predicted, abs=1e-6)
    assert manifest.provenance["target_latency"] == "0.6 ms"
    assert manifest.provenance["engine"] == "onnxruntime fp32"
    assert manifest.labels == ("blue", "green", "red")
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") == 2
    assert "not on this machine" in page
    assert f"from elsewhere: {table.device}" in page
    assert "Cuts that lose nothing count alike; of these the one that saves most is taken" in page
    assert "the most accurate of the cuts that meet it" in page
    assert json.loads((folder / "path.json").read_text())[0]["measured_ms"] is None


def test_the_result_is_a_model_like_any_other(place, finished, cli):
    file = finished[0] / "slimmed-0.6ms.safetensors"
    code, out, _ = cli("test", file, "--data", place / "data", "--json", "--engine", "torch")
    assert code == 0
    assert json.loads(out)["images"] == 60
    assert "trained on" in json.loads(out)["notes"][0], "all 60 are measured, and it learned from 48"
    sliced = finished[0] / "targets" / "0.6ms" / "sliced-0.6ms.safetensors"
    assert load_checkpoint(sliced).spec == load_checkpoint(file).spec
    code, out, _ = cli("predict", place / "data" / "red" / "000.png", "--model", file, "--format", "json")
    assert code == 0
    assert json.loads(out)["pred_class"] in ("blue", "green", "red")


def test_the_path_says_every_step(finished):
    folder = finished[0]
    steps = json.loads((folder / "path.json").read_text())
    rows = list(csv.DictReader((folder / "path.csv").open()))
    assert [row["cut"] for row in rows] == [step["cut"] for step in steps]
    assert rows[0]["cut"] == "start"
    assert len(rows) > 2
    latencies = [float(row["predicted_ms"]) for row in rows]
    assert latencies == sorted(latencies, reverse=True)
    assert latencies[-1] <= BUDGET < latencies[-2]
    assert ArchSpec.from_dict(steps[0]["spec"]) == START
    assert all(0 <= float(row["top1"]) <= 100 for row in rows)


def test_the_search_never_sees_the_pictures_it_is_measured_on(finished):
    folder = finished[0]
    supernet = json.loads((folder / "supernet" / "data.json").read_text())
    final = json.loads((folder / "targets" / "0.6ms" / "train" / "data.json").read_text())
    assert (supernet["train"], supernet["val"]) == (39, 9)  # of the 48 the final network learns from
    assert (final["train"], final["val"]) == (48, 12)


def test_a_seed_of_its_own_for_the_final_training_opens_no_leak(place):
    recipe, final = Recipe(seed=0), Recipe(seed=5)
    plan = Plan(str(place / "data"), (BUDGET,), recipe, final, options=Options(held_out=9))
    subject = run._SlimRun(place, plan, Space(START), LatencyTable.load(place / "phone.json"), True)._subject()
    seen = subject.splits(recipe, place / "data")
    judged = open_splits(place / "data", val_fraction=final.val_fraction, seed=final.seed).val
    names = {source.name(index) for source in (seen.train, seen.val) for index in range(len(source))}
    assert len(names) == 48
    assert names.isdisjoint(judged.name(index) for index in range(len(judged)))


class Killed(BaseException):
    """Ends a run where it stands, as a kill does: nothing catches it."""


def before_the_search(finished, folder):
    """Copy a finished run as it was when its search had not begun."""
    ours = ("search", "targets", "tensorboard", "path.*", "slimmed-*", "*.png", "report.html")
    return shutil.copytree(finished, folder, ignore=shutil.ignore_patterns(*ours))


@pytest.mark.parametrize(
    ("begun", "stages"),
    [
        pytest.param(
            False,
            [
                (run, "check_targets", 1),  # the table is there
                (loop.Run, "_step", 3),
                (loop.Run, "_save", 1),  # of the supernet
                (judge.PoolJudge, "accuracy", 5),
            ],
            id="up to the search",
        ),
        pytest.param(
            True,
            [
                (judging.Bench, "save", 1),  # a network is chosen
                (loop.Run, "_step", 3),
                (run._SlimRun, "_deliver", 1),
            ],
            id="after the search",  # a death here has the choice made anew, which would hide what one above does to it
        ),
    ],
)
@pytest.mark.usefixtures("no_training_report")
def test_a_run_that_dies_at_every_stage_ends_with_the_same_network(
    place, finished, tmp_path, monkeypatch, begun, stages
):
    folder, resume = tmp_path / "run", ["slim", "--resume", tmp_path / "run", "--quiet"]
    if begun:
        before_the_search(finished[0], folder)
    line = resume if begun else command(place, "--target-latency", f"{BUDGET}ms", "--output", folder, "--quiet")
    for owner, name, call in stages:
        original, calls = getattr(owner, name), []

        def deadly(*arguments, _original=original, _calls=calls, _last=call, **options):
            _calls.append(1)
            if len(_calls) == _last:
                raise Killed
            return _original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, deadly)
            with pytest.raises(Killed):
                in_process(line)
        assert not (folder / "report.html").exists()
        line = resume
    in_process(line)
    assert_same(folder, finished[0])


@pytest.mark.usefixtures("no_training_report")
def test_a_killed_process_ends_with_the_same_network(finished, tmp_path):
    """SIGKILL once the search has begun."""
    folder = before_the_search(finished[0], tmp_path / "run")
    line = [sys.executable, "-m", "efficientformer", "slim", "--resume", str(folder), "--quiet"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE)
    while not (folder / "search" / "path.json").exists():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "report.html").exists()
    in_process(["slim", "--resume", folder, "--quiet"])
    assert_same(folder, finished[0])


def test_a_supernet_of_other_pictures_is_refused(place, finished, tmp_path):
    """As of a run begun when differing seeds still divided the pictures differently."""
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy, ignore=shutil.ignore_patterns("tensorboard", "targets", "search"))
    plan = json.loads((copy / "slim.json").read_text())
    plan["final"]["seed"] = 5
    (copy / "slim.json").write_text(json.dumps(plan))
    with pytest.raises(UsageError, match="other pictures"):
        run.slim(resume=copy)


@pytest.mark.usefixtures("no_training_report")
def test_a_resumed_run_takes_another_number_of_workers_and_nothing_else(finished, tmp_path, cli):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy, ignore=shutil.ignore_patterns("tensorboard", "result.json", "slimmed-*"))
    for settings in (["supernet.workers=2"], ["workers=2", "lr=1"]):
        line = ["slim", "--resume", copy, *(word for each in settings for word in ("--set", each))]
        assert "keeps its plan" in cli(*line)[2]
    code, _, said = cli("slim", "--resume", copy, "--set", "workers=2", "--quiet")
    assert code == 0, said
    plan = Plan.load(copy)
    trained = [load_recipe(file.parent) for file in copy.glob("targets/*/train/recipe.json")]
    assert trained
    assert {recipe.workers for recipe in (plan.supernet, plan.final, *trained)} == {2}
    assert_same(copy, finished[0])
    with pytest.raises(UsageError, match="resume, and perhaps targets, data and workers"):
        run.slim(plan, tmp_path / "new", workers=2)


def test_a_resumed_run_keeps_to_its_pictures(finished, tmp_path):
    """Also where only a final training is left to do, and without a word of it in the plan."""
    copy, other = tmp_path / "run", write_folders(tmp_path / "other", per_class=21)
    ours = ("tensorboard", "train", "result.json", "slimmed-*")
    shutil.copytree(finished[0], copy, ignore=shutil.ignore_patterns(*ours))
    plan = (copy / "slim.json").read_text()
    for data, says in ((other, "other pictures"), (tmp_path / "typo", "typo")):
        with pytest.raises((UsageError, DataError), match=says):
            run.slim(resume=copy, data=data)
        assert (copy / "slim.json").read_text() == plan
    (copy / "slim.json").write_text(plan.replace(str(finished[0].parent / "data"), str(other)))
    with pytest.raises(UsageError, match="other pictures"):
        run.slim(resume=copy)


def test_statistics_are_estimated_on_pictures_in_random_order(finished):
    plan = Plan.load(finished[0])
    subject = SupernetSubject(plan.options, plan.supernet.seed, plan.final)
    bench = judging.Bench.open(finished[0], plan, plan.options.space(plan.start), subject)
    labels = bench.calibration.labels.tolist()
    assert len(labels) == 16
    assert labels != sorted(labels)


def test_a_search_reads_with_the_workers_of_the_plan(finished):
    plan = Plan.load(finished[0])
    plan = dataclasses.replace(plan, supernet=plan.supernet.with_changes(workers=3))
    subject = SupernetSubject(plan.options, plan.supernet.seed, plan.final)
    bench = judging.Bench.open(finished[0], plan, plan.options.space(plan.start), subject)
    assert bench.prepared.recipe.workers == 3


@pytest.mark.usefixtures("no_training_report")
def test_a_frozen_part_the_search_has_cut_away_is_no_obstacle(place, tmp_path):
    line = command(place, "--target-latency", "0.35ms", "--set", 'freeze=["stages.0.blocks.0", "stem"]', "--quiet")
    in_process([*line, "--output", tmp_path / "run"])
    spec = load_checkpoint(tmp_path / "run" / "slimmed-0.35ms.safetensors").spec
    assert not spec.stages[0].blocks


def test_sigterm_in_the_search_says_how_to_go_on(finished, tmp_path, cli, monkeypatch):
    """The handler is called as the signal would."""
    folder, original = before_the_search(finished[0], tmp_path / "run"), judge.PoolJudge.accuracy

    def ended(*arguments):
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
        return original(*arguments)

    monkeypatch.setattr(judge.PoolJudge, "accuracy", ended)
    monkeypatch.setattr("efficientformer.cli.app._leave_at_once", lambda: None)  # this process has tests to do
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM as it comes would end the process"))
    try:
        code, _, said = cli("slim", "--resume", folder, "--quiet")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 130, said
    assert f"slim --resume {folder}" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("search/measured.json", '{"0": {"ms": 1}}'),
        ("search/measured.json", '{"x": [1, 1]}'),
        ("search/measured.json", '{"0": {"ms": "long", "quiet_ms": 1}}'),
        (f"targets/{BUDGET:g}ms/choice.json", '{"step": 999, "predicted_ms": 1}'),
        (f"targets/{BUDGET:g}ms/choice.json", '{"step": 1, "predicted_ms": 99}'),  # as of another path
        (f"targets/{BUDGET:g}ms/choice.json", "[]"),
        (f"targets/{BUDGET:g}ms/result.json", '{"top1": null, "measured_ms": null, "quiet_ms": null}'),
        ("search/path.json", "{}"),
    ],
)
def test_damaged_files_of_a_run_are_refused(place, finished, tmp_path, cli, file, text):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy, ignore=shutil.ignore_patterns("tensorboard"))
    (copy / file).write_text(text)
    code, _, err = cli("slim", "--resume", copy)
    assert code == 2, err
    assert file.rsplit("/", 1)[1] in err


def test_a_table_that_is_gone_is_not_measured_here_instead(finished, tmp_path, monkeypatch):
    """The run rests on another device's; and once it has begun, on its own."""
    monkeypatch.setattr(device, "measure_table", lambda *_, **__: pytest.fail("measured"))
    copy = shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard"))
    (copy / "table.json").unlink()
    for kept in ("supernet", "importances.json"):  # a folder that a person removes to have it trained anew
        with pytest.raises(UsageError, match=r"table\.json is gone, .*Put it back, or start a new run"):
            run.slim(resume=copy)
        shutil.rmtree(copy / kept, ignore_errors=True)
    assert not (copy / "table.json").exists()


@pytest.mark.usefixtures("no_training_report")
def test_a_delivered_file_that_was_overwritten_is_written_again(finished, tmp_path, cli):
    copy = shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard"))
    (copy / f"slimmed-{BUDGET:g}ms.safetensors").write_bytes(b"xx")
    code, _, err = cli("slim", "--resume", copy, "--quiet")
    assert code == 0, err
    assert_same(copy, finished[0])


def assert_same(folder, other):
    expected, found = weights(other), weights(folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (folder / "path.csv").read_text() == (other / "path.csv").read_text()


@pytest.mark.usefixtures("no_training_report")
def test_a_second_target_comes_from_the_same_search(place, finished, cli):
    folder = finished[0]
    before = json.loads((folder / "search" / "path.json").read_text())["steps"]
    kept = weights(folder)
    code, out, err = cli("slim", "--resume", folder, "--target-latency", "0.4ms", "--target-latency", "0.8", "--quiet")
    assert code == 0, err
    assert [line.rpartition("-")[2] for line in out.split()] == ["0.8ms.safetensors", "0.6ms.safetensors",
                                                                 "0.4ms.safetensors"]  # fmt: skip
    after = json.loads((folder / "search" / "path.json").read_text())["steps"]
    assert after[: len(before)] == before
    assert len(after) > len(before)
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights(folder).items())
    table = LatencyTable.load(place / "phone.json")
    for target in (0.4, 0.8):
        assert table.predict(load_checkpoint(folder / f"slimmed-{target:g}ms.safetensors").spec).ms <= target
    assert (folder / "report.html").read_text().count("0.4") > 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--target-latency", "0.01ms"), "cannot be reached"),
        (("--target-latency", "9ms"), "to below"),
        (("--target-latency", "soon"), "Illegal latency"),
        ((), "No target"),
        (("--target-latency", "0.6", "--engine", "openvino"), "of another engine"),
        (("--target-latency", "0.6", "--threads", "2"), "another number of threads"),
        (("--target-latency", "0.6", "--set", "search.max_params=9"), "at most 9 parameters"),
        (("--target-latency", "0.6", "--set", "search.depth=3"), "Unknown field 'depth'"),
        (("--target-latency", "0.6", "--set", "search.min_expansion=2"), "means nothing for V1"),
        (("--target-latency", "0.6", "--set", "teacher=supernet"), "cannot teach itself"),
        (("--target-latency", "0.6", "--set", "supernet.model=x"), "Say --model"),
        (("--target-latency", "0.6", "--set", "spec=null"), "Say --model"),
        (("--target-latency", "0.6", "--set", "final.input_size=32"), "supernet.input_size"),
        (("--target-latency", "0.6", "--set", "views=2", "--set", "teacher=x", "--set", "teacher_cache=y"), "for each"),
        (("--target-latency", "0.6", "--set", "final.randaugment=much"), "final: Illegal randaugment"),
        (("--target-latency", "0.6", "--set", "final.freeze=steem"), "freeze='steem' matches nothing"),
        (("--target-latency", "0.6", "--model", "none.json"), "Cannot read the spec"),
        (("--target-latency", "0.6", "--table", "{place}/hole.json"), "no 'embedding conv 8-24 at 4x4'"),
        (("--target-latency", "0.6", "--set", "search.width_step=4", "--set", "search.min_width=4"), "parts of the"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(place, cli, tmp_path, more, says):
    code, _, err = cli(*command(place, *(word.format(place=place) for word in more)), "--output", tmp_path / "run")
    assert code == 2
    assert says in err
    assert not list((tmp_path / "run").iterdir() if (tmp_path / "run").exists() else ()), "a refused table is kept"


def test_torchrun_is_refused(place, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = cli(*command(place, "--target-latency", "0.6"), "--output", tmp_path / "run")
    assert code == 2
    assert "torchrun" in err


def test_folders_are_not_mixed_up(place, finished, cli, tmp_path):
    line = command(place, "--target-latency", "0.6")
    code, _, err = cli(*line, "--output", finished[0])
    assert code == 2
    assert "holds a run already" in err
    (tmp_path / "mine.txt").write_text("")
    (tmp_path / ".slim.json.0123abcd.partial").write_text("")  # of a run that was killed
    said = cli(*line, "--output", tmp_path)[2]
    assert "is not empty; found mine.txt" in " ".join(said.split())
    assert "no slimming run" in cli("slim", "--resume", tmp_path)[2]
    assert "keeps its plan" in cli("slim", "--resume", finished[0], "--epochs", 3)[2]
    assert "Nothing to train on" in cli("slim", "--target-latency", "1")[2]


def test_a_table_that_was_measured_before_is_used_and_said(place, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(run._SlimRun, "go", lambda self: run.SlimOutcome(self.folder, True, ()))
    line = [word for word in command(place, "--target-latency", "0.6") if word not in ("--table", place / "phone.json")]
    (tmp_path / "run").mkdir()
    shutil.copy(place / "phone.json", tmp_path / "run" / "table.json")
    code, _, err = cli(*command(place, "--target-latency", "0.6"), "--output", tmp_path / "run")
    assert (code, "is not empty" in err) == (2, True)  # which of the two tables?
    code, _, err = cli(*line, "--output", tmp_path / "run")
    assert code == 0, err
    assert "one found in" in err
    assert "from elsewhere" in err


def test_a_table_of_a_refused_run_is_used_by_one_that_asks_for_the_same(place, tmp_path, monkeypatch):
    measured = []

    def measure(*_, **__):
        measured.append(1)
        return LatencyTable.load(place / "phone.json")

    monkeypatch.setattr(device, "measure_table", measure)
    monkeypatch.setattr(run._SlimRun, "go", lambda self: run.SlimOutcome(self.folder, True, ()))
    plan, folder = planned(place, tmp_path / "run")

    def refused(plan):
        with pytest.raises(UsageError, match="cannot be reached"):
            run.slim(dataclasses.replace(plan, targets=(0.01,)), folder)
        return len(measured)

    assert [refused(plan), refused(plan)] == [1, 1]
    assert refused(dataclasses.replace(plan, threads=1)) == 2, "made for as many as the engine chooses"
    wider = dataclasses.replace(plan, threads=1, options=dataclasses.replace(plan.options, width_step=4, min_width=4))
    with pytest.raises(UsageError, match="parts of the networks"):
        run.slim(wider, folder)
    assert len(measured) == 3, "it lacked what this search needs"
    assert run.slim(dataclasses.replace(plan, threads=1), folder).finished
    assert len(measured) == 3


def test_a_table_that_was_not_taken_is_not_taken_by_a_resumed_run_either(place, tmp_path, monkeypatch):
    def measure(plan, *_, **__):
        if stopped:
            raise KeyboardInterrupt
        return dataclasses.replace(LatencyTable.load(place / "phone.json"), threads=plan.threads)

    stopped = False
    monkeypatch.setattr(device, "measure_table", measure)
    monkeypatch.setattr(run._SlimRun, "go", lambda self: run.SlimOutcome(self.folder, True, ()))
    plan, folder = planned(place, tmp_path / "run")
    with pytest.raises(UsageError, match="cannot be reached"):
        run.slim(dataclasses.replace(plan, targets=(0.01,), threads=1), folder)
    stopped = True
    with pytest.raises(KeyboardInterrupt):
        run.slim(plan, folder)
    stopped = False
    assert run.slim(resume=folder).finished
    assert LatencyTable.load(folder / "table.json").threads is None


def test_a_run_goes_on_without_the_file_that_it_started_from(place, tmp_path, monkeypatch):
    from efficientformer.slimming.start import make_plan
    from efficientformer.training.setup import build_network
    from efficientformer.weights.checkpoint import save_native

    recipe = Recipe(pretrained=False, spec=START.to_dict())
    network, manifest = build_network(recipe, ("a", "b", "c"), print)
    start = tmp_path / "start.safetensors"
    save_native(start, network.state_dict(), manifest)
    monkeypatch.setattr(run._SlimRun, "go", lambda self: run.SlimOutcome(self.folder, True, ()))
    settings = [*SETTINGS, "supernet.pretrained=false"]
    plan = make_plan(place / "data", [BUDGET], model=str(start), epochs=1, final_epochs=1, settings=settings)
    assert run.slim(plan, tmp_path / "run", table=place / "phone.json").finished
    assert build_network(plan.supernet, ("a", "b"), print)[0].spec.num_classes == 2, "of the file's kind, but new"
    start.unlink()
    assert run.slim(resume=tmp_path / "run").finished


def test_a_file_is_no_run_folder(place, cli, tmp_path):
    (tmp_path / "run").write_text("mine")
    code, _, err = cli(*command(place, "--target-latency", "0.6"), "--output", tmp_path / "run")
    assert (code, "is no folder for a run" in err) == (2, True)
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.usefixtures("no_training_report")
def test_a_missed_budget_is_an_error_and_is_measured_again(place, finished, cli, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    result = tmp_path / "run" / "targets" / "0.6ms" / "result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "measured_ms": 0.8, "quiet_ms": 0.7}))
    monkeypatch.setattr(device, "measured", lambda table, specs, start: [Measured(0.7, 0.65) for _ in specs])
    assert cli("slim", "--resume", tmp_path / "run", "--quiet")[0] == 1
    assert json.loads(result.read_text())["quiet_ms"] == 0.7, "its engine is not here: it cannot be measured again"
    monkeypatch.setattr(LatencyTable, "origin", HERE)
    shutil.rmtree(tmp_path / "run" / "targets" / "0.6ms" / "train")  # large, and of no use any more
    code, out, err = cli("slim", "--resume", tmp_path / "run", "--quiet")
    assert (code, str(tmp_path / "run" / "slimmed-0.6ms.safetensors") in out) == (1, True)
    assert "measured 0.700 ms, 0.650 at the table's speed; budget NOT held" in err
    monkeypatch.setattr(device, "measured", lambda table, specs, start: [Measured(0.9, 0.55) for _ in specs])
    assert cli("slim", "--resume", tmp_path / "run", "--quiet")[0] == 1, "so much is not taken as load"
    monkeypatch.setattr(device, "measured", lambda table, specs, start: [Measured(0.62, 0.55) for _ in specs])
    assert cli("slim", "--resume", tmp_path / "run", "--quiet")[0] == 0


@pytest.fixture(scope="module")
def shuffled(place):
    """A run whose supernet is trained: a search in random order is next, and a final training with a teacher."""
    plan, folder = planned(place, place / "shuffled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run._SlimRun, "_search", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run.slim(plan, folder, table=place / "phone.json")
    return folder


JOINT = ("search.objective=mes", "search.min_depth=1", "search.max_params=25000")


@pytest.mark.usefixtures("no_training_report")
def test_size_and_latency_are_searched_together(place, tmp_path, monkeypatch):
    """The elastic supernet, and a death in the middle of its search."""
    line = command(place, "--target-latency", "0.7ms", *(word for each in JOINT for word in ("--set", each)), "--quiet")
    in_process([*line, "--output", tmp_path / "whole"])
    spec = load_checkpoint(tmp_path / "whole" / "slimmed-0.7ms.safetensors").spec
    assert count(spec).params <= 25_000
    assert LatencyTable.load(place / "phone.json").predict(spec).ms <= 0.7
    assert all(stage.blocks for stage in spec.stages)
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "mobile efficiency score" in page
    assert "What the supernet learned" not in page
    original, calls = judge.PoolJudge.accuracy, []

    def deadly(self, candidate):
        calls.append(1)
        if len(calls) == 9:
            raise Killed
        return original(self, candidate)

    before_the_search(tmp_path / "whole", tmp_path / "run")
    monkeypatch.setattr(judge.PoolJudge, "accuracy", deadly)
    for _ in range(2):
        with pytest.raises(Killed) if not calls else contextlib.nullcontext():
            in_process(["slim", "--resume", tmp_path / "run", "--quiet"])
    found, expected = (load_file(tmp_path / each / "slimmed-0.7ms.safetensors") for each in ("run", "whole"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.usefixtures("no_training_report")
def test_a_network_that_takes_longer_than_predicted_is_cut_further(place, shuffled, monkeypatch, tmp_path):
    """The engine here takes a tenth longer than the table says; the budget must hold in what is measured."""
    table = LatencyTable.load(place / "phone.json")

    def slower(_, specs, start):
        return [Measured(1.1 * table.predict(spec).ms, 1.1 * table.predict(spec).ms) for spec in specs]

    monkeypatch.setattr(device, "measured", slower)
    before_the_search(shuffled, tmp_path / "run")
    network = run.slim(resume=tmp_path / "run").networks[0]
    assert network.holds
    assert network.step.predicted_ms <= BUDGET / 1.1
    rows = list(csv.DictReader((tmp_path / "run" / "path.csv").open()))
    assert all(float(row["measured_ms"]) > float(row["predicted_ms"]) for row in rows)
    monkeypatch.setattr(device, "measured", lambda _, specs, start: [Measured(9.0, 9.0) for _ in specs])
    steps = json.loads((tmp_path / "run" / "path.json").read_text())
    known = json.loads((tmp_path / "run" / run.MEASURED).read_text())
    digests = [hashlib.sha256(ArchSpec.from_dict(step["spec"]).to_json().encode()).hexdigest()[:16] for step in steps]
    assert set(known) == set(digests), "latencies belong to networks, whose numbers may change"
    before_the_search(tmp_path / "run", tmp_path / "other")
    with pytest.raises(TrainingError, match="measured within"):
        run.slim(resume=tmp_path / "other")
    monkeypatch.setattr(device, "measured", slower)  # the machine is no longer busy
    assert run.slim(resume=tmp_path / "other").networks[0].step == network.step
    monkeypatch.setattr(device, "measured", lambda _, specs, start: [Measured(9.0, 9.0) for _ in specs])
    with pytest.raises(TrainingError, match="measured within") as missed:
        run.slim(resume=tmp_path / "run", targets=[0.4])
    assert "--target-latency 0.4ms" in missed.value.hint
    assert [each.target_ms for each in run.slim(resume=tmp_path / "run").networks] == [BUDGET]


@pytest.mark.usefixtures("no_training_report")
def test_a_network_that_scarcely_holds_its_budget_is_cut_further(place, shuffled, monkeypatch, tmp_path):
    """Measured again after its training it may take longer than the budget."""
    table = LatencyTable.load(place / "phone.json")
    seen = []

    def measured(_, specs, start):
        times = [table.predict(spec).ms if seen else 0.995 * BUDGET for spec in specs]
        seen.extend(specs)
        return [Measured(ms, ms) for ms in times]

    monkeypatch.setattr(device, "measured", measured)
    before_the_search(shuffled, tmp_path / "run")
    network = run.slim(resume=tmp_path / "run").networks[0]
    assert table.predict(network.step.candidate.spec).ms < table.predict(seen[0]).ms <= BUDGET


@pytest.mark.usefixtures("no_training_report")
def test_a_folder_that_was_moved_in_the_final_training_goes_on(shuffled, monkeypatch, tmp_path):
    """Its teacher is a file of the folder."""
    before_the_search(shuffled, tmp_path / "run")
    original = run._SlimRun._deliver

    def killed(*_):
        raise Killed

    monkeypatch.setattr(run._SlimRun, "_deliver", killed)
    with pytest.raises(Killed):
        run.slim(resume=tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.setattr(run._SlimRun, "_deliver", original)
    damaged = shutil.copytree(tmp_path / "moved", tmp_path / "damaged") / "targets" / f"{BUDGET:g}ms" / "train"
    (damaged / "state.pt").write_bytes(b"PK")
    with pytest.raises(TrainingError, match=r"state\.pt cannot be resumed from"):
        run.slim(resume=tmp_path / "damaged")
    assert run.slim(resume=tmp_path / "moved").finished
    kept = json.loads((tmp_path / "moved" / "targets" / f"{BUDGET:g}ms" / "train" / "recipe.json").read_text())
    assert kept["teacher"] == str(tmp_path / "moved" / run.TEACHER)


def test_blocks_and_channels_are_shuffled_by_the_shuffle_seed(shuffled, monkeypatch, tmp_path):
    before_the_search(shuffled, tmp_path / "run")
    plan = Plan.load(tmp_path / "run")
    dataclasses.replace(plan, options=dataclasses.replace(plan.options, shuffle_seed=3)).save(tmp_path / "run")
    blocks, channels, original, by_chance = [], [], Importances.shuffled, judging.by_chance

    def killed(*_):
        raise Killed

    monkeypatch.setattr(Importances, "shuffled", lambda self, seed: blocks.append(seed) or original(self, seed))
    monkeypatch.setattr(judging, "by_chance", lambda seed: channels.append(seed) or by_chance(seed))
    monkeypatch.setattr(run._SlimRun, "_choose", killed)  # the search is set up by then
    with pytest.raises(Killed):
        run.slim(resume=tmp_path / "run")
    assert set(blocks) == set(channels) == {plan.supernet.seed + 3}


def test_the_path_is_measured_in_chunks_each_kept_once_it_is_known(place, monkeypatch, tmp_path):
    """Opened at once, the networks of a path may need more memory than there is, after days of training."""
    table, space, calls = LatencyTable.load(place / "phone.json"), Space(START, 1, 8), []
    slimming = run._SlimRun(tmp_path, planned(place, tmp_path)[0], space, table, True)
    steps = [Step(i, "width", space.largest.with_width(3, width), 1.0, 0.1, 90.0)
             for i, width in enumerate(space.widths(3))]  # fmt: skip

    def measured(_, specs, start):
        if len(calls) == 2:
            raise Killed
        calls.append(len(specs))
        return [Measured(float(spec.stages[3].width), 1.0) for spec in specs]

    monkeypatch.setattr(device, "measured", measured)
    with pytest.raises(Killed):
        slimming._measure(steps)
    assert calls == [run.TOGETHER] * 2
    assert len(run.read_latencies(tmp_path / run.MEASURED)) == 2 * run.TOGETHER
    calls.clear()
    assert [each.ms for each in slimming._measure(steps)] == list(map(float, space.widths(3)))
    assert sum(calls) == len(steps) - 2 * run.TOGETHER


def test_a_device_without_memory_for_the_search_says_what_to_do(place, monkeypatch, tmp_path):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run.Bench, "open", full)
    table = LatencyTable.load(place / "phone.json")
    slimming = run._SlimRun(tmp_path, planned(place, tmp_path)[0], Space(START), table, True)
    monkeypatch.setattr(slimming, "_train_supernet", lambda: True)
    with pytest.raises(TrainingError, match=f"not enough memory for the search; .*--resume {tmp_path}"):
        slimming.go()


def test_a_run_is_the_work_of_one_process_at_a_time(place, monkeypatch, tmp_path):
    """A second one would remove what the first has not saved yet."""
    pytest.importorskip("fcntl")
    folder, seen = tmp_path / "run", []

    def second(self):
        seen.append({path.name for path in folder.iterdir()})
        for again in ({"resume": folder}, {"plan": planned(place, folder)[0], "output": folder}):
            with pytest.raises(UsageError) as error:
                run.slim(**again)
            seen.append(str(error.value))
        return run.SlimOutcome(self.folder, True, ())

    monkeypatch.setattr(run._SlimRun, "go", second)
    run.slim(*planned(place, folder), table=place / "phone.json")
    assert seen[0] == {"slim.json", "table.json", "run.lock"}
    assert f"Another process is at work in {folder}; found process {os.getpid()} on " in seen[1]
    assert "holds a run already" in seen[2]
    monkeypatch.setattr(run._SlimRun, "go", lambda self: run.SlimOutcome(self.folder, True, ()))
    assert not (folder / "run.lock").exists()
    (folder / "run.lock").write_text("process 1 on a machine that lost its power")
    assert run.slim(resume=folder).finished
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with alone_in(folder), alone_in(folder):
        assert not (folder / "run.lock").exists()


def test_two_processes_that_begin_at_once_do_not_share_a_folder(place, monkeypatch, tmp_path):
    pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    with alone_in(tmp_path / "run"), pytest.raises(UsageError, match="Another process is at work"):
        run.slim(*planned(place, tmp_path / "run"), table=place / "phone.json")
    monkeypatch.setattr(run._SlimRun, "go", lambda self: run.SlimOutcome(self.folder, True, ()))
    assert run.slim(*planned(place, tmp_path / "run"), table=place / "phone.json").finished


@pytest.mark.parametrize(
    ("table", "target", "says"), [("phone", 0.01, "cannot be reached"), ("hole", BUDGET, "parts of the networks")]
)
def test_what_cannot_work_is_refused_in_a_resumed_run_and_leaves_its_folder_free(
    place, monkeypatch, tmp_path, table, target, says
):
    """Of a run that was killed while its table was measured."""

    def killed(*_, **__):
        raise Killed

    plan, folder = planned(place, tmp_path / "run")
    monkeypatch.setattr(device, "measure_table", killed)
    with pytest.raises(Killed):
        run.slim(dataclasses.replace(plan, targets=(target,)), folder)
    monkeypatch.setattr(device, "measure_table", lambda *_, **__: LatencyTable.load(place / f"{table}.json"))
    with pytest.raises(UsageError, match=says):
        run.slim(resume=folder)
    assert {path.name for path in folder.iterdir()} == {"table.json"}
    monkeypatch.setattr(run._SlimRun, "go", lambda self: run.SlimOutcome(self.folder, True, ()))
    if table == "phone":
        assert run.slim(plan, folder).finished
        with pytest.raises(UsageError, match="cannot be reached"):
            run.slim(resume=folder, targets=[0.01])
        assert run.slim(resume=folder).finished, "its own plan is no worse for that"


def planned(place, folder):
    from efficientformer.slimming.start import make_plan

    settings = [*SETTINGS, "final.teacher=supernet", "final.distillation=soft", "search.importances=shuffled"]
    model = str(place / "start.json")
    return make_plan(place / "data", [BUDGET], model=model, epochs=1, final_epochs=1, settings=settings), folder
