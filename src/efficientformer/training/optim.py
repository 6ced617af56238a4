"""Parameter groups, optimiser, learning-rate schedule, gradient clipping."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from efficientformer.models.network import EfficientFormer
from efficientformer.spec.errors import SpecError, UsageError, missing_extra
from efficientformer.training.recipe import Recipe
from efficientformer.weights.formats.translate import HEADS

BEHIND_BODY = (*HEADS, "norm.")  # what is not the body
BATCH_NORM = nn.modules.batchnorm._BatchNorm  # also the synchronised one
_PART = re.compile(r"stages\.\d|[^.]+")  # what a parameter belongs to, first of all
_BLOCK = re.compile(r"stages\.(\d)\.(?:blocks\.(\d+)|embedding)")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay pulls at a parameter: matrices and kernels only.

    Norms, biases, layer scales and attention-bias tables have none. (The authors' code decides by the number of
    dimensions, which spares V1's layer scales and decays V2's, and decays the bias tables, against LeViT's own rule.)
    """
    return parameter.ndim > 1 and not name.endswith((".gamma", "attention_biases"))


def depth_of(name: str, model: EfficientFormer) -> int:
    """Return how deep a parameter lies: 0 the stem, then every block in order, the heads last."""
    if name.startswith("stem"):
        return 0
    depths = [len(stage.blocks) for stage in model.spec.stages]
    found = _BLOCK.match(name)
    if found is None:
        return sum(depths) + 1
    stage, block = int(found[1]), int(found[2] or 0)  # an embedding goes with the block after it
    return sum(depths[:stage]) + block + 1


def parameter_groups(model: EfficientFormer, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the parameters that learn, grouped by weight decay and by the factor on the learning rate.

    A parameter with an attribute ``peak_lr`` has that learning rate, whatever the recipe's and its depth. (Where Muon
    leaves vectors to AdamW, it is scaled by its ``fallback_lr_scale`` like that of the others.)

    Returns:
        Groups with ``params``, ``names``, ``weight_decay`` and ``lr_scale``, in a fixed order.
    """
    deepest = sum(len(stage.blocks) for stage in model.spec.stages) + 1
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = recipe.weight_decay if decays(name, parameter) else 0.0
        scale = recipe.layer_decay ** (deepest - depth_of(name, model))
        own = getattr(parameter, "peak_lr", None)
        if own is not None and recipe.scaled_lr:
            scale = own / recipe.scaled_lr
        group = groups.setdefault((decay, scale), {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(model: EfficientFormer, recipe: Recipe) -> torch.optim.Optimizer:
    """Build the recipe's optimiser by timm's name for it.

    Raises:
        MissingExtraError: If timm is not installed.
        SpecError: If timm knows no such optimiser, or it takes no such arguments.
    """
    try:
        from timm.optim import create_optimizer_v2
    except ImportError as error:
        raise missing_extra("train", "Training", error) from error
    groups = [{k: v for k, v in group.items() if k != "names"} for group in parameter_groups(model, recipe)]
    hint = "timm.optim.list_optimizers() names them"
    given = recipe.opt_args
    fused = recipe.opt == "adamw" and not given.keys() & {"foreach", "fused"}  # one kernel instead of a loop
    extra: dict[str, Any] = {"fused": True} if fused else {}
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            groups, opt=recipe.opt, lr=recipe.scaled_lr, weight_decay=recipe.weight_decay, **extra, **given
        )
    except (AssertionError, ValueError, TypeError, LookupError, RuntimeError) as error:  # timm checks nothing
        wanted = f"the optimiser {recipe.opt!r}" + (f" with opt_args {given}" if given else "")
        raise SpecError(f"timm cannot build {wanted}", found=str(error), hint=hint) from error
    if getattr(optimizer, "is_second_order", False):
        raise SpecError(f"{recipe.opt!r} needs second derivatives, which are not computed here", hint=hint)
    if recipe.precision == "fp32":
        _orthogonalise_in_fp32(optimizer)
    return optimizer


def _orthogonalise_in_fp32(optimizer: torch.optim.Optimizer) -> None:
    """Have timm's Muon, if it is that, orthogonalise in single precision during its steps.

    It does so in bf16 and has no setting for it; processors that do not compute in bf16 emulate it, many times slower.
    """
    from timm.optim import muon

    inner = getattr(optimizer, "_base_optimizer", optimizer)  # a Lookahead's
    if not isinstance(inner, muon.Muon):
        return
    name = "zeropower_via_newtonschulz"
    theirs = getattr(muon, name)
    in_fp32 = partial(theirs, dtype=torch.float32)
    inner.register_step_pre_hook(lambda *_: setattr(muon, name, in_fp32))
    inner.register_step_post_hook(lambda *_: setattr(muon, name, theirs))


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step: linear warm-up, then the schedule down to ``min_lr``."""
    peak, floor = recipe.scaled_lr, min(recipe.min_lr, recipe.scaled_lr)
    total = recipe.epochs * steps_per_epoch
    warmup = min(recipe.warmup_epochs * steps_per_epoch, total / 2)
    if step < warmup:
        start = min(recipe.warmup_lr, peak)
        return start + (peak - start) * min(1.0, (step + 1) / warmup)  # it may end within this step
    done = (step - warmup) / max(1, total - warmup)
    if recipe.schedule == "constant":
        return peak
    left = 1 - done if recipe.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return floor + (peak - floor) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the learning rate times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def clip_gradients(model: EfficientFormer, recipe: Recipe) -> None:
    """Clip gradients in place as the recipe says; AGC leaves the heads out, as its paper does."""
    if recipe.clip == "agc":
        from timm.utils.agc import adaptive_clip_grad

        body: Iterable[Tensor] = [p for n, p in model.named_parameters() if not n.startswith(HEADS)]
        adaptive_clip_grad([p for p in body if p.grad is not None], clip_factor=recipe.clip_at)
    elif recipe.clip == "norm":
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_at)
    elif recipe.clip == "value":
        nn.utils.clip_grad_value_(model.parameters(), recipe.clip_at)


def freeze(model: EfficientFormer, prefixes: Iterable[str]) -> list[nn.Module]:
    """Stop the parameters under some prefixes from learning, but for those with an attribute ``always_learns``.

    Args:
        model: The network; its parameters' ``requires_grad`` is changed.
        prefixes: Such as ``stem`` or ``stages.0``; ``body`` means everything but the final norm and the heads.

    Returns:
        The modules whose BatchNorm statistics must stay too: those with no parameter left that learns.

    Raises:
        UsageError: If a prefix matches nothing, or nothing is left to learn.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        chosen = [n for n in names if not n.startswith(BEHIND_BODY)] if prefix == "body" else _under(prefix, names)
        if not chosen:
            parts = ", ".join(dict.fromkeys(_PART.findall(name)[0] for name in names))
            raise UsageError(f"freeze={prefix!r} matches nothing", hint=f"Parts are body, {parts} ...")
        for parameter in map(model.get_parameter, chosen):
            parameter.requires_grad = getattr(parameter, "always_learns", False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError("Everything is frozen: nothing is left to learn")
    return [
        module
        for module in model.modules()
        if isinstance(module, BATCH_NORM) and not any(p.requires_grad for p in module.parameters())
    ]


def hold_still(model: EfficientFormer, recipe: Recipe) -> list[nn.Module]:
    """Freeze what a recipe says, and return the modules whose BatchNorm statistics must stay.

    Args:
        model: The network; its parameters' ``requires_grad`` is changed.
        recipe: Its ``freeze`` and ``norm``.

    Raises:
        UsageError: If a prefix matches nothing, or nothing is left to learn.
    """
    still = freeze(model, recipe.freeze)
    if recipe.norm == "frozen":
        return [module for module in model.modules() if isinstance(module, BATCH_NORM) and not _is_new(module)]
    return still


def _is_new(norm: nn.Module) -> bool:
    """Whether a BatchNorm has no statistics of earlier training that could be kept."""
    return any(getattr(parameter, "always_learns", False) for parameter in norm.parameters())


def _under(prefix: str, names: list[str]) -> list[str]:
    return [name for name in names if name == prefix or name.startswith(f"{prefix}.")]
