"""The architecture spec: one frozen, validated, JSON-round-tripping value that says a whole network.

The zoo lists specs, ``get_model`` builds one, checkpoints and exported files carry one, slimming turns one into a
smaller one. Terms are the papers': MB4D and MB3D (V1, arXiv 2206.01191 section 3.2), the unified FFN and the
attention block (V2, arXiv 2212.08059 section 3), stem, embedding, token mixer.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientformer.spec import geometry
from efficientformer.spec.errors import InputSizeError, SpecError, UsageError, reason_of
from efficientformer.spec.fields import as_list, as_pair, check_bool, check_choice, check_int, check_keys, check_number
from efficientformer.spec.geometry import NUM_STAGES, Grid

SCHEMA = 1

# Block kinds of each family. V1: pooling mixer on maps, attention on tokens. V2: FFN with a depthwise convolution,
# and the same preceded by attention on maps.
BLOCK_KINDS = {"v1": ("mb4d", "mb3d"), "v2": ("ffn", "attn_ffn")}
ATTENTION_KINDS = ("mb3d", "attn_ffn")
ATTENTION_STAGES = (2, 3)  # zero-based: attention is quadratic in the tokens, so only the last two stages may hold it
_WITHOUT_HEAD = (
    "A network's heads cost next to nothing: network.extract_feat(x)[0] gives the pooled features without them, "
    "network.features(x) the maps"
)


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One block of a stage.

    Attributes:
        kind: ``mb4d`` or ``mb3d`` (V1), ``ffn`` or ``attn_ffn`` (V2).
        expansion: Hidden width of the block's MLP over the stage width.
        stride: For ``attn_ffn`` only: attention runs at this stride and is upsampled back (V2 uses 2 in stage 3).
    """

    kind: str
    expansion: float = 4.0
    stride: int = 1

    def __post_init__(self) -> None:
        check_choice("block kind", self.kind, sum(BLOCK_KINDS.values(), ()))
        check_number("block expansion", self.expansion, 0.125, 16)
        check_choice("block stride", self.stride, (1, 2))
        if self.stride != 1 and self.kind != "attn_ffn":
            raise SpecError(f"A {self.kind} block has no stride", expected="stride 1", found=f"stride {self.stride}")
        object.__setattr__(self, "expansion", float(self.expansion))

    @property
    def has_attention(self) -> bool:
        """Whether the token mixer is attention."""
        return self.kind in ATTENTION_KINDS


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage: what leads into it, its width, its blocks (none is legal: a slimmed stage may be its embedding only).

    Attributes:
        width: Channels of the stage.
        blocks: Its blocks in order.
        embedding: ``stem`` for the first stage; else ``conv`` (3x3, stride 2) or ``attn`` (V2: attention plus conv).
    """

    width: int
    blocks: tuple[BlockSpec, ...]
    embedding: str = "conv"

    def __post_init__(self) -> None:
        check_int("stage width", self.width, 2, 8192)
        check_choice("stage embedding", self.embedding, ("stem", "conv", "attn"))
        object.__setattr__(self, "blocks", tuple(as_list("stage blocks", self.blocks, 256)))
        for block in self.blocks:
            if not isinstance(block, BlockSpec):
                raise SpecError("Illegal block", expected="a BlockSpec", found=type(block).__name__)
            self.hidden(block)

    def hidden(self, block: BlockSpec) -> int:
        """Return the hidden width of ``block``'s MLP in this stage."""
        hidden = int(self.width * block.expansion)
        check_int("hidden width (stage width times expansion)", hidden, 1, 65536)
        return hidden


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Sizes of every attention in the network (the published networks all use these defaults).

    Attributes:
        num_heads: Heads.
        key_dim: Query and key width of one head, in blocks.
        value_ratio: Value width of one head over the key width.
        embedding_key_dim: Query and key width of one head in an attention embedding (V2).
    """

    num_heads: int = 8
    key_dim: int = 32
    value_ratio: int = 4
    embedding_key_dim: int = 16

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_int(f"attention {field.name}", getattr(self, field.name), 1, 256)


@dataclass(frozen=True, slots=True)
class ArchSpec:
    """One network of the EfficientFormer family.

    Attributes:
        family: ``v1`` or ``v2``; decides the stem's activation (ReLU, GELU) and the final norm (LayerNorm, BatchNorm).
        stages: The four stages.
        input_size: Height and width of the input in pixels.
        in_chans: Input channels.
        num_classes: Classes.
        distilled: Whether a second (distillation) head exists; in evaluation the logits of both are averaged.
        stem_stride: Total stride of the stem: 4 as published, 2 or 1 for small images.
        attention: Sizes of the attentions.

    Raises:
        SpecError: For anything that describes no network; the message names what is legal.
    """

    family: str
    stages: tuple[StageSpec, ...]
    input_size: tuple[int, int] = (224, 224)
    in_chans: int = 3
    num_classes: int = 1000
    distilled: bool = True
    stem_stride: int = 4
    attention: AttentionSpec = AttentionSpec()

    def __post_init__(self) -> None:
        check_choice("family", self.family, tuple(BLOCK_KINDS))
        object.__setattr__(self, "stages", tuple(as_list("stages", self.stages, NUM_STAGES)))
        if len(self.stages) != NUM_STAGES or not all(isinstance(s, StageSpec) for s in self.stages):
            raise SpecError("Illegal stages", expected=f"{NUM_STAGES} StageSpecs", found=f"{len(self.stages)} entries")
        object.__setattr__(self, "input_size", as_pair("input size", self.input_size))
        for name, side in zip(("input height", "input width"), self.input_size, strict=True):
            check_int(name, side, 1, 8192)
        check_int("in_chans", self.in_chans, 1, 1024)
        check_int("num_classes", self.num_classes, 1, 1_000_000, _WITHOUT_HEAD)
        check_bool("distilled", self.distilled)
        check_choice("stem_stride", self.stem_stride, (1, 2, 4))
        if not isinstance(self.attention, AttentionSpec):
            raise SpecError("Illegal attention", expected="an AttentionSpec", found=type(self.attention).__name__)
        self._check_stages()
        self._check_input_size()

    def _check_stages(self) -> None:
        for index, stage in enumerate(self.stages):
            number = index + 1
            legal: tuple[str, ...] = ("stem",) if index == 0 else ("conv",)
            if self.family == "v2" and index in ATTENTION_STAGES:
                legal = ("conv", "attn")
            check_choice(f"embedding of stage {number}", stage.embedding, legal)
            kinds = [block.kind for block in stage.blocks]
            for kind in kinds:
                check_choice(f"block kind in stage {number} of a {self.family} network", kind, BLOCK_KINDS[self.family])
            if index not in ATTENTION_STAGES and any(block.has_attention for block in stage.blocks):
                raise SpecError(
                    f"Attention in stage {number}", expected="attention in stages 3 and 4 only", found=str(kinds)
                )
            if "mb3d" in kinds and "mb4d" in kinds[kinds.index("mb3d") :]:
                raise SpecError(
                    f"Stage {number} goes back from 3D to 4D",
                    expected="every MB4D of a stage before its first MB3D (dimension consistency, paper section 3.2)",
                    found=str(kinds),
                )

    def _check_input_size(self) -> None:
        if self.accepts(self.input_size):
            return
        height, width = self.input_size
        raise InputSizeError(
            f"This network cannot work on {height}x{width} pixels",
            expected=self.legal_sizes(),
            hint=f"The nearest legal size is {'x'.join(map(str, self.nearest_size(self.input_size)))}",
        )

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Height and width of each stage's map at ``input_size``."""
        return geometry.stage_grids(self.input_size, self.stem_stride)

    def attention_grids(self, num_stages: int = NUM_STAGES) -> dict[int, Grid]:
        """Return the maps that attention in the first stages is bound to, by zero-based stage.

        Each distance of two of their positions has a bias of its own. An embedding attends to the map before it.
        """
        stages = self.stages[:num_stages]
        bound = {i for i, stage in enumerate(stages) if any(block.has_attention for block in stage.blocks)}
        bound |= {i - 1 for i, stage in enumerate(stages) if stage.embedding == "attn"}
        return {stage: self.grids[stage] for stage in sorted(bound)}

    @property
    def strided_stages(self) -> tuple[int, ...]:
        """Zero-based stages whose map must have even sides, because attention halves it and upsamples back."""
        return tuple(i for i, s in enumerate(self.stages) if any(block.stride == 2 for block in s.blocks))

    def accepts(self, size: tuple[int, int]) -> bool:
        """Whether the network could be built for inputs of ``size`` (height, width)."""
        return all(geometry.is_legal_side(side, self.stem_stride, self.strided_stages) for side in size)

    def fits(self, size: tuple[int, int], num_stages: int = NUM_STAGES) -> bool:
        """Whether the first stages of this very network, built for ``input_size``, work on inputs of ``size``.

        Attention does on maps of one size only, that of its bias table; all else does on any.
        """
        grids = geometry.stage_grids(size, self.stem_stride)
        keeps = all(grids[stage] == grid for stage, grid in self.attention_grids(num_stages).items())
        return keeps and min(size) >= geometry.least_side(self.stem_stride)

    def legal_sizes(self) -> str:
        """Say in words which input sides are legal."""
        return geometry.describe_legal_sides(self.stem_stride, self.strided_stages)

    def nearest_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the legal input size nearest to ``size``."""
        height, width = (geometry.nearest_legal_side(side, self.stem_stride, self.strided_stages) for side in size)
        return height, width

    def with_input_size(self, size: int | tuple[int, int]) -> ArchSpec:
        """Return the same network for another input size.

        Raises:
            InputSizeError: If the size is illegal; the message names legal ones.
        """
        return dataclasses.replace(self, input_size=as_pair("input size", size))

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings; ``from_dict`` gives the equal spec back."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        """Return the spec as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: object) -> ArchSpec:
        """Build a spec from what ``to_dict`` returned, trusting nothing in it.

        Raises:
            SpecError: On unknown or missing fields and on illegal values.
        """
        if isinstance(data, dict):
            data = dict(data)
            check_choice("architecture schema", data.pop("schema", SCHEMA), (SCHEMA,))
        fields = check_keys("the architecture spec", data, cls)
        fields["stages"] = tuple(_stage_from_dict(s) for s in as_list("stages", fields["stages"], NUM_STAGES))
        if "attention" in fields:
            fields["attention"] = AttentionSpec(**check_keys("attention", fields["attention"], AttentionSpec))
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str | bytes) -> ArchSpec:
        """Build a spec from JSON text: the spec itself, or what ``efficientformer info MODEL --json`` prints.

        Raises:
            SpecError: If the text is no JSON or describes no network.
        """
        data = load_json("the architecture spec", text)
        return cls.from_dict(data["spec"] if isinstance(data, dict) and "spec" in data else data)


def read_spec(path: Path) -> ArchSpec:
    """Read a spec from a JSON file.

    Raises:
        UsageError: If it cannot be read.
        SpecError: If it holds no spec.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(f"Cannot read the spec {path}", found=reason_of(error)) from error
    try:
        return ArchSpec.from_json(text)
    except SpecError as error:
        raise error.at(path) from error


def load_json(name: str, text: str | bytes) -> object:
    """Parse JSON, turning every way it can fail into a SpecError that names ``name``; so does a key given twice."""
    try:
        return json.loads(text, object_pairs_hook=_members)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"No valid JSON in {name}", found=str(error)) from None


def _members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object's members; Python's own parser takes the last one of a name."""
    members: dict[str, object] = {}
    for key, value in pairs:
        if key in members:
            raise ValueError(f"the key {key!r} twice")
        members[key] = value
    return members


def _stage_from_dict(data: object) -> StageSpec:
    fields = check_keys("a stage", data, StageSpec)
    blocks = as_list("stage blocks", fields["blocks"], 256)
    fields["blocks"] = tuple(BlockSpec(**check_keys("a block", block, BlockSpec)) for block in blocks)
    return StageSpec(**fields)
