"""`launcher tune`: measure all that a recipe leaves open, and write it down."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.arguments import Bytes, SettingsCommand
from launcher.cli.target import target_arguments

if TYPE_CHECKING:
    from launcher.launch.launcher import SignalHandler
    from launcher.tuning.probe_run import Target


@click.command(cls=SettingsCommand, short_help="Find all of it, and write a file for --config.")
@target_arguments
@click.option(
    "--memory",
    type=Bytes(),
    metavar="SIZE",
    help="What each rank may use, such as 2GiB. Default: its GPU, or its part of what is free.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=40),
    default=200,
    show_default=True,
    metavar="K",
    help="Optimizer steps of each range test, and of measuring the noise.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.5),
    default=4.0,
    show_default=True,
    metavar="S",
    help="For how long each number of workers is measured.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The folder to make, or to go on in. Default: runs/tune-<recipe>-<time>.",
)
def command(
    target: Target,
    signals: SignalHandler,
    memory: int | None,
    steps: int,
    seconds: float,
    out: Path | None,
) -> None:
    """Find what RECIPE should be set to: learning rate, batch, micro-batch, workers.

    One after the other: a learning-rate range test, and short trainings around what it suggests;
    the gradient noise scale; the batch that gets
    to a loss the soonest, by the noise scale and by how fast each size was measured to be, and the
    learning rate at that batch; DataLoader workers. What is given as NAME=VALUE stays as it is.
    Writes tuned.yaml, with why behind each line, and a page with the curves. Where it is stopped,
    the same command with --out goes on.

    \b
    launcher tune digits
    launcher tune digits -n 2 batch_size=128 --out runs/tuned
    launcher run digits --config runs/tuned/tuned.yaml
    """
    from launcher.report.page import render
    from launcher.report.tuning_page import TuningReporter, page, yaml_text
    from launcher.runs.rundir import write_atomic
    from launcher.tuning.tune import Tuner
    from launcher.tuning.tuning_folder import open_tuning

    _, plan = target.plan()
    run_dir = open_tuning(out, target, plan, memory=memory, steps=steps, seconds=seconds)
    teller = TuningReporter(click.echo)
    tuner = Tuner(target, run_dir, signals, teller, memory=memory, steps=steps, seconds=seconds)
    folder = shlex.quote(run_dir.shown)
    click.echo(f"stopped, it goes on with --out {folder}", err=True)
    findings = tuner.run().settings
    recipe = shlex.quote(target.reference.shown)
    text = yaml_text(target, plan, findings)
    train = f"launcher run {recipe} --config {folder}/tuned.yaml"
    write_atomic(run_dir.path / "tuned.yaml", text)
    shown = page(target, plan, findings, teller.sections, f"{text}\n{train}")
    write_atomic(run_dir.path / "tuned.html", render(shown))
    click.echo(f"\n{text}\npage: {run_dir.shown}/tuned.html\ntrain with:\n{train}")
