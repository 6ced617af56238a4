"""The loop around the network: shares, order, unreadable pictures, mistakes, published figures, the report."""

import dataclasses
import functools
import json
import os
import shutil
import threading
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from efficientformer import Classifier, evaluate_model
from efficientformer.data.source import ImageSource
from efficientformer.evaluation import distributed
from efficientformer.evaluation import torch_predictor as predictor_module
from efficientformer.evaluation.evaluate import evaluate
from efficientformer.evaluation.metrics import Metrics
from efficientformer.evaluation.published import compare
from efficientformer.evaluation.report import add_evaluation, confusion_figure, write_report
from efficientformer.evaluation.result import Evaluation
from efficientformer.evaluation.torch_predictor import TorchPredictor, _full_precision
from efficientformer.reporting import page as reporting
from efficientformer.reporting.page import Page, png
from efficientformer.runtime.pipeline import THREADS
from efficientformer.spec.errors import DataError, EngineError, ImageError, SpecError, UsageError
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.spec.variants import VARIANTS
from efficientformer.spec.zoo import resolve

CLASSES = 12
NAMES = tuple(f"class {index}" for index in range(CLASSES))


def manifest(classes=CLASSES, labels=NAMES):
    spec = dataclasses.replace(VARIANTS["efficientformer_cifar10"], num_classes=classes)
    plain = PreprocessSpec((32, 32), resize_size=32, mean=(0.0,) * 3, std=(1.0,) * 3)
    return Manifest(spec, plain, labels)


class Greys(ImageSource):
    """Pictures whose grey is 10 times the class that ``Reader`` reads from them."""

    def __init__(self, shown, labels, broken=()):
        self.classes, self.labels = NAMES, np.asarray(labels, np.int64)
        self.shown, self.broken, self.threads = shown, broken, set()

    def name(self, index):
        return f"picture {index}"

    def read(self, index):
        self.threads.add(threading.get_ident())
        if index in self.broken:
            raise ImageError(f"Cannot read picture {index}", found="nothing")
        return Image.new("RGB", (32, 32), (10 * self.shown[index],) * 3)


class Reader:
    """Says which class a grey stands for."""

    name = "reader"

    def __init__(self, manifest_=None, sure=5.0):
        self.manifest, self.sure, self.batches = manifest_ or manifest(), sure, []

    def run(self, batch):
        self.batches.append(len(batch))
        seen = np.rint(batch[:, 0, 0, 0] * 25.5).astype(int)
        return self.sure * np.eye(CLASSES, dtype=np.float32)[seen]


def random_source(count=50, **options):
    rng = np.random.default_rng(0)
    shown = rng.integers(0, CLASSES, count)
    return Greys(shown, np.where(rng.random(count) < 0.3, rng.integers(0, CLASSES, count), shown), **options)


def test_counts_batches_and_order():
    source, reader, seen = random_source(), Reader(), []
    evaluation = evaluate(
        reader, source, batch_size=16, workers=3, progress=lambda *at: seen.append(at), model="m", data="d"
    )
    assert reader.batches == [16, 16, 16, 2]
    assert seen == [(16, 50), (32, 50), (48, 50), (50, 50)]
    right = int((np.asarray(source.shown) == source.labels).sum())
    assert 25 < right < 50
    assert evaluation.top1 == pytest.approx(2 * right)
    assert np.trace(evaluation.result.confusion) == right
    for true, shown in zip(source.labels, source.shown, strict=True):
        assert evaluation.result.confusion[true, shown] > 0
    assert threading.get_ident() not in source.threads
    assert (evaluation.model, evaluation.data, evaluation.engine) == ("m", "d", "reader")
    assert evaluation.seconds > 0
    assert evaluation.images_per_s == pytest.approx(50 / evaluation.seconds)


def test_few_pictures_are_read_ahead():
    source = random_source(200)
    read, most = [], []
    original = source.read

    def counting(index):
        read.append(index)
        return original(index)

    class Slow(Reader):
        def run(self, batch):
            most.append(len(read) - sum(self.batches))
            return super().run(batch)

    source.read = counting
    evaluate(Slow(), source, batch_size=10, workers=2)
    assert max(most) <= 30  # the batch, and two more


def test_unreadable_pictures_are_listed_and_left_out():
    source = random_source(broken=(3, 17, 18))
    evaluation = evaluate(Reader(), source, batch_size=2, workers=2)  # 16 to 17 and 18 to 19 are batches of one
    assert evaluation.images == 47
    assert [each.name for each in evaluation.skipped] == ["picture 3", "picture 17", "picture 18"]
    assert "nothing" in evaluation.skipped[0].reason
    kept = np.setdiff1d(np.arange(50), source.broken)
    right = (np.asarray(source.shown)[kept] == source.labels[kept]).mean()
    assert evaluation.top1 == pytest.approx(100 * right)


def test_nothing_readable_has_no_figures():
    evaluation = evaluate(Reader(), random_source(5, broken=range(5)))
    assert len(evaluation.skipped) == 5
    with pytest.raises(DataError, match="5 that could not be, the first picture 0: Cannot read"):
        evaluation.to_dict()


@pytest.mark.parametrize("world", [2, 3, 60])
def test_shares_add_up(world):
    source = random_source(broken=(3, 17))
    whole = evaluate(Reader(), source, keep_worst=4)
    shares = [evaluate(Reader(), source, rank=rank, world=world, keep_worst=4) for rank in range(world)]
    merged = shares[0]
    for share in shares[1:]:
        merged = merged.merge(share)
    assert (merged.result.confusion == whole.result.confusion).all()
    assert merged.loss == pytest.approx(whole.loss, rel=1e-12)
    assert set(merged.skipped) == set(whole.skipped)
    assert len(merged.worst) == len(whole.worst) == 4
    assert {each.loss for each in merged.worst} == {each.loss for each in whole.worst}
    assert shares[0].images < whole.images
    assert merged.seconds == max(share.seconds for share in shares)


@pytest.mark.parametrize("world", [1, 3])
def test_what_was_said_of_every_picture_is_kept_on_request(world):
    source = random_source(broken=(3,))
    assert evaluate(Reader(), source).outcomes == ()
    shares = [evaluate(Reader(), source, rank=rank, world=world, keep_outcomes=True) for rank in range(world)]
    whole = functools.reduce(Evaluation.merge, shares)
    assert [each.path for each in whole.outcomes] == [source.name(i) for i in range(len(source)) if i != 3]
    assert [each.index for each in whole.outcomes] == [i for i in range(len(source)) if i != 3]
    assert 100 * np.mean([each.true_label == each.pred_label for each in whole.outcomes]) == pytest.approx(whole.top1)
    assert np.mean([each.loss for each in whole.outcomes]) == pytest.approx(whole.loss, abs=1e-6)
    assert all(each.true_class == NAMES[each.true_label] for each in whole.outcomes)


def test_the_worst_mistakes_are_kept():
    class Unsure(Reader):
        """The brighter, the surer."""

        def run(self, batch):
            return super().run(batch) * batch[:, 0, 0, :1]

    shown = [1, 9, 4, 11, 6, 2]
    evaluation = evaluate(Unsure(sure=50), Greys(shown, [1, 0, 0, 0, 0, 0]), batch_size=4, keep_worst=3)
    assert [each.name for each in evaluation.worst] == ["picture 3", "picture 1", "picture 4"]
    first = evaluation.worst[0]
    assert (first.true, first.predicted) == (0, 11)
    assert 0.9 < first.probability <= 1
    assert first.image.getpixel((0, 0)) == (110, 110, 110)
    assert evaluation.confused(2) == [(0, 2, 1), (0, 4, 1)]


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"workers": 0}, {"workers": -1}, {"rank": 1}, {"rank": -1}, {"world": 0}]
)
def test_illegal_arguments(options):
    with pytest.raises(UsageError):
        evaluate(Reader(), random_source(), **options)


def test_data_that_does_not_fit():
    with pytest.raises(DataError, match="empty"):
        evaluate(Reader(), Greys([], []))
    with pytest.raises(DataError, match="expected 10 classes; found 12"):
        evaluate(Reader(manifest(10, ())), random_source())


def test_a_failing_network_stops_the_reading():
    class Broken(Reader):
        def run(self, batch):
            raise RuntimeError("out of memory")

    source = random_source(2000)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(Broken(), source, batch_size=4, workers=2)
    for thread in threading.enumerate():
        if thread.name.startswith(THREADS):
            thread.join(5)
    assert threading.active_count() <= before


def test_json_is_complete():
    evaluation = evaluate(Reader(), random_source(broken=(3,)), keep_worst=2)
    data = json.loads(evaluation.to_json())
    assert data["images"] == 49
    assert data["skipped"] == len(data["skipped_list"]) == 1
    assert sum(count for _, _, count in data["confusion"]) == 49
    assert [each["class"] for each in data["per_class"]] == list(NAMES)
    assert data["per_class"][0]["recall"] == data["per_class"][0]["top1"]
    assert sum(each["count"] for each in data["calibration"]["bins"]) == 49
    assert data["top1"] == evaluation.top1
    assert data["published"] is None
    assert data["preprocess"]["input_size"] == [32, 32]
    assert set(data["worst"][0]) == {"name", "true", "predicted", "probability", "loss"}


def test_figures_without_a_value_are_null_in_json():
    evaluation = evaluate(Reader(), Greys([1], [1]))
    assert json.loads(evaluation.to_json())["per_class"][0]["recall"] is None


def published(name="timm", **changes):
    card = resolve("efficientformer_l1").card
    return dataclasses.replace(card.manifest(card.source(name)), **changes)


def test_published_figures_are_compared_on_the_whole_validation_set():
    whole = [50] * 1000
    assert compare(published(), whole, 80.498 + 0.09, 94.988 - 0.09).agrees is True
    assert compare(published(), whole, 80.498 - 0.11, 94.988).agrees is False
    assert compare(published(), whole, 80.498, 94.988 + 0.11).agrees is False
    assert compare(published(), [49, *whole[1:]], 80.498, 94.988).agrees is None
    assert compare(published(), [49, 51, *whole[2:]], 79.0, 94.988).agrees is None  # as many, but others
    assert "DIFFERS" in compare(published(), whole, 79.0, 94.988).describe()
    assert "Not comparable" in compare(published(), [1] * 100, 79.0, 94.988).describe()


def test_published_figures_say_their_preprocessing():
    other = PreprocessSpec(resize_size=256)
    assert compare(published(), [1] * 10, 80, 95).same_preprocess
    found = compare(published(preprocess=other), [1] * 10, 80, 95)
    assert not found.same_preprocess
    assert "short edge 235" in found.describe()
    assert "NOT" in found.describe()


def test_published_weights_are_known_by_digest_or_file():
    bare = published("mmpretrain", metrics={}, provenance={"sha256": "cc3e1ac6" + "0" * 56})
    assert compare(bare, [1] * 10, 80, 95).top1 == 80.46
    assert compare(dataclasses.replace(bare, provenance={"sha256": "0" * 64}), [1] * 10, 80, 95) is None
    named = {"file": "efficientformer_l1_300d.pth", "layout": "snap"}
    assert compare(dataclasses.replace(bare, provenance=named), [1] * 10, 80, 95).source == "snap-300"
    assert compare(dataclasses.replace(bare, provenance={**named, "layout": "timm"}), [1] * 10, 80, 95) is None
    assert compare(manifest(), [1] * 10, 80, 95) is None


class Frozen(torch.nn.Module):
    """A network with a part that stays in evaluation mode while the rest trains."""

    def __init__(self):
        super().__init__()
        self.drop, self.frozen = torch.nn.Dropout(0.5), torch.nn.BatchNorm2d(3).eval()

    def forward(self, x):
        return self.drop(self.frozen(x)).mean((2, 3))


def test_torch_predictor_keeps_the_modes():
    network = Frozen()
    batch = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    logits = TorchPredictor(network, manifest(), "cpu").run(batch)
    np.testing.assert_allclose(logits, batch.mean((2, 3)), atol=1e-4)  # nothing dropped
    assert network.training
    assert network.drop.training
    assert not network.frozen.training


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_torch_predictor_in_half_precision(precision, monkeypatch):
    monkeypatch.setattr(predictor_module, "computes_in", lambda _: True)  # or emulates it, right and slow
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
    batch = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    exact = TorchPredictor(linear, manifest(), "cpu").run(batch)
    half = TorchPredictor(linear, manifest(), "cpu", precision).run(batch)
    assert half.dtype == np.float32
    assert 0 < np.abs(half - exact).max() < 0.05
    assert linear[1].weight.dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_torch_emulates_no_half_precision(precision, monkeypatch):
    monkeypatch.setattr(predictor_module, "computes_in", lambda _: False)
    with pytest.raises(EngineError, match=f"torch does not compute in {precision} on this processor.*one of fp32"):
        TorchPredictor(torch.nn.Linear(1, 1), manifest(), "cpu", precision)
    assert TorchPredictor(torch.nn.Linear(1, 1), manifest(), "meta", precision).precision == precision


def test_torch_takes_no_more_threads_than_the_process_may_use(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(predictor_module, "available_cores", lambda: 1)
    try:
        torch.set_num_threads(2)
        Classifier(engine="torch", threads=2)
        assert torch.get_num_threads() == 2
        Classifier(engine="torch")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


class Full(torch.nn.Module):
    """A network that does not fit."""

    def forward(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\n\nMore for who debugs torch")


@pytest.mark.parametrize(
    ("network", "said"),
    [(torch.nn.Conv2d(4, 1, 1), "to have 4 channels"), (Full(), r"allocate 9 GiB\. Lower the batch size\.$")],
)
def test_torch_predictor_says_what_torch_cannot_run(network, said):
    with pytest.raises(EngineError, match=rf"torch .* cannot run a batch of shape \[4, 3, 8, 8\].*{said}"):
        TorchPredictor(network, manifest(), "cpu").run(np.zeros((4, 3, 8, 8), np.float32))


@pytest.fixture
def compiling():
    """Compile whatever another test compiled before."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiling")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch compiles with a C++ compiler")
def test_a_compiled_network_is_the_same():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.GELU())  # of more layers it takes longer
    batch = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    found = TorchPredictor(network, manifest(), "cpu", compiled=True).run(batch)
    np.testing.assert_allclose(found, TorchPredictor(network, manifest(), "cpu").run(batch), atol=1e-5)


@pytest.mark.usefixtures("compiling")
def test_compiling_without_a_compiler_names_the_other_engine(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing is compiled already
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-compiler",))
    predictor = TorchPredictor(torch.nn.GELU(), manifest(), "cpu", compiled=True)
    with pytest.raises(EngineError, match=r"no-compiler.*needs a C\+\+ compiler.*--engine torch"):
        predictor.run(np.zeros((4, 3, 8, 8), np.float32))


def test_full_precision_is_restored():
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    with _full_precision():
        assert [switch.fp32_precision for switch in switches] == ["ieee", "ieee"]
    assert [switch.fp32_precision for switch in switches] == before


@pytest.mark.parametrize(("device", "precision"), [("cpu", "int4"), ("gpu", "fp32"), ("cuda:99", "fp32")])
def test_torch_predictor_refuses_what_there_is_not(device, precision):
    with pytest.raises((UsageError, SpecError)):
        TorchPredictor(torch.nn.Linear(1, 1), manifest(), device, precision)


def test_a_single_process_is_a_team_of_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with distributed.join() as team, team.first_alone():
        evaluation = evaluate(Reader(), random_source(4))
        assert team.first
        assert team.merged(evaluation) is evaluation


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "2"), ("0", "0"), ("-1", "2")])
def test_an_environment_that_makes_no_sense(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UsageError), distributed.join():
        pass


def test_processes_that_cannot_find_each_other(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(UsageError, match="cannot find each other; found no MASTER_PORT"), distributed.join():
        pass


@pytest.mark.parametrize(
    ("environment", "refused"),
    [
        ({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"PMI_SIZE": "2"}, True),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "WORLD_SIZE": "1"}, False),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, False),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, False),  # the scripts of a batch job, in several versions
        ({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "batch"}, False),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967291"}, False),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967290"}, False),  # the shell of salloc
    ],
)
def test_processes_that_would_each_do_all_the_work_are_refused(monkeypatch, environment, refused):
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refusal = pytest.raises(UsageError, match=r"would do all the work.*torchrun") if refused else nullcontext()
    with refusal, distributed.join() as team:
        assert team.world == 1


def test_the_report_holds_every_section(tmp_path):
    evaluation = evaluate(Reader(), random_source(broken=(3,)), model="<b>net</b>", keep_worst=3)
    write_report(evaluation, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    for heading in ("Confusions", "Calibration", "Classes, worst first", "Worst mistakes", "could not be read"):
        assert heading in text
    assert "&lt;b&gt;net" in text
    assert f"{evaluation.top1:.2f} %" in text
    assert text.count("data:image/png") == 5  # two figures, three mistakes
    assert "picture 3" in text


def test_names_are_drawn_as_they_are():
    names = (r"$\frac{$", "a$b$c", "\u65e5\u672c")
    metrics = Metrics(3)
    metrics.update(np.eye(3), np.arange(3))
    figure = confusion_figure(Evaluation("m", "e", "d", manifest(3, names), names, metrics))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a script the font has not is no reason for a line per character
        assert png(figure).startswith(b"\x89PNG")
    labels = figure.axes[0].get_xticklabels()
    assert [label._preprocess_math(label.get_text()) for label in labels] == [(n, False) for n in names]


def test_figures_take_the_fonts_this_machine_has_for_other_scripts(monkeypatch):
    monkeypatch.setattr(reporting, "CJK_FONTS", ("No Such Font", "STIXGeneral"))
    reporting._families.cache_clear()
    figure = reporting.new_figure(1, 1)
    text = figure.text(0.5, 0.5, "x")
    png(figure)
    assert text.get_fontfamily() == ["DejaVu Sans", "STIXGeneral"]
    reporting._families.cache_clear()


def test_a_thousand_classes_give_a_table_instead_of_a_heat_map():
    metrics = Metrics(1000)
    metrics.update(np.eye(1000)[np.arange(200) % 7], np.arange(200))
    names = tuple(map(str, range(1000)))
    page = Page("test")
    add_evaluation(page, Evaluation("m", "e", "d", manifest(1000, names), names, metrics))
    kinds = [part["kind"] for part in page._parts]
    assert kinds.count("figure") == 1  # calibration only
    rows = [part for part in page._parts if part["kind"] == "table"]
    assert len(rows[0]["rows"]) == 15
    assert len(rows[1]["rows"]) == 50


def test_the_heat_map_shows_shares_of_each_row():
    evaluation = evaluate(Reader(), Greys([1, 1, 1, 2], [1, 1, 2, 2]))
    shares = confusion_figure(evaluation).axes[0].images[0].get_array()
    assert shares[1, 1] == 100
    assert shares[2, 1] == shares[2, 2] == 50
    assert shares[0].sum() == 0


def test_numbers_that_are_taken_for_the_networks_order_are_told_of(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "1.png")
    (tmp_path / "data.txt").write_text("1.png 3\n")
    (note,) = (
        each for each in evaluate_model("", tmp_path / "data.txt", engine="onnxruntime").notes if "order" in each
    )
    assert note == "the data names no classes (classes.txt): their numbers are taken for the network's order"


def test_processes_that_have_other_pictures_are_told_apart(monkeypatch):
    def gather(found, mine):
        found[:] = [mine, "other", mine]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    distributed.Team(0, 1).check_same(lambda: 1 / 0)  # a single process asks for none
    with pytest.raises(DataError, match="others than in process 0 in 1"):
        distributed.Team(0, 3).check_same(lambda: "mine")
