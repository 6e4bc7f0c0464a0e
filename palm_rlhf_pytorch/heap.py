"""Memory that was freed, kept for the next tensors: a page never touched before costs a CPU more than its arithmetic.

The C library (glibc) maps large blocks one by one, and gives freed memory back to the system once twice the largest
such block lies free. The next tensors then get new pages of 4 KiB, each cleared at its first touch, 1 to 2 microseconds
in a virtual machine. It learns how large blocks are from those it frees, up to 32 MiB: after that up to 64 MiB stay.
A pass over 2,048 tokens at dim 256 so touches no new page where it touched some 10,000 to 50,000. Where malloc is
another, or was set by the environment, this does nothing.
https://man7.org/linux/man-pages/man3/mallopt.3.html (M_MMAP_THRESHOLD)
"""

from functools import cache

import torch

LESSON = 2**25 - 2**16  # bytes: just under the largest that is learnt from, headers and alignment included


@cache
def keep_freed_memory() -> None:
    """Free one block of that size, never touched, as any program might."""
    torch.UntypedStorage(LESSON, device="cpu")
