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
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

THREADS = "efficientformer"  # what the names of our threads begin with
AHEAD = 4  # chunks in flight for each thread: enough that none waits for a slow picture at the head of the line


def in_order(items: Iterable[T], work: Callable[[list[T]], list[R]], *, workers: int, chunk: int = 1) -> Iterator[R]:
    """Yield what ``work`` returns for each item, in the items' order.

    Items are drawn lazily, at most ``AHEAD * workers`` chunks before they are needed. When ``work``
    fails, chunks that have not begun are dropped and the running ones waited for. When the caller stops early, or is
    interrupted, they are left to end by themselves: each may be waiting for a server that answers slowly.

    Args:
        items: What to work on.
        work: Turns a chunk of items into as many results; called by ``workers`` threads at the same time.
        workers: Threads.
        chunk: Items given to ``work`` together.

    Raises:
        Exception: Whatever ``work`` raises, in the place of that chunk's results.
    """
    remaining = iter(items)
    waiting: deque[Future[list[R]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix=THREADS)
    wait = True
    try:
        while True:
            while len(waiting) < AHEAD * workers and (taken := list(islice(remaining, chunk))):
                waiting.append(pool.submit(work, taken))
            if not waiting:
                return
            first = waiting.popleft()
            while not first.done():  # a signal that comes just before Python blocks is seen when it wakes
                wait_for((first,), timeout=1)
            yield from first.result()
    except (GeneratorExit, KeyboardInterrupt):
        wait = False
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=True)
