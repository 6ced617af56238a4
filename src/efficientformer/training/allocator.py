"""Memory of a training step on a CPU: kept between steps instead of given back to the system."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt(3), what they are by default, and what they are here.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
DEFAULTS = {M_MMAP_MAX: 65_536, M_TRIM_THRESHOLD: 128 * 1024}
KEPT = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}  # large pieces, too, come from the heap, and the heap never shrinks


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Make this process's allocator keep what is freed, where it is glibc's; elsewhere do nothing.

    Every step frees and asks for the same large maps. By default each goes back to the system and comes again filled
    with zeros, page by page. At the end everything that is free goes back.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    for parameter, value in KEPT.items():
        libc.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in DEFAULTS.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
