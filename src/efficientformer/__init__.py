"""EfficientFormer: vision transformers at MobileNet speed (arXiv 2206.01191, 2212.08059).

Importing this costs nothing: each name loads its room when it is first used, and only what needs torch imports it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efficientformer.api import Classifier, evaluate_model, inference_model
    from efficientformer.export.quantize import quantize
    from efficientformer.latency.table import LatencyTable
    from efficientformer.networks import get_model, save_model, transform
    from efficientformer.runtime.classifier import Failed, Prediction
    from efficientformer.slimming.run import slim
    from efficientformer.slimming.start import make_plan
    from efficientformer.spec.arch import ArchSpec
    from efficientformer.spec.errors import EfficientFormerError
    from efficientformer.spec.preprocess import PreprocessSpec
    from efficientformer.spec.zoo import list_models
    from efficientformer.training.recipe import Recipe, load_recipe
    from efficientformer.training.run import train

__version__ = "0.1.0"

_ROOMS = {
    "ArchSpec": "spec.arch",
    "Classifier": "api",
    "EfficientFormerError": "spec.errors",
    "Failed": "runtime.classifier",
    "LatencyTable": "latency.table",
    "Prediction": "runtime.classifier",
    "PreprocessSpec": "spec.preprocess",
    "Recipe": "training.recipe",
    "evaluate_model": "api",
    "get_model": "networks",
    "inference_model": "api",
    "list_models": "spec.zoo",
    "load_recipe": "training.recipe",
    "make_plan": "slimming.start",
    "quantize": "export.quantize",
    "save_model": "networks",
    "slim": "slimming.run",
    "train": "training.run",
    "transform": "networks",
}

__all__ = [  # noqa: PLE0604, RUF100 (names load lazily)
    "ArchSpec",
    "Classifier",
    "EfficientFormerError",
    "Failed",
    "LatencyTable",
    "Prediction",
    "PreprocessSpec",
    "Recipe",
    "__version__",
    "evaluate_model",
    "get_model",
    "inference_model",
    "list_models",
    "load_recipe",
    "make_plan",
    "quantize",
    "save_model",
    "slim",
    "train",
    "transform",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 (whatever the room holds)
    if name not in _ROOMS:
        from efficientformer.spec.habits import NAMES, pointer

        hint = pointer(NAMES, name)
        raise AttributeError(f"module 'efficientformer' has no attribute {name!r}{'. ' if hint else ''}{hint}")
    try:
        room = import_module(f"efficientformer.{_ROOMS[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("efficientformer"):
            raise
        from efficientformer.spec.errors import missing_extra

        raise missing_extra("train", f"efficientformer.{name}", error) from error
    return getattr(room, name)


def __dir__() -> list[str]:
    return __all__
