"""Digits that are watched from outside the loop: callbacks on every rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from worlds import worlds

from launcher import CallbackContext, Recipe, main


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
    """Digits with a diary."""
    return replace(worlds(), name="watched", callbacks=(Diary(fails),))


if __name__ == "__main__":
    main(watched)
