"""DeepSpeed ZeRO, which Accelerate starts, over gloo or NCCL."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import deepspeed.ops
import torch
import torch.distributed as dist
from accelerate.utils import DeepSpeedPlugin, DistributedType
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.optim import Optimizer

from launcher.engine.backends.accelerate import GroupBackend, forget_settings
from launcher.engine.backends.base import poison_nonfinite, whole_names
from launcher.engine.backends.call_order import call_order_of
from launcher.engine.backends.reduction_order import OrderedReduction
from launcher.engine.state.compiled import plain_name
from launcher.engine.state.module_state import own_buffers, own_extra_state
from launcher.engine.state.training_state import (
    STEP,
    Snapshot,
    StateSource,
    check_names,
    check_size,
    empty_state,
    keep,
    parameters,
    state_names,
    state_values,
)
from launcher.environment.world import World
from launcher.errors import RecipeError, WorldError
from launcher.planning.configs import deepspeed_config
from launcher.planning.plan import Plan
from launcher.recipe.recipe import Recipe

_WHOLE_TENSORS = ("Adafactor", "Muon", "SparseAdam")
"""Optimizers of torch that look at the shape of a weight; ZeRO shows them pieces of a flat row."""


class DeepSpeedBackend(GroupBackend):
    """DeepSpeed shards by its ZeRO stage; the loop calls its engine, with a boundary of its own."""

    def __init__(self, recipe: Recipe, plan: Plan, world: World) -> None:
        forget_settings()  # the plugin would read them
        _prepare_process(plan, world)
        super().__init__(
            recipe,
            plan,
            world,
            kind=DistributedType.DEEPSPEED,
            cpu=False,  # with True Accelerate would leave DeepSpeed out
            deepspeed_plugin=_Plugin(
                hf_ds_config=deepspeed_config(recipe, plan),
                gradient_accumulation_steps=plan.accumulation_steps,
                zero3_init_flag=False,
            ),
        )
        self._accelerator.gradient_accumulation_steps = plan.accumulation_steps

    def prepare(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        make_optimizer: Callable[[nn.Module], Optimizer],
    ) -> tuple[nn.Module, Optimizer]:
        if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
            raise RecipeError(
                f"The recipe's model has float64 weights, and under strategy={self.plan.strategy} "
                "DeepSpeed would make them float32. Use strategy=ddp or fsdp, or a float32 model."
            )
        optimizer = make_optimizer(model.to(self.device))
        if type(optimizer).__name__ in _WHOLE_TENSORS:
            raise RecipeError(
                f"strategy={self.plan.strategy} gives the optimizer pieces of flattened weights, "
                f"and {type(optimizer).__name__} needs them in their shape. Use strategy=fsdp or "
                "ddp, or an optimizer that works element by element, such as adamw() or sgd()."
            )
        # Of the process rather than of the engine: an earlier one may have trained in fp16.
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
        engine, _ = self._accelerator.prepare(model, optimizer)
        if not isinstance(engine, DeepSpeedEngine):
            raise WorldError(
                f"Accelerate prepared a {type(engine).__name__} instead of a DeepSpeed engine, so "
                "the ranks would train copies of their own."
            )
        self._engine = engine
        if self._stage < 3:
            OrderedReduction(engine.optimizer, self.broadcast)
        else:
            gathered = [
                each
                for each in model.modules()
                if any(True for _ in each.parameters(recurse=False))
            ]
            self.call_order = call_order_of(
                model, gathered, strategy=self.plan.strategy, device=self.device, first=False
            )
        if self.scaler is not None:
            engine.optimizer.torch_autocast_gradscaler = None  # decides on each rank by itself
        return engine, engine.optimizer.optimizer

    def unwrap(self, model: nn.Module) -> nn.Module:
        return self._engine.module

    @contextlib.contextmanager
    def micro_step(self, *, last: bool) -> Any:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor, weight: float | Tensor) -> None:
        if self.scaler is not None:
            self._engine.optimizer.override_loss_scale(self.scaler.factor)
        self._engine.backward(loss * poison_nonfinite(loss, weight), scale_wrt_gas=False)
        if self.call_order is not None:
            self.call_order.end_pass()

    def apply(self, optimizer: Optimizer, max_grad_norm: float | None) -> Tensor:
        self._engine.step()  # clips as configured, steps and clears
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)
        if self.scaler is not None:
            self.scaler.update(finite=bool(norm.isfinite()))
        return norm.to(self.device)

    def snapshot(self, model: nn.Module, optimizer: Optimizer) -> Snapshot:
        self._link_state()
        module = self._engine.module
        tensors = keep(self._whole_tensors(optimizer), self.rank, self.world_size)
        values = {
            f"optimizer/{name}/{key}": value
            for _, names, flat in self._flat_groups()
            for key, value in optimizer.state[flat].items()
            if not isinstance(value, Tensor)
            for name in names
        }
        return Snapshot(
            tensors=tensors | own_buffers(module, self.rank, self.gather),
            values=values,
            extra=own_extra_state(module, self.gather),
        )

    def saved_tensors(self, module: nn.Module) -> Iterable[Tensor]:
        return [flat for _, _, flat in self._flat_groups()]

    def restore(self, model: nn.Module, optimizer: Optimizer, source: StateSource) -> None:
        module = self._engine.module
        own = parameters(module)
        check_names(source, own)
        for name, parameter in own.items():
            check_size(source, f"model/{name}", _whole_size(parameter))
        for number, names, flat in self._flat_groups():
            first, group = names[0], optimizer.param_groups[number]
            size = _whole_size(own[first])
            state = empty_state(source, first, flat.detach(), group, size)
            counts = {k: v for k, v in state.items() if v.shape != flat.shape}
            source.read({f"optimizer/{first}/{key}": value for key, value in counts.items()})
            optimizer.state[flat] = state | state_values(source, first)
        self._link_state()
        for name, parameter in own.items():
            self._fill(name, parameter, source)
        self.restore_module(module, source)

    def _link_state(self) -> None:
        """Have DeepSpeed look again for what the optimizer keeps; it does so before it is there."""
        if self._stage < 3:
            zero = self._engine.optimizer
            zero._hp_optimizer_states_linked = False  # noqa: SLF001
            zero._lazy_init_hp_params_optimizer_state()  # noqa: SLF001

    @property
    def _stage(self) -> int:
        return int(self._engine.zero_optimization_stage())

    def _flat_groups(self) -> Iterator[tuple[int, list[str], Tensor]]:
        """Yield what lies in one flat row: its group, its parameters, this rank's piece of it."""
        zero = self._engine.optimizer
        names = {parameter: name for name, parameter in parameters(self._engine.module).items()}
        if self._stage == 3:
            groups, flats = zero.fp16_groups, zero.fp32_partitioned_groups_flat
            numbers = [zero.sub_group_to_group_id[number] for number in range(len(groups))]
        else:
            groups, flats = zero.bit16_groups, zero.single_partition_of_fp32_groups
            numbers = list(range(len(groups)))
        for number, group, flat in zip(numbers, groups, flats, strict=True):
            yield number, [names[parameter] for parameter in group], flat

    def _whole_tensors(self, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
        """Yield weights and optimizer state, each put together for the moment (collective)."""
        own = parameters(self._engine.module)
        for name, parameter in own.items():
            if not parameter.requires_grad:
                with GatheredParameters([parameter]):
                    yield f"model/{name}", parameter.detach()
        for _, names, flat in self._flat_groups():
            for name in names:
                yield f"model/{name}", safe_get_full_fp32_param(own[name])
                for key, value in optimizer.state[flat].items():
                    if isinstance(value, Tensor):
                        whole = value.shape == flat.shape
                        yield (
                            f"optimizer/{name}/{key}",
                            safe_get_full_optimizer_state(own[name], key) if whole else value,
                        )

    def _fill(self, name: str, parameter: nn.Parameter, source: StateSource) -> None:
        """Fill one parameter and what the optimizer keeps of it (collective)."""
        size = _whole_size(parameter)
        full = f"model/{name}"
        kept = state_names(source, name)
        keys = {k: f for k, f in kept.items() if k != STEP and source.size(f) == size}
        wanted = [full, *(keys.values() if parameter.requires_grad else ())]
        read = {each: torch.empty(size, dtype=source.dtype(each)) for each in wanted}
        source.read(read)
        with torch.no_grad(), GatheredParameters([parameter], modifier_rank=0):
            if self.rank == 0 or self._stage < 3:
                parameter.data.copy_(read[full])
        if parameter.requires_grad:
            self._set_whole(parameter, read[full])
            for key, each in keys.items():
                self._set_whole(parameter, read[each], key)

    def _set_whole(self, parameter: nn.Parameter, whole: Tensor, key: str | None = None) -> None:
        """Give every rank its piece of a weight, or of what the optimizer keeps of it."""
        whole = whole.to(self.device)
        if self._stage == 3:
            # DeepSpeed's own function for the whole forgets that the last piece may be padded.
            length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = nn.functional.pad(
                whole.flatten(), (0, length * self.world_size - whole.numel())
            )
            piece = padded.narrow(0, length * self.rank, length)
            zero = self._engine.optimizer
            zero.set_local_hp_param(piece, parameter, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, whole)
        else:
            safe_set_full_optimizer_state(parameter, whole, key)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        module = self._engine.module
        parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        whole = {}
        for name in whole_names(module):
            tensor = parameters.get(name, buffers.get(name))
            with GatheredParameters([tensor] if name in parameters else []):
                if self.rank == 0 and tensor is not None:
                    whole[plain_name(name)] = tensor.detach().cpu().clone()
        return whole


def _whole_size(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter, also where ZeRO-3 shows it as empty."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


class _Plugin(DeepSpeedPlugin):
    """Accelerate's, without its look for transformers, which need not be installed."""

    def set_deepspeed_weakref(self) -> None:
        """Tell transformers of a ZeRO-3 configuration: recipes build their models before."""


def _prepare_process(plan: Plan, world: World) -> None:
    """Set what DeepSpeed reads from the process rather than from its configuration."""
    if world.world_size == 1 and "LOCAL_RANK" not in os.environ:
        # Alone, by hand: a group of one that needs no address.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        dist.init_process_group(
            "gloo" if plan.device == "cpu" else "nccl", store=HashStore(), rank=0, world_size=1
        )
    if plan.device == "cpu":
        # It would be compiled when first used, for a minute; gloo does what it does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
