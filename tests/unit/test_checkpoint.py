"""Checkpoints: ours and foreign ones through real files; hostile and damaged files; weights into other networks."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from efficientformer import get_model
from efficientformer.models.network import EfficientFormer
from efficientformer.spec import zoo
from efficientformer.spec.errors import CheckpointError, UsageError
from efficientformer.spec.manifest import METADATA_KEY, Manifest
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.spec.variants import v1_spec, v2_spec
from efficientformer.weights.checkpoint import WeightsWarning, load_checkpoint, save_foreign, save_native
from efficientformer.weights.formats.translate import from_ours
from efficientformer.weights.loading import load_into, resample_table

W = (8, 12, 16, 24)
V1 = v1_spec(W, (1, 1, 1, 2), 1, input_size=64, num_classes=5)
V2 = v2_spec(W, ((4,), (4,), (4,), (4, 3)), 1, input_size=64, num_classes=5)


def random_state(spec, seed=0):
    torch.manual_seed(seed)
    state = EfficientFormer(spec).state_dict()
    return {n: torch.rand(t.shape) if t.is_floating_point() else torch.randint(9, t.shape) for n, t in state.items()}


def manifest(spec, **fields):
    height, width = spec.input_size
    size = max(height, width) * 8 // 7
    return Manifest(spec, PreprocessSpec(input_size=spec.input_size, resize_size=size), **fields)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestNative:
    @pytest.mark.parametrize(
        "spec",
        [
            V1,
            V2,
            dataclasses.replace(V1, stem_stride=1),
            dataclasses.replace(V1, input_size=(64, 96)),
            v1_spec(W, (1, 1, 2, 1), (1, 1), input_size=64),
        ],
        ids=["v1", "v2", "stem stride 1", "not square", "MB3D in stage 3"],
    )
    def test_what_is_saved_is_loaded(self, spec, tmp_path):
        state, said = random_state(spec), manifest(spec, metrics={"top1": 12.5}, provenance={"name": "x"})
        save_native(tmp_path / "a.safetensors", state, said)
        checkpoint = load_checkpoint(tmp_path / "a.safetensors")
        assert equal(checkpoint.state, state)
        assert (checkpoint.spec, checkpoint.layout, checkpoint.manifest) == (spec, "native", said)
        assert len(checkpoint.report.mapped) == len(state)
        assert len(checkpoint.sha256) == 64
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]

    def test_a_header_whose_length_looks_like_a_pickle(self, tmp_path):
        """The file begins with the length of its header, and that may begin with a pickle's first byte."""
        path, state = tmp_path / "a.safetensors", random_state(V1)
        for letters in range(0, 512, 8):
            said = manifest(V1, provenance={"name": "x" * letters})
            save_native(path, state, said)
            if path.read_bytes()[:1] == b"\x80":
                break
        else:
            pytest.fail("no such length")
        checkpoint = load_checkpoint(path)
        assert checkpoint.manifest == said
        assert equal(checkpoint.state, state)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_stored_and_widened(self, dtype, tmp_path):
        state = random_state(V1)
        save_native(tmp_path / "a.safetensors", state, manifest(V1), dtype=dtype)
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            assert file.get_tensor("head.weight").dtype == dtype
            assert file.get_tensor("stem.conv1.norm.num_batches_tracked").dtype == torch.int64
        loaded = load_checkpoint(tmp_path / "a.safetensors").state
        assert loaded["head.weight"].dtype == torch.float32
        assert torch.equal(loaded["head.weight"], state["head.weight"].to(dtype).float())

    def test_batchnorm_statistics_keep_their_precision(self, tmp_path):
        state = random_state(V1)
        name = next(key for key in state if key.endswith("running_var"))
        state[name].fill_(1e6)  # a trained network's variance may be beyond half precision
        save_native(tmp_path / "a.safetensors", state, manifest(V1), dtype=torch.float16)
        assert torch.equal(load_checkpoint(tmp_path / "a.safetensors").state[name], state[name])

    def test_values_beyond_half_precision_are_refused(self, tmp_path):
        state = random_state(V1) | {"head.bias": torch.full((5,), 1e5)}
        with pytest.raises(CheckpointError, match=r"head.bias.*float16.*Use bfloat16"):
            save_native(tmp_path / "a.safetensors", state, manifest(V1), dtype=torch.float16)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            (random_state(V2), "missing"),
            ({n: t for n, t in random_state(V1).items() if n != "norm.bias"}, "1 missing: norm.bias"),
            (
                random_state(V1) | {"norm.bias": torch.full((24,), torch.nan)},
                "norm.bias holds values that are no numbers",
            ),
        ],
        ids=["another network", "a tensor short", "NaN"],
    )
    def test_what_could_not_be_loaded_is_not_written(self, state, message, tmp_path):
        with pytest.raises(CheckpointError, match=message):
            save_native(tmp_path / "a.safetensors", state, manifest(V1))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("name", "dtype"), [("a.pth", None), ("a.safetensors", torch.int64)])
    def test_wrong_usage(self, name, dtype, tmp_path):
        with pytest.raises(UsageError):
            save_native(tmp_path / name, random_state(V1), manifest(V1), dtype=dtype)

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "a.safetensors"
        save_native(path, random_state(V1), manifest(V1))
        before = path.read_bytes()

        def full_disk(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save_native(path, random_state(V1, 1), manifest(V1))
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("folder", ["absent", "a_file"])
    def test_a_folder_that_is_none(self, folder, tmp_path):
        (tmp_path / "a_file").touch()
        with pytest.raises(CheckpointError, match="Cannot write"):
            save_native(tmp_path / folder / "a.safetensors", random_state(V1), manifest(V1))

    @pytest.mark.parametrize(
        ("text", "message"),
        [("{", "No valid JSON"), ("{}", "missing from the manifest"), (manifest(V2).to_json(), "missing")],
        ids=["no JSON", "empty", "of another network"],
    )
    def test_a_manifest_that_does_not_fit_is_refused(self, text, message, tmp_path):
        safetensors.torch.save_file(random_state(V1), tmp_path / "a.safetensors", {METADATA_KEY: text})
        with pytest.raises(CheckpointError, match=rf"^a.safetensors: .*{message}"):
            load_checkpoint(tmp_path / "a.safetensors")

    def test_a_plain_state_dict_needs_the_spec_only_for_what_shapes_do_not_say(self, tmp_path):
        spec = dataclasses.replace(V1, stem_stride=1, input_size=(16, 16))
        torch.save(EfficientFormer(spec).state_dict(), tmp_path / "a.pt")
        inferred = load_checkpoint(tmp_path / "a.pt")
        assert inferred.spec == V1
        assert any("stem of stride 4" in note for note in inferred.report.notes)
        assert load_checkpoint(tmp_path / "a.pt", spec=spec).spec == spec


LAYOUTS = [(V1, layout) for layout in ("snap", "timm", "mmpretrain", "transformers")] + [(V2, "snap"), (V2, "timm")]


class TestForeign:
    @pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
    @pytest.mark.parametrize(("spec", "layout"), LAYOUTS, ids=[f"{s.family}-{layout}" for s, layout in LAYOUTS])
    def test_what_is_written_is_read(self, spec, layout, suffix, tmp_path):
        state, path = random_state(spec), tmp_path / f"model{suffix}"
        save_foreign(path, state, spec, layout)
        checkpoint = load_checkpoint(path)
        assert equal(checkpoint.state, state)
        assert (checkpoint.spec, checkpoint.layout, checkpoint.manifest) == (spec, layout, None)
        if suffix == ".safetensors":  # older transformers read no file without it
            with safe_open(path, framework="pt") as file:
                assert file.metadata() == {"format": "pt"}

    @pytest.mark.parametrize(
        ("layout", "wrapper"),
        [("snap", ["model"]), ("mmpretrain", ["meta", "state_dict"]), ("timm", None), ("transformers", None)],
    )
    def test_pickles_have_their_wrapper_and_order(self, layout, wrapper, tmp_path):
        state = random_state(V1)
        save_foreign(tmp_path / "a.pth", state, V1, layout)
        content = torch.load(tmp_path / "a.pth", weights_only=True)
        if wrapper:
            assert list(content) == wrapper
            content = content[wrapper[-1]]
        assert list(content) == list(from_ours(state, layout, V1))

    @pytest.mark.parametrize(
        ("spec", "layout", "name", "message"),
        [
            (V1, "snap", "a.onnx", "Unknown kind of weights file"),
            (V1, "native", "a.pth", "Use save_native"),
            (V1, "keras", "a.pth", "Unknown layout"),
            (V2, "transformers", "a.pth", "knows no v2 networks"),
            (dataclasses.replace(V1, stem_stride=2), "snap", "a.pth", "stem stride 2"),
            (dataclasses.replace(V1, input_size=(64, 96)), "snap", "a.pth", "input 64x96"),
        ],
    )
    def test_what_cannot_be_said_is_refused(self, spec, layout, name, message, tmp_path):
        with pytest.raises(UsageError, match=message):
            save_foreign(tmp_path / name, random_state(spec), spec, layout)
        assert list(tmp_path.iterdir()) == []

    def test_half_precision_is_widened_and_double_kept(self, tmp_path):
        theirs = from_ours(random_state(V1), "timm", V1)
        theirs["head.weight"], theirs["head.bias"] = theirs["head.weight"].half(), theirs["head.bias"].double()
        torch.save(theirs, tmp_path / "a.bin")
        state = load_checkpoint(tmp_path / "a.bin").state
        assert (state["head.weight"].dtype, state["head.bias"].dtype) == (torch.float32, torch.float64)

    def test_legacy_files_are_read(self, tmp_path):
        state = random_state(V1)
        content = {"model": from_ours(state, "snap", V1)}
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
        assert equal(load_checkpoint(tmp_path / "a.pth").state, state)

    def test_an_explicit_layout_must_fit(self, tmp_path):
        save_foreign(tmp_path / "a.pth", random_state(V1), V1, "snap")
        assert load_checkpoint(tmp_path / "a.pth", layout="snap").layout == "snap"
        with pytest.raises(CheckpointError, match=r"stem.conv2.weight is missing"):
            load_checkpoint(tmp_path / "a.pth", layout="timm")
        with pytest.raises(UsageError, match="auto, native, snap"):
            load_checkpoint(tmp_path / "a.pth", layout="keras")

    def test_the_loaded_tensors_do_not_depend_on_the_file(self, tmp_path):
        state = random_state(V1)
        save_foreign(tmp_path / "a.pth", state, V1, "snap")
        loaded = load_checkpoint(tmp_path / "a.pth").state
        with (tmp_path / "a.pth").open("r+b") as file:
            file.write(b"\0" * (tmp_path / "a.pth").stat().st_size)
        assert equal(loaded, state)


def training_checkpoint(**more):
    plain, averaged = random_state(V1, 0), random_state(V1, 1)
    options = argparse.Namespace(model="efficientformer_l1", lr=1e-3, output_dir="x")
    content = {
        "model": OrderedDict(from_ours(plain, "snap", V1)),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "lr_scheduler": {"last_epoch": 3},
        "epoch": 3,
        "model_ema": from_ours(averaged, "snap", V1),
        "scaler": {"scale": 2.0},
        "args": options,
        **more,
    }
    return plain, averaged, content


def from_ours_without_counters(state):
    return {n: t for n, t in from_ours(state, "timm", V1).items() if not n.endswith("num_batches_tracked")}


def test_names_of_classes_that_are_no_utf8_are_kept(tmp_path):
    labels = ("caf\udce9", "猫", *map(str, range(V1.num_classes - 2)))
    save_native(tmp_path / "a.safetensors", random_state(V1), manifest(V1, labels=labels))
    assert load_checkpoint(tmp_path / "a.safetensors").manifest.labels == labels


class TestTrainingCheckpoints:
    @pytest.mark.parametrize(("ema", "which"), [(None, 0), (False, 0), (True, 1)])
    def test_plain_or_averaged_weights(self, ema, which, tmp_path, recwarn):
        *states, content = training_checkpoint()
        torch.save(content, tmp_path / "a.pth")
        checkpoint = load_checkpoint(tmp_path / "a.pth", ema=ema)
        assert equal(checkpoint.state, states[which])
        taken = ["'model', not the averaged weights beside it", "'model_ema'"][which]
        assert f"took {taken}" in checkpoint.report.notes
        warned = [w for w in recwarn if issubclass(w.category, WeightsWarning)]
        assert len(warned) == (ema is None)
        assert all(f"efficientformer convert --ema {tmp_path / 'a.pth'} FILE" in str(w.message) for w in warned)

    def test_averaged_weights_alone_are_taken(self, tmp_path):
        _, averaged, content = training_checkpoint()
        del content["model"]
        torch.save(content, tmp_path / "a.pth")
        assert equal(load_checkpoint(tmp_path / "a.pth").state, averaged)
        with pytest.raises(CheckpointError, match="no state dict"):
            load_checkpoint(tmp_path / "a.pth", ema=False)

    @pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
    def test_no_averaged_weights_where_they_are_asked_for(self, name, tmp_path):
        save_foreign(tmp_path / name, random_state(V1), V1, "snap")
        with pytest.raises(CheckpointError, match="no averaged"):
            load_checkpoint(tmp_path / name, ema=True)

    @pytest.mark.parametrize(
        "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "mine.network."]
    )
    def test_prefixes_of_wrappers_are_cut_off(self, prefix, tmp_path):
        state = random_state(V1)
        theirs = {f"{prefix}{name}": tensor for name, tensor in from_ours(state, "snap", V1).items()}
        torch.save({"state_dict": {"model": theirs}, "epoch": 1}, tmp_path / "a.pth")
        checkpoint = load_checkpoint(tmp_path / "a.pth")
        assert equal(checkpoint.state, state)
        assert sum("cut" in note for note in checkpoint.report.notes) == prefix.count(".")

    @pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.module."])
    def test_prefixes_are_cut_off_safetensors_too(self, prefix, tmp_path):
        state = random_state(V1)
        theirs = {f"{prefix}{name}": tensor for name, tensor in from_ours(state, "timm", V1).items()}
        safetensors.torch.save_file(theirs, tmp_path / "model.safetensors")
        checkpoint = load_checkpoint(tmp_path / "model.safetensors")
        assert equal(checkpoint.state, state)
        assert sum("cut" in note for note in checkpoint.report.notes) == prefix.count(".")

    @pytest.mark.parametrize("layout", ["mmpretrain", "transformers"])
    @pytest.mark.parametrize("body", ["as in the whole", "alone"])
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_a_body_without_heads_keeps_or_gets_its_prefix(self, layout, body, suffix, tmp_path):
        state, prefix = random_state(V1), {"mmpretrain": "backbone.", "transformers": "efficientformer."}[layout]
        theirs = {n: t for n, t in from_ours(state, layout, V1).items() if n.startswith(prefix)}
        if body == "alone":
            theirs = {n.removeprefix(prefix): t for n, t in theirs.items()}
        path = tmp_path / f"body{suffix}"
        (torch.save if suffix == ".pth" else safetensors.torch.save_file)(theirs, path)
        checkpoint = load_checkpoint(path, heads=V1)
        assert checkpoint.layout == layout
        assert equal(checkpoint.state, {n: t for n, t in state.items() if not n.startswith("head")})

    def test_torchs_averaged_model(self, tmp_path):
        state = random_state(V1)
        theirs = {f"module.{name}": tensor for name, tensor in from_ours(state, "timm", V1).items()}
        torch.save({"n_averaged": torch.tensor(7), **theirs}, tmp_path / "a.pth")
        checkpoint = load_checkpoint(tmp_path / "a.pth")
        assert equal(checkpoint.state, state)
        assert any("left out 'n_averaged'" in note for note in checkpoint.report.notes)

    @pytest.mark.parametrize("how", ["single", "half", "half, long"])
    def test_integers_that_scripts_made_floats(self, how, tmp_path):
        state = random_state(V1)
        theirs = from_ours(state, "timm", V1)
        if how == "half, long":
            theirs = {n: t + 100_000 if n.endswith("num_batches_tracked") else t for n, t in theirs.items()}
        torch.save({n: t.float() if how == "single" else t.half() for n, t in theirs.items()}, tmp_path / "a.pth")
        checkpoint = load_checkpoint(tmp_path / "a.pth")
        found = checkpoint.state
        assert "tensors of integers that were floating point" in checkpoint.report.notes[-1]
        for name, tensor in state.items():
            counter = name.endswith("num_batches_tracked")
            assert found[name].dtype == (torch.int64 if counter else torch.float32)
            expected = 65504 if counter and how == "half, long" else tensor
            torch.testing.assert_close(found[name].float(), torch.as_tensor(expected).float(), atol=1e-3, rtol=0)

    def test_counters_may_be_missing_in_a_file_that_is_read_and_not_in_one_written(self, tmp_path):
        state = random_state(V1)
        few = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
        torch.save(from_ours_without_counters(state), tmp_path / "a.pth")
        checkpoint = load_checkpoint(tmp_path / "a.pth")
        found = checkpoint.state
        assert f"{len(state) - len(few)} counters of batches are not in the file" in checkpoint.report.notes[-1]
        assert equal({name: found[name] for name in few}, few)
        assert all(int(found[name]) == 0 for name in state.keys() - few.keys())
        with pytest.raises(CheckpointError, match="missing"):
            save_native(tmp_path / "b.safetensors", few, manifest(V1))

    def test_an_index_that_averaging_cut_off(self, tmp_path):
        state = random_state(V1)
        theirs = from_ours(state, "timm", V1)
        (name,) = (name for name in theirs if name.endswith("attention_bias_idxs"))
        theirs[name] = theirs[name] - (theirs[name] == theirs[name].max()).long()  # as 11 * 0.9999 + 11 * 0.0001 is
        torch.save(theirs, tmp_path / "a.pth")
        checkpoint = load_checkpoint(tmp_path / "a.pth")
        assert equal(checkpoint.state, state)
        theirs[name] = theirs[name] - 2
        torch.save(theirs, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match="its values are not"):
            load_checkpoint(tmp_path / "a.pth")

    def test_heads_may_share_their_weights(self, tmp_path):
        state = random_state(V1)
        state["head_dist.weight"] = state["head.weight"]
        theirs = from_ours(state, "timm", V1)
        theirs["head_dist.weight"] = theirs["head.weight"]
        torch.save(theirs, tmp_path / "a.pth")
        assert equal(load_checkpoint(tmp_path / "a.pth").state, state)

    def test_a_prefix_on_some_names_only_is_an_error(self, tmp_path):
        theirs = from_ours(random_state(V1), "snap", V1)
        theirs["module.norm.weight"] = theirs.pop("norm.weight")
        torch.save(theirs, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match=r"1 missing: norm.weight; 1 unexpected: module.norm.weight"):
            load_checkpoint(tmp_path / "a.pth")


class _Attack:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def _poison(path, content, how):
    if how == "zip":
        torch.save(content, path)
    elif how == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(content, protocol=int(how)))


@pytest.mark.parametrize("how", ["zip", "legacy", "2", "4", "5"])
@pytest.mark.parametrize("place", ["the whole file", "beside the weights", "among the weights"])
def test_a_file_that_wants_to_run_code_is_refused(how, place, tmp_path):
    attack = _Attack(f"touch {tmp_path}/owned")
    state = from_ours(random_state(V1), "snap", V1) if how in ("zip", "legacy") else {}
    content = {
        "the whole file": attack,
        "beside the weights": {"model": state, "args": attack},
        "among the weights": {"model": {**state, "norm.weight": attack}},
    }[place]
    path = tmp_path / "weights.pth"
    _poison(path, content, how)
    with pytest.raises(
        CheckpointError, match=r"^weights.pth: The file wants to run code; found a call of \w+\.system\."
    ):
        load_checkpoint(path)
    assert not (tmp_path / "owned").exists()
    if how not in ("zip", "legacy"):  # the attack works: plain pickle runs it
        pickle.loads(path.read_bytes())
        assert (tmp_path / "owned").exists()


def test_options_are_allowed_for_this_load_only(tmp_path):
    torch.save({"args": argparse.Namespace()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        load_checkpoint(tmp_path / "a.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


class _Shadowed(OrderedDict):
    """Pickled as an OrderedDict whose instance attributes hide its methods."""

    def __reduce__(self):
        hidden = dict.fromkeys(("items", "keys", "get", "values", "__iter__"), torch.device)
        return OrderedDict, (), hidden, None, iter(dict.items(self))


def test_attributes_that_hide_methods_change_nothing(tmp_path):
    state = random_state(V1)
    torch.save({"model": _Shadowed(from_ours(state, "snap", V1))}, tmp_path / "a.pth")
    assert callable(torch.load(tmp_path / "a.pth", weights_only=True)["model"].__dict__["items"]), "the attack is void"
    assert equal(load_checkpoint(tmp_path / "a.pth").state, state)


def _with(name, value):
    def write(path):
        torch.save(from_ours(random_state(V1), "timm", V1) | {name: value}, path)

    return write


def _truncated(fraction, suffix=".pth"):
    def write(path):
        whole = path.with_name(f"whole{suffix}")
        save_foreign(whole, random_state(V1), V1, "snap")
        path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * fraction)])

    return write


def _torchscript(path):
    """What torch.jit.save writes, in its outline."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"archive/{name}", b"")


def _compressed(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))


BAD_FILES = {
    "a folder": (lambda path: path.mkdir(), "a folder"),
    "nothing": (lambda path: None, "no such file"),
    "an empty file": (lambda path: path.write_bytes(b""), "The file is empty"),
    "one byte": (lambda path: path.write_bytes(b"\x80"), "damaged"),
    "a text": (lambda path: path.write_text("weights"), "begins with"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><html>"), "a web page"),
    "an LFS pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "an ONNX model": (
        lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x05"),
        "a deployed model, such as ONNX",
    ),
    "an OpenVINO model": (
        lambda path: path.write_text('<?xml version="1.0"?><net>'),
        r"OpenVINO model\. Of deployed files only \.onnx is read; efficientformer convert CHECKPOINT FILE\.onnx",
    ),
    "an ORT model": (lambda path: path.write_bytes(b"\x20\0\0\0ORTM\0\0\0\0"), "ONNX Runtime"),
    "a TorchScript program": (_torchscript, "torch.jit or torch.export"),
    "numpy arrays": (lambda path: np.savez(path.open("wb"), a=np.ones(2)), "another zip archive"),
    "a compressed archive": (_compressed, "another zip archive"),
    "a pickle of numbers": (lambda path: path.write_bytes(pickle.dumps([1, 2])), "torch.save did not write it"),
    "a list": (lambda path: torch.save([torch.ones(1)], path), "no state dict; expected tensors by name; found a list"),
    "a dict without tensors": (lambda path: torch.save({"epoch": 1}, path), "no state dict.*found epoch"),
    "another network": (lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path), "in any layout we read"),
    "half a zip": (_truncated(0.5), "damaged"),
    "most of a zip": (_truncated(0.999), "damaged"),
    "half a safetensors": (_truncated(0.5, ".safetensors"), "safetensors file is damaged"),
    "a huge header": (lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"{}"), "safetensors file is damaged"),
    "a text among tensors": (_with("head.bias", "x"), "head.bias is not a tensor.*found str"),
    "a number as name": (_with(7, torch.ones(1)), "without a proper name.*found int"),
    "integers": (_with("head.bias", torch.ones(5, dtype=torch.int32)), "head.bias is of the wrong type.*found int32"),
    "long integers": (
        _with("head.bias", torch.ones(5).long()),
        r"head.bias \(expected floating point, found torch.int64",
    ),
    "complex": (_with("head.bias", torch.ones(5) * 1j), "head.bias is of the wrong type.*complex64"),
    "sparse": (_with("head.bias", torch.ones(5).to_sparse()), "head.bias is not a plain tensor.*sparse"),
    "meta": (_with("head.bias", torch.ones(5, device="meta")), "head.bias is not a plain tensor.*meta"),
    "NaN": (_with("head.bias", torch.full((5,), torch.nan)), "head.bias holds NaN or infinity"),
    "infinity": (_with("head.bias", torch.full((5,), torch.inf)), "head.bias holds NaN or infinity"),
    "a negative variance": (
        _with("stem.norm1.running_var", torch.full((4,), -1.0)),
        "stem.norm1.running_var holds negative variances",
    ),
    "a wrong shape": (_with("head_dist.bias", torch.ones(6)), r"head_dist.bias \(expected \[5\], found \[6\]\)"),
    "one value for many": (_with("head.bias", torch.ones(1).expand(10**9)), "claim more values than the file holds"),
    "a huge attention table": (
        _with("stages.3.blocks.2.token_mixer.attention_biases", torch.zeros(8, 10**4)),
        "Attention on too large a map; expected at most 4096 positions; found 100x100",
    ),
}


@pytest.mark.parametrize(("write", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_by_name(write, message, tmp_path):
    write(tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=rf"(?s)^bad.pth: .*{message}") as error:
        load_checkpoint(tmp_path / "bad.pth")
    assert "weights_only" not in str(error.value), "torch's advice to load unsafely"


def native_checkpoint(tmp_path, spec, state=None):
    save_native(tmp_path / "c.safetensors", state or random_state(spec), manifest(spec))
    return load_checkpoint(tmp_path / "c.safetensors")


class TestLoadInto:
    @pytest.mark.parametrize("spec", [V1, V2], ids=["v1", "v2"])
    def test_the_same_network(self, spec, tmp_path, recwarn):
        checkpoint = native_checkpoint(tmp_path, spec)
        model = EfficientFormer(spec)
        load_into(model, checkpoint)
        assert equal(model.state_dict(), checkpoint.state)
        assert not recwarn

    @pytest.mark.parametrize(("spec", "tables"), [(V1, 1), (V2, 3)], ids=["v1", "v2"])
    def test_another_input_size_resamples_the_tables(self, spec, tables, tmp_path):
        checkpoint = native_checkpoint(tmp_path, spec)
        model = EfficientFormer(spec.with_input_size((128, 192)))
        with pytest.warns(WeightsWarning, match=rf"{tables} attention-bias tables are resampled .*2x2 to 4x6") as said:
            load_into(model, checkpoint)
        assert "network is for 128x192 pixels and the weights are for 64x64" in str(said[0].message)
        old, new = checkpoint.state, model.state_dict()
        changed = [name for name in old if old[name].shape != new[name].shape]
        assert len(changed) == tables
        assert all(name.endswith("attention_biases") for name in changed)
        for name in changed:
            assert torch.equal(old[name][:, 0], new[name][:, 0])
            assert torch.allclose(old[name][:, -1], new[name][:, -1])
        assert all(torch.equal(old[name], new[name]) for name in old if name not in changed)

    def test_grids_of_equal_length_are_told_apart(self, tmp_path):
        spec = dataclasses.replace(V1, input_size=(64, 96))
        checkpoint = native_checkpoint(tmp_path, spec)
        model = EfficientFormer(spec.with_input_size((96, 64)))
        with pytest.warns(WeightsWarning, match="from 2x3 to 3x2"):
            load_into(model, checkpoint)

    def test_resampling_is_linear_in_the_offsets(self):
        table = (torch.arange(3)[:, None] * 10 + torch.arange(4)).reshape(1, 12).float()
        expected = torch.arange(5)[:, None] * 5 + torch.arange(7) / 2
        assert torch.allclose(resample_table(table, (3, 4), (5, 7)), expected.reshape(1, 35))

    def test_there_and_back(self):
        table = torch.rand(8, 49)
        back = resample_table(resample_table(table, (7, 7), (13, 13)), (13, 13), (7, 7))
        assert torch.allclose(back, table, atol=1e-6)

    def test_new_heads(self, tmp_path):
        checkpoint = native_checkpoint(tmp_path, V1)
        model = EfficientFormer(dataclasses.replace(V1, num_classes=3))
        torch.nn.init.ones_(model.head.weight)
        with pytest.warns(WeightsWarning, match=r"heads are new \(3 classes\)"):
            load_into(model, checkpoint, reset_head=True)
        assert 0.01 < model.head.weight.std() < 0.03
        assert model.head.bias.abs().max() == 0
        body = {n: t for n, t in model.state_dict().items() if not n.startswith("head")}
        assert equal(body, {n: t for n, t in checkpoint.state.items() if not n.startswith("head")})

    @pytest.mark.parametrize(("mine", "theirs"), [(True, False), (False, True)])
    def test_new_heads_settle_a_difference_in_distillation(self, mine, theirs, tmp_path):
        checkpoint = native_checkpoint(tmp_path, dataclasses.replace(V1, distilled=theirs))
        with pytest.warns(WeightsWarning, match="heads are new"):
            load_into(EfficientFormer(dataclasses.replace(V1, distilled=mine)), checkpoint, reset_head=True)

    def test_the_distillation_head_left_out(self, tmp_path):
        checkpoint = native_checkpoint(tmp_path, V1)
        model = EfficientFormer(dataclasses.replace(V1, distilled=False))
        with pytest.warns(WeightsWarning, match="distillation head is left out"):
            load_into(model, checkpoint, drop_dist_head=True)
        assert torch.equal(model.head.weight, checkpoint.state["head.weight"])

    def test_kernels_are_summed_over_colours_for_grey_pictures(self, tmp_path):
        checkpoint = native_checkpoint(tmp_path, V1)
        model, colour = EfficientFormer(dataclasses.replace(V1, in_chans=1)).eval(), EfficientFormer(V1).eval()
        load_into(colour, checkpoint)
        with pytest.warns(WeightsWarning, match="kernels are summed over the colours"):
            load_into(model, checkpoint)
        grey = torch.rand(2, 1, 64, 64)
        torch.testing.assert_close(model(grey), colour(grey.expand(-1, 3, -1, -1)))

    def test_another_stem_stride_is_said(self, tmp_path):
        checkpoint = native_checkpoint(tmp_path, V1)
        model = EfficientFormer(dataclasses.replace(V1, stem_stride=1, input_size=(16, 16)))
        with pytest.warns(WeightsWarning, match="stride goes from 4 to 1"):
            load_into(model, checkpoint)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_classes": 7}, "Other classes; expected 7; found 5. reset_head=True"),
            ({"in_chans": 2}, "Other input channels; expected 2; found 3. Build the network with in_chans=3"),
            ({"distilled": False}, "weights have a distillation head.*drop_dist_head=True"),
            (
                {"stages": V1.stages[:3] + v1_spec(W, (1, 1, 1, 3), 1).stages[3:]},
                "another architecture: .*stages.3.blocks.1",
            ),
            ({"stages": v1_spec((10, *W[1:]), (1, 1, 1, 2), 1).stages}, "another architecture"),
        ],
    )
    def test_what_does_not_fit_is_refused_and_nothing_is_changed(self, change, message, tmp_path):
        checkpoint = native_checkpoint(tmp_path, V1)
        model = EfficientFormer(dataclasses.replace(V1, **change))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            load_into(model, checkpoint)
        assert equal(model.state_dict(), before)

    def test_a_missing_distillation_head(self, tmp_path):
        checkpoint = native_checkpoint(tmp_path, dataclasses.replace(V1, distilled=False))
        with pytest.raises(CheckpointError, match=r"network has a distillation head.*distilled=False"):
            load_into(EfficientFormer(V1), checkpoint)


class TestHeadless:
    """What timm saves of a network that was made with num_classes=0."""

    @pytest.fixture(params=["v1", "v2"])
    def network(self, request, monkeypatch):
        """A zoo's network, small."""
        name, spec = {"v1": ("efficientformer_l1", V1), "v2": ("efficientformerv2_s0", V2)}[request.param]
        small = dataclasses.replace(zoo.resolve(name).card, spec=spec)
        monkeypatch.setattr(zoo, "cards", lambda: (small,))
        return EfficientFormer(spec), name

    def written(self, network, path):
        theirs = from_ours(network.state_dict(), "timm", network.spec)
        torch.save({name: tensor for name, tensor in theirs.items() if not name.startswith("head")}, path)
        return path

    @pytest.mark.parametrize("num_classes", [3, 5, np.int64(1000)])
    @pytest.mark.filterwarnings("error::UserWarning")
    def test_new_heads_are_given_where_the_network_is_named(self, network, num_classes, tmp_path):
        (network, name), path = network, self.written(network[0], tmp_path / "z.pth")
        with pytest.warns(WeightsWarning, match=rf"heads are new \({num_classes} classes\)"):
            found = get_model(name, pretrained=path, num_classes=num_classes)
        assert found.spec == dataclasses.replace(network.spec, num_classes=int(num_classes))
        assert found.manifest.labels == ()
        body = {n: t for n, t in found.state_dict().items() if not n.startswith("head")}
        assert equal(body, {n: t for n, t in network.state_dict().items() if not n.startswith("head")})
        assert 0.01 < found.head.weight.std() < 0.03

    def test_it_is_refused_where_nothing_says_the_classes(self, network, tmp_path):
        (network, name), path = network, self.written(network[0], tmp_path / "z.pth")
        for load in (lambda: get_model(name, pretrained=path), lambda: get_model(path, num_classes=3)):
            with pytest.raises(
                CheckpointError, match=r"head\.weight is missing.*name the network, and give num_classes"
            ):
                load()

    def test_half_a_head_is_a_damaged_file(self, network, tmp_path):
        network, name = network
        theirs = from_ours(network.state_dict(), "timm", network.spec)
        for lost in ("head.bias", "head_dist.weight", "norm.weight"):
            torch.save({n: tensor for n, tensor in theirs.items() if n != lost}, tmp_path / "z.pth")
            with pytest.raises(CheckpointError, match=f"missing: {lost}"):
                get_model(name, pretrained=tmp_path / "z.pth", num_classes=3)


def test_a_deployed_file_of_another_tool_is_known_by_its_ending(tmp_path):
    (tmp_path / "own.engine").write_bytes(b"ftrt0000")
    with pytest.raises(CheckpointError, match=r"a deployed model \(\.engine\)\. Of deployed files only \.onnx is read"):
        load_checkpoint(tmp_path / "own.engine")
