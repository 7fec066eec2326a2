"""`launcher profile`: measure where the time of a step goes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.arguments import out_option
from launcher.cli.settings_command import SettingsCommand
from launcher.cli.target import target_arguments
from launcher.cli.values import Count
from launcher.console.echo import echo

if TYPE_CHECKING:
    from launcher.launch.signal_handler import SignalHandler
    from launcher.tuning.probe_run import Target


@click.command(cls=SettingsCommand, short_help="Measure where the time of a step goes.")
@target_arguments
@click.option(
    "--steps",
    type=Count(min=1, largest=100_000),
    default=20,
    show_default=True,
    metavar="K",
    help="Optimizer steps to profile, after five warm-up steps.",
)
@out_option
@click.option("--json", "as_json", is_flag=True, help="Print the times of each rank as JSON.")
def command(
    target: Target, signals: SignalHandler, steps: int, out: Path | None, *, as_json: bool
) -> None:
    """Train RECIPE for some steps under torch.profiler, on the ranks that would train it.

    It prints how the time divides into data loading, forward, backward, exposed communication and
    optimizer, and what to try; it keeps a trace of each rank. The profiler itself takes time, most
    for small operations.

    \b
    launcher profile digits
    launcher profile recipes/gpt.py -n 2 strategy=fsdp --steps 10
    """
    from launcher.json_file import encode_json
    from launcher.runs.rundir import create_run_dir
    from launcher.tuning.profile_run import plan_profile, profile_recipe
    from launcher.tuning.profile_table import profile_text

    probe = plan_profile(target, steps=steps)
    run_dir = create_run_dir(out, f"profile-{probe.plan.recipe}")
    profiles = profile_recipe(probe, run_dir, signals, quiet=as_json)
    if as_json:
        echo(encode_json([asdict(profile) for profile in profiles]))
    else:
        echo(profile_text(profiles, probe.plan, run_dir))
