"""Main memory on a CPU: what a step frees is there for the next one, on large pages."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BLOCK = 2**30  # bytes of the largest block that is kept
OLD_LIMIT = 2**25  # the largest that older glibc takes


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for the process, and PyTorch to put large tensors on huge pages (Linux; nothing elsewhere).

    Left alone, glibc hands back to the system what a step frees, and the system clears it page by page when the next step asks
    for it: some 30,000 page faults a step of a small U-Net. The largest use of memory stays what it is. Call it before
    the first tensor is made: PyTorch reads THP_MEM_ALLOC_ENABLE once. A value that the user has set stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # glibc's; others don't have it
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        if not mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK):
            mallopt(M_MMAP_THRESHOLD, OLD_LIMIT)
