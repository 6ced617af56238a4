"""Many pictures at once: several threads take chunks from file to result, and results come out in order.

Every thread decodes a chunk and then runs the network on it, so that decoding and inference overlap without a queue
between them; what is read ahead is bounded by the number of chunks in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from itertools import islice
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

THREADS = "efficientformer"  # what the names of our threads begin with
AHEAD = 4  # chunks in flight for each thread: enough that none waits for a slow picture at the head of the line


def in_order(items: Iterable[T], work: Callable[[list[T]], list[R]], *, workers: int, chunk: int = 1) -> Iterator[R]:
    """Yield what ``work`` returns for each item, in the items' order.

    Items are drawn lazily, at most ``AHEAD * workers`` chunks before they are needed. A finished result waits for no
    item that is slow to come, such as a camera's frame, but one that is being drawn already. When ``work`` fails,
    chunks that have not begun are dropped and the running ones waited for. When the caller stops early, or is
    interrupted, they are left to end by themselves: each may be waiting for a server that answers slowly.

    Args:
        items: What to work on.
        work: Turns a chunk of items into as many results; called by ``workers`` threads at the same time.
        workers: Threads.
        chunk: Items given to ``work`` together.

    Raises:
        Exception: Whatever ``work`` raises, in the place of that chunk's results; whatever drawing raises, after the
            results of all that was drawn before.
    """
    failures: list[Exception] = []

    def drawn() -> Iterator[T]:
        try:
            yield from items
        except Exception as error:  # a stream may raise anything
            failures.append(error)

    remaining = drawn()
    waiting: deque[Future[tuple[list[R], float]]] = deque()
    limit = AHEAD * workers
    drawing: deque[float] = deque(maxlen=AHEAD)  # seconds that the last chunks took: one may be held up by chance
    working = 0.0  # seconds that the last one took

    def timed(taken: list[T]) -> tuple[list[R], float]:
        begun = perf_counter()
        return work(taken), perf_counter() - begun

    pool = ThreadPoolExecutor(workers, thread_name_prefix=THREADS)
    wait = True
    try:
        while True:
            # A finished result waits for a draw only where as many as may be ahead are drawn in less time than one is
            # worked on: the threads then have something to do while the caller looks at it.
            while len(waiting) < limit and not (waiting and waiting[0].done() and min(drawing) * limit > working):
                begun = perf_counter()
                if not (taken := list(islice(remaining, chunk))):
                    break
                drawing.append(perf_counter() - begun)
                waiting.append(pool.submit(timed, taken))
            if not waiting:
                for failure in failures:
                    raise failure
                return
            first = waiting.popleft()
            while not first.done():  # a signal that comes just before Python blocks is seen when it wakes
                wait_for((first,), timeout=1)
            results, working = first.result()
            yield from results
    except (GeneratorExit, KeyboardInterrupt):
        wait = False
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=True)
