"""What is benchmarked: a network as the files its engines open, with its own weights or random ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientformer.export.deployable import SUFFIX, deployable, file_of, quantised_file
from efficientformer.runtime.engines import open_engine
from efficientformer.spec.count import count
from efficientformer.spec.errors import missing_extra
from efficientformer.spec.zoo import is_remote, resolve
from efficientformer.weights.progress import Progress

if TYPE_CHECKING:
    from efficientformer.spec.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Network:
    """One network, ready to be opened.

    Attributes:
        name: What it is called in results.
        exported: The file that the engines of exported files run.
        quantised: The file they run in int8: what ``quantize`` made of the network, else ``exported``.
        source: The name or weights file that torch builds it from; None if there is only the exported file.
        is_random: Whether its weights are random: right for timing, useless for anything else.
        manifest: Architecture, preprocessing and origin.
    """

    name: str
    exported: Path
    quantised: Path
    source: str | None
    is_random: bool
    manifest: Manifest

    def to_dict(self) -> dict[str, Any]:
        """Return its name, weights, size and cost."""
        total, spec = count(self.manifest.spec), self.manifest.spec
        return {
            "model": self.name,
            "weights": "random" if self.is_random else "trained",
            "precision": self.manifest.provenance.get("precision", "fp32"),
            "input_size": list(spec.input_size),
            "params": total.params,
            "macs": total.macs,
        }


def open_networks(
    models: Sequence[str], scratch: Path, *, random_weights: bool, offline: bool | None, progress: Progress | None
) -> list[Network]:
    """Return the networks of these names and files, building what is not built yet.

    Args:
        models: Zoo names, weights files, exported files, folders that ``quantize`` wrote.
        scratch: Folder for networks with random weights.
        random_weights: Give zoo names random weights instead of downloading theirs; files keep what they hold.
        offline: Forbid (True) or allow (False) connections; None asks the environment.
        progress: Told how a download goes.

    Raises:
        UnknownModelError: If a name is neither in the zoo nor a file.
        EfficientFormerError: If a network cannot be built.
    """
    names = [_label(model, offline) for model in models]
    found = []
    for model, name in zip(models, names, strict=True):
        label = name if names.count(name) == 1 else model
        file = file_of(model, offline=offline)
        if random_weights and file is None:
            found.append(_with_random_weights(model, label, scratch))
            continue
        path = deployable(model, offline=offline, progress=progress)
        source = None if (file or "").endswith(SUFFIX) else file or model
        quantised = quantised_file(model) or path
        found.append(Network(label, path, quantised, source, False, open_engine(path, "onnxruntime").manifest))
    return found


def _label(model: str, offline: bool | None) -> str:
    if is_remote(model):
        return model
    return resolve(model).card.name if file_of(model, offline=offline) is None else Path(model).name


def _with_random_weights(model: str, label: str, scratch: Path) -> Network:
    try:
        import torch
    except ImportError as error:
        raise missing_extra("torch", f"Building {model} with random weights", error) from error
    from efficientformer.export.onnx import export_onnx
    from efficientformer.models.network import EfficientFormer
    from efficientformer.weights.checkpoint import save_native

    card = resolve(model).card
    published = card.manifest(card.best_source)
    manifest = dataclasses.replace(published, metrics={}, provenance={"model": card.name, "weights": "random"})
    torch.manual_seed(0)
    network = EfficientFormer(card.spec, layer_scale_init=0.1).eval()
    randomise_norms(network)
    weights, exported = scratch / f"{card.name}.safetensors", scratch / f"{card.name}{SUFFIX}"
    save_native(weights, network.state_dict(), manifest)
    export_onnx(network, manifest, exported)
    return Network(label, exported, exported, str(weights), True, manifest)


def randomise_norms(model: Any) -> None:  # noqa: ANN401 (a torch module, of ours or of a peer)
    """Give BatchNorms statistics and factors as training would: fresh ones do nothing, and could be optimised away."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            with torch.no_grad():
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(0, 0.1)
