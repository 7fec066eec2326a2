"""What the training loop works on, and the interfaces of what observes and controls it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from launcher.analysis.gradient_noise import Measurement
from launcher.engine.backends.base import Backend
from launcher.engine.data.micro_batch import MicroBatch
from launcher.engine.data.reader import Reader
from launcher.engine.data.sampler import EvaluationSchedule, Horizon, Sampler
from launcher.engine.metrics.collected_metrics import CollectedMetrics
from launcher.engine.metrics.meter import RankFlags
from launcher.engine.metrics.noise_meter import NoiseMeter, NullNoiseMeter
from launcher.engine.model.averages import Averages
from launcher.engine.model.batch_norm import BatchNorms
from launcher.engine.model.forward_writes import ForwardWrites
from launcher.engine.training.data_watch import DataWatch
from launcher.engine.training.live_schedules import Plateau
from launcher.engine.training.objectives import TrainedObjective
from launcher.planning.plan import Plan
from launcher.recipe.recipe import Recipe
from launcher.runs.step_row import StepRow


class Listener(Protocol):
    """Receives what the loop measures, on every rank, in the order of the steps."""

    def on_micro_batches(self, step: int, micro_batches: list[MicroBatch]) -> None:
        """Receive the micro-batches that this rank took in step number `step`, counted from 1."""

    def on_steps(self, rows: list[StepRow]) -> None:
        """Receive the measurements of the steps since the last call, equal on every rank."""

    def on_noise(self, measurements: list[Measurement]) -> None:
        """Receive the gradient noise measured in some of these steps, equal on every rank."""

    def on_warning(self, text: str) -> None:
        """Receive a warning for the user, equal on every rank."""

    def on_values(self, step: int, values: Mapping[str, Any]) -> None:
        """Receive further named values that were measured after `step` steps."""

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Receive loss and metrics over the evaluation data after `step` steps."""


@dataclass(frozen=True, kw_only=True)
class TrainContext:
    """Everything that the training loop works on, on one rank."""

    recipe: Recipe
    plan: Plan
    backend: Backend
    model: nn.Module
    """The module that `Backend.forward` takes, as `Backend.prepare` returned it."""

    optimizer: Optimizer
    num_trained: int
    """Number of trainable weights of the whole model, over all ranks."""

    sampler: Sampler
    reader: Reader
    """Holds the data and reads samples from it."""

    micro_batches: Iterator[MicroBatch]
    """This rank's micro-batches: those of the trial, if there is one, followed by those of training
    and evaluation in the order of `sampler.requests`."""

    horizon: Horizon
    """The end of the stream of micro-batches."""

    batch_norms: BatchNorms
    """The BatchNorm modules of the model."""

    forward_writes: ForwardWrites
    """Detects weights and buffers that forward passes write to, and combines them over ranks."""

    report_phase: Callable[[int, str], None] = lambda *_: None
    """Called with (steps taken, phase) whenever this rank enters a phase; the watchdog uses it."""

    collected: CollectedMetrics
    """The metrics that need all predictions of an evaluation."""

    noise_meter: NoiseMeter = field(default_factory=NullNoiseMeter)
    """Measures the gradient noise beside the steps."""

    averages: Averages | None = None
    """The average of the weights over the steps; None without `Recipe.averaging`."""

    plateaus: tuple[Plateau, ...] = ()
    """The parts of the schedule that follow evaluations."""

    missed_evaluations: tuple[EvaluationSchedule, ...] = ()
    """The sets whose evaluation precedes the first step: the run was to evaluate them after its
    checkpoint, and has not recorded that."""

    data_watch: DataWatch | None = None
    """Observes what is read; None if there is nothing to observe."""

    before_step: tuple[Callable[[int], None], ...] = ()
    """Called with the number of steps taken before each step."""

    @contextlib.contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """Let the model have the weights that are evaluated and exported (collective).

        They are the averages, if the recipe or its optimizer averages the weights.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.backend.evaluated_weights(self.model, self.optimizer))
            if self.averages is not None:
                stack.enter_context(self.averages.evaluated())
            yield

    objectives: tuple[TrainedObjective, ...] = ()
    """The objectives in the order of their turns; empty if the recipe has one loss."""

    def in_turns(self) -> tuple[TrainedObjective, ...]:
        """Return the objectives in the order of their turns, of which a recipe may have one."""
        only = TrainedObjective(
            name="",
            number=0,
            every=1,
            recipe=self.recipe,
            lr=self.plan.lr,
            backend=self.backend,
            model=self.model,
            optimizer=self.optimizer,
            forward_writes=self.forward_writes,
            noise_meter=self.noise_meter,
        )
        return self.objectives or (only,)


class StepController(Protocol):
    """Acts between steps on flags that all ranks have exchanged, and may stop the run.

    A class that inherits from it acts only where the loop reads its measurements anyway, unless it
    says otherwise.
    """

    def is_due(self, step: int) -> bool:
        """Return whether the ranks must exchange flags after `step` steps; equal on every rank."""
        return False

    def flags(self) -> RankFlags:
        """Return the flags of this rank."""
        return RankFlags()

    def before_evaluation(self, step: int) -> None:
        """Prepare for an evaluation after `step` steps, which may fail (collective)."""
        return

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Receive the metrics of an evaluation after `step` steps, equal on every rank."""
        return

    @property
    def has_ended(self) -> bool:
        """Whether the run has ended before its last step; equal on every rank."""
        return False

    def on_step_end(self, step: int, flags: RankFlags) -> bool:
        """Act on the summed flags after `step` steps; return whether to stop (collective)."""


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """Where `train` ended."""

    step: int
    """Steps taken since the start of the run."""

    evaluation: dict[str, float]
    """Loss and metrics of the last evaluation; empty if there was none."""
