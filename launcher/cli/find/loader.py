"""`launcher find loader`: how many DataLoader workers a data set is worth."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.arguments import SettingsCommand, out_option
from launcher.cli.target import target_arguments

if TYPE_CHECKING:
    from launcher.launch.signal_handler import SignalHandler
    from launcher.tuning.probe_run import Target


@click.command(cls=SettingsCommand, short_help="The DataLoader workers that are worth it.")
@target_arguments
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.5),
    default=4.0,
    show_default=True,
    metavar="S",
    help="For how long each number of workers is measured.",
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
    """Find how many DataLoader workers each rank of RECIPE is worth.

    First without any: what reading a sample takes, and how much of that is work rather than
    waiting, beside what computing on it takes. That predicts a number, which is measured together
    with the planned one, half and twice of it, within the cores, the memory and the /dev/shm there
    are; then a longer queue of batches where one that is slow to read would stall a step, and on
    GPUs whether pinned memory pays. Each is measured for some seconds while the model is trained.

    \b
    launcher find loader digits
    launcher find loader digits -n 2 in_memory=false
    """
    from launcher.runs.rundir import create_run_dir
    from launcher.tuning.loader_search import LoaderSearch
    from launcher.tuning.summaries import loader_text, reading_text

    search = LoaderSearch(target, seconds=seconds)
    run_dir = create_run_dir(out, f"find-loader-{search.plan.recipe}")
    found = search.run(
        run_dir, signals, lambda reading: click.echo(reading_text(reading), err=as_json)
    )
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        click.echo(loader_text(found, search.plan))
    return 0
