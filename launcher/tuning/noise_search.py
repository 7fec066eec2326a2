"""The measurement of the gradient noise scale over the first steps of a training."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.analysis.gradient_noise import (
    Measurement,
    NoiseScale,
    critical_batch,
    estimate_noise_scale,
)
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.global_batch import ceil_div
from launcher.planning.strategy import STRATEGIES
from launcher.runs.rundir import RunDir
from launcher.tuning.measured_files import read_noise
from launcher.tuning.probe_run import Probe, Target, run_probe

_MIN_PARTS = 4
"""Smallest number of parts of a batch to compare; more parts need fewer steps."""


@dataclass(frozen=True, kw_only=True)
class NoiseSearchResult:
    """The measured gradient norms, and the noise scales estimated from them."""

    measurements: tuple[Measurement, ...]
    """Measurement of each step."""

    whole: NoiseScale | None
    """Estimate over all steps; None if they do not determine one."""

    halves: tuple[NoiseScale | None, NoiseScale | None]
    """Estimates over each half of the steps: the noise scale grows as the loss falls."""

    momentum: float = 0.0
    """Momentum of the optimizer, or the first beta of Adam: the mean over the steps."""

    @property
    def latest(self) -> NoiseScale | None:
        """The estimate over the second half, or over all steps if that half determines none.

        The second half is closer to the conditions of most of a training.
        """
        return self.halves[1] or self.whole

    @property
    def critical(self) -> float | None:
        """B_crit in items, from the latest estimate; None if that is undetermined."""
        if self.latest is None:
            return None
        return critical_batch(self.latest.b_simple, self.momentum)


def plan_noise(target: Target) -> Probe:
    """Plan a training whose batches have enough parts to compare their gradients.

    The global batch is unchanged; the micro-batches may be smaller.

    Raises:
        PlanError: The recipe cannot be trained with these settings on these ranks.
    """
    _, plan = target.plan()
    # FSDP reduces the gradient of every micro-step, so only whole micro-steps are comparable.
    summed = STRATEGIES[plan.strategy].sums_gradients_over_ranks_in_backward
    parts_per_micro_step = 1 if summed else plan.data_ranks
    micro_steps = max(ceil_div(_MIN_PARTS, parts_per_micro_step), plan.accumulation_steps)
    micro_batch_size = ceil_div(max(plan.samples_per_rank), micro_steps)
    return target.with_settings(
        "find noise", noise_scale=True, micro_batch_size=micro_batch_size
    ).probe()


def find_noise(
    probe: Probe, run_dir: RunDir, signals: SignalHandler, *, steps: int, quiet: bool = False
) -> NoiseSearchResult:
    """Train the first steps of a plan and measure the gradient noise in each.

    Args:
        probe: The training, from `plan_noise`.
        run_dir: Folder of the training.
        signals: The signal handler of this process.
        steps: Number of steps; at most the planned number is trained.
        quiet: Whether the ranks write only to their logs.

    Raises:
        RunFailedError: A rank failed.
    """
    from launcher.engine.worker import agent_noise_probe

    last_step = min(steps, probe.plan.total_steps)
    run_probe(probe, run_dir, agent_noise_probe, signals, last_step=last_step, quiet=quiet)
    reading = read_noise(run_dir)
    measurements = reading.measurements
    half = len(measurements) // 2
    return NoiseSearchResult(
        measurements=measurements,
        whole=estimate_noise_scale(measurements),
        halves=(
            estimate_noise_scale(measurements[:half]),
            estimate_noise_scale(measurements[half:]),
        ),
        momentum=reading.momentum,
    )
