"""The device of a rank: which one it is, how it computes, and what it is called."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from launcher.environment.world import World
from launcher.errors import WorldError
from launcher.planning.plan import Plan
from launcher.recipe.recipe import Recipe

_MIN_CAPABILITY_BF16 = (8, 0)
_MIN_CAPABILITY_FP8 = (8, 9)
_MIN_CAPABILITY_COMPILE = (7, 0)
"""The lowest CUDA compute capabilities that support each feature."""


def planned_device(recipe: Recipe, plan: Plan, local_rank: int) -> torch.device:
    """Return this rank's device, after making it current and applying the recipe's settings.

    Raises:
        WorldError: torch cannot use the planned GPU, or the GPU lacks a feature that the recipe
            requires.
    """
    if recipe.deterministic or recipe.exact:
        use_deterministic_kernels()
    if plan.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise WorldError(
            f"The plan needs GPUs, but torch {torch.__version__} finds no usable one. Either torch "
            "is a +cpu build, or the driver is older than its CUDA version requires: see "
            "`nvidia-smi`. To train on CPUs, set device=cpu."
        )
    device = torch.device("cuda", device_index(local_rank, torch.cuda.device_count(), plan))
    torch.cuda.set_device(device)
    set_tf32(enabled=recipe.tf32)
    torch.backends.cudnn.benchmark = recipe.cudnn_benchmark
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if plan.precision == "bf16" and capability < _MIN_CAPABILITY_BF16:
        raise WorldError(
            f"precision=bf16 needs a GPU of the Ampere generation or newer, but this is a {name}. "
            "Use precision=fp16 or precision=fp32."
        )
    if recipe.fp8 and capability < _MIN_CAPABILITY_FP8:
        raise WorldError(
            f"fp8=true needs a GPU of the Ada or Hopper generation or newer, but this is a {name}. "
            "Leave fp8 out."
        )
    if recipe.compile and capability < _MIN_CAPABILITY_COMPILE:
        raise WorldError(
            f"compile=true needs a GPU of the Volta generation or newer, but this is a {name}. "
            "Use compile=false."
        )
    return device


def use_deterministic_kernels() -> None:
    """Make all later operations of this process repeat their results to the bit, or raise.

    cuBLAS reads its variable when torch creates the first handle, so call this before CUDA is used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False  # slow, and nobody reads it
    torch.backends.cudnn.benchmark = False


def set_tf32(*, enabled: bool) -> None:
    """Choose whether matrix products and convolutions of fp32 tensors on CUDA use TF32.

    These are the older names of torch's `fp32_precision` settings. Only they leave both the old and
    the new ones readable, which libraries use (torch 2.13).
    """
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def device_index(local_rank: int, num_visible: int, plan: Plan) -> int:
    """Return the index of this rank's GPU among those that it can see.

    A rank that sees one GPU has it to itself: Slurm shows each task its own.

    Raises:
        WorldError: There are too few GPUs.
    """
    if num_visible == 1:
        return 0
    if local_rank >= num_visible:
        raise WorldError(
            f"The plan needs {plan.nproc_per_node} GPUs on this node, but torch finds "
            f"{num_visible}. Use -n {num_visible}."
        )
    return local_rank


def check_own_device(store: Store, world: World, uuid: str) -> None:
    """Refuse a GPU that another rank of this node uses as well (collective on the node).

    The ranks compare their GPUs through the store, because NCCL fails in a group in which two ranks
    have one GPU.

    Args:
        store: The store at which the ranks have met.
        world: This rank.
        uuid: What identifies the GPU of this rank, on whatever index each process sees it.

    Raises:
        WorldError: Two ranks have the same GPU.
    """
    first = world.rank - world.local_rank
    store.set(f"gpu/{world.rank}", uuid)
    others = [rank for rank in range(first, first + world.local_world_size) if rank != world.rank]
    for rank in others:
        if store.get(f"gpu/{rank}").decode() == uuid:
            ranks = " and ".join(map(str, sorted((rank, world.rank))))
            raise WorldError(
                f"Ranks {ranks} use the same GPU ({uuid}). Start one rank for each GPU. With srun, "
                "use --gpus-per-task=1, or --gpus-per-node with as many tasks on a node."
            )


def device_identity(device: torch.device) -> str:
    """Return what identifies a GPU on its node: its UUID and its address on the PCI bus.

    Both are needed: partitions of a GPU may share one of them, and under ROCm a GPU may lack a
    UUID.
    """
    properties = torch.cuda.get_device_properties(device)
    names = ("pci_domain_id", "pci_bus_id", "pci_device_id")
    address = ":".join(f"{getattr(properties, name, 0):02x}" for name in names)
    return f"UUID {getattr(properties, 'uuid', 'unknown')}, PCI {address}"


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the model name of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "CPU"
