"""Keep freed memory in the process, for the next tensors."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt (malloc.h)."""

_MOST_TRIMMED = 2**31 - 1
_LARGEST_ON_HEAP = 32 * 2**20
"""The largest value that all versions of glibc accept."""


def keep_freed_memory() -> None:
    """Keep the C library from returning freed memory to the operating system.

    By default glibc returns large blocks, and the kernel clears each page again when the process
    next touches it. A step that frees and allocates several copies of the gradients would spend
    a tenth of its time there. C libraries without `mallopt` are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _MOST_TRIMMED)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_ON_HEAP)
