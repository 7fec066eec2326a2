"""The DataLoader policy of each rank: workers, prefetching, pinned memory.

Four workers per GPU keep it busy in most trainings, and pinned memory lets copies overlap with
computation. More workers than cores oversubscribe them, and workers for samples that are already in
memory only copy them. The policy works for any DataLoader:
`DataLoader(data, **policy.dataloader_kwargs())`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WORKERS_PER_RANK = 4
"""DataLoader workers per rank if there are enough cores."""

PREFETCH_FACTOR = 2
"""Batches that each worker keeps ready; the same as PyTorch's default."""


@dataclass(frozen=True, kw_only=True)
class LoaderPolicy:
    """How each rank loads its share of the data, and why."""

    workers_per_rank: int
    """DataLoader workers of each rank; 0 loads in the rank's own process."""

    workers_reason: str
    """Why there are that many workers, for the reader of a plan."""

    prefetch_factor: int | None
    """Batches that each worker keeps ready; None without workers."""

    pin_memory: bool
    """Whether batches pass through page-locked memory, from which copies to a GPU overlap."""

    pin_reason: str
    """Why memory is pinned or not, for the reader of a plan."""

    def dataloader_kwargs(self) -> dict[str, Any]:
        """Return the arguments of `torch.utils.data.DataLoader` that the policy determines."""
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
    data_on_device: bool = False,
    num_workers: int | None = None,
    prefetch_factor: int | None = None,
    pin_memory: bool | None = None,
) -> LoaderPolicy:
    """Return the policy for each of `nproc_per_node` ranks that share `usable_cores`.

    Args:
        usable_cores: Cores that the ranks of one node may use together.
        cores_limited_by: Name of the limit on the cores, for the reason.
        nproc_per_node: Ranks on one node.
        device: "cuda" or "cpu".
        in_memory: Whether the samples are already in memory.
        data_on_device: Whether the samples lie on the device that computes.
        num_workers: Workers per rank that the user asked for; None lets the policy decide.
        prefetch_factor: Batches that each worker keeps ready; None is `PREFETCH_FACTOR`.
        pin_memory: Whether the user asked for pinned memory; None pins on CUDA.
    """
    cores_per_rank = max(usable_cores // nproc_per_node, 1)
    if num_workers is not None:
        workers, reason = num_workers, "as asked"
    elif data_on_device:
        workers, reason = 0, "the samples lie on the device, which makes its batches by index"
    elif in_memory:
        workers, reason = 0, "the samples are in memory: workers would only copy them"
    elif cores_per_rank < WORKERS_PER_RANK:
        workers = cores_per_rank
        reason = (
            f"{WORKERS_PER_RANK} by default, limited by {usable_cores} usable cores "
            f"({cores_limited_by}) / {nproc_per_node} rank{'s' * (nproc_per_node > 1)} "
            "per node"
        )
    else:
        workers, reason = WORKERS_PER_RANK, f"{WORKERS_PER_RANK} per rank"
    if pin_memory is not None:
        pin, pin_reason = pin_memory and device == "cuda", "as asked"
        if pin_memory and not pin:
            pin_reason = "there is no GPU to copy to: the ranks compute on CPUs"
    else:
        pin = device == "cuda"
        pin_reason = (
            "copies to the GPU overlap with computation" if pin else "there is no GPU to copy to"
        )
    return LoaderPolicy(
        workers_per_rank=workers,
        workers_reason=reason,
        prefetch_factor=(prefetch_factor or PREFETCH_FACTOR) if workers else None,
        pin_memory=pin,
        pin_reason=pin_reason,
    )
