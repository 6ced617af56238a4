"""From pictures to predictions, through one engine, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from efficientformer.runtime.engines import open_engine
from efficientformer.runtime.image import Source, decode, normalise, resize_crop
from efficientformer.runtime.inputs import Input
from efficientformer.spec.errors import ImageError, UsageError
from efficientformer.spec.manifest import Manifest


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the network says of one picture.

    Attributes:
        scores: Probability of every class, (num_classes,).
        manifest: Labels and the rest of what the network is.
    """

    scores: npt.NDArray[np.float32]
    manifest: Manifest

    @property
    def label(self) -> int:
        """Index of the most probable class."""
        return int(self.scores.argmax())

    @property
    def score(self) -> float:
        """Its probability."""
        return float(self.scores.max())

    @property
    def name(self) -> str:
        """Its name."""
        return self.manifest.label(self.label)

    def top_k(self, k: int) -> list[tuple[int, float, str]]:
        """Return (index, probability, name) of the ``k`` most probable classes, best first."""
        order = np.argsort(-self.scores, kind="stable")[:k]
        return [(int(i), float(self.scores[i]), self.manifest.label(int(i))) for i in order]

    def to_dict(self) -> dict[str, Any]:
        """Return mmpretrain's result: pred_label, pred_score, pred_class, pred_scores (an array)."""
        return {
            "pred_label": self.label,
            "pred_score": self.score,
            "pred_class": self.name,
            "pred_scores": self.scores,
        }


@dataclass(frozen=True)
class Failed:
    """A picture that could not be classified, and why."""

    error: ImageError


class FileClassifier:
    """Classifies pictures with one exported file.

    Args:
        path: A file exported by this package.
        engine: ``auto`` or an engine's name.
        precision: ``auto`` or a precision's name.
        threads: CPU threads of the engine; None lets it choose.

    Raises:
        EngineError: If the file cannot be run.
    """

    def __init__(
        self, path: str | Path, *, engine: str = "auto", precision: str = "auto", threads: int | None = None
    ) -> None:
        self._engine = open_engine(Path(path), engine, precision=precision, threads=threads)

    @property
    def engine(self) -> str:
        """The engine that runs, and its version."""
        return self._engine.name

    @property
    def manifest(self) -> Manifest:
        """Architecture, preprocessing, labels and provenance of the network."""
        return self._engine.manifest

    def __call__(self, picture: Source) -> Prediction:
        """Classify one picture.

        Args:
            picture: A path, the bytes of a file, an open binary file, a Pillow image, or a uint8 array in RGB order.

        Raises:
            ImageError: If it is no readable picture.
        """
        return self._classify([self._prepare(picture)])[0]

    def predict(self, pictures: Iterable[Source | Input], *, batch_size: int = 16) -> Iterator[Prediction | Failed]:
        """Classify many pictures in batches, lazily and in order; a bad picture gives a ``Failed`` in its place.

        Args:
            pictures: As for one picture, or what ``runtime.inputs.gather`` found.
            batch_size: Pictures per run of the engine.

        Raises:
            UsageError: If the batch size is not positive.
        """
        if batch_size < 1:
            raise UsageError("Illegal batch size", expected="a whole number from 1", found=repr(batch_size))
        return self._predict(pictures, batch_size)

    def _predict(self, pictures: Iterable[Source | Input], batch_size: int) -> Iterator[Prediction | Failed]:
        remaining = iter(pictures)
        while chunk := list(islice(remaining, batch_size)):
            prepared = [self._try_prepare(picture) for picture in chunk]
            images = [image for image in prepared if isinstance(image, Image.Image)]
            predictions = iter(self._classify(images) if images else ())
            for image in prepared:
                yield next(predictions) if isinstance(image, Image.Image) else image

    def _try_prepare(self, picture: Source | Input) -> Image.Image | Failed:
        try:
            return self._prepare(picture)
        except ImageError as error:
            return Failed(error)

    def _prepare(self, picture: Source | Input) -> Image.Image:
        """Decode and crop, so that a batch holds small pictures only."""
        spec = self.manifest.preprocess
        name, source = (picture.name, picture.read()) if isinstance(picture, Input) else ("", picture)
        return resize_crop(decode(source, mode=spec.mode, exif=spec.exif, name=name), spec)

    def _classify(self, images: Sequence[Image.Image]) -> list[Prediction]:
        logits = self._engine.run(normalise(images, self.manifest.preprocess))  # (N, num_classes)
        return [Prediction(scores, self.manifest) for scores in softmax(logits)]


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return probabilities (N, num_classes) for logits (N, num_classes)."""
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=1, keepdims=True), np.float32)
