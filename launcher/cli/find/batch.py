"""`launcher find batch`: find the largest micro-batch that fits into memory, and the fastest."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.arguments import out_option
from launcher.cli.settings_command import SettingsCommand
from launcher.cli.target import target_arguments
from launcher.cli.values import Bytes
from launcher.console.echo import echo
from launcher.errors import EXIT_FAILED

if TYPE_CHECKING:
    from launcher.launch.signal_handler import SignalHandler
    from launcher.tuning.probe_run import Target


@click.command(cls=SettingsCommand, short_help="Find the micro-batch that fits, and the fastest.")
@target_arguments
@click.option(
    "--memory",
    type=Bytes(),
    metavar="SIZE",
    help="Memory limit of each rank, such as 2GiB. Default: its GPU, or its share of free memory.",
)
@click.option("--fresh", is_flag=True, help="Ignore cached measurements and measure again.")
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
    """Find how many samples of RECIPE fit into memory at once on each rank.

    The search doubles and then bisects the size. Each trial runs in new processes under an enforced
    memory limit that leaves a tenth free. The global batch stays the same: accumulation makes up
    the difference. The largest size is not always the fastest; the printed setting is the fastest.

    \b
    launcher find batch digits
    launcher find batch digits -n 2 --memory 2GiB strategy=zero2
    """
    from launcher.analysis.batch_sizes import choose_size
    from launcher.json_file import encode_json
    from launcher.runs.rundir import create_run_dir
    from launcher.tuning.batch_search import BatchSearch, cache_path, read_cache, write_cache
    from launcher.tuning.summaries import batch_text, size_trial_text

    search = BatchSearch(target, memory=memory)
    cached = cache_path(target, search)
    result = None if fresh else read_cache(cached)
    if result is not None:
        echo("using the cached measurements; --fresh measures again", err=True)
    else:
        run_dir = create_run_dir(out, f"find-batch-{search.plan.recipe}")
        result = search.run(
            run_dir, signals, lambda trial: echo(size_trial_text(trial), err=as_json)
        )
        write_cache(cached, result)
    chosen = choose_size(result.trials)
    if as_json:
        settings = {} if chosen is None else {"micro_batch_size": chosen.size}
        echo(encode_json({**asdict(result), "settings": settings}))
    else:
        echo(batch_text(result, chosen))
    return EXIT_FAILED if chosen is None else 0
