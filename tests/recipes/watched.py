"""Digits that are watched: callbacks on every rank, and numbers that loss and forward log."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from worlds import worlds

from launcher import CallbackContext, Recipe, log, main

if TYPE_CHECKING:
    from torch import Tensor


class Diary:
    """Counts steps, and writes what each rank is told to a file of its own in the run folder."""

    def __init__(self, fails: str) -> None:
        self._fails = fails
        self._steps: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the steps that were taken."""
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with these steps."""
        self._steps = state["steps"]

    def after_step(self, context: CallbackContext) -> None:
        """Remember the step."""
        self._steps.append(context.step)

    def on_evaluation(self, context: CallbackContext) -> None:
        """Fail on the last rank, if that is asked for."""
        if self._fails == "on_evaluation" and context.rank == context.world_size - 1:
            raise ValueError("enough seen")

    def on_run_end(self, context: CallbackContext) -> None:
        """Write down the steps, the evaluation, and the number of this rank's weights."""
        weights = sum(parameter.numel() for parameter in context.model.parameters())
        path = context.run_dir / f"diary{context.rank}.txt"
        path.write_text(f"{self._steps} {context.evaluation['accuracy']} {weights}\n")


def watched(*, fails: str = "") -> Recipe:
    """Digits with a diary, and with numbers whose means do not depend on the split of a batch."""
    return replace(
        worlds(),
        name="watched",
        loss=logging_loss,
        forward=forward,
        callbacks=(Diary(fails),),
        train_metrics=("accuracy",),
    )


def forward(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Log the mean of all pixels, with a count that is a number of Python."""
    log("pixel", batch[0].sum(), batch[0].numel())
    logits: Tensor = model(batch[0])
    return logits


def logging_loss(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Log the loss again, a constant, and the loss of each digit that a micro-batch has.

    Few ranks have all digits, and the last batch of an epoch has two samples.
    """
    import torch
    from torch.nn.functional import cross_entropy

    losses = cross_entropy(logits, batch[1], reduction="none")
    total = cross_entropy(logits, batch[1], reduction="sum")
    log("again", total, len(losses))
    log("three", 3.0 * len(losses), torch.tensor(len(losses)))
    for digit in set(batch[1].tolist()):
        of_digit = losses[batch[1] == digit]
        log(f"digit/{digit}", of_digit.sum(), len(of_digit))
    return total, len(losses)


if __name__ == "__main__":
    main(watched)
