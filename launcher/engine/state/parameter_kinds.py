"""Parameters that not every strategy and optimizer can train, such as scalars."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from launcher.engine.state.compiled import plain_name
from launcher.errors import RecipeError
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES


def sparse_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters whose gradients are sparse, by name.

    They are the weights of `Embedding(sparse=True)` and `EmbeddingBag(sparse=True)`, as in
    DistributedDataParallel.
    """
    sparse = {
        module.weight
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
    }
    return {
        plain_name(name): parameter
        for name, parameter in model.named_parameters()
        if parameter in sparse and parameter.requires_grad
    }


def check_parameters(model: nn.Module, plan: Plan) -> None:
    """Refuse parameters that the strategy cannot train.

    Raises:
        RecipeError: The model has scalar, complex or empty parameters, parameters with sparse
            gradients, with hooks, of whole numbers, in float64 or trained in 16 bits, and the
            strategy cannot shard them or their gradients, or would convert them.
    """
    strategy = STRATEGIES[plan.strategy]
    for name, parameter in model.named_parameters():
        if strategy.shards:
            _check_sharded(plain_name(name), parameter, plan.strategy)
        _check_hooks(plain_name(name), parameter, plan)
        if strategy.uses_deepspeed:
            _check_for_deepspeed(plain_name(name), parameter, plan.strategy)
    sparse = next(iter(sparse_parameters(model)), None)
    if sparse is None:
        return
    over_nccl = plan.device == "cuda" and plan.world_size > 1
    if strategy.shards or over_nccl:
        where = f"strategy={plan.strategy}" + (" on several GPUs" if over_nccl else "")
        raise RecipeError(
            f"The model's {sparse} has sparse gradients, because of Embedding(sparse=True), and "
            f"{where} reduces dense gradients only. Leave sparse=True out; on one rank or on CPUs, "
            "strategy=ddp takes sparse gradients."
        )


def _check_sharded(name: str, parameter: nn.Parameter, strategy: str) -> None:
    """Refuse scalars and trained complex numbers, for FSDP and DeepSpeed.

    Raises:
        RecipeError: The parameter cannot be sharded.
    """
    if parameter.ndim == 0:
        raise RecipeError(
            f"The model's {name} is a scalar, a parameter of shape (), which strategy={strategy} "
            "cannot shard. Use strategy=ddp, or give it the shape (1,), as in "
            "nn.Parameter(torch.ones(1))."
        )
    if parameter.is_complex() and parameter.requires_grad:
        raise RecipeError(
            f"The model's {name} holds complex numbers ({parameter.dtype}), which "
            f"strategy={strategy} does not train as one rank does. Use strategy=ddp, or keep real "
            "and imaginary parts, as in torch.view_as_complex(weight) in forward."
        )


def _check_hooks(name: str, parameter: nn.Parameter, plan: Plan) -> None:
    """Refuse hooks on the gradient of a parameter which would not be called, or once too often.

    Raises:
        RecipeError: The parameter is split over the ranks; or its hook is called with the sum of
            the gradients of all micro-batches so far, of which there are several in a step.
    """
    # torch has no public list of them.
    of_gradient, of_sum = parameter._backward_hooks, parameter._post_accumulate_grad_hooks  # noqa: SLF001
    if STRATEGIES[plan.strategy].shards_parameters and (of_gradient or of_sum):
        raise RecipeError(
            f"The model's {name} has a hook on its gradient, by register_hook or "
            f"register_post_accumulate_grad_hook, and strategy={plan.strategy} replaces the "
            "parameter by its parts, so that the hook would not be called. Use strategy=ddp, zero1 "
            "or zero2, or change the gradient in forward, as in weight * mask + "
            "(weight * (1 - mask)).detach()."
        )
    if of_sum and (plan.accumulation_steps > 1 or plan.virtual_ranks is not None):
        raise RecipeError(
            f"The model's {name} has a hook by register_post_accumulate_grad_hook, which is called "
            "after each micro-batch with the sum of the gradients so far, so that the step would "
            f"depend on the number of micro-batches (here "
            f"{'virtual_ranks' if plan.virtual_ranks else plan.accumulation_steps}). Use "
            "register_hook, which is called with the gradient of each, or a larger "
            "micro_batch_size."
        )


def _check_for_deepspeed(name: str, parameter: nn.Parameter, strategy: str) -> None:
    """Refuse what is not in float32, and under ZeRO-3 parameters without elements.

    Weights that are not trained may be in bfloat16 and float16.

    Raises:
        RecipeError: DeepSpeed would convert the parameter, or cannot gather it.
    """
    if not (parameter.is_floating_point() or parameter.is_complex()):
        raise RecipeError(
            f"The model's {name} holds whole numbers ({parameter.dtype}), such as weights in 4 "
            f"bits, and under strategy={strategy} DeepSpeed takes every weight for a real number. "
            "Use strategy=ddp or fsdp."
        )
    is_half = parameter.dtype in (torch.bfloat16, torch.float16)
    if parameter.dtype == torch.float64 or (is_half and parameter.requires_grad):
        raise RecipeError(
            f"The model's {name} is in {str(parameter.dtype).removeprefix('torch.')}, and under "
            f"strategy={strategy} DeepSpeed would convert it to float32. Use strategy=ddp or fsdp, "
            "or a float32 model."
        )
    if not parameter.numel() and STRATEGIES[strategy].shards_parameters:
        raise RecipeError(
            f"The model's {name} has no elements (its shape is {tuple(parameter.shape)}), and "
            f"under strategy={strategy} DeepSpeed cannot gather it. Leave it out of the model, or "
            "use another strategy."
        )


def check_batch_norm_precision(model: nn.Module, precision: str) -> None:
    """Refuse BatchNorm under FSDP in mixed precision on CPUs.

    FSDP gathers weights in that precision, and torch's kernel for CPUs takes them only in the
    precision of the running statistics, fp32.

    Raises:
        RecipeError: The model has BatchNorm with weights and running statistics.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.affine and module.track_running_stats:
            raise RecipeError(
                f"On CPUs, strategy=fsdp with precision={precision} cannot run BatchNorm "
                f"({plain_name(name)}), because torch takes its weights in fp32 only there. Use "
                "precision=fp32, strategy=ddp or zero2, or GroupNorm."
            )


def keep_in_bfloat16(model: nn.Module) -> None:
    """Round the float32 weights of a model to bfloat16, in place; buffers stay as they are.

    Gradients stay in float32 (`keep_gradients_in_float32`), so that sums over micro-batches and
    ranks are as exact as those for weights in float32.

    Raises:
        RecipeError: The model has BatchNorm, whose kernels need weights like its statistics.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.affine and module.track_running_stats:
            raise RecipeError(
                f"param_dtype=bf16 cannot run BatchNorm ({plain_name(name)}), because torch takes "
                "its weights in fp32 only, the dtype of its statistics. Use GroupNorm or "
                "LayerNorm, or leave param_dtype out."
            )
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.bfloat16()


def keep_gradients_in_float32(model: nn.Module) -> None:
    """Let autograd accumulate the gradients of bfloat16 weights in float32."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.grad_dtype = torch.float32


def zero_gradient(parameter: Tensor) -> Tensor:
    """Return a gradient of zeros for a parameter, in the dtype of its gradients."""
    return torch.zeros_like(parameter, dtype=parameter.grad_dtype or parameter.dtype)


def gradient_values(parameter: nn.Parameter) -> Tensor:
    """Return the values of a parameter's gradient; a sparse gradient is coalesced in place.

    The values of a coalesced gradient have the norm of the dense one.
    """
    gradient = parameter.grad
    assert gradient is not None
    if not gradient.is_sparse:
        return gradient
    parameter.grad = gradient.coalesce()
    return parameter.grad._values()  # noqa: SLF001  # `values` returns a copy that is not written


def sparse_zeros(parameter: Tensor) -> Tensor:
    """Return a sparse gradient of an embedding's weight in which no row was used."""
    indices = torch.empty(1, 0, dtype=torch.int64, device=parameter.device)
    values = parameter.new_empty(0, *parameter.shape[1:])
    return torch.sparse_coo_tensor(indices, values, parameter.shape, check_invariants=False)


def norm_of(gradient: Tensor) -> Tensor:
    """Return the 2-norm of a gradient, dense or sparse, in fp32."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.linalg.vector_norm(values, dtype=torch.float32)
