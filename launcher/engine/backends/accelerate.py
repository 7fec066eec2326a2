"""DistributedDataParallel through Accelerate: gloo between CPU ranks, NCCL between GPUs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    check_cuda_p2p_ib_support,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from launcher.engine.backends.base import Backend
from launcher.engine.placement import planned_device
from launcher.errors import WorldError
from launcher.plan import Plan
from launcher.world import World

_TIMEOUT = timedelta(minutes=30)


class AccelerateBackend(Backend):
    """Accelerate forms the process group, places the model and wraps it in DDP.

    Its optimizer, scheduler and DataLoader wrappers are left out: the loop does what they would,
    exactly for any split of the batch.
    """

    def __init__(self, plan: Plan, world: World) -> None:
        super().__init__(plan, planned_device(plan, world.local_rank))
        _reset()
        cpu = plan.device == "cpu"
        if not cpu and not check_cuda_p2p_ib_support():
            # Consumer cards that cannot talk to each other directly; Accelerate insists on both.
            os.environ.setdefault("NCCL_P2P_DISABLE", "1")
            os.environ.setdefault("NCCL_IB_DISABLE", "1")
        self._accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no",  # the loop's own autocast, the same under every backend
            gradient_accumulation_steps=1,  # the loop's own, exact for ragged micro-batches
            kwargs_handlers=[
                InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=_TIMEOUT),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
        self.rank = self._accelerator.process_index
        self.world_size = self._accelerator.num_processes
        wanted = DistributedType.MULTI_CPU if cpu else DistributedType.MULTI_GPU
        found = self._accelerator.distributed_type
        if (found, self.world_size, self.rank) != (wanted, plan.world_size, world.rank):
            raise WorldError(
                f"Planned for rank {world.rank} of {plan.world_size} under {wanted.value}; "
                f"Accelerate formed rank {self.rank} of {self.world_size} under {found.value}. "
                "Unset the ACCELERATE_* variables of this environment, or use `launcher run`."
            )

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> tuple[nn.Module, Optimizer]:
        wrapped = self._accelerator.prepare(model)
        if not isinstance(wrapped, DistributedDataParallel):
            raise WorldError(
                f"Accelerate prepared a {type(wrapped).__name__} instead of DDP, so the ranks "
                "would train copies of their own."
            )
        self._wrapped = wrapped
        return wrapped, make_optimizer(wrapped.module)

    def unwrap(self, model: nn.Module) -> nn.Module:
        # Accelerate's own unwrap_model imports DeepSpeed to see whether the model is one of its.
        return self._wrapped.module

    def micro_step(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self._wrapped.no_sync()

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def close(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._accelerator.end_training()
        _reset()


def _reset() -> None:
    """Forget Accelerate's process-wide state, which would outlive this backend."""
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001
    PartialState._reset_state()  # noqa: SLF001
    GradientState._reset_state()  # noqa: SLF001
