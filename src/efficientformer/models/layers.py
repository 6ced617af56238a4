"""Small layers every block is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StridedDepthwise(nn.Conv2d):
    """A 3x3 depthwise convolution of stride 2: (B, C, h, w) to (B, C, ceil(h/2), ceil(w/2)).

    Torch has no fast backward pass for it on CPUs in bf16: one takes 20 times as long as in single precision, and a
    step of EfficientFormerV2-S0 a tenth longer. So training under autocast computes it in single precision there.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, stride=2, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Filter each channel and halve the map."""
        if not (self.training and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype)).to(torch.get_autocast_dtype("cpu"))


class ConvNorm(nn.Module):
    """Convolution with bias, padded to keep the map, and BatchNorm (eps 1e-5): (B, C, h, w) to (B, out, h', w')."""

    def __init__(self, dim: int, out_dim: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = (
            StridedDepthwise(dim)
            if stride == 2 and groups == dim == out_dim and kernel == 3
            else nn.Conv2d(dim, out_dim, kernel, stride=stride, padding=kernel // 2, groups=groups)
        )
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise."""
        return self.norm(self.conv(x))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def laid_out(x: Tensor) -> Tensor:
    """Return a channels-last map (B, C, h, w) whose gradient will be laid out so, too; other maps as they are.

    Attention's heads and means over positions hand back gradients channel by channel, of which BatchNorm's backward
    pass on CPUs takes ten times as long, and a training step of EfficientFormerV2-S0 about a tenth longer.
    """
    if x.requires_grad and not torch.compiler.is_compiling() and x.is_contiguous(memory_format=torch.channels_last):
        x.register_hook(_channels_last)  # type: ignore[no-untyped-call]
    return x


class PoolMixer(nn.Module):
    """MB4D's token mixer: 3x3 average pooling minus its input; border means leave the padding out."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions: (B, C, h, w) to (B, C, h, w)."""
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False) - x


class LayerScale(nn.Module):
    """Learned factor per channel on a residual branch, of a map or of tokens."""

    def __init__(self, dim: int, init: float, *, on_map: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))
        self.on_map = on_map

    def forward(self, x: Tensor) -> Tensor:
        """Scale (B, C, h, w) if ``on_map``, else (B, N, C); a bf16 branch stays one, and so does what it is added to.

        Factors in single precision would make both single, at three times the cost. Not so for fp16, whose smallest
        numbers are too close to the 1e-5 that factors begin with.
        """
        gamma = self.gamma.to(x.dtype) if x.dtype == torch.bfloat16 else self.gamma
        return x * (gamma[:, None, None] if self.on_map else gamma)


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the residual branch of a sample with probability ``rate``."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Zero whole samples of (B, ...) and scale the kept ones so that the expectation stays."""
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)
