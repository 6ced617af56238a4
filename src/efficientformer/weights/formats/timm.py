"""timm's names (huggingface/pytorch-image-models): a flat state dict, V1 and V2.

In V1 the reshape into tokens (``Flat``) takes an index in the last stage, and the bias index is saved; in V2 it is not.
"""

from __future__ import annotations

from efficientformer.weights.formats.layout import BIASES, Layout, Rules, conv_norm, same


def _conv_bn(*names: str) -> Rules:
    return tuple(rule for name in names for rule in conv_norm(name, f"{name}.conv", f"{name}.bn"))


_SCALE1, _SCALE2 = ("layer_scale1.gamma", "ls1.gamma"), ("layer_scale2.gamma", "ls2.gamma")

_V1 = {
    "stem": (*conv_norm("conv1", "conv1", "norm1"), *conv_norm("conv2", "conv2", "norm2")),
    "conv": same("conv", "norm"),
    "mb4d": (
        _SCALE1,
        *conv_norm("mlp.fc1", "mlp.fc1", "mlp.norm1"),
        *conv_norm("mlp.fc2", "mlp.fc2", "mlp.norm2"),
        _SCALE2,
    ),
    "mb3d": (
        *same("norm1", f"token_mixer.{BIASES}", "token_mixer.qkv", "token_mixer.proj"),
        _SCALE1,
        *same("norm2", "mlp.fc1", "mlp.fc2"),
        _SCALE2,
    ),
}
_FFN = (*_conv_bn("mlp.fc1", "mlp.mid", "mlp.fc2"), _SCALE2)
_V2 = {
    "stem": _conv_bn("conv1", "conv2"),
    "conv": (("conv", "conv.conv"), ("norm", "conv.bn")),
    "attn": (
        *_conv_bn("conv"),
        *same(f"attn.{BIASES}", "attn.q.local"),
        *_conv_bn("attn.q.proj", "attn.k", "attn.v", "attn.v_local", "attn.proj"),
    ),
    "ffn": _FFN,
    "attn_ffn": (
        *same(f"token_mixer.{BIASES}"),
        *_conv_bn(*(f"token_mixer.{name}" for name in ("stride_conv", "q", "k", "v", "v_local"))),
        *same("token_mixer.talking_head1", "token_mixer.talking_head2"),
        *_conv_bn("token_mixer.proj"),
        _SCALE1,
        *_FFN,
    ),
}


def _block(stage: int, index: int, num_map: int) -> str:
    return f"stages.{stage}.blocks.{index + (index >= num_map)}"  # Flat stands before the first MB3D


def _layout(family: str, tables: dict[str, Rules], *, saves_index: bool) -> Layout:
    return Layout(
        name="timm",
        family=family,
        tables=tables,
        stem="stem",
        norm="norm",
        head="head",
        head_dist="head_dist",
        embedding=lambda stage: f"stages.{stage}.downsample",
        block=_block,
        saves_index=saves_index,
    )


V1 = _layout("v1", _V1, saves_index=True)
V2 = _layout("v2", _V2, saves_index=False)
