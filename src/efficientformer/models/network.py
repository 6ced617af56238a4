"""The network in train form: the papers' EfficientFormer (V1) and EfficientFormerV2, built from an ArchSpec.

Shapes: B batch, C channels, h and w the map of a stage, N = h * w tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from efficientformer.models.attention import DownsampleAttention, MapAttention, TokenAttention
from efficientformer.models.blocks import ConvMlp, MapBlock, TokenBlock, TokenMlp
from efficientformer.models.layers import ConvNorm, PoolMixer, laid_out
from efficientformer.spec.arch import ArchSpec, BlockSpec, StageSpec
from efficientformer.spec.errors import InputSizeError, UsageError
from efficientformer.spec.fields import as_plain
from efficientformer.spec.geometry import NUM_STAGES, STEM_STRIDES, Grid
from efficientformer.spec.manifest import Manifest


class Stem(nn.Module):
    """Two 3x3 convolutions with BatchNorm, each followed by the family's activation (V1 ReLU, V2 GELU)."""

    def __init__(self, spec: ArchSpec) -> None:
        super().__init__()
        width = spec.stages[0].width
        stride1, stride2 = STEM_STRIDES[spec.stem_stride]
        self.conv1 = ConvNorm(spec.in_chans, width // 2, 3, stride=stride1)
        self.conv2 = ConvNorm(width // 2, width, 3, stride=stride2)
        self.act: nn.Module = nn.ReLU() if spec.family == "v1" else nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Embed pixels: (B, in_chans, height, width) to (B, C1, h1, w1)."""
        return self.act(self.conv2(self.act(self.conv1(x))))


class AttentionEmbedding(nn.Module):
    """V2's stage-4 embedding: downsampling attention plus a strided convolution, both halve the map."""

    def __init__(self, dim: int, out_dim: int, attn: DownsampleAttention) -> None:
        super().__init__()
        self.attn = attn
        self.conv = ConvNorm(dim, out_dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Embed: (B, C, h, w) to (B, out, ceil(h/2), ceil(w/2))."""
        return self.attn(x) + self.conv(x)


class Stage(nn.Module):
    """An embedding (none in the first stage, which the stem feeds) and the blocks, on maps first, then on tokens."""

    def __init__(self, embedding: nn.Module | None, blocks: list[MapBlock | TokenBlock]) -> None:
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage: (B, C, h, w) to (B, C', h', w'), through tokens and back if it has MB3D blocks."""
        if self.embedding is not None:
            x = self.embedding(x)
        height, width = x.shape[-2:]
        for block in self.blocks:
            if isinstance(block, TokenBlock) and x.ndim == 4:
                x = x.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C): the one reshape into 3D
            recompute = self.grad_checkpointing and self.training
            x = _checkpointed(block, x) if recompute else block(x)
        if x.ndim == 3:
            x = x.transpose(1, 2).reshape(x.shape[0], -1, height, width)  # (B, N, C) -> (B, C, h, w)
        return x


class EfficientFormer(nn.Module):
    """An EfficientFormer of either family, in train form.

    Args:
        spec: The architecture.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from 0 over all blocks.
        head_dropout: Dropout on the pooled features before the heads, in training.
        layer_scale_init: First value of every layer scale (1e-5 in both papers' code).

    Attributes:
        spec: The architecture.
        manifest: How pictures are prepared for it, its class names and where its weights are from, as ``get_model``
            knows them; None for a network made of a spec alone.

    Raises:
        UsageError: If a rate is not in [0, 1).
    """

    def __init__(
        self, spec: ArchSpec, *, drop_path_rate: float = 0.0, head_dropout: float = 0.0, layer_scale_init: float = 1e-5
    ) -> None:
        super().__init__()
        for name, rate in (("drop_path_rate", drop_path_rate), ("head_dropout", head_dropout)):
            if not 0 <= rate < 1:
                raise UsageError(
                    f"Illegal {name}", expected="a rate from 0 up to but not including 1", found=repr(rate)
                )
        self.spec = spec
        self.manifest: Manifest | None = None
        self.stem = Stem(spec)
        self.stages = nn.ModuleList(_build_stages(spec, drop_path_rate, layer_scale_init))
        width = spec.stages[-1].width
        self.norm: nn.Module = nn.LayerNorm(width) if spec.family == "v1" else nn.BatchNorm2d(width)
        self.head_dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(width, spec.num_classes)
        self.head_dist = nn.Linear(width, spec.num_classes) if spec.distilled else None
        self.apply(init_weights)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the four stages' maps."""
        return tuple(stage.width for stage in self.spec.stages)

    @property
    def strides(self) -> tuple[int, ...]:
        """By how much the input is larger than each of the four stages' maps."""
        return tuple(self.spec.stem_stride << index for index in range(NUM_STAGES))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the heads by new ones, to be trained; ``manifest`` names no classes then.

        Args:
            num_classes: Their classes.

        Raises:
            SpecError: If there can be no such number; nothing is changed then.
        """
        self.spec = dataclasses.replace(self.spec, num_classes=as_plain(num_classes))
        self.head = self._new_head(self.head)
        self.head_dist = None if self.head_dist is None else self._new_head(self.head_dist)
        if self.manifest is not None:
            self.manifest = dataclasses.replace(self.manifest, spec=self.spec, labels=(), metrics={})

    def _new_head(self, old: nn.Linear) -> nn.Linear:
        """Return a head for the spec's classes: on the device, in the dtype and in the mode of another."""
        weight = old.weight
        head = nn.Linear(old.in_features, self.spec.num_classes, device=weight.device, dtype=weight.dtype)
        init_weights(head)
        return head.train(old.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in training: recompute each block in the backward pass."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    def features(self, x: Tensor, out_indices: Sequence[int] = tuple(range(NUM_STAGES))) -> tuple[Tensor, ...]:
        """Return maps of stages, before the final norm; no stage after the last of them runs.

        Args:
            x: Images (B, in_chans, height, width), preprocessed.
            out_indices: Which stages' maps, from 0 to 3, in the order they are to have.

        Returns:
            A tensor (B, C_i, h_i, w_i) for each: ``channels`` and ``strides`` say which. The published networks' are at
            strides 4, 8, 16 and 32.

        Raises:
            UsageError: If there are no such stages.
            InputSizeError: If a stage that runs has attention and was built for other map sizes.
        """
        num_stages = _stages_up_to(out_indices)
        self._check_input(x, num_stages)
        x = self.stem(x)
        maps = {}
        for index, stage in zip(range(num_stages), self.stages, strict=False):
            x = stage(x)
            if index in out_indices:
                maps[index] = x
        return tuple(maps[index] for index in out_indices)

    def pool(self, x: Tensor) -> Tensor:
        """Final norm, then mean over positions: the last stage's map (B, C, h, w) to features (B, C)."""
        return pool(self.norm, x)

    def extract_feat(self, inputs: Tensor, stage: str = "neck") -> tuple[Tensor, ...]:
        """Return features as a tuple, as mmpretrain's ``extract_feat`` does.

        Args:
            inputs: Images (B, in_chans, height, width), preprocessed.
            stage: ``neck`` for the pooled features ((B, C),); ``backbone`` for the four stages' maps.
        """
        if stage not in ("neck", "backbone"):
            raise UsageError("Illegal stage for extract_feat", expected="'neck' or 'backbone'", found=repr(stage))
        if stage == "backbone":
            return self.features(inputs)
        return (self.pool(self.features(inputs, (NUM_STAGES - 1,))[0]),)

    def forward(self, x: Tensor, *, return_heads: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Classify.

        Args:
            x: Images (B, in_chans, height, width), preprocessed.
            return_heads: Return the two heads' logits apart, as distillation needs them.

        Returns:
            Logits (B, num_classes): with two heads the mean of their logits. Or ``(cls, dist)``, each
            (B, num_classes), with ``return_heads``.

        Raises:
            InputSizeError: If the input's size does not fit the attention tables.
            UsageError: If ``return_heads`` is asked of a network with one head.
        """
        pooled = self.head_dropout(*self.extract_feat(x))  # (B, C)
        if self.head_dist is None:
            if return_heads:
                raise UsageError("This network has one head", hint="Build it with distilled=True to get two")
            return self.head(pooled)
        cls, dist = self.head(pooled), self.head_dist(pooled)
        return (cls, dist) if return_heads else (cls + dist) / 2

    def _check_input(self, x: Tensor, num_stages: int) -> None:
        spec = self.spec
        if x.ndim != 4:
            hint = "Add the batch's axis to one picture: x[None]"
            raise UsageError("Wrong number of axes", expected="(B, C, H, W)", found=f"{tuple(x.shape)}", hint=hint)
        channels, height, width = x.shape[1:]
        if channels != spec.in_chans:
            raise UsageError("Wrong number of input channels", expected=str(spec.in_chans), found=str(channels))
        if (height, width) != spec.input_size and not spec.fits((height, width), num_stages):
            expected = "x".join(map(str, spec.input_size))
            raise InputSizeError(
                "The input size does not fit this network",
                expected=f"{expected} pixels",
                found=f"{height}x{width}",
                hint=f"Build it for another size with get_model(..., input_size=...): {spec.legal_sizes()}",
            )


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block whose inner results are computed again in the backward pass; BatchNorms count the batch once."""
    if torch.compiler.is_compiling():  # the traced step updates BatchNorms once by itself, and takes no context of ours
        traced: Tensor = checkpoint(block, x, use_reentrant=False)
        return traced

    @contextmanager
    def quietly() -> Iterator[None]:
        norms = [part for part in block.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        before = [(norm, norm.momentum) for norm in norms if norm.training]
        for norm, _ in before:
            norm.momentum = 0.0  # the running statistics stay
        try:
            yield
        finally:
            for norm, momentum in before:
                norm.momentum = momentum
                assert norm.num_batches_tracked is not None
                norm.num_batches_tracked -= 1

    result: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), quietly()))
    return result


def _stages_up_to(indices: Sequence[int]) -> int:
    """Return how many stages run for the maps of some."""
    legal = range(NUM_STAGES)
    if not isinstance(indices, Sequence) or not indices or any(index not in legal for index in indices):
        expected = f"some of the stages {', '.join(map(str, legal))}"
        raise UsageError("Illegal out_indices", expected=expected, found=repr(indices))
    return max(indices) + 1


def pool(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply the final norm, then the mean over positions: a map (B, C, h, w) to features (B, C)."""
    if isinstance(norm, nn.LayerNorm):
        return norm(x.flatten(2).transpose(1, 2)).mean(1)  # (B, N, C) -> (B, C)
    return laid_out(norm(x)).mean((2, 3))


def _build_stages(spec: ArchSpec, drop_path_rate: float, scale_init: float) -> list[Stage]:
    num_blocks = sum(len(stage.blocks) for stage in spec.stages)
    rates = iter([drop_path_rate * i / max(1, num_blocks - 1) for i in range(num_blocks)])
    stages, dim = [], spec.stages[0].width
    for index, (stage, grid) in enumerate(zip(spec.stages, spec.grids, strict=True)):
        embedding = _build_embedding(spec, stage, dim, spec.grids[index - 1])
        blocks = [_build_block(spec, stage, block, grid, next(rates), scale_init) for block in stage.blocks]
        stages.append(Stage(embedding, blocks))
        dim = stage.width
    return stages


def _build_embedding(spec: ArchSpec, stage: StageSpec, dim: int, grid: Grid) -> nn.Module | None:
    if stage.embedding == "stem":
        return None
    if stage.embedding == "conv":
        return ConvNorm(dim, stage.width, 3, stride=2)
    return AttentionEmbedding(dim, stage.width, DownsampleAttention(dim, stage.width, spec.attention, grid))


def _build_block(
    spec: ArchSpec, stage: StageSpec, block: BlockSpec, grid: Grid, drop_path: float, scale_init: float
) -> MapBlock | TokenBlock:
    dim, hidden = stage.width, stage.hidden(block)
    if block.kind == "mb3d":
        attention = TokenAttention(dim, spec.attention, grid)
        return TokenBlock(dim, attention, TokenMlp(dim, hidden), drop_path, scale_init)
    mixer: PoolMixer | MapAttention | None = None
    if block.kind == "mb4d":
        mixer = PoolMixer()
    elif block.kind == "attn_ffn":
        mixer = MapAttention(dim, spec.attention, grid, block.stride)
    return MapBlock(dim, mixer, ConvMlp(dim, hidden, depthwise=spec.family == "v2"), drop_path, scale_init)


def init_weights(module: nn.Module) -> None:
    """Initialise a convolution or linear layer: truncated normal of std 0.02, zero biases (both papers' code)."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
