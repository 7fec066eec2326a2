"""Computes recorded operations, with no more in memory than the tensor that is being computed.

All operations that draw random numbers run in their recorded order, so that they draw what the
model function would have drawn. Others run as soon as their arguments are there. Operations on
which no wanted value depends are left out. The memory of a storage is freed when no later operation
needs its values; an operation that overwrites all of them starts afresh.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from launcher.engine.model.generator_states import ReplayedStates, StateChange
from launcher.engine.model.recording import Constant, Operation, Recording, View


@torch.no_grad()
def replay(
    recording: Recording,
    wanted: Iterable[int],
    take: Callable[[int, torch.UntypedStorage], None],
    *,
    draws_all: bool,
    keeps: bool = False,
) -> None:
    """Compute the last values of storages, and hand them over one after the other.

    Args:
        recording: The operations.
        wanted: The storages whose values are needed.
        take: Called with the number and the values of each of them. The values are freed after the
            call.
        draws_all: Whether to draw all random numbers, so that the generators end as they would have
            after the model function.
        keeps: Whether the recording will be replayed again; otherwise each operation is dropped
            when it is done.
    """
    wanted = set(wanted)
    operations = _needed(recording, wanted, draws_all=draws_all)
    if not keeps:
        recording.operations.clear()
    states = ReplayedStates(recording.tokens.saved_after)
    queues, memory = _Queues(operations), _Memory(recording.sizes)
    for operation in _in_order(operations, queues, states):
        _run(operation, memory)
        if operation.draw is not None:
            states.after_draw(operation.draw, operation.generator)
        for storage in queues.finish(operation):
            if storage in wanted and not queues.has_next(storage):
                wanted.discard(storage)
                take(storage, memory.storage(storage))
            memory.free(storage)
    for storage in sorted(wanted):  # never initialised
        take(storage, memory.storage(storage))
        memory.free(storage)


def _in_order(
    operations: list[Operation | StateChange], queues: _Queues, states: ReplayedStates
) -> Iterator[Operation]:
    """Yield the operations in the order in which they run, and drop each from the list.

    A change of a generator's state is applied when its turn comes.
    """
    operations.reverse()
    while operations:
        operation = operations.pop()
        if isinstance(operation, StateChange):
            states.apply(operation)
            continue
        if queues.has(operation):  # not done early
            yield operation
        while (early := queues.pop_early()) is not None:
            yield early


def compute(recording: Recording, view: View) -> Tensor | None:
    """Return the present values of a recorded tensor; None if they depend on random numbers."""
    operations = _needed(recording, {view.storage}, draws_all=False)
    if any(isinstance(item, StateChange) or item.draw is not None for item in operations):
        return None
    values: list[Tensor] = []
    replay(
        recording,
        (view.storage,),
        lambda _, storage: values.append(view.of(storage).clone()),
        draws_all=False,
        keeps=True,
    )
    return values[0]


def _needed(
    recording: Recording, wanted: set[int], *, draws_all: bool
) -> list[Operation | StateChange]:
    """Return the operations to run for the last values of the wanted storages, in their order.

    If one of them draws random numbers, all draws before it are among them.
    """
    needed = set(wanted)
    operations: list[Operation | StateChange] = []
    for operation in reversed(recording.operations):
        if isinstance(operation, StateChange):
            operations += [operation] if draws_all else []
            continue
        written = operation.created | operation.changed
        if not (needed & written or (draws_all and operation.draw is not None)):
            continue
        draws_all = draws_all or operation.draw is not None
        operations.append(operation)
        needed -= operation.created | operation.overwritten
        needed |= operation.read - operation.created
    operations.reverse()
    return operations


class _Queues:
    """The operations that are still to run, for each storage that they use.

    An operation that draws no random numbers may run early: as soon as no earlier operation uses
    one of its storages. So a parameter that is drawn, and scaled when all others have been drawn,
    does not stay in memory.

    Args:
        operations: All operations, in their order.
    """

    def __init__(self, operations: list[Operation | StateChange]) -> None:
        self._of: dict[int, deque[Operation]] = {}
        self._waiting: set[int] = set()
        self._candidates: list[Operation] = []
        for operation in operations:
            if isinstance(operation, Operation):
                self._waiting.add(id(operation))
                for storage in operation.touched:
                    self._of.setdefault(storage, deque()).append(operation)

    def has(self, operation: Operation) -> bool:
        """Return whether an operation has not run yet."""
        return id(operation) in self._waiting

    def has_next(self, storage: int) -> bool:
        """Return whether an operation that has not run yet uses a storage."""
        return bool(self._of.get(storage))

    def finish(self, operation: Operation) -> list[int]:
        """Remove an operation that has run; return the storages whose values nothing needs now."""
        self._waiting.discard(id(operation))
        dead = []
        for storage in operation.touched:
            queue = self._of[storage]
            queue.popleft()
            if not queue or storage in queue[0].overwritten:
                dead.append(storage)
            if queue and queue[0].draw is None:
                self._candidates.append(queue[0])
        return dead

    def pop_early(self) -> Operation | None:
        """Return an operation that can run before its turn; None if there is none."""
        while self._candidates:
            operation = self._candidates.pop()
            if self.has(operation) and all(
                self._of[storage][0] is operation for storage in operation.touched
            ):
                return operation
        return None


class _Memory:
    """The storages that have values.

    Args:
        sizes: The number of bytes of each storage.
    """

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self._storages: dict[int, torch.UntypedStorage] = {}

    def storage(self, number: int) -> torch.UntypedStorage:
        """Return a storage, with undefined values if nothing has been written to it."""
        if number not in self._storages:
            self._storages[number] = torch.UntypedStorage(self._sizes[number])
        return self._storages[number]

    def put(self, view: View, result: Tensor) -> None:
        """Take over the memory of a result, as the recorded view."""
        own = result.untyped_storage()
        if (
            result.stride() == view.stride
            and result.storage_offset() == view.offset
            and own.nbytes() == self._sizes[view.storage]
        ):
            self._storages[view.storage] = own
        else:  # the kernel for the CPU chose another layout than that for the meta device
            view.of(self.storage(view.storage)).copy_(result)

    def free(self, number: int) -> None:
        """Free a storage."""
        self._storages.pop(number, None)


def _run(operation: Operation, memory: _Memory) -> None:
    def value(leaf: Any) -> Any:
        return leaf.tensor if isinstance(leaf, Constant) else leaf.of(memory.storage(leaf.storage))

    def values(tree: Any) -> Any:
        # A view is a tuple, which the functions for trees would take apart.
        if isinstance(tree, (View, Constant)):
            return value(tree)
        if isinstance(tree, (list, tuple)):
            return type(tree)(map(values, tree))
        return tree

    arguments = [values(argument) for argument in operation.arguments]
    options = {name: values(option) for name, option in operation.options.items()}
    result = operation.function(*arguments, **options)
    if not operation.created:
        return
    created = set(operation.created)
    for view, tensor in zip(operation.results, tree_flatten(result)[0], strict=True):
        if view is not None and view.storage in created:
            memory.put(view, tensor)
            created.discard(view.storage)
