"""Where the time of a step goes, by some steps under torch.profiler."""

from __future__ import annotations

import json

from launcher.analysis.step_profile import Profile
from launcher.launch.signal_handler import SignalHandler
from launcher.runs.rundir import RunDir
from launcher.tuning.probe_run import Probe, Target, run_probe

WARM_UP = 5
"""Steps before those that are looked at: what is first used is slow."""


def plan_profile(target: Target, *, steps: int) -> Probe:
    """Plan a recipe for so many steps to look at, after some that are not.

    Raises:
        PlanError: The recipe cannot be trained like that.
    """
    return target.having(
        "profile",
        steps=steps + WARM_UP,
        batch_milestones=(),
        record_samples=False,
        noise_scale=False,
        trackers=(),
    ).probe()


def profile_recipe(
    probe: Probe, run_dir: RunDir, signals: SignalHandler, *, quiet: bool = False
) -> list[Profile]:
    """Take the steps; return where the time went, by rank.

    Raises:
        EndedError: It failed or was stopped, which was shown.
    """
    from launcher.engine.worker import agent_profile

    run_probe(probe, run_dir, agent_profile, signals, last_step=WARM_UP, quiet=quiet)
    ranks = json.loads(run_dir.profile.read_text(encoding="utf-8"))["ranks"]
    return [Profile(**each) for each in ranks]
