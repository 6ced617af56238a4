"""The supernet: the start network with a MetaPath at every position (paper section 4).

Candidates at a MetaPath are mixed by a Gumbel-softmax over learnable importances alpha with temperature tau:
X_{i+1} = sum_n softmax((alpha_n + eps_n) / tau) * block_n(X_i). Weights and alphas train together, tau is annealed; in
evaluation there is no noise and tau is 1.

4D and 3D: a mixture of both lives on the map, since map and tokens hold the same numbers in another order: an MB3D
candidate reads the map as tokens and writes its tokens back as a map, as the paper's supernet does. That a stage, once
3D, stays 3D is a rule of the networks cut out of the supernet, not of the mixture: ``Space`` lets kinds move from 3D
to 4D to identity only, and a network that is cut out reshapes once per stage.

Shapes: B batch, C channels, h and w the map of a stage, N = h * w tokens, n candidates of a MetaPath.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from efficientformer.data.loader import Batch
from efficientformer.models.blocks import MapBlock, TokenBlock
from efficientformer.models.network import EfficientFormer, Stage
from efficientformer.slimming.space import IDENTITY, WITHOUT_ATTENTION
from efficientformer.spec.arch import ArchSpec, BlockSpec, StageSpec
from efficientformer.spec.errors import CheckpointError
from efficientformer.spec.manifest import Manifest
from efficientformer.training.task import Loss, Task
from efficientformer.weights.files import atomic_write

METADATA_KEY = "efficientformer_supernet"
HOT, COLD = 5.0, 1.0  # temperature at the first and at the last step
ALPHA_LR = 0.02  # peak learning rate of the importances, the same at every depth
INHERITED_ALPHA = 3.0  # of a block with pretrained weights: its share of the mixture is about nine tenths


class MetaPath(nn.Module):
    """Candidates for one position, mixed; the last one is identity and has no module.

    Args:
        candidates: Block kind to block, the start network's own first.
    """

    def __init__(self, candidates: dict[str, nn.Module]) -> None:
        super().__init__()
        self.candidates = nn.ModuleDict(candidates)
        self.alpha = nn.Parameter(torch.zeros(len(candidates) + 1))
        self.alpha.peak_lr = ALPHA_LR  # type: ignore[attr-defined]  # at the weights' own it would hardly move
        self.temperature = COLD
        first, *others = candidates.values()
        fresh = others if isinstance(first, TokenBlock) else []  # V2's inherit all they have from the first
        for learner in (self.alpha, *(p for block in fresh for p in block.parameters())):
            learner.always_learns = True  # type: ignore[attr-defined]  # whatever a recipe freezes

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the path chooses from, in the order of ``alpha``."""
        return (*self.candidates, IDENTITY)

    def shares(self) -> Tensor:
        """Return the shares (n,) of the candidates in the mixture; in training they are drawn."""
        if not self.training:
            return self.alpha.softmax(0)
        noise = torch.empty_like(self.alpha).exponential_().log().neg()  # Gumbel
        return ((self.alpha + noise) / self.temperature).softmax(0)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the candidates' maps: (B, C, h, w) to (B, C, h, w)."""
        *shares, identity = self.shares().unbind()
        mixed = identity * x
        for share, block in zip(shares, self.candidates.values(), strict=True):
            mixed = mixed + share * _on_map(block, x)
        return mixed


def _on_map(block: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(block, TokenBlock):
        return block(x)  # type: ignore[no-any-return]
    tokens = block(x.flatten(2).transpose(1, 2))  # (B, C, h, w) -> (B, N, C)
    return tokens.transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]  # (B, N, C) -> (B, C, h, w)


class Supernet(EfficientFormer):
    """The start network with a MetaPath in place of every block; images (B, C, H, W) to logits (B, K).

    Args:
        spec: The start network.
        drop_path_rate: Stochastic depth of the last block.
        head_dropout: Dropout before the heads.
        layer_scale_init: First value of layer scales.
    """

    def __init__(
        self, spec: ArchSpec, *, drop_path_rate: float = 0.0, head_dropout: float = 0.0, layer_scale_init: float = 1e-5
    ) -> None:
        rates = {
            "drop_path_rate": drop_path_rate, "head_dropout": head_dropout, "layer_scale_init": layer_scale_init,
        }  # fmt: skip
        super().__init__(spec, **rates)
        self.rates = rates
        plain = EfficientFormer(without_attention(spec), **rates)
        for stage, mine, others in zip(spec.stages, self.stages, plain.stages, strict=True):
            assert isinstance(mine, Stage) and isinstance(others, Stage)
            for position, block in enumerate(stage.blocks):
                candidates: dict[str, nn.Module] = {block.kind: mine.blocks[position]}
                if block.has_attention:
                    candidates[WITHOUT_ATTENTION[block.kind]] = others.blocks[position]
                mine.blocks[position] = MetaPath(candidates)

    @classmethod
    def around(cls, network: EfficientFormer, *, inherited: bool, layer_scale_init: float, drop_path_rate: float,
               head_dropout: float) -> Supernet:  # fmt: skip
        """Return the supernet of a network, which keeps its weights; ``inherited``: they are worth something."""
        supernet = cls(network.spec, drop_path_rate=drop_path_rate, head_dropout=head_dropout,
                       layer_scale_init=layer_scale_init)  # fmt: skip
        own = {}
        for name, tensor in network.state_dict().items():
            own[supernet.own_name(name)] = tensor
        supernet.load_state_dict({**supernet.state_dict(), **own})
        for path in supernet.paths() if inherited else ():
            with torch.no_grad():
                path.alpha[0] = INHERITED_ALPHA
            mine, *others = path.candidates.values()
            for other in others:
                if isinstance(mine, MapBlock) and isinstance(other, MapBlock):  # V2: the same MLP without the attention
                    other.mlp.load_state_dict(mine.mlp.state_dict())
                    other.layer_scale2.load_state_dict(mine.layer_scale2.state_dict())
        return supernet

    def own_name(self, name: str) -> str:
        """Return the supernet's name for a tensor of the start network."""
        parts = name.split(".")
        if parts[0] != "stages" or parts[2] != "blocks":
            return name
        kind = self.spec.stages[int(parts[1])].blocks[int(parts[3])].kind
        return ".".join([*parts[:4], "candidates", kind, *parts[4:]])

    def paths(self) -> Iterator[MetaPath]:
        """Yield every MetaPath in order."""
        for module in self.stages.modules():
            if isinstance(module, MetaPath):
                yield module

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature of every MetaPath."""
        for path in self.paths():
            path.temperature = temperature

    def probabilities(self) -> list[list[dict[str, float]]]:
        """Return, per stage and position, each kind's share: the softmax of its alpha."""
        paths = self.paths()
        found = []
        for stage in self.spec.stages:
            row = [next(paths) for _ in stage.blocks]
            found.append([dict(zip(p.kinds, p.alpha.detach().softmax(0).tolist(), strict=True)) for p in row])
        return found


class Annealed:
    """Any task, on a supernet whose temperature falls from step to step.

    Args:
        task: The loss.
        supernet: The network.
        steps: Steps of the whole run.
    """

    def __init__(self, task: Task, supernet: Supernet, steps: int) -> None:
        self._task, self._supernet, self._steps = task, supernet, steps

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Set the temperature of the batch's step, then return the task's loss."""
        done = min(1.0, batch.draws.step / max(1, self._steps - 1))
        self._supernet.set_temperature(HOT * (COLD / HOT) ** done)
        return self._task(model, batch)


def without_attention(spec: ArchSpec) -> ArchSpec:
    """Return the network whose blocks all lost their attention."""
    stages = []
    for stage in spec.stages:
        blocks = tuple(BlockSpec(WITHOUT_ATTENTION.get(b.kind, b.kind), b.expansion) for b in stage.blocks)
        stages.append(StageSpec(stage.width, blocks, stage.embedding))
    return dataclasses.replace(spec, stages=tuple(stages))


def save_supernet(path: Path, supernet: Supernet, manifest: Manifest) -> None:
    """Write a supernet as a safetensors file with its manifest.

    Raises:
        CheckpointError: If it cannot be written.
    """
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in supernet.state_dict().items()}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(state, {METADATA_KEY: manifest.to_json()}))


def load_supernet(path: Path) -> tuple[Supernet, Manifest]:
    """Read a supernet from its file.

    Raises:
        CheckpointError: If the file is missing, damaged, or no supernet.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        manifest = Manifest.from_json(text or "")
        supernet = Supernet(manifest.spec)
        supernet.load_state_dict(state)
    except Exception as error:  # the library's own type, torch's, or the manifest's
        raise CheckpointError(f"{path} is no supernet that can be read", found=str(error)[:300]) from error
    return supernet, manifest
