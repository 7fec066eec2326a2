"""What the C library does with freed memory: keep it for the next tensors, or return it."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt (malloc.h)."""

_MOST_TRIMMED = 2**31 - 1
_LARGEST_ON_HEAP = 32 * 2**20
"""The largest value that all versions of glibc accept."""

_RETURNED_BYTES = 2**16
"""Size from which blocks are returned as soon as they are freed."""


def keep_freed_memory() -> None:
    """Keep the C library from returning freed memory to the operating system.

    By default glibc returns large blocks, and the kernel clears each page again when the process
    next touches it. A step that frees and allocates several copies of the gradients would spend
    a tenth of its time there. C libraries without `mallopt` are left as they are.
    """
    _set_thresholds(_MOST_TRIMMED, _LARGEST_ON_HEAP)


def return_freed_memory() -> None:
    """Have the C library return the memory of freed tensors at once; steps take longer.

    By default glibc keeps freed blocks of up to 32 MiB, in pieces between memory that is in use, so
    a process can hold several times what its tensors need.
    """
    _set_thresholds(_RETURNED_BYTES, _RETURNED_BYTES)


def _set_thresholds(trimmed: int, on_heap: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, trimmed)
        mallopt(_M_MMAP_THRESHOLD, on_heap)
