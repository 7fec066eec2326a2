"""`launcher sweep`: train a recipe with every combination of some settings, on this machine."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.cli.arguments import (
    config_option,
    output_mode,
    output_options,
    overrides_argument,
    recipe_argument,
)
from launcher.cli.settings_command import SettingsCommand
from launcher.cli.values import MAX_NODES, Count, Folder
from launcher.console.echo import echo, echo_if_possible
from launcher.errors import UsageError

if TYPE_CHECKING:
    from launcher.recipe.overrides import Override
    from launcher.runs.job import OutputMode
    from launcher.runs.rundir import RunDir
    from launcher.sweeps.sweep_record import Choice
    from launcher.sweeps.sweep_request import PreparedSweep, SweepTrial
    from launcher.sweeps.sweep_result import SweepResult, TrialResult


@click.command(cls=SettingsCommand, short_help="Train a recipe with many combinations of settings.")
@recipe_argument
@overrides_argument
@click.option(
    "-n",
    "--nproc-per-node",
    type=Count(min=1, largest=MAX_NODES),
    default=1,
    show_default=True,
    metavar="N",
    help="Ranks of each run.",
)
@click.option(
    "--parallel",
    type=Count(min=1, largest=MAX_NODES),
    metavar="P",
    help="Runs at a time. Default: as many as there are GPUs for; 1 on the CPU.",
)
@click.option(
    "--metric",
    default="loss:min",
    show_default=True,
    metavar="NAME:MODE",
    help="Metric that compares the runs, and whether its maximum or minimum is best.",
)
@click.option(
    "--stop",
    type=click.Choice(("halving",)),
    help="Rule that ends runs early: halving keeps one of every --eta runs at each choice.",
)
@click.option(
    "--eta",
    type=Count(min=2, largest=1000),
    default=3,
    show_default=True,
    metavar="E",
    help="With --stop: of every E runs, the best goes on, for E times as many steps.",
)
@click.option(
    "--min-steps",
    type=Count(min=1, largest=2**53),
    metavar="K",
    help="With --stop: steps before the first choice. Default: what leaves one run at the end.",
)
@config_option
@click.option(
    "--out",
    type=Folder(),
    metavar="DIR",
    help="Folder to make, or of a sweep to continue. Default: runs/sweep-<recipe>-<time>.",
)
@output_options
def command(
    recipe: str,
    overrides: tuple[str, ...],
    nproc_per_node: int,
    parallel: int | None,
    metric: str,
    stop: Any,
    eta: int,
    min_steps: int | None,
    config: Path | None,
    out: Path | None,
    *,
    quiet: bool,
    as_json: bool,
) -> int:
    """Train RECIPE once for each combination of the values that NAME=V1,V2... lists.

    A setting with one value has it in every run. Each run has a folder of its own below that of the
    sweep. If the sweep is interrupted, `launcher resume DIR` continues it: runs that have finished
    are skipped, and the others continue from their checkpoints. A run that fails does not end the
    others; the exit code is then 1.

    \b
    launcher sweep digits lr=0.05,0.1,0.2 seed=1,2
    launcher sweep digits lr=0.05,0.1,0.2 epochs=5 --metric accuracy:max --parallel 2
    launcher sweep digits lr=0.01,0.02,0.05,0.1,0.2,0.5,1,2,5 --stop halving --metric accuracy:max
    """
    from launcher.environment.machine import read_machine
    from launcher.launch.only_launcher import check_only_launcher
    from launcher.recipe.grid import read_axes
    from launcher.recipe.metric_goal import read_goal
    from launcher.recipe.overrides import COMMAND_LINE, Override, read_yaml
    from launcher.recipe.resolve import resolve
    from launcher.sweeps.sweep_request import SweepRequest, prepare_sweep, rule_of

    mode = output_mode(quiet=quiet, as_json=as_json)
    check_only_launcher()
    axes = read_axes(overrides)
    if not axes:
        raise UsageError(
            "A sweep needs at least one setting with its values, such as lr=0.05,0.1,0.2."
        )
    fixed: list[Override] = [*(read_yaml(config) if config else ())]
    for name in [name for name, values in axes.items() if len(values) == 1 and len(axes) > 1]:
        fixed.append(Override(name=name, value=axes[name][0], source=COMMAND_LINE))
    fixed_names = {override.name for override in fixed if override.source == COMMAND_LINE}
    request = SweepRequest(
        reference=resolve(recipe),
        axes={name: values for name, values in axes.items() if name not in fixed_names},
        source=COMMAND_LINE,
        overrides=tuple(fixed),
        nproc_per_node=nproc_per_node,
        parallel=parallel,
        goal=read_goal(metric, where="--metric"),
        rule=rule_of(stop, eta, min_steps),
    )
    return train_sweep(prepare_sweep(request, read_machine()), out, mode)


def resume_sweep(folder: Path, nproc_per_node: int | None, mode: OutputMode) -> int:
    """Continue the sweep in a folder, as `launcher resume` does; return the exit code."""
    from launcher.environment.machine import read_machine
    from launcher.launch.only_launcher import check_only_launcher
    from launcher.recipe.metric_goal import read_goal
    from launcher.runs.rebuilding import folder_of_command, working_folder
    from launcher.sweeps.sweep_record import read_sweep
    from launcher.sweeps.sweep_request import prepare_sweep, request_of

    check_only_launcher()
    record, out = read_sweep(folder), folder.resolve()
    goal = read_goal(record.metric, where="sweep.json")
    with working_folder(folder_of_command(record.folder)):
        request = request_of(record, out, goal, nproc_per_node=nproc_per_node)
        return train_sweep(prepare_sweep(request, read_machine()), out, mode)


def train_sweep(sweep: PreparedSweep, out: Path | None, mode: OutputMode) -> int:
    """Train the runs of a sweep, print its table and write its page; return the exit code."""
    from launcher.report.sweep_page import write_sweep_page
    from launcher.sweeps.sweep_table import sweep_lines
    from launcher.sweeps.sweeper import run_sweep

    listener = _Reporter(mode)
    try:
        result = run_sweep(sweep, listener, out=out, announces=True)
    finally:
        listener.close()
    page = write_sweep_page(result)
    if mode == "json":
        best = result.best
        values = {"event": "result", "best": None if best is None else best.index}
        _print_json(values | {"exit_code": result.exit_code, "folder": str(result.path)})
    elif mode == "progress":
        shown = shlex.quote(_shown(result))
        lines = ["", *sweep_lines(result), f"folder: {shown}", f"page: {page.name} in that folder"]
        if not result.finished:
            lines.append(f"Continue with:\nlauncher resume {shown}")
        echo_if_possible("\n".join(lines))
    return result.exit_code


def _shown(result: SweepResult) -> str:
    from launcher.runs.rundir import RunDir

    return RunDir(result.path).shown


def _print_json(values: dict[str, Any]) -> None:
    from launcher.console.progress import json_line

    echo_if_possible(json_line(values))


class _Reporter:
    """Prints what a sweep does; on a terminal, one line shows the runs that are training.

    Args:
        mode: What to print.
    """

    def __init__(self, mode: OutputMode) -> None:
        self._mode = mode
        self._total, self._done = 0, 0
        self._live = mode == "progress" and sys.stderr.isatty()
        self._drawn, self._due = 0, 0.0

    def on_begin(self, sweep: PreparedSweep, folder: RunDir, num_done: int) -> None:
        """Print the size of the sweep and where it is."""
        from launcher.planning.derivations import counted

        plans = [trial.plan for trial in sweep.trials]
        self._total, self._done = len(plans), num_done
        if self._mode == "json":
            _print_json(
                {"event": "swept", "folder": str(folder.path), "runs": len(plans)}
                | {"done": num_done, "parallel": len(sweep.shares), "rungs": sweep.rungs}
            )
            return
        steps = sorted({plan.total_steps for plan in plans})
        length = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
        share = sweep.shares[0]
        unit = "GPU" if share.gpus else "CPU rank"
        text = (
            f"{plans[0].recipe}: {counted(len(plans), 'run')} of {length} steps, "
            f"{len(sweep.shares)} at a time on {counted(plans[0].nproc_per_node, unit)} each"
        )
        if num_done:
            text += f"; {num_done} of them need no more training"
        self._print(text)
        for number, rung in enumerate(sweep.rungs, start=1):
            when = f"{min(rung):,}" if len(set(rung)) == 1 else f"{min(rung):,} to {max(rung):,}"
            self._print(f"  choice {number} after step {when}, by {sweep.goal}")

    def on_start(self, trial: SweepTrial, run_dir: RunDir, until: int) -> None:
        """Print that a run starts, for programs alone."""
        if self._mode == "json":
            values = {"event": "started", "run": trial.index, "settings": dict(trial.settings)}
            _print_json(values | {"run_dir": str(run_dir.path), "until": until})

    def on_wait(self, running: Sequence[tuple[SweepTrial, RunDir]], num_waiting: int) -> None:
        """Redraw the line about the runs that are training, once a second."""
        from launcher.runs.status import progress_text

        if not self._live or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + 1.0
        parts = [
            f"{trial.shown}: {progress_text(run_dir, trial.plan.total_steps)}"
            for trial, run_dir in running
        ]
        self._draw(f"{'; '.join(parts)}; {num_waiting} waiting")

    def on_end(self, result: TrialResult) -> None:
        """Print what a run has come to."""
        from launcher.console.progress import metrics_text

        if self._mode == "json":
            values = {"event": "ended", "run": result.index, "state": result.state}
            _print_json(
                values
                | {"step": result.step, "evaluation": dict(result.metrics), "error": result.error}
            )
            return
        self._done += result.state == "finished"
        settings = " ".join(f"{name}={value}" for name, value in result.settings.items())
        words = f"{result.state} after step {result.step:,}"
        if result.state == "stopped":
            words = f"paused after step {result.step:,}"
        what = result.error.partition("\n")[0] or metrics_text(dict(result.metrics))
        self._print(f"{self._done}/{self._total} done  {settings}  {words}  {what}".rstrip())

    def on_choice(self, choice: Choice) -> None:
        """Print which runs go on."""
        if self._mode == "json":
            _print_json({"event": "chosen", "tried": choice.tried, "kept": choice.kept})
            return
        kept = ", ".join(map(str, choice.kept)) or "none"
        self._print(f"{len(choice.kept)} of {len(choice.tried)} runs go on: {kept}")

    def close(self) -> None:
        """Clear the line."""
        if self._drawn:
            self._draw("")

    def _print(self, text: str) -> None:
        if self._mode == "progress":
            self.close()
            echo_if_possible(text)

    def _draw(self, text: str) -> None:
        import shutil

        width = shutil.get_terminal_size().columns - 1
        shown = text if len(text) <= width else f"{text[: width - 4]} ..."
        with contextlib.suppress(OSError):
            echo(f"\r{shown.ljust(self._drawn)}\r", err=True, newline=False, keep="\r")
        self._drawn = len(shown)
