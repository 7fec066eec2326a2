"""A recipe with settings of its own, trained for a while to be measured."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.job import Job, describe_run, plan_recipe
from launcher.launch import Stops, launch
from launcher.machine import Machine
from launcher.overrides import Override
from launcher.plan import Plan
from launcher.recipe import Recipe
from launcher.resolve import Reference
from launcher.rundir import RunDir, write_yaml


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A stretch of training, planned."""

    reference: Reference
    overrides: tuple[Override, ...]
    """The user's, and those that make it a probe."""

    recipe: Recipe
    """With all of them."""

    plan: Plan
    description: Mapping[str, Any]
    """For run.yaml."""


def plan_probe(
    reference: Reference,
    overrides: Sequence[Override],
    machine: Machine,
    *,
    nproc_per_node: int | None,
    settings: Mapping[str, Any],
    source: str,
) -> Probe:
    """Plan a recipe with the user's overrides and then those of `settings`.

    Raises:
        PlanError: It cannot be trained like that.
    """
    own = [Override(name=name, value=value, source=source) for name, value in settings.items()]
    given = (*overrides, *own)
    built, plan = plan_recipe(reference, given, machine, nproc_per_node=nproc_per_node)
    return Probe(
        reference=reference,
        overrides=given,
        recipe=built.recipe,
        plan=plan,
        description=describe_run(reference, built, plan),
    )


def run_probe(
    probe: Probe,
    run_dir: RunDir,
    function: Callable[[Job], int],
    stops: Stops,
    *,
    last_step: int | None = None,
    memory_bytes: int | None = None,
    seconds: float | None = None,
    quiet: bool = False,
    show: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> int:
    """Run `function` on the ranks of a probe; return the exit code.

    Args:
        probe: What to train.
        run_dir: Where to write.
        function: What each rank calls, of `launcher.engine.worker`.
        stops: What has been listening for signals.
        last_step: Steps to take; None takes all.
        memory_bytes: The most that each rank may use; None is all there is.
        seconds: For how long to measure, where that is not told by steps.
        quiet: Whether the ranks write to their logs alone.
        show: Is given what to show of a failure.
    """
    write_yaml(run_dir.run_yaml, probe.description)
    job = Job(
        recipe=probe.reference.location,
        overrides=probe.overrides,
        plan=probe.plan,
        run_dir=run_dir,
        launcher_pid=os.getpid(),
        last_step=last_step,
        memory_bytes=memory_bytes,
        seconds=seconds,
        saves=False,
        quiet=quiet,
    )
    return launch(job, function, stops=stops, show=show)
