"""Random weights that make wrong networks visible, in two regimes; for every parity test.

``natural``: every activation is of order 1, so that a wrong activation, padding, scale or order is seen in the logits.
``eps``: BatchNorm variances go down to 1e-3 and the last stage of V1 carries a stream of about 0.03, so that a wrong
epsilon of either norm is seen too (on activations of order 1 it would hide below the tolerance).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from efficientformer.spec.arch import ArchSpec
from efficientformer.weights.formats.layout import skeleton

REGIMES = ("natural", "eps")
SMALL_STREAM = 0.03


def random_state(
    spec: ArchSpec, seed: int, regime: str = "natural", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return a state dict of the network ``spec`` (our names) with seeded random values of a regime."""
    assert regime in REGIMES
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    shapes = {name: tensor.shape for name, tensor in skeleton(spec).state_dict().items()}
    # branches add up: without this, 40 blocks make activations of order 100
    depth_factor = min(1.0, math.sqrt(10 / max(1, sum(len(stage.blocks) for stage in spec.stages))))
    for name, shape in shapes.items():
        if name.endswith("running_var"):
            state[name] = _variances(shape, generator, low=1e-3 if regime == "eps" and ".norm" in name else 0.5)
    for name, shape in shapes.items():
        if name not in state:
            state[name] = _values(name, shape, state, generator)
        if name.endswith(".gamma"):
            state[name] *= depth_factor
        if regime == "eps" and spec.family == "v1" and _shrinks(name):
            state[name] *= SMALL_STREAM
    return {name: state[name].to(dtype) if state[name].is_floating_point() else state[name] for name in shapes}


def _variances(shape: torch.Size, generator: torch.Generator, low: float) -> Tensor:
    """Log-uniform from ``low`` to 1.5."""
    logarithms = torch.empty(shape).uniform_(math.log(low), math.log(1.5), generator=generator)
    return torch.exp(logarithms.double()).float()  # in single precision MKL rounds by processor


def _values(name: str, shape: torch.Size, state: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    layer, _, leaf = name.rpartition(".")
    if leaf == "num_batches_tracked":
        return torch.randint(1, 1000, shape, generator=generator)
    if leaf == "gamma":
        return torch.empty(shape).uniform_(0.1, 0.5, generator=generator)
    noise = torch.randn(shape, generator=generator)
    if leaf == "attention_biases":
        return noise
    # what the following BatchNorm believes of a convolution's output is true to order 1
    variance = state.get(
        f"{layer.removesuffix('conv')}norm.running_var" if layer.endswith("conv") else f"{layer}.running_var"
    )
    spread = torch.ones(1) if variance is None else variance.double().sqrt().float()  # as above
    if leaf == "running_mean":
        return 0.1 * spread * noise
    if len(shape) == 1:
        norm = layer.rpartition(".")[2].startswith("norm")
        return 1 + 0.1 * noise if norm and leaf == "weight" else 0.1 * noise * (1 if norm else spread)
    fan_in = math.prod(shape[1:])
    return noise / math.sqrt(fan_in) * spread.reshape(-1, *[1] * (len(shape) - 1))


def _shrinks(name: str) -> bool:
    """Whether this sets the size of the last stage's residual stream."""
    return name in ("stages.3.embedding.norm.weight", "stages.3.embedding.norm.bias") or (
        name.startswith("stages.3.blocks.") and name.endswith(".gamma")
    )
