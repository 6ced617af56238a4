"""Whatever is done to a weights file, reading it gives a checkpoint that fits or one of our errors; nothing else.

Seeded, so that a failure repeats; ``EFFICIENTFORMER_FUZZ_CASES`` sets the number of cases per kind of file and damage.
"""

from __future__ import annotations

import functools
import os
import random
import warnings

import pytest
import torch

from efficientformer.models.network import EfficientFormer
from efficientformer.spec.errors import EfficientFormerError
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.spec.variants import v1_spec, v2_spec
from efficientformer.weights.checkpoint import load_checkpoint, save_foreign, save_native
from efficientformer.weights.formats.detect import LAYOUTS
from efficientformer.weights.formats.translate import from_ours

CASES = int(os.environ.get("EFFICIENTFORMER_FUZZ_CASES", "20"))
W = (4, 6, 8, 10)
SPECS = {
    "v1": v1_spec(W, (1, 1, 1, 2), 1, input_size=64, num_classes=3, expansion=1),
    "v2": v2_spec(W, ((1,), (1,), (1, 1), (1, 1)), 1, input_size=64, num_classes=3),
}


def _write(kind, path):
    spec = SPECS["v2" if kind == "timm v2" else "v1"]
    state = EfficientFormer(spec).state_dict()
    if kind == "native":
        said = Manifest(spec, PreprocessSpec(input_size=(64, 64), resize_size=64))
        save_native(path.with_suffix(".safetensors"), state, said)
    elif kind == "legacy":
        content = {"model": from_ours(state, "snap", spec), "epoch": 3}
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif kind == "transformers safetensors":
        save_foreign(path.with_suffix(".safetensors"), state, spec, "transformers")
    else:
        save_foreign(path, state, spec, kind.split()[0])
    return next(path.parent.iterdir()).read_bytes()


@pytest.fixture(
    scope="module", params=["snap", "legacy", "timm v2", "mmpretrain", "native", "transformers safetensors"]
)
def sound(request, tmp_path_factory):
    """The bytes of a sound file of each kind."""
    return _write(request.param, tmp_path_factory.mktemp("sound") / "weights.pth")


def _truncate(data, rng):
    return data[: rng.randrange(len(data))]


def _flip(data, rng):
    """Flip bits, mostly where the structure lies: pickles and headers begin a file, the index of a zip ends it."""
    data = bytearray(data)
    region = rng.choice([(0, min(4000, len(data))), (max(0, len(data) - 4000), len(data)), (0, len(data))])
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(*region)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _splice(data, rng):
    """Delete, double or overwrite a stretch."""
    start = rng.randrange(len(data))
    stretch = data[start : start + rng.randint(1, 2000)]
    middle = rng.choice([b"", stretch * 2, rng.randbytes(len(stretch))])
    return data[:start] + middle + data[start + len(stretch) :]


@functools.lru_cache(maxsize=1)
def _network(spec):
    return EfficientFormer(spec)


def _check(path):
    """Load; what loads must fit the network it claims to be."""
    try:
        checkpoint = load_checkpoint(path)
    except EfficientFormerError as error:
        assert path.name in str(error)
        return False
    _network(checkpoint.spec).load_state_dict(checkpoint.state)
    assert all(tensor.isfinite().all() for tensor in checkpoint.state.values())
    return True


@pytest.mark.parametrize("damage", [_truncate, _flip, _splice], ids=lambda f: f.__name__[1:])
def test_damaged_bytes(sound, damage, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(sound)
    assert _check(path), "the sound file must load"
    refused = 0
    for seed in range(CASES):
        path.write_bytes(damage(sound, random.Random(seed)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            refused += not _check(path)
    assert refused >= (CASES if damage is _truncate else 1)


def _random_tensor(rng):
    shape = [rng.choice([0, 1, 2, 3, 8, 49, 64]) for _ in range(rng.randint(0, 5))]
    dtype = rng.choice([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8])
    return torch.zeros(shape, dtype=dtype)


def _corrupt(state, rng):
    """Change one to three entries: remove, add, rename, reshape, replace by anything."""
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(list(state))
        action = rng.randrange(6)
        if action == 0:
            del state[name]
        elif action == 1:
            state[rng.choice([f"{name}.x", "", ".", "model", "head", f"module.{name}", "x" * 500])] = _random_tensor(
                rng
            )
        elif action == 2:
            state[name.replace("0", "9").replace("1", "0")] = state.pop(name)
        elif action == 3 and state[name] is not None:
            state[name] = _random_tensor(rng)
        elif action == 4:
            prefix = ".".join(name.split(".")[: rng.randint(1, 4)])
            for key in [key for key in state if key.startswith(prefix)]:
                del state[key]
            state.setdefault("left", torch.ones(1))
        else:
            state[name] = rng.choice([None, "x", 1.5, [], {}, {"a": torch.ones(1)}, torch.Size([1])])


@pytest.mark.parametrize(
    ("family", "layout"), [(family, layout) for layout, families in LAYOUTS.items() for family in families]
)
def test_corrupt_state_dicts(family, layout, tmp_path):
    spec = SPECS[family]
    sound = from_ours(EfficientFormer(spec).state_dict(), layout, spec)
    path = tmp_path / "weights.pth"
    torch.save(sound, path)
    assert _check(path), "the sound file must load"
    refused = 0
    for seed in range(CASES):
        state = dict(sound)
        _corrupt(state, random.Random(seed))
        torch.save(state, path)
        refused += not _check(path)
    assert refused >= CASES * 0.8
