"""Train form to deploy form: the same function with fewer operations, as a new module.

Folded: BatchNorm into convolutions, LayerNorm's factors into the linear layers behind them, layer scales into the
weights before them (the pooling mixer has none and keeps its own), the softmax scale into the queries, the attention
bias gathered once, the final norm's factors into the head, and two heads averaged into one. Only these known pairs
are touched; the result is compared with the train form before it is returned.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from efficientformer.models.attention import DownsampleAttention, MapAttention, OffsetAttention, TokenAttention
from efficientformer.models.blocks import MapBlock, TokenBlock
from efficientformer.models.layers import ConvNorm, LayerScale, PoolMixer
from efficientformer.models.network import EfficientFormer, pool
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import ExportError

TOLERANCE = 1e-9  # of the largest logit, in float64: folding reorders sums and nothing else


class DeployedEfficientFormer(nn.Module):
    """An EfficientFormer in deploy form: images (B, in_chans, height, width) to logits (B, num_classes).

    It has one head, no features and no training: make it with ``fold``.
    """

    def __init__(
        self, spec: ArchSpec, stem: nn.Module, stages: nn.ModuleList, norm: nn.Module, head: nn.Linear
    ) -> None:
        super().__init__()
        self.spec, self.stem, self.stages, self.norm, self.head = spec, stem, stages, norm, head

    def forward(self, x: Tensor) -> Tensor:
        """Classify (B, in_chans, height, width): logits (B, num_classes)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(pool(self.norm, x))


def fold(model: EfficientFormer) -> DeployedEfficientFormer:
    """Return the deploy form of ``model``, which is left untouched.

    Args:
        model: A network in train form; its evaluation behaviour is what is folded.

    Returns:
        A new module in evaluation mode, on the same device and in the same dtype.

    Raises:
        ExportError: If the folded network's logits differ from the train form's.
    """
    parameter = model.head.weight
    reference = copy.deepcopy(model).eval().double()
    # float64, so that folding itself costs no accuracy
    net = copy.deepcopy(reference).requires_grad_(False)
    with torch.no_grad():
        for module in list(net.modules()):
            if isinstance(module, OffsetAttention):
                _fold_attention(module)
            elif isinstance(module, MapBlock):
                _fold_map_block(module)
            elif isinstance(module, TokenBlock):
                _fold_token_block(module)
        _fuse_convolutions(net)
        norm, head = _fold_head(net)
        deployed = DeployedEfficientFormer(model.spec, net.stem, net.stages, norm, head).eval()
        _check_equal(reference, deployed, parameter.device)
    return deployed.to(parameter.dtype)


class _GatheredBias(OffsetAttention):
    """Deploy-form scores: the scale is in the queries, the bias is gathered."""

    gathered_bias: Tensor

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k + self.gathered_bias


class _DeployTokenAttention(_GatheredBias, TokenAttention):
    pass


class _DeployMapAttention(_GatheredBias, MapAttention):
    pass


class _DeployDownsampleAttention(_GatheredBias, DownsampleAttention):
    pass


_DEPLOY_CLASS = {
    TokenAttention: _DeployTokenAttention,
    MapAttention: _DeployMapAttention,
    DownsampleAttention: _DeployDownsampleAttention,
}


def _fold_attention(attention: OffsetAttention) -> None:
    if isinstance(attention, TokenAttention):
        # rows of qkv are interleaved per head: the first key_dim of each head's are its queries
        weight = attention.qkv.weight.view(attention.num_heads, -1, attention.qkv.in_features)
        bias = attention.qkv.bias.view(attention.num_heads, -1)
        weight[:, : attention.key_dim] *= attention.scale
        bias[:, : attention.key_dim] *= attention.scale
    elif isinstance(attention, MapAttention):
        _scale_output(attention.q, attention.scale)
    elif isinstance(attention, DownsampleAttention):
        _scale_output(attention.q.proj, attention.scale)
    attention.register_buffer("gathered_bias", attention.bias())
    del attention.attention_biases, attention.offset_index
    attention.__class__ = _DEPLOY_CLASS[type(attention)]


def _fold_map_block(block: MapBlock) -> None:
    if isinstance(block.token_mixer, MapAttention) and isinstance(block.layer_scale1, LayerScale):
        _scale_output(block.token_mixer.proj, block.layer_scale1.gamma)
        block.layer_scale1 = nn.Identity()  # type: ignore[assignment]
    elif block.token_mixer is not None and not isinstance(block.token_mixer, PoolMixer):
        raise ExportError("No folding rule for this token mixer", found=type(block.token_mixer).__name__)
    _scale_output(block.mlp.fc2, block.layer_scale2.gamma)
    block.layer_scale2 = nn.Identity()  # type: ignore[assignment]


def _fold_token_block(block: TokenBlock) -> None:
    block.norm1 = _absorb_norm(block.norm1, block.token_mixer.qkv)
    block.norm2 = _absorb_norm(block.norm2, block.mlp.fc1)
    for linear, scale in ((block.token_mixer.proj, block.layer_scale1), (block.mlp.fc2, block.layer_scale2)):
        linear.weight.mul_(scale.gamma[:, None])
        linear.bias.mul_(scale.gamma)
    block.layer_scale1 = block.layer_scale2 = nn.Identity()  # type: ignore[assignment]


def _absorb_norm(norm: nn.LayerNorm, linear: nn.Linear) -> nn.LayerNorm:
    """Move a LayerNorm's factors into the linear layer behind it: W(g * x + b) + c = (W g) x + (W b + c)."""
    linear.bias.add_(linear.weight @ norm.bias)
    linear.weight.mul_(norm.weight)
    dim = norm.normalized_shape
    return nn.LayerNorm(dim, eps=norm.eps, elementwise_affine=False)


def _scale_output(layer: ConvNorm, scale: Tensor | float) -> None:
    """Multiply a ConvNorm's output: its norm's factors are linear in it."""
    layer.norm.weight.mul_(scale)
    layer.norm.bias.mul_(scale)


def _fuse_convolutions(net: nn.Module) -> None:
    for name, child in net.named_children():
        if isinstance(child, ConvNorm):
            setattr(net, name, torch.nn.utils.fuse_conv_bn_eval(child.conv, child.norm))
        elif isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm) and name != "norm":
            raise ExportError("No folding rule for this BatchNorm", found=f"{type(net).__name__}.{name}")
        else:
            _fuse_convolutions(child)


def _fold_head(net: EfficientFormer) -> tuple[nn.Module, nn.Linear]:
    """Average the heads, and move the final norm's factors, which commute with the mean over positions, into them."""
    head = net.head
    if net.head_dist is not None:
        head.weight.copy_((head.weight + net.head_dist.weight) / 2)
        head.bias.copy_((head.bias + net.head_dist.bias) / 2)
    norm = net.norm
    if isinstance(norm, nn.LayerNorm):
        return _absorb_norm(norm, head), head
    assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    factor = norm.weight / (variance + norm.eps).sqrt()
    head.bias.add_(head.weight @ (norm.bias - factor * mean))
    head.weight.mul_(factor)
    return nn.Identity(), head


def _check_equal(reference: EfficientFormer, deployed: DeployedEfficientFormer, device: torch.device) -> None:
    spec = reference.spec
    images = torch.rand(2, spec.in_chans, *spec.input_size, generator=torch.Generator().manual_seed(0), device="cpu")
    images = (images * 4 - 2).to(device, torch.float64)
    expected, found = reference(images), deployed(images)
    difference = float((expected - found).abs().max())
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= limit:  # also true for NaN
        raise ExportError(
            "The folded network differs from the trained one",
            expected=f"logits within {limit:.1e}",
            found=f"a difference of {difference:.1e}",
            hint="Weights with NaN or infinity, or a norm with a zero variance, do this; check the checkpoint",
        )
