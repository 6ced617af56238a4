"""The networks in train form: gradients everywhere, no hidden state, every option does what it says."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from efficientformer import get_model
from efficientformer.models import blocks
from efficientformer.models.attention import TokenAttention
from efficientformer.models.layers import LayerScale, StridedDepthwise
from efficientformer.models.network import EfficientFormer
from efficientformer.spec.errors import InputSizeError, SpecError, UsageError
from efficientformer.spec.variants import VARIANTS, v1_spec, v2_spec
from tests.unit.test_spec import SLIMMED

TINY = {
    **SLIMMED,
    "v2 with every part": v2_spec((16, 24, 32, 48), ((4,), (4,), (4, 3), (4, 3)), 1, input_size=64, num_classes=7),
    "v1 with every part": v1_spec((16, 24, 32, 48), (1, 1, 2, 2), (1, 1), input_size=64, num_classes=7),
    "one head": v1_spec((16, 24, 32, 48), (1, 1, 1, 1), 1, input_size=64, num_classes=7, distilled=False),
}

_CONVOLUTIONS = v2_spec((8, 8, 8, 8), ((1,),) * 4, 0, input_size=64, num_classes=7)
ATTENTION_INTO_STAGE_3 = dataclasses.replace(
    _CONVOLUTIONS,
    stages=tuple(
        dataclasses.replace(stage, embedding=embedding)
        for stage, embedding in zip(_CONVOLUTIONS.stages, ("stem", "conv", "attn", "conv"), strict=True)
    ),
)


def images_for(spec, batch=2, seed=0):
    return torch.randn(batch, spec.in_chans, *spec.input_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("mode", ["plain", "heads", "eval", "drop path", "checkpointing", "bf16"])
def test_every_parameter_gets_a_gradient_in_every_training_mode(name, mode):
    spec = TINY[name]
    if mode == "heads" and not spec.distilled:
        pytest.skip("one head")
    torch.manual_seed(0)
    model = EfficientFormer(spec, drop_path_rate=0.2 if mode == "drop path" else 0.0, layer_scale_init=0.1)
    model.train(mode != "eval")  # fine-tuning with frozen batch norms runs in evaluation mode
    model.set_grad_checkpointing(mode == "checkpointing")
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16"):
        # batch 16 with rate 0.2: a seed where no block is dropped for every image
        out = model(images_for(spec, 16 if mode == "drop path" else 3), return_heads=mode == "heads")
    loss = sum(head.float().square().mean() for head in (out if isinstance(out, tuple) else (out,)))
    loss.backward()
    starved = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert starved == []
    # a bias in front of a BatchNorm in training, and one added to all scores alike, cannot matter; nothing else is zero
    dead = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() == 0]
    assert all("attention_biases" not in n and "gamma" not in n and "head" not in n for n in dead), dead


@pytest.mark.parametrize("name", TINY)
def test_features_of_all_stages_and_the_pooled_ones(name):
    spec = TINY[name]
    model = EfficientFormer(spec).eval()
    images = images_for(spec)
    maps = model.features(images)
    assert [tuple(m.shape) for m in maps] == [(2, s.width, *g) for s, g in zip(spec.stages, spec.grids, strict=True)]
    (pooled,) = model.extract_feat(images)
    assert pooled.shape == (2, spec.stages[-1].width)
    assert all(torch.equal(a, b) for a, b in zip(model.extract_feat(images, stage="backbone"), maps, strict=True))
    torch.testing.assert_close(
        model.head(pooled), model(images) if not spec.distilled else model(images, return_heads=True)[0]
    )
    with pytest.raises(UsageError, match="neck"):
        model.extract_feat(images, stage="head")


@pytest.mark.parametrize("name", TINY)
def test_maps_of_some_stages_and_no_stage_more_than_they_need(name):
    model = EfficientFormer(TINY[name]).eval()
    images = images_for(model.spec)
    maps = model.features(images)
    ran = []
    for index, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda *_, index=index: ran.append(index))
    for wanted, up_to in (((0,), 1), ([1, 2], 3), ((3, 1), 4)):
        ran.clear()
        found = model.features(images, wanted)
        assert ran == list(range(up_to))
        assert all(torch.equal(a, maps[index]) for a, index in zip(found, wanted, strict=True))
    assert [m.shape[1] for m in maps] == list(model.channels)
    sides = [(images.shape[-1] - 1) // stride + 1 for stride in model.strides]
    assert [m.shape[-1] for m in maps] == sides


@pytest.mark.parametrize("wanted", [(), (4,), (-1,), 3, "0"])
def test_maps_of_no_stage_are_refused(wanted):
    with pytest.raises(UsageError, match="Illegal out_indices; expected some of the stages 0, 1, 2, 3"):
        EfficientFormer(TINY["one head"]).features(torch.rand(1, 3, 64, 64), wanted)


@pytest.mark.parametrize(
    ("name", "fits"),
    [("v1 with every part", (0, 1)), ("one head", (0, 1, 2)), ("v2 with every part", (0, 1))],
)
def test_the_size_is_bound_by_the_stages_that_run(name, fits):
    model = EfficientFormer(TINY[name]).eval()
    images = torch.rand(1, 3, 97, 130)
    assert [m.shape[-2:] for m in model.features(images, fits)] == [
        (-(-97 // stride), -(-130 // stride)) for stride in model.strides[: len(fits)]
    ]
    with pytest.raises(InputSizeError, match="97x130"):
        model.features(images, (len(fits),))


def test_a_table_is_bound_to_its_own_map_only():
    """Stage 4's of the sizes 48 and 64 are equal, stage 3's are not."""
    model = EfficientFormer(TINY["one head"]).eval()
    assert model(torch.rand(1, 3, 48, 48)).shape == (1, 7)
    embeds = v2_spec((16, 24, 32, 48), ((4,), (), (3,), ()), 0, input_size=64)  # attends to stage 3's map
    assert embeds.stages[3].embedding == "attn"
    assert [embeds.fits((48, 48), stages) for stages in (3, 4)] == [True, False]


@pytest.mark.parametrize("name", ["v1 with every part", "v2 with every part", "one head"])
def test_new_heads(name):
    model = EfficientFormer(TINY[name]).double().eval()
    model.head.requires_grad_(False)
    images = images_for(model.spec).double()
    maps = model.features(images)
    model.reset_classifier(np.int64(200))
    assert model.spec == dataclasses.replace(TINY[name], num_classes=200)
    assert type(model.spec.num_classes) is int
    heads = [head for head in (model.head, model.head_dist) if head is not None]
    assert len(heads) == 1 + model.spec.distilled
    for head in heads:
        assert head.weight.dtype == torch.float64
        assert head.weight.requires_grad
        assert not head.training
        assert 0.015 < head.weight.std() < 0.025
        assert head.bias.abs().max() == 0
    assert model(images).shape == (2, 200)
    assert all(torch.equal(a, b) for a, b in zip(model.features(images), maps, strict=True))


def test_no_classes_are_refused_and_nothing_is_changed():
    model = EfficientFormer(TINY["one head"])
    head = model.head
    with pytest.raises(SpecError, match=r"from 1 to 1000000; found 0\..*extract_feat\(x\)\[0\].*features\(x\)"):
        model.reset_classifier(0)
    with pytest.raises(SpecError, match=r"extract_feat\(x\)\[0\]"):
        get_model("efficientformer_l1", num_classes=0)
    assert model.head is head
    assert model.spec == TINY["one head"]


def test_evaluation_returns_the_mean_of_the_heads_logits():
    model = EfficientFormer(TINY["v2 with every part"]).eval()
    images = images_for(model.spec)
    cls, dist = model(images, return_heads=True)
    assert not torch.equal(cls, dist)
    torch.testing.assert_close(model(images), (cls + dist) / 2)
    with pytest.raises(UsageError, match="one head"):
        EfficientFormer(TINY["one head"])(images_for(TINY["one head"]), return_heads=True)


@pytest.mark.parametrize("name", ["v1 with every part", "v2 with every part"])
def test_nothing_is_cached(name):
    """Loading other weights after a forward in evaluation mode must give those weights' outputs, biases included."""
    model, other = (EfficientFormer(TINY[name], layer_scale_init=0.5).eval() for _ in range(2))
    for parameter in (p for n, p in other.named_parameters() if "attention_biases" in n):
        torch.nn.init.normal_(parameter, std=3)
    images = images_for(model.spec)
    before = model(images)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(images), other(images))
    assert not torch.equal(before, other(images))
    assert model.eval() is model
    assert model.train() is model


@pytest.mark.parametrize(
    "spec",  # of each kind of block one: compiling takes a second a block
    [
        v1_spec((16, 24, 32, 48), (0, 0, 1, 2), (1, 1), input_size=64, num_classes=7),
        v1_spec((16, 24, 32, 48), (1, 0, 0, 0), 0, input_size=64, num_classes=7),
        v2_spec((16, 24, 32, 48), ((4,), (), (3,), ()), 1, input_size=64, num_classes=7),
    ],
    ids=["v1 with every part", "no MB3D at all", "v2 with every part"],
)
def test_compiles_exports_and_runs_in_bf16_and_channels_last(spec):
    model = EfficientFormer(spec, layer_scale_init=0.1).eval()
    images = images_for(model.spec)
    expected = model(images)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)
    features = torch.compile(model.features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(features(images, (1, 3)), model.features(images)[1::2], rtol=1e-4, atol=1e-5)
    trained, eager = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    found = torch.compile(trained, fullgraph=True, backend="aot_eager")(images)
    torch.testing.assert_close(found, eager(images), rtol=1e-4, atol=1e-5)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images[:1].repeat(5, 1, 1, 1))[:1], expected[:1], rtol=1e-4, atol=1e-5)
    last = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
    half = model.to(torch.bfloat16)(images.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.05 * expected.abs().max().item())


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model = EfficientFormer(TINY["v2 with every part"], layer_scale_init=0.1).train()
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(images_for(model.spec)).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_drop_path_rises_linearly_and_only_acts_in_training():
    spec = TINY["v1 with every part"]
    model = EfficientFormer(spec, drop_path_rate=0.5, layer_scale_init=1.0)
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(6)])
    images = images_for(spec)
    assert torch.equal(model.eval()(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize("option", ["drop_path_rate", "head_dropout"])
def test_illegal_rates_are_refused(option):
    for rate in (-0.1, 1.0):
        with pytest.raises(UsageError, match=option):
            EfficientFormer(TINY["one head"], **{option: rate})


def test_head_dropout_acts_in_training_only():
    model = EfficientFormer(TINY["no MB3D at all"], head_dropout=0.9).eval()
    images = images_for(model.spec)
    assert torch.equal(model(images), model(images))
    model.head_dropout.train()
    assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    ("name", "size", "fits"),
    [
        ("v1 with every part", (64, 64), True),
        ("v1 with every part", (50, 60), True),  # the attention maps are those of 64x64
        ("v1 with every part", (96, 64), False),
        ("v2 with every part", (61, 64), True),
        ("v2 with every part", (96, 96), False),
        ("no MB3D at all", (96, 33), True),  # no attention, no table to fit
        ("no MB3D at all", (31, 64), False),
    ],
)
def test_inputs_must_fit_the_attention_tables(name, size, fits):
    check_fit(TINY[name], size, fits)


@pytest.mark.parametrize(
    ("spec", "size", "fits"),
    [
        (ATTENTION_INTO_STAGE_3, (60, 64), True),  # the maps of stages 2 and 3 are those of 64x64
        (ATTENTION_INTO_STAGE_3, (128, 128), False),
        (v1_spec((8, 8, 8, 8), (0, 0, 0, 1), 1, input_size=224), (208, 208), True),  # stage 3's map is another
        (v1_spec((8, 8, 8, 8), (0, 0, 1, 1), (1, 1), input_size=224), (208, 208), False),
    ],
)
def test_only_the_maps_that_attention_is_bound_to_must_fit(spec, size, fits):
    check_fit(spec, size, fits)


def check_fit(spec, size, fits):
    model = EfficientFormer(spec).eval()
    images = torch.rand(1, spec.in_chans, *size)
    if fits:
        assert model(images).shape == (1, spec.num_classes)
    else:
        with pytest.raises(InputSizeError, match="x".join(map(str, spec.input_size))):
            model(images)


def test_wrong_channels_are_refused_with_both_numbers():
    with pytest.raises(UsageError, match=r"expected 3; found 1"):
        EfficientFormer(TINY["one head"])(torch.rand(1, 1, 64, 64))


@pytest.mark.parametrize("size", [160, (192, 256), 250])
def test_other_input_sizes_can_be_built(size):
    spec = dataclasses.replace(VARIANTS["efficientformer_l1"], num_classes=5).with_input_size(size)
    images = images_for(spec, 1)
    assert EfficientFormer(spec).eval()(images).shape == (1, 5)


@pytest.mark.parametrize("name", ["efficientformer_l1", "efficientformer_cifar10"])
def test_checkpointing_changes_neither_gradients_nor_statistics(name):
    spec = dataclasses.replace(VARIANTS[name], num_classes=3)
    plain = EfficientFormer(spec, layer_scale_init=0.1).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.rand(2, 3, *spec.input_size, generator=torch.Generator().manual_seed(0))
    for model in (plain, saving):
        model(x).square().sum().backward()
    for (key, a), b in zip(plain.state_dict().items(), saving.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), key


@pytest.mark.parametrize("name", TINY)
def test_gradients_of_channels_last_maps_are_channels_last(name):
    # elsewhere BatchNorm's backward pass on CPUs takes ten times as long
    model = EfficientFormer(TINY[name]).train().to(memory_format=torch.channels_last)
    found = []
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_full_backward_pre_hook(lambda _, gradients: found.extend(gradients))
    model(images_for(TINY[name]).to(memory_format=torch.channels_last)).square().mean().backward()
    assert len(found) >= 9
    assert all(gradient.is_contiguous(memory_format=torch.channels_last) for gradient in found)


def test_strided_depthwise_convolutions_are_single_precision_inside_bf16_training():
    """Where torch would take 20 times as long in bf16: the result is the single-precision one, rounded once."""
    layer = StridedDepthwise(16)
    x = torch.randn(4, 16, 7, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    exact = layer(x)
    assert exact.shape == (4, 16, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        trained, measured = layer(x), layer.eval()(x)
    assert trained.dtype == measured.dtype == torch.bfloat16
    assert torch.equal(trained, exact.bfloat16())
    assert not torch.equal(measured, trained)  # computed in bf16, as a network in use is
    (gradient,) = torch.autograd.grad(trained.float().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(exact.sum(), x)[0])
    strided = [
        m
        for m in EfficientFormer(VARIANTS["efficientformerv2_s0"]).modules()
        if isinstance(m, nn.Conv2d) and m.groups > 1
    ]
    assert {type(m) for m in strided if m.stride == (2, 2)} == {StridedDepthwise}


@pytest.mark.parametrize(
    ("given", "expected"), [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "float32")]
)
def test_layer_scales_keep_bf16_maps_in_bf16(given, expected):
    scale = LayerScale(3, 0.1, on_map=True)
    found = scale(torch.ones(2, 3, 4, 4, dtype=getattr(torch, given)))
    assert found.dtype == getattr(torch, expected)
    found.float().sum().backward()
    assert scale.gamma.grad is not None
    assert scale.gamma.grad.dtype == torch.float32
    assert scale.gamma.grad.tolist() == [32.0] * 3


def test_attentions_on_one_map_share_one_index():
    """It has an entry for every pair of positions, and a small file may ask for hundreds of attentions."""
    spec = v1_spec((8, 8, 8, 8), (1, 1, 4, 4), (4, 4), input_size=128, num_classes=2)
    model = EfficientFormer(spec)
    places = [part.offset_index.data_ptr() for part in model.modules() if isinstance(part, TokenAttention)]
    assert len(places) == 8
    assert len(set(places)) == 2


def test_an_index_is_the_same_whatever_was_built_before():
    spec = v1_spec((8, 8, 8, 8), (1, 1, 1, 1), 1, input_size=64, num_classes=2)
    with torch.inference_mode():
        EfficientFormer(spec)
    with torch.device("meta"):
        EfficientFormer(spec)
    model = EfficientFormer(spec).train()
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    assert model.stages[3].blocks[0].token_mixer.attention_biases.grad is not None


@pytest.mark.parametrize("name", ["v2 with every part", "v1 with every part"])
def test_layer_scales_inside_batch_norms_change_no_function_and_no_gradient(name, monkeypatch):
    """In training a branch's last BatchNorm multiplies by its layer scale, but for fp16, which has no room for 1e-5."""
    torch.manual_seed(0)
    model = EfficientFormer(TINY[name], layer_scale_init=0.3).double().train()
    images = images_for(TINY[name], 3).double()
    scaled = []
    monkeypatch.setattr(
        LayerScale, "forward", lambda self, x: scaled.append(x) or x * self.gamma.reshape(-1, *[1] * 2 * self.on_map)
    )

    def passes():
        scaled.clear()
        model.zero_grad()
        logits = model(images, return_heads=True)[0]
        logits.logsumexp(1).sum().backward()
        return logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, len(scaled)

    inside, gradients, some = passes()
    monkeypatch.setattr(blocks, "_LAST_NORM", {})
    after, expected, every = passes()
    assert some < every
    torch.testing.assert_close(inside, after, atol=1e-12, rtol=0)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-9, rtol=1e-6, msg=key)
    monkeypatch.undo()
    assert blocks._in_fp16(images.half())
    with torch.autocast("cpu", torch.float16):
        assert blocks._in_fp16(images.float())
    assert not blocks._in_fp16(images)


def test_a_picture_without_its_batch_is_told():
    with pytest.raises(UsageError, match=r"expected \(B, C, H, W\); found \(3, 64, 64\).*x\[None\]"):
        EfficientFormer(TINY["one head"])(torch.zeros(3, 64, 64))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_network_in_training_is_traced():
    model = EfficientFormer(TINY["one head"], layer_scale_init=0.1)
    images = images_for(model.spec, 2)
    traced = torch.jit.trace(model, images, check_trace=False)
    torch.testing.assert_close(traced(images), model(images))
