"""Training batches: drawn by plan, read, augmented, normalised ahead of the step that needs them."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import queue
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.pool import ThreadPool
from multiprocessing.process import BaseProcess

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from efficientformer.data.augment import Augmentation, Normaliser, SampleAugment, pad_images, shift_flip
from efficientformer.data.draws import DrawPlan, Draws
from efficientformer.data.source import ImageSource, Subset
from efficientformer.spec.errors import DataError, ImageError
from efficientformer.spec.preprocess import PreprocessSpec

AHEAD = 3  # finished batches that wait for the training step
PATIENCE = 5.0  # seconds that a second Ctrl-C waits for the pictures in hand
OWN_STAND_INS = 20  # pictures of its class that may stand in for an unreadable one, before those of all classes may
MAX_UNREADABLE = 100  # of these, after which the data set is to blame
MEMORY_BYTES = 8 << 30  # decoded pictures that `pad` may keep
GRACE_S = 60  # seconds that a worker goes on after SIGTERM


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    Attributes:
        images: (B, C, H, W) float32, normalised, channels last.
        labels: (B,) int64.
        draws: Which pictures these are.
        cut: Whether cutout and erasing were on.
    """

    images: Tensor
    labels: Tensor
    draws: Draws
    cut: bool


class Loader(ABC):
    """Yields the batches of steps ``start`` to ``stop``, prepared ahead in a thread.

    Args:
        plan: Which pictures each step sees.
        labels: Label of every picture, (N,).
        normaliser: The last step of augmentation.
        cut_until: Step from which on nothing is cut out any more.

    Attributes:
        skipped: Name and reason of every picture that could not be read so far.
    """

    skipped: dict[str, str]

    def __init__(self, plan: DrawPlan, labels: npt.NDArray[np.int64], normaliser: Normaliser, cut_until: int) -> None:
        self.plan = plan
        self._labels, self._normaliser, self._cut_until = torch.from_numpy(labels), normaliser, cut_until
        self.skipped = {}

    @abstractmethod
    def _pixels(self, steps: range) -> Iterator[tuple[Tensor, Draws]]:
        """Yield uint8 images (B, C, H, W) and what they are, step by step."""

    def batches(self, start: int, stop: int) -> Generator[Batch]:
        """Yield the batches of the steps from ``start`` up to but not including ``stop``.

        Raises:
            DataError: If a worker process died.
        """
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(AHEAD)
        stopped, limited = threading.Event(), threading.Event()

        def put(item: Batch | BaseException | None) -> None:
            while not stopped.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.2)
                    return

        def produce() -> None:
            torch.set_num_threads(1)  # of this thread's own pool: a second one would fight the training step's
            limited.set()
            try:
                for pixels, draws in self._pixels(range(start, stop)):
                    cut = draws.step < self._cut_until
                    images = self._normaliser(pixels, draws.seeds, cut=cut)
                    put(Batch(images, self._labels[draws.indices], draws, cut))
                    if stopped.is_set():
                        return
                put(None)
            except BaseException as error:  # handed on to the training thread
                put(error)

        threads = torch.get_num_threads()
        thread = threading.Thread(target=produce, name="batches", daemon=True)
        thread.start()
        limited.wait()
        torch.set_num_threads(threads)  # the producer's limit became the default of threads to come
        patience = None
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise _explain(item)
                yield item
        except KeyboardInterrupt:
            patience = PATIENCE  # nothing comes, as from a server that hangs: the thread would not see the end either
            raise
        finally:
            stopped.set()
            thread.join(patience)


class MemoryLoader(Loader):
    """Batches of fixed-size pictures that are decoded once and stay in memory: shifted, flipped, all at once.

    Args:
        images: Every picture, (N, C, H, W) uint8, as ``decode_all`` returns them.
        plan: Which pictures each step sees.
        labels: Label of every picture, (N,).
        augmentation: What is done to them.
        preprocess: Normalisation.
        cut_until: Step from which on nothing is cut out any more.
    """

    def __init__(
        self,
        images: Tensor,
        plan: DrawPlan,
        labels: npt.NDArray[np.int64],
        augmentation: Augmentation,
        preprocess: PreprocessSpec,
        cut_until: int,
    ) -> None:
        super().__init__(plan, labels, Normaliser(preprocess, augmentation), cut_until)
        self._padded, self._augmentation = pad_images(images, augmentation.padding), augmentation

    def _pixels(self, steps: range) -> Iterator[tuple[Tensor, Draws]]:
        for step in steps:
            draws = self.plan.draws(step)
            yield shift_flip(self._padded[torch.from_numpy(draws.indices)], draws.seeds, self._augmentation), draws


class WorkerLoader(Loader):
    """Batches of pictures that are read and augmented one by one in worker processes, every time they are drawn.

    An unreadable picture is listed in ``skipped``, and another takes its place, at each draw one of its class that the
    draw's seed decides; of any class, where many of its own cannot be read either.

    Args:
        source: The pictures.
        plan: Which pictures each step sees.
        augmentation: What is done to them.
        preprocess: Mode, size and normalisation of the input.
        cut_until: Step from which on nothing is cut out any more.
        workers: Worker processes, at least one: timm's augmentation draws from global generators, which the training
            thread must have for itself.

    """

    def __init__(
        self,
        source: ImageSource,
        plan: DrawPlan,
        augmentation: Augmentation,
        preprocess: PreprocessSpec,
        cut_until: int,
        workers: int,
    ) -> None:
        super().__init__(plan, source.labels, Normaliser(preprocess, augmentation), cut_until)
        self._samples = _Samples(source, SampleAugment(augmentation, preprocess), preprocess)
        self._workers = max(1, workers)

    def _pixels(self, steps: range) -> Iterator[tuple[Tensor, Draws]]:
        loader = DataLoader(
            self._samples,
            batch_sampler=_Keys(self.plan, steps),
            num_workers=self._workers,
            collate_fn=_collate,
            prefetch_factor=4,
            multiprocessing_context=_context(),
            generator=torch.Generator(),  # else it draws from the training thread's
            worker_init_fn=_end_with_training,
        )
        for step, (pixels, indices, failures) in zip(steps, loader, strict=True):
            self.skipped |= failures
            draws = self.plan.draws(step)
            if (indices < 0).any():
                found, hint = next(iter(failures.values())), "Check the data set: efficientformer data check"
                raise DataError("Neither a picture nor what may stand in for it can be read", found=found, hint=hint)
            views = np.where(indices == draws.indices, draws.views, -1)
            yield pixels, dataclasses.replace(draws, indices=indices, views=views)


def _end_with_training(_: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach every process, to the training process: it ends its workers itself.

    SIGTERM is also what ends a worker that hangs: it does, a while later. Where the training process is killed, torch's
    worker looks at the server it was forked from, and that one lives on as long as its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):  # Windows has none, and kills on SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_late, daemon=True).start()
    threading.Thread(target=_follow, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_late() -> None:
    """Wait for SIGTERM, and have the system end this process a while later, whatever it hangs in by then."""
    signal.sigwait({signal.SIGTERM})
    signal.alarm(GRACE_S)


def _follow(parent: BaseProcess) -> None:
    """End this process as soon as another one has ended."""
    parent.join()
    os._exit(1)


def _context() -> BaseContext:
    """Return how workers start: forked from a server that has the libraries loaded (this process has threads)."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["efficientformer.data.server", __name__, "timm.data.transforms_factory"])
    return context


class _Keys:
    """The (index, seed) pairs of each step, made when they are needed."""

    def __init__(self, plan: DrawPlan, steps: range) -> None:
        self._plan, self._steps = plan, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self._steps:
            draws = self._plan.draws(step)
            yield list(zip(draws.indices.tolist(), draws.seeds.tolist(), strict=True))


@dataclass(frozen=True)
class _Sample:
    """An augmented picture (C, H, W), its number (-1 if there is none), and why others before it were passed over."""

    pixels: npt.NDArray[np.uint8]
    index: int
    failures: dict[str, str]


class _Samples(Dataset[_Sample]):
    """Augmented pictures by (index, seed)."""

    def __init__(self, source: ImageSource, augment: SampleAugment, preprocess: PreprocessSpec) -> None:
        self._source, self._augment, self._preprocess = source, augment, preprocess

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        index, seed = key
        failures: dict[str, str] = {}
        for candidate in self._candidates(index, seed):
            try:
                return _Sample(self._augment(self._source.image(candidate, self._preprocess), seed),
                               candidate, failures)  # fmt: skip
            except ImageError as error:
                failures[self._source.name(candidate)] = str(error)
        return _Sample(np.zeros((len(self._preprocess.mean), *self._preprocess.input_size), np.uint8), -1, failures)

    def _candidates(self, index: int, seed: int) -> Iterator[int]:
        """Yield a picture and then, one by one, what stands in for it, which the seed alone decides.

        Not its neighbours: broken files lie together, and the picture after them would be drawn for all of them.
        """
        yield index
        rng, labels = np.random.default_rng(seed), self._source.labels
        yield from rng.permutation(np.flatnonzero(labels == labels[index]))[:OWN_STAND_INS].tolist()
        yield from rng.permutation(len(labels))[:MAX_UNREADABLE].tolist()


def _collate(samples: Sequence[_Sample]) -> tuple[Tensor, npt.NDArray[np.int64], dict[str, str]]:
    failures = {name: reason for sample in samples for name, reason in sample.failures.items()}
    indices = np.array([sample.index for sample in samples], np.int64)
    return torch.from_numpy(np.stack([sample.pixels for sample in samples])), indices, failures


def _explain(error: BaseException) -> BaseException:
    """Return an error of ours for what ends a worker process from outside."""
    noticed = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
    if noticed or isinstance(error, EOFError | ConnectionError):  # these two if it dies as it hands a batch over
        hint = "It was killed, most often for lack of memory, or of room in /dev/shm: use fewer workers, then resume"
        return DataError("A process that prepares pictures died", found=str(error) or type(error).__name__, hint=hint)
    return error


def decode_all(
    source: ImageSource, preprocess: PreprocessSpec, workers: int
) -> tuple[Tensor, ImageSource, list[tuple[str, str]]]:
    """Decode every picture to the input's size, to be kept in memory.

    Returns:
        The pictures (N, C, H, W) uint8, the source of just those, and name and reason of each that cannot be decoded.

    Raises:
        DataError: If they would take more than 8 GiB.
    """
    height, width = preprocess.input_size
    shape = (len(source), len(preprocess.mean), height, width)
    if np.prod(shape, dtype=np.int64) > MEMORY_BYTES:
        raise DataError(
            "Too many pictures to keep them in memory",
            expected=f"at most {MEMORY_BYTES >> 30} GiB decoded",
            found=f"{np.prod(shape, dtype=np.int64) / (1 << 30):.1f} GiB",
            hint="Set crop to rrc, which reads them anew each time",
        )
    images = torch.empty(shape, dtype=torch.uint8)

    def load(index: int) -> str:
        try:
            image = source.cropped(index, preprocess)
            pixels = np.asarray(image).reshape(height, width, -1)  # (H, W, C)
        except ImageError as error:
            return str(error)
        images[index] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        return ""

    with ThreadPool(max(1, workers)) as pool:
        outcomes = pool.map(load, range(len(source)), chunksize=64)
    skipped = [(source.name(i), reason) for i, reason in enumerate(outcomes) if reason]
    if skipped:
        good = [i for i, reason in enumerate(outcomes) if not reason]
        return images[good], Subset(source, good), skipped
    return images, source, []


def read_classes(
    source: ImageSource, preprocess: PreprocessSpec, workers: int
) -> tuple[ImageSource, list[tuple[str, str]]]:
    """Look for one picture of each class that can be read.

    Returns:
        The source of just those, and name and reason of each that was tried and cannot be decoded.
    """
    order = np.argsort(source.labels, kind="stable")
    classes = np.split(order, np.flatnonzero(np.diff(source.labels[order])) + 1)

    def look(indices: npt.NDArray[np.int64]) -> tuple[list[int], list[tuple[str, str]]]:
        skipped = []
        for index in indices.tolist():
            try:
                source.image(index, preprocess)
            except ImageError as error:
                skipped.append((source.name(index), str(error)))
            else:
                return [index], skipped
        return [], skipped

    with ThreadPool(max(1, workers)) as pool:
        outcomes = pool.map(look, classes)
    good = [index for found, _ in outcomes for index in found]
    return Subset(source, good), [each for _, skipped in outcomes for each in skipped]
