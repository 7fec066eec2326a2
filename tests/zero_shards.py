"""Trains under ZeRO, and saves the parts of each rank beside DeepSpeed's own full tensors.

A program for test_zero_shards.py. It forks the ranks, which train under each strategy in turn.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "recipes"))

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from partly_frozen import partly_frozen
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.utils._python_dispatch import TorchDispatchMode

from launcher import make_plan, read_machine
from launcher.engine.probes.measuring import MetricsCollector
from launcher.engine.process_group import join
from launcher.engine.saving.checkpoint_tensors import write_shard
from launcher.engine.training.build import build_context
from launcher.engine.training.context import TrainContext
from launcher.engine.training.loop import train
from launcher.environment.world import find_world
from launcher.runs.rundir import create_run_dir


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the collectives that exchange floating-point numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            leaves = torch.utils._pytree.tree_leaves(args)
            if any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
                self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def full_tensors(context: TrainContext) -> dict[str, Tensor]:
    """Return the weights and Adam's averages, gathered by DeepSpeed (collective)."""
    tensors = {}
    for name, parameter in context.backend.unwrap(context.model).named_parameters():
        if not parameter.requires_grad:
            with GatheredParameters([parameter]):
                tensors[f"model/{name}"] = parameter.detach().clone()
            continue
        tensors[f"model/{name}"] = safe_get_full_fp32_param(parameter).clone()
        for key in ("exp_avg", "exp_avg_sq"):
            full = safe_get_full_optimizer_state(parameter, key)
            tensors[f"optimizer/{name}/{key}"] = full.clone()
    return tensors


def train_and_save(rank: int, folder: Path, strategies: list[str], ranks: int) -> None:
    """Train under each strategy, as one of the ranks."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", ranks)):
        os.environ |= {name: str(value), f"LOCAL_{name}": str(value)}
    world = replace(find_world(), store=folder / "store")
    backends = []
    for strategy in strategies:
        recipe = replace(partly_frozen(), strategy=strategy)  # type: ignore[arg-type]
        plan = make_plan(recipe, read_machine(), nproc_per_node=ranks)
        make_run_dir = functools.partial(create_run_dir, folder / strategy, "case")
        backend, run_dir = join(recipe, plan, world, make_run_dir)
        world = replace(world, store=None)  # later strategies use the same group
        context = build_context(recipe, plan, backend, last_step=3, evaluates=False)
        train(context, MetricsCollector(None), last_step=3)
        with Collectives() as collectives:
            state = backend.snapshot(context.model, context.optimizer)
        write_shard(run_dir.path, rank, state.tensors)
        expected = full_tensors(context)
        if rank == 0:
            save_file(expected, run_dir.path / "expected")
            (run_dir.path / "collectives.json").write_text(json.dumps(collectives.names))
            bucket_size = getattr(context.model, "optimizer").reduce_bucket_size  # noqa: B009
            (run_dir.path / "bucket.json").write_text(json.dumps(bucket_size))
        backends.append(backend)
    sys.stdout.flush()
    backends[-1].wait_for_all("saved")
    os._exit(0)


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    start_processes(  # type: ignore[no-untyped-call]
        train_and_save,
        (Path.cwd(), sys.argv[2:], int(sys.argv[1])),
        int(sys.argv[1]),
        start_method="fork",
    )
