"""Functions of a recipe that are called on one rank of a node while the others wait for it.

A call among ranks in such a function would wait for ranks that wait for this one. Scripts that are
ported to a recipe often have one, such as a barrier after a download, or DistributedDataParallel
around the model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from launcher.errors import RecipeError

T = TypeVar("T")

_CALLS = (
    *("barrier", "monitored_barrier", "all_reduce", "reduce", "broadcast", "scatter", "gather"),
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "gather_object"),
    *("broadcast_object_list", "scatter_object_list", "reduce_scatter", "all_to_all"),
)
"""Functions of torch.distributed that wait for other ranks."""


def refuses_collectives(action: Callable[[], T]) -> Callable[[], T]:
    """Return a function that calls `action` and refuses calls among ranks meanwhile.

    The returned function raises RecipeError if `action` calls a collective function of
    `torch.distributed`, or DistributedDataParallel.
    """

    @functools.wraps(action)
    def call() -> T:
        with _collectives_refused():
            return action()

    return call


@contextlib.contextmanager
def _collectives_refused() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in _CALLS:
            remedy = "Remove the call: what the first rank has downloaded is there for the others."
            _replace(stack, dist, name, _refusal(f"torch.distributed.{name}()", remedy))
        remedy = "Return the model without it: launcher divides the batches among the ranks."
        refuse = _refusal("DistributedDataParallel(...)", remedy)
        _replace(stack, DistributedDataParallel, "__init__", refuse)
        yield


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: object) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _refusal(name: str, remedy: str) -> Callable[..., None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise RecipeError(
            f"The recipe's model or data function called {name}, which would wait forever: "
            f"launcher calls these functions on the first rank of a node, and on its other ranks "
            f"when that has returned. {remedy}"
        )

    return refuse
