"""The network in the package: size, labels, agreement of its two files, and that it is what the recipe says."""

import json
from importlib.resources import files

import numpy as np
import pytest
import torch

from efficientformer import Classifier, get_model
from efficientformer.export.deployable import embedded_file
from efficientformer.export.verify import verify
from efficientformer.runtime.engines.onnxruntime import OnnxRuntimeEngine
from efficientformer.runtime.engines.openvino import OpenVinoEngine
from efficientformer.spec.errors import ExportError
from efficientformer.spec.labels import label_names
from efficientformer.spec.variants import VARIANTS
from efficientformer.spec.zoo import CIFAR10_PREPROCESS, EMBEDDED
from tests.unit.test_engines import without_compiler

ASSETS = files("efficientformer") / "assets"


def test_both_files_together_stay_below_6_mb():
    total = sum(len((ASSETS / f"{EMBEDDED}{suffix}").read_bytes()) for suffix in (".onnx", ".safetensors"))
    assert total <= 6_000_000


def test_the_two_files_are_one_network():
    model = get_model(EMBEDDED, pretrained=True)
    agreement = verify(model, embedded_file(), half_storage=True)
    assert agreement.max_difference <= 0.02 * agreement.largest_logit


def differing(engine):
    real = engine.run
    return lambda self, batch: real(self, batch) + 1


def test_an_engine_that_fails_or_differs_keeps_no_file_from_being_built(monkeypatch):
    model = get_model(EMBEDDED, pretrained=True)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="not in openvino.*cannot run a batch"):
        without_compiler(patch)
        verify(model, embedded_file(), half_storage=True)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="not in openvino.*a difference of"):
        patch.setattr(OpenVinoEngine, "run", differing(OpenVinoEngine))
        verify(model, embedded_file(), half_storage=True)
    monkeypatch.setattr(OnnxRuntimeEngine, "run", differing(OnnxRuntimeEngine))
    with pytest.raises(ExportError, match="differs from the network"):
        verify(model, embedded_file(), half_storage=True)


def test_manifest_is_complete():
    manifest = Classifier().manifest
    assert manifest.labels == label_names("cifar10")
    assert manifest.spec == VARIANTS[EMBEDDED]
    assert manifest.preprocess == CIFAR10_PREPROCESS
    assert manifest.metrics["top1"] >= 94.0
    assert manifest.provenance["recipe"] == "recipes/cifar10.py, then four times recipes/cifar10_cutmix.py"


def test_it_can_be_fine_tuned():
    with pytest.warns(UserWarning, match="(?i)head"):
        model = get_model(EMBEDDED, pretrained=True, num_classes=2).train()
    model(torch.rand(4, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_info_and_list_show_it(cli):
    data = json.loads(cli("info", EMBEDDED, "--json")[1])
    assert data["params"] == sum(np.prod(t.shape) for t in get_model(EMBEDDED).parameters())
    code, out, _ = cli("list")
    assert code == 0
    assert EMBEDDED in out
    assert "82.23 M" in out
    code, out, _ = cli("info", "L3")
    assert code == 0
    assert "31,406,000" in out
    assert "one MB3D block" in out


def test_download_has_nothing_to_do(cli):
    code, out, err = cli("download", EMBEDDED)
    assert (code, out) == (0, "")
    assert "in the package" in err
    code, _, err = cli("download", "efficientformer_l1", "--offline")
    assert code == 1
    assert "by hand" in err
    assert cli("download", "efficientformer_l1", "--source", "nobody")[0] == 2
