"""`launcher evaluate`: evaluate the weights of a run."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.cli.arguments import overrides_argument, read_overrides, weights_options
from launcher.cli.settings_command import SettingsCommand
from launcher.console.echo import echo


@click.command(cls=SettingsCommand, short_help="Evaluate the weights of a run.")
@weights_options
@overrides_argument
@click.option(
    "--data",
    metavar="NAME=VALUE",
    multiple=True,
    help="Parameter by which the recipe reads other data. May be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
def command(
    run_dir: Path,
    overrides: tuple[str, ...],
    checkpoint: str | None,
    nproc_per_node: int | None,
    data: tuple[str, ...],
    *,
    as_json: bool,
) -> None:
    """Evaluate the weights of the run in RUN over its evaluation data, each sample once.

    The recipe and its settings are those of the run, except what NAME=VALUE and --data change. On
    as many ranks as trained, the metrics are those that the run recorded, to the bit. Nothing is
    written to the run folder.

    \b
    launcher evaluate runs/digits-20260101-120000
    launcher evaluate runs/digits-20260101-120000 --checkpoint 120 -n 1
    launcher evaluate runs/mine --data files=other.txt --json
    """
    from launcher.console.evaluation_table import evaluation_text
    from launcher.json_file import encode_json
    from launcher.launch.evaluate_run import WeightsRequest, evaluate_run
    from launcher.launch.signal_handler import SignalHandler

    signals = SignalHandler(saves=False)
    request = WeightsRequest(
        run_dir=run_dir,
        checkpoint=checkpoint,
        overrides=read_overrides(None, (*overrides, *data)),
        nproc_per_node=nproc_per_node,
    )
    evaluation = evaluate_run(request, signals)
    echo(encode_json(evaluation.to_dict()) if as_json else evaluation_text(evaluation))
