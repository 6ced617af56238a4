"""The processor: its name, its cores, and what it computes in, which clouds often leave out of the name."""

from __future__ import annotations

import math
import os
import platform
import re
from contextlib import suppress
from pathlib import Path

from efficientformer.runtime.cgroup import cgroup_folders

CPUINFO = Path("/proc/cpuinfo")  # Linux alone has it
X86, ARM = "flags", "Features"
UNITS = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx_vnni": "VNNI", "avx512_bf16": "bf16",
    "amx_tile": "AMX", "asimddp": "dot products", "bf16": "bf16", "sve": "SVE",
}  # fmt: skip
"""What an instruction set is called, by its flag: those that decide how fast a network runs, and in what."""

HALF = {
    "bf16": {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}, "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}  # fmt: skip
"""Flags of which one means that a processor multiplies in a half precision."""


def hardware(cpuinfo: Path = CPUINFO) -> str:
    """Return the processor's name, its instruction sets and the number of cores this process may use.

    Two processors of one name may differ in these: what was measured on one does not hold on the other.

    Args:
        cpuinfo: Where Linux describes it.
    """
    name = _entry("model name", cpuinfo) or _arm(cpuinfo) or _apple() or platform.processor() or platform.machine()
    flags = f"{_entry(X86, cpuinfo)} {_entry(ARM, cpuinfo)}".split()
    units = dict.fromkeys(UNITS[flag] for flag in UNITS if flag in flags)  # each once
    return f"{name}{' with ' if units else ''}{', '.join(units)}, {available_cores()} cores"


def available_cores() -> int:
    """Return how many cores this process may use: those of its affinity mask, or fewer by its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(map(_quota, cgroup_folders("cpu")), default=math.inf)
    return cores if quota >= cores else max(1, math.ceil(quota))


def _quota(folder: Path) -> float:
    """Return how many cores' time a control group may take; infinity if it does not say."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # version 2, version 1
        with suppress(OSError, ValueError):  # ValueError: "max", in version 2
            quota, period = (int(word) for name in names for word in (folder / name).read_text().split())
            return quota / period if quota > 0 else math.inf  # -1 in version 1
    return math.inf


def overflows(cpuinfo: Path = CPUINFO) -> bool:
    """Return whether this processor adds two products of 8 bits in 16; False where the system does not say.

    Args:
        cpuinfo: Where Linux describes it.
    """
    flags = _entry(X86, cpuinfo).split()
    return bool(flags) and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags)


def computes_in(precision: str, cpuinfo: Path = CPUINFO) -> bool:
    """Return whether this processor multiplies in half precision; True where the system does not say.

    One that does not emulates it, many times slower than single precision.

    Args:
        precision: ``bf16`` or ``fp16``.
        cpuinfo: Where Linux describes it.
    """
    flags = f"{_entry(X86, cpuinfo)} {_entry(ARM, cpuinfo)}".split()
    return not flags or not HALF[precision].isdisjoint(flags)


def _arm(cpuinfo: Path) -> str:
    """Return what Linux says of an Arm core, which has no name there: its maker's number and its own."""
    maker, part = _entry("CPU implementer", cpuinfo), _entry("CPU part", cpuinfo)
    return f"Arm {maker} {part}" if maker and part else ""


def _apple() -> str:
    """Return the chip's name on macOS, where ``platform.processor()`` says ``arm`` for all of them."""
    if platform.system() != "Darwin":
        return ""
    import subprocess

    command = ("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _entry(name: str, cpuinfo: Path) -> str:
    """Return what is said about the first core under a name; nothing if there is none."""
    try:
        found = re.search(rf"^{name}\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found.group(1).strip() if found else ""
