"""The collective calls of this rank, from PyTorch's flight recorder."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

import torch.distributed as dist


def record_collectives(path: Path) -> None:
    """Write the last collective calls of this process as JSON, if torch has recorded any.

    torch keeps the last 2,000 by default (TORCH_FR_BUFFER_SIZE; 0 records none). An error is
    ignored: this is called where a run has already failed.
    """
    with contextlib.suppress(Exception):
        if not dist.is_initialized():
            return
        recorder = importlib.import_module("torch._C._distributed_c10d")  # its stubs are incomplete
        dump = getattr(recorder, recorder_function(dist.get_backend_config()))
        path.write_bytes(dump(includeCollectives=True, onlyActive=False))


def recorder_function(backends: str) -> str:
    """Return the name of the function that dumps the calls of a process group.

    NCCL has a flight recorder of its own, which only builds of torch with NCCL have; the general
    one holds the calls of gloo (torch 2.13).

    Args:
        backends: The backends by device, as `torch.distributed.get_backend_config` returns them.
    """
    return "_dump_nccl_trace_json" if "nccl" in backends else "_dump_fr_trace_json"
