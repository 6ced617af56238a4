"""Measure a network on a data set: decode in threads while it runs, count, and keep what is worth looking at."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from efficientformer.data.source import ImageSource
from efficientformer.evaluation.metrics import Metrics, Scores
from efficientformer.evaluation.result import Evaluation, Mistake, Outcome, Skipped, worst_of
from efficientformer.runtime.engines import Engine
from efficientformer.runtime.pipeline import AHEAD, in_order
from efficientformer.runtime.preprocess import normalise
from efficientformer.runtime.processor import available_cores
from efficientformer.spec.errors import DataError, ImageError, UsageError
from efficientformer.spec.fields import check_count
from efficientformer.spec.manifest import Manifest
from efficientformer.spec.preprocess import PreprocessSpec

Progress: TypeAlias = Callable[[int, int], None]  # pictures done, pictures in all (of this process)
THUMBNAIL = 160  # longest side of a kept mistake
_MAX_WORKERS = 16


@dataclass(frozen=True, eq=False)
class _Ready:
    """A picture as the network takes it: in 8 bits for the report, (1, C, H, W) float32 for the batch."""

    index: int
    image: Image.Image
    pixels: npt.NDArray[np.float32]


def evaluate(
    predictor: Engine,
    source: ImageSource,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    rank: int = 0,
    world: int = 1,
    progress: Progress | None = None,
    keep_worst: int = 24,
    keep_outcomes: bool = False,
    model: str = "",
    data: str = "",
    notes: Iterable[str] = (),
) -> Evaluation:
    """Measure a network on a data set whose labels are the network's.

    Args:
        predictor: The network.
        source: The pictures; ``read`` is called from several threads.
        batch_size: Pictures per run of the network.
        workers: Threads that read and decode; None takes one per CPU this process may use, at most 16.
        rank: Which share to take, from 0: every ``world``-th picture from this one on.
        world: Into how many shares the work is divided.
        progress: Called after every batch.
        keep_worst: How many of the worst mistakes to keep.
        keep_outcomes: Whether to keep what the network said of every picture.
        model: What to call the network; by default what its manifest says.
        data: What to call the data set.
        notes: What was noticed when the data set was opened.

    Returns:
        The figures, the worst mistakes, and the pictures that could not be read. With ``world`` above 1 this is one
        share; ``merge`` adds them.

    Raises:
        UsageError: If an argument makes no sense.
        DataError: If the data set is empty, or its classes are not the network's.
        EngineError: If the network's answer is no number.
    """
    _check(predictor.manifest, source, batch_size, workers, rank, world)
    began = time.perf_counter()
    metrics = Metrics(predictor.manifest.spec.num_classes)
    skipped: list[Skipped] = []
    worst: tuple[Mistake, ...] = ()
    outcomes: list[Outcome] = []
    classes = predictor.manifest.labels or source.classes
    share = range(rank, len(source), world)
    pictures = _prepared(source, share, predictor.manifest.preprocess, workers or _cpus(world), batch_size)
    done = 0
    for chunk in _chunks(pictures, batch_size):
        ready = [each for each in chunk if isinstance(each, _Ready)]
        skipped += [each for each in chunk if isinstance(each, Skipped)]
        if ready:
            labels = source.labels[[each.index for each in ready]]  # (N,)
            scores = metrics.update(predictor.run(np.concatenate([each.pixels for each in ready])), labels)
            worst = worst_of((*worst, *_mistakes(source, ready, labels, scores, keep_worst)), keep_worst)
            if keep_outcomes:
                outcomes += _outcomes(source, [each.index for each in ready], classes, labels, scores)
        done += len(chunk)
        if progress is not None:
            progress(done, len(share))
    return Evaluation(
        model=model or predictor.manifest.provenance.get("model", "network"),
        engine=predictor.name,
        data=data,
        manifest=predictor.manifest,
        classes=classes,
        metrics=metrics,
        skipped=tuple(skipped),
        worst=worst,
        keep_worst=keep_worst,
        outcomes=tuple(outcomes),
        notes=tuple(notes),
        seconds=time.perf_counter() - began,
    )


def _check(
    manifest: Manifest, source: ImageSource, batch_size: int, workers: int | None, rank: int, world: int
) -> None:
    check_count("batch size", batch_size)
    if workers is not None:
        check_count("number of workers", workers)
    if not 0 <= rank < world:
        raise UsageError("Illegal share of the work", expected="rank from 0 to world - 1", found=f"{rank} of {world}")
    if len(source) == 0:
        raise DataError("The data set is empty", expected="pictures", found="none")
    if len(source.classes) != manifest.spec.num_classes:
        raise DataError(
            "The data set's classes are not the network's",
            expected=f"{manifest.spec.num_classes} classes",
            found=f"{len(source.classes)}",
            hint="Give a network of these classes, or data of the classes it was trained on",
        )


def _cpus(world: int) -> int:
    """Return how many threads to decode with; a run's processes on this machine share its cores."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return max(1, min(available_cores() // max(1, here), _MAX_WORKERS))


def _prepared(
    source: ImageSource, share: Iterable[int], spec: PreprocessSpec, workers: int, batch_size: int
) -> Iterator[_Ready | Skipped]:
    """Yield the pictures in order, two batches ahead of the one that is due."""

    def work(indices: list[int]) -> list[_Ready | Skipped]:
        return [_prepare(source, index, spec) for index in indices]

    return in_order(share, work, workers=workers, chunk=max(1, 2 * batch_size // (AHEAD * workers)))


def _prepare(source: ImageSource, index: int, spec: PreprocessSpec) -> _Ready | Skipped:
    try:
        image = source.cropped(index, spec)
        return _Ready(index, image, normalise([image], spec))
    except ImageError as error:
        return Skipped(source.name(index), str(error))


def _chunks(pictures: Iterator[_Ready | Skipped], size: int) -> Iterator[list[_Ready | Skipped]]:
    while chunk := list(islice(pictures, size)):
        yield chunk


def _outcomes(
    source: ImageSource,
    indices: Sequence[int],
    classes: Sequence[str],
    labels: npt.NDArray[np.int64],
    scores: Scores,
) -> Iterator[Outcome]:
    """Yield what a batch's logits say of each of its pictures."""
    columns = (each.tolist() for each in (labels, scores.predicted, scores.confidence, scores.loss))
    for index, true, predicted, confidence, loss in zip(indices, *columns, strict=True):
        named = classes[true], predicted, classes[predicted]
        yield Outcome(index, source.name(index), true, *named, round(confidence, 6), round(loss, 6))


def _mistakes(
    source: ImageSource, ready: Sequence[_Ready], labels: npt.NDArray[np.int64], scores: Scores, most: int
) -> list[Mistake]:
    """Return the worst mistakes of one batch."""
    wrong = np.flatnonzero(scores.rank)
    wrong = wrong[np.argsort(-scores.loss[wrong], kind="stable")][:most]
    return [
        Mistake(
            name=source.name(ready[at].index),
            true=int(labels[at]),
            predicted=int(scores.predicted[at]),
            probability=float(scores.confidence[at]),
            loss=float(scores.loss[at]),
            image=_thumbnail(ready[at].image),
        )
        for at in wrong.tolist()
    ]


def _thumbnail(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small
