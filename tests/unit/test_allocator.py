"""Memory that a training step frees stays with the process."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from efficientformer.training.allocator import freed_memory_kept

def faults():
    for _ in range(20):  # until the heap has found its size
        torch.ones(16 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 * 2**20)  # 64 MiB: 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

first = faults()
with freed_memory_kept():
    kept = faults()
    pieces = [torch.ones(2**18) for _ in range(256)]  # 256 MiB
    full = resident()
    del pieces
    held = resident()
print(first, kept, full, held, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_used_again_without_page_faults():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after, full, held, given_back = map(int, done.stdout.split())
    if before < 10 * 10_000:
        pytest.skip("pages are so large here that there is nothing to gain")
    assert after < 1_000
    assert full - held < 1_000
    assert full - given_back > 60_000, "in the end free memory goes back: 65,536 pages"
