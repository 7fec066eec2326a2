"""`launcher find batch`: the largest micro-batch that fits into memory, and the fastest."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from launcher.cli.arguments import (
    Bytes,
    SettingsCommand,
    config_option,
    nproc_option,
    out_option,
    overrides_argument,
    read_overrides,
)
from launcher.errors import EXIT_FAILED


@click.command(cls=SettingsCommand, short_help="The micro-batch that fits, and the fastest.")
@click.argument("recipe")
@overrides_argument
@nproc_option
@click.option(
    "--memory",
    type=Bytes(),
    metavar="SIZE",
    help="What each rank may use, such as 2GiB. Default: its GPU, or its part of what is free.",
)
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@config_option
@out_option
@click.option("--json", "as_json", is_flag=True, help="Print the trials as JSON.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    nproc_per_node: int | None,
    memory: int | None,
    fresh: bool,
    config: Path | None,
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
    from launcher.find.batch import BatchSearch, cache_path, read_cache, write_cache
    from launcher.finders.batch import choose
    from launcher.launch import Stops
    from launcher.machine import read_machine
    from launcher.report.found import batch_text, trial_text
    from launcher.resolve import resolve
    from launcher.rundir import create_run_dir

    stops = Stops()
    reference, given = resolve(recipe), read_overrides(config, overrides)
    search = BatchSearch(
        reference, given, read_machine(), nproc_per_node=nproc_per_node, memory=memory
    )
    kept = cache_path(reference, given, search)
    found = None if fresh else read_cache(kept)
    if found is not None:
        click.echo("measured before; --fresh measures again", err=True)
    else:
        run_dir = create_run_dir(out, f"find-batch-{search.plan.recipe}")
        found = search.run(run_dir, stops, lambda trial: click.echo(trial_text(trial), err=as_json))
        write_cache(kept, found)
    chosen = choose(found.trials)
    if as_json:
        settings = {} if chosen is None else {"micro_batch_size": chosen.size}
        click.echo(json.dumps({**asdict(found), "settings": settings}))
    else:
        click.echo(batch_text(found, chosen))
    return EXIT_FAILED if chosen is None else 0
