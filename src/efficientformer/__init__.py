"""EfficientFormer: vision transformers at MobileNet speed (arXiv 2206.01191, 2212.08059).

Importing this costs nothing: each name loads its room when it is first used, and only what needs torch imports it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efficientformer.api import Classifier, get_model, inference_model
    from efficientformer.runtime.classifier import Failed, Prediction
    from efficientformer.spec.arch import ArchSpec
    from efficientformer.spec.errors import EfficientFormerError
    from efficientformer.spec.preprocess import PreprocessSpec
    from efficientformer.spec.zoo import list_models

__version__ = "0.1.0"

_ROOMS = {
    "ArchSpec": "spec.arch",
    "Classifier": "api",
    "EfficientFormerError": "spec.errors",
    "Failed": "runtime.classifier",
    "Prediction": "runtime.classifier",
    "PreprocessSpec": "spec.preprocess",
    "get_model": "api",
    "inference_model": "api",
    "list_models": "spec.zoo",
}

__all__ = [  # noqa: PLE0604, RUF100 (names load lazily)
    "ArchSpec",
    "Classifier",
    "EfficientFormerError",
    "Failed",
    "Prediction",
    "PreprocessSpec",
    "__version__",
    "get_model",
    "inference_model",
    "list_models",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 (whatever the room holds)
    if name not in _ROOMS:
        raise AttributeError(f"module 'efficientformer' has no attribute {name!r}")
    return getattr(import_module(f"efficientformer.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
