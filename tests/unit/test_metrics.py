"""The figures of merit: by hand, against torchmetrics, and added up from parts."""

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as reference

from efficientformer.evaluation.metrics import BINS, Metrics, score
from efficientformer.spec.errors import DataError, EngineError, UsageError


def measured(logits, labels, classes=None):
    logits = np.asarray(logits, np.float32)
    metrics = Metrics(classes or logits.shape[1])
    metrics.update(logits, np.asarray(labels))
    return metrics.result()


def random_case(count=500, classes=12, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes - 1, count)  # the last class never occurs
    logits = rng.normal(size=(count, classes)).astype(np.float32) * 2
    logits[np.arange(count), labels] += 2
    return logits, labels


@pytest.mark.parametrize(
    ("row", "label", "predicted", "rank"),
    [
        ([3, 2, 1, 0], 0, 0, 0),
        ([3, 2, 1, 0], 3, 0, 3),
        ([1, 1, 1, 1], 0, 0, 0),  # of equal logits the first class wins
        ([1, 1, 1, 1], 2, 0, 2),
        ([0, 5, 5, 9], 2, 3, 2),  # the equal one before it counts, the true one itself does not
        ([0, 5, 5, 9], 1, 3, 1),
        ([-1e30, 0, 0, 0], 0, 1, 3),
    ],
)
def test_rank_and_ties(row, label, predicted, rank):
    scores = score(np.array([row], np.float32), np.array([label]))
    assert (scores.predicted[0], scores.rank[0]) == (predicted, rank)


@pytest.mark.parametrize(
    ("row", "label", "loss"),
    [
        ([0, 0], 0, np.log(2)),
        ([0, np.log(3)], 1, np.log(4 / 3)),
        ([0, np.log(3)], 0, np.log(4)),
        ([1000, 0], 1, 1000),  # exp(1000) would overflow
        ([1000, 0], 0, 0),
        ([-1000, -1000], 0, np.log(2)),  # exp(-1000) would vanish
    ],
)
def test_loss_by_hand(row, label, loss):
    assert measured([row], [label]).loss == pytest.approx(loss, abs=1e-7)


def test_a_small_case_by_hand():
    # true:       a  a  a  b  b  c ; taken for: a  a  b  b  c  c
    rows = {"a": [4, 0, 0], "b": [0, 4, 0], "c": [0, 0, 4]}
    result = measured([rows[name] for name in "aabbcc"], [0, 0, 0, 1, 1, 2])
    assert result.confusion.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert result.images == 6
    assert result.top1 == pytest.approx(100 * 4 / 6)
    assert result.top5 is None  # of three classes the first five say nothing
    assert result.per_class.count.tolist() == [3, 2, 1]
    assert result.per_class.recall == pytest.approx([200 / 3, 50, 100])
    assert result.per_class.precision == pytest.approx([100, 50, 50])
    assert result.per_class.f1 == pytest.approx([80, 50, 200 / 3])


def test_top5_counts_the_fifth_and_not_the_sixth():
    row = list(range(8, 0, -1))
    assert measured([row] * 2, [4, 5]).top5 == 50
    assert measured([row[:6]], [4]).top5 == 100
    assert measured([row[:5]], [4]).top5 is None


def test_what_no_picture_defines_is_nan():
    per_class = measured([[1, 0, 0]], [1]).per_class
    assert np.isnan(per_class.recall).tolist() == [True, False, True]
    assert np.isnan(per_class.precision).tolist() == [False, True, True]
    assert np.isnan(per_class.f1).tolist() == [False, False, True]


def test_calibration_by_hand():
    # Two predictions at confidence 0.8, one of them right; one at 0.5 + a little, right.
    sure, unsure = [np.log(4), 0], [1e-4, 0]
    calibration = measured([sure, sure, unsure], [0, 1, 0]).calibration
    assert calibration.mean_confidence == pytest.approx(100 * (0.8 + 0.8 + 0.5) / 3, abs=0.01)
    assert calibration.ece == pytest.approx(100 * (2 * 0.3 + 0.5) / 3, abs=0.01)
    assert calibration.count.sum() == 3
    assert calibration.accuracy[calibration.count == 2].tolist() == [0.5]


def test_full_confidence_falls_into_the_last_bin():
    calibration = measured([[1000, 0]], [0]).calibration
    assert calibration.count.tolist() == [0] * (BINS - 1) + [1]
    assert calibration.ece == 0


def test_every_confidence_lies_in_its_bin():
    calibration = measured(*random_case()).calibration
    filled = calibration.count > 0
    assert filled.sum() > 10
    assert (calibration.edges[:-1][filled] < calibration.confidence[filled]).all()
    assert (calibration.confidence[filled] <= calibration.edges[1:][filled]).all()


def test_equal_to_torchmetrics():
    logits, labels = random_case()
    result = measured(logits, labels)
    scores, true = torch.from_numpy(logits), torch.from_numpy(labels)
    options = {"num_classes": 12}
    assert result.top1 == pytest.approx(
        100 * float(reference.multiclass_accuracy(scores, true, average="micro", **options)), abs=1e-4
    )
    assert result.top5 == pytest.approx(
        100 * float(reference.multiclass_accuracy(scores, true, average="micro", top_k=5, **options)), abs=1e-4
    )
    assert (result.confusion == reference.multiclass_confusion_matrix(scores, true, **options).numpy()).all()
    ece = reference.multiclass_calibration_error(scores.softmax(1), true, n_bins=BINS, norm="l1", **options)
    assert result.calibration.ece == pytest.approx(100 * float(ece), abs=1e-4)
    for name in ("recall", "precision", "f1_score"):
        expected = getattr(reference, f"multiclass_{name}")(scores, true, average=None, **options).numpy()
        found = getattr(result.per_class, name.removesuffix("_score"))
        assert np.nan_to_num(found) == pytest.approx(100 * expected, abs=1e-4)
        macro = 100 * expected[np.unique(labels)].mean()  # of the classes that occur, as sklearn's balanced accuracy
        assert result.per_class.macro[name.removesuffix("_score")] == pytest.approx(macro, abs=1e-4)
    loss = torch.nn.functional.cross_entropy(scores.double(), true)
    assert result.loss == pytest.approx(float(loss), abs=1e-9)


def test_parts_add_up_to_the_whole():
    logits, labels = random_case()
    parts = [Metrics(12) for _ in range(3)]
    for index, part in enumerate(parts):
        part.update(logits[index::3], labels[index::3])
    merged = Metrics(12).merge(parts[0]).merge(parts[1]).merge(parts[2])
    whole = Metrics(12)
    whole.update(logits, labels)
    assert (merged.images, merged.result().top5) == (whole.images, whole.result().top5)
    assert merged.result().loss == pytest.approx(whole.result().loss, rel=1e-12)
    assert merged.result().calibration.ece == pytest.approx(whole.result().calibration.ece, rel=1e-9)
    assert (merged.result().confusion == whole.result().confusion).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers(value):
    metrics = Metrics(3)
    logits = np.zeros((4, 3), np.float32)
    logits[2, 1] = value
    with pytest.raises(EngineError, match="1 of 4 pictures"):
        metrics.update(logits, np.zeros(4, np.int64))
    assert metrics.images == 0


@pytest.mark.parametrize(
    ("logits", "labels", "error"),
    [
        (np.zeros((2, 3)), np.array([0, 3]), DataError),
        (np.zeros((2, 3)), np.array([-1, 0]), DataError),
        (np.zeros((2, 3)), np.array([0]), UsageError),
        (np.zeros(3), np.array([0, 1, 2]), UsageError),
        (np.zeros((2, 4)), np.array([0, 1]), UsageError),
    ],
)
def test_what_does_not_fit(logits, labels, error):
    metrics = Metrics(3)
    with pytest.raises(error):
        metrics.update(logits, labels)
    assert metrics.images == 0


def test_nothing_counted_has_no_figures():
    with pytest.raises(DataError, match="No picture"):
        Metrics(3).result()
    with pytest.raises(UsageError):
        Metrics(0)
    with pytest.raises(UsageError, match="another network"):
        Metrics(3).merge(Metrics(4))
