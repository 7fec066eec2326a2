"""FSDP2 through Accelerate: each rank holds a shard of every weight.

With several groups of ranks, each group holds a copy of the model (HSDP): weights are gathered
within a group, and gradients are then added over the groups.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
    fsdp2_prepare_model,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from launcher.engine.backends.accelerate import GroupBackend
from launcher.engine.backends.call_order import watch_call_order
from launcher.engine.backends.default_group import lengthen_timeouts
from launcher.engine.backends.parallel_plan import find_styles
from launcher.engine.backends.recipe_forward import NamedRecipeForward, call_with_output_hooks
from launcher.engine.backends.tensor_parallel import (
    WholeGradients,
    split_model,
    whole_gradient_error,
)
from launcher.engine.state.compiled import plain_name
from launcher.engine.state.fragments import Box
from launcher.engine.state.initial_values import InitialValues, parts_of
from launcher.engine.state.meta_tensors import allocate_shards
from launcher.engine.state.optimizer_kinds import check_strategy_of
from launcher.engine.state.parameter_kinds import (
    check_batch_norm_precision,
    keep_gradients_in_float32,
)
from launcher.engine.state.sharded_tensors import (
    TENSOR_PARALLEL,
    gather_full,
    norm_over_ranks,
)
from launcher.environment.world import World
from launcher.errors import RecipeError, WorldError
from launcher.planning.fsdp_messages import defers_sums
from launcher.planning.plan import Plan
from launcher.planning.virtual_ranks import Part
from launcher.printable import kind_of
from launcher.recipe.recipe import Recipe

_MIXED = "got mixed torch.Tensor and DTensor"
"""Part of torch's error about an operation on a sharded and a whole tensor."""

_MIXED_NORM = "mixed dtype (CPU): expect parameter"
"""Part of torch's error about a norm whose weights are in 16 bits and whose input is not."""


class FSDPBackend(GroupBackend):
    """A backend in which each rank holds a shard of every weight (FSDP2).

    The weights of a block are gathered while the block is used. Weights are gathered in the plan's
    precision, and gradients are reduced in fp32 unless the recipe says otherwise. Gradients are
    reduced in every micro-step: keeping them unsharded until the last one needs the memory that
    sharding saves, so the recipe has to ask for it. Copies of the model add their shards of the
    gradients in the last micro-step alone, which needs no more memory.
    """

    def __init__(self, recipe: Recipe, plan: Plan, world: World) -> None:
        _check_numbering(plan, world)
        cpu = plan.device == "cpu"
        offload = CPUOffloadPolicy(pin_memory=not cpu) if recipe.offload else OffloadPolicy()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=recipe.reshard_after_forward,
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
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=self._dtype,
            reduce_dtype=self._reduce_dtype,
            cast_forward_inputs=False,
        )
        # Accelerate supports FSDP only on GPUs and would prepare DDP for CPU ranks, and torch would
        # build the device mesh of GPUs if the machine has any.
        self._copies = plan.data_ranks // plan.shards
        """The number of groups of ranks that each hold all weights."""
        self._defers_sums = defers_sums(recipe.settings())
        parallelism = ParallelismConfig(
            dp_replicate_size=self._copies,
            dp_shard_size=plan.shards,
            tp_size=plan.tensor_parallel,
            cp_size=1,
        )
        state = self._accelerator.state
        state.fsdp_plugin = self._plugin = plugin
        state.distributed_type = DistributedType.FSDP
        state.parallelism_config = parallelism
        state.device_mesh = self._mesh = (
            parallelism.get_device_mesh(plan.device)
            if plan.data_ranks > 1
            else init_device_mesh(
                plan.device,
                (1, plan.tensor_parallel),
                mesh_dim_names=("dp_shard_cp", TENSOR_PARALLEL),
            )
        )
        lengthen_timeouts(self._timeout)

    @property
    def _reduce_dtype(self) -> torch.dtype | None:
        """Return the dtype of gradients that are reduced; None is that of the weights."""
        if self.recipe.reduce_dtype == "bf16":
            return torch.bfloat16
        return None if self._dtype is None else torch.float32

    def prepare(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        make_optimizer: Callable[[nn.Module], Optimizer],
        initial: InitialValues | None = None,
    ) -> tuple[nn.Module, Optimizer]:
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        if self.device.type == "cpu" and self._dtype is not None:
            check_batch_norm_precision(model, self.plan.precision)
        if blocks:
            self._plugin.auto_wrap_policy = transformer_auto_wrap_policy
            self._plugin.transformer_cls_names_to_wrap = sorted({type(b).__name__ for b in blocks})
        # Accelerator.prepare needs the optimizer before the weights are sharded, so it is not used.
        with warnings.catch_warnings():
            # Accelerate itself slices a flattened mesh dimension.
            warnings.filterwarnings("ignore", message="Slicing a flattened dim")
            model = model.to(self.device) if initial is None else model
            attributes = _attributes(model)
            if self.plan.tensor_parallel > 1:
                split_model(model, self._parallel_styles(model), self._mesh[TENSOR_PARALLEL])
            wrapped: nn.Module = NamedRecipeForward(model)
            sharded = fsdp2_prepare_model(self._accelerator, wrapped)
        if not isinstance(sharded, FSDPModule):
            raise WorldError(
                f"Accelerate returned {kind_of(sharded)} instead of an FSDP module, so "
                "each rank would train a separate copy of the model. Check the versions of "
                "accelerate and torch."
            )
        if initial is not None:
            on_host = self.recipe.offload is not None
            allocate_shards(wrapped, torch.device("cpu") if on_host else self.device, self.device)
            initial.fill(parts_of(model))
        _give_attributes(model, attributes)  # by which optimizers may choose their groups
        # Other ranks may use parameters that this rank does not, so it must reduce zeros for them.
        sharded.set_reduce_scatter_unused_params(True)
        units = [module for module in wrapped.modules() if isinstance(module, FSDPModule)]
        self._units: Sequence[FSDPModule] = units
        """The modules whose weights are gathered together: the whole model, and its blocks."""
        for unit in units:
            _check_one_dtype(unit, model)
        _prefetch(units, self.recipe.prefetch_blocks)
        self.call_order = watch_call_order(
            wrapped, units, strategy="fsdp", device=self.device, first=True
        )
        self._module = model
        self._whole_gradients = self._watch_whole_gradients()
        if self.recipe.param_dtype == "bf16":
            keep_gradients_in_float32(model)
            for unit in units:
                keep_reduced_in_float32(unit)
        optimizer = make_optimizer(model)  # of the weights that were sharded in place
        check_strategy_of(optimizer, "fsdp")
        return wrapped, optimizer

    def _watch_whole_gradients(self) -> WholeGradients | None:
        if self.plan.tensor_parallel == 1:
            return None
        return WholeGradients(self._module, self._mesh[TENSOR_PARALLEL])

    def prepare_objective(self, model: nn.Module) -> nn.Module:
        wrapped = super().prepare_objective(model)
        self._whole_gradients = self._watch_whole_gradients()
        return wrapped

    def require_gradients(
        self, model: nn.Module, trained: Iterable[nn.Parameter], others: Iterable[nn.Parameter]
    ) -> None:
        self.unwrap(model)
        super().require_gradients(model, trained, others)
        for unit in self._units:
            require_gradients_like_shards(unit)

    def own_boxes(self, size: torch.Size) -> list[Box]:
        if not size or self.plan.tensor_parallel > 1:
            return super().own_boxes(size)
        rows = -(-size[0] // self.plan.shards)
        start = min(rows * (self.rank % self.plan.shards), size[0])
        sizes = torch.Size((min(rows, size[0] - start), *size[1:]))
        return [Box(torch.Size((start, *(0 for _ in size[1:]))), sizes, 0)]

    def _parallel_styles(self, model: nn.Module) -> dict[str, str]:
        return find_styles(model, self.recipe.tensor_parallel_plan, self.plan.tensor_parallel)

    def forward(self, function: Callable[[Any, Any], Any], model: nn.Module, batch: Any) -> Any:
        try:
            return call_with_output_hooks(model, self._module, function, batch)
        except RuntimeError as error:
            if _MIXED in str(error):
                raise _sharded_weights_error() from error
            if _MIXED_NORM in str(error):
                raise RecipeError(
                    f"On CPUs, strategy=fsdp with precision={self.plan.precision} gathers the "
                    "weights of norms in that precision, and torch does not take them with an "
                    "input in fp32. Convert the input, as in norm(x.to(norm.weight.dtype)), or use "
                    "precision=fp32, strategy=ddp or zero2."
                ) from error
            raise

    def backward(self, loss: Tensor, weight: float | Tensor) -> None:
        if isinstance(loss, DTensor):
            raise _sharded_weights_error()
        super().backward(loss, weight)

    def micro_step(
        self, *, last: bool, part: Part | None = None
    ) -> contextlib.AbstractContextManager[Any]:
        if self.recipe.accumulate_unsharded:
            for unit in self._units:
                unit.set_requires_gradient_sync(last, recurse=False)
        if self._copies > 1 and self._defers_sums:
            for unit in self._units:
                unit.set_requires_all_reduce(last, recurse=False)
        return contextlib.nullcontext()

    def apply(self, optimizer: Optimizer, max_grad_norm: float | None) -> Tensor:
        differing = None if self._whole_gradients is None else self._whole_gradients.differing()
        if differing is not None and any(found := self.gather(differing)):
            raise whole_gradient_error(next(filter(None, found)))
        return super().apply(optimizer, max_grad_norm)

    def norm(self, grads: list[Tensor]) -> Tensor:
        if grads and self.plan.tensor_parallel > 1:
            return norm_over_ranks(grads, self.sum, self.world_size)
        norm = super().norm(grads)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def unwrap(self, model: nn.Module) -> nn.Module:
        # After a forward pass without a backward pass, as in an evaluation, the outermost group
        # stays gathered, and its parameters are not the objects that the optimizer updates.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return self._module

    def weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().weights(model):
            yield name, gather_full(tensor) if isinstance(tensor, DTensor) else tensor


def _sharded_weights_error() -> RecipeError:
    return RecipeError(
        "Forward or loss used weights that strategy=fsdp had not gathered: it gathers those of a "
        "block while the block computes, and model.parameters() has only parts of the others. Use "
        "strategy=ddp, zero1 or zero2, or weight_decay in place of a penalty on weights."
    )


def _check_one_dtype(unit: Any, model: nn.Module) -> None:
    """Refuse trained weights of several dtypes, whose gradients FSDP would reduce together.

    Raises:
        RecipeError: An FSDP module has some; the message names two of them.
    """
    names = {weight: plain_name(name) for name, weight in model.named_parameters()}
    for group in unit._get_fsdp_state()._fsdp_param_groups:  # noqa: SLF001
        weights = [parameter.sharded_param for parameter in group.fsdp_params]
        by_dtype = {weight.dtype: names[weight] for weight in weights if weight.requires_grad}
        if len(by_dtype) > 1:
            (one, first), (other, second) = list(by_dtype.items())[:2]
            raise RecipeError(
                f"The model trains {first} in {_shown(one)} and {second} in {_shown(other)}, and "
                "strategy=fsdp reduces the gradients of both together. Give the trained weights "
                "one dtype, or use strategy=ddp."
            )


def _shown(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require_gradients_like_shards(unit: Any) -> None:
    """Let gathered parameters of an FSDP module require a gradient where their shards do.

    FSDP passes this on when it gathers them. In a backward pass it also reduces zeros for
    parameters that are not used, which it has not gathered then. And it has looked up the dtypes of
    gradients among the parameters that required one in the first forward (torch 2.13).
    """
    for group in unit._get_fsdp_state()._fsdp_param_groups:  # noqa: SLF001
        for parameter in group.fsdp_params:
            if hasattr(parameter, "_unsharded_param"):
                requires_grad = parameter.sharded_param.requires_grad
                parameter._unsharded_param.requires_grad_(requires_grad)  # noqa: SLF001
        group._init_mp_dtypes()  # noqa: SLF001


def _attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the attributes that the recipe has given to parameters, by the parameter's name."""
    return {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}


def _give_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the sharded parameters of a model the attributes that the whole ones had."""
    for name, parameter in model.named_parameters():
        for key, value in attributes[name].items():
            if not hasattr(parameter, key):
                setattr(parameter, key, value)


def keep_reduced_in_float32(unit: Any) -> None:
    """Keep the gradients of an FSDP module in the dtype in which they were reduced.

    FSDP would round them to the dtype of the weights after each micro-step.
    """
    for group in unit._get_fsdp_state()._fsdp_param_groups:  # noqa: SLF001
        prepare = group._init_mp_dtypes  # noqa: SLF001

        def prepare_and_keep(group: Any = group, prepare: Callable[[], None] = prepare) -> None:
            prepare()
            if group._orig_dtype is not None:  # noqa: SLF001
                group._orig_dtype = torch.float32  # noqa: SLF001

        group._init_mp_dtypes = prepare_and_keep  # noqa: SLF001


def _check_numbering(plan: Plan, world: World) -> None:
    """Refuse ranks that are not numbered node by node, if groups of them are to be on one node.

    Raises:
        WorldError: A group would consist of ranks of several nodes.
    """
    has_groups = plan.tensor_parallel > 1 or plan.shards < plan.data_ranks
    if not has_groups or plan.nodes == 1:
        return
    if world.rank % plan.nproc_per_node != world.local_rank:
        raise WorldError(
            f"The plan spreads weights over {plan.shards * plan.tensor_parallel} neighbouring "
            "ranks, and ranks are not "
            f"numbered node by node: rank {world.rank} has the local rank {world.local_rank} of "
            f"{plan.nproc_per_node}. Start the run with `launcher run` or with `srun "
            "--distribution=block`, or use shard=all."
        )


def _prefetch(units: Sequence[FSDPModule], number: int) -> None:
    """Let each unit gather the weights of the next ones in forward, and the previous in backward.

    Args:
        units: The whole model, which is gathered throughout, and its blocks in the order in which
            forward calls them.
        number: Blocks to gather ahead; 0 leaves it to FSDP.
    """
    if not number:
        return
    for index, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(list(units[index + 1 : index + 1 + number]))
        stop = index or len(units)  # the backward of the model calls that of its last block
        unit.set_modules_to_backward_prefetch(list(units[max(stop - number, 1) : stop][::-1]))
