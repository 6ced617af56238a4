"""From pictures to predictions, through one engine, without torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from efficientformer.runtime.engines import Engine, open_engine
from efficientformer.runtime.image import (
    WILDCARDS,
    Encoded,
    Source,
    decode,
    how_to_gather,
    in_turn_if_large,
    is_address,
)
from efficientformer.runtime.inputs import Input
from efficientformer.runtime.pipeline import in_order
from efficientformer.runtime.preprocess import normalise, resize_crop
from efficientformer.runtime.processor import available_cores
from efficientformer.runtime.records import Record, record
from efficientformer.spec.errors import EngineError, ImageError, UsageError
from efficientformer.spec.fields import check_choice, check_count
from efficientformer.spec.manifest import Manifest

FEW = 8  # pictures below which the engine that is open is done before another would be
DECODINGS = ("exact", "fast")


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the network says of one picture.

    Attributes:
        scores: Probability of every class, (num_classes,).
        manifest: Labels and the rest of what the network is.
        source: The picture's name: its path or URL; empty for arrays, bytes and Pillow images.
    """

    scores: npt.NDArray[np.float32]
    manifest: Manifest
    source: str = ""

    def __repr__(self) -> str:
        """Return the class, its probability and the picture, short of the manifest."""
        picture = f", {self.source!r}" if self.source else ""
        return f"Prediction({self.name!r}, {self.score:.3f}{picture})"

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
        """Return (index, probability, name) of the ``k`` most probable classes, best first.

        Raises:
            UsageError: If ``k`` is not positive.
        """
        check_count("number of classes", k)
        order = np.argsort(-self.scores, kind="stable")[:k]
        return [(int(i), float(self.scores[i]), self.manifest.label(int(i))) for i in order]

    def record(self, top_k: int = 3) -> Record:
        """Return plain values for JSON, as ``efficientformer predict --format json`` writes them.

        Args:
            top_k: Classes to keep, at most.

        Returns:
            path (the picture's name), pred_label, pred_score, pred_class, and top_k: a list of label, score and class.

        Raises:
            UsageError: If ``top_k`` is not positive.
        """
        return record(self.source, self, "", top_k)

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
    """A picture that could not be classified, and why; ``isinstance(each, Failed)`` tells it from a ``Prediction``.

    Attributes:
        error: Why.
        source: The picture's name: its path or URL; empty for arrays, bytes and Pillow images.
    """

    error: ImageError
    source: str = ""

    def __repr__(self) -> str:
        """Return the picture and the reason."""
        picture = f"{self.source!r}, " if self.source else ""
        return f"Failed({picture}{str(self.error)!r})"

    def record(self, top_k: int = 3) -> Record:
        """Return plain values for JSON: path (the picture's name) and error; called as that of a prediction is."""
        return record(self.source, None, str(self.error), top_k)


class EngineClassifier:
    """Classifies pictures with an engine that has a network open.

    Args:
        engine: The engine.
        reason: Why this one.
    """

    def __init__(self, engine: Engine, *, reason: str = "") -> None:
        self._engine, self.reason = engine, reason
        self._for_many: Engine | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: engines open their file anew, that for many pictures when it is asked for."""
        return self.__dict__ | {"_for_many": None}

    @property
    def engine(self) -> str:
        """The engine that runs, its version and precision."""
        return self._engine.name

    @property
    def key(self) -> str:
        """The engine, as one asks for it."""
        return self._engine.key

    @property
    def precision(self) -> str:
        """What it computes in."""
        return self._engine.precision

    @property
    def manifest(self) -> Manifest:
        """Architecture, preprocessing, labels and provenance of the network."""
        return self._engine.manifest

    def __call__(self, picture: Source) -> Prediction:
        """Classify one picture.

        Args:
            picture: A path, the bytes of a file, an open binary file, a Pillow image, or a uint8 array in RGB order.

        Raises:
            ImageError: If it is no readable picture, or the network gives no numbers for it alone.
            EngineError: If the network gives no numbers.
        """
        (scores,) = self._scores(self._engine, [self._prepare(picture, "exact")])
        found = self._prediction(scores, _name_of(picture))
        if isinstance(found, Failed):
            raise found.error
        return found

    def predict(
        self,
        pictures: Iterable[Source | Input],
        *,
        batch_size: int | None = None,
        workers: int | None = None,
        decode: str = "exact",
    ) -> Iterator[Prediction | Failed]:
        """Classify many pictures, lazily and in order; a bad picture gives a ``Failed`` in its place.

        Each core takes a picture from file to label, so decoding and inference overlap. A CPU's engines run pictures
        one by one, which keeps their maps in the caches (compare: efficientformer benchmark --threads 1 --batch 1,16).
        At most four batches a worker are drawn ahead; a finished result waits for no picture of a slow stream but one
        that is being drawn already. A few pictures open no second engine.

        Args:
            pictures: As for one picture, arrays also as one (N, H, W, 3) or (N, H, W), or what
                ``runtime.inputs.gather`` found.
            batch_size: Pictures per run of the engine; None takes 1 for engines of exported files, 64 for torch.
            workers: Threads that decode and run; None takes one per core.
            decode: ``exact``, or ``fast``: large JPEGs are decoded at a half, a quarter or an eighth of their size
                where that is still at least the size they are resized to.

        Raises:
            UsageError: If one picture is given, the batch size or the number of workers is not positive, or there is no
                such decoding.
            EngineError: While iterating, if the network gives no numbers.
        """
        if _is_one(pictures):
            raise UsageError(
                "This is not several pictures",
                expected="pictures to iterate over",
                found=f"one {type(pictures).__name__}",
                hint=_how_to_give(pictures),
            )
        for name, value in (("batch size", batch_size), ("number of workers", workers)):
            if value is not None:
                check_count(name, value)
        check_choice("decode", decode, DECODINGS)
        remaining = iter(pictures)
        engine = self._engine if length_hint(pictures) < FEW and self._for_many is None else self.open_for_many()
        chunk = batch_size or (64 if engine.key == "torch" else 1)
        running = engine, threading.BoundedSemaphore(engine.streams)

        def drawn() -> Iterator[Source | Input]:
            nonlocal running
            for number, picture in enumerate(remaining, 1):  # a stream does not say how many they are
                if number == FEW and running[0] is not (many := self.open_for_many()):
                    running = many, threading.BoundedSemaphore(many.streams)
                yield picture

        def work(taken: list[Source | Input]) -> list[Prediction | Failed]:
            prepared = [self._try_prepare(picture, decode) for picture in taken]
            images = [image for image in prepared if isinstance(image, Image.Image)]
            engine, turns = running
            with turns:
                scores = iter(self._scores(engine, images) if images else ())
            return [
                self._prediction(next(scores), _name_of(picture)) if isinstance(image, Image.Image) else image
                for picture, image in zip(taken, prepared, strict=True)
            ]

        return in_order(drawn(), work, workers=workers or max(engine.streams, available_cores()), chunk=chunk)

    def open_for_many(self) -> Engine:
        """Return the engine that ``predict`` runs many pictures on, opened when first asked for."""
        if self._for_many is None:
            self._for_many = self._engine.for_many()
        return self._for_many

    def _try_prepare(self, picture: Source | Input, how: str) -> Image.Image | Failed:
        try:
            return self._prepare(picture, how)
        except ImageError as error:
            return Failed(error, _name_of(picture))

    def _prediction(self, scores: npt.NDArray[np.float32], name: str) -> Prediction | Failed:
        """Return what a network that is sound says of a picture: of one, it may be no numbers."""
        if np.isfinite(scores).all():
            return Prediction(scores, self.manifest, name)
        hint = "Try --precision fp32"
        error = ImageError("The network gives no numbers for this picture", expected="finite logits", hint=hint)
        return Failed(error, name)

    def _prepare(self, picture: Source | Input, how: str) -> Image.Image:
        """Decode and crop, so that a batch holds small pictures only."""
        spec = self.manifest.preprocess
        shrink_for = spec if how == "fast" else None
        with in_turn_if_large():
            name, source = (picture.name, picture.read()) if isinstance(picture, Input) else ("", picture)
            return resize_crop(decode(source, mode=spec.mode, exif=spec.exif, name=name, shrink_for=shrink_for), spec)

    def _scores(self, engine: Engine, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        """Return the probabilities (N, num_classes) of prepared pictures; no numbers where a picture is to blame."""
        batch = normalise(images, self.manifest.preprocess)  # (N, C, H, W)
        logits = engine.run(batch)  # (N, num_classes)
        if not np.isfinite(logits).all():
            check_finite(engine.run(np.zeros_like(batch[:1])), engine.name)
            logits = np.where(np.isfinite(logits).all(axis=1, keepdims=True), logits, np.float32(np.nan))
        return softmax(logits)


class FileClassifier(EngineClassifier):
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
        super().__init__(open_engine(Path(path), engine, precision=precision, threads=threads))


def _name_of(picture: Source | Input) -> str:
    """Return a picture's name; empty where it has none."""
    if isinstance(picture, Input):
        return picture.name
    return os.fsdecode(picture) if isinstance(picture, str | os.PathLike) else ""


def _is_one(pictures: object) -> bool:
    """Whether what should be several pictures is one; an array of one would be taken for its rows."""
    if isinstance(pictures, np.ndarray):
        if pictures.dtype.kind in "OU":  # paths
            return False
        channels = {pictures.shape[0], pictures.shape[-1]} & {1, 3, 4} if pictures.ndim == 3 else ()
        return pictures.ndim < 3 or bool(channels)  # else grey ones are stacked
    return isinstance(pictures, str | os.PathLike | Encoded | Image.Image | Input) or hasattr(pictures, "read")


def _how_to_give(picture: object) -> str:
    """Return the hint for one picture, or one name, in the place of several."""
    if isinstance(picture, str | os.PathLike):
        is_folder = os.path.isdir(picture)  # noqa: PTH112 (no error for names no file can have)
        if is_folder or is_address(picture) or WILDCARDS.search(os.fspath(picture)):
            return how_to_gather(picture)
    if isinstance(picture, np.ndarray) and picture.ndim == 3:
        return "Give one as classify.predict([picture]), a stack of grey ones as a list: classify.predict(list(stack))"
    return "Give a list, as in classify.predict([picture]), or call classify(picture)"


def check_finite(logits: npt.NDArray[np.float32], engine: str) -> None:
    """Check that a network's logits are numbers: of anything else a class would be made up.

    Args:
        logits: Logits (N, num_classes).
        engine: The engine's name, for the message.

    Raises:
        EngineError: If one is NaN or infinite.
    """
    if not np.isfinite(logits).all():
        raise EngineError(
            "The network gives no numbers",
            expected="finite logits",
            found=f"NaN or infinity in {engine}",
            hint="Try --precision fp32; if that is no better, the weights are damaged or of a training that diverged",
        )


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return probabilities (N, num_classes) for logits (N, num_classes)."""
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=1, keepdims=True), np.float32)
