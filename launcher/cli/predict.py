"""`launcher predict`: write what the model of a run predicts for each sample."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.cli.arguments import overrides_argument, read_overrides, weights_options
from launcher.cli.settings_command import SettingsCommand
from launcher.console.echo import echo


@click.command(cls=SettingsCommand, short_help="Write the predictions of a run's model.")
@weights_options
@click.argument("input", metavar="INPUT")
@overrides_argument
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="File to write: JSON lines (.jsonl) or Parquet (.parquet).",
)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def command(
    run_dir: Path,
    input: str,  # noqa: A002  # as the user reads it
    overrides: tuple[str, ...],
    checkpoint: str | None,
    nproc_per_node: int | None,
    out: Path,
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Write what the model of the run in RUN predicts for each sample of INPUT.

    INPUT is a file that the recipe's predict_data reads, or the name of a data set of the recipe:
    train, evaluation, or that of one of several evaluation sets. The columns are those that the
    recipe's predict returns or, without it, the outputs of forward. Each sample is predicted once,
    and FILE is in the order of the data on any number of ranks.

    \b
    launcher predict runs/digits-20260101-120000 evaluation --out predictions.jsonl
    launcher predict runs/mine new.csv --out predictions.parquet --checkpoint last -n 4
    """
    from launcher.json_file import encode_json
    from launcher.launch.predict_run import PredictRequest, predict_run
    from launcher.launch.signal_handler import SignalHandler

    signals = SignalHandler(saves=False)
    request = PredictRequest(
        run_dir=run_dir,
        checkpoint=checkpoint,
        overrides=read_overrides(None, overrides),
        nproc_per_node=nproc_per_node,
        input=input,
        out=out,
        force=force,
    )
    written = predict_run(request, signals)
    if as_json:
        echo(encode_json(written.to_dict()))
        return
    echo(
        f"wrote {out}: {written.num_samples:,} samples, {', '.join(written.columns)}, by "
        f"{written.weights} after step {written.step:,}"
    )
