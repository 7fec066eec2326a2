"""DeepSpeed ZeRO, which Accelerate starts, over gloo or NCCL."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import deepspeed.ops
import torch
import torch.distributed as dist
from accelerate.utils import DeepSpeedPlugin, DistributedType
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.optim import Optimizer

from launcher.configs import deepspeed_config
from launcher.engine.backends.accelerate import GroupBackend, forget_settings
from launcher.engine.backends.base import whole_names
from launcher.errors import RecipeError, WorldError
from launcher.plan import Plan
from launcher.recipe import Recipe
from launcher.world import World

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
        self._engine.backward(loss * weight, scale_wrt_gas=False)

    def apply(self, optimizer: Optimizer, max_grad_norm: float | None) -> Tensor:
        self._engine.step()  # clips as configured, steps and clears
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)
        if self.scaler is not None:
            self.scaler.update(finite=bool(norm.isfinite()))
        return norm.to(self.device)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        module = self._engine.module
        parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        whole = {}
        for name in whole_names(module):
            tensor = parameters.get(name, buffers.get(name))
            with GatheredParameters([tensor] if name in parameters else []):
                if self.rank == 0 and tensor is not None:
                    whole[name] = tensor.detach().cpu().clone()
        return whole


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
