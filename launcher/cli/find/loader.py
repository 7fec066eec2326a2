"""`launcher find loader`: find the settings of DataLoader workers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.arguments import out_option
from launcher.cli.settings_command import SettingsCommand
from launcher.cli.target import target_arguments
from launcher.cli.values import Number
from launcher.console.echo import echo

if TYPE_CHECKING:
    from launcher.launch.signal_handler import SignalHandler
    from launcher.tuning.probe_run import Target


@click.command(cls=SettingsCommand, short_help="Find the settings of DataLoader workers.")
@target_arguments
@click.option(
    "--seconds",
    type=Number(min=0.1, largest=86_400),
    default=4.0,
    show_default=True,
    metavar="S",
    help="Longest time of each measurement, in seconds.",
)
@out_option
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON.")
def command(
    target: Target,
    signals: SignalHandler,
    seconds: float,
    out: Path | None,
    *,
    as_json: bool,
) -> int:
    """Find the DataLoader settings for each rank of RECIPE.

    It first reads without workers, to measure the time and the CPU time of a sample beside the time
    of a step. From these it predicts a number of workers, and measures that number, its half and
    double, and the planned number, within the cores, memory and /dev/shm of this machine; the
    fastest ones twice. As long as steps wait for data, it then tries longer prefetch queues,
    threads in the rank or in fewer workers, and other ways to start workers; and pinned memory on
    GPUs. The model trains during each measurement.

    \b
    launcher find loader digits
    launcher find loader digits -n 2 in_memory=false
    """
    from launcher.json_file import encode_json
    from launcher.runs.rundir import create_run_dir
    from launcher.tuning.loader_search import LoaderSearch
    from launcher.tuning.summaries import loader_text, loader_trial_text

    search = LoaderSearch(target, seconds=seconds)
    run_dir = create_run_dir(out, f"find-loader-{search.plan.recipe}")
    result = search.run(
        run_dir, signals, lambda reading: echo(loader_trial_text(reading), err=as_json)
    )
    if as_json:
        echo(encode_json(asdict(result)))
    else:
        echo(loader_text(result, search.plan))
    return 0
