"""The per-rank DataLoader policy, as arithmetic: workers, prefetching, pinned memory.

Four workers a GPU keep it fed in most trainings, and pinned memory lets copies run beside
computation; more workers than cores only take turns, and workers for samples that are in memory
already only copy them. Any DataLoader can use it: `DataLoader(data, **policy.dataloader_kwargs())`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WORKERS_PER_RANK = 4
"""DataLoader workers that each rank gets where the cores allow it."""

PREFETCH_FACTOR = 2
"""Batches that each worker holds ready, PyTorch's own default."""


@dataclass(frozen=True, kw_only=True)
class LoaderPolicy:
    """How every rank loads its share of the data, and why."""

    workers_per_rank: int
    """DataLoader worker processes of each rank; 0 loads in the rank itself."""

    workers_reason: str
    prefetch_factor: int | None
    """Batches each worker holds ready; None without workers."""

    pin_memory: bool
    """Whether batches go through page-locked memory, whose copies to a GPU are asynchronous."""

    pin_reason: str

    def dataloader_kwargs(self) -> dict[str, Any]:
        """Return the arguments of `torch.utils.data.DataLoader` that this policy decides."""
        return {
            "num_workers": self.workers_per_rank,
            "prefetch_factor": self.prefetch_factor,
            "persistent_workers": self.workers_per_rank > 0,
            "pin_memory": self.pin_memory,
        }


def loader_policy(
    *,
    usable_cores: int,
    cores_limited_by: str = "cores of this machine",
    nproc_per_node: int = 1,
    device: str = "cuda",
    in_memory: bool = False,
    num_workers: int | None = None,
    prefetch_factor: int | None = None,
    pin_memory: bool | None = None,
) -> LoaderPolicy:
    """Return the policy for each of `nproc_per_node` ranks that share `usable_cores`.

    Args:
        usable_cores: Cores that the ranks of one node may use together.
        cores_limited_by: What limits the cores, in words, for the reason.
        nproc_per_node: Ranks on one node.
        device: "cuda" or "cpu".
        in_memory: Whether the samples are in memory already.
        num_workers: Workers per rank where the user has chosen; None lets the policy choose.
        prefetch_factor: Batches ready per worker; None is `PREFETCH_FACTOR`.
        pin_memory: Whether to pin where the user has chosen; None pins on CUDA.
    """
    cores_per_rank = max(usable_cores // nproc_per_node, 1)
    if num_workers is not None:
        workers, reason = num_workers, "as asked"
    elif in_memory:
        workers, reason = 0, "the samples are in memory: workers would only copy them"
    elif cores_per_rank < WORKERS_PER_RANK:
        workers = cores_per_rank
        reason = (
            f"{WORKERS_PER_RANK} wanted, capped at {usable_cores} usable cores "
            f"({cores_limited_by}) / {nproc_per_node} ranks per node"
        )
    else:
        workers, reason = WORKERS_PER_RANK, f"{WORKERS_PER_RANK} per rank"
    if pin_memory is not None:
        pin, pin_reason = pin_memory and device == "cuda", "as asked"
        if pin_memory and not pin:
            pin_reason = "nothing to copy to: the ranks compute on CPUs"
    else:
        pin = device == "cuda"
        pin_reason = "copies to the GPU run beside computation" if pin else "no GPU to copy to"
    return LoaderPolicy(
        workers_per_rank=workers,
        workers_reason=reason,
        prefetch_factor=(prefetch_factor or PREFETCH_FACTOR) if workers else None,
        pin_memory=pin,
        pin_reason=pin_reason,
    )
