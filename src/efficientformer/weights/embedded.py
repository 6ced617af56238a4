"""The network in the package: its weights file, and what that says of itself; needs no torch."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from efficientformer.spec.manifest import METADATA_KEY, Manifest
from efficientformer.spec.zoo import EMBEDDED


def embedded_weights() -> Path:
    """Return the weights file of the network in the package."""
    return Path(str(files("efficientformer") / "assets" / f"{EMBEDDED}.safetensors"))


def embedded_manifest() -> Manifest:
    """Return the manifest of the network in the package, from the head of its weights file: no tensor is read."""
    with embedded_weights().open("rb") as file:  # safetensors' own reader would import numpy: 70 ms
        size = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(size))
    return Manifest.from_json(head["__metadata__"][METADATA_KEY])
