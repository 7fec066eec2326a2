"""`launcher find batch`: the largest micro-batch that fits into memory, and the fastest."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.arguments import Bytes, SettingsCommand, out_option
from launcher.cli.target import target_arguments
from launcher.errors import EXIT_FAILED

if TYPE_CHECKING:
    from launcher.launch.signal_handler import SignalHandler
    from launcher.tuning.probe_run import Target


@click.command(cls=SettingsCommand, short_help="The micro-batch that fits, and the fastest.")
@target_arguments
@click.option(
    "--memory",
    type=Bytes(),
    metavar="SIZE",
    help="What each rank may use, such as 2GiB. Default: its GPU, or its part of what is free.",
)
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@out_option
@click.option("--json", "as_json", is_flag=True, help="Print the trials as JSON.")
def command(
    target: Target,
    signals: SignalHandler,
    memory: int | None,
    fresh: bool,
    out: Path | None,
    as_json: bool,
) -> int:
    """Find how many samples of RECIPE fit through the model at once on each rank.

    Sizes are doubled and then bisected, each in fresh processes under a limit that is enforced, a
    tenth of the memory left free. The global batch never changes: accumulation makes it up. The
    largest size is not always the fastest; the line to paste has the one to take.

    \b
    launcher find batch digits
    launcher find batch digits -n 2 --memory 2GiB strategy=zero2
    """
    from launcher.analysis.batch_sizes import choose
    from launcher.runs.rundir import create_run_dir
    from launcher.tuning.batch_search import BatchSearch, cache_path, read_cache, write_cache
    from launcher.tuning.summaries import batch_text, trial_text

    search = BatchSearch(target, memory=memory)
    kept = cache_path(target, search)
    found = None if fresh else read_cache(kept)
    if found is not None:
        click.echo("measured before; --fresh measures again", err=True)
    else:
        run_dir = create_run_dir(out, f"find-batch-{search.plan.recipe}")
        found = search.run(
            run_dir, signals, lambda trial: click.echo(trial_text(trial), err=as_json)
        )
        write_cache(kept, found)
    chosen = choose(found.trials)
    if as_json:
        settings = {} if chosen is None else {"micro_batch_size": chosen.size}
        click.echo(json.dumps({**asdict(found), "settings": settings}))
    else:
        click.echo(batch_text(found, chosen))
    return EXIT_FAILED if chosen is None else 0
