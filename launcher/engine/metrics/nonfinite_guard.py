"""The end of a run whose loss or gradient is not finite in too many consecutive steps."""

from __future__ import annotations

from collections.abc import Callable

from launcher.errors import TrainingError
from launcher.runs.step_row import StepRow

_MAX_SHOWN_SAMPLES = 256


class NonFiniteGuard:
    """Counts consecutive steps that were skipped because the loss or gradient was not finite.

    Args:
        max_bad_steps: Number of consecutive skipped steps that ends the run.
        get_batch_ids: Returns the sample ids of the global batch of a step, counted from 1.
    """

    def __init__(self, max_bad_steps: int, get_batch_ids: Callable[[int], list[int]]) -> None:
        self._max_bad_steps, self._get_batch_ids = max_bad_steps, get_batch_ids
        self._num_consecutive = 0

    def check(self, rows: list[StepRow]) -> list[str]:
        """Return a warning for each skipped step among `rows`.

        Raises:
            TrainingError: Too many consecutive steps were skipped; the error names the last one and
                its samples.
        """
        warnings = []
        for row in rows:
            if row.is_finite:
                self._num_consecutive = 0
                continue
            self._num_consecutive += 1
            ids = self._get_batch_ids(row.step)
            samples = ", ".join(map(str, ids[:_MAX_SHOWN_SAMPLES]))
            if len(ids) > _MAX_SHOWN_SAMPLES:
                samples += f" and {len(ids) - _MAX_SHOWN_SAMPLES:,} more"
            problem = f"At step {row.step:,} {row.problem()}"
            if self._num_consecutive >= self._max_bad_steps:
                num_before = self._num_consecutive - 1
                before = f", as at the {num_before} before it" if num_before else ""
                raise TrainingError(
                    f"{problem}{before} (max_bad_steps={self._max_bad_steps}). These steps "
                    "were skipped and have not changed the weights. Lower lr, set max_grad_norm, "
                    f"or inspect the samples of step {row.step:,}: {samples}."
                )
            warnings.append(f"{problem}. The step was skipped. Its samples: {samples}.")
        return warnings
