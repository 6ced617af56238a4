"""What a network computes at its end, seen in one forward pass: the same for timm's networks and ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return pooled features (B, C), each head's logits (B, classes) and what the network makes of them, in evaluation.

    Args:
        model: A network with heads named ``head`` and ``head_dist``, as timm's and ours.
        images: (B, 3, height, width).
    """
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen["pooled"], seen[name] = inputs[0], output

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [watch(name) for name in ("head", "head_dist")]
    logits = model.eval()(images)
    for handle in handles:
        handle.remove()
    return {**seen, "logits": logits}
