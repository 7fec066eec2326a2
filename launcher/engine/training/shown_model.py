"""The model as callbacks see it, and what they may do to it."""

from __future__ import annotations

from torch import nn

from launcher.engine.model.forward_writes import WriteDetector, shorten
from launcher.engine.state.training_state import parameters
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
        strategy, ranks = STRATEGIES[context.plan.strategy], context.plan.world_size
        self._loses_writes = strategy.uses_deepspeed and strategy.shards_parameters
        # Their ranks exchange the gradients of the weights that required one at first.
        self._fixes_trained = strategy.uses_deepspeed or (ranks > 1 and not strategy.shards)
        self._is_shown = False
        self._trained: dict[str, bool] | None = None
        self._writes: WriteDetector | None = None

    def get(self) -> nn.Module:
        """Return the recipe's own module."""
        module = self._context.backend.unwrap(self._context.model)
        self._is_shown = True
        if self._trained is None:
            self._trained = _trained(module)
            self._writes = WriteDetector(module) if self._loses_writes else None
        return module

    def begin(self) -> None:
        """Begin a hook."""
        self._trained = self._writes = None
        if self._is_shown:
            self.get()

    def end(self, callback: str, hook: str) -> None:
        """End a hook of the callback of this name, and keep what it has written to weights.

        Raises:
            TrainingError: The hook has changed which weights are trained, or has written to
                weights, and the strategy would train others, or train on from other values.
        """
        if self._trained is None:
            return
        backend, strategy = self._context.backend, self._context.plan.strategy
        module = backend.unwrap(self._context.model)
        now = _trained(module)
        changed = [name for name, before in self._trained.items() if now.get(name) != before]
        if changed and self._fixes_trained:
            raise TrainingError(
                f"The callback {callback} changed requires_grad of {shorten(changed)} in {hook}, "
                f"and under strategy={strategy} the ranks exchange the gradients of the weights "
                "that required one when the run started. Use strategy=fsdp, or set requires_grad "
                "in the model function. To train other weights later, start another run with "
                "weights=RUN/model.safetensors."
            )
        if self._writes is None:
            backend.adopt_weights()
        elif written := sorted(self._writes.weights()):
            raise TrainingError(
                f"The callback {callback} wrote to {shorten(written)} in {hook}, and under "
                f"strategy={strategy} DeepSpeed trains on from copies of the weights that are "
                "divided among the ranks. Use strategy=ddp, fsdp, zero1 or zero2."
            )


def _trained(module: nn.Module) -> dict[str, bool]:
    return {name: weight.requires_grad for name, weight in parameters(module).items()}
