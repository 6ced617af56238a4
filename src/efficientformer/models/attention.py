"""Token mixers with attention: V1's on tokens, V2's on maps, and V2's attention embedding.

All add a learned bias that depends on the distance of query and key only (LeViT's scheme): a table per head, indexed
by ``|dy| * width + |dx|``. The gather happens in every forward: nothing derived from a parameter is ever kept, so the
bias cannot be stale after loading and always gets its gradient. ``fold()`` gathers once, into a new module.

Shapes: B batch, H heads, N tokens, Q queries, C channels, K key width, V value width; hq, wq and hk, wk grids.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientformer.models.layers import ConvNorm, StridedDepthwise, laid_out
from efficientformer.spec.arch import AttentionSpec
from efficientformer.spec.geometry import Grid


def offset_index(key_grid: Grid, query_stride: int = 1) -> Tensor:
    """Return (Q, N) int64: the bias-table entry of each query and key, queries at every ``query_stride``-th key.

    Published checkpoints enumerate the table in just this order: entry ``|dy| * wk + |dx|``. Attentions on one map
    share the memory, which nobody writes to: at 64 x 64 positions it takes 134 MB.
    """
    return torch.from_numpy(_offset_index(key_grid, query_stride))


# An array, because a tensor keeps the device and the inference mode of the moment it was made in.
@lru_cache(maxsize=2)  # a stage has attentions on two maps at most, and is built in one go
def _offset_index(key_grid: Grid, query_stride: int) -> npt.NDArray[np.int64]:
    height, width = key_grid
    dy, dx = (_distances(side, query_stride) for side in key_grid)  # (hq, hk), (wq, wk)
    return (dy[:, None, :, None] * width + dx[:, None, :]).reshape(-1, height * width)


def _distances(side: int, query_stride: int) -> npt.NDArray[np.int64]:
    keys = np.arange(side, dtype=np.int64)
    return np.abs(keys[::query_stride, None] - keys)


class OffsetAttention(nn.Module):
    """Base of the attentions: owns ``attention_biases`` (H, offsets) and computes biased scores."""

    offset_index: Tensor
    scale: float

    def _init_bias(self, num_heads: int, key_grid: Grid, query_stride: int = 1) -> None:
        self.key_grid = key_grid
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, key_grid[0] * key_grid[1]))
        self.register_buffer("offset_index", offset_index(key_grid, query_stride), persistent=False)

    def bias(self) -> Tensor:
        """Return the attention bias (H, Q, N)."""
        return self.attention_biases[:, self.offset_index]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the scores (B, H, Q, N) of queries (B, H, Q, K) and keys (B, H, K, N); the bias is not scaled."""
        return q @ k * self.scale + self.bias()


class TokenAttention(OffsetAttention):
    """V1's attention on tokens (MB3D's token mixer; paper section 3.2, equation 4)."""

    def __init__(self, dim: int, sizes: AttentionSpec, grid: Grid) -> None:
        super().__init__()
        self.num_heads, self.key_dim = sizes.num_heads, sizes.key_dim
        self.value_dim = sizes.key_dim * sizes.value_ratio
        self.scale = sizes.key_dim**-0.5
        self.qkv = nn.Linear(dim, sizes.num_heads * (2 * self.key_dim + self.value_dim))
        self.proj = nn.Linear(sizes.num_heads * self.value_dim, dim)
        self._init_bias(sizes.num_heads, grid)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens: (B, N, C) to (B, N, C)."""
        batch, tokens, _ = x.shape
        # q, k and v are interleaved per head, not [all q | all k | all v]
        qkv = self.qkv(x).reshape(batch, tokens, self.num_heads, -1).transpose(1, 2)  # (B, H, N, 2K+V)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        scores = self.scores(q, k.transpose(-2, -1))  # (B, H, N, N)
        x = scores.softmax(dim=-1) @ v  # (B, H, N, V)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, -1))  # (B, N, H*V) -> (B, N, C)


class MapAttention(OffsetAttention):
    """V2's attention on maps, with local values and talking heads (V2 paper section 3.2, figure 2e).

    With ``stride`` 2 it works on a halved map and is upsampled back before the projection.
    """

    def __init__(self, dim: int, sizes: AttentionSpec, grid: Grid, stride: int) -> None:
        super().__init__()
        heads, self.num_heads = sizes.num_heads, sizes.num_heads
        keys, values = heads * sizes.key_dim, heads * sizes.key_dim * sizes.value_ratio
        self.stride = stride
        self.scale = sizes.key_dim**-0.5
        self.stride_conv = ConvNorm(dim, dim, 3, stride=stride, groups=dim) if stride > 1 else None
        self.q = ConvNorm(dim, keys)
        self.k = ConvNorm(dim, keys)
        self.v = ConvNorm(dim, values)
        self.v_local = ConvNorm(values, values, 3, groups=values)
        self.talking_head1 = nn.Conv2d(heads, heads, 1)
        self.talking_head2 = nn.Conv2d(heads, heads, 1)
        self.proj = ConvNorm(values, dim)
        self._init_bias(heads, (grid[0] // stride, grid[1] // stride))

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions: (B, C, h, w) to (B, C, h, w)."""
        if self.stride_conv is not None:
            x = self.stride_conv(x)  # (B, C, h/2, w/2)
        batch, _, height, width = x.shape
        q = laid_out(self.q(x)).reshape(batch, self.num_heads, -1, height * width).transpose(-2, -1)  # (B, H, N, K)
        k = laid_out(self.k(x)).reshape(batch, self.num_heads, -1, height * width)  # (B, H, K, N)
        v = laid_out(self.v(x))  # (B, H*V, h', w')
        v_local = self.v_local(v)
        v = v.reshape(batch, self.num_heads, -1, height * width).transpose(-2, -1)  # (B, H, N, V)
        scores = self.talking_head1(self.scores(q, k))  # (B, H, N, N); heads are the channels
        weights = self.talking_head2(scores.softmax(dim=-1))
        x = v_local + (weights @ v).transpose(-2, -1).reshape(batch, -1, height, width)  # (B, H*V, h', w')
        if self.stride > 1:
            x = F.interpolate(x, scale_factor=self.stride, mode="bilinear", align_corners=False)
        return self.proj(F.gelu(x))  # GELU after the upsample: the two do not commute


class LocalGlobalQuery(nn.Module):
    """Queries of the attention embedding: every second position plus a strided depthwise convolution, projected."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.local = StridedDepthwise(dim)
        self.proj = ConvNorm(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map: (B, C, h, w) to (B, out, ceil(h/2), ceil(w/2))."""
        return self.proj(self.local(x) + x[..., ::2, ::2])


class DownsampleAttention(OffsetAttention):
    """The attention half of V2's stage-4 embedding (V2 paper section 3.3, figure 2f): no talking heads."""

    def __init__(self, dim: int, out_dim: int, sizes: AttentionSpec, grid: Grid) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        keys = sizes.num_heads * sizes.embedding_key_dim
        values = keys * sizes.value_ratio
        self.scale = sizes.embedding_key_dim**-0.5
        self.q = LocalGlobalQuery(dim, keys)
        self.k = ConvNorm(dim, keys)
        self.v = ConvNorm(dim, values)
        self.v_local = ConvNorm(values, values, 3, stride=2, groups=values)
        self.proj = ConvNorm(values, out_dim)
        self._init_bias(sizes.num_heads, grid, query_stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Embed: (B, C, h, w) to (B, out, ceil(h/2), ceil(w/2))."""
        batch = x.shape[0]
        q = laid_out(self.q(x))  # (B, H*K, hq, wq)
        height, width = q.shape[-2:]
        q = q.reshape(batch, self.num_heads, -1, height * width).transpose(-2, -1)  # (B, H, Q, K)
        k = laid_out(self.k(x)).flatten(2).reshape(batch, self.num_heads, q.shape[-1], -1)  # (B, H, K, N)
        v = laid_out(self.v(x))  # (B, H*V, h, w)
        v_local = self.v_local(v)  # (B, H*V, hq, wq)
        v = v.reshape(batch, self.num_heads, -1, k.shape[-1]).transpose(-2, -1)  # (B, H, N, V)
        weights = self.scores(q, k).softmax(dim=-1)  # (B, H, Q, N)
        x = v_local + (weights @ v).transpose(-2, -1).reshape(batch, -1, height, width)  # (B, H*V, hq, wq)
        return self.proj(F.gelu(x))
