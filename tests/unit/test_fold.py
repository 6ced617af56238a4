"""Deploy form: the same function, the train form untouched, and a fold that went wrong is an error."""

import copy

import pytest
import torch
from torch import nn

from efficientformer.models import fold as fold_module
from efficientformer.models.fold import fold
from efficientformer.models.layers import ConvNorm
from efficientformer.models.network import EfficientFormer
from efficientformer.spec.errors import ExportError
from tests.unit.test_models import TINY, images_for


def randomised(spec, seed=0):
    """A network whose every factor, bias and running statistic differs from its neutral first value."""
    torch.manual_seed(seed)
    model = EfficientFormer(spec, layer_scale_init=0.3).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name or ("norm" in name and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5)
            elif (tensor.is_floating_point() and tensor.ndim < 2) or tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


@pytest.mark.parametrize("name", TINY)
def test_folded_network_is_the_same_function(name):
    model = randomised(TINY[name])
    before = copy.deepcopy(model.state_dict())
    images = images_for(model.spec)
    deployed = fold(model)
    torch.testing.assert_close(deployed(images), model(images), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    kinds = {type(module) for module in deployed.modules()}
    assert not kinds & {nn.BatchNorm2d, ConvNorm, nn.Dropout}
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    assert sum(p.numel() for p in deployed.parameters()) < sum(p.numel() for p in model.parameters())


def test_another_default_device_changes_nothing():
    model = randomised(TINY["one head"])
    with torch.device("meta"):  # as with torch.set_default_device("cuda")
        deployed = fold(model)
    assert next(deployed.parameters()).device.type == "cpu"


def test_training_mode_and_dtype_survive():
    model = randomised(TINY["one head"]).train().to(torch.bfloat16)
    deployed = fold(model)
    assert model.training
    assert not deployed.training
    assert deployed.head.weight.dtype == torch.bfloat16


def test_a_wrong_fold_is_caught(monkeypatch):
    monkeypatch.setattr(fold_module, "_scale_output", lambda layer, scale: None)
    with pytest.raises(ExportError, match="differs"):
        fold(randomised(TINY["one head"]))


def test_weights_with_nan_are_caught():
    model = randomised(TINY["one head"])
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(ExportError, match="differs"):
        fold(model)


def test_a_network_of_synchronised_norms_is_folded():
    model = randomised(TINY["v2 with every part"])
    images = images_for(model.spec)
    expected = model(images)
    deployed = fold(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    torch.testing.assert_close(deployed(images), expected, rtol=1e-4, atol=1e-4)
