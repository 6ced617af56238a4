"""Networks out of a trained supernet, with the weights they inherit.

``Pool`` holds the weights of every candidate at its present width. Where the supernet is a mixture, each MetaPath's
share goes into the layer scales of its candidates once (``Pool.of``), so that a network cut out of the pool adds to its
stream what the mixture did; from then on cutting copies numbers and changes none.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from efficientformer.models.network import EfficientFormer
from efficientformer.slimming.channels import Order, axes_of, by_importance, plan_cut
from efficientformer.slimming.space import IDENTITY, Candidate
from efficientformer.slimming.supernet import Supernet
from efficientformer.spec.arch import ArchSpec
from efficientformer.spec.errors import SpecError

_BLOCK = re.compile(r"stages\.(?P<stage>[0-3])\.blocks\.(?P<position>\d+)(?:\.candidates\.(?P<kind>\w+))?(?P<rest>.*)")


@dataclass(frozen=True)
class Pool:
    """The weights of all candidates of a supernet.

    Attributes:
        spec: The start network at the present widths and expansions.
        state: The supernet's names to tensors, on the CPU, without the alphas.
        start: The start network.
        fresh: Names of the parameters that learn whatever a recipe freezes.
    """

    spec: ArchSpec
    state: Mapping[str, Tensor]
    start: ArchSpec
    fresh: frozenset[str] = frozenset()

    @classmethod
    def of(cls, supernet: Supernet, *, mixed: bool = True) -> Pool:
        """Return the weights of a supernet, if it is a mixture each candidate's layer scales times its share of it."""
        shares = supernet.probabilities()
        state = {}
        for name, tensor in supernet.state_dict().items():
            parts = name.split(".")
            if parts[-1] == "alpha":
                continue
            kept = tensor.detach().cpu().clone()
            if mixed and parts[-1] == "gamma":
                kept *= shares[int(parts[1])][int(parts[3])][parts[5]]
            state[name] = kept
        fresh = (name for name, parameter in supernet.named_parameters() if getattr(parameter, "always_learns", False))
        return cls(supernet.spec, state, supernet.spec, frozenset(fresh))

    def slimmed(self, candidate: Candidate, order: Order = by_importance) -> Pool:
        """Return the pool at the widths and expansions of a candidate, with the channels that come first in an order.

        What orders the channels of a stage are the weights of the candidate's own blocks: a block that was removed, or
        what would replace attention, has no say.

        Args:
            candidate: A network of the same space, nowhere wider than this pool.
            order: Which channels stay.

        Raises:
            SpecError: If the candidate is of another start network, or wider.
        """
        new = candidate.full
        if candidate.start != self.start or any(
            wide.width < narrow.width for wide, narrow in zip(self.spec.stages, new.stages, strict=True)
        ):
            raise SpecError(
                "The weights do not reach",
                expected=f"widths of at most {[stage.width for stage in self.spec.stages]}",
                found=f"{list(candidate.widths)}",
            )
        used = {name: tensor for name, tensor in self.state.items() if _is_used(name, candidate)}
        cut = plan_cut(self.state, self.spec, new, order, used)
        state = {name: axes_of(name).cut(tensor, cut) for name, tensor in self.state.items()} if cut else self.state
        return dataclasses.replace(self, spec=new, state=state)

    def network(self, candidate: Candidate) -> EfficientFormer:
        """Return a candidate of the pool's own widths as an ordinary network, in training mode."""
        network = EfficientFormer(candidate.spec)
        names = pool_names(candidate, network)
        network.load_state_dict({name: self.state[name_in_pool] for name, name_in_pool in names.items()})
        for name, parameter in network.named_parameters():
            if names[name] in self.fresh:
                parameter.always_learns = True  # type: ignore[attr-defined]  # as in the supernet
        return network

    def updated(self, candidate: Candidate, network: EfficientFormer) -> Pool:
        """Return the pool with the weights of a network that was cut out of it and trained on."""
        names = pool_names(candidate, network)
        state = {names[name]: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
        return dataclasses.replace(self, state={**self.state, **state})


def pool_names(candidate: Candidate, network: EfficientFormer) -> dict[str, str]:
    """Return the pool's name of every tensor of a candidate's network: its blocks are numbered without gaps."""
    places = [[(i, kind) for i, kind in enumerate(row) if kind != IDENTITY] for row in candidate.kinds]
    names = {}
    for name in network.state_dict():
        parts = name.split(".")
        if parts[0] == "stages" and parts[2] == "blocks":
            position, kind = places[int(parts[1])][int(parts[3])]
            names[name] = ".".join([*parts[:3], str(position), "candidates", kind, *parts[4:]])
        else:
            names[name] = name
    return names


def _is_used(name: str, candidate: Candidate) -> bool:
    """Whether a tensor of the pool is one of the candidate's network."""
    block = _BLOCK.fullmatch(name)
    return block is None or candidate.kinds[int(block["stage"])][int(block["position"])] == block["kind"]


def frozen_parts(prefixes: Iterable[str], candidate: Candidate, network: EfficientFormer) -> tuple[str, ...]:
    """Return a recipe's frozen parts by their names in a candidate's network; those it has lost are left out.

    Args:
        prefixes: Parts of the start network or its supernet, such as ``body``, ``stages.0`` or ``stages.2.blocks.1``.
        candidate: What was cut out.
        network: The same as a network.
    """
    names = [name for name, _ in network.named_parameters()]
    found = []
    for prefix in prefixes:
        part = prefix
        if match := _BLOCK.fullmatch(prefix):
            stage, position = int(match["stage"]), int(match["position"])
            if position not in candidate.positions(stage):
                continue
            if match["kind"] not in (None, candidate.kinds[stage][position]):
                continue
            part = f"stages.{stage}.blocks.{candidate.positions(stage).index(position)}{match['rest']}"
        lost = part.startswith("stages.") and not any(f"{name}.".startswith(f"{part}.") for name in names)
        if not lost:
            found.append(part)
    return tuple(found)
