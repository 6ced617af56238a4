"""Key maps: every layout's names, order and shapes, both ways, for published and for slimmed networks.

``fixtures/checkpoint-keys/keys.json.gz`` holds, for each ``<layout>_<variant>``, the ordered [name, shape] pairs of the
state dict that the source's own code saves.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import re
import tracemalloc
from pathlib import Path

import pytest
import torch

from efficientformer.models.attention import offset_index
from efficientformer.models.network import EfficientFormer
from efficientformer.spec.arch import AttentionSpec, BlockSpec
from efficientformer.spec.errors import CheckpointError, UsageError
from efficientformer.spec.variants import VARIANTS, v1_spec, v2_spec
from efficientformer.weights.formats.detect import LAYOUTS, detect_layout
from efficientformer.weights.formats.infer import infer_spec
from efficientformer.weights.formats.layout import skeleton
from efficientformer.weights.formats.translate import INDEX_RULE, from_ours, to_ours

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint-keys" / "keys.json.gz"
KEYS = json.loads(gzip.decompress(FIXTURE.read_bytes()))

W, D = (8, 12, 16, 24), (1, 2, 1, 3)


def _uneven(spec):
    """Expansions that differ from block to block, as slimming leaves them."""
    ratios = iter([1.5, 2.25, 0.75, 3.25, 1, 2.5, 4, 0.5] * 4)
    stages = [
        dataclasses.replace(s, blocks=tuple(dataclasses.replace(b, expansion=next(ratios)) for b in s.blocks))
        for s in spec.stages
    ]
    return dataclasses.replace(spec, stages=tuple(stages))


def _with_stage(spec, index, **changes):
    stages = list(spec.stages)
    stages[index] = dataclasses.replace(stages[index], **changes)
    return dataclasses.replace(spec, stages=tuple(stages))


V2 = v2_spec(W, ((4,), (4, 3), (3, 4), (4, 3, 3)), 1, input_size=64, num_classes=5)
SPECS = {
    "v1 with one MB3D": v1_spec(W, D, 1, input_size=64, num_classes=5),
    "v1 with several MB3D": v1_spec(W, D, 2, input_size=64, num_classes=5),
    "v1 whose last stage is all MB3D": v1_spec(W, D, 3, input_size=96, num_classes=5),
    "v1 without MB3D": v1_spec(W, D, 0, num_classes=5),
    "v1 with an empty stage": v1_spec(W, (2, 0, 1, 1), 1, input_size=64, num_classes=5),
    "v1 with an empty last stage": v1_spec(W, (1, 1, 1, 0), 0, num_classes=5),
    "v1 with uneven expansions": _uneven(v1_spec(W, D, 1, input_size=64, num_classes=5)),
    "v1 with one head, grey": v1_spec(W, D, 1, input_size=64, num_classes=3, distilled=False, in_chans=1),
    "v1 with other attention sizes": dataclasses.replace(
        v1_spec(W, D, 1, input_size=64, num_classes=5), attention=AttentionSpec(4, 8, 3)
    ),
    "v2": V2,
    "v2 with uneven expansions": _uneven(V2),
    "v2 with one head, grey": dataclasses.replace(V2, distilled=False, in_chans=1),
    "v2 without attention blocks": v2_spec(W, ((4,), (4,), (4,), (4,)), 0, input_size=64, num_classes=5),
    "v2 with attention at full resolution": v2_spec(
        W, ((4,), (4,), (3, 4), (4,)), 1, input_size=96, num_classes=5, stage3_stride=1
    ),
    "v2 with a convolution before stage 4": _with_stage(V2, 3, embedding="conv"),
    "v2 with attention before stage 3": _with_stage(V2, 2, embedding="attn"),
    "v2 with attention between FFNs": _with_stage(V2, 2, blocks=(BlockSpec("attn_ffn", 3, 2), BlockSpec("ffn", 4))),
    "v2 with other attention sizes": dataclasses.replace(V2, attention=AttentionSpec(4, 8, 3, 4)),
}
SPEC_LAYOUTS = [
    pytest.param((spec, layout), id=f"{name}-{layout}")
    for name, spec in SPECS.items()
    for layout, families in LAYOUTS.items()
    if spec.family in families
]


@functools.lru_cache(maxsize=64)
def _tensors(spec):
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in skeleton(spec).state_dict().items():
        if tensor.is_floating_point():
            state[name] = torch.randn(tensor.shape, generator=generator)
        else:
            state[name] = torch.randint(1000, tensor.shape, generator=generator)
    return state


def random_state(spec):
    return dict(_tensors(spec))


# Networks take longest to set up here: tests of one network, and of one layout of it, follow one another.
@pytest.fixture(scope="module", params=sorted(KEYS, key=lambda key: key.split("_")[::-1]))
def key(request):
    return request.param


@pytest.fixture(scope="module", params=SPEC_LAYOUTS)
def spec_layout(request):
    return request.param


@functools.lru_cache(maxsize=1)
def skeleton_state(spec):
    return skeleton(spec).state_dict()


@functools.lru_cache(maxsize=1)
def published(key):
    """A variant's spec, the shapes of its state dict, and what we write for it in a layout."""
    layout, variant = key.split("_")
    spec = VARIANTS[f"efficientformer{'' if variant in ('l1', 'l3', 'l7') else 'v2'}_{variant}"]
    state = skeleton_state(spec)
    return layout, spec, {name: tensor.shape for name, tensor in state.items()}, from_ours(state, layout, spec)


class TestPublishedLayouts:
    def test_what_we_write_is_what_their_code_saves(self, key):
        written = published(key)[-1]
        assert [[name, list(tensor.shape)] for name, tensor in written.items()] == KEYS[key]
        integers = ("num_batches_tracked", "attention_bias_idxs")
        for name, tensor in written.items():
            assert tensor.dtype == (torch.int64 if name.endswith(integers) else torch.float32), name

    def test_layout_and_architecture_are_read_off_names_and_shapes(self, key):
        layout, spec, *_ = published(key)
        state = {name: torch.empty(shape, device="meta") for name, shape in KEYS[key]}
        assert detect_layout(state) == layout
        assert infer_spec(state, layout) == spec

    def test_every_key_is_mapped_or_dropped_by_a_rule(self, key):
        layout, spec, shapes, written = published(key)
        ours, report = to_ours(written, layout, spec)
        report.check()
        assert {name for name, _ in (*report.mapped, *report.dropped)} == {name for name, _ in KEYS[key]}
        assert {rule for _, rule in report.dropped} <= {INDEX_RULE}
        indices = [name for name, _ in KEYS[key] if name.endswith("attention_bias_idxs")]
        assert [name for name, _ in report.dropped] == indices
        assert {name: tensor.shape for name, tensor in ours.items()} == shapes


class TestAnySpec:
    def test_there_and_back_is_bit_equal(self, spec_layout):
        spec, layout = spec_layout
        state = random_state(spec)
        theirs = from_ours(state, layout, spec)
        ours, report = to_ours(theirs, layout, spec)
        report.check()
        assert ours.keys() == state.keys()
        assert all(torch.equal(ours[name], state[name]) for name in state)
        again = from_ours(ours, layout, spec)
        assert list(again) == list(theirs)
        assert all(torch.equal(again[name], theirs[name]) for name in theirs)

    def test_the_architecture_is_read_back(self, spec_layout):
        spec, layout = spec_layout
        theirs = from_ours(random_state(spec), layout, spec)
        assert detect_layout(theirs) == layout
        assert infer_spec(theirs, layout) == spec

    @pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
    def test_native_names_are_those_of_the_network_in_order(self, spec):
        assert list(from_ours(random_state(spec), "native", spec)) == list(EfficientFormer(spec).state_dict())

    def test_expansions_survive_rounding(self):
        """Hidden widths that width * (hidden / width) misses by one unit in floating point."""
        for hidden in range(7, 400, 9):
            spec = v1_spec((49, 12, 16, 24), (1, 0, 0, 0), 0, expansion=hidden / 49 + 1e-9)
            stage = infer_spec(skeleton(spec).state_dict(), "native").stages[0]
            assert stage.hidden(stage.blocks[0]) == hidden

    def test_native_can_hold_mb3d_in_stage_3(self):
        spec = v1_spec(W, (1, 1, 2, 1), (1, 1), input_size=64, num_classes=5)
        assert infer_spec(from_ours(random_state(spec), "native", spec), "native") == spec


BASE = SPECS["v1 with several MB3D"]

# (pattern of our name, pattern of theirs): where one is found the other must be. Tensors of equal shape that a wrong
# table could exchange; no other test would see it for the layouts whose code is not installed here.
MEANINGS = [
    (r"layer_scale1", r"\.(layer_scale_1|ls1\.\w+|layer_scale1\.gamma)$"),
    (r"layer_scale2", r"\.(layer_scale_2|ls2\.\w+|layer_scale2\.gamma)$"),
    (r"mlp\.fc1", r"mlp\.(fc1|norm1|convolution1|batchnorm_before|linear_in)\."),
    (r"mlp\.fc2", r"mlp\.(fc2|norm2|convolution2|batchnorm_after|linear_out)\."),
    (r"mlp\.mid\.norm", r"mlp\.mid(_norm|\.bn|\.norm)\."),
    (r"\d\.norm1\.", r"\d\.(norm1|layernorm1)\."),
    (r"\d\.norm2\.", r"\d\.(norm2|layernorm2)\."),
    (r"^head\.", r"^(head|head\.head|classifier)\.(weight|bias)$"),
    (r"^head_dist\.", r"^(dist_head|head\.dist_head|head_dist|distillation_classifier)\."),
    *[
        (rf"\.{name}\.", rf"\.{name}\.")
        for name in ("q", "k", "v", "v_local", "talking_head1", "talking_head2", "local")
    ],
]


def test_what_was_written_is_the_callers_own():
    """Tables of names are kept between calls, and the bias indices in them."""
    first = from_ours(random_state(BASE), "timm", BASE)
    index = next(name for name in first if name.endswith("attention_bias_idxs"))
    first[index].zero_()
    assert from_ours(random_state(BASE), "timm", BASE)[index].any()


@pytest.mark.parametrize("of", [each for each in SPEC_LAYOUTS if each.values[0][0] in (BASE, V2)])
def test_names_mean_the_same(of):
    spec, layout = of
    mapped = to_ours(from_ours(random_state(spec), layout, spec), layout, spec)[1].mapped
    for ours, theirs in MEANINGS:
        for their_name, our_name in mapped:
            assert bool(re.search(ours, our_name)) == bool(re.search(theirs, their_name)), (our_name, their_name)


class TestWhatALayoutCannotSay:
    @pytest.mark.parametrize("layout", ["snap", "timm", "mmpretrain", "transformers"])
    def test_mb3d_in_stage_3(self, layout):
        spec = v1_spec(W, (1, 1, 2, 1), (1, 1), input_size=64)
        with pytest.raises(UsageError, match="MB3D blocks in stage 3"):
            from_ours(random_state(spec), layout, spec)

    @pytest.mark.parametrize("layout", ["mmpretrain", "transformers"])
    def test_v2(self, layout):
        with pytest.raises(UsageError, match="knows no v2 networks; expected one of native, snap, timm"):
            from_ours(random_state(V2), layout, V2)

    def test_an_unknown_layout(self):
        with pytest.raises(UsageError, match="one of native, snap, timm, mmpretrain, transformers"):
            from_ours(random_state(BASE), "keras", BASE)

    def test_a_state_dict_of_another_network(self):
        with pytest.raises(CheckpointError, match=r"1 missing: head.weight"):
            state = random_state(BASE)
            del state["head.weight"]
            from_ours(state, "snap", BASE)


def _change(name, change):
    def apply(state):
        state[name] = change(state[name])

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda s: s.pop("norm.weight"), "1 missing: norm.weight", id="missing"),
        pytest.param(lambda s: s.update(a=torch.ones(1)), "1 unexpected: a", id="unexpected"),
        pytest.param(
            lambda s: s.update({f"x{i}": torch.ones(1) for i in range(9)}),
            r"9 unexpected: x0, x1, x2, x3 and 5 more",
            id="many",
        ),
        pytest.param(_change("head.bias", lambda t: t[:-1]), r"head.bias \(expected \[5\], found \[4\]\)", id="shape"),
        pytest.param(
            _change("head.bias", lambda t: t.long()),
            r"head.bias \(expected floating point, found torch.int64\)",
            id="dtype",
        ),
        pytest.param(
            _change("patch_embed.1.num_batches_tracked", lambda t: t.float()), "expected int64", id="float counter"
        ),
        pytest.param(
            _change("network.6.2.token_mixer.attention_bias_idxs", lambda t: t.flip(0)),
            r"network.6.2.token_mixer.attention_bias_idxs \(its values are not",
            id="index",
        ),
    ],
)
def test_what_does_not_fit_is_named(damage, message):
    theirs = from_ours(random_state(BASE), "snap", BASE)
    damage(theirs)
    report = to_ours(theirs, "snap", BASE)[1]
    with pytest.raises(CheckpointError, match=message):
        report.check()


@pytest.mark.parametrize("layout", ["snap", "timm", "mmpretrain", "transformers"])
def test_a_derived_index_may_be_absent(layout):
    theirs = from_ours(random_state(BASE), layout, BASE)
    stripped = {name: tensor for name, tensor in theirs.items() if not name.endswith("attention_bias_idxs")}
    assert len(theirs) - len(stripped) == 2
    to_ours(stripped, layout, BASE)[1].check()


def test_the_index_written_is_that_of_the_grid():
    spec = v2_spec(W, ((4,), (4,), (4,), (4,)), 1, input_size=128)
    theirs = from_ours(random_state(spec), "snap", spec)
    assert torch.equal(theirs["network.4.0.token_mixer.attention_bias_idxs"], offset_index((4, 4)))
    assert torch.equal(theirs["network.5.attn.attention_bias_idxs"], offset_index((8, 8), query_stride=2))


class TestDetection:
    @pytest.mark.parametrize("keys", [[], ["conv1.weight", "bn1.weight", "fc.weight"], ["stem.conv1.weight"]])
    def test_anything_else_is_refused_with_what_was_expected(self, keys):
        with pytest.raises(
            CheckpointError, match=r"patch_embed.0.weight.*efficientformer.patch_embed.convolution1.weight"
        ):
            detect_layout(keys)

    @pytest.mark.parametrize("layout", [layout for layout, families in LAYOUTS.items() if "v1" in families])
    def test_a_few_missing_names_do_not_hide_the_layout(self, layout):
        keys = list(from_ours(random_state(BASE), layout, BASE))
        assert detect_layout([key for key in keys if "head" not in key and "classifier" not in key]) == layout


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda s: s.pop("patch_embed.3.weight"), "patch_embed.3.weight is missing", id="no stem"),
        pytest.param(lambda s: s.pop("head.weight"), "head.weight is missing", id="no head"),
        pytest.param(
            _change("head.weight", lambda t: t.flatten()), "head.weight has an impossible shape", id="flat head"
        ),
        pytest.param(_change("head.weight", lambda t: t[:0]), "head.weight has an impossible shape", id="empty head"),
        pytest.param(
            _change("network.6.2.token_mixer.attention_biases", lambda t: t[:, :3]), "not on a square map", id="table"
        ),
    ],
)
def test_shapes_that_say_no_architecture(damage, message):
    theirs = from_ours(random_state(BASE), "snap", BASE)
    damage(theirs)
    with pytest.raises(CheckpointError, match=message):
        infer_spec(theirs, "snap")


def test_a_map_too_large_for_a_bias_index_is_refused():
    with pytest.raises(CheckpointError, match="at most 4096 positions; found 65x65"):
        skeleton(v1_spec(W, D, 1, input_size=65 * 32))
    skeleton(v1_spec(W, D, 0, input_size=65 * 32))


def test_names_of_many_parts_cost_no_more_than_their_letters():
    theirs = from_ours(random_state(BASE), "snap", BASE)
    theirs |= {f"{index}{'.' * 290}": torch.ones(1) for index in range(1000)}
    tracemalloc.start()
    try:
        assert infer_spec(theirs, "snap") == BASE
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
