"""The steps that `max_time` has set for a run, which a resumed run keeps."""

from __future__ import annotations

from typing import Any

import msgspec

from launcher.errors import RunDirError
from launcher.planning.plan import Plan
from launcher.planning.timed_steps import TimedSteps
from launcher.runs.events import Timed, read_events
from launcher.runs.manifest import Manifest
from launcher.runs.run_record import read_run, replace_plan
from launcher.runs.rundir import RunDir


def planned_steps(run_dir: RunDir, manifest: Manifest, plan: Plan) -> TimedSteps | None:
    """Return the steps that `max_time` has set for a run, if they hold for its resumption.

    They hold as long as max_time, epochs and steps are unchanged, and also if the run resumes from
    a checkpoint that it saved before it knew them.

    Args:
        run_dir: The run folder.
        manifest: The manifest of the checkpoint from which the run resumes.
        plan: The plan of the resumed run, up to the limit of the recipe.

    Returns:
        The steps, or None if the resumed run has no `max_time`, or is to measure its speed.
    """
    if plan.settings.get("max_time") is None:
        return None
    found = _of_checkpoint(manifest.agreement.get("timed_steps")) or _of_events(run_dir, manifest)
    if found is None or (found.max_time, found.limit) != (
        plan.settings["max_time"],
        plan.total_steps,
    ):
        return None
    return found


def record_planned_steps(run_dir: RunDir, plan: Plan) -> str | None:
    """Write the plan of a run, with the steps that `max_time` has set, to run.yaml.

    Returns:
        Why it could not be written, for the user, or None. Checkpoints hold the steps as well.
    """
    try:
        if Plan.from_dict(read_run(run_dir).plan).timed_steps != plan.timed_steps:
            replace_plan(run_dir, plan)
    except RunDirError as error:
        return f"run.yaml does not show that the run has {plan.total_steps:,} steps: {error}"
    return None


def _of_checkpoint(values: Any) -> TimedSteps | None:
    try:
        return msgspec.convert(values, TimedSteps | None)
    except msgspec.ValidationError:  # of another version of launcher
        return None


def _of_events(run_dir: RunDir, manifest: Manifest) -> TimedSteps | None:
    """Return the steps that were planned after the checkpoint was saved, or None."""
    events = [event for event in read_events(run_dir) if isinstance(event, Timed)]
    if not events or events[-1].step < manifest.step:
        return None
    last = events[-1]
    try:
        return TimedSteps(
            max_time=last.max_time, limit=last.limit, first_step=last.step, steps=last.steps
        )
    except ValueError:  # a damaged line
        return None
