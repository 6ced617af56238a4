"""Memory of a training step on a CPU: kept between steps instead of given back to the system."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3)
OFF = -1


def keep_freed_memory() -> None:
    """Make this process's allocator keep what is freed, where it is glibc's; elsewhere do nothing.

    Every step frees and asks for the same large maps. By default each goes back to the system and comes again filled
    with zeros, page by page.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)  # large pieces, too, come from the heap
    libc.mallopt(M_TRIM_THRESHOLD, OFF)  # and the heap never shrinks
