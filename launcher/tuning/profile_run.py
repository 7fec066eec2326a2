"""A profile of a recipe: some steps under torch.profiler on the ranks that would train it."""

from __future__ import annotations

from launcher.analysis.step_profile import Profile
from launcher.launch.signal_handler import SignalHandler
from launcher.runs.rundir import RunDir
from launcher.tuning.measured_files import read_profiles
from launcher.tuning.probe_run import Probe, Target, run_probe

WARM_UP_STEPS = 5
"""Steps before those that are profiled: the first steps allocate, compile and connect."""


def plan_profile(target: Target, *, steps: int) -> Probe:
    """Plan a profile of a number of steps after the warm-up.

    Args:
        target: The recipe.
        steps: Number of profiled steps.

    Raises:
        PlanError: The recipe cannot be trained with these settings on these ranks.
    """
    return target.with_settings(
        "profile",
        steps=steps + WARM_UP_STEPS,
        batch_milestones=(),
        record_samples=False,
        noise_scale=False,
        trackers=(),
    ).probe()


def profile_recipe(
    probe: Probe, run_dir: RunDir, signals: SignalHandler, *, quiet: bool = False
) -> list[Profile]:
    """Run a profile and return the time of its steps for each rank.

    Args:
        probe: The profile, from `plan_profile`.
        run_dir: Folder of the run, which receives a trace of each rank.
        signals: The signal handler of this process.
        quiet: Whether the ranks write only to their logs.

    Raises:
        RunFailedError: A rank failed.
    """
    from launcher.engine.worker import agent_profile

    run_probe(probe, run_dir, agent_profile, signals, last_step=WARM_UP_STEPS, quiet=quiet)
    return read_profiles(run_dir)
