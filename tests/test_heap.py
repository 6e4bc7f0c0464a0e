"""Freed memory stays with the process: counted by the pages it has to touch anew, in a process of its own."""

import platform
import subprocess
import sys

import pytest

PAGES = 55 * 2**20 // 4096  # of the three blocks together: more than twice the largest, and less than 64 MiB
COUNT = """
import ctypes, resource, sys

if sys.argv[1] == "keep":
    from palm_rlhf_pytorch.heap import keep_freed_memory
    keep_freed_memory()

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def touch():
    blocks = [(ctypes.c_void_p(libc.malloc(size * 2**20)), size) for size in (20, 20, 15)]
    for block, size in blocks:
        ctypes.memset(block, 1, size * 2**20)
    for block, _ in reversed(blocks):
        libc.free(block)

for _ in range(3):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone adapts so; runs on Linux, as in CI")
def test_blocks_of_like_size_find_the_pages_of_those_before():
    def pages(how: str) -> int:
        clean = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}  # no setting of malloc's from outside
        done = subprocess.run(
            [sys.executable, "-c", COUNT, how], env=clean, capture_output=True, text=True, check=True, timeout=120
        )
        return int(done.stdout)

    assert pages("keep") < PAGES / 20
    assert pages("leave") > 3 * PAGES  # else there is nothing to learn
