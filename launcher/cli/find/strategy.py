"""`launcher find strategy`: find the cheapest strategy that fits into a memory limit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.arguments import (
    node_count_option,
    out_option,
)
from launcher.cli.settings_command import SettingsCommand
from launcher.cli.target import target_arguments
from launcher.cli.values import Bytes, Choices, Count
from launcher.console.echo import echo
from launcher.errors import EXIT_FAILED
from launcher.planning.strategy import STRATEGIES

if TYPE_CHECKING:
    from launcher.launch.signal_handler import SignalHandler
    from launcher.tuning.probe_run import Target


@click.command(
    cls=SettingsCommand, short_help="Find the cheapest strategy that fits into a memory limit."
)
@target_arguments
@node_count_option
@click.option(
    "--memory",
    type=Bytes(),
    metavar="SIZE",
    help="Memory limit of each rank, such as 24GiB. Default: its GPU, or its share of free memory.",
)
@click.option(
    "--trials",
    type=Count(min=0, largest=100),
    default=3,
    show_default=True,
    metavar="K",
    help="Short trainings with the cheapest combinations that fit; 0 only plans.",
)
@click.option(
    "--strategies",
    type=Choices(tuple(STRATEGIES)),
    metavar="NAMES",
    help="Strategies to consider, with commas between them. Default: all.",
)
@out_option
@click.option("--json", "as_json", is_flag=True, help="Print combinations and trials as JSON.")
def command(
    target: Target,
    signals: SignalHandler,
    nodes: int,
    memory: int | None,
    trials: int,
    strategies: tuple[str, ...] | None,
    out: Path | None,
    as_json: bool,
) -> int:
    """Find the cheapest strategy, offloading, checkpointing and micro-batch of RECIPE that fit.

    The memory of each combination is computed from the sizes of the model, which is built without
    memory for its values; a tenth of the limit stays free. Combinations that offload are the
    dearest, then those that recompute activations, then those that send more. The cheapest that fit
    are tried in short trainings, if this machine can run all ranks, and the printed settings are
    the fastest of them. The global batch stays the same.

    \b
    launcher find strategy gpt -n 2 --memory 200MiB
    launcher find strategy gpt -n 8 --nodes 2 device=cuda width=2048 --memory 24GiB
    """
    from launcher.json_file import encode_json
    from launcher.runs.rundir import create_run_dir
    from launcher.tuning.strategy_search import StrategySearch
    from launcher.tuning.strategy_text import strategy_text, strategy_trial_text

    search = StrategySearch(target, memory=memory, nodes=nodes, strategies=strategies)
    run_dir = None
    if trials and search.can_measure:
        run_dir = create_run_dir(out, f"find-strategy-{search.plan.recipe}")
    elif trials:
        echo("nothing is measured: this machine cannot run all ranks of the plan", err=True)
    result = search.run(
        run_dir,
        signals,
        lambda trial: echo(strategy_trial_text(trial), err=as_json),
        num_trials=trials,
    )
    echo(encode_json(asdict(result)) if as_json else strategy_text(result))
    return EXIT_FAILED if result.chosen is None else 0
