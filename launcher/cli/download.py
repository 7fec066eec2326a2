"""`launcher download`: download a run from an object store."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.cli.values import Folder
from launcher.console.echo import echo


@click.command(short_help="Download a run from an object store.")
@click.argument("url", metavar="URL")
@click.argument("out", metavar="[DIR]", required=False, type=Folder())
@click.option(
    "--from",
    "checkpoint",
    metavar="STEP",
    help="Download this checkpoint, such as 120. Default: the newest.",
)
@click.option(
    "--auto",
    "fall_back",
    is_flag=True,
    help="If the checkpoint is damaged, take the newest older one that is not.",
)
@click.option("--no-checkpoint", is_flag=True, help="Download no checkpoint.")
@click.option("--if-exists", is_flag=True, hidden=True, help="Do nothing if there is no run.")
@click.option("--to-resume", is_flag=True, hidden=True, help="Refuse a run that is in use.")
def command(
    url: str,
    out: Path | None,
    checkpoint: str | None,
    *,
    fall_back: bool,
    no_checkpoint: bool,
    if_exists: bool,
    to_resume: bool,
) -> None:
    """Download the run at URL, with its newest checkpoint, to DIR or to a new folder below runs/.

    Every file is verified by its SHA-256. What else launcher does with a run, it does with the
    downloaded folder: `launcher report`, `evaluate`, `predict`, `export`.

    \b
    launcher download s3://bucket/runs/mine
    launcher download s3://bucket/runs/mine mine --no-checkpoint
    """
    from launcher.launch.remote_run import store_at, unused_folder
    from launcher.mirrors.opened_url import check_writable
    from launcher.mirrors.run_download import DownloadChoice, download_run, has_run
    from launcher.runs.process_owner import this_process

    def announce(text: str) -> None:
        echo(f"launcher: {text}", err=True)

    store = store_at(url)
    exists = has_run(store)
    if if_exists and not exists:
        return
    if to_resume and exists:
        check_writable(store, this_process(), announce)
    choice = DownloadChoice(
        checkpoint=checkpoint, fall_back=fall_back, leaves_out_checkpoints=no_checkpoint
    )
    run_dir = download_run(store, out or unused_folder(url), choice, announce)
    echo(run_dir.shown)
