"""The same weights in timm and here give the same numbers: through a file, for every variant, in two regimes."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from efficientformer.models.network import EfficientFormer
from efficientformer.spec.variants import VARIANTS
from efficientformer.weights.checkpoint import load_checkpoint, save_foreign
from efficientformer.weights.formats.translate import from_ours
from efficientformer.weights.loading import load_into
from tests.parity.outputs import outputs
from tests.parity.regimes import REGIMES, random_state

PUBLISHED = [f"efficientformer_l{n}" for n in (1, 3, 7)] + [f"efficientformerv2_{n}" for n in ("s0", "s1", "s2", "l")]
SEEDS = {"efficientformer_l3": (0,), "efficientformer_l7": (0,), "efficientformerv2_l": (0,)}  # others have three
# Equal arithmetic in equal order: what is left is summation order. A wrong port is off by 1e-3 or more.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


@pytest.fixture(scope="module")
def pair(request):
    """One variant's name, and its network in timm and here; tests load the weights."""
    theirs = timm.create_model(request.param, pretrained=False)
    return request.param, theirs, EfficientFormer(VARIANTS[request.param])


def largest_difference(a, b):
    return {name: (a[name] - b[name]).abs().max().item() for name in a}


def fill_timm(model, name, seed, regime):
    """Random weights into a timm model; train() empties the bias cache that timm keeps in evaluation."""
    model.float().train()
    spec = VARIANTS[name]
    model.load_state_dict(from_ours(random_state(spec, seed, regime), "timm", spec), strict=True)


@torch.inference_mode()
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(
    ("pair", "seed"),
    [(name, seed) for name in PUBLISHED for seed in SEEDS.get(name, (0, 1, 2))],
    indirect=["pair"],
    scope="module",
)
def test_a_file_of_timm_gives_timms_numbers(pair, tmp_path, seed, regime):
    name, theirs, ours = pair
    fill_timm(theirs, name, seed, regime)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint = load_checkpoint(tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").unlink()
    assert (checkpoint.layout, checkpoint.spec) == ("timm", VARIANTS[name])
    load_into(ours.float(), checkpoint)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
    for dtype, limit in TOLERANCE.items():
        theirs.train()  # empties timm's bias cache, which .to() would leave in the old precision
        expected = outputs(theirs.to(dtype), images.to(dtype))
        difference = largest_difference(expected, outputs(ours.to(dtype), images.to(dtype)))
        assert 0.1 < expected["logits"].std() < 30, "the weights are degenerate"
        assert max(difference.values()) <= limit, (dtype, difference)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["efficientformer_l1", "efficientformerv2_s0"])
def test_timm_loads_the_safetensors_file_we_write_for_it(name, tmp_path):
    spec = VARIANTS[name]
    state = random_state(spec, 3)
    save_foreign(tmp_path / "model.safetensors", state, spec, "timm")
    theirs = timm.create_model(name, pretrained=False, checkpoint_path=str(tmp_path / "model.safetensors"))
    ours = EfficientFormer(spec)
    ours.load_state_dict(state)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    difference = largest_difference(outputs(theirs, images), outputs(ours, images))
    assert max(difference.values()) <= TOLERANCE[torch.float32], difference


def _set_eps(kind, eps):
    def mutate(model):
        for part in model.modules():
            if isinstance(part, kind):
                part.eps = eps

    return mutate


def _swap_heads(model):
    model.head, model.head_dist = model.head_dist, model.head


def _swap_scales(model):
    block = model.stages[0].blocks[0]
    block.layer_scale1, block.layer_scale2 = block.layer_scale2, block.layer_scale1


@torch.inference_mode()
@pytest.mark.parametrize(
    ("mutate", "regime"),
    [
        pytest.param(_set_eps(nn.LayerNorm, 1e-12), "eps", id="LayerNorm eps as in transformers"),
        pytest.param(_set_eps(nn.BatchNorm2d, 1e-6), "eps", id="BatchNorm eps"),
        pytest.param(_swap_heads, "natural", id="heads swapped"),
        pytest.param(_swap_scales, "natural", id="layer scales swapped"),
    ],
)
def test_the_regimes_show_the_usual_mistakes(mutate, regime):
    """Guards the tests above: each mistake, once made, is at least ten tolerances away."""
    spec = VARIANTS["efficientformer_l1"]
    model = EfficientFormer(spec)
    model.load_state_dict(random_state(spec, 0, regime))
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    right = outputs(model, images)
    mutate(model)
    difference = largest_difference(right, outputs(model, images))
    assert max(difference.values()) > 10 * TOLERANCE[torch.float32], difference
