"""Ranks in a process group, through Accelerate: gloo between CPU ranks, NCCL between GPUs.

DistributedDataParallel and FSDP are here; DeepSpeed, which Accelerate starts too, is in
deepspeed.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ParallelismConfig,
    check_cuda_p2p_ib_support,
    fsdp2_prepare_model,
)
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore, Store
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from launcher.engine.backends.base import Backend, whole_names
from launcher.engine.backends.call_order import call_order_of
from launcher.engine.backends.placement import planned_device
from launcher.engine.backends.unused_parameters import UsedParameters
from launcher.engine.ranks.external_store import TIMEOUT, open_store
from launcher.engine.ranks.turns import Turns
from launcher.engine.state.compiled import plain_name
from launcher.environment.world import World
from launcher.errors import WorldError
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.recipe.recipe import Recipe

T = TypeVar("T")

_TIMED_AT_FIRST, _TIMED_STRIDE = 10, 100
_PARTS = "comm", "compute_comm_overlap"


class GroupBackend(Backend):
    """Accelerate forms the process group; what it is told comes from the plan alone.

    Its optimizer, scheduler and DataLoader wrappers are left out: the loop does what they would,
    exactly for any split of the batch.

    Args:
        recipe: What is trained.
        plan: Where.
        world: This process's place.
        kind: What Accelerate has to call it; anything else is refused.
        plugins: Further arguments of `accelerate.Accelerator`.
    """

    def __init__(
        self, recipe: Recipe, plan: Plan, world: World, *, kind: DistributedType, **plugins: Any
    ) -> None:
        super().__init__(recipe, plan, planned_device(recipe, plan, world.local_rank))
        forget_settings()
        cpu = plan.device == "cpu"
        if cpu:
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # also where there are GPUs
        channels = "gloo" if cpu else "nccl"
        if recipe.offload and STRATEGIES[plan.strategy].uses_fsdp and not cpu:
            # What lies on the CPU is summed there: Accelerate then adds gloo to NCCL, as here.
            os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_OFFLOAD_PARAMS="true")
            channels = "cuda:nccl,cpu:gloo"
        if not cpu and not check_cuda_p2p_ib_support():
            # Consumer cards that cannot talk to each other directly; Accelerate insists on both.
            os.environ.setdefault("NCCL_P2P_DISABLE", "1")
            os.environ.setdefault("NCCL_IB_DISABLE", "1")
        meet(world, channels)
        handlers = plugins.pop("kwargs_handlers", [])
        self._accelerator = Accelerator(
            cpu=plugins.pop("cpu", cpu),
            mixed_precision="no",  # the loop's own autocast, the same under every backend
            gradient_accumulation_steps=1,  # the loop's own, exact for ragged micro-batches
            kwargs_handlers=[
                InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=TIMEOUT),
                *handlers,
            ],
            **plugins,
        )
        self._turns = Turns(dist.distributed_c10d._get_default_store(), world)  # noqa: SLF001
        self.rank = self._accelerator.process_index
        self.world_size = self._accelerator.num_processes
        found = self._accelerator.distributed_type
        if (found, self.world_size, self.rank) != (kind, plan.world_size, world.rank):
            raise WorldError(
                f"Planned for rank {world.rank} of {plan.world_size} under {kind.value}; "
                f"Accelerate formed rank {self.rank} of {self.world_size} under {found.value}. "
                "Use `launcher run`, or look at the versions of accelerate and torch."
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

    def in_turn(self, what: str, action: Callable[[], T]) -> T:
        return self._turns.first(what, action)

    def wait_for_all(self, what: str) -> None:
        self._turns.all_there(what)

    def close(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._accelerator.end_training()
        forget_settings()


class DDPBackend(GroupBackend):
    """Every rank holds the whole model; gradients are averaged while backward goes on.

    Buffers are not sent in every step: `BatchNorms.average` does better, when it matters.
    """

    def __init__(self, recipe: Recipe, plan: Plan, world: World) -> None:
        super().__init__(
            recipe,
            plan,
            world,
            kind=DistributedType.MULTI_CPU if plan.device == "cpu" else DistributedType.MULTI_GPU,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
            ],
        )

    def prepare(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        make_optimizer: Callable[[nn.Module], Optimizer],
    ) -> tuple[nn.Module, Optimizer]:
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers, which Accelerate has no other name for yet.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            wrapped = self._accelerator.prepare(self.place(model))
        if not isinstance(wrapped, DistributedDataParallel):
            raise WorldError(
                f"Accelerate prepared a {type(wrapped).__name__} instead of DDP, so the ranks "
                "would train copies of their own."
            )
        self._wrapped = wrapped
        self._used = UsedParameters(wrapped.module)
        if self.device.type == "cpu":
            # Reading a clock is nothing. On a GPU it waits for what has been asked of it.
            wrapped._set_ddp_runtime_logging_sample_rate(1)  # noqa: SLF001
        return wrapped, make_optimizer(wrapped.module)

    def unwrap(self, model: nn.Module) -> nn.Module:
        # Accelerate's own unwrap_model imports DeepSpeed to see whether the model is one of its.
        return self._wrapped.module

    def micro_step(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        self._averages = last
        self._used.begin(accumulates=not last)
        return contextlib.nullcontext() if last else self._wrapped.no_sync()

    def backward(self, loss: Tensor, weight: float | Tensor) -> None:
        super().backward(loss, weight)
        if self._averages:
            self._used.complete()

    def apply(self, optimizer: Optimizer, max_grad_norm: float | None) -> Tensor:
        norm = super().apply(optimizer, max_grad_norm)
        self._used.clear()
        return norm

    def communication(self) -> tuple[float, int]:
        """Return what DDP has timed: by its averages, in nanoseconds, over the timed backwards.

        It times the first ten, and on GPUs then one in a hundred (torch 2.13, logger.cpp).
        """
        said = self._wrapped._get_ddp_logging_data()  # noqa: SLF001
        steps = int(said.get("iteration", 0))
        if self.device.type != "cpu":
            steps = min(steps, _TIMED_AT_FIRST) + steps // _TIMED_STRIDE
        whole, hidden = (said.get(f"avg_backward_{part}_time", 0) for part in _PARTS)
        return steps * (whole - hidden) / 1e9, steps


class FSDPBackend(GroupBackend):
    """Each rank holds a shard of every weight; a block is gathered while it is used (FSDP2).

    Weights are gathered in the plan's precision; gradients are summed in fp32. They are summed in
    every micro-step, because to keep them whole until the last would take the memory that sharding
    saves.
    """

    def __init__(self, recipe: Recipe, plan: Plan, world: World) -> None:
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            FSDPModule,
            MixedPrecisionPolicy,
            OffloadPolicy,
        )

        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise WorldError(
                f"strategy=fsdp needs torch 2.13 or newer, and this is torch {torch.__version__}: "
                "before, parameters that only some ranks use get wrong gradients. Use ddp, zero1 "
                "or zero2."
            )
        cpu = plan.device == "cpu"
        offload = CPUOffloadPolicy(pin_memory=not cpu) if recipe.offload else OffloadPolicy()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="no_wrap",
            cpu_offload=offload,
            cpu_ram_efficient_loading=False,
            state_dict_type="sharded_state_dict",
        )
        super().__init__(
            recipe,
            plan,
            world,
            kind=DistributedType.MULTI_CPU if cpu else DistributedType.FSDP,
            fsdp_plugin=plugin,
        )
        if self._dtype is not None:
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=self._dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        # Accelerate knows FSDP between GPUs alone, and would prepare DDP between CPU ranks; and
        # torch would take a mesh of GPUs where there are any.
        parallelism = ParallelismConfig(dp_shard_size=plan.world_size)
        state = self._accelerator.state
        state.fsdp_plugin = self._plugin = plugin
        state.distributed_type = DistributedType.FSDP
        state.parallelism_config = parallelism
        state.device_mesh = parallelism.get_device_mesh(plan.device)

    def prepare(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        make_optimizer: Callable[[nn.Module], Optimizer],
    ) -> tuple[nn.Module, Optimizer]:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        if blocks:
            self._plugin.auto_wrap_policy = transformer_auto_wrap_policy
            self._plugin.transformer_cls_names_to_wrap = sorted({type(b).__name__ for b in blocks})
        # Not Accelerator.prepare: it wants the optimizer before the weights are what it updates.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Slicing a flattened dim")  # Accelerate does
            sharded = fsdp2_prepare_model(self._accelerator, model.to(self.device))
        if not isinstance(sharded, FSDPModule):
            raise WorldError(
                f"Accelerate prepared a {type(sharded).__name__} instead of FSDP, so the ranks "
                "would train copies of their own."
            )
        # Reduce zeros for what this rank has not used, as the others may have.
        sharded.set_reduce_scatter_unused_params(True)
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.call_order = call_order_of(
            model, units, strategy="fsdp", device=self.device, first=True
        )
        return model, make_optimizer(model)  # sharded in place

    def micro_step(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def norm(self, grads: list[Tensor]) -> Tensor:
        norm = super().norm(grads)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def unwrap(self, model: nn.Module) -> nn.Module:
        # After a forward without a backward, an evaluation, the outermost group stays gathered, and
        # its parameters are other objects than those that the optimizer knows.
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return model

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        whole = {}
        tensors = self.unwrap(model).state_dict()
        for name in whole_names(model):
            tensor = tensors[name]
            gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.rank == 0:
                whole[plain_name(name)] = gathered.cpu()
        return whole


def meet(world: World, backend: str) -> None:
    """Have the ranks talk over the interface that leads to the first, and form their group.

    They meet in a file, or at the address of `world` or in the environment.

    Raises:
        WorldError: Not all ranks come to that address.
    """
    if world.address is not None:
        os.environ.update(_variables(world, *world.address))
    interface = "lo" if world.nodes == 1 else _interface_towards(os.environ["MASTER_ADDR"])
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    if dist.is_initialized():
        return
    if world.store is not None:
        store: Store = FileStore(str(world.store), world.world_size)
    else:
        store = open_store(world)
    dist.init_process_group(
        backend,
        store=store,
        rank=world.rank,
        world_size=world.world_size,
        timeout=TIMEOUT,
    )


def _variables(world: World, host: str, port: int) -> dict[str, str]:
    """Return what Accelerate and torch read of a world, where its launcher has not set it."""
    values = {
        "RANK": world.rank,
        "WORLD_SIZE": world.world_size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_WORLD_SIZE": world.local_world_size,
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in values.items()}


def _interface_towards(host: str) -> str | None:
    """Return the network interface through which this machine reaches `host`, if that is known.

    Left to themselves, gloo takes the one that this machine's own name is on, which Debian puts on
    loopback, and NCCL the first, which may be a bridge for containers.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == own for each in addresses):
            return name
    return None


def forget_settings() -> None:
    """Forget Accelerate's process-wide state and settings, which come from elsewhere than the plan.

    What `accelerate launch` says in the environment was read into the plan, or refused.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001
    PartialState._reset_state()  # noqa: SLF001
    GradientState._reset_state()  # noqa: SLF001
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
