"""Which weights a run trains: what its callbacks may change of that."""

from __future__ import annotations

from launcher.engine.state.training_state import parameters
from launcher.engine.training.context import TrainContext
from launcher.errors import TrainingError
from launcher.planning.strategy import STRATEGIES


class TrainedWeights:
    """The weights that require a gradient when a run starts.

    A callback may freeze some of them for a while. The optimizer leaves a frozen weight and its
    state as they are. DeepSpeed updates all weights of a rank as one tensor, and cannot.

    With several objectives, each turn sets which weights require a gradient, so that nothing is
    checked.

    Args:
        context: What is trained.
    """

    def __init__(self, context: TrainContext) -> None:
        self._strategy = context.plan.strategy
        module = context.backend.unwrap(context.model)
        self._before = (
            {}
            if context.recipe.objectives
            else {
                name: (parameter, parameter.requires_grad)
                for name, parameter in parameters(module).items()
            }
        )

    def check(self, callback: str) -> None:
        """Refuse what a callback has frozen or unfrozen, if it cannot be trained so.

        Args:
            callback: The name of the callback.

        Raises:
            TrainingError: A weight that the optimizer does not have requires a gradient now, or a
                weight was frozen under DeepSpeed.
        """
        cannot_freeze = STRATEGIES[self._strategy].uses_deepspeed
        for name, (parameter, was_trained) in self._before.items():
            if parameter.requires_grad and not was_trained:
                raise TrainingError(
                    f"The callback {callback} has set requires_grad of the model's {name} to True, "
                    "and the optimizer does not have this weight, because the model function has "
                    "returned it frozen. Return it with requires_grad=True, and let the callback "
                    "freeze it in on_run_start."
                )
            if cannot_freeze and was_trained and not parameter.requires_grad:
                raise TrainingError(
                    f"The callback {callback} has set requires_grad of the model's {name} to "
                    f"False, and strategy={self._strategy} updates all weights as one tensor. Use "
                    "strategy=ddp or fsdp, or return it frozen from the model function."
                )
