"""Count the floating-point operations of a forward pass, once, while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from launcher.engine.backends.nested_tensors import tensors_in


class CountedForward:
    """A recipe's `forward` that counts the floating-point operations of its first call.

    Matrix products, convolutions and attention are counted by torch's formulas
    (`torch.utils.flop_counter`), a multiply-add as two operations.

    Args:
        forward: (model, batch) -> outputs.
        report: Called once with the operations per sample of the first batch; never, if they cannot
            be counted.
    """

    def __init__(self, forward: Callable[[Any, Any], Any], report: Callable[[float], None]) -> None:
        self._forward, self._report = forward, report
        self._counted = False

    def __call__(self, model: Any, batch: Any) -> Any:
        """Return the outputs for a batch."""
        if self._counted:
            return self._forward(model, batch)
        self._counted = True
        with _FlopCounter() as counter:
            outputs = self._forward(model, batch)
        sizes = [tensor.shape[0] for tensor in tensors_in(batch) if tensor.ndim][:1]
        if counter.is_complete and counter.total and sizes and sizes[0]:
            self._report(counter.total / sizes[0])
        return outputs


class _FlopCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.is_complete = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)  # noqa: SLF001
        if formula is not None:
            try:
                self.total += formula(*args, **(kwargs or {}), out_val=result)
            except Exception:  # noqa: BLE001  # a formula that does not know these arguments
                self.is_complete = False
        return result
