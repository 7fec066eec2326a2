"""What a callback of a recipe sees of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launcher.planning.plan import Plan
from launcher.recipe.field_docs import with_field_docs
from launcher.runs.step_row import StepRow


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class CallbackContext:
    """The run, as each hook of an object in `Recipe.callbacks` receives it. It is read-only."""

    step: int
    """Optimizer steps taken since the start of the run; in `before_step` without the coming one."""

    epoch: int
    """Epoch of the step, counted from 1: of the coming step in `before_step`, else of the last."""

    plan: Plan
    """Every number of the run, such as `plan.total_steps`."""

    rank: int
    """The rank of this process."""

    world_size: int
    """Ranks of the run."""

    run_dir: Path
    """The run folder."""

    evaluation: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Loss and metrics of the latest evaluation, equal on every rank; empty before the first."""

    rows: tuple[StepRow, ...] = ()
    """Measurements of the steps that were read last, equal on every rank. They are read about twice
    a second and before each evaluation, so that in `after_step` the latest may be of an earlier
    step."""

    checkpoint: Path | None = None
    """Folder of the newest checkpoint that this process has completed; None before the first."""

    finished: bool = False
    """Whether the run has taken all of its steps; in `on_run_end`, False means that it was stopped,
    and can be resumed."""

    get_model: Callable[[], Any] = field(repr=False)
    """Returns the model."""

    @property
    def model(self) -> Any:
        """The recipe's own module, on this rank's device; of sharded weights this rank's part."""
        return self.get_model()
