"""Our own names, as a layout like any other: for state dicts that carry no manifest."""

from __future__ import annotations

from efficientformer.weights.formats.layout import BIASES, Layout, Rules, same


def _conv_norms(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{layer}" for name in names for layer in ("conv", "norm"))


_V1 = {
    "stem": same(*_conv_norms("conv1", "conv2")),
    "conv": same("conv", "norm"),
    "mb4d": same("layer_scale1.gamma", *_conv_norms("mlp.fc1", "mlp.fc2"), "layer_scale2.gamma"),
    "mb3d": same(
        "norm1",
        *(f"token_mixer.{name}" for name in (BIASES, "qkv", "proj")),
        "layer_scale1.gamma",
        "norm2",
        "mlp.fc1",
        "mlp.fc2",
        "layer_scale2.gamma",
    ),
}
_FFN = (*_conv_norms("mlp.fc1", "mlp.mid", "mlp.fc2"), "layer_scale2.gamma")
_MIXER = (
    BIASES,
    *_conv_norms("stride_conv", "q", "k", "v", "v_local"),
    "talking_head1",
    "talking_head2",
    *_conv_norms("proj"),
)
_DOWNSAMPLE = (BIASES, "q.local", *_conv_norms("q.proj", "k", "v", "v_local", "proj"))
_V2 = {
    "stem": _V1["stem"],
    "conv": _V1["conv"],
    "attn": same(*(f"attn.{name}" for name in _DOWNSAMPLE), *_conv_norms("conv")),
    "ffn": same(*_FFN),
    "attn_ffn": same(*(f"token_mixer.{name}" for name in _MIXER), "layer_scale1.gamma", *_FFN),
}


def _layout(family: str, tables: dict[str, Rules]) -> Layout:
    return Layout(
        name="native",
        family=family,
        tables=tables,
        stem="stem",
        norm="norm",
        head="head",
        head_dist="head_dist",
        embedding=lambda stage: f"stages.{stage}.embedding",
        block=lambda stage, index, _: f"stages.{stage}.blocks.{index}",
        saves_index=False,
        token_stages=(2, 3),
    )


V1 = _layout("v1", _V1)
V2 = _layout("v2", _V2)
