"""The blocks: V1's MB4D and MB3D, V2's FFN and attention block, and their MLPs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from efficientformer.models.attention import MapAttention, TokenAttention
from efficientformer.models.layers import ConvNorm, DropPath, LayerScale, PoolMixer


class ConvMlp(nn.Module):
    """MLP on maps: 1x1 conv, (V2: depthwise 3x3 conv,) 1x1 conv; each with BatchNorm, GELU (exact erf) between."""

    def __init__(self, dim: int, hidden: int, *, depthwise: bool) -> None:
        super().__init__()
        self.fc1 = ConvNorm(dim, hidden)
        self.mid = ConvNorm(hidden, hidden, 3, groups=hidden) if depthwise else None
        self.fc2 = ConvNorm(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform channels: (B, C, h, w) to (B, C, h, w)."""
        x = F.gelu(self.fc1(x))
        if self.mid is not None:
            x = F.gelu(self.mid(x))
        return self.fc2(x)


class TokenMlp(nn.Module):
    """MLP on tokens: two linear layers, GELU (exact erf) between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform channels: (B, N, C) to (B, N, C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class MapBlock(nn.Module):
    """A residual block on maps: an optional token mixer, then a ConvMlp.

    MB4D has the pooling mixer, V2's attention block has MapAttention, V2's FFN has none.
    """

    def __init__(
        self, dim: int, token_mixer: PoolMixer | MapAttention | None, mlp: ConvMlp, drop_path: float, scale_init: float
    ) -> None:
        super().__init__()
        self.token_mixer = token_mixer
        self.layer_scale1 = None if token_mixer is None else LayerScale(dim, scale_init, on_map=True)
        self.mlp = mlp
        self.layer_scale2 = LayerScale(dim, scale_init, on_map=True)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Refine a map: (B, C, h, w) to (B, C, h, w)."""
        if self.token_mixer is not None and self.layer_scale1 is not None:
            x = x + self.drop_path(_scaled(self.token_mixer, self.layer_scale1, x))
        return x + self.drop_path(_scaled(self.mlp, self.layer_scale2, x))


def _scaled(branch: nn.Module, scale: nn.Module, x: Tensor) -> Tensor:
    """Return what a branch makes of a map (B, C, h, w), times its layer scale.

    In training the factors go into those of the branch's last BatchNorm, which saves a pass over the map and three more
    on the way back. Not so for fp16, whose smallest numbers are too close to the 1e-5 that layer scales begin with.
    """
    norm = _LAST_NORM.get(type(branch))
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call] # which functional_call refuses
    if norm is None or not branch.training or not isinstance(scale, LayerScale) or traced or _in_fp16(x):
        return scale(branch(x))
    last = branch.get_submodule(norm)  # whose factors are no parameters where a supernet lends its own
    factors = {f"{norm}.{name}": getattr(last, name) * scale.gamma for name in ("weight", "bias")}
    return functional_call(branch, factors, (x,))


def _in_fp16(x: Tensor) -> bool:
    kind = x.device.type
    return (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype) == torch.float16


# What a branch ends with; the pooling mixer ends with none.
_LAST_NORM: dict[type[nn.Module], str] = {ConvMlp: "fc2.norm", MapAttention: "proj.norm"}


class TokenBlock(nn.Module):
    """MB3D: LayerNorm and attention, LayerNorm and MLP, each residual, on tokens."""

    def __init__(
        self, dim: int, token_mixer: TokenAttention, mlp: TokenMlp, drop_path: float, scale_init: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.token_mixer = token_mixer
        self.layer_scale1 = LayerScale(dim, scale_init, on_map=False)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp
        self.layer_scale2 = LayerScale(dim, scale_init, on_map=False)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Refine tokens: (B, N, C) to (B, N, C)."""
        x = x + self.drop_path(self.layer_scale1(self.token_mixer(self.norm1(x))))
        return x + self.drop_path(self.layer_scale2(self.mlp(self.norm2(x))))
