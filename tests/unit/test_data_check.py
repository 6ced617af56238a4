"""The check of a data set finds what is wrong with it, and nothing else."""

import io
import json
import random
import shutil
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from efficientformer.data import fingerprint
from efficientformer.data.check import check
from efficientformer.data.fingerprint import BANDS, FINGERPRINT, NEAR_BITS, near_pairs
from efficientformer.data.sources import VAL_FRACTION, open_source, open_splits, split_indices
from efficientformer.runtime.preprocess import MAX_SIDE
from efficientformer.spec.errors import DataError, ImageError
from efficientformer.spec.labels import synsets
from efficientformer.training.recipe import Recipe


def scene(seed, size=(48, 40)):
    """A picture with structure: coloured patches, enlarged."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def data_set(tmp_path):
    """Twelve different pictures in each class and part; nothing is wrong."""
    seed = 0
    for split, count in (("train", 12), ("val", 3)):
        for name in ("cat", "dog"):
            for i in range(count):
                seed += 1
                save(scene(seed), tmp_path / split / name / f"{i:02d}.png")
    return tmp_path


def shown(groups):
    return [(g.kind, sorted(map(str, g.pictures)), g.leak, g.contradiction) for g in groups]


def test_a_good_data_set(data_set):
    seen = []
    report = check(data_set, progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert (report.corrupt, report.groups, report.odd, report.notes, report.unknown_classes) == ((), (), (), (), ())
    assert report.pictures == 30
    assert (report.sizes, report.forms) == (((48, 40), (48, 40)), (("PNG RGB", 30),))
    assert seen[-1] == (30, 30)


def test_unreadable_pictures(data_set):
    (data_set / "train/cat/03.png").write_bytes(b"not a picture")
    cut = data_set / "val/dog/01.png"
    cut.write_bytes(cut.read_bytes()[:200])
    report = check(data_set)
    assert not report.ok
    assert [str(each.picture) for each in report.corrupt] == ["train/cat/03.png", "val/dog/01.png"]
    assert "not a picture" in report.corrupt[0].reason
    assert report.pictures == 30


def test_same_file_as_a_leak_and_as_a_contradiction(data_set):
    train, val = data_set / "train", data_set / "val"
    (train / "cat/copy.png").write_bytes((train / "cat/00.png").read_bytes())
    (val / "dog/copy.png").write_bytes((train / "dog/01.png").read_bytes())
    (train / "dog/copy.png").write_bytes((train / "cat/02.png").read_bytes())
    report = check(data_set)
    assert shown(report.groups) == [
        ("bytes", ["train/dog/01.png", "val/dog/copy.png"], True, False),
        ("bytes", ["train/cat/02.png", "train/dog/copy.png"], False, True),
        ("bytes", ["train/cat/00.png", "train/cat/copy.png"], False, False),
    ]
    assert (len(report.leaks), len(report.contradictions), report.ok) == (1, 1, False)


def test_superfluous_copies_alone_are_not_wrong(data_set):
    (data_set / "train/cat/copy.png").write_bytes((data_set / "train/cat/00.png").read_bytes())
    assert check(data_set).ok


def test_same_pixels_in_another_file(data_set):
    save(scene(1), data_set / "val/cat/again.bmp")
    report = check(data_set, near=False)
    assert shown(report.groups) == [("pixels", ["train/cat/00.png", "val/cat/again.bmp"], True, False)]


@pytest.mark.parametrize("change", ["jpeg", "half", "brighter"])
def test_look_alikes(data_set, change):
    image = scene(5, (480, 400))
    save(image, data_set / "train/cat/large.png")
    if change == "half":
        image = image.resize((240, 200), Image.Resampling.BICUBIC)
    elif change == "brighter":
        image = image.point(lambda value: min(255, value + 8))
    save(image, data_set / "val/dog/alike.jpg", quality=60)
    (data_set / "train/cat/04.png").unlink()  # seed 5 in small
    report = check(data_set)
    assert shown(report.groups) == [("near", ["train/cat/large.png", "val/dog/alike.jpg"], True, True)]
    assert check(data_set, near=False).groups == ()


def test_plain_pictures_are_not_look_alikes(data_set):
    for value in range(5):
        save(Image.new("RGB", (40, 40), (value, 0, 0)), data_set / f"train/cat/plain{value}.png")
    assert check(data_set).groups == ()


def test_recoloured_pictures_are_not_look_alikes(data_set):
    save(scene(3).point(lambda value: value // 2 + 120), data_set / "val/cat/pale.png")
    assert check(data_set).groups == ()


def test_odd_sizes(data_set):
    save(Image.new("RGB", (7, 30)), data_set / "train/cat/tiny.png")
    save(Image.new("L", (400, 39)), data_set / "train/cat/strip.png")
    report = check(data_set)
    assert [(str(each.picture), each.reason) for each in report.odd] == [
        ("train/cat/strip.png", "elongated: 400 x 39"),
        ("train/cat/tiny.png", "tiny: 7 x 30"),
    ]
    assert report.ok
    assert dict(report.forms)["PNG L"] == 1
    assert report.sizes == ((7, 30), (400, 40))


def test_balance(data_set):
    for i in range(12):
        save(scene(100 + i), data_set / f"train/dog/more{i}.png")
    train, val = check(data_set).balances
    assert train.classes == (("cat", 12), ("dog", 24))
    assert (train.ratio, train.small) == (2.0, [])
    assert (val.pictures, val.ratio, val.small) == (6, 1.0, ["cat", "dog"])


def test_classes_only_in_the_validation_part(data_set):
    save(scene(99), data_set / "val/fox/1.png")
    report = check(data_set)
    assert (report.unknown_classes, report.ok) == (("fox",), False)


def test_names_that_training_takes_for_one_class_are_one(data_set):
    save(scene(98), data_set / "train/caf\u00e9/1.png")
    save(scene(99), data_set / "val/Cafe\u0301/1.png")
    assert check(data_set).ok
    assert open_splits(data_set).val.classes == open_splits(data_set).train.classes


def test_copies_that_a_training_would_divide(tmp_path):
    for seed in range(20):
        for name in ("cat", "dog"):
            file = save(scene(seed + 100 * (name == "cat")), tmp_path / f"{name}/{seed}.png")
            shutil.copy(file, file.with_stem(f"{seed} copy"))
    report = check(tmp_path)
    assert not report.ok
    train, held_out = split_indices(open_source(tmp_path), VAL_FRACTION, 0)
    pairs = [{each.index for each in group.pictures} for group in report.groups]
    torn = sum(bool(pair & set(train) and pair & set(held_out)) for pair in pairs)
    assert torn > 3
    assert f"{torn} of the groups of copies" in report.obstacles[0]
    assert Recipe().val_fraction == VAL_FRACTION
    (tmp_path / "train").mkdir()
    for name in ("cat", "dog"):
        shutil.move(tmp_path / name, tmp_path / "train" / name)
        save(scene(999 + len(name) * (name == "cat")), tmp_path / f"val/{name}/1.png")
    assert check(tmp_path).ok


def test_what_cannot_be_trained_on(tmp_path):
    save(scene(1), tmp_path / "cat/1.png")
    assert [text.partition(",")[0] for text in check(tmp_path).obstacles] == [
        "there is one class", "no class has two pictures",
    ]  # fmt: skip
    (tmp_path / "cat").rename(tmp_path / "val")
    (tmp_path / "val/cat").mkdir()
    (tmp_path / "val/1.png").rename(tmp_path / "val/cat/1.png")
    assert check(tmp_path).obstacles == ()  # only to measure on


def test_some_of_imagenets_classes_against_all_of_them(tmp_path):
    wnid = synsets()[7]
    save(scene(1), tmp_path / f"train/{wnid}/1.png")
    shutil.copy(save(scene(1), tmp_path / "x.jpg"), tmp_path / f"train/{wnid}/2.jpg")
    (tmp_path / "val").mkdir()
    (tmp_path / "x.jpg").rename(tmp_path / "val/ILSVRC2012_val_00000001.JPEG")
    (tmp_path / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\nILSVRC2012_val_00000001,{wnid} 1 2 3 4")
    report = check(tmp_path, near=False)
    assert (report.unknown_classes, report.contradictions, len(report.leaks)) == ((), (), 1)


def test_a_set_that_is_not_split_and_its_notes(tmp_path):
    save(scene(1), tmp_path / "cat/1.png")
    (tmp_path / "cat/notes.txt").write_text("x")
    report = check(tmp_path)
    assert [str(each.split) for each in report.balances] == ["all"]
    assert report.notes == ("all: 1 file left out: not a picture in a class folder",)


def test_nothing_readable_and_nothing_there(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.png").write_bytes(b"")
    report = check(tmp_path)
    assert (len(report.corrupt), report.sizes) == (1, ((0, 0), (0, 0)))
    with pytest.raises(DataError):
        check(tmp_path / "missing")


def test_the_report_is_json(data_set):
    (data_set / "val/dog/copy.png").write_bytes((data_set / "train/dog/01.png").read_bytes())
    found = json.loads(json.dumps(check(data_set).to_dict()))
    assert (found["ok"], found["pictures"]) == (False, 31)
    assert found["groups"][0] == {
        "kind": "bytes",
        "leak": True,
        "contradiction": False,
        "pictures": [{"picture": "train/dog/01.png", "class": "dog"}, {"picture": "val/dog/copy.png", "class": "dog"}],
    }


def test_fingerprints_of_a_picture_and_of_its_file(tmp_path):
    """A set that gives decoded pictures (idx) is checked as one that gives files."""
    out = np.zeros(2, FINGERPRINT)
    image, buffer = scene(1), io.BytesIO()
    image.save(buffer, "PNG")
    assert fingerprint.take(image, "a", out[0:1].reshape(())) == "array RGB"
    assert fingerprint.take(buffer.getvalue(), "b", out[1:2].reshape(())) == "PNG RGB"
    assert out["pixels"][0] == out["pixels"][1]
    assert out["file"][0] != out["file"][1]


def test_a_picture_too_long_to_resize_is_refused():
    out = np.zeros(1, FINGERPRINT)
    with pytest.raises(ImageError, match="no side above 1,048,576"):
        fingerprint.take(Image.new("L", (MAX_SIDE + 1, 1)), "a", out.reshape(()))
    assert not out["read"][0]


def test_forms_are_told_whatever_the_host_set_in_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    buffer = io.BytesIO()
    scene(1).save(buffer, "PPM")
    assert fingerprint.take(buffer.getvalue(), "a", np.zeros((), FINGERPRINT)) == "PPM RGB"


def prints(looks):
    out = np.zeros(len(looks), FINGERPRINT)
    out["look"] = np.array(looks, np.uint16).reshape(-1, BANDS)
    return out


def flipped(look, bits):
    value = np.unpackbits(look.view(np.uint8))
    value[bits] ^= 1
    return np.packbits(value).view("<u2")


def test_all_pairs_within_the_distance_are_found_and_none_beyond():
    rng, choose = np.random.default_rng(0), random.Random(0)
    looks, near = [], set()
    for i in range(300):
        look = rng.integers(0, 1 << 16, BANDS, dtype=np.uint16)
        distance = i % (2 * NEAR_BITS)
        looks += [look, flipped(look, choose.sample(range(256), distance))]
        if distance <= NEAR_BITS:
            near.add((2 * i, 2 * i + 1))
    pairs, complete = near_pairs(prints(looks))
    assert complete
    assert set(map(tuple, pairs.tolist())) == near


def test_two_equal_bands_are_enough_whichever_they_are():
    rng, looks = np.random.default_rng(1), []
    for kept in combinations(range(BANDS), 2):
        look = rng.integers(0, 1 << 16, BANDS, dtype=np.uint16)
        looks += [look, look ^ np.array([band not in kept for band in range(BANDS)], np.uint16)]
    pairs, _ = near_pairs(prints(looks))
    assert pairs.tolist() == [[i, i + 1] for i in range(0, len(looks), 2)]


def test_a_crowd_of_equal_looks_costs_no_quadratic_time_and_is_told(monkeypatch):
    monkeypatch.setattr(fingerprint, "MAX_BUCKET", 8)
    look = np.random.default_rng(0).integers(0, 1 << 16, BANDS, dtype=np.uint16)
    pairs, complete = near_pairs(prints([look] * 200))
    assert not complete
    assert len(pairs) == sum(200 - shift for shift in range(1, 9))
    assert near_pairs(prints([]))[0].shape == (0, 2)


def test_labels_that_begin_at_1_leave_a_class_without_pictures(tmp_path):
    for number in range(6):
        save(scene(number), tmp_path / f"{number}.png")
    (tmp_path / "data.txt").write_text("".join(f"{number}.png {number % 3 + 1}\n" for number in range(6)))
    assert check(tmp_path / "data.txt").obstacles == ("1 class without a picture to learn from: '0'",)
