"""DistributedDataParallel through Accelerate, over gloo (CPUs) or NCCL (GPUs).

`GroupBackend` forms the process group for this strategy, for FSDP (fsdp.py) and for DeepSpeed
(deepspeed.py).
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate import state as accelerate_state
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from launcher.engine.backends.base import Backend
from launcher.engine.backends.called_alone import refuses_collectives
from launcher.engine.backends.compute_timer import compute_timer
from launcher.engine.backends.default_group import (
    group_timeout,
    join_process_group,
    lower_debug_level,
)
from launcher.engine.backends.devices import check_own_device, device_identity, planned_device
from launcher.engine.backends.recipe_forward import (
    RecipeForward,
    call_inside,
)
from launcher.engine.backends.unused_parameters import UsedParameters
from launcher.engine.ranks.turns import Turns
from launcher.engine.state.initial_values import InitialValues
from launcher.environment.machine import lacks_peer_access
from launcher.environment.network import FORK_SAFETY
from launcher.environment.world import World
from launcher.errors import WorldError
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.planning.virtual_ranks import Part
from launcher.printable import kind_of
from launcher.recipe.recipe import Recipe

T = TypeVar("T")

_NUM_FIRST_TIMED, _TIMED_STRIDE = 10, 100
"""On GPUs, DDP times the first passes and then one pass in each stride."""


_PREFIXES = "ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"
"""Beginnings of the names of variables in which Accelerate keeps its settings."""
_BYTES_PER_SUM = 25 << 20
"""Bytes of gradients that are averaged over ranks together, as in DistributedDataParallel."""

_TIMED_PARTS = "comm", "compute_comm_overlap"


class GroupBackend(Backend):
    """A backend whose process group Accelerate forms, configured by the plan alone.

    It does not use Accelerate's wrappers for optimizers, schedulers and DataLoaders: the training
    loop does their work, exactly for any split of the batch.

    Args:
        recipe: The recipe to train.
        plan: The plan of the run.
        world: The position of this process among the ranks.
        kind: The distributed type that Accelerate must report.
        plugins: Further arguments of `accelerate.Accelerator`.

    Raises:
        WorldError: The ranks could not form a group, or Accelerate formed another one than planned.
    """

    def __init__(
        self, recipe: Recipe, plan: Plan, world: World, *, kind: DistributedType, **plugins: Any
    ) -> None:
        super().__init__(recipe, plan, planned_device(recipe, plan, world.local_rank))
        reset_accelerate_state()
        cpu = plan.device == "cpu"
        if cpu:
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # otherwise a machine's GPUs are used
        communication_backend = "gloo" if cpu else "nccl"
        if recipe.offload and STRATEGIES[plan.strategy].uses_fsdp and not cpu:
            # Offloaded gradients are reduced on the CPU. These variables make Accelerate expect
            # gloo beside NCCL.
            os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_OFFLOAD_PARAMS="true")
            communication_backend = "cuda:nccl,cpu:gloo"
        if not cpu and lacks_peer_access():
            os.environ.setdefault("NCCL_P2P_DISABLE", "1")
            os.environ.setdefault("NCCL_IB_DISABLE", "1")
        if not cpu:
            for variable, value in FORK_SAFETY.items():
                os.environ.setdefault(variable, value)
        self._timeout = group_timeout(recipe)
        join_process_group(world, communication_backend, self._timeout)
        store = dist.distributed_c10d._get_default_store()  # noqa: SLF001
        if not cpu:
            check_own_device(store, world, device_identity(self.device))
            self.bind_to_numa_node(world, store)
            # From this variable Accelerate and DeepSpeed take the index of the GPU. A task to which
            # Slurm shows one GPU has index 0, whatever its local rank.
            os.environ["LOCAL_RANK"] = str(self.device.index)
        handlers = plugins.pop("kwargs_handlers", [])
        with _peer_access_known():
            self._accelerator = Accelerator(
                cpu=plugins.pop("cpu", cpu),
                mixed_precision="no",  # the loop's autocast is the same under every backend
                gradient_accumulation_steps=1,  # the loop accumulates for ragged micro-batches
                kwargs_handlers=[
                    InitProcessGroupKwargs(
                        backend="gloo" if cpu else "nccl", timeout=self._timeout
                    ),
                    *handlers,
                ],
                **plugins,
            )
        self._turns, self._world = Turns(store, world), world
        self.rank = self._accelerator.process_index
        self.world_size = self._accelerator.num_processes
        actual_kind = self._accelerator.distributed_type
        if (actual_kind, self.world_size, self.rank) != (kind, plan.world_size, world.rank):
            raise WorldError(
                f"The plan expects rank {world.rank} of {plan.world_size} under {kind.value}, but "
                f"Accelerate formed rank {self.rank} of {self.world_size} under "
                f"{actual_kind.value}. Start the run with `launcher run`, or check the versions of "
                "accelerate and torch."
            )

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

    def local_rank_zero_first(self, what: str, action: Callable[[], T]) -> T:
        return self._turns.first(what, self._guarded(action))

    def in_turns(self, what: str, action: Callable[[], T]) -> T:
        return self._turns.one_by_one(what, self._guarded(action))

    def _guarded(self, action: Callable[[], T]) -> Callable[[], T]:
        """Return an action that refuses calls among ranks, if other ranks of the node wait."""
        return refuses_collectives(action) if self._world.local_world_size > 1 else action

    def wait_for_all(self, what: str) -> None:
        self._turns.wait_for_all(what)

    def close(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)
            os.environ["LOCAL_RANK"] = str(self._world.local_rank)
        self._accelerator.end_training()
        reset_accelerate_state()


class DDPBackend(GroupBackend):
    """A backend in which every rank holds the whole model (DistributedDataParallel).

    Ranks average gradients while the backward pass runs. DDP does not broadcast buffers in every
    step, because `BatchNorms.average` averages running statistics when they are needed.
    """

    def __init__(self, recipe: Recipe, plan: Plan, world: World) -> None:
        if plan.device == "cpu":
            lower_debug_level(world)
        super().__init__(
            recipe,
            plan,
            world,
            kind=DistributedType.MULTI_CPU if plan.device == "cpu" else DistributedType.MULTI_GPU,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
            ],
        )
        self._reduces_at_end = recipe.param_dtype == "bf16"
        """Whether gradients are averaged after backward, because DistributedDataParallel averages
        them in the dtype of the weights, and these are in float32."""
        if not recipe.sync_batchnorm:  # whose statistics wait for other ranks in every pass
            self.compute_timer = compute_timer(self.device)

    def prepare(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        make_optimizer: Callable[[nn.Module], Optimizer],
        initial: InitialValues | None = None,
    ) -> tuple[nn.Module, Optimizer]:
        self._module = model = self.place(model, initial)
        return self.prepare_objective(model), make_optimizer(model)

    def prepare_objective(self, model: nn.Module) -> nn.Module:
        super().prepare_objective(model)
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; Accelerate still passes the old name.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            wrapped = self._accelerator.prepare(RecipeForward(self._module))
        if not isinstance(wrapped, DistributedDataParallel):
            raise WorldError(
                f"Accelerate returned {kind_of(wrapped)} instead of a "
                "DistributedDataParallel module, so each rank would train a separate copy of the "
                "model. Check the versions of accelerate and torch."
            )
        self._wrapped = wrapped
        self._used = UsedParameters(self._module, self._sparse)
        if self.device.type == "cpu":
            # Timing every pass is cheap on a CPU. On a GPU it synchronises with the device.
            wrapped._set_ddp_runtime_logging_sample_rate(1)  # noqa: SLF001
        return wrapped

    def forward(self, function: Callable[[Any, Any], Any], model: nn.Module, batch: Any) -> Any:
        return call_inside(model, self._module, function, batch)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return self._module

    def micro_step(
        self, *, last: bool, part: Part | None = None
    ) -> contextlib.AbstractContextManager[Any]:
        last = last and not self._reduces_at_end
        self._averages_gradients = last
        if self.compute_timer is not None:
            self.compute_timer.begin(last=last)
        self._used.begin(accumulates=not last)
        return contextlib.nullcontext() if last else self._wrapped.no_sync()

    def backward(self, loss: Tensor, weight: float | Tensor) -> None:
        super().backward(loss, weight)
        if self._averages_gradients:
            self._used.complete()

    def apply(self, optimizer: Optimizer, max_grad_norm: float | None) -> Tensor:
        if self._reduces_at_end:
            average_gradients(self._with_gradients(optimizer), self.world_size)
        norm = super().apply(optimizer, max_grad_norm)
        self._used.clear()
        return norm

    def communication(self) -> tuple[float, int]:
        """Return the communication time that did not overlap with computation on this rank.

        Returns:
            The total (seconds, number of timed steps) over the turns of all objectives.
        """
        of_objectives = [
            each.own_communication()
            for each in (self, *self._others)
            if isinstance(each, DDPBackend)
        ]
        seconds, steps = zip(*of_objectives, strict=True)
        return sum(seconds), max(steps)

    def own_communication(self) -> tuple[float, int]:
        """Return the communication time that did not overlap with computation, as DDP measures it.

        DDP times every backward pass on CPUs. On GPUs it times the first ten and then one in a
        hundred (torch 2.13, logger.cpp). Its averages are in nanoseconds.

        Returns:
            The total (seconds, number of timed steps).
        """
        logging_data = self._wrapped._get_ddp_logging_data()  # noqa: SLF001
        steps = int(logging_data.get("iteration", 0))
        if self.device.type != "cpu":
            steps = min(steps, _NUM_FIRST_TIMED) + steps // _TIMED_STRIDE
        total, overlapped = (
            logging_data.get(f"avg_backward_{part}_time", 0) for part in _TIMED_PARTS
        )
        return steps * (total - overlapped) / 1e9, steps


def average_gradients(parameters: list[nn.Parameter], world_size: int) -> None:
    """Average gradients over ranks, in their own dtype, a bounded number at a time (collective)."""
    bucket: list[Tensor] = []
    for number, parameter in enumerate(parameters, start=1):
        assert parameter.grad is not None
        bucket.append(parameter.grad)
        if number == len(parameters) or sum(grad.nbytes for grad in bucket) >= _BYTES_PER_SUM:
            flat = torch.cat([grad.reshape(-1) for grad in bucket])
            dist.all_reduce(flat)
            parts = flat.div_(world_size).split([grad.numel() for grad in bucket])
            for grad, part in zip(bucket, parts, strict=True):
                grad.copy_(part.view(grad.shape))
            bucket = []


@contextlib.contextmanager
def _peer_access_known() -> Iterator[None]:
    """Keep Accelerate from starting `nvidia-smi` in every rank in this context.

    It would look for GPUs without peer-to-peer access, for which `lacks_peer_access` has set the
    variables that Accelerate asks for.
    """
    state: Any = accelerate_state
    check, state.check_cuda_p2p_ib_support = state.check_cuda_p2p_ib_support, lambda: True
    try:
        yield
    finally:
        state.check_cuda_p2p_ib_support = check


def reset_accelerate_state() -> None:
    """Reset Accelerate's process-wide state and remove its settings from the environment.

    The plan alone configures Accelerate. The settings of `accelerate launch` were already read into
    the plan, or refused.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001
    PartialState._reset_state()  # noqa: SLF001
    GradientState._reset_state()  # noqa: SLF001
    for name in [name for name in os.environ if name.startswith(_PREFIXES)]:
        del os.environ[name]
