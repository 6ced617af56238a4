"""Fine-tuning from the weights of a network, and distillation from a teacher."""

import errno
import json
import os
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf

from efficientformer import Classifier, get_model
from efficientformer.data.loader import Batch
from efficientformer.spec.errors import TrainingError, UsageError
from efficientformer.spec.zoo import EMBEDDED
from efficientformer.training import loop
from efficientformer.training.recipe import Recipe
from efficientformer.training.report import model_card
from efficientformer.training.run import train
from efficientformer.training.setup import prepare
from efficientformer.training.teacher import CachedTeacher, _class_order, _memory_map, open_teacher, with_given
from efficientformer.weights.beside import class_names
from efficientformer.weights.checkpoint import save_native
from efficientformer.weights.pretrained import load_named
from tests.e2e.test_train import SHORT, TINY, losses
from tests.pictures import write_folders

TUNE = Recipe(epochs=1, batch_size=8, workers=1, precision="fp32", ema_decay=0.0)
ONE = SHORT.with_changes(epochs=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("data"), per_class=12)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efficientformer.training.run.write_report", lambda *_: None)
        train(TINY.with_changes(mixup=0.0, cutout=0, seed=5), data, folder)
    return str(folder / "best.safetensors")


def test_one_command_without_a_single_required_option_but_the_data(data, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("train", "--data", data, "--epochs", 1, "--set", "workers=1")
    assert code == 0, err
    folder = tmp_path / out.strip()
    assert folder == tmp_path / "runs" / f"{EMBEDDED}-{data.name}", "small pictures: the small network"
    assert (folder / "report.html").exists()
    recipe = json.loads((folder / "recipe.json").read_text())
    assert (recipe["model"], recipe["crop"], recipe["batch_size"]) == (EMBEDDED, "pad", 8)
    assert "heads are new (3 classes)" in err
    assert "Best epoch" in err
    code, out, _ = cli("predict", data / "red" / "000.png", "--model", folder / "best.safetensors", "-f", "json")
    assert code == 0
    assert json.loads(out)["pred_class"] in ("blue", "green", "red")
    monkeypatch.setattr(loop.Run, "train", lambda _: False)
    assert cli("train", "--data", data, "--epochs", 1)[0] == 130
    assert folder.with_name(f"{folder.name}-2").is_dir(), "never the same folder twice"


def test_large_pictures_take_the_large_network(tmp_path):
    data = write_folders(tmp_path / "data", per_class=4, size=80)
    prepared = prepare(TUNE.with_changes(pretrained=False), data, 0, 1)
    assert prepared.recipe.model == "efficientformer_l1"
    assert prepared.recipe.crop == "rrc"
    assert prepared.manifest.preprocess.input_size == (224, 224)


def test_the_body_starts_from_the_weights_and_the_head_anew(data):
    prepared = prepare(TUNE, data, 0, 1)
    original = get_model(EMBEDDED, pretrained=True).state_dict()
    found = prepared.model.state_dict()
    assert all(torch.equal(found[k], original[k]) for k in found if not k.startswith("head"))
    assert found["head.weight"].shape[0] == 3
    assert not torch.equal(found["head.weight"], original["head.weight"][:3])


def test_the_head_stays_where_the_classes_are_the_same(tmp_path):
    labels = Classifier().manifest.labels
    source = write_folders(tmp_path / "rgb", per_class=3)
    for label in labels:
        shutil.copytree(source / "red", tmp_path / "ten" / label)
    prepared = prepare(TUNE, tmp_path / "ten", 0, 1)
    original = get_model(EMBEDDED, pretrained=True).state_dict()
    assert torch.equal(prepared.model.state_dict()["head.weight"], original["head.weight"])
    (tmp_path / "ten" / "airplane").rename(tmp_path / "ten" / "aeroplane")
    renamed = prepare(TUNE, tmp_path / "ten", 0, 1)
    assert not torch.equal(renamed.model.state_dict()["head.weight"], original["head.weight"]), "other classes"


@pytest.mark.usefixtures("no_training_report")
def test_frozen_parts_and_their_statistics_stay(data, tmp_path):
    train(TUNE.with_changes(freeze=["body"]), data, tmp_path / "run")
    original = get_model(EMBEDDED, pretrained=True).state_dict()
    found = load_file(tmp_path / "run" / "last.safetensors")
    moved = {
        name.split(".")[0]
        for name in original
        if not name.startswith("head") and not torch.equal(found[name], original[name])
    }
    assert moved == {"norm"}


@pytest.mark.usefixtures("no_training_report")
def test_frozen_statistics_with_learning_weights(data, tmp_path):
    train(TUNE.with_changes(norm="frozen"), data, tmp_path / "run")
    original = get_model(EMBEDDED, pretrained=True).state_dict()
    found = load_file(tmp_path / "run" / "last.safetensors")
    for name in original:
        if name.endswith(("running_mean", "running_var")):
            assert torch.equal(found[name], original[name]), name
    assert not torch.equal(found["stem.conv1.conv.weight"], original["stem.conv1.conv.weight"])


@pytest.mark.usefixtures("no_training_report")
def test_a_run_killed_before_its_first_checkpoint_begins_again_from_the_weights(data, tmp_path, monkeypatch, teacher):
    def deadly(*_):
        raise KeyboardInterrupt

    recipe = TUNE.with_changes(model=teacher)
    train(recipe, data, tmp_path / "whole")
    monkeypatch.setattr(loop.Run, "_step", deadly)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, data, tmp_path / "killed")
    monkeypatch.undo()
    assert train(resume=tmp_path / "killed").finished
    whole, killed = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert "no checkpoint yet" in (tmp_path / "killed" / "train.log").read_text()


def test_another_input_size(data, tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what the weights lose is told as a note, not as a warning
        prepared = prepare(TUNE.with_changes(input_size=64), data, 0, 1)
    assert prepared.manifest.spec.input_size == prepared.manifest.preprocess.input_size == (64, 64)
    assert any("resampled" in note for note in prepared.notes)


@pytest.mark.usefixtures("no_training_report")
def test_a_checkpoint_of_a_run_can_be_the_next_runs_start_and_teacher(data, tmp_path):
    first = train(ONE, data, tmp_path / "first").folder / "best.safetensors"
    again = prepare(TUNE.with_changes(model=str(first)), data, 0, 1)
    assert torch.equal(again.model.state_dict()["head.weight"], load_file(first)["head.weight"])
    assert again.manifest.provenance["started_from"]
    taught = train(ONE.with_changes(teacher=str(first), distillation="soft"), data, tmp_path / "taught")
    assert losses(taught.folder)[-1]["loss"] != losses(tmp_path / "first")[-1]["loss"]


def curve(recipe, data, folder):
    return [line["loss"] for line in losses(train(recipe, data, folder).folder)]


@pytest.mark.usefixtures("no_training_report")
def test_each_setting_of_distillation_counts(data, tmp_path, teacher):
    base = ONE.with_changes(teacher=teacher, distillation="soft")
    changes = [{}, {"distillation": "hard"}, {"distill_alpha": 0.9}, {"distill_temperature": 4.0}, {"teacher": ""}]
    curves = [tuple(curve(base.with_changes(**c), data, tmp_path / str(i))) for i, c in enumerate(changes)]
    assert len(set(curves)) == len(changes)


@pytest.mark.usefixtures("no_training_report")
def test_a_cached_teacher_is_asked_once_for_each_view_and_changes_nothing(data, tmp_path, teacher, monkeypatch):
    from efficientformer.training import teacher as room

    asked = []
    call = room.Teacher.__call__
    monkeypatch.setattr(room.Teacher, "__call__", lambda self, b: asked.append(len(b.labels)) or call(self, b))
    base = SHORT.with_changes(
        teacher=teacher, distillation="soft", views=2, epochs=4, cutout=4, refine_epochs=1, batch_size=15, seed=1
    )
    live = curve(base, data, tmp_path / "live")
    calls_live = sum(asked)
    asked.clear()
    cached = base.with_changes(teacher_cache=str(tmp_path / "cache"))
    first = curve(cached, data, tmp_path / "first")
    assert sum(asked) == calls_live * 3 // 4, "the third of four epochs shows the views of the first"
    assert first == pytest.approx(live, rel=2e-3), "half precision is all that differs"
    asked.clear()
    assert curve(cached, data, tmp_path / "second") == first, "what is on disk is what was used"
    assert not asked
    with pytest.raises(TrainingError, match="another teacher, data set, augmentation"):
        train(cached.with_changes(padding=1), data, tmp_path / "third")


@pytest.mark.parametrize(("number", "stands"), [(errno.EBADF, True), (errno.EOPNOTSUPP, True), (errno.ENOSPC, False)])
def test_a_file_system_that_reserves_nothing_holds_logits_all_the_same(tmp_path, monkeypatch, number, stands):
    def refuse(*_):
        raise OSError(number, "refused")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with nullcontext() if stands else pytest.raises(OSError, match="refused"):
        assert _memory_map(tmp_path / "logits", np.dtype("f2"), (3, 4)).shape == (3, 4)


@pytest.mark.usefixtures("no_training_report")
def test_a_timm_teacher_from_a_file(data, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("mobilenetv3_small_050", num_classes=3)
    torch.save(network.state_dict(), tmp_path / "teacher.pth")
    recipe = ONE.with_changes(teacher="timm:mobilenetv3_small_050", teacher_weights=str(tmp_path / "teacher.pth"))
    assert all(np.isfinite(curve(recipe, data, tmp_path / "run")))
    with pytest.raises(TrainingError, match="timm cannot make the teacher"):
        train(recipe.with_changes(teacher="timm:no_such_network"), data, tmp_path / "none")
    with pytest.raises(UsageError, match=r"no such weights of the teacher; .*without teacher_weights the published"):
        train(recipe.with_changes(teacher_weights=str(tmp_path / "missing.pth")), data, tmp_path / "missing")


@pytest.mark.usefixtures("no_training_report")
def test_a_teacher_of_ones_own_from_a_folder_of_timms(data, tmp_path, monkeypatch):
    """Built with its own arguments, whose weights would not fit otherwise; a resumed run may start elsewhere."""
    torch.manual_seed(0)
    arguments = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "num_classes": 3}
    shown = {"input_size": (3, 24, 24), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.2), "interpolation": "bicubic"}
    network = timm.create_model("resnet18", **arguments)
    save_for_hf(network, tmp_path / "own", model_args=arguments, safe_serialization=True, data_config=shown)
    monkeypatch.chdir(tmp_path)
    recipe = ONE.with_changes(teacher="timm:local-dir:own", distillation="soft")
    seen = prepare(recipe, data, 0, 1)
    teacher = open_teacher(seen.recipe, seen.manifest, "", 1, None)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in teacher.network.state_dict().items())
    assert teacher._size == (24, 24)
    assert teacher._renormalise
    assert all(np.isfinite(curve(recipe, data, tmp_path / "run")))
    kept = json.loads((tmp_path / "run" / "recipe.json").read_text())["teacher"]
    assert kept == f"timm:local-dir:{tmp_path / 'own'}"


def test_a_network_in_memory_can_teach(data, tmp_path, teacher, cli, monkeypatch):
    """As the same weights in a file do; a resumed run needs it again, and takes no other."""

    def only_the_card(folder, *rest):
        (folder.path / "README.md").write_text(model_card(folder, *rest))

    monkeypatch.setattr("efficientformer.training.run.write_report", only_the_card)
    recipe = ONE.with_changes(distillation="soft")
    network = get_model(teacher).train()
    train(recipe, data, tmp_path / "given", teacher=network)
    given = [line["loss"] for line in losses(tmp_path / "given")]
    assert given == pytest.approx(curve(recipe.with_changes(teacher=teacher), data, tmp_path / "named"), rel=1e-5)
    assert network.training, "a copy was asked"
    assert "Teacher: a network in memory with weights" in (tmp_path / "given" / "README.md").read_text()
    with pytest.raises(UsageError, match=r"given to train\(\); expected it; found none\. .*resume=FOLDER, teacher="):
        train(resume=tmp_path / "given")
    with pytest.raises(UsageError, match="expected it; found one with other weights"):
        train(resume=tmp_path / "given", teacher=torch.nn.Identity())
    assert train(resume=tmp_path / "given", teacher=network).finished
    assert "resume=FOLDER" in cli("train", "--resume", tmp_path / "given")[2]
    with pytest.raises(UsageError, match=r"keeps its recipe; found that the teacher is .*best.safetensors"):
        train(resume=tmp_path / "named", teacher=network)
    unread = recipe.with_changes(teacher=teacher, teacher_weights="unread.pth")
    assert with_given(unread, network) == with_given(recipe, network)
    answers = [(lambda x: x.mean((2, 3))[:, :2], r"\(2, 2\)"), (lambda x: {"logits": x}, "a dict")]
    for answer, told in answers:
        network.forward = answer
        with pytest.raises(UsageError, match=rf"expected logits \(2, 3\) for 2 pictures .*found {told}"):
            train(recipe, data, tmp_path / "none", teacher=network)
    with pytest.raises(UsageError, match=r"The teacher cannot be asked; .*found mat1 and mat2"):
        train(recipe, data, tmp_path / "none", teacher=torch.nn.Linear(5, 3))
    with pytest.raises(UsageError, match=r"expected a torch module; found 'timm:x'.*with_changes"):
        train(recipe, data, tmp_path / "none", teacher="timm:x")
    assert not (tmp_path / "none").exists()


@pytest.fixture
def timm_teacher(data, tmp_path):
    """A function that opens a teacher out of a folder of timm's, whose config.json says these names of classes."""
    arguments = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "num_classes": 3}
    network = timm.create_model("resnet18", **arguments)
    save_for_hf(network, tmp_path / "own", model_args=arguments, safe_serialization=True)
    config = tmp_path / "own" / "config.json"
    written = json.loads(config.read_text())

    def opened(names=None, **changes):
        config.write_text(json.dumps(written | {"label_names": names}))
        prepared = prepare(ONE.with_changes(teacher=f"timm:local-dir:{config.parent}", **changes), data, 0, 1)
        assert prepared.manifest.labels == ("blue", "green", "red")
        return open_teacher(prepared.recipe, prepared.manifest, "", 4, None)

    return opened


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["red", "blue", "green"], [1, 2, 0]),
        ({"0": "green", "1": "red", "2": "blue"}, [2, 0, 1]),
        (["blue", "green", "red"], [0, 1, 2]),
        (["red", "blue"], [0, 1, 2]),  # of another network
    ],
)
def test_the_classes_of_a_timm_teacher_are_found_by_name(timm_teacher, names, order):
    batch = Batch(torch.randn(2, 3, 16, 16), torch.zeros(2).long(), None, True)
    assert torch.equal(timm_teacher(names)(batch), timm_teacher()(batch)[:, order])


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["red", "blue", "grey"], "The teacher timm:local-dir:.* knows other classes; found no green"),
        ([1, 2, 3], "label_names of the teacher timm:local-dir:.*: Illegal class names"),
    ],
)
def test_a_timm_teacher_of_other_classes_is_refused(timm_teacher, names, says):
    with pytest.raises(UsageError, match=says):
        timm_teacher(names)


def test_a_cache_of_classes_in_another_order_is_refused(timm_teacher, tmp_path):
    cached = {"views": 2, "teacher_cache": str(tmp_path / "cache")}
    timm_teacher(**cached)
    with pytest.raises(TrainingError, match="another teacher"):
        timm_teacher(["red", "blue", "green"], **cached)


def test_a_teacher_may_name_imagenet_s_classes_by_their_synsets():
    from efficientformer.spec.labels import label_names, synsets

    ours = label_names("imagenet1k")
    assert _class_order("teacher", ours, class_names(list(synsets()))) is None
    assert _class_order("teacher", ours, class_names(list(synsets()[::-1]))) == list(range(1000))[::-1]


def test_a_named_teacher_takes_the_weights_of_a_file(tmp_path):
    published, manifest = load_named(EMBEDDED, True)
    file = tmp_path / "own.safetensors"
    save_native(file, get_model(EMBEDDED).state_dict(), manifest)
    teacher = open_teacher(Recipe(teacher=EMBEDDED, teacher_weights=str(file)), manifest, "", 1, None)
    assert not teacher.identity.startswith(published.sha256)
    assert teacher.identity.startswith(load_named(str(file), True)[0].sha256)


def test_a_teacher_of_other_classes_is_refused(data, tmp_path):
    with pytest.raises(UsageError, match="knows other classes"):
        train(SHORT.with_changes(teacher=EMBEDDED), data, tmp_path / "run")


def test_a_teacher_sees_the_student_s_pictures_in_its_own_normalisation_and_size():
    from efficientformer.data.draws import Draws
    from efficientformer.data.loader import Batch
    from efficientformer.spec.preprocess import PreprocessSpec
    from efficientformer.training.teacher import Teacher

    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, x):
            seen["x"] = x
            return torch.arange(6.0).reshape(2, 3)

    student = PreprocessSpec(input_size=(8, 8), resize_size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    teacher = Teacher(Spy(), "spy", student, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), (16, 16), order=[2, 0, 1])
    pixels = torch.full((2, 3, 8, 8), 0.75)
    mean, std = (torch.tensor(v)[:, None, None] for v in (student.mean, student.std))
    draws = Draws(np.arange(2), np.zeros(2, np.uint64), np.zeros(2, np.int64), 0)
    said = teacher(Batch((pixels - mean) / std, torch.zeros(2).long(), draws, True))
    assert seen["x"].shape == (2, 3, 16, 16)
    assert torch.allclose(seen["x"], torch.ones(1), atol=1e-5)  # (0.75 - 0.5) / 0.25
    assert said.tolist() == [[2, 0, 1], [5, 3, 4]]


def test_the_cache_tells_views_with_and_without_cutout_apart(tmp_path):
    from efficientformer.data.draws import Draws
    from efficientformer.data.loader import Batch

    class Counting:
        identity = "x"
        calls = 0

        def __call__(self, batch):
            self.calls += 1
            return torch.full((len(batch.labels), 3), float(self.calls))

    teacher = Counting()
    cache = CachedTeacher(teacher, tmp_path, "data", (2, 4, 3))
    draws = Draws(np.array([1, 3]), np.zeros(2, np.uint64), np.zeros(2, np.int64), 0)
    batch = {cut: Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2), draws, cut) for cut in (True, False)}
    assert [float(cache(batch[cut])[0, 0]) for cut in (True, False, True, False)] == [1, 2, 1, 2]
