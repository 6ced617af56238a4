"""Layouts of data sets: each is recognised by its content, and its labels are the right ones."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from efficientformer.data.align import align
from efficientformer.data.listing import ListedSource, Names
from efficientformer.data.lists import MOST
from efficientformer.data.source import Subset
from efficientformer.data.sources import find_parts, open_source, open_splits, split_indices
from efficientformer.spec.errors import DataError, ImageError, MissingExtraError, UsageError
from efficientformer.spec.labels import label_names, synsets
from tests.pictures import write_folders


def encoded(seed=0, fmt="PNG"):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(out, fmt)
    return out.getvalue()


PICTURE = encoded()


def put(root, *paths, data=PICTURE):
    for path in paths:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


class Listed(ListedSource):
    """A source of names alone."""

    def read(self, index):
        return PICTURE


def labelled(source):
    return {source.name(i): source.classes[source.labels[i]] for i in range(len(source))}


# --- class folders


def test_class_folders(tmp_path):
    put(tmp_path, "dog/1.jpg", "dog/deep/er/2.PNG", "cat/x.webp", ".hidden/a.jpg", "cat/.b.jpg")
    put(tmp_path, "cat/notes.txt", "readme.md", "loose.jpg", "empty/nothing.txt")
    source = open_source(tmp_path)
    assert source.classes == ("cat", "dog")
    assert labelled(source) == {"cat/x.webp": "cat", "dog/1.jpg": "dog", "dog/deep/er/2.PNG": "dog"}
    assert source.labels.dtype == np.int64
    assert source.read(0) == PICTURE
    assert "4 files left out" in source.notes[0]
    assert "'empty'" in source.notes[1]


def test_an_archive_beside_the_folders_it_held_is_left_out(tmp_path):
    put(tmp_path, "cat/1.jpg", "dog/1.jpg", "photos.tar")
    source = open_source(tmp_path)
    assert (source.classes, "1 file left out" in source.notes[0]) == (("cat", "dog"), True)


def test_links_are_followed_and_circles_end(tmp_path):
    put(tmp_path, "elsewhere/1.jpg", "set/cat/2.jpg", "set/dog/3.jpg")
    (tmp_path / "set/cat/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/cat/self").symlink_to(tmp_path / "set/cat")
    source = open_source(tmp_path / "set")
    assert set(labelled(source)) == {"cat/2.jpg", "cat/more/1.jpg", "dog/3.jpg"}


def test_a_file_that_vanished_is_an_image_error(tmp_path):
    put(tmp_path, "cat/1.jpg", "dog/2.jpg")
    source = open_source(tmp_path)
    (tmp_path / "cat/1.jpg").unlink()
    with pytest.raises(ImageError):
        source.read(0)


def test_names_of_any_bytes_survive():
    names = ["a/ü.jpg", os.fsdecode(b"b/\xff.jpg"), "", "c"]
    packed = Names(names)
    assert [packed[i] for i in range(4)] == names
    assert Listed(names, [0, 0, 0, 0], ["x"]).name(-1) == "c"
    with pytest.raises(IndexError):
        Listed(names, [0, 0, 0, 0], ["x"]).name(4)


@pytest.mark.parametrize("alias", ["val", "validation", "valid", "test"])
def test_subfolders_are_parts(tmp_path, alias):
    put(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", f"{alias}/dog/3.jpg")
    assert set(labelled(open_source(tmp_path, "train"))) == {"cat/1.jpg", "dog/2.jpg"}
    assert set(labelled(open_source(tmp_path, "val"))) == {"dog/3.jpg"}
    assert set(labelled(open_source(tmp_path, "test"))) == {"dog/3.jpg"}
    with pytest.raises(DataError, match="Name one of: train, "):
        open_source(tmp_path)


def test_val_and_test_are_different_parts(tmp_path):
    put(tmp_path, "train/cat/1.jpg", "val/cat/2.jpg", "test/cat/3.jpg")
    assert list(find_parts(tmp_path)) == ["train", "val", "test"]
    assert open_source(tmp_path, "test").name(0) == "cat/3.jpg"
    assert open_splits(tmp_path).val.name(0) == "cat/2.jpg"


def test_classes_named_like_parts(tmp_path):
    put(tmp_path, "train/1.jpg", "car/2.jpg", "test/deep/3.jpg")
    assert open_source(tmp_path).classes == ("car", "test", "train")


def test_pictures_beside_parts_are_no_class(tmp_path):
    put(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "samples/4.jpg", "test/5.jpg")
    splits = open_splits(tmp_path)
    assert splits.train.classes == splits.val.classes == ("cat", "dog")
    assert all("left out beside train, val: 'samples', 'test'" in part.notes for part in (splits.train, splits.val))


@pytest.mark.parametrize("parts", [("train",), ("train", "val")], ids=", ".join)
def test_pictures_deeper_beside_parts_are_named(tmp_path, parts):
    put(tmp_path, *(f"{part}/{name}/{i}.jpg" for part in parts for name in ("cat", "dog") for i in "12"))
    put(tmp_path, "cats/old/1.jpg", "extra/a/b/2.png", "notes/a/readme.txt", "test/3.jpg")
    put(tmp_path, ".git/a/4.jpg", "__MACOSX/train/cat/._1.jpg")
    for source in (open_splits(tmp_path).val, open_source(tmp_path, "train")):
        assert source.notes == (f"left out beside {', '.join(parts)}: 'cats', 'extra', 'test'",)
        assert source.classes == ("cat", "dog")


def test_a_folder_beside_parts_need_not_be_readable(tmp_path, monkeypatch):
    put(tmp_path, "train/cat/1.jpg", "val/cat/2.jpg", "extra/3.jpg", "lost+found/4.jpg")
    real = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert open_source(tmp_path, "train").notes == ("left out beside train, val: 'extra'",)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_or_a_part_is_not_guessed(tmp_path, part):
    put(tmp_path, f"{part}/cat/1.jpg", f"{part}/dog/2.jpg", "samples/3.jpg")
    with pytest.raises(DataError, match=f"{part!r}.*is a part of a data set or one of its classes.*'samples'"):
        open_splits(tmp_path)


@pytest.mark.parametrize(
    ("part", "names"),
    [("val", ("val", "validation")), ("val", ("Val", "val")), ("train", ("train", "training"))],
    ids=str,
)
def test_of_two_folders_for_a_part_none_is_taken(tmp_path, part, names):
    put(tmp_path, "train/cat/1.jpg", "val/cat/2.jpg", *(f"{name}/cat/3.jpg" for name in names))
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("this file system does not tell Val from val")
    with pytest.raises(DataError, match=f"is the part {part!r}; expected one; found {names[0]!r}, {names[1]!r}"):
        open_splits(tmp_path)


def test_one_folder_for_a_part_may_go_by_two_names(tmp_path):
    put(tmp_path, "train/cat/1.jpg", "val/cat/2.jpg")
    (tmp_path / "validation").symlink_to("val")
    (tmp_path / "valid").mkdir()
    put(tmp_path, "testing/cat/3.jpg", "test/4.jpg")  # that without classes is no set
    assert {part: len(opener()) for part, opener in find_parts(tmp_path).items()} == {"train": 1, "val": 1, "test": 1}


def test_loose_pictures_beside_parts_are_named(tmp_path):
    put(tmp_path, "train/cat/1.jpg", "val/cat/2.jpg", "b.jpg", "a.PNG", "readme.md", ".c.jpg")
    splits = open_splits(tmp_path)
    assert splits.train.notes == splits.val.notes == ("left out beside train, val: 'a.PNG', 'b.jpg'",)
    put(tmp_path, "val.tar", "extra/3.jpg")
    assert open_source(tmp_path, "train").notes == (
        "left out beside train, val: 'extra'",
        "left out beside train, val: 'val.tar', 'a.PNG', 'b.jpg'",
    )


def test_notes_reach_what_is_made_of_a_source(tmp_path):
    put(tmp_path, "cat/1.jpg", "cat/2.jpg", "cat/notes.txt")
    source, splits = open_source(tmp_path), open_splits(tmp_path)
    assert source.notes == splits.train.notes == splits.val.notes == align(source, ("dog", "cat")).notes != ()


def test_pictures_of_a_test_without_labels_are_left_out(tmp_path):
    put(tmp_path, "train/cat/1.jpg", "train/cat/2.jpg", "test/1.jpg")
    assert list(find_parts(tmp_path)) == ["train"]


def test_loose_pictures_in_val_are_a_mistake(tmp_path):
    put(tmp_path, "train/cat/1.jpg", "val/1.jpg")
    with pytest.raises(DataError, match="Sort the pictures into one folder for each class"):
        open_splits(tmp_path)


def test_errors_say_what_was_expected(tmp_path):
    put(tmp_path, "flat/1.jpg", "file.jpg", "other/a/x.txt")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("missing", "nothing there"),
        ("file.jpg", "found a file"),
        ("empty", "an empty folder"),
        ("flat", "1 picture and no folder.*Sort the pictures"),
        ("other", "DIR/CLASS/picture.jpg; found 1 folder and 1 other file"),
        ("nul\0", "Cannot open|nothing there"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(tmp_path / name)
    with pytest.raises(UsageError, match="train, val, test"):
        open_source(tmp_path / "flat", "training")
    put(tmp_path, "whole/cat/1.jpg")
    with pytest.raises(DataError, match="one set that is not split"):
        open_source(tmp_path / "whole", "val")


# --- ImageNet


def test_all_synsets_give_imagenets_labels(tmp_path):
    for synset in synsets():
        put(tmp_path, f"{synset}/{synset}_1.JPEG", data=b"")
    source = open_source(tmp_path)
    assert source.classes == label_names("imagenet1k")
    assert source.labels.tolist() == list(range(1000))
    put(tmp_path, "n99999999/1.jpg")
    assert open_source(tmp_path).classes[-1] == "n99999999"


def test_ilsvrc_tree_and_kaggles_solution(tmp_path):
    root = tmp_path / "ILSVRC/Data/CLS-LOC"
    put(root, f"train/{synsets()[7]}/a.JPEG", f"train/{synsets()[2]}/b.JPEG", "test/ILSVRC2012_test_00000001.JPEG")
    put(root, "val/ILSVRC2012_val_00000001.JPEG", "val/ILSVRC2012_val_00000003.JPEG")
    with pytest.raises(DataError, match=r"LOC_val_solution.csv, or ILSVRC2012_devkit_t12"):
        open_source(tmp_path, "val")
    rows = ["ImageId,PredictionString", f"ILSVRC2012_val_00000003,{synsets()[2]} 1 2 3 4 {synsets()[2]} 5 6 7 8"]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"no label for 'ILSVRC2012_val_00000001.JPEG'"):
        open_source(tmp_path, "val")
    rows.append(f"ILSVRC2012_val_00000001,{synsets()[7]} 1 2 3 4")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(rows))
    assert open_source(tmp_path, "val").labels.tolist() == [7, 2]
    splits = open_splits(tmp_path)
    assert splits.train.classes == (synsets()[2], synsets()[7])
    assert splits.val.labels.tolist() == [1, 0]
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId\nILSVRC2012_val_00000001")
    with pytest.raises(DataError, match="a row of another form"):
        open_source(tmp_path, "val")


@pytest.mark.parametrize("archives", [("train", "val"), ("val",)])
def test_imagenets_own_archives_are_no_shards(tmp_path, archives):
    put(tmp_path, "val/ILSVRC2012_val_00000001.JPEG")
    for part in archives:
        (tmp_path / f"ILSVRC2012_img_{part}.tar").write_bytes(b"never read")
    (tmp_path / "LOC_val_solution.csv").write_text(f"ImageId,P\nILSVRC2012_val_00000001,{synsets()[7]} 1 2 3 4")
    assert open_source(tmp_path, "val").labels.tolist() == [7]


def test_pictures_beside_a_flat_validation_folder_are_named(tmp_path):
    put(tmp_path, "ILSVRC2012_val_00000001.JPEG", f"{synsets()[3]}/ILSVRC2012_val_00000293.JPEG")
    (tmp_path / "LOC_val_solution.csv").write_text(f"ImageId,P\nILSVRC2012_val_00000001,{synsets()[7]} 1 2 3 4")
    source = open_source(tmp_path)
    assert len(source) == 1
    assert f"the pictures in '{synsets()[3]}' left out" in source.notes[-1]


def write_devkit(folder, truth):
    io_ = pytest.importorskip("scipy.io")
    folder.mkdir(parents=True)
    wnids = sorted(synsets(), reverse=True)  # an order of its own, as the real one has
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    rows = [(i, wnid, "words") for i, wnid in enumerate(wnids, 1)] + [(1001, "n00001740", "entity")]
    io_.savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(map(str, truth)) + "\n")
    return wnids


def test_devkit(tmp_path, monkeypatch):
    kit = tmp_path / "ILSVRC2012_devkit_t12/data"
    wnids = write_devkit(kit, [490, 361, 1000])
    put(tmp_path, *(f"val/ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2, 3)))
    source = open_source(tmp_path / "val")
    assert [synsets()[label] for label in source.labels] == [wnids[489], wnids[360], wnids[999]]
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n1001\n3")
    with pytest.raises(DataError, match="'1001' in line 2"):
        open_source(tmp_path / "val")
    (kit / "meta.mat").write_bytes(b"\0" * 300)
    with pytest.raises(DataError, match=r"meta.mat"):
        open_source(tmp_path / "val")
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(MissingExtraError, match=r"efficientformer\[train\]"):
        open_source(tmp_path / "val")


def test_synsets_in_file_names(tmp_path):
    put(tmp_path, f"{synsets()[5]}_ray.JPEG", f"{synsets()[1]}_goldfish.JPEG")
    source = align(open_source(tmp_path), label_names("imagenet1k"))
    assert {source.name(i)[:9]: int(label) for i, label in enumerate(source.labels)} == {
        synsets()[1]: 1,
        synsets()[5]: 5,
    }


# --- splits


def counted(source):
    return np.bincount(source.labels, minlength=len(source.classes)).tolist()


def test_splitting_is_stratified_disjoint_and_complete(tmp_path):
    for name, count in (("a", 40), ("b", 20), ("c", 2), ("d", 1)):
        put(tmp_path, *(f"{name}/{i}.jpg" for i in range(count)))
    splits = open_splits(tmp_path, val_fraction=0.1, seed=3)
    assert counted(splits.val) == [4, 2, 1, 0]
    assert counted(splits.train) == [36, 18, 1, 1]
    train, val = set(labelled(splits.train)), set(labelled(splits.val))
    assert not train & val
    assert len(train | val) == 63
    assert "7 pictures of 63" in splits.note
    again, other = (open_splits(tmp_path, val_fraction=0.1, seed=seed) for seed in (3, 4))
    assert again.val.digest() == splits.val.digest() != other.val.digest()
    assert counted(open_splits(tmp_path, val_fraction=0.99).train) == [1, 1, 1, 1]


def test_splitting_does_not_depend_on_machine_or_listing():
    names = [f"a/{i}.jpg" for i in range(10)]
    _, val = split_indices(Listed(names, [0] * 10, ["a"]), 0.3, 0)
    assert [names[i] for i in val] == ["a/0.jpg", "a/1.jpg", "a/3.jpg"]  # frozen: a change moves users' pictures
    _, back = split_indices(Listed(names[::-1], [0] * 10, ["a"]), 0.3, 0)
    assert {names[::-1][i] for i in back} == {names[i] for i in val}


def test_new_pictures_move_the_cut_of_their_own_class():
    names = [f"{name}/{i}.jpg" for name in "ab" for i in range(40)]
    grown = [*names[:40], *(f"a/{i}.jpg" for i in range(100, 140)), *names[40:]]
    held = [{every[i] for i in split_indices(Listed(every, [each[0] == "b" for each in every], "ab"), 0.2, 0)[1]}
            for every in (names, grown)]  # fmt: skip
    before, after = ({name for name in each if name[0] == "a"} for each in held)
    assert held[0] - before == held[1] - after
    assert 0 < len(after & set(names) - before) <= len(after) - len(before), "some that were trained on"


def test_validation_gets_the_labels_of_training(tmp_path):
    put(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "train/c/3.jpg", "val/c/4.jpg", "val/B/5.jpg")
    splits = open_splits(tmp_path)
    assert splits.val.classes == splits.train.classes == ("a", "b", "c")
    assert labelled(splits.val) == {"c/4.jpg": "c", "B/5.jpg": "b"}
    assert splits.val.read(0) == PICTURE
    put(tmp_path, "val/cc/6.jpg")
    with pytest.raises(DataError, match=r"1 class without .* found 'cc' \(nearest: 'c'\)"):
        open_splits(tmp_path)


def test_too_little_to_split(tmp_path):
    put(tmp_path, "a/1.jpg", "b/2.jpg")
    with pytest.raises(DataError, match="a class with two pictures"):
        open_splits(tmp_path)
    for fraction in (0, 1, -1, float("nan")):
        with pytest.raises(UsageError, match="val_fraction"):
            open_splits(tmp_path, val_fraction=fraction)


# --- align


def listed(*classes):
    return Listed([f"{i}.jpg" for i in range(len(classes))], range(len(classes)), classes)


def aligned(source, labels):
    return align(source, tuple(labels)).labels.tolist()


def test_align_by_name_case_and_synset():
    source = listed("cat", "dog")
    assert align(source, ("cat", "dog")) is source
    assert aligned(source, ("x", "dog", "cat")) == [2, 1]
    assert aligned(listed("Dog", "CAT"), ("x", "dog", "cat")) == [1, 2]
    assert aligned(listed(synsets()[999], synsets()[3]), label_names("imagenet1k")) == [999, 3]
    assert aligned(listed("goldfish, Carassius auratus"), label_names("imagenet1k")) == [1]
    assert align(listed("dog"), ("cat", "dog")).classes == ("cat", "dog")
    assert aligned(listed("cafe\u0301"), ("tea", "caf\u00e9")) == [1]  # as macOS writes it


def test_imagenets_classes_and_a_network_with_some_of_their_names():
    labels = ("goldfish, Carassius auratus", "tench, Tinca tinca", "crane")  # two of ImageNet's classes are cranes
    names = label_names("imagenet1k")
    source = Listed(["a", "b"], [0, 1], names)
    assert aligned(source, labels) == [1, 0]
    with pytest.raises(DataError, match="'crane'"):
        aligned(Listed(["a"], [names.index("crane")], names), labels)


def test_align_never_gives_one_label_to_two_classes():
    assert aligned(listed("Cat", "cat"), ("cat", "CAT", "Cat")) == [2, 0]
    with pytest.raises(DataError, match="'Cat'"):
        aligned(listed("Cat", "cat"), ("cat", "dog"))
    with pytest.raises(DataError, match="'crane'"):  # two classes of ImageNet-1k have this name
        aligned(listed("crane"), label_names("imagenet1k"))


def test_align_names_what_does_not_fit():
    with pytest.raises(DataError, match=r"'dogg' \(nearest: 'dog'\).*The number of classes is the same"):
        aligned(listed("cat", "dogg"), ("cat", "dog"))
    with pytest.raises(DataError, match="Rename the class folders") as caught:
        aligned(listed(*(f"q{i}" for i in range(9))), ("cat", "dog"))
    assert "and 4 more" in str(caught.value)


def unnamed(*classes):
    source = listed(*classes)
    source.unnamed = True
    return source


def test_numbers_are_labels_where_classes_have_no_names():
    assert aligned(unnamed("0", "1"), ("cat", "dog", "frog")) == [0, 1]
    assert "names no classes" in align(unnamed("0", "1"), ("cat", "dog", "frog")).notes[-1]
    assert aligned(unnamed("0", "1"), ("1", "0")) == [1, 0]
    with pytest.raises(DataError):
        aligned(unnamed("0", "1", "2"), ("cat", "dog"))


def test_classes_without_pictures_need_no_counterpart():
    source = Listed(["a"], [1], ["unknown", "dog"])
    assert aligned(source, ("cat", "dog")) == [1]


@pytest.mark.parametrize(("train", "val"), [("Training", "Testing"), ("TRAIN", "Valid"), ("train", "dev")])
def test_parts_go_by_many_names(tmp_path, train, val):
    write_folders(tmp_path / train, per_class=3)
    write_folders(tmp_path / val, per_class=2)
    splits = open_splits(tmp_path)
    assert (len(splits.train), len(splits.val)) == (9, 6)


def test_data_sets_are_no_classes(tmp_path):
    write_folders(tmp_path / "set" / "train", per_class=2)
    write_folders(tmp_path / "set" / "val", per_class=2)
    with pytest.raises(DataError, match="no class but a data set"):
        open_source(tmp_path)


def test_a_validation_part_alone_is_not_trained_on(tmp_path):
    write_folders(tmp_path / "val", per_class=3)
    with pytest.raises(DataError, match="no training part"):
        open_splits(tmp_path)


def test_numbers_that_do_not_occur_need_no_label():
    source = Listed(["a", "b", "c"], [0, 2, 4], map(str, range(5)))
    source.unnamed = True
    assert aligned(source, ("cat", "dog", "frog", "newt", "toad")) == [0, 2, 4]
    assert aligned(Subset(source, [1, 2]), ("cat", "dog", "frog", "newt", "toad")) == [2, 4]
    with pytest.raises(DataError, match="not those of the network"):
        aligned(source, ("cat", "dog", "frog", "newt"))


def test_folders_named_by_numbers_are_not_taken_for_labels(tmp_path):
    root = write_folders(tmp_path / "d", per_class=2)
    for number, name in enumerate(("blue", "green", "red")):
        (root / name).rename(root / str(number))
    with pytest.raises(DataError, match="not those of the network"):
        align(open_source(root), ("cat", "dog", "ship"))


# --- lists


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.csv", "file,label\na/1.png,dog\nb/2.png,cat\n"),
        ("data.CSV", '\ufeffid,Class,File_Name,note\r\n7,dog,a/1.png,\r\n8,cat, b/2.png ,"x,\ny"\r\n'),
        ("data.csv", "a/1.png,dog\nb/2.png,cat"),
        ("data.tsv", "label\timage\ndog\ta/1.png\n\ncat\tb/2.png\n"),
        ("data.csv", "\ufeffPath;Label\r\na/1.png;dog\r\n;\r\nb/2.png;cat\r\n"),
        ("data.csv", "image_id,label\na\\1.png,dog\nb\\2.png,cat\n"),
        ("data.txt", "a/1.png dog\nb/2.png\tcat\n\n"),
    ],
)
def test_a_list_names_pictures_and_classes(tmp_path, name, text):
    put(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / name).write_bytes(text.encode())
    source = open_source(tmp_path / name)
    assert (source.classes, source.unnamed) == (("cat", "dog"), False)
    assert labelled(source) == {"a/1.png": "dog", "b/2.png": "cat"}
    assert source.read(0) == PICTURE


def test_numbers_in_a_list_are_labels(tmp_path):
    put(tmp_path, "lists/1.png", "with space 2.png")
    path = tmp_path / "lists" / "train.txt"
    path.write_text(f"1.png 2\n{tmp_path}/with space 2.png 0\n")
    source = open_source(path)
    assert (source.classes, source.unnamed, source.labels.tolist()) == (("0", "1", "2"), True, [2, 0])
    assert source.notes == ("no picture of the classes '1', below 2: labels begin at 0",)
    assert source.read(1) == PICTURE
    (tmp_path / "classes.txt").write_text("ant\nbee\ncow\n")
    source = open_source(path)
    assert (source.classes, source.unnamed) == (("ant", "bee", "cow"), False)
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(DataError, match="out of range; expected 0 to 1; found 2"):
        open_source(path)
    (tmp_path / "classes.txt").unlink()
    path.write_text(f"1.png {10**30}")
    with pytest.raises(DataError, match="out of range"):
        open_source(path)


def test_a_list_may_be_divided(tmp_path):
    put(tmp_path, *(f"{number}.png" for number in range(6)))
    parts = ("train", "train", "train", "Valid", "val", "test")
    lines = (f"{number}.png,{'cat' if number % 2 else 'dog'},{part}" for number, part in enumerate(parts))
    (tmp_path / "all.csv").write_text("\n".join(["path,category,split", *lines]))
    found = {part: len(opener()) for part, opener in find_parts(tmp_path / "all.csv").items()}
    assert found == {"train": 3, "val": 2, "test": 1}
    splits = open_splits(tmp_path / "all.csv")
    assert (labelled(splits.val), splits.val.classes) == ({"3.png": "cat", "4.png": "dog"}, ("cat", "dog"))


def test_tables_in_a_folder_are_its_parts(tmp_path):
    put(tmp_path, *(f"train/{number}.png" for number in range(4)))
    (tmp_path / "train.csv").write_text("file,label\n" + "".join(f"train/{n}.png,c{n % 2}\n" for n in range(4)))
    (tmp_path / "test.csv").write_text("file\ntest/1.png\n")  # Kaggle's: what is to be found out
    (tmp_path / "val.txt").write_text("how these pictures were chosen")
    assert list(find_parts(tmp_path)) == ["train"]
    assert len(open_splits(tmp_path, 0.5).val) == 2
    (tmp_path / "Validation.csv").write_text("file,label\ntrain/1.png,c1\n")
    assert list(find_parts(tmp_path)) == ["train", "val"]
    put(tmp_path, *(f"{number}.txt" for number in range(MOST)))  # such as a caption beside each picture
    assert list(find_parts(tmp_path)) == ["train", "val"]
    put(tmp_path, "train/c0/1.png", "train/c1/1.png")
    for number in range(4):
        (tmp_path / f"train/{number}.png").unlink()
    assert open_source(tmp_path, "train").name(0) == "c0/1.png", "folders speak for themselves"


def test_lists_that_are_not_used_are_named(tmp_path):
    put(tmp_path, "1.png")
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).write_text("1.png cat\n")
    for name in ("train.csv", "Validation.csv", "labels.csv"):
        (tmp_path / name).write_text("file,label\n1.png,cat\n")
    note = "left out beside train, val: 'Validation.csv', 'labels.csv', 'train.csv'"
    assert open_source(tmp_path, "train").notes == (note,)
    for name in ("train.txt", "val.txt", "Validation.csv"):
        (tmp_path / name).unlink()
    (tmp_path / "train.csv").write_text("file,label,split\n1.png,cat,train\n")
    assert open_source(tmp_path, "train").notes == ("left out beside train: 'labels.csv'",)


def test_a_table_of_a_folder_may_divide_itself(tmp_path):
    put(tmp_path, "train_images/1.png", "train_images/2.png", "test_images/3.png")
    text = "path,label,split\ntrain_images/1.png,cat,train\ntrain_images/2.png,dog,val\n"
    for name in ("Train.CSV", "labels.csv"):
        (tmp_path / name).write_text(text)
        assert {part: len(opener()) for part, opener in find_parts(tmp_path).items()} == {"train": 1, "val": 1}
        (tmp_path / name).unlink()
    (tmp_path / "labels.csv").write_text(text.replace(",split", "").replace(",train", "").replace(",val", ""))
    assert open_source(tmp_path).classes == ("cat", "dog")
    put(tmp_path, "cat/1.png")
    assert open_source(tmp_path).classes == ("cat", "test_images", "train_images"), "folders speak for themselves"


@pytest.mark.parametrize("name", ["train.txt", "train/metadata.csv"])
def test_lists_of_mmpretrain_and_hugging_face(tmp_path, name):
    for part, label in (("train", 1), ("val", 0)):
        put(tmp_path, f"{part}/1.png")
        path = tmp_path / name.replace("train", part)
        path.write_text(f"{part}/1.png {label}" if name == "train.txt" else f"file_name,label\n1.png,{label}\n")
    assert list(find_parts(tmp_path)) == ["train", "val"]
    assert open_source(tmp_path, "train").read(0) == PICTURE
    assert open_source(tmp_path, "train").labels.tolist() == [1]


@pytest.mark.parametrize("folders", [("train_images", "test_images"), ("Train", "Test"), ("images",)])
def test_piles_of_pictures_are_no_classes(tmp_path, folders):
    put(tmp_path, *(f"{name}/1.png" for name in folders))
    (tmp_path / "train.csv").write_text("id,label\n1,cat\n")
    with pytest.raises(DataError, match=r"is named as a class; .*found pictures in .*, and 'train\.csv'\. Have a"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Cannot tell the columns"),
        ("file,label\n1.png,big, fat cat\n", r"too many cells; expected 2 .*quotes; found line 2: '1\.png', 'big'"),
        ('file,label\n1.png,"cat\n1.png,dog\n', r"not whole; .* found line 3: picture '1\.png', class 'cat\\n1"),
        ("file,label", "lists nothing"),
        ("id,label\n1,cat", r"expected a column file or filename .*; found 'id,label\\n'"),
        ("file,label\n1.png,cat\n1.png\n", r"not whole; .* found line 3: picture '1\.png', class ''"),
        ("file,label\n2.png,cat\n3.png,dog\n", r"not there; expected files in .*; found no '2\.png', '3\.png'"),
        ("file,label,split\n1.png,cat,fold1\n", "Unknown part in line 2 .* found fold1"),
        ("file,label,split\n1.png,cat,train\n1.png,cat,\n", "Line 3 .* names no part"),
        ("file,label\n1.png,c\xe9t\n", "expected a list in UTF-8"),
        (f"file,label\n1.png,{'c' * 200_000}\n", "field larger"),
    ],
)
def test_lists_that_are_none(tmp_path, text, message):
    put(tmp_path, "1.png")
    (tmp_path / "data.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "data.csv")


def test_lines_of_a_list_that_no_file_or_label_can_be_are_no_traceback(tmp_path):
    put(tmp_path, "a.png")
    path = tmp_path / "train.csv"
    path.write_text(f"file,label\n{'u' * 300}.png,dog\na.png,cat\n")
    assert open_source(path).classes == ("cat", "dog")
    path.write_text(f"file,label\na.png,{'9' * 5000}\n")
    with pytest.raises(DataError, match="out of range"):
        open_source(path)
    path.write_text(f"file,label\na.png,{'0' * 5000}\n")
    assert open_source(path).labels.tolist() == [0]
