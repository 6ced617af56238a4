"""Networks that do not fit into memory together are timed in groups, tied together by a few that are in all of them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from efficientformer.latency.drift import error_of_median
from efficientformer.runtime.cgroup import cgroup_folders

TIES = 8
COPIES = 3  # memory of an opened network by that of its weights: about so much in OpenVINO, half of it in ONNX Runtime
SHARE = 0.5  # of the free memory that is used
UNKNOWN = 4 << 30  # bytes; taken for free where the system does not tell


def divide(sizes: Sequence[float], room: float) -> list[list[int]]:
    """Divide networks into groups that fit into memory.

    Args:
        sizes: Bytes that each network takes.
        room: Bytes there are.

    Returns:
        The numbers of the networks of each group: one group of all if they fit. Otherwise ``TIES`` of the smaller half
        come first in every group, and every other network is in one of them.
    """
    if sum(sizes) <= room:
        return [list(range(len(sizes)))]
    smaller = sorted(range(len(sizes)), key=lambda number: sizes[number])[: max(TIES, len(sizes) // 2)]
    ties = smaller[:: max(1, len(smaller) // TIES)][:TIES]
    others = [number for number in range(len(sizes)) if number not in ties]
    left, wanted = room - sum(sizes[number] for number in ties), sum(sizes[number] for number in others)
    share = wanted / math.ceil(wanted / left) if left > 0 else 0.0  # groups of about the same size
    groups, filled = [list(ties)], 0.0
    for number in others:
        if len(groups[-1]) > len(ties) and filled + sizes[number] / 2 > share:
            groups.append(list(ties))
            filled = 0.0
        groups[-1].append(number)
        filled += sizes[number]
    return groups


def scale_to_first(groups: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Return by what each group's latencies are to be multiplied to be those of the first group's time.

    Args:
        groups: Latencies of the networks of each group, the ties first.

    Returns:
        For each group the factor, which is the median over the ties, and its relative standard error.
    """
    first = np.log(groups[0][:TIES])
    found = [(1.0, 0.0)]
    for group in groups[1:]:
        shifts = first - np.log(group[:TIES])
        found.append((math.exp(np.median(shifts)), error_of_median(shifts)))
    return found


def free_memory() -> int:
    """Return the bytes that a process can still have without swapping, within its container's limit."""
    found = UNKNOWN
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    limited = (_left(folder) for folder in cgroup_folders("memory"))
    return min([found, *(left for left in limited if left is not None)])


def _left(folder: Path) -> int | None:
    """Return the bytes that a control group can still have; None if it does not say."""
    versions = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )  # 2, 1
    for *names, cached in versions:
        with suppress(OSError, ValueError):  # ValueError: "max", in version 2
            limit, used = (int((folder / name).read_text()) for name in names)
            found = re.search(rf"^{cached} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            return max(0, limit - used + (int(found[1]) if found else 0))  # files that were read are given up
    return None
