"""The operations of a forward pass, counted once as it happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class CountedForward:
    """A recipe's `forward` that counts the operations of its first call.

    Counted are products, convolutions and attention, two for each multiplication with its addition,
    by torch's formulas.

    Args:
        forward: (model, batch) -> outputs.
        tell: Is given the operations for each sample of that call's batch.
    """

    def __init__(self, forward: Callable[[Any, Any], Any], tell: Callable[[float], None]) -> None:
        self._forward, self._tell = forward, tell
        self._counted = False

    def __call__(self, model: Any, batch: Any) -> Any:
        """Return the outputs for a batch."""
        if self._counted:
            return self._forward(model, batch)
        self._counted = True
        with _Counter() as counter:
            outputs = self._forward(model, batch)
        samples = [leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)][:1]
        if counter.total and samples and samples[0]:
            self._tell(counter.total / samples[0])
        return outputs


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)  # noqa: SLF001
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result
