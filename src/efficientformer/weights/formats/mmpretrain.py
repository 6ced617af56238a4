"""mmpretrain's names (open-mmlab/mmpretrain): ``{'meta': ..., 'state_dict': ...}``, V1 only.

The downsample is entry 0 of its stage, so blocks of stages 2 to 4 count from 1; the reshape into tokens takes an index
in the last stage.
"""

from __future__ import annotations

from efficientformer.weights.formats.layout import BIASES, Layout, conv_norm, same

_SCALES = (("layer_scale1.gamma", "ls1.weight"), ("layer_scale2.gamma", "ls2.weight"))

V1 = Layout(
    name="mmpretrain",
    family="v1",
    tables={
        "stem": (*conv_norm("conv1", "0.conv", "0.bn"), *conv_norm("conv2", "1.conv", "1.bn")),
        "conv": (("conv", "conv"), ("norm", "bn")),
        "mb4d": (
            ("mlp.fc1.conv", "mlp.fc1"),
            ("mlp.fc2.conv", "mlp.fc2"),
            ("mlp.fc1.norm", "mlp.norm1"),
            ("mlp.fc2.norm", "mlp.norm2"),
            *_SCALES,
        ),
        "mb3d": (
            *same("norm1", f"token_mixer.{BIASES}", "token_mixer.qkv", "token_mixer.proj"),
            *same("norm2", "mlp.fc1", "mlp.fc2"),
            *_SCALES,
        ),
    },
    stem="backbone.patch_embed",
    norm="backbone.norm3",
    head="head.head",
    head_dist="head.dist_head",
    embedding=lambda stage: f"backbone.network.{stage}.0",
    block=lambda stage, index, num_map: f"backbone.network.{stage}.{index + (stage > 0) + (index >= num_map)}",
)
