"""transformers' names (huggingface/transformers, up to 4.x): a flat state dict, V1 only.

The last stage keeps its MB4D and MB3D blocks in two lists, each counted from 0; the reshape takes no index.
"""

from __future__ import annotations

from efficientformer.weights.formats.layout import BIASES, Layout, conv_norm

_SCALES = (("layer_scale1.gamma", "layer_scale_1"), ("layer_scale2.gamma", "layer_scale_2"))
_ENCODER = "efficientformer.encoder"
_LAST_STAGE = 3


def _block(stage: int, index: int, num_map: int) -> str:
    if stage != _LAST_STAGE:
        return f"{_ENCODER}.intermediate_stages.{2 * stage}.meta4D_layers.blocks.{index}"
    if index < num_map:
        return f"{_ENCODER}.last_stage.meta4D_layers.blocks.{index}"
    return f"{_ENCODER}.last_stage.meta3D_layers.blocks.{index - num_map}"


V1 = Layout(
    name="transformers",
    family="v1",
    tables={
        "stem": (
            *conv_norm("conv1", "convolution1", "batchnorm_before"),
            *conv_norm("conv2", "convolution2", "batchnorm_after"),
        ),
        "conv": (("conv", "projection"), ("norm", "norm")),
        "mb4d": (
            *_SCALES,
            ("mlp.fc1.conv", "mlp.convolution1"),
            ("mlp.fc2.conv", "mlp.convolution2"),
            ("mlp.fc1.norm", "mlp.batchnorm_before"),
            ("mlp.fc2.norm", "mlp.batchnorm_after"),
        ),
        "mb3d": (
            *_SCALES,
            (f"token_mixer.{BIASES}", f"token_mixer.{BIASES}"),
            ("token_mixer.qkv", "token_mixer.qkv"),
            ("token_mixer.proj", "token_mixer.projection"),
            ("norm1", "layernorm1"),
            ("norm2", "layernorm2"),
            ("mlp.fc1", "mlp.linear_in"),
            ("mlp.fc2", "mlp.linear_out"),
        ),
    },
    stem="efficientformer.patch_embed",
    norm="efficientformer.layernorm",
    head="classifier",
    head_dist="distillation_classifier",
    embedding=lambda stage: f"{_ENCODER}.intermediate_stages.{2 * stage - 1}",
    block=_block,
)
