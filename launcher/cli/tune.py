"""`launcher tune`: measure learning rate, batch and workers, and write a config file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.settings_command import SettingsCommand
from launcher.cli.target import target_arguments
from launcher.cli.values import Bytes, Count, Number
from launcher.console.echo import echo

if TYPE_CHECKING:
    from launcher.launch.signal_handler import SignalHandler
    from launcher.tuning.probe_run import Target


@click.command(
    cls=SettingsCommand,
    short_help="Tune learning rate, batch size and workers; write a config file.",
)
@target_arguments
@click.option(
    "--memory",
    type=Bytes(),
    metavar="SIZE",
    help="Memory limit of each rank, such as 2GiB. Default: its GPU, or its share of free memory.",
)
@click.option(
    "--steps",
    type=Count(min=40, largest=100_000),
    default=200,
    show_default=True,
    metavar="K",
    help="Steps of each range test, at each learning rate, and of the noise measurement.",
)
@click.option(
    "--seconds",
    type=Number(min=0.1, largest=86_400),
    default=4.0,
    show_default=True,
    metavar="S",
    help="Longest measurement of each number of workers, in seconds.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder to make, or of a tuning to resume. Default: runs/tune-<recipe>-<time>.",
)
def command(
    target: Target,
    signals: SignalHandler,
    memory: int | None,
    steps: int,
    seconds: float,
    out: Path | None,
) -> None:
    """Tune learning rate, batch size, micro-batch and DataLoader workers of RECIPE.

    It raises the learning rate in a range test; measures the gradient noise scale; chooses the
    batch that reaches a loss soonest, from the noise scale and the measured speed of each size;
    finds the learning rate at that batch by short trainings; and measures DataLoader workers.
    Settings given as NAME=VALUE stay fixed. It writes tuned.yaml, with a reason behind each line,
    and a page with the curves. If it is interrupted, repeat the command with --out to resume.

    \b
    launcher tune digits
    launcher tune digits -n 2 batch_size=128 --out runs/tuned
    launcher run digits --config runs/tuned/tuned.yaml
    """
    from launcher.report.page import render
    from launcher.report.tuning_page import TuningReporter, tuning_page, yaml_text
    from launcher.runs.files import write_atomic
    from launcher.tuning.tune import Tuner
    from launcher.tuning.tuning_folder import open_tuning

    _, plan = target.plan()
    run_dir = open_tuning(out, target, plan, memory=memory, steps=steps, seconds=seconds)
    reporter = TuningReporter(echo)
    tuner = Tuner(target, run_dir, signals, reporter, memory=memory, steps=steps, seconds=seconds)
    folder = shlex.quote(run_dir.shown)
    echo(f"To resume this tuning after an interruption, add --out {folder}", err=True)
    findings = tuner.run().settings
    recipe = shlex.quote(target.reference.shown)
    text = yaml_text(target, plan, findings)
    train = f"launcher run {recipe} --config {folder}/tuned.yaml"
    write_atomic(run_dir.path / "tuned.yaml", text)
    content = tuning_page(target, plan, findings, reporter.sections, f"{text}\n{train}")
    write_atomic(run_dir.path / "tuned.html", render(content))
    echo(f"\n{text}\npage: {run_dir.shown}/tuned.html\ntrain with:\n{train}")
