"""`launcher find lr`: find the learning rate by a range test and short trainings."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import click

from launcher.analysis.lr_trials import DEFAULT_STEPS
from launcher.cli.arguments import out_option
from launcher.cli.settings_command import SettingsCommand
from launcher.cli.target import target_arguments
from launcher.cli.values import Count, Number
from launcher.console.echo import echo
from launcher.errors import EXIT_FAILED, UsageError

Rule = Literal["trainings", "lowest"]

if TYPE_CHECKING:
    from launcher.launch.signal_handler import SignalHandler
    from launcher.tuning.probe_run import Target


@click.command(cls=SettingsCommand, short_help="Find the learning rate by short trainings.")
@target_arguments
@click.option(
    "--from",
    "lowest",
    type=Number(min=0, min_open=True),
    default=1e-6,
    show_default=True,
    metavar="LR",
    help="Learning rate of the first step.",
)
@click.option(
    "--to",
    "highest",
    type=Number(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="LR",
    help="Learning rate of the last step; the test stops earlier if the loss diverges.",
)
@click.option(
    "--steps",
    type=Count(min=20, largest=100_000),
    default=DEFAULT_STEPS,
    show_default=True,
    metavar="K",
    help="Steps of the range test, and of each short training.",
)
@click.option(
    "--rule",
    type=click.Choice(get_args(Rule)),
    default="trainings",
    show_default=True,
    help="Suggestion to use; lowest takes the range test alone, and is right less often.",
)
@out_option
@click.option("--json", "as_json", is_flag=True, help="Print curve and suggestions as JSON.")
def command(
    target: Target,
    signals: SignalHandler,
    lowest: float,
    highest: float,
    steps: int,
    rule: Rule,
    out: Path | None,
    *,
    as_json: bool,
) -> int:
    """Train RECIPE at its global batch in short trainings, and find the best learning rate.

    First a range test raises the learning rate until the loss diverges. From where its loss is
    lowest, short trainings go through the whole schedule, each at a learning rate twice as high or
    half as high, until the best lies between two that are worse. It is lowered for a recipe with
    more steps than these. All run on the planned ranks under the planned strategy. The printed
    setting is converted to the recipe's lr_batch_size.

    \b
    launcher find lr digits
    launcher find lr digits -n 2 strategy=fsdp --steps 400
    launcher find lr digits optimizer=adamw --rule lowest
    """
    from launcher.analysis.lr_trials import LRTrial
    from launcher.console.plots import has_images, write_png
    from launcher.json_file import encode_json
    from launcher.runs.rundir import create_run_dir
    from launcher.tuning.lr_search import find_lr, plan_range_test, recipe_lr_settings, try_lrs
    from launcher.tuning.summaries import lr_plot, lr_text, lr_trial_text

    if lowest >= highest:
        raise UsageError(f"--from {lowest:g} --to {highest:g}: the learning rate must rise.")
    recipe, _ = target.plan()
    test = plan_range_test(target, lowest=lowest, highest=highest, steps=steps)
    run_dir = create_run_dir(out, f"find-lr-{test.plan.recipe}")
    result = find_lr(test, run_dir, signals, quiet=as_json)
    if rule == "trainings":

        def report(trial: LRTrial) -> None:
            echo(lr_trial_text(trial), err=True)

        result = try_lrs(result, target, run_dir, signals, report, steps=steps)
    chosen = getattr(result.suggestions, rule)
    settings = {} if chosen is None else recipe_lr_settings(chosen, test.plan.batch_size, recipe)
    if as_json:
        values = {"batch_size": test.plan.batch_size, "settings": settings, **asdict(result)}
        echo(encode_json(values))
    else:
        echo(lr_text(result, rule, settings, test.plan))
    plot = lr_plot(result, test.plan)
    if has_images():
        write_png(plot, run_dir.path / "lr.png")
        echo(f"plot: {run_dir.shown}/lr.png", err=as_json)
    return EXIT_FAILED if chosen is None else 0
