"""Analytic counts: equal to the published truth, to the built network, and to torch's own operation counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from efficientformer.models.network import EfficientFormer
from efficientformer.spec.count import count, count_parts
from efficientformer.spec.variants import VARIANTS
from tests.unit.test_spec import SPECS

# all parameters, then MACs of convolutions, linear layers and attention products, at 1x3x224x224; the parameters are
# those of every public implementation, the MACs those of torch's FlopCounterMode halved
TRUTH = {
    "efficientformer_l1": (12_289_928, 1152.4, 135.8, 3.07),
    "efficientformer_l3": (31_406_000, 3225.3, 669.0, 12.29),
    "efficientformer_l7": (82_229_328, 7472.8, 2621.9, 24.59),
    "efficientformerv2_s0": (3_600_256, 377.1, 0.4, 18.44),
    "efficientformerv2_s1": (6_185_560, 633.1, 0.4, 18.44),
    "efficientformerv2_s2": (12_710_112, 1215.6, 0.6, 30.73),
    "efficientformerv2_l": (26_322_288, 2508.8, 0.8, 43.03),
}


@pytest.mark.parametrize("name", TRUTH)
def test_counts_are_the_true_ones(name):
    total, (params, conv, linear, attention) = count(VARIANTS[name]), TRUTH[name]
    assert total.params == params
    assert total.conv_macs / 1e6 == pytest.approx(conv, abs=0.05)
    assert total.linear_macs / 1e6 == pytest.approx(linear, abs=0.05)
    assert total.attention_macs / 1e6 == pytest.approx(attention, abs=0.005)


@pytest.mark.parametrize("name", SPECS)
def test_counts_of_every_part_equal_the_built_network(name):
    spec = SPECS[name]
    with torch.device("meta"):
        modules = dict(EfficientFormer(spec).named_modules())
    for part in count_parts(spec):
        assert part.count.params == sum(p.numel() for p in modules[part.name].parameters()), part.name
    assert count(spec).params == sum(p.numel() for p in modules[""].parameters())


@pytest.mark.parametrize(  # the other published networks have more of the same parts; TRUTH has their counts
    "name",
    [
        "efficientformer_l1",
        "efficientformerv2_s0",
        "efficientformer_cifar10",
        "MB3D in stage 3",
        "stem of stride 2",
        "rectangle",
    ],
)
def test_macs_equal_torchs_own_counter(name):
    spec = SPECS[name]
    with torch.device("meta"):
        model = EfficientFormer(spec).eval()
        images = torch.empty(1, spec.in_chans, *spec.input_size)
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert counter.get_total_flops() == 2 * count(spec).macs


def test_part_shapes_are_those_of_the_network():
    spec = VARIANTS["efficientformerv2_s0"]
    shapes = {part.name: part.shape for part in count_parts(spec)}
    assert shapes["stem"] == (32, 56, 56)
    assert shapes["stages.3.embedding"] == (176, 7, 7)
    assert shapes["head_dist"] == (1000,)
