"""The model as callbacks see it, and what they write to its weights."""

from __future__ import annotations

from torch import nn

from launcher.engine.model.forward_writes import WriteDetector, shorten
from launcher.engine.training.context import TrainContext
from launcher.errors import TrainingError
from launcher.planning.strategy import STRATEGIES


class ShownModel:
    """The recipe's module, as a hook of a callback is given it.

    A callback may write to weights, as in weight clipping. What it writes holds under every
    strategy, or is refused. Nothing is compared before a callback has asked for the model; as it
    may keep it, everything is from then on.

    Args:
        context: What is trained.
    """

    def __init__(self, context: TrainContext) -> None:
        self._context = context
        strategy = STRATEGIES[context.plan.strategy]
        self._loses_writes = strategy.uses_deepspeed and strategy.shards_parameters
        self._is_shown = False
        self._is_watched = False
        self._writes: WriteDetector | None = None

    def get(self) -> nn.Module:
        """Return the recipe's own module."""
        module = self._context.backend.unwrap(self._context.model)
        self._is_shown = True
        if not self._is_watched:
            self._is_watched = True
            self._writes = WriteDetector(module) if self._loses_writes else None
        return module

    def begin(self) -> None:
        """Begin a hook."""
        self._is_watched, self._writes = False, None
        if self._is_shown:
            self.get()

    def end(self, callback: str, hook: str) -> None:
        """End a hook of the callback of this name, and keep what it has written to weights.

        Raises:
            TrainingError: The hook has written to weights, and the strategy would train on from
                other values.
        """
        if not self._is_watched:
            return
        backend, strategy = self._context.backend, self._context.plan.strategy
        if self._writes is None:
            backend.adopt_weights()
        elif written := sorted(self._writes.weights()):
            raise TrainingError(
                f"The callback {callback} wrote to {shorten(written)} in {hook}, and under "
                f"strategy={strategy} DeepSpeed trains on from copies of the weights that are "
                "divided among the ranks. Use strategy=ddp, fsdp, zero1 or zero2."
            )
