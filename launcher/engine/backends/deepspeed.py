"""DeepSpeed ZeRO through Accelerate, over gloo (CPUs) or NCCL (GPUs)."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import deepspeed.ops
import torch
import torch.distributed as dist
from accelerate.utils import DeepSpeedPlugin, DistributedType
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import GatheredParameters, Init
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch._dynamo import OptimizedModule
from torch.optim import Optimizer

import launcher.engine.backends.zero_optimizers  # noqa: F401  # before DeepSpeed imports them
from launcher.engine.backends.accelerate import GroupBackend, reset_accelerate_state
from launcher.engine.backends.base import poison_nonfinite, state_dict_names
from launcher.engine.backends.call_order import watch_call_order
from launcher.engine.backends.default_group import lengthen_timeouts
from launcher.engine.backends.recipe_forward import RecipeForward, call_with_output_hooks
from launcher.engine.backends.reduction_order import OrderedReduction
from launcher.engine.backends.zero_gradients import PartitionedGradients
from launcher.engine.backends.zero_placement import flat_weights
from launcher.engine.optimizers.muon import ShardedMuon
from launcher.engine.optimizers.named import parts_of
from launcher.engine.state.compiled import plain_name
from launcher.engine.state.fragments import Box, Fragment, boxes
from launcher.engine.state.initial_values import InitialValues, fragment, whole
from launcher.engine.state.meta_tensors import show_without_memory
from launcher.engine.state.optimizer_kinds import check_strategy_of
from launcher.engine.state.training_state import (
    STEP,
    Snapshot,
    StateSource,
    check_names,
    check_size,
    empty_state,
    parameters,
    state_names,
    state_values,
)
from launcher.environment.world import World
from launcher.errors import RecipeError, WorldError
from launcher.planning.configs import deepspeed_config, reduce_bucket_size
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.planning.virtual_ranks import Part
from launcher.printable import kind_of
from launcher.recipe.recipe import Recipe

_EMPTY_GRADIENT = "got [0] but expected shape"
"""Part of torch's error about the gradient of a weight that ZeRO-3 had not gathered in forward."""


class DeepSpeedBackend(GroupBackend):
    """A backend that shards by DeepSpeed's ZeRO stages.

    The training loop calls DeepSpeed's engine, but sets the accumulation boundary itself.
    """

    def __init__(self, recipe: Recipe, plan: Plan, world: World) -> None:
        reset_accelerate_state()  # before the plugin reads the settings in the environment
        _prepare_process(plan, world)
        super().__init__(
            recipe,
            plan,
            world,
            kind=DistributedType.DEEPSPEED,
            cpu=False,  # with True, Accelerate would not use DeepSpeed
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
        initial: InitialValues | None = None,
    ) -> tuple[nn.Module, Optimizer]:
        if STRATEGIES[self.plan.strategy].shards_parameters and any(
            isinstance(module, OptimizedModule) for module in model.modules()
        ):
            raise RecipeError(
                "The recipe's model function calls torch.compile, whose wrapper DeepSpeed cannot "
                f"shard under strategy={self.plan.strategy}. Return the model uncompiled and set "
                "compile=true, or use another strategy."
            )
        if initial is not None and STRATEGIES[self.plan.strategy].shards_parameters:
            optimizer = self._partition(model, make_optimizer, initial)
        else:
            optimizer = make_optimizer(self.place(model, initial))
        check_strategy_of(optimizer, self.plan.strategy)
        if not STRATEGIES[self.plan.strategy].shards_parameters:
            for parameter in model.parameters():
                # DeepSpeed sends bytes, for which even a dimension of one element needs stride 1.
                parameter.data = parameter.data.flatten().view(parameter.shape)
        self._set_bucket_size(model)
        # This flag belongs to the process, and an earlier engine may have trained in fp16.
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
        engine, _ = self._accelerator.prepare(RecipeForward(model), optimizer)
        if not isinstance(engine, DeepSpeedEngine):
            raise WorldError(
                f"Accelerate returned {kind_of(engine)} instead of a DeepSpeed engine, so "
                "each rank would train a separate copy of the model. Check the versions of "
                "accelerate, deepspeed and torch."
            )
        lengthen_timeouts(self._timeout)
        self._engine, self._module = engine, model
        self._partitioned_gradients = None
        if self._stage < 3:
            OrderedReduction(engine.optimizer, self.broadcast)
        else:
            self._partitioned_gradients = PartitionedGradients(engine.optimizer, self.rank)
            units = [
                module
                for module in model.modules()
                if any(True for _ in module.parameters(recurse=False))
            ]
            self.call_order = watch_call_order(
                engine.module, units, strategy=self.plan.strategy, device=self.device, first=False
            )
        if self.scaler is not None:
            # DeepSpeed's scaler decides on each rank separately.
            engine.optimizer.torch_autocast_gradscaler = None
        flat = flat_weights(
            engine.optimizer,
            self._stage,
            num_ranks=self.world_size,
            rank=self.rank,
            device=self.device,
        )
        self._flat_weights = dict(flat)
        optimizer = engine.optimizer.optimizer
        for part in parts_of(optimizer):
            if isinstance(part, ShardedMuon):
                part.use_flat(self._flat_weights.values())
        return engine, optimizer

    def own_boxes(self, size: torch.Size) -> list[Box]:
        if not STRATEGIES[self.plan.strategy].shards_parameters:
            return super().own_boxes(size)
        length = -(-size.numel() // self.world_size)
        start = min(length * self.rank, size.numel())
        return list(boxes(size, start, min(start + length, size.numel())))

    def _set_bucket_size(self, model: nn.Module) -> None:
        """Let DeepSpeed allocate buckets of gradients that are not larger than the model."""
        trained = (p for p in parameters(model).values() if p.requires_grad)
        num_trained = sum(_full_size(parameter).numel() for parameter in trained)
        config = self._accelerator.state.deepspeed_plugin.deepspeed_config
        config["zero_optimization"]["reduce_bucket_size"] = reduce_bucket_size(num_trained)

    def _partition(
        self,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module], Optimizer],
        initial: InitialValues,
    ) -> Optimizer:
        """Partition a model on the meta device, fill the partitions, and return its optimizer.

        DeepSpeed partitions a parameter when it has memory, so one after the other gets it.
        """
        show_without_memory(model, self.device)
        optimizer = make_optimizer(model)  # which sees the shapes that partitions do not have
        config = deepspeed_config(self.recipe, self.plan)
        partitioner = Init(module=nn.Module(), config_dict_or_path=config)
        parts = {plain_name(name): whole(buffer) for name, buffer in model.named_buffers()}
        for name, parameter in parameters(model).items():
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
            partitioner._convert_to_deepspeed_param(parameter)  # noqa: SLF001
            parameter.partition()  # type: ignore[attr-defined]
            partition = parameter.ds_tensor.detach().zero_()  # type: ignore[attr-defined]
            start = partition.numel() * self.rank
            parts[name] = fragment(_full_size(parameter), partition, start)
        initial.fill(parts)
        return optimizer

    def forward(self, function: Callable[[Any, Any], Any], model: nn.Module, batch: Any) -> Any:
        return call_with_output_hooks(model, self._module, function, batch)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return self._module

    @contextlib.contextmanager
    def micro_step(self, *, last: bool, part: Part | None = None) -> Any:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor, weight: float | Tensor) -> None:
        if self.scaler is not None:
            self._engine.optimizer.override_loss_scale(self.scaler.factor)
        if self.call_order is not None:
            self.call_order.begin_backward()
        try:
            self._engine.backward(loss * poison_nonfinite(loss, weight), scale_wrt_gas=False)
        except RuntimeError as error:
            if self._stage < 3 or _EMPTY_GRADIENT not in str(error):
                raise
            raise RecipeError(
                f"Forward used weights that strategy={self.plan.strategy} had not gathered: it "
                "gathers those of a module while the module computes, or when they are read as "
                "attributes, and model.parameters() returns them empty. Use another strategy, or "
                "weight_decay in place of a penalty on weights."
            ) from error
        if self._partitioned_gradients is not None:
            last = self._engine.is_gradient_accumulation_boundary()
            self._partitioned_gradients.end_pass(last=last)
        if self.call_order is not None:
            self.call_order.end_pass()

    def apply(self, optimizer: Optimizer, max_grad_norm: float | None) -> Tensor:
        self._engine.step()  # also clips as configured, and clears the gradients
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)
        if self.scaler is not None:
            self.scaler.update(norm.isfinite().cpu())
        return norm.to(self.device)

    def snapshot(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        further: Iterable[tuple[str, Tensor | Fragment]] = (),
    ) -> Snapshot:
        self._link_state()
        values = {
            f"optimizer/{name}/{key}": value
            for _, names, flat in self._flat_groups()
            for key, value in optimizer.state[flat].items()
            if not isinstance(value, Tensor)
            for name in names
        }
        return self.copy_state(self._module, chain(self._own_tensors(optimizer), further), values)

    def updated_weights(self, model: nn.Module) -> list[Tensor]:
        return [flat for _, _, flat in self._flat_groups()]

    def name_updated(
        self, model: nn.Module, values: Sequence[Tensor]
    ) -> Iterator[tuple[str, Tensor | Fragment]]:
        named_parameters = parameters(self._module)
        for (_, names, _), flat in zip(self._flat_groups(), values, strict=True):
            for name in names:
                yield from self._own_parts(name, named_parameters[name], flat)

    def use_updated(self, model: nn.Module) -> None:
        zero = self._engine.optimizer
        if self._stage < 3:
            zero.update_lp_params()
            return
        zero.checkpoint_event_prologue()  # frees gathered weights, which keep their values
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)  # noqa: SLF001
        zero.checkpoint_event_epilogue()  # gathers those that stay gathered

    def adopt_weights(self) -> None:
        if self._stage == 3:
            return
        for parameter, weight in self._flat_weights.items():
            part = weight.part(weight.owner)
            values = parameter.detach().flatten()[weight.start : weight.start + len(part)]
            part.copy_(values)

    def saved_tensors(self, module: nn.Module) -> Iterable[Tensor]:
        return [flat for _, _, flat in self._flat_groups()]

    def restore(self, model: nn.Module, optimizer: Optimizer, source: StateSource) -> None:
        module = self._module
        named_parameters = parameters(module)
        check_names(source, named_parameters)
        for name, parameter in named_parameters.items():
            check_size(source, f"model/{name}", _full_size(parameter))
        for group_index, names, flat in self._flat_groups():
            first, group = names[0], optimizer.param_groups[group_index]
            size = _full_size(named_parameters[first])
            state = empty_state(source, first, flat.detach(), group, size)
            counts = {k: v for k, v in state.items() if v.shape != flat.shape}
            source.read({f"optimizer/{first}/{key}": value for key, value in counts.items()})
            optimizer.state[flat] = state | state_values(source, first)
        self._link_state()
        for name, parameter in named_parameters.items():
            self._fill(name, parameter, source)
        self.restore_module(module, source)

    def _link_state(self) -> None:
        """Link the optimizer's state to DeepSpeed's parameters again.

        DeepSpeed links it once, before the optimizer has created it.
        """
        if self._stage < 3:
            zero = self._engine.optimizer
            zero._hp_optimizer_states_linked = False  # noqa: SLF001
            zero._lazy_init_hp_params_optimizer_state()  # noqa: SLF001

    @property
    def _stage(self) -> int:
        return int(self._engine.zero_optimization_stage())

    def _flat_groups(self) -> Iterator[tuple[int, list[str], Tensor]]:
        """Yield each flat tensor that DeepSpeed makes of parameters.

        Yields:
            The index of the parameter group, the names of the parameters in the flat tensor, and
            this rank's partition of it.
        """
        zero = self._engine.optimizer
        names = {parameter: name for name, parameter in parameters(self._module).items()}
        if self._stage == 3:
            groups, flats = zero.fp16_groups, zero.fp32_partitioned_groups_flat
            group_indices = [zero.sub_group_to_group_id[index] for index in range(len(groups))]
        else:
            groups, flats = zero.bit16_groups, zero.single_partition_of_fp32_groups
            group_indices = list(range(len(groups)))
        for group_index, group, flat in zip(group_indices, groups, flats, strict=True):
            yield group_index, [names[parameter] for parameter in group], flat

    def _own_tensors(self, optimizer: Optimizer) -> Iterator[tuple[str, Tensor | Fragment]]:
        """Yield this rank's parts of weights and optimizer state, without communication.

        Tensors that every rank has are yielded in full, in the same order on every rank.
        """
        named_parameters = parameters(self._module)
        for name, parameter in named_parameters.items():
            if not parameter.requires_grad:
                yield f"model/{name}", self._own_part_of_frozen(parameter)
        for _, names, flat in self._flat_groups():
            for name in names:
                parameter = named_parameters[name]
                yield from self._own_parts(f"model/{name}", parameter, flat)
                for key, value in optimizer.state[flat].items():
                    full_name = f"optimizer/{name}/{key}"
                    if not isinstance(value, Tensor):
                        continue
                    if value.shape == flat.shape:
                        yield from self._own_parts(full_name, parameter, value)
                    else:
                        yield full_name, value

    def _own_parts(
        self, name: str, parameter: nn.Parameter, flat: Tensor
    ) -> Iterator[tuple[str, Tensor | Fragment]]:
        """Yield the part of a tensor that this rank has, if any, or the tensor if it is empty.

        Args:
            name: The name of the tensor.
            parameter: The parameter to which it belongs.
            flat: This rank's partition of a flat tensor that holds it.
        """
        size = _full_size(parameter)
        if not size.numel():
            yield name, flat.new_empty(size)
            return
        weight = self._flat_weights[parameter]
        values = weight.part(flat)
        if values.numel():
            yield name, Fragment(values=values, start=weight.start, size=size)

    def _own_part_of_frozen(self, parameter: nn.Parameter) -> Tensor | Fragment:
        """Return this rank's part of a parameter that is not trained, which may be empty."""
        size = _full_size(parameter)
        if self._stage < 3 or not size.numel():
            return parameter.detach()
        partition = parameter.ds_tensor  # type: ignore[attr-defined]
        start = min(partition.numel() * self.rank, size.numel())
        stop = min(start + partition.numel(), size.numel())
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
            values = parameter.detach().flatten()[start:stop]  # forward may have written to it
        else:
            values = partition.detach()[: stop - start]
        return Fragment(values=values, start=start, size=size)

    def _fill(self, name: str, parameter: nn.Parameter, source: StateSource) -> None:
        """Fill one parameter and its optimizer state from `source` (collective)."""
        size = _full_size(parameter)
        weight_name = f"model/{name}"
        state = {
            key: tensor_name
            for key, tensor_name in state_names(source, name).items()
            if key != STEP and source.size(tensor_name) == size
        }
        tensor_names = [weight_name, *(state.values() if parameter.requires_grad else ())]
        tensors = {
            tensor_name: torch.empty(size, dtype=source.dtype(tensor_name))
            for tensor_name in tensor_names
        }
        source.read(tensors)
        with torch.no_grad(), GatheredParameters([parameter], modifier_rank=0):
            if self.rank == 0 or self._stage < 3:
                parameter.data.copy_(tensors[weight_name])
        if parameter.requires_grad:
            self._scatter(parameter, tensors[weight_name])
            for key, tensor_name in state.items():
                self._scatter(parameter, tensors[tensor_name], key)

    def _scatter(self, parameter: nn.Parameter, full: Tensor, key: str | None = None) -> None:
        """Set this rank's partition of a weight, or of its optimizer state under `key`.

        Args:
            parameter: The parameter.
            full: The unsharded tensor, the same on every rank.
            key: The key of the optimizer state; None sets the weight.
        """
        full = full.to(self.device)
        if self._stage == 3:
            # DeepSpeed's own function for full tensors ignores that the last partition is padded.
            length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = nn.functional.pad(full.flatten(), (0, length * self.world_size - full.numel()))
            partition = padded.narrow(0, length * self.rank, length)
            zero = self._engine.optimizer
            zero.set_local_hp_param(partition, parameter, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, full)
        else:
            safe_set_full_optimizer_state(parameter, full, key)

    def weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        module = self._module
        parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        for name in state_dict_names(module):
            if name in parameters:
                with GatheredParameters([parameters[name]]):
                    yield plain_name(name), parameters[name].detach()
            else:
                yield plain_name(name), buffers[name]

    def full_size(self, tensor: Tensor) -> torch.Size:
        return _full_size(tensor)


def _full_size(parameter: Tensor) -> torch.Size:
    """Return the unsharded shape of a parameter, which ZeRO-3 shows as empty."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


class _Plugin(DeepSpeedPlugin):
    """Accelerate's DeepSpeed plugin without its import of transformers, an optional package."""

    def set_deepspeed_weakref(self) -> None:
        """Skip announcing a ZeRO-3 configuration to transformers.

        Recipes build their models before the configuration exists.
        """


def _prepare_process(plan: Plan, world: World) -> None:
    """Set the process-wide state that DeepSpeed does not read from its configuration."""
    if world.world_size == 1 and "LOCAL_RANK" not in os.environ:
        # A single process that no launcher started: a group of one needs no address.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        dist.init_process_group(
            "gloo" if plan.device == "cpu" else "nccl", store=HashStore(), rank=0, world_size=1
        )
    if plan.device == "cpu":
        # DeepSpeed would compile this operation for about a minute, and gloo does the same work.
        # It asks for no other one, so that the compiler need not be called to find out about all.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
