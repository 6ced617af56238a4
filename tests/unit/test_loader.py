"""Loaders: the right pictures under the right labels, in the planned order, whatever goes wrong on the way."""

import ctypes
import dataclasses
import multiprocessing
import os
import select
import signal
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from efficientformer.data.draws import DrawPlan
from efficientformer.data.loader import (
    MAX_UNREADABLE,
    MemoryLoader,
    WorkerLoader,
    _end_with_training,
    decode_all,
    read_classes,
)
from efficientformer.data.source import ImageSource
from efficientformer.spec.errors import DataError, ImageError
from efficientformer.spec.preprocess import PreprocessSpec
from tests.unit.test_augment import PLAIN

PREPROCESS = PreprocessSpec(input_size=(8, 8), resize_size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
WHOLE = dataclasses.replace(PLAIN, padding=0, crop_scale=(1.0, 1.0))


class Flat(ImageSource):
    """Picture i is filled with 4 * i % 256; its label is i % 5. ``bad`` ones cannot be read, ``deadly`` ones kill."""

    def __init__(self, count=40, bad=(), deadly=()):
        self.classes, self.labels = tuple("abcde"), np.arange(count) % 5
        self.bad, self.deadly = bad, deadly

    def name(self, index):
        return f"{index}.png"

    def read(self, index):
        if index in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if index in self.bad:
            raise ImageError(f"Cannot read {index}")
        return Image.new("RGB", (8, 8), (4 * index % 256,) * 3)


def memory(source, plan, cut_until=10**9):
    images, source, skipped = decode_all(source, PREPROCESS, 2)
    loader = MemoryLoader(images, plan(len(source)), source.labels, WHOLE, PREPROCESS, cut_until)
    return loader, skipped


def workers(source, plan, count=2):
    return WorkerLoader(source, plan(len(source)), dataclasses.replace(WHOLE, crop="rrc"), PREPROCESS, 10**9, count)


def plan(length):
    return DrawPlan(length, 10, 0)


def pictures_of(batch):
    return (batch.images[:, 0, 0, 0] * 255 / 4).round().int().numpy()


@pytest.mark.parametrize("kind", ["memory", "workers"])
def test_pictures_come_as_drawn_with_their_labels(kind):
    source = Flat()
    loader = memory(source, plan)[0] if kind == "memory" else workers(source, plan)
    batches = list(loader.batches(2, 9))
    assert len(batches) == 7
    for step, batch in zip(range(2, 9), batches, strict=True):
        assert (batch.draws.indices == loader.plan.draws(step).indices).all()
        assert (pictures_of(batch) == batch.draws.indices).all()
        assert (batch.labels.numpy() == batch.draws.indices % 5).all()


def test_unreadable_pictures_are_left_out_and_named():
    loader, skipped = memory(Flat(bad=(3, 17)), plan)
    assert [name for name, _ in skipped] == ["3.png", "17.png"]
    drawn = {int(i) for batch in loader.batches(0, 3) for i in pictures_of(batch)}
    assert drawn <= set(range(40)) - {3, 17}


def test_workers_pass_over_unreadable_pictures_and_name_them():
    loader = workers(Flat(bad=(3, 4, 39)), plan)
    batches = list(loader.batches(0, 4))
    assert set(loader.skipped) == {"3.png", "4.png", "39.png"}
    for batch in batches:
        assert (pictures_of(batch) == batch.draws.indices).all()
        assert (batch.labels.numpy() == batch.draws.indices % 5).all()


def test_broken_pictures_that_lie_together_are_replaced_by_others_of_their_classes():
    count = 3 * MAX_UNREADABLE
    broken = range(MAX_UNREADABLE + 1)
    loader = workers(Flat(count, bad=broken), plan)
    batches = list(loader.batches(0, count // 10))
    planned = np.concatenate([loader.plan.draws(batch.draws.step).indices for batch in batches])
    drawn = np.concatenate([batch.draws.indices for batch in batches])
    assert (drawn % 5 == planned % 5).all()
    assert ((drawn == planned) == (planned >= len(broken))).all()
    assert np.bincount(drawn).max() < 10, "no picture is drawn in place of them all"
    later = list(workers(Flat(count, bad=broken), plan, count=1).batches(20, count // 10))  # as a resumed run does
    assert (np.concatenate([batch.draws.indices for batch in later]) == drawn[200:]).all()
    assert all((batch.draws.views < 0).any() for batch in later), "of stand-ins, too"


def test_a_class_that_is_lost_is_replaced_by_others():
    loader = workers(Flat(bad=range(0, 40, 5)), plan)
    drawn = np.concatenate([batch.draws.indices for batch in loader.batches(0, 4)])
    assert (drawn % 5 != 0).all()
    assert len(loader.skipped) == 8


def test_a_data_set_of_unreadable_pictures_ends_with_an_error():
    with pytest.raises(DataError, match="Neither a picture nor what may stand in for it"):
        list(workers(Flat(bad=range(40)), plan).batches(0, 2))


def test_one_picture_of_each_class_is_read():
    found, skipped = read_classes(Flat(bad=(0, 5, 6, *range(2, 40, 5))), PREPROCESS, 2)
    assert [found.name(i) for i in range(len(found))] == ["10.png", "1.png", "3.png", "4.png"]
    assert found.labels.tolist() == [0, 1, 3, 4]
    assert [name for name, _ in skipped] == ["0.png", "5.png", *(f"{i}.png" for i in range(2, 40, 5))]


def test_a_killed_worker_is_an_error_that_says_so():
    with pytest.raises(DataError, match="died"):
        list(workers(Flat(deadly=(7,)), plan).batches(0, 4))


class Terminated(Flat):
    """Reading picture 7 sends SIGTERM to the worker and to the server it was forked from, as to a whole group."""

    def read(self, index):
        if index == 7:
            os.kill(os.getppid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return super().read(index)


def test_sigterm_for_a_whole_group_ends_no_worker():
    assert len(list(workers(Terminated(), plan).batches(0, 40))) == 40


def test_a_worker_ends_a_while_after_sigterm_all_the_same(monkeypatch):
    monkeypatch.setattr("efficientformer.data.loader.GRACE_S", 1)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=_hang, args=(ready,))
    worker.start()
    assert ready.wait(10)
    time.sleep(0.5)  # until it hangs
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == -signal.SIGALRM


def _hang(ready=None):
    _end_with_training(0)
    if ready is not None:
        ready.set()
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)  # as zeros: PTHREAD_MUTEX_INITIALIZER
    for _ in range(2):  # the second waits for ever, where no handler of Python's is called
        libc.pthread_mutex_lock(mutex)


def test_a_worker_ends_when_the_training_process_is_killed():
    reading, writing = os.pipe()
    multiprocessing.get_context("fork").Process(target=_start_a_worker_and_die).start()
    os.close(writing)
    assert select.select([reading], [], [], 30)[0], "somebody still has the other end"
    os.close(reading)


def _start_a_worker_and_die():
    multiprocessing.get_context("fork").Process(target=_hang).start()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer")])
def test_a_worker_that_is_killed_as_it_hands_a_batch_over(monkeypatch, error):
    def broken(*_):
        raise error
        yield

    monkeypatch.setattr(WorkerLoader, "_pixels", broken)
    with pytest.raises(DataError, match="died"):
        list(workers(Flat(), plan).batches(0, 1))


def test_the_number_of_workers_changes_nothing():
    augmentation = dataclasses.replace(PLAIN, crop="rrc", hflip=0.5, color_jitter=0.4, crop_scale=(0.2, 1.0))
    found = []
    for count in (1, 3):
        loader = WorkerLoader(Flat(), plan(40), augmentation, PREPROCESS, 10**9, count)
        found.append(torch.cat([batch.images for batch in loader.batches(0, 6)]))
    assert torch.equal(*found)


def test_a_loader_that_is_left_early_stops_its_thread():
    loader = memory(Flat(), plan)[0]
    batches = loader.batches(0, 1000)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name == "batches"]


def test_a_second_ctrl_c_does_not_wait_for_pictures_that_never_come(monkeypatch):
    loader, hangs = memory(Flat(), plan)[0], threading.Event()

    def wait(_):
        hangs.wait()
        yield from ()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("efficientformer.data.loader.PATIENCE", 0.1)
    monkeypatch.setattr(loader, "_pixels", wait)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(loader.batches(0, 1))
        assert not hangs.is_set()
    finally:
        signal.signal(signal.SIGALRM, before)
        hangs.set()


def test_the_training_threads_random_numbers_are_left_alone():
    loader = workers(Flat(), plan)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(loader.batches(0, 3))
    assert torch.equal(torch.rand(3), expected)


def test_what_does_not_fit_into_memory_is_refused():
    huge = PreprocessSpec(input_size=(4096, 4096), resize_size=4096)
    with pytest.raises(DataError, match="GiB"):
        decode_all(Flat(400), huge, 1)
