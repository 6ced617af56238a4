"""Hostile idx, CIFAR and tar files: either a source comes out whose every picture can be asked for, or a DataError."""

import gzip
import io
import os
import random
import struct
import tarfile

import pytest

from efficientformer.data.sources import open_source
from efficientformer.spec.errors import DataError, ImageError
from tests.unit.test_packed_sources import cifar

CASES = int(os.environ.get("FUZZ_CASES", "600"))


def tar_file():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (
            ("0.png", b"picture"),
            ("0.cls", b"1"),
            ("long" * 40 + "ü.jpg", b"x" * 600),
            ("long" * 40 + "ü.json", b'{"label": 0}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()[:8192]


TAR = tar_file()
IMAGES = struct.pack(">IIII", 0x803, 3, 4, 5) + bytes(60)
LABELS = struct.pack(">II", 0x801, 3) + bytes([0, 1, 2])


def mutate(data, rng):
    """Cut, overwrite, insert or repeat; headers more often than the rest."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(min(len(data), rng.choice([16, 600, 1 << 20])) or 1)
        kind = rng.randrange(6)
        if kind == 0:
            del data[place:]
        elif kind == 1:
            data[place : place + 1] = rng.randbytes(1)
        elif kind == 2:
            data[place : place + 8] = rng.choice([b"\xff" * 8, bytes(8), b"77777777", rng.randbytes(8)])
        elif kind == 3:
            data[place:place] = rng.randbytes(rng.randint(1, 600))
        elif kind == 4:
            data[place:place] = data[place : place + 512]
        elif len(data) > 160:
            data[156:157] = rng.choice([b"1", b"2", b"3", b"5", b"x", b"g", b"L", b"K", b"S", b"D"])
        if not data:
            break
    return bytes(data)


def use(folder, part=None):
    """Open a data set and ask for every picture; return how it ended."""
    try:
        source = open_source(folder, part)
    except DataError as error:
        assert str(error)
        return "refused"
    for index in range(len(source)):
        assert 0 <= source.labels[index] < len(source.classes)
        source.name(index)
        try:
            source.read(index)
        except ImageError:
            return "unreadable"
    return "read"


@pytest.mark.parametrize("kind", ["tar", "idx", "idx.gz"])
def test_mutated_files(tmp_path, kind):
    rng = random.Random(kind)
    ends = []
    for _ in range(CASES // 3):
        if kind == "tar":
            (tmp_path / "a.tar").write_bytes(mutate(TAR, rng))
        else:
            images, labels = (IMAGES, mutate(LABELS, rng)) if rng.random() < 0.3 else (mutate(IMAGES, rng), LABELS)
            ending = ""
            if kind == "idx.gz":
                ending, labels = ".gz", gzip.compress(labels, 1)
                images = mutate(gzip.compress(IMAGES, 1), rng) if rng.random() < 0.5 else gzip.compress(images, 1)
            (tmp_path / f"train-images-idx3-ubyte{ending}").write_bytes(images)
            (tmp_path / f"train-labels-idx1-ubyte{ending}").write_bytes(labels)
        ends.append(use(tmp_path))
    assert {"refused", "read"} <= set(ends)  # else the mutations are too weak, or too strong
    assert "unreadable" not in ends


@pytest.mark.parametrize("file", ["train", "train.bin"])
def test_mutated_cifar_files(tmp_path, file):
    folder = cifar(tmp_path, "cifar-100-binary" if file.endswith("bin") else "cifar-100-python")[0]
    good, rng, ends = (folder / file).read_bytes(), random.Random(file), []
    for _ in range(CASES // 3):
        (folder / file).write_bytes(mutate(good, rng))
        ends.append(use(folder, "train"))
    assert set(ends) == {"refused", "read"}


def test_the_seeds_are_good(tmp_path):
    (tmp_path / "tar").mkdir()
    (tmp_path / "tar/a.tar").write_bytes(TAR)
    assert use(tmp_path / "tar") == "read"
    (tmp_path / "train-images-idx3-ubyte").write_bytes(IMAGES)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(LABELS)
    assert use(tmp_path) == "read"


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    header = struct.pack(">IIII", 0x803, 1, 2, 2)
    bomb = gzip.compress(header + bytes(200 << 20), 1)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(bomb)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(LABELS))
    import tracemalloc

    tracemalloc.start()
    assert use(tmp_path) == "refused"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
