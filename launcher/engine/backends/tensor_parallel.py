"""Splits layers over the ranks of a tensor-parallel group, with torch's DTensor.

Each rank holds a part of a split module's weights (Megatron-LM, arXiv:1909.08053). A module that is
split by its outputs gives each rank its own heads or features, and one that is split by its inputs
adds what the ranks have computed from theirs. Between modules there are plain tensors: a whole
activation is the same on all ranks of the group, and so are its gradient and everything that is
computed from it. The gradients of weights that every rank has whole are therefore equal, without
an exchange.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from launcher.engine.backends.parallel_plan import UNSPLIT
from launcher.engine.state.compiled import plain_name
from launcher.engine.state.sharded_tensors import TENSOR_PARALLEL
from launcher.errors import RecipeError

_WHOLE, _LAST = Replicate(), Shard(-1)

_TOLERANCE = 1e-3
"""Relative difference of two norms that rounding alone does not explain."""


@dataclass(frozen=True, kw_only=True)
class _Split:
    """How a module is split."""

    weights: Mapping[str, Placement]
    """How its parameters are spread over the ranks, by name."""

    given: Placement = _WHOLE
    """How the input is spread that the module is called with."""

    needed: Placement = _WHOLE
    """How its input must be spread."""

    output: Placement = _WHOLE
    """How its output is spread."""


_COLWISE = {"weight": Shard(0), "bias": Shard(0)}
_ROWWISE = {"weight": Shard(1), "bias": _WHOLE}
_BY_ROWS = _Split(weights={"weight": Shard(0)})
_LINEAR = {
    "colwise": _Split(weights=_COLWISE, output=_LAST),
    "colwise_rep": _Split(weights=_COLWISE),
    "colwise_gather_output": _Split(weights=_COLWISE),
    "rowwise": _Split(weights=_ROWWISE, given=_LAST, needed=_LAST),
    "rowwise_rep": _Split(weights=_ROWWISE, needed=_LAST),
    "rowwise_split_input": _Split(weights=_ROWWISE, needed=_LAST),
}
_EMBEDDING = {
    "colwise": _Split(weights={"weight": Shard(1)}, output=_LAST),
    "colwise_rep": _Split(weights={"weight": Shard(1)}),
    "colwise_gather_output": _Split(weights={"weight": Shard(1)}),
    "embedding_colwise": _Split(weights={"weight": Shard(1)}),
    "rowwise": _BY_ROWS,
    "rowwise_rep": _BY_ROWS,
    "rowwise_split_input": _BY_ROWS,
    "embedding_rowwise": _BY_ROWS,
}


def split_model(model: nn.Module, styles: Mapping[str, str], mesh: DeviceMesh) -> None:
    """Split a model's modules in place over the ranks of a tensor-parallel group.

    Each rank keeps its part of the weights that it has, which must be the same on all ranks.

    Args:
        model: The recipe's model.
        styles: Styles by the names of modules, as `find_styles` returns them.
        mesh: The ranks of the group, a mesh of one dimension.

    Raises:
        RecipeError: Two modules share a weight, and the plan splits it differently.
    """
    parts: dict[nn.Parameter, tuple[nn.Parameter, Placement, str]] = {}
    for name, style in styles.items():
        module = model.get_submodule(name)
        if style == "replicated_with_grad_allreduce":
            _sum_gradients(module, mesh)
        if style in UNSPLIT:
            continue
        split = (_EMBEDDING if isinstance(module, nn.Embedding) else _LINEAR)[style]
        for key, weight in list(module.named_parameters(recurse=False)):
            placement = split.weights[key]
            if weight not in parts:
                part = distribute_tensor(weight, mesh, [placement], src_data_rank=None)
                parameter = nn.Parameter(part, requires_grad=weight.requires_grad)
                parts[weight] = parameter, placement, name
            parameter, chosen, other = parts[weight]
            if chosen != placement:
                raise _sharing_error(other, name)
            module.register_parameter(key, parameter)
        _exchange(module, split, mesh)
    for name, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            if weight in parts:
                raise _sharing_error(parts[weight][2], name)


def _sharing_error(one: str, other: str) -> RecipeError:
    one, other = (plain_name(f"{name}.").removesuffix(".") for name in (one, other))
    return RecipeError(
        f"tensor_parallel: {one} and {other} share a weight, and the plan splits it differently in "
        "the two. Give both a style that splits the same side, such as embedding_rowwise and "
        "colwise_rep for an embedding and a head, or neither."
    )


def _exchange(module: nn.Module, split: _Split, mesh: DeviceMesh) -> None:
    """Let a module take and return plain tensors, and exchange what its split needs."""

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tensor = args[0]
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, mesh, [split.given], run_check=False)
        if split.given != split.needed:
            tensor = tensor.redistribute(placements=[split.needed])
        return (tensor, *args[1:])

    def leave(_: nn.Module, __: Any, output: Any) -> Any:
        return output.redistribute(placements=[split.output]).to_local()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


class _SumGradient(torch.autograd.Function):
    """The same tensor, whose gradient is summed over the ranks of a group."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def _sum_gradients(module: nn.Module, mesh: DeviceMesh) -> None:
    """Sum the gradients of a module that each rank calls with its own heads."""
    group, sum_gradient = mesh.get_group(), _SumGradient.apply
    held: dict[str, nn.Parameter | None] = {}

    def enter(module: nn.Module, _: Any) -> None:
        held.update(module._parameters)  # noqa: SLF001
        for name, weight in held.items():
            if weight is not None and weight.requires_grad and torch.is_grad_enabled():
                module._parameters[name] = sum_gradient(weight, group)  # noqa: SLF001

    def leave(module: nn.Module, *_: Any) -> None:
        module._parameters.update(held)  # noqa: SLF001
        held.clear()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


class WholeGradients:
    """Compares the gradients of weights that every rank of a group has whole.

    They are equal if every module without a style is called with whole activations. A norm of
    queries, which each rank calls with its own heads, has a gradient of these heads alone: without
    its style, the ranks would train different models. The steps 0, 1, 2, 4, 8 and so on are
    compared.

    Args:
        model: The recipe's model, whose weights are sharded.
        mesh: The ranks of the group, a mesh of one dimension.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        self._group, self._num_steps = mesh.get_group(), 0
        self._weights = {
            plain_name(name): weight
            for name, weight in model.named_parameters()
            if weight.requires_grad and not _is_split(weight)
        }

    def differing(self) -> list[str] | None:
        """Return the weights whose gradients differ within the group (collective over the group).

        The result is None in steps in which nothing is compared.
        """
        step, self._num_steps = self._num_steps, self._num_steps + 1
        if step & (step - 1) or not self._weights:
            return None
        norms = torch.stack([_local_norm(weight.grad) for weight in self._weights.values()])
        extremes = torch.cat([norms, -norms])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._group)
        largest, smallest = extremes.view(2, -1).tolist()
        pairs = zip(self._weights, largest, smallest, strict=True)
        return [name for name, high, low in pairs if high + low > _TOLERANCE * high]


def _is_split(weight: nn.Parameter) -> bool:
    """Return whether the ranks of a tensor-parallel group have different parts of a weight."""
    if not isinstance(weight, DTensor):
        return False
    names = weight.device_mesh.mesh_dim_names or ()
    return TENSOR_PARALLEL in names and not weight.placements[-1].is_replicate()


def _local_norm(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return torch.zeros(())
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return torch.linalg.vector_norm(local, dtype=torch.float32)


def whole_gradient_error(names: list[str]) -> RecipeError:
    """Return the error for weights whose gradients differ within a tensor-parallel group."""
    more = f" and {len(names) - 1} more" if names[1:] else ""
    module = names[0].rpartition(".")[0] or names[0]
    return RecipeError(
        f"tensor_parallel: the gradient of {names[0]}{more} differs between the ranks of a group, "
        "which each have this weight whole. A module without a style must be called with whole "
        f"activations. If each rank calls {module} with its own heads, as a norm of queries and "
        'keys, give it the style "replicated_with_grad_allreduce"; if it belongs between a colwise '
        "and a rowwise layer, give it one of these. No step was taken with these gradients."
    )
