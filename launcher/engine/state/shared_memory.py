"""Memory of this process that another process can read, and the tensors that lie in it.

It is a file in memory without a name (memfd_create(2)). It counts as memory of this process and not
against the size of /dev/shm, and it is gone when no process has it open, however they end.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_SEGMENT_BYTES = 32 << 20
"""Bytes that small tensors share. A tensor of a quarter of it or more has memory of its own."""

_ALIGNMENT = 64
"""Each tensor begins at a multiple of this, as torch allocates."""

_NO_EXECUTION = 0x8
"""MFD_NOEXEC_SEAL, without which hardened kernels refuse (Linux 6.3)."""

_FOR_ALL_CONTEXTS = 1
"""cudaHostRegisterPortable."""


class _Segment(NamedTuple):
    """A part of the file, and where it lies in this process."""

    address: int
    start: int
    values: Tensor
    is_pinned: bool


class SharedMemory:
    """Memory that grows with the tensors that are allocated in it.

    Args:
        is_pinned: Whether a GPU can copy to it while this process goes on. Where CUDA refuses, the
            copies take longer.

    Raises:
        OSError: The kernel gives no such memory.
    """

    def __init__(self, *, is_pinned: bool = False) -> None:
        self.descriptor = _unnamed_file()
        self.end = 0
        """The end of all tensors in the file, a multiple of the size of a page."""

        self._is_pinned = is_pinned
        self._segments: list[_Segment] = []
        self._shared: Tensor | None = None
        self._used = 0
        self._finalizer = weakref.finalize(self, _release, self.descriptor, self._segments)
        self._finalizer.atexit = False

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor.

        Raises:
            OSError: There is not enough memory.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            return torch.empty(shape, dtype=dtype)
        if num_bytes >= _SEGMENT_BYTES // 4:
            return self._new_segment(num_bytes)[:num_bytes].view(dtype).view(shape)
        if self._shared is None or self._used + num_bytes > _SEGMENT_BYTES:
            self._shared, self._used = self._new_segment(_SEGMENT_BYTES), 0
        values = self._shared[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return values.view(dtype).view(shape)

    def place(self, tensor: Tensor) -> int | None:
        """Return where the values of a tensor begin in the file.

        It is None if they are elsewhere, or are not consecutive.
        """
        address = tensor.data_ptr()
        index = bisect.bisect_right(self._segments, address, key=lambda each: each.address) - 1
        if index < 0 or not tensor.is_contiguous():
            return None
        segment = self._segments[index]
        first = address - segment.address
        return segment.start + first if first + tensor.nbytes <= segment.values.nbytes else None

    def close(self) -> None:
        """Free the memory, as soon as no tensor in it is in use and no other process has it."""
        self._shared = None
        self._finalizer()

    def _new_segment(self, num_bytes: int) -> Tensor:
        """Return the bytes of a further part of the file, at least as many as asked for."""
        num_bytes = -(-num_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        os.ftruncate(self.descriptor, self.end + num_bytes)
        mapping = mmap.mmap(self.descriptor, num_bytes, offset=self.end)
        mapping.madvise(mmap.MADV_DONTFORK)  # processes that this one forks need not keep it
        values = torch.frombuffer(mapping, dtype=torch.uint8)
        is_pinned = self._is_pinned and _pin(values)
        segment = _Segment(values.data_ptr(), self.end, values, is_pinned)
        bisect.insort(self._segments, segment, key=lambda each: each.address)
        self.end += num_bytes
        return values


def _unnamed_file() -> int:
    """Return the descriptor of a new file in memory."""
    try:
        return os.memfd_create("checkpoint", os.MFD_CLOEXEC | _NO_EXECUTION)
    except OSError:  # Linux before 6.3 does not know the flag
        return os.memfd_create("checkpoint", os.MFD_CLOEXEC)


def _pin(values: Tensor) -> bool:
    """Return whether CUDA agrees to copy to the memory of a tensor asynchronously.

    torch asks CUDA, and not its own allocator, whether memory is pinned (torch 2.13).
    """
    cudart = torch.cuda.cudart()
    code = cudart.cudaHostRegister(values.data_ptr(), values.nbytes, _FOR_ALL_CONTEXTS)
    if code == cudart.cudaError.success:
        return True
    with contextlib.suppress(RuntimeError):  # the next kernel would report this error as its own
        torch.zeros(1, device="cuda")
    return False


def _release(descriptor: int, segments: list[_Segment]) -> None:
    for segment in segments:
        if segment.is_pinned:
            torch.cuda.cudart().cudaHostUnregister(segment.address)
    segments.clear()
    os.close(descriptor)
