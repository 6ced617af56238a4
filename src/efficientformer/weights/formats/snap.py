"""The authors' names (snap-research/EfficientFormer): ``{'model': state_dict}``, V1 and V2.

Stages and downsamples alternate in one list, ``network.0`` to ``network.6``; the reshape into tokens (``Flat``) takes
an index in the last stage; norms of an MLP are registered after both of its convolutions, layer scales first of all.
"""

from __future__ import annotations

from efficientformer.weights.formats.layout import BIASES, Layout, Rules, conv_norm, same


def _sequential(ours: str, theirs: str, first: int = 0) -> Rules:
    """Rules of a ConvNorm that is an ``nn.Sequential`` there; ``first`` is 1 where an activation stands before it."""
    return conv_norm(ours, f"{theirs}.{first}", f"{theirs}.{first + 1}")


_SCALES = (("layer_scale1.gamma", "layer_scale_1"), ("layer_scale2.gamma", "layer_scale_2"))
_FC = (("mlp.fc1.conv", "mlp.fc1"), ("mlp.fc2.conv", "mlp.fc2"))
_FC_NORMS = (("mlp.fc1.norm", "mlp.norm1"), ("mlp.fc2.norm", "mlp.norm2"))
_STEM = (*conv_norm("conv1", "0", "1"), *conv_norm("conv2", "3", "4"))  # 2 and 5 are the activations
_CONV = (("conv", "proj"), ("norm", "norm"))

_V1 = {
    "stem": _STEM,
    "conv": _CONV,
    "mb4d": (*_SCALES, *_FC, *_FC_NORMS),
    "mb3d": (
        *_SCALES,
        *same("norm1", f"token_mixer.{BIASES}", "token_mixer.qkv", "token_mixer.proj"),
        *same("norm2", "mlp.fc1", "mlp.fc2"),
    ),
}
_MLP_V2 = (*_FC, *conv_norm("mlp.mid", "mlp.mid", "mlp.mid_norm"), *_FC_NORMS)
_V2 = {
    "stem": _STEM,
    "conv": _CONV,
    "attn": (
        *same(f"attn.{BIASES}"),
        ("attn.q.local", "attn.q.local.0"),
        *_sequential("attn.q.proj", "attn.q.proj"),
        *_sequential("attn.k", "attn.k"),
        *_sequential("attn.v", "attn.v"),
        *_sequential("attn.v_local", "attn.v_local"),
        *_sequential("attn.proj", "attn.proj", first=1),
        *conv_norm("conv", "conv", "bn"),
    ),
    "ffn": (_SCALES[1], *_MLP_V2),
    "attn_ffn": (
        *_SCALES,
        *same(f"token_mixer.{BIASES}"),
        *_sequential("token_mixer.stride_conv", "token_mixer.stride_conv"),
        *_sequential("token_mixer.q", "token_mixer.q"),
        *_sequential("token_mixer.k", "token_mixer.k"),
        *_sequential("token_mixer.v", "token_mixer.v"),
        *_sequential("token_mixer.v_local", "token_mixer.v_local"),
        *same("token_mixer.talking_head1", "token_mixer.talking_head2"),
        *_sequential("token_mixer.proj", "token_mixer.proj", first=1),
        *_MLP_V2,
    ),
}


def _block(stage: int, index: int, num_map: int) -> str:
    return f"network.{2 * stage}.{index + (index >= num_map)}"  # Flat stands before the first MB3D


def _layout(family: str, tables: dict[str, Rules], *, scales_on_map: bool) -> Layout:
    return Layout(
        name="snap",
        family=family,
        tables=tables,
        stem="patch_embed",
        norm="norm",
        head="head",
        head_dist="dist_head",
        embedding=lambda stage: f"network.{2 * stage - 1}",
        block=_block,
        scales_on_map=scales_on_map,
    )


V1 = _layout("v1", _V1, scales_on_map=False)
V2 = _layout("v2", _V2, scales_on_map=True)
