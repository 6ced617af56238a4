"""The graph that is timed is the graph that is exported: operators, their order, attributes and shapes of weights."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from efficientformer.export.onnx import _to_proto
from efficientformer.latency.graph import network_proto, weights_in_graph, write_network
from efficientformer.models.network import EfficientFormer
from efficientformer.runtime.engines import open_engine
from efficientformer.spec.count import count
from efficientformer.spec.errors import SpecError
from efficientformer.spec.variants import VARIANTS, v1_spec, v2_spec

SPECS = {
    "v1": v1_spec((8, 16, 24, 32), (1, 0, 1, 2), (1, 1), input_size=32, num_classes=10, stem_stride=2),
    "v1 without attention": v1_spec((8, 16, 24, 32), (1, 0, 0, 1), 0, input_size=32, num_classes=7, stem_stride=1),
    "v2": v2_spec((8, 16, 24, 32), ((), (), (2,), (2, 3)), 1, input_size=64, num_classes=10, stem_stride=2),
    "as the one in the package": replace(  # all that it has and the others have not
        v2_spec(
            (8, 16, 24, 32),
            ((), (1,), (2,), ()),
            1,
            input_size=32,
            num_classes=10,
            distilled=False,
            stem_stride=1,
            stage3_stride=1,
        ),
        attention=VARIANTS["efficientformer_cifar10"].attention,
    ),
}
DEFAULTS = {"alpha", "beta", "transA", "auto_pad", "stash_type", "keep_aspect_ratio_policy", "antialias", "allowzero"}
DEFAULTS |= {"extrapolation_value", "exclude_outside", "cubic_coeff_a"}


def trained(spec):
    """Return a network none of whose weights is zero or one, as after training, so that the exporter keeps them all."""
    torch.manual_seed(0)
    net = EfficientFormer(spec)
    with torch.no_grad():
        for value in (*net.parameters(), *net.buffers()):
            if value.is_floating_point():
                value.uniform_(0.1, 1.0)
    return net.eval()


def operators(proto):
    """Return (kind, attributes, shapes of its constants) of every node in order."""
    from onnx import helper

    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    found = []
    for node in proto.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name not in DEFAULTS}
        attributes = {k: round(v, 8) if isinstance(v, float) else v for k, v in attributes.items()}
        constants = sorted(shapes[name] for name in node.input if name in shapes)
        found.append((node.op_type, attributes, constants))
    return found


@pytest.mark.parametrize("name", SPECS)
def test_the_same_operators_as_the_exporter(name):
    expected = operators(_to_proto(trained(SPECS[name])))
    found = operators(network_proto(SPECS[name]))
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == theirs


@pytest.mark.parametrize("name", SPECS)
def test_an_engine_runs_it(tmp_path, name):
    spec = SPECS[name]
    engine = open_engine(write_network(spec, tmp_path / "net.onnx"))
    logits = engine.run(np.random.default_rng(0).standard_normal((3, 3, *spec.input_size), np.float32))
    assert logits.shape == (3, spec.num_classes)
    assert np.isfinite(logits).all()
    assert engine.manifest.spec == spec


@pytest.mark.parametrize("name", ["efficientformer_l1", "efficientformerv2_s0"])
def test_what_a_graph_holds_is_known_before(name):
    spec = VARIANTS[name].with_input_size((896, 896))
    held = sum(math.prod(each.dims) for each in network_proto(spec).graph.initializer)
    assert weights_in_graph(spec) == pytest.approx(held, rel=0.1)
    assert count(spec).params < 0.9 * held  # the rest are biases of attention, gathered


def test_a_network_that_no_file_can_hold_is_refused(tmp_path):
    spec = VARIANTS["efficientformer_l1"].with_input_size((4096, 4096))
    with pytest.raises(SpecError, match="too large for an ONNX file"):
        write_network(spec, tmp_path / "net.onnx")


def test_every_node_is_named_after_its_part():
    from efficientformer.spec.count import count_parts

    parts = {node.name.partition("/")[0] for node in network_proto(SPECS["v1"]).graph.node}
    assert parts == {part.name for part in count_parts(SPECS["v1"])} - {"head_dist"}
