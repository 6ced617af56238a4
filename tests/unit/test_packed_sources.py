"""Data sets packed into files: tar shards, idx and CIFAR's."""

import gzip
import io
import json
import pickle
import struct
import tarfile
import threading
from unittest.mock import Mock

import numpy as np
import pytest

from efficientformer.data.sources import _holds_shards, find_parts, open_source, open_splits
from efficientformer.runtime.image import decode
from efficientformer.spec.errors import DataError, ImageError
from tests.unit.test_sources import PICTURE, encoded, labelled, put

# --- tar shards


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_shards(tmp_path):
    pictures = [encoded(i) for i in range(4)]
    write_tar(
        tmp_path / "a.tar", [("0.png", pictures[0]), ("0.cls", b"2\n"), ("d/1.cls", b"0"), ("d/1.jpg", pictures[1])]
    )
    meta = json.dumps({"label": 1, "other": [1]}).encode()
    write_tar(tmp_path / "b.tar", [("x.y/2.webp", pictures[2]), ("x.y/2.json", meta), ("x.y/2.txt", b"caption")])
    source = open_source(tmp_path)
    assert labelled(source) == {"a.tar/0": "2", "a.tar/d/1": "0", "b.tar/x.y/2": "1"}
    assert [source.read(i) for i in range(3)] == pictures[:3]
    assert "1 file in the tar files left out" in source.notes
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(2) == pictures[2]
    (tmp_path / "classes.txt").write_text("cat\ndog\nfrog\n")
    assert open_source(tmp_path).classes == ("cat", "dog", "frog")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match="expected 0 to 1; found 2"):
        open_source(tmp_path)


def test_shards_by_split(tmp_path):
    write_tar(
        tmp_path / "imagenet-train-0000.tar", [("0.png", PICTURE), ("0.cls", b"0"), ("1.png", PICTURE), ("1.cls", b"1")]
    )
    write_tar(tmp_path / "imagenet-validation-0000.tar", [("2.png", PICTURE), ("2.cls", b"1")])
    splits = open_splits(tmp_path)
    assert (len(splits.train), splits.val.labels.tolist()) == (2, [1])
    assert open_source(tmp_path, "val").name(0) == "imagenet-validation-0000.tar/2"


@pytest.mark.parametrize("folders", [("train", "val"), ("val",)])
def test_archives_beside_the_folders_of_a_split_are_left_out(tmp_path, folders):
    shard = write_tar(tmp_path / "train_images.tar", [("0.png", PICTURE), ("0.cls", b"0")])
    put(tmp_path, *(f"{part}/{name}/1.jpg" for part in folders for name in ("cat", "dog")))
    parts = find_parts(tmp_path)
    if "train" in folders:
        assert list(parts) == ["train", "val"]
        assert parts["train"]().classes == ("cat", "dog")
        assert parts["train"]().notes == ("left out beside train, val: 'train_images.tar'",)
        return
    assert list(parts) == ["train"]  # what the folders lack is in the shards
    assert parts["train"]().name(0) == f"{shard.name}/0"
    assert parts["train"]().notes == ("left out beside train: 'val'",)


def test_shards_and_pictures_beside_the_shards_of_a_split_are_named(tmp_path):
    for name in ("train", "val", "extra"):
        write_tar(tmp_path / f"{name}-0.tar", [("0.png", PICTURE), ("0.cls", b"0")])
    put(tmp_path, "cats/old/1.jpg", "notes/readme.txt", "loose.jpg")
    splits = open_splits(tmp_path)
    assert splits.train.notes == splits.val.notes == ("left out beside train, val: 'cats', 'extra-0.tar', 'loose.jpg'",)


@pytest.mark.parametrize("others", [("mask.png", "seg.png"), ("depth.PNG",)], ids=", ".join)
@pytest.mark.parametrize("first", [True, False], ids=["picture first", "picture last"])
def test_the_picture_of_a_sample_is_that_with_nothing_but_a_pictures_ending(tmp_path, others, first):
    members = [("d/0.jpg", PICTURE), *((f"d/0.{ending}", encoded(1)) for ending in others)]
    write_tar(tmp_path / "a.tar", [*(members if first else members[::-1]), ("d/0.cls", b"1")])
    source = open_source(tmp_path)
    assert (labelled(source), source.read(0)) == ({"a.tar/d/0": "1"}, PICTURE)
    assert source.notes == (f"{len(others)} file{'s' * (len(others) > 1)} in the tar files left out",)


@pytest.mark.parametrize(
    "names", [("train.tar", "val.tar"), ("train0000.tar", "val0000.tar"), ("a-train.tar", "Dev.tar")]
)
def test_single_shards_are_parts_too(tmp_path, names):
    for name in names:
        write_tar(tmp_path / name, [("0.png", PICTURE), ("0.cls", b"0")])
    parts = find_parts(tmp_path)
    assert {part: parts[part]().name(0) for part in parts} == {"train": f"{names[0]}/0", "val": f"{names[1]}/0"}


def test_shards_are_read_where_there_is_no_pread(tmp_path, monkeypatch):
    monkeypatch.delattr("os.pread")  # Windows
    write_tar(tmp_path / "a.tar", [("0.png", PICTURE), ("0.cls", b"0")])
    assert open_source(tmp_path).read(0) == PICTURE


def test_shards_are_read_by_many_threads(tmp_path):
    pictures = [encoded(i) for i in range(20)]
    write_tar(tmp_path / "a.tar", [m for i, p in enumerate(pictures) for m in ((f"{i}.png", p), (f"{i}.cls", b"0"))])
    source = open_source(tmp_path)
    wrong = []

    def work():
        wrong.extend(i for _ in range(20) for i in range(20) if source.read(i) != pictures[i])

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.png", PICTURE)], "No label for 'a.tar/0'"),
        ([("0.png", PICTURE), ("0.cls", b"-1")], "a label as an ascii number"),
        ([("0.png", PICTURE), ("0.cls", b"cat")], "a label as an ascii number"),
        ([("0.png", PICTURE), ("0.cls", b"99999999")], "below 65,536"),
        ([("0.png", PICTURE), ("0.json", b"[" * 9999)], "under .label."),
        ([("0.png", PICTURE), ("0.json", b'{"label": true}')], "under .label."),
        ([("0.png", PICTURE), ("0.jpg", PICTURE), ("0.cls", b"0")], "a second '0.jpg'"),
        ([("0.txt", b"text")], "No pictures in the tar files"),
        ([("0.mask.png", PICTURE), ("0.cls", b"0")], "No pictures in the tar files.*ends at the first dot"),
    ],
)
def test_bad_samples(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path)


def test_hostile_tars(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.png", PICTURE), ("0.cls", b"0"), ("1.png", PICTURE), ("1.cls", b"0")])
    good = path.read_bytes()
    path.write_bytes(good[:512] + good[512 : 512 + len(PICTURE) // 2])
    with pytest.raises(DataError, match="a plain, whole tar file"):
        open_source(tmp_path)
    damaged = bytearray(good)
    third = good.index(b"1.png")
    damaged[third : third + 300] = b"\xff" * 300  # tarfile itself stops here without a word
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=f"no valid header.*behind byte {third:,}"):
        open_source(tmp_path)
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match="a plain, whole tar file"):
        open_source(tmp_path)
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(DataError, match="a link, a device or sparse"):
        open_source(tmp_path)
    huge = tarfile.TarInfo("0.png")
    huge.size = 1 << 40
    path.write_bytes(huge.tobuf(tarfile.GNU_FORMAT) + b"x" * 2048)
    with pytest.raises(DataError):
        open_source(tmp_path)


def test_several_archives_in_one_file_are_refused(tmp_path):
    one, two = (write_tar(tmp_path / f"{n}.tar", [(f"{n}.png", PICTURE), (f"{n}.cls", b"0")]) for n in (1, 2))
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.tar").write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(DataError, match="another archive"):
        open_source(tmp_path / "both")


def test_what_lies_beside_whole_shards_is_named(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", [("0.png", PICTURE), ("0.cls", b"0")])
    write_tar(tmp_path / "1.TAR", [("1.png", PICTURE), ("1.cls", b"0")])
    put(tmp_path, "2.tar.gz", "classes.md")
    (tmp_path / "sub").mkdir()
    write_tar(tmp_path / "sub" / "3.tar", [("3.png", PICTURE), ("3.cls", b"0")])
    source = open_source(tmp_path)
    assert len(source) == 2
    assert source.notes[-1] == "left out: '2.tar.gz', 'sub/'"
    monkeypatch.setattr("efficientformer.data.sources.list_folder", Mock(side_effect=DataError("Cannot list")))
    assert not _holds_shards(tmp_path / "sub")


def test_a_shard_cut_after_listing_is_an_image_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.cls", b"0"), ("0.png", PICTURE)])
    source = open_source(tmp_path)
    with path.open("r+b") as file:
        file.truncate(1600)
    with pytest.raises(ImageError, match=f"{len(PICTURE)} bytes"):
        source.read(0)


# --- idx


def write_idx(folder, prefix, labels, size=(28, 28), pack=False):
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), *size), dtype=np.uint8)
    for name, header, data in (
        ("images-idx3-ubyte", struct.pack(">IIII", 0x803, len(labels), *size), images.tobytes()),
        ("labels-idx1-ubyte", struct.pack(">II", 0x801, len(labels)), bytes(labels)),
    ):
        content = header + data
        (folder / f"{prefix}-{name}{'.gz' * pack}").write_bytes(gzip.compress(content) if pack else content)
    return images


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    ("name", "ninth"), [("FashionMNIST/raw", "Ankle boot"), ("mnist", "9"), ("my-fashion", "Ankle boot")]
)
def test_idx(tmp_path, name, ninth, pack):
    images = write_idx(tmp_path / name, "train", [9, 0, 3], pack=pack)
    write_idx(tmp_path / name, "t10k", [1, 2], pack=pack)
    source = open_source(tmp_path / name, "train")
    assert (source.labels.tolist(), source.classes[9]) == ([9, 0, 3], ninth)
    picture = source.read(1)
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(decode(picture, mode="L")), images[1])
    assert len(open_source(tmp_path / name, "val")) == 2
    assert pickle.loads(pickle.dumps(source)).read(2).tobytes() == images[2].tobytes()


def test_idx_with_a_dot_in_its_name(tmp_path):
    write_idx(tmp_path, "train", [1, 0])
    for name in ("images-idx3", "labels-idx1"):
        path = tmp_path / f"train-{name}-ubyte"
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert open_source(tmp_path, "train").labels.tolist() == [1, 0]


def test_idx_below_the_root_and_with_many_classes(tmp_path):
    write_idx(tmp_path / "MNIST/raw", "train", [11, 0])
    assert open_source(tmp_path, "train").classes == tuple(map(str, range(12)))


def test_of_two_data_sets_in_a_folder_neither_is_chosen(tmp_path):
    for name in ("MNIST", "FashionMNIST"):
        write_idx(tmp_path / name / "raw", "train", [1, 0])
    with pytest.raises(DataError, match="'FashionMNIST/raw', 'MNIST/raw'"):
        open_source(tmp_path, "train")
    assert open_source(tmp_path / "FashionMNIST", "train").classes[1] == "Trouser"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a header that begins with 0x00000803"),
        (struct.pack(">IIII", 0x801, 1, 1, 1), "a header that begins with"),
        (struct.pack(">IIII", 0x803, 1 << 31, 1 << 31, 1 << 31), "a header that claims"),
        (struct.pack(">IIII", 0x803, 1 << 30, 1, 1), "at most 20,000,000 pictures; found .* claims 1,073,741,824"),
        (struct.pack(">IIII", 0x803, 3, 28, 28) + b"x" * 100, "2,352 bytes, as its header says; found 100"),
        (struct.pack(">IIII", 0x803, 1, 2, 2) + b"x" * 5, "4 bytes, as its header says; found more"),
        (struct.pack(">IIII", 0x803, 1, 2, 2) + b"x" * 4, "1 pictures and 3 labels"),
        (struct.pack(">IIII", 0x803, 3, 0, 28), "are empty"),
    ],
)
def test_hostile_idx(tmp_path, data, message):
    write_idx(tmp_path, "train", [0, 1, 2])
    (tmp_path / "train-images-idx3-ubyte").write_bytes(data)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path)


def test_idx_without_labels_or_with_broken_gzip(tmp_path):
    write_idx(tmp_path, "train", [0, 1, 2], pack=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="a readable idx file"):
        open_source(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    write_idx(tmp_path / "x", "train", [1])
    (tmp_path / "x/train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="train-labels-idx1-ubyte or"):
        open_source(tmp_path / "x")


def test_a_class_only_in_the_validation_part_of_idx_is_an_error(tmp_path):
    write_idx(tmp_path, "train", [0, 1])
    write_idx(tmp_path, "t10k", [1, 2])
    with pytest.raises(DataError, match="found '2'"):
        open_splits(tmp_path)


def test_a_class_without_pictures_in_training_shards_is_an_error(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    write_tar(tmp_path / "train/0.tar", [("0.png", PICTURE), ("0.cls", b"0")])
    put(tmp_path, "val/dog/1.jpg")
    with pytest.raises(DataError, match="found 'dog'"):
        open_splits(tmp_path)


# --- CIFAR


def python_2(value):
    """A value as Python 2's protocol 2 wrote it: bytes as its strings, arrays by what NumPy called."""
    if isinstance(value, dict):
        return b"}(" + b"".join(python_2(each) for pair in value.items() for each in pair) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(python_2, value)) + b"e"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, bytes):
        return b"T" + struct.pack("<I", len(value)) + value
    kind = (
        b"cnumpy\ndtype\n(" + python_2(b"u1") + b"K\x00K\x01tR(K\x03" + python_2(b"|") + b"NNNJ\xff\xff\xff\xffK\x00tb"
    )
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + python_2(b"b") + b"tR"
    shape = b"".join(map(python_2, value.shape))
    order = b"\x88" + python_2(value.tobytes("F")) if len(value) % 2 else b"\x89" + python_2(value.tobytes())
    return empty + b"(K\x01(" + shape + b"t" + kind + order + b"tb"


def write_cifar(folder, name, number, seed=0):
    """One file of either version with pictures by chance, their labels counting up; returns the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    planes = np.random.default_rng(seed).integers(0, 256, (number, 3, 32, 32), np.uint8)
    rows, labels = planes.reshape(number, 3072), [each % 3 for each in range(number)]
    if name.endswith(".bin"):
        before = b"\7" if name in ("train.bin", "test.bin") else b""  # CIFAR-100's coarse label
        data = b"".join(before + bytes([label]) + row.tobytes() for label, row in zip(labels, rows, strict=True))
    else:
        key = b"fine_labels" if name in ("train", "test") else b"labels"
        said = {b"batch_label": name.encode(), key: labels, b"data": rows, b"coarse_labels": [0] * number}
        data = b"\x80\x02" + python_2(said) + b"."
    (folder / name).write_bytes(data)
    return planes.transpose(0, 2, 3, 1)


CIFAR = {
    "cifar-10-batches-py": ([f"data_batch_{n}" for n in range(1, 6)], "test_batch", "batches.meta", b"label_names"),
    "cifar-100-python": (["train"], "test", "meta", b"fine_label_names"),
    "cifar-10-batches-bin": ([f"data_batch_{n}.bin" for n in range(1, 6)], "test_batch.bin", "batches.meta.txt", None),
    "cifar-100-binary": (["train.bin"], "test.bin", "fine_label_names.txt", None),
}


def cifar(root, name):
    """A whole data set below ``root`` as its archive unpacks; returns its folder and the pictures of both parts."""
    batches, test, meta, key = CIFAR[name]
    train = np.concatenate([write_cifar(root / name, each, 3, seed) for seed, each in enumerate(batches)])
    held_out = write_cifar(root / name, test, 2, seed=9)
    names = [b"bird", b"cat", b"dog"]
    (root / name / meta).write_bytes(
        b"\x80\x02" + python_2({key: names}) + b"." if key else b"\n".join(names) + b"\n\n"
    )
    return root / name, train, held_out


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("named", ["folder", "root"])
def test_cifar_as_it_is_published(tmp_path, name, named):
    folder, train, held_out = cifar(tmp_path, name)
    splits = open_splits(folder if named == "folder" else tmp_path)
    for source, pictures in ((splits.train, train), (splits.val, held_out)):
        assert source.classes == ("bird", "cat", "dog")
        assert source.labels.tolist() == ([0, 1, 2] * (len(pictures) // 3) or [0, 1])
        assert np.array_equal([np.asarray(source.read(i)) for i in range(len(source))], pictures)
    assert splits.own
    assert splits.train.name(1) == "train/000001"
    assert pickle.loads(pickle.dumps(splits.val)).labels.tolist() == [0, 1]


class Attack:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


DAMAGE = [
    ("cifar-10-batches-py", "data_batch_3", None, "'train' .* is not whole; expected 5 files; found no 'data_batch_3'"),
    ("cifar-10-batches-py", "data_batch_3", pickle.dumps(Attack(), 2), "found __builtin__.exec, which is not read"),
    ("cifar-10-batches-py", "data_batch_3", b"\x80\x02}(", "a file of CIFAR's Python version"),
    ("cifar-10-batches-py", "data_batch_3", b"\x80\x02}r\xff\xff\xff\x7f.", "found a claim of 2,147,483,647 values"),
    ("cifar-10-batches-py", "data_batch_3", b"\x80\x02K\x01.", "expected a dict; found a int"),
    ("cifar-10-batches-py", "batches.meta", b"\x80\x02}.", "list of names under 'label_names'"),
    (
        "cifar-100-python",
        "train",
        b"\x80\x02" + python_2({b"data": [1], b"fine_labels": [1]}) + b".",
        "array .N, 3072. of",
    ),
    ("cifar-10-batches-bin", "data_batch_2.bin", b"12", "pictures of 3,073 bytes with their label; found 2 bytes"),
    ("cifar-10-batches-bin", "data_batch_2.bin", bytes([3]) + bytes(3072), "labels of 3 classes; found label 3"),
    ("cifar-10-batches-bin", "batches.meta.txt", b"cat\ncat\n", "each once; found 'cat', 'cat'"),
    ("cifar-100-binary", "train.bin", b"", "expected pictures; found none"),
]


def test_names_in_a_cifar_pickle_that_are_no_text_are_refused_at_once(tmp_path):
    """A tuple of two of the same tuple, and so on: as text this has a billion parts."""
    folder = cifar(tmp_path, "cifar-10-batches-py")[0]
    endless = b")" + b"".join(b"q%ch%ch%c\x86" % (n, n, n) for n in range(30))
    (folder / "batches.meta").write_bytes(b"\x80\x02}" + python_2(b"label_names") + b"](" + endless + b"es.")
    with pytest.raises(DataError, match=" tuples"):
        open_source(folder, "train")
    (folder / "batches.meta").write_bytes(b"\x80\x02}" + endless + b"K\x00s.")  # as a key: its hash is as long
    with pytest.raises(DataError, match="tuples"):
        open_source(folder, "train")
    (folder / "batches.meta").write_bytes(b"\x80\x02}" + python_2(b"label_names") + b"](K\x07es.")
    with pytest.raises(DataError, match="a list of names"):
        open_source(folder, "train")


@pytest.mark.parametrize(("name", "file", "data", "match"), DAMAGE)
def test_damaged_or_hostile_cifar_files_are_refused(tmp_path, name, file, data, match):
    folder = cifar(tmp_path, name)[0]
    (folder / file).unlink()
    if data is not None:
        (folder / file).write_bytes(data)
    with pytest.raises(DataError, match=match):
        open_source(folder, "train")


@pytest.mark.parametrize(
    ("rows", "labels", "match"),
    [
        (np.zeros((2, 3072), np.uint8), [0], "2 pictures and 1 labels"),
        (np.zeros((2, 3071), np.uint8), [0, 1], "array .N, 3072. of bytes"),
        (np.zeros((1, 3072), np.uint8), [-1], "a list of labels under 'labels'"),
        (np.zeros((1, 3072), np.uint8), [b"cat"], "a list of labels under 'labels'"),
    ],
)
def test_what_a_cifar_pickle_claims_is_checked(tmp_path, rows, labels, match):
    folder = cifar(tmp_path, "cifar-10-batches-py")[0]
    (folder / "data_batch_1").write_bytes(b"\x80\x02" + python_2({b"data": rows, b"labels": labels}) + b".")
    with pytest.raises(DataError, match=match):
        open_source(folder, "train")
