"""Training as a user meets it: one command to a report, resumed to the last bit, on one process or two."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from efficientformer import Classifier, evaluate_model
from efficientformer.data.loader import WorkerLoader
from efficientformer.evaluation.torch_predictor import TorchPredictor
from efficientformer.spec.errors import DataError, EfficientFormerError, TrainingError, UsageError
from efficientformer.spec.variants import v1_spec, v2_spec
from efficientformer.training import loop, run
from efficientformer.training.lock import alone_in
from efficientformer.training.processes import signals
from efficientformer.training.recipe import Recipe
from efficientformer.training.report import model_card
from efficientformer.training.run import train
from efficientformer.training.setup import build_network, prepare
from efficientformer.training.state import RunFolder
from efficientformer.training.watch import Watch
from efficientformer.weights.checkpoint import load_checkpoint, save_native
from tests.pictures import write_folders

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden_loss.json"
SPEC = v2_spec(
    (8, 8, 16, 16), ((2,), (2,), (2, 2), (2,)), 1, input_size=16, num_classes=3, stem_stride=1, stage3_stride=1
)
TINY = Recipe(
    model="efficientformer_cifar10", pretrained=False, spec=SPEC.to_dict(), epochs=3, batch_size=8, lr=3e-3,
    layer_decay=1.0, layer_scale_init=0.1, drop_path=0.1, precision="fp32", crop="pad", padding=2, cutout=4,
    mixup=0.5, mix_prob=0.5, refine_epochs=1, ema_decay=0.9, warmup_epochs=0.5, workers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = write_folders(tmp_path_factory.mktemp("data"), per_class=16)
    for index in range(10, 16):
        (root / "red" / f"{index:03d}.png").unlink()  # classes of different size
    return root


def weights(folder):
    return {name: load_file(folder / f"{name}.safetensors") for name in ("best", "last")}


def same(a, b):
    return all(torch.equal(a[name][key], b[name][key]) for name in a for key in a[name])


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return train(TINY, data, folder)


def test_a_run_is_the_work_of_one_process_at_a_time(finished, data, tmp_path):
    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    with alone_in(folder):
        with pytest.raises(UsageError, match=f"Another process is at work in .*; found process {os.getpid()} on"):
            train(resume=folder)
        assert (folder / "run.lock").exists()
    (tmp_path / "new").mkdir()
    with alone_in(tmp_path / "new"), pytest.raises(UsageError, match="Another process"):
        train(TINY, data, tmp_path / "new")


def test_a_lock_that_was_removed_meanwhile_holds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("efficientformer.training.lock.try_lock", lambda file: Path(file.name).unlink() or True)
    with pytest.raises(UsageError, match="Another process"), alone_in(tmp_path):
        pass


def losses(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_a_person_needs(finished, data):
    folder = finished.folder
    assert finished.finished
    names = {"recipe.json", "data.json", "state.pt", "best.safetensors", "last.safetensors", "metrics.jsonl",
             "train.log", "curves.png", "report.html", "README.md", "tensorboard"}  # fmt: skip
    assert names == {path.name for path in folder.iterdir()}
    assert any((folder / "tensorboard").iterdir())
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") > 3
    assert "Confusions" in page
    assert "unreadable training pictures" in page
    card = (folder / "README.md").read_text()
    assert f"Top-1 {finished.evaluation.top1:.2f} %" in card
    assert "blue, green, red" in card
    assert f"--data {data} --split val" in card


@pytest.mark.usefixtures("no_training_report")
def test_it_learns_and_its_checkpoint_is_a_model_like_any_other(data, tmp_path):
    outcome = train(TINY.with_changes(epochs=6, mixup=0.0, cutout=0, drop_path=0.0, lr=1e-2), data, tmp_path / "run")
    assert outcome.evaluation.top1 > 80
    assert losses(outcome.folder)[-1]["loss"] < losses(outcome.folder)[0]["loss"]
    classify = Classifier(str(outcome.folder / "best.safetensors"), engine="torch")
    assert classify.manifest.labels == ("blue", "green", "red")
    assert classify.manifest.metrics["top1"] == pytest.approx(outcome.evaluation.top1, abs=1e-3)
    assert classify(data / "red" / "000.png").name == "red"
    again = evaluate_model(str(outcome.folder / "best.safetensors"), data, split="val")  # those that were set aside
    assert (again.images, again.top1) == (outcome.evaluation.images, outcome.evaluation.top1)
    assert "set aside from the one set (seed 0): what the network never learned from" in again.notes[-1]
    assert again.images < evaluate_model(str(outcome.folder / "best.safetensors"), data).images


@pytest.mark.usefixtures("no_training_report")
def test_a_run_that_stops_at_any_step_goes_on_to_the_same_bits(finished, data, tmp_path, monkeypatch):
    """Stopped after the first step, at the end of an epoch, in the middle of the next and before the last step."""
    folder = tmp_path / "run"
    for at in (1, 4, 7, 11):
        monkeypatch.setattr(loop.Run, "_agree_to_stop", lambda run, at=at: run.progress.step == at)
        stopped = train(resume=folder) if folder.exists() else train(TINY, data, folder)
        assert (stopped.finished, stopped.step) == (False, at)
        monkeypatch.undo()
    assert train(resume=folder).finished
    assert same(weights(folder), weights(finished.folder))
    for key in ("step", "loss", "train_top1", "val_loss"):
        assert [line[key] for line in losses(folder)] == [line[key] for line in losses(finished.folder)], key


@pytest.mark.usefixtures("no_training_report")
def test_a_killed_process_goes_on_to_the_same_bits(finished, data, tmp_path):
    """SIGKILL in the middle of a step: state.pt is of an earlier one, metrics.jsonl may be ahead of it."""
    folder = tmp_path / "run"
    script = (
        "import os, sys; from efficientformer.training import loop; from efficientformer.training.run import train\n"
        "from efficientformer.training.recipe import load_recipe\n"
        "step = loop.Run._step\n"
        "def deadly(run, batch):\n    step(run, batch)\n    run.progress.step == 7 and os.kill(os.getpid(), 9)\n"
        "loop.Run._step = deadly\n"
        "train(load_recipe(sys.argv[1]), sys.argv[2], sys.argv[3])\n"
    )
    (tmp_path / "recipe.json").write_text(json.dumps(TINY.with_changes(save_every=3).to_dict()))
    command = [sys.executable, "-c", script, tmp_path / "recipe.json", data, folder]
    assert subprocess.run(command, check=False).returncode == -9
    assert torch.load(folder / "state.pt", weights_only=True)["progress"]["step"] == 6
    assert train(resume=folder).finished
    assert same(weights(folder), weights(finished.folder))


@pytest.mark.usefixtures("no_training_report")
def test_a_run_goes_on_with_another_number_of_workers_to_the_same_bits(data, tmp_path, monkeypatch, cli):
    counts = []

    class Counted(WorkerLoader):
        def __init__(self, *arguments):
            counts.append(arguments[-1])
            super().__init__(*arguments)

    monkeypatch.setattr("efficientformer.training.setup.WorkerLoader", Counted)
    whole, folder = train(RRC, data, tmp_path / "whole").folder, tmp_path / "run"
    with monkeypatch.context() as stopping:
        stopping.setattr(loop.Run, "_agree_to_stop", lambda run: run.progress.step == 1)
        train(RRC, data, folder)
    code, _, err = cli("train", "--resume", folder, "--set", "workers=2", "--set", "lr=1")
    assert (code, "keeps its recipe and folder" in err) == (2, True)
    assert cli("train", "--resume", folder, "--set", "workers=2")[0] == 0
    assert counts == [1, 1, 2]
    assert RunFolder(folder).recipe() == RunFolder(whole).recipe().with_changes(workers=2)
    assert same(weights(folder), weights(whole))
    assert train(resume=folder, workers=1).finished, "and back, from a state that was kept before"


@pytest.mark.usefixtures("no_training_report")
def test_the_loss_curve_is_the_golden_one(data, tmp_path):
    """Twelve steps in double-checked conditions; a change of order, augmentation, optimiser or loss shows here."""
    recipe = TINY.with_changes(epochs=2, refine_epochs=0, opt="sgd", lr=0.1, drop_path=0.0)
    train(recipe, data, tmp_path / "run")
    found = [(line["loss"], line["val_loss"]) for line in losses(tmp_path / "run")]
    expected = json.loads(GOLDEN.read_text())
    assert found == [pytest.approx(pair, rel=2e-4) for pair in expected]


@pytest.mark.usefixtures("no_training_report")
def test_two_processes_train_as_one(data, tmp_path):
    """The same global batch over gloo: every loss agrees within rounding."""
    base = TINY.with_changes(
        mixup=0.0, drop_path=0.0, opt="sgd", lr=0.05, ema_decay=0.0, accumulate=1, val_fraction=0.25, epochs=2,
        refine_epochs=0,
    )  # fmt: skip
    norms = "sync", "frozen"
    script = """
import os, sys
from efficientformer.cli.app import main
from efficientformer.training import run

run.write_report = lambda *_: None
data, port, *folders = sys.argv[1:]
for folder in folders:
    sys.argv[1:] = ["train", folder + ".json", "--data", data, "--output", folder, "--quiet"]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    # the launcher's store would lead the next group to the addresses of the one before
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": port}
"""
    (tmp_path / "script.py").write_text(script)
    for norm in norms:
        (tmp_path / f"{norm}.json").write_text(base.with_changes(norm=norm).to_json())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", tmp_path / "script.py"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    subprocess.run([*launcher, data, port, *(tmp_path / norm for norm in norms)], check=True, timeout=480)
    for norm in norms:
        way_on = f"torchrun --nproc-per-node 2 -m efficientformer train --resume {tmp_path / norm}"
        assert RunFolder(tmp_path / norm).resume_command == way_on
        assert train(base.with_changes(norm=norm), data, tmp_path / "one" / norm).finished
        for a, b in zip(losses(tmp_path / "one" / norm), losses(tmp_path / norm), strict=True):
            for key in ("loss", "train_top1", "val_loss", "val_top1"):
                assert b[key] == pytest.approx(a[key], rel=1e-4), (norm, key)


def test_a_process_whose_other_one_is_killed_says_so_in_a_line(data, tmp_path):
    (tmp_path / "recipe.json").write_text(SHORT.to_json())
    script = (
        "import os; from efficientformer.cli.app import main; from efficientformer.training import loop\n"
        "step = loop.Run._step\n"
        "def deadly(run, batch):\n"
        "    step(run, batch)\n"
        "    run.progress.step == 6 and run.accelerator.process_index == 1 and os.kill(os.getpid(), 9)\n"
        "loop.Run._step = deadly\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, "train", tmp_path / "recipe.json", "--data", data,
               "--output", tmp_path / "run", "--device", "cpu", "--quiet"]  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1]), "WORLD_SIZE": "2"}
    first, second = (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                         env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"})
        for rank in "01"
    )  # fmt: skip
    said = first.communicate(timeout=240)[1]
    second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (1, -9), said
    assert "Traceback" not in said
    assert "error: Another process of this run no longer answers; found [" in said
    way_on = f"torchrun --nproc-per-node 2 -m efficientformer train --resume {tmp_path / 'run'} --device cpu"
    assert f"The last checkpoint stands: {way_on}" in said
    assert "Another process" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.usefixtures("no_training_report")
def test_accumulated_parts_train_as_the_whole_batch(data, tmp_path):
    recipe = TINY.with_changes(norm="frozen", mixup=0.0, drop_path=0.0, opt="sgd", lr=0.05, epochs=1, refine_epochs=0)
    curves = []
    for parts in (1, 4):
        train(recipe.with_changes(accumulate=parts), data, tmp_path / str(parts))
        curves.append([line[key] for line in losses(tmp_path / str(parts)) for key in ("loss", "val_loss")])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_a_loss_that_is_no_number_names_its_step_and_leaves_the_last_good_checkpoint(data, tmp_path, monkeypatch):
    step, bad = loop.Run._step, [6, 2]

    def poisoned(run, batch):
        if run.progress.step == bad[0]:
            batch.images.fill_(float("inf"))
        step(run, batch)

    monkeypatch.setattr(loop.Run, "_step", poisoned)
    with pytest.raises(TrainingError, match="step 6 is no number"):
        train(TINY, data, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["progress"]["step"] == 4
    assert "error: The loss of step 6 is no number" in (tmp_path / "run" / "train.log").read_text()
    del bad[0]
    with pytest.raises(TrainingError, match="step 2 is no number") as early:
        train(TINY, data, tmp_path / "early")
    assert "last.safetensors" not in early.value.hint  # there is none yet
    assert all(t.isfinite().all() for t in state["parts"]["model"].values())


@pytest.mark.usefixtures("no_training_report")
def test_a_full_disk_names_the_step_and_leaves_the_last_good_checkpoint(data, tmp_path, monkeypatch):
    from efficientformer.training import state

    save, calls = torch.save, []

    def full(obj, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(obj, file)

    monkeypatch.setattr(state.torch, "save", full)
    with pytest.raises(TrainingError, match=r"step 8 could not be written.*No space left.*last checkpoint stands"):
        train(TINY, data, tmp_path / "run")
    monkeypatch.undo()
    assert RunFolder(tmp_path / "run").path.joinpath("state.pt").stat().st_size > 1000
    assert train(resume=tmp_path / "run").finished
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.usefixtures("no_training_report")
def test_the_damaged_state_of_a_run_is_an_error(data, tmp_path):
    train(TINY.with_changes(epochs=1, refine_epochs=0), data, tmp_path / "run")
    (tmp_path / "run" / "state.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(TrainingError, match="cannot be resumed"):
        train(resume=tmp_path / "run")


def test_an_existing_run_is_not_overwritten(finished, data):
    with pytest.raises(UsageError, match="holds a run already"):
        train(TINY, data, finished.folder)


def test_other_pictures_are_not_resumed_with(finished, tmp_path):
    with pytest.raises(UsageError, match="other pictures"):
        train(resume=finished.folder, data=write_folders(tmp_path / "other", per_class=9))


@pytest.mark.usefixtures("no_training_report")
def test_unreadable_pictures_are_named_and_left_out(tmp_path):
    data = write_folders(tmp_path / "data", per_class=10)
    (data / "red" / "bad.png").write_bytes(b"no picture")
    train(TINY.with_changes(epochs=1, refine_epochs=0), data, tmp_path / "run")
    assert "bad.png" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.usefixtures("no_training_report")
def test_unreadable_pictures_of_every_process_are_named_and_counted_as_an_epoch_ends(data, tmp_path, monkeypatch):
    """Here another process says what it could not read; test_loader has workers that find some."""
    monkeypatch.setattr("accelerate.utils.gather_object", lambda found: [*found, ("theirs.png", "cut short")])
    step = loop.Run._step

    def failing(run, batch):
        if run.progress.step in (5, 8):  # of epochs of four steps
            run.loader.skipped |= {f"{number:02d}.png": "empty" for number in range(30 * (run.progress.step == 5))}
            run.loader.skipped["last.png"] = "empty"
        if run.progress.step == 9:
            raise TrainingError("over")
        step(run, batch)

    monkeypatch.setattr(loop.Run, "_step", failing)
    with pytest.raises(TrainingError, match="over"):
        train(TINY, data, tmp_path / "run")
    first, second = (tmp_path / "run" / "train.log").read_text().split("epoch 1/3")
    assert first.count("left out of the training pictures: theirs.png: cut short") == 1
    assert "theirs.png" not in second
    assert second.count("left out of the training pictures") == 20
    assert second.index("and 11 more") < second.index("epoch 2/3")
    assert [line["skipped"] for line in losses(tmp_path / "run")] == [1, 32]


@pytest.mark.usefixtures("no_training_report")
def test_unreadable_pictures_are_named_before_an_error_ends_the_run(data, tmp_path, monkeypatch):
    def failing(run, batch):
        run.loader.skipped["broken.png"] = "empty"
        raise TrainingError("over")

    monkeypatch.setattr(loop.Run, "_step", failing)
    with pytest.raises(TrainingError, match="over"):
        train(TINY, data, tmp_path / "run")
    assert "left out of the training pictures: broken.png: empty" in (tmp_path / "run" / "train.log").read_text()


LIGHT = v1_spec((8, 8, 16, 16), (1, 1, 1, 1), 1, input_size=16, num_classes=3, stem_stride=1)
SHORT = TINY.with_changes(
    spec=LIGHT.to_dict(), epochs=2, refine_epochs=0, mixup=0.0, drop_path=0.0, cutout=0,
)  # fmt: skip
FEW = SHORT.with_changes(batch_size=16, val_fraction=0.25, warmup_epochs=0)  # two steps an epoch
RRC = FEW.with_changes(crop="rrc", color_jitter=0.0)
UNSEEN = {
    "workers": "changes the speed only (test_loader: the number of workers changes nothing)",
    "compile": "changes the speed only (test_a_compiled_run_computes_the_same)",
    "grad_checkpointing": "saves memory only (tests/unit/test_models.py)",
    "channels_last": "changes the speed only",
    "save_every": "test_a_killed_process_goes_on_to_the_same_bits",
    "early_stopping": "test_a_run_without_progress_stops_early_and_is_resumed_without_a_further_step",
    "norm": "test_two_processes_train_as_one",
    "accumulate": "test_accumulated_parts_train_as_the_whole_batch",
    "teacher": "tests/e2e/test_fine_tuning.py", "teacher_weights": "tests/e2e/test_fine_tuning.py",
    "teacher_cache": "tests/e2e/test_fine_tuning.py", "distillation": "tests/e2e/test_fine_tuning.py",
    "distill_alpha": "tests/e2e/test_fine_tuning.py", "distill_temperature": "tests/e2e/test_fine_tuning.py",
    "model": "tests/e2e/test_fine_tuning.py", "pretrained": "tests/e2e/test_fine_tuning.py",
    "input_size": "tests/e2e/test_fine_tuning.py",
}  # fmt: skip
BASES = {
    "crop_scale": RRC, "randaugment": RRC, "color_jitter": RRC, "interpolation": RRC, "vflip": RRC,
    "warmup_lr": FEW.with_changes(warmup_epochs=1), "clip_value": FEW.with_changes(clip="norm", clip_value=1e-3),
    "mix_prob": FEW.with_changes(mixup=1.0), "refine_epochs": FEW.with_changes(cutout=8),
    "ema_epochs": FEW.with_changes(ema_decay=0.9),
}  # fmt: skip
CHANGES = {
    "spec": SPEC.to_dict(), "epochs": 3, "batch_size": 8,
    "opt": "sgd", "opt_args": {"betas": [0.5, 0.6]}, "lr": 1e-3, "lr_batch": 64,
    "weight_decay": 0.5, "layer_decay": 0.5, "schedule": "linear", "warmup_epochs": 1, "warmup_lr": 1e-3,
    "min_lr": 1e-3, "clip": "agc", "clip_value": 1e-4, "drop_path": 0.5, "head_dropout": 0.5, "layer_scale_init": 1.0,
    "label_smoothing": 0.0, "class_weights": "balanced", "crop": "rrc", "crop_scale": [0.1, 0.2], "padding": 1,
    "hflip": 0.0, "vflip": 1.0, "randaugment": "rand-m9-inc1", "color_jitter": 0.9, "interpolation": "nearest",
    "erasing": 1.0, "grayscale": 0.5, "cutout": 8, "mixup": 1.0, "cutmix": 1.0, "mix_prob": 0.01,
    "refine_epochs": 2, "repeats": 3, "views": 1, "ema_decay": 0.1, "ema_epochs": 1, "precision": "bf16",
    "freeze": ["stem"], "val_fraction": 0.5, "eval_every": 2, "seed": 1,
}  # fmt: skip
FIELDS = sorted(CHANGES)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_the_recipe_changes_something(name, data, tmp_path, seen_before, monkeypatch):
    """No setting is swallowed: each one, set to another value, changes the weights or figures of an epoch."""
    monkeypatch.setattr(loop.Run, "_agree_to_stop", lambda run: run.progress.step == run.steps_per_epoch)
    base = BASES.get(name, FEW)
    key = json.dumps(base.to_dict())
    if key not in seen_before:
        seen_before[key] = seen(train(base, data, tmp_path / "base").folder)
    changed = train(base.with_changes(**{name: CHANGES[name]}), data, tmp_path / "changed")
    assert seen(changed.folder) != seen_before[key]


@pytest.mark.usefixtures("no_training_report")
def test_a_compiled_run_computes_the_same(data, tmp_path, monkeypatch):
    """The network is traced with its gradients, but no code is generated: that alone takes three minutes."""
    calls, compiled = [], torch.compile

    def traced(model):
        calls.append(model)
        return compiled(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    recipe = FEW.with_changes(epochs=1)
    figures = []
    for compiles in (False, True):  # with checkpointing, whose own way BatchNorms are counted no trace can follow
        changed = recipe.with_changes(compile=compiles, grad_checkpointing=compiles)
        train(changed, data, tmp_path / str(compiles))
        figures.append([line[key] for line in losses(tmp_path / str(compiles)) for key in ("loss", "val_loss")])
    assert len(calls) == 1
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)


@pytest.fixture(scope="module")
def seen_before():
    """What runs of recipes left behind, so that a recipe to compare with runs once."""
    return {}


def seen(folder):
    lines = [{k: v for k, v in line.items() if k != "images_per_s"} for line in losses(folder)]
    model = torch.load(folder / "state.pt", weights_only=True)["parts"]["model"]
    return lines, {k: v.double().sum().item() for k, v in model.items()}


def test_every_field_is_compared_or_said_to_be_unseen():
    assert {field.name for field in dataclasses.fields(Recipe)} == set(CHANGES) | set(UNSEEN)


@pytest.mark.parametrize(("step", "stands"), [(3, "no checkpoint yet"), (5, "last checkpoint stands")])
def test_a_killed_worker_ends_the_run_with_an_error_that_names_the_step(data, tmp_path, monkeypatch, step, stands):
    from efficientformer.data import loader

    def dying(self, steps):
        yield from self._real(steps[:step])
        raise RuntimeError("DataLoader worker (pid 4711) exited unexpectedly with signal 9")

    monkeypatch.setattr(loader.MemoryLoader, "_real", loader.MemoryLoader._pixels, raising=False)
    monkeypatch.setattr(loader.MemoryLoader, "_pixels", dying)
    with pytest.raises(TrainingError, match=rf"No batch for step {step}.*died.*{stands}.*--resume"):
        train(TINY, data, tmp_path / "run")


class Processes:
    """Two processes as Accelerate presents them, of which the other one says what ``others`` holds."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, *others):
        self.others, self.asked = list(others), 0

    def reduce(self, tensor, kind):
        assert kind == "mean"
        self.asked += 1
        return (tensor + torch.tensor(self.others.pop(0))) / 2


def one_of_two(folder, asked, *others):
    """Return the run of a process with another one beside it, without anything to train."""
    run = loop.Run(*[None] * 7, Processes(*others), [], RunFolder(folder), threading.Event())
    if asked:
        run.stop.set()
    run._agreed = (0, 0.0)
    return run


@pytest.mark.parametrize(("seconds", "expected"), [(0.01, [1, 11, 21]), (0.5, [1, 5, 9]), (7.0, [1, 2, 3])])
def test_processes_agree_to_stop_every_two_seconds_or_ten_steps(tmp_path, monkeypatch, seconds, expected):
    now, agreed = [0.0], []
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    run = one_of_two(tmp_path, False)
    while len(agreed) < 3:
        run.progress.step += 1
        now[0] += seconds
        asked, run.accelerator.others = run.accelerator.asked, [[0.0, now[0] - run._agreed[1]]]
        assert not run._agree_to_stop()
        agreed += [run.progress.step] * (run.accelerator.asked - asked)
    assert agreed == expected


def test_a_wish_of_either_process_stops_both(tmp_path):
    for wishes in ((True, 0.0), (False, 1.0)):
        run = one_of_two(tmp_path, wishes[0], [wishes[1], 0.1])
        run.progress.step = 1
        assert run._agree_to_stop()


def test_of_several_processes_one_without_batches_does_not_save_alone(tmp_path):
    """The others would be in the middle of a step, and wait for it there."""

    def dry():
        raise DataError("A process that prepares pictures died")
        yield

    run = one_of_two(tmp_path, True)
    with pytest.raises(TrainingError, match="No batch for step 0"):
        list(run._naming_step(dry()))


def test_processes_that_would_train_each_on_its_own_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"Each of 2 processes.*torchrun"):
        train(TINY, data, tmp_path / "run")


def test_the_progress_line_shows_the_newest_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("efficientformer.training.watch.LINE_EVERY_S", -1.0)
    watch = Watch(tmp_path, 100, 0, 8, quiet=False)
    watch.step(49, 0, 2, {}, None)
    watch.step(50, 0, 2, {"loss": 1.25, "train_top1": 40.0}, None)
    watch.step(51, 1, 2, {}, 62.5)
    watch.close()
    first, _, last = capsys.readouterr().err.splitlines()
    assert "loss" not in first
    assert "epoch 2/2" in last
    assert "loss 1.250  top-1 40.00 %  best val top-1 62.50 %" in last


def test_who_listens_hears_every_line_and_may_end_the_run(finished, data, tmp_path):
    heard = []

    def listen(figures):
        heard.append(figures)
        return figures["epoch"] == 1

    outcome = train(TINY, data, tmp_path / "run", on_metrics=listen)
    assert (outcome.finished, [line["epoch"] for line in heard]) == (False, [1])
    assert {"step", "loss", "train_top1", "lr", "val_top1", "val_top5", "val_loss"} <= heard[0].keys()
    assert train(resume=tmp_path / "run", on_metrics=heard.append).finished
    assert heard == [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert same(weights(tmp_path / "run"), weights(finished.folder))


def test_ctrl_c_saves_and_says_how_to_go_on(data, tmp_path, monkeypatch, cli):
    """The handler is called as the signal would; a real one goes to a process of its own in the next test."""
    folder, step = tmp_path / "run", loop.Run._step

    def interrupted(run, batch):
        if run.progress.step == 2:
            signal.getsignal(signal.SIGINT)(signal.SIGINT, None)
        step(run, batch)

    monkeypatch.setattr(loop.Run, "_step", interrupted)
    monkeypatch.setattr("efficientformer.cli.app._leave_at_once", lambda: None)  # this process has tests to do
    (tmp_path / "recipe.json").write_text(TINY.to_json())
    code, out, err = cli("train", tmp_path / "recipe.json", "--data", data, "-o", folder)
    assert (code, out) == (130, "")
    assert_stopped(folder, err)
    assert "Stopped after step 3" in err
    code, _, err = cli("train", tmp_path / "recipe.json", "--data", data, "-o", tmp_path / "quiet", "--quiet")
    assert (code, f"Go on: efficientformer train --resume {tmp_path / 'quiet'}\n" in err) == (130, True)


def assert_stopped(folder, err):
    assert f"--resume {folder}" in err.replace("\n", " ")
    assert "Traceback" not in err
    step = torch.load(folder / "state.pt", weights_only=True)["progress"]["step"]
    assert f"Stopped after step {step}" in err


def test_ctrl_c_of_a_terminal_reaches_the_workers_too_and_all_is_saved(data, tmp_path):
    """A terminal signals the whole group; the workers must leave it to the process that trains."""
    folder = tmp_path / "run"
    recipe = TINY.with_changes(epochs=2000, crop="rrc", cutout=0, refine_epochs=0, workers=2, color_jitter=0.0)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    command = [sys.executable, "-m", "efficientformer", "train", tmp_path / "recipe.json", "--data", data, "-o", folder]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (folder / "state.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert_stopped(folder, err)


@pytest.mark.usefixtures("no_training_report")
def test_measuring_leaves_the_network_as_it_is(data, tmp_path):
    """How often a network is measured must not change it, in either memory layout."""
    for layout in (True, False):
        recipe = SHORT.with_changes(spec=SPEC.to_dict(), channels_last=layout, ema_decay=0.0)
        often = train(recipe, data, tmp_path / f"often{layout}").folder
        seldom = train(recipe.with_changes(eval_every=2), data, tmp_path / f"seldom{layout}").folder
        a, b = (load_file(folder / "last.safetensors") for folder in (often, seldom))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_without_progress_stops_early_and_is_resumed_without_a_further_step(data, tmp_path, monkeypatch):
    def only_the_card(folder, *rest):
        (folder.path / "README.md").write_text(model_card(folder, *rest))

    monkeypatch.setattr("efficientformer.training.run.write_report", only_the_card)
    recipe = TINY.with_changes(epochs=30, early_stopping=2, lr=0.0, warmup_lr=0.0, ema_decay=0.0, mixup=0.0)
    first = train(recipe, data, tmp_path / "run")
    assert first.finished
    assert losses(first.folder)[-1]["epoch"] < 6
    before = weights(first.folder)
    again = train(resume=first.folder)
    assert (again.finished, again.step) == (True, first.step)
    assert same(weights(first.folder), before)
    assert f"epochs: {again.step // 4} (stopped early, of 30)" in (first.folder / "README.md").read_text()


@pytest.mark.usefixtures("no_training_report")
def test_a_run_keeps_to_the_cores_it_may_use_and_gives_torch_its_threads_back(data, tmp_path, monkeypatch):
    monkeypatch.setattr("efficientformer.evaluation.torch_predictor.available_cores", lambda: 1)
    used, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(SHORT, data, tmp_path / "run", on_metrics=lambda _: used.append(torch.get_num_threads()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(used) == {1}


def test_each_process_of_a_machine_has_workers(data, monkeypatch):
    monkeypatch.setattr("efficientformer.training.setup.available_cores", lambda: 100)
    for processes, workers in ((1, 16), (4, 64), (8, 100)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert prepare(TINY.with_changes(workers=-1), data, 0, 1).recipe.workers == workers


@pytest.mark.usefixtures("no_training_report")
def test_what_a_killed_run_had_half_written_is_no_hindrance_and_goes(data, tmp_path):
    left = [".state.pt.0123abcd.partial", ".best.safetensors.0123abcd.partial"]
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    (tmp_path / "first" / left[0]).touch()
    (tmp_path / "second" / ".mine.partial").touch()
    train(SHORT, data, tmp_path / "first", on_metrics=lambda _: True)
    with pytest.raises(UsageError, match=r"not empty.*\.mine\.partial"):
        train(SHORT, data, tmp_path / "second")
    (tmp_path / "first" / left[1]).touch()
    train(resume=tmp_path / "first")
    assert not list((tmp_path / "first").glob(".*.partial"))


def test_runs_that_begin_at_once_get_a_folder_each(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [run._made(Path("runs"), "net-data") for _ in range(3)] == [
        str(Path("runs") / name) for name in ("net-data", "net-data-2", "net-data-3")
    ]
    monkeypatch.setattr(run, "build_optimizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(SHORT, data)
    assert len(list(Path("runs").iterdir())) == 3, "one that nothing came of is gone"


def test_a_place_where_no_run_can_be_is_named(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").touch()
    with pytest.raises(UsageError, match="Cannot write the run folder runs"):
        train(SHORT, data)
    Path("runs").unlink()
    Path("runs").symlink_to("nowhere")
    with pytest.raises(UsageError, match="Cannot write the run folder runs"):
        train(SHORT, data)


def test_a_handler_that_python_did_not_set_is_left_alone(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, handler: assert_handler(handler))
    with signals():
        pass


def assert_handler(handler):
    assert handler is not None  # what signal.signal would raise TypeError for


def test_nothing_of_somebody_else_is_overwritten(data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(UsageError, match=r"not empty.*README.md"):
        train(SHORT, data, tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "state.pt").unlink(), "nothing to go on from"),
        (lambda f: (f / "best.safetensors").unlink(), "best weights so far"),
        (lambda f: (f / "recipe.json").write_text(TINY.with_changes(epochs=9).to_json()), "not the recipe"),
        (lambda f: (f / "data.json").write_text("{}"), "damaged"),
        (lambda f: (f / "data.json").unlink(), "no run folder"),
        (lambda f: rewrite(f / "data.json", launch={"processes": 0}), "Illegal processes of the launch"),
        (lambda f: rewrite(f / "data.json", launch={"machines": 1}), "Unknown field 'machines' in launch"),
    ],
)
def test_a_run_with_missing_or_changed_parts_is_not_resumed(finished, tmp_path, damage, match):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    damage(folder)
    with pytest.raises(EfficientFormerError, match=match):
        train(resume=folder)


def test_a_run_of_a_version_with_fewer_settings_is_resumed(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    recipe = json.loads((folder / "recipe.json").read_text())
    del recipe["grad_checkpointing"]
    (folder / "recipe.json").write_text(json.dumps(recipe))
    state = torch.load(folder / "state.pt", weights_only=True)
    torch.save({**state, "recipe": json.dumps(recipe)}, folder / "state.pt")
    assert RunFolder(folder).load_state({}).step == finished.step


@pytest.mark.usefixtures("no_training_report")
def test_a_run_is_resumed_without_the_weights_it_started_from_and_with_data_that_moved(data, tmp_path, monkeypatch):
    start = train(SHORT, data, tmp_path / "start").folder / "last.safetensors"
    moved = shutil.copytree(data, tmp_path / "before")
    recipe = SHORT.with_changes(model=str(start), pretrained=True, spec=None, layer_scale_init=1e-5)
    monkeypatch.setattr(loop.Run, "_agree_to_stop", lambda run: run.progress.step == 3)
    train(recipe, moved, tmp_path / "run")
    monkeypatch.undo()
    start.unlink()
    moved = moved.rename(tmp_path / "after")
    assert train(resume=tmp_path / "run", data=moved).finished
    assert json.loads((tmp_path / "run" / "data.json").read_text())["path"] == str(moved)


@pytest.mark.usefixtures("no_training_report")
def test_a_run_goes_on_as_it_was_started_or_says_what_differs(data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    for stop_at, device in ((2, "cpu"), (3, "cpu"), (4, "auto")):
        monkeypatch.setattr(loop.Run, "_agree_to_stop", lambda run, stop_at=stop_at: run.progress.step == stop_at)
        known = (folder / "train.log").read_text() if folder.exists() else ""
        train(*((None,) if known else (SHORT, data, folder)), resume=folder if known else None, device=device)
        said = (folder / "train.log").read_text()[len(known) :]
        assert f"Go on: efficientformer train --resume {folder} --device cpu\n" in said
        assert said.count("warning: begun as 1 process(es) on 1 machine(s), device cpu") == (device == "auto")


@pytest.mark.parametrize(
    ("launch", "begin", "end"),
    [
        (None, "efficientformer", ""),  # of a version that did not note it
        ({"processes": 2, "nodes": 1, "device": "cpu"}, "torchrun --nproc-per-node 2 -m efficientformer",
         " --device cpu"),
        ({"processes": 32, "nodes": 4, "device": "auto"},
         "torchrun --nnodes 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 8 -m efficientformer",
         ""),
    ],
)  # fmt: skip
def test_the_way_on_is_the_way_a_run_was_started(finished, tmp_path, launch, begin, end):
    folder = RunFolder(shutil.copytree(finished.folder, tmp_path / "run"))
    data = {key: value for key, value in folder.data().items() if key != "launch"}
    (folder.path / "data.json").write_text(json.dumps({**data, "launch": launch} if launch else data))
    assert folder.way_on.endswith(f": {begin} train --resume {folder.path}{end}")
    assert folder.load_state({}).step == finished.step


@pytest.mark.usefixtures("no_training_report")
def test_a_resumed_run_keeps_the_precision_it_began_in(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Run, "_agree_to_stop", lambda run: run.progress.step == 2)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    train(SHORT.with_changes(precision="auto"), data, tmp_path / "run")
    assert RunFolder(tmp_path / "run").recipe().precision == "fp32"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    train(resume=tmp_path / "run")
    assert (tmp_path / "run" / "train.log").read_text().count("cpu, fp32") == 2


@pytest.mark.usefixtures("no_training_report")
def test_of_equally_good_epochs_the_one_of_the_lower_loss_is_kept(data, tmp_path):
    kept = set()
    for seed in (0, 2):  # with the one the loss falls, with the other it rises, and too little is learned for more
        run = tmp_path / str(seed)
        train(SHORT.with_changes(epochs=3, lr=1e-3, ema_decay=0.0, seed=seed), data, run)
        lines = losses(run)
        best = max(lines, key=lambda line: (line["val_top1"], -line["val_loss"]))
        rivals = [line["val_top1"] for line in lines if line is not best]
        assert best["val_top1"] in rivals, "no two are equally good"
        assert load_checkpoint(run / "best.safetensors").manifest.metrics["epoch"] == best["epoch"]
        kept.add(best["epoch"])
    assert len(kept) == 2, "always the same epoch: it may have been kept for its place"


def test_a_failed_start_leaves_no_folder(data, tmp_path):
    with pytest.raises(UsageError):
        train(SHORT.with_changes(opt="adamz"), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_class_is_nothing_to_learn(tmp_path):
    root = write_folders(tmp_path / "data")
    shutil.rmtree(root / "red")
    shutil.rmtree(root / "blue")
    with pytest.raises(DataError, match="nothing to tell apart"):
        train(SHORT, root, tmp_path / "run")


@pytest.mark.parametrize("crop", ["pad", "rrc"])
@pytest.mark.parametrize(("part", "match"), [("train/red", "class 'red' can be read"), ("val", "No validation pict")])
def test_parts_that_cannot_be_read_are_refused_before_the_first_step(tmp_path, part, match, crop):
    write_folders(tmp_path / "data/train", per_class=4)
    write_folders(tmp_path / "data/val", per_class=2)
    for path in (tmp_path / "data" / part).rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=match):
        train(SHORT.with_changes(crop=crop), tmp_path / "data", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("divided", "said"), [("", 0), ("train", 1)])
def test_a_share_to_set_aside_of_divided_data_is_said_to_do_nothing(tmp_path, divided, said):
    write_folders(tmp_path / divided, per_class=4)
    if divided:
        write_folders(tmp_path / "val", per_class=2)
    for changes, count in (({"val_fraction": 0.5}, said), ({}, 0)):
        notes = prepare(SHORT.with_changes(**changes), tmp_path, 0, 1).notes
        assert sum("without effect: val_fraction" in note for note in notes) == count


def test_weights_that_know_held_out_pictures_are_noted(data, tmp_path):
    save_native(tmp_path / "start.safetensors", *own_weights())
    recipe = SHORT.with_changes(model=str(tmp_path / "start.safetensors"), spec=None, pretrained=True)

    def notes(**changes):
        said = []
        build_network(recipe.with_changes(**changes), ("blue", "green", "red"), said.append)
        return [each for each in said if "too good" in each]

    assert notes() == []
    assert "--set seed=0 --set val_fraction=0.2" in notes(seed=1)[0]
    assert len(notes(val_fraction=0.3)) == 1


def own_weights():
    """A network that this trainer has trained: its tensors and manifest."""
    network, manifest = build_network(SHORT, ("blue", "green", "red"), print)
    return network.state_dict(), manifest


def test_no_memory_to_measure_names_what_to_do(data, tmp_path, monkeypatch):
    asked = []

    def greedy(_, batch):
        asked.append(len(batch))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TorchPredictor, "_run", greedy)
    with pytest.raises(TrainingError, match=r"memory to measure the network.*smaller batch_size"):
        train(SHORT.with_changes(batch_size=2, val_fraction=0.5), data, tmp_path / "run")
    assert asked == [8]  # four times a step's pictures, whatever there are to measure on


def test_no_memory_to_train_names_what_was_tried_and_what_to_do(data, tmp_path, monkeypatch):
    def greedy(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(loop.Run, "_step", greedy)
    with pytest.raises(TrainingError, match=f"4 pictures of 16 x 16 pixels at .*--resume {tmp_path / 'run'}") as caught:
        train(SHORT.with_changes(accumulate=2), data, tmp_path / "run")
    assert str(caught.value) in (tmp_path / "run" / "train.log").read_text()
    monkeypatch.setattr("efficientformer.training.setup.EfficientFormer", greedy)
    with pytest.raises(TrainingError, match=r"memory for the network and the pictures; found .*input_size"):
        train(SHORT, data, tmp_path / "large")


def test_a_network_that_cannot_be_measured_ends_the_run_with_its_step(data, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(TorchPredictor, "_run", fails)
    with pytest.raises(TrainingError, match=r"cannot be measured after step \d+; found no kernel image"):
        train(SHORT, data, tmp_path / "run")


@pytest.mark.usefixtures("no_training_report")
def test_the_batch_fits_the_pictures_that_can_be_read(tmp_path):
    root = write_folders(tmp_path / "data", per_class=4)
    for name in ("000", "001"):
        (root / "red" / f"{name}.png").write_bytes(b"no picture")
    outcome = train(SHORT.with_changes(batch_size=64, mixup=1.0, epochs=1), root, tmp_path / "run")
    assert outcome.finished
    log = (tmp_path / "run" / "train.log").read_text()
    assert [log.count(f"pictures: red/{name}.png:") for name in ("000", "001")] == [1, 1], "each is named, once"
    assert "instead of 64" in (tmp_path / "run" / "train.log").read_text()
    assert "red/000.png" in (tmp_path / "run" / "train.log").read_text()


def test_half_precision_on_a_cpu_is_refused(data, tmp_path):
    with pytest.raises(UsageError, match="fp16 is for GPUs"):
        train(SHORT.with_changes(precision="fp16"), data, tmp_path / "run", device="cpu")


def test_wrong_calls(data, tmp_path, finished, cli):
    for arguments, match in [
        ({"device": "cuda:7", "data": data}, "device"),
        ({"resume": finished.folder, "output": tmp_path}, "keeps its recipe"),
        ({"resume": finished.folder, "workers": 1000}, "Illegal workers"),
        ({}, "Nothing to train on"),
    ]:
        with pytest.raises(UsageError, match=match):
            train(**arguments)
    for arguments, found in [
        (("--resume", tmp_path / "nothing"), "no run folder"),
        (("--data", tmp_path / "nothing"), "No data set"),
        ((data,), f"--data {data}"),
        (("--data", data, "--epochs", 1, "--set", "epochs=3"), "set twice"),
        (("--data", data, "--set", "epoch=3"), "Did you mean 'epochs'?\n"),
        (("recipes/cifar10.py", "--data", data, "--epochs", "2"), "--set refine_epochs"),
    ]:
        code, _, err = cli("train", *arguments)
        assert (code, "Traceback" in err) == (2, False), err
        assert found in err
    assert cli("test", finished.folder, "--data", data)[0] == 0, "a run's folder is its best network"
    code, out, _ = cli("train", "--set", "freeze=stem,stages.0", "--show")
    assert code == 0
    assert json.loads(out)["freeze"] == ["stem", "stages.0"]
