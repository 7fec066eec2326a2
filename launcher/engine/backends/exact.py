"""Exact training on one process: gradients summed over virtual ranks in the order of one tree.

`ExactSums` is the part that all strategies share. See `launcher.planning.virtual_ranks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.engine.backends.base import Backend
from launcher.engine.backends.exact_norm import exact_norm
from launcher.engine.backends.local import LocalBackend
from launcher.engine.ranks.freed_memory import keep_freed_memory
from launcher.engine.state.loss_scaler import LossScaler
from launcher.engine.state.parameter_kinds import sparse_parameters, zero_gradient
from launcher.errors import RecipeError
from launcher.planning.virtual_ranks import Node, Part, TreeSum, virtual_rank_of

if TYPE_CHECKING:
    _Base = Backend
else:
    _Base = object

Gradients = list[Tensor]
"""One gradient for each trained parameter, or for each of those in a bucket."""


class ExactSums(_Base):
    """What a backend needs for exact sums, as a base class before that of the strategy."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.scaler is not None:
            self.scaler = LossScaler(1, self.scaler.scale.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self._tree: TreeSum[Gradients] = TreeSum(self.plan.distribution.count, add_gradients)
        self._exact_parameters: list[nn.Parameter] = []

    @property
    def divisor(self) -> int:
        """Exact sums are not divided: the number of ranks must not enter the arithmetic."""
        return 1

    def prepare_objective(self, model: nn.Module) -> nn.Module:
        wrapped = super().prepare_objective(model)
        self._watch_parameters(self.unwrap(model))
        return wrapped

    def _watch_parameters(self, model: nn.Module) -> None:
        """Take note of the parameters whose gradients are summed.

        Raises:
            RecipeError: A parameter has sparse gradients.
        """
        if sparse := next(iter(sparse_parameters(model)), None):
            raise RecipeError(
                f"exact=true needs dense gradients, and those of {sparse} are sparse, because of "
                "Embedding(sparse=True). Leave sparse=True or exact=true out."
            )
        self._exact_parameters = [p for p in model.parameters() if p.requires_grad]
        self._tree = TreeSum(self.plan.distribution.count, add_gradients)

    def _push_part(self, part: Part) -> None:
        """Move the gradients of a virtual rank from the parameters into the sum."""
        if part.is_empty:
            self._drop_gradients()
        start = virtual_rank_of(part)
        self._push_gradients(Node(start, start + 1))

    def _push_gradients(self, node: Node) -> None:
        """Move the gradients of the virtual ranks of a node from the parameters into the sum."""
        gradients = []
        for parameter in self._exact_parameters:
            gradient = parameter.grad
            gradients.append(zero_gradient(parameter) if gradient is None else gradient)
            parameter.grad = None
        self._tree.push_node(node, gradients)

    def _drop_gradients(self) -> None:
        for parameter in self._exact_parameters:
            parameter.grad = None

    def norm(self, grads: list[Tensor]) -> Tensor:
        if not grads:
            return super().norm(grads)
        return exact_norm(grads, num_rows(grads), _same, _same)


class ExactLocalBackend(ExactSums, LocalBackend):
    """A backend that trains in this process alone, with exact sums.

    Autograd itself adds the gradients of virtual ranks that are siblings in the tree: those of the
    left one stay in the parameters while the right one computes its gradients.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._left: Part | None = None
        """The virtual rank whose gradients wait in the parameters for those of its sibling."""
        self._versions: list[int] = []

    @contextlib.contextmanager
    def micro_step(self, *, last: bool, part: Part | None = None) -> Iterator[None]:
        assert part is not None
        if self._left is not None and (part.is_empty or not part.is_last):
            # Zeros would not change the sum, and micro-batches are added to each other first.
            self._push_part(self._left)
            self._left = None
        with super().micro_step(last=last, part=part):
            yield
        if not part.is_last:
            return
        if self._left is not None:
            self._push_pair(self._left)
            self._left = None
        elif virtual_rank_of(part) % 2 == 0 and not last and not part.is_empty:
            self._hold(part)
        else:
            self._push_part(part)

    def _hold(self, part: Part) -> None:
        """Leave the gradients of a virtual rank in the parameters, to which autograd adds others.

        An unused parameter gets zeros: a sum of two zeros has another sign than one zero alone.
        """
        for parameter in self._exact_parameters:
            if parameter.grad is None:
                parameter.grad = zero_gradient(parameter)
        self._left = part
        self._versions = [_version(parameter) for parameter in self._exact_parameters]

    def _push_pair(self, left: Part) -> None:
        """Move the gradients of two virtual ranks from the parameters into the sum."""
        for parameter, version in zip(self._exact_parameters, self._versions, strict=True):
            if _version(parameter) == version:  # the right one has not used this parameter
                parameter.grad.add_(0.0)  # type: ignore[union-attr]
        start = virtual_rank_of(left)
        self._push_gradients(Node(start, start + 2))

    def apply(self, optimizer: Optimizer, max_grad_norm: float | None) -> Tensor:
        for parameter, gradient in zip(self._exact_parameters, self._tree.take(), strict=True):
            parameter.grad = gradient if parameter.requires_grad else None  # a callback froze it
        return super().apply(optimizer, max_grad_norm)


def add_gradients(left: Gradients, right: Gradients) -> Gradients:
    """Add `left` to `right`, in place, and return `right`."""
    torch._foreach_add_(right, left)
    return right


def _version(parameter: nn.Parameter) -> int:
    """Return the number of changes of a parameter's gradient."""
    assert parameter.grad is not None
    return parameter.grad._version  # noqa: SLF001


def num_rows(gradients: Sequence[Tensor]) -> int:
    """Return the number of rows of all gradients, over all ranks if they are sharded."""
    return sum(gradient.shape[0] if gradient.ndim else 1 for gradient in gradients)


def _same(values: Tensor) -> Tensor:
    return values
