"""The one mechanism behind every key map: ordered tables of layer names, expanded for a spec.

A layout says, for every kind of part a network has (stem, embedding, block, ...), which of its layers bears which name
over there, in the order its own code registers them. Expanding a layout for a spec gives one entry per tensor, in
their order; the reading and the writing direction both walk that list, so neither can know more than the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from efficientformer.models.network import EfficientFormer
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import CheckpointError, UsageError

# (our name, their name) of layers or of single parameters, both relative to a part, in their order.
Rules = tuple[tuple[str, str], ...]
SAME: Rules = (("", ""),)  # the part is one layer, and its tensors bear the same names

BIASES, INDEX = "attention_biases", "attention_bias_idxs"
MAX_TOKENS = 64 * 64  # the bias index has one entry per pair of tokens: a file must not make us allocate any amount


@dataclass(frozen=True, eq=False)
class Layout:
    """How one source names the tensors of one family.

    Attributes:
        name: The source: ``native``, ``snap``, ``timm``, ``mmpretrain`` or ``transformers``.
        family: ``v1`` or ``v2``.
        tables: Rules of each kind of part: ``stem``, the embeddings ``conv`` and ``attn``, and the block kinds.
        stem: Name of the stem.
        norm: Name of the final norm.
        head: Name of the classification head.
        head_dist: Name of the distillation head.
        embedding: Stage (1 to 3) to the name of what leads into it.
        block: Stage, index of a block in it, and number of the stage's blocks on maps (those before its first MB3D)
            to the block's name. Some sources give the reshape into tokens an index of its own.
        saves_index: Whether their code saves the derived ``attention_bias_idxs``.
        scales_on_map: Whether layer scales are stored as (C, 1, 1) instead of (C,).
        token_stages: Zero-based stages in which the names leave room for MB3D blocks.
    """

    name: str
    family: str
    tables: Mapping[str, Rules]
    stem: str
    norm: str
    head: str
    head_dist: str
    embedding: Callable[[int], str]
    block: Callable[[int, int, int], str]
    saves_index: bool = True
    scales_on_map: bool = False
    token_stages: tuple[int, ...] = (3,)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    Attributes:
        theirs: Its name over there.
        shape: Its shape over there.
        ours: Its name in our state dict; empty for the derived bias index, which we do not keep.
        index: The value the derived bias index must have.
        floating: Whether its values are floating-point, else int64.
    """

    theirs: str
    shape: tuple[int, ...]
    ours: str = ""
    index: Tensor | None = None
    floating: bool = True


def same(*names: str) -> Rules:
    """Return the rules of layers that bear our names over there, too."""
    return tuple((name, name) for name in names)


def conv_norm(ours: str, conv: str, norm: str) -> Rules:
    """Return the rules of one of our ConvNorm layers."""
    return ((f"{ours}.conv", conv), (f"{ours}.norm", norm))


def join(prefix: str, name: str) -> str:
    """Join two parts of a dotted name, either of which may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def rename(rules: Rules, name: str) -> str | None:
    """Return their name of our ``name`` (both relative to a part), or None if no rule covers it."""
    for ours, theirs in rules:
        if not ours or name == ours or name.startswith(f"{ours}."):
            return join(theirs, name[len(ours) :].removeprefix("."))
    return None


@lru_cache(maxsize=2)  # a training writes checkpoints of one network again and again; bias indices can be large
def entries(layout: Layout, spec: ArchSpec) -> tuple[Entry, ...]:
    """Return every tensor that ``layout`` can hold of the network ``spec``, in the order of that layout.

    Raises:
        UsageError: If the layout has no names for such a network.
        CheckpointError: If the attention works on more than 64 x 64 positions.
    """
    _check_names(layout, spec)
    network = skeleton(spec)
    state = network.state_dict()
    layers: dict[str, list[str]] = defaultdict(list)  # of a layer all its tensors, of a tensor itself
    for name in state:
        layers[name.rpartition(".")[0]].append(name)
        layers[name].append(name)

    result: list[Entry] = []
    for ours, theirs, kind in _parts(layout, spec):
        for our_layer, their_layer in layout.tables.get(kind, SAME):
            our_name, their_name = join(ours, our_layer), join(theirs, their_layer)
            for name in layers.get(our_name, ()):
                shape = tuple(state[name].shape)
                if layout.scales_on_map and name.endswith(".gamma"):
                    shape = (*shape, 1, 1)
                full_name = join(their_name, name[len(our_name) :].removeprefix("."))
                result.append(Entry(full_name, shape, name, floating=state[name].is_floating_point()))
                if name.endswith(f".{BIASES}"):
                    index: Tensor = network.get_submodule(name.rpartition(".")[0]).offset_index  # type: ignore[assignment]
                    index_name = their_name.replace(BIASES, INDEX)
                    result.append(Entry(index_name, tuple(index.shape), index=index, floating=False))
    assert {entry.ours for entry in result if entry.ours} == set(state), f"the {layout.name} tables have a hole"
    return tuple(result)


def skeleton(spec: ArchSpec) -> EfficientFormer:
    """Return the network with its parameters on the meta device: names and shapes for nothing, bias indices for real.

    Raises:
        CheckpointError: If the attention works on more than 64 x 64 positions.
    """
    for height, width in spec.attention_grids().values():
        if height * width > MAX_TOKENS:
            limit = f"at most {MAX_TOKENS} positions"
            raise CheckpointError("Attention on too large a map", expected=limit, found=f"{height}x{width}")
    with _ParametersOnMeta():
        return EfficientFormer(spec)


class _ParametersOnMeta(TorchFunctionMode):
    """Allocate on the meta device, unlike ``torch.device("meta")`` without touching what is computed."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones, torch.full):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _parts(layout: Layout, spec: ArchSpec) -> Iterator[tuple[str, str, str]]:
    """Yield our name, their name and the kind of every part, in the order all sources agree on."""
    yield "stem", layout.stem, "stem"
    for number, stage in enumerate(spec.stages):
        if number > 0:
            yield f"stages.{number}.embedding", layout.embedding(number), stage.embedding
        num_map = sum(block.kind != "mb3d" for block in stage.blocks)
        for index, block in enumerate(stage.blocks):
            yield f"stages.{number}.blocks.{index}", layout.block(number, index, num_map), block.kind
    yield "norm", layout.norm, "norm"
    yield "head", layout.head, "head"
    if spec.distilled:
        yield "head_dist", layout.head_dist, "head"


def _check_names(layout: Layout, spec: ArchSpec) -> None:
    if spec.family != layout.family:
        raise UsageError(f"Not a {layout.family} network", expected=layout.family, found=spec.family)
    for number, stage in enumerate(spec.stages):
        if number not in layout.token_stages and any(block.kind == "mb3d" for block in stage.blocks):
            raise UsageError(
                f"The {layout.name} layout has no names for MB3D blocks in stage {number + 1}",
                expected="MB3D blocks in stage 4 only",
                hint="The native layout can hold this network",
            )
