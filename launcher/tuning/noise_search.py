"""The gradient noise scale, over a stretch of training."""

from __future__ import annotations

import json
from dataclasses import dataclass

from launcher.analysis.gradient_noise import Measurement, NoiseScale, estimate
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.global_batch import ceil_div
from launcher.planning.strategy import STRATEGIES
from launcher.runs.rundir import RunDir
from launcher.tuning.probe_run import Probe, Target, run_probe

_PARTS = 4
"""A batch is measured in so many parts at least: with more of them fewer steps say as much."""


@dataclass(frozen=True, kw_only=True)
class FoundNoise:
    """What was measured, and what it says; None where that is too little."""

    measurements: tuple[Measurement, ...]
    whole: NoiseScale | None
    halves: tuple[NoiseScale | None, NoiseScale | None]
    """Of the first and of the second half of the steps: it grows as the loss falls."""

    @property
    def latest(self) -> NoiseScale | None:
        """Of the second half if that can be told, where most of a training is nearer to."""
        return self.halves[1] or self.whole


def plan_noise(target: Target) -> Probe:
    """Plan a recipe with batches in so many parts that their gradients can be compared.

    Raises:
        PlanError: The recipe cannot be trained like that.
    """
    _, plan = target.plan()
    summed = STRATEGIES[plan.strategy].sums_gradients_over_ranks_in_backward
    ranks = 1 if summed else plan.world_size
    micro_steps = max(ceil_div(_PARTS, ranks), plan.accumulation_steps)
    micro_batch_size = ceil_div(max(plan.samples_per_rank), micro_steps)
    return target.having("find noise", noise_scale=True, micro_batch_size=micro_batch_size).probe()


def find_noise(
    probe: Probe, run_dir: RunDir, signals: SignalHandler, *, steps: int, quiet: bool = False
) -> FoundNoise:
    """Take the first `steps` and measure; return what it came to.

    Raises:
        EndedError: It failed or was stopped, which was shown.
    """
    from launcher.engine.worker import agent_noise_probe

    last_step = min(steps, probe.plan.total_steps)
    run_probe(probe, run_dir, agent_noise_probe, signals, last_step=last_step, quiet=quiet)
    values = json.loads(run_dir.noise.read_text(encoding="utf-8"))["measurements"]
    measured = tuple(Measurement(**each) for each in values)
    half = len(measured) // 2
    return FoundNoise(
        measurements=measured,
        whole=estimate(measured),
        halves=(estimate(measured[:half]), estimate(measured[half:])),
    )
