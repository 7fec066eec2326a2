"""`launcher prove`: the same steps on any number of ranks under any strategy, or why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.arguments import (
    SettingsCommand,
    config_option,
    out_option,
    overrides_argument,
    read_overrides,
    recipe_argument,
)
from launcher.errors import EXIT_FAILED, UsageError

if TYPE_CHECKING:
    from launcher.recipe.overrides import Override

_STEPS = 10


class _List(click.ParamType[tuple[str, ...]]):
    """Comma-separated values, each once."""

    name = "list"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        pieces = (piece.strip() for piece in str(value).split(","))
        return tuple(dict.fromkeys(piece for piece in pieces if piece)) or self.fail(
            "expected values with commas between them, found none."
        )


@click.command(cls=SettingsCommand, short_help="Compare the steps of many ranks and strategies.")
@recipe_argument
@overrides_argument
@click.option(
    "--worlds",
    type=_List(),
    metavar="1,2,4",
    help="Numbers of ranks. Default: 1, 2 and 4, or as many as there are GPUs.",
)
@click.option(
    "--strategies",
    type=_List(),
    metavar="ddp,...",
    help="Out of ddp, fsdp, zero1, zero2 and zero3. Default: those of ddp, fsdp and zero2 that go "
    "with the settings.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=_STEPS,
    show_default=True,
    metavar="K",
    help="Optimizer steps to take in each, of those planned.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    metavar="X",
    help="Relative difference that counts as rounding. Default: 1e-5 in fp32, 1e-10 in fp64.",
)
@config_option
@out_option
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    worlds: tuple[str, ...] | None,
    strategies: tuple[str, ...] | None,
    steps: int,
    tolerance: float | None,
    config: Path | None,
    out: Path | None,
    as_json: bool,
) -> int:
    """Run the first steps of RECIPE on several numbers of ranks, and compare them.

    Sample ids, learning rates and item counts are compared exactly, losses, gradient norms and the
    final weights by their largest relative difference. The exit code is 1 where they differ by more
    than rounding, and the cause is named if it can be told.

    \b
    launcher prove digits
    launcher prove recipes/digits.py --worlds 1,2,3 --strategies ddp,zero3 --steps 20
    launcher prove digits micro_batch_size=16 optimizer=adamw
    launcher prove digits precision=fp64 --steps 60
    """
    from launcher.checks.proof_summary import causes, head, row_line, to_dict, verdict
    from launcher.checks.prove import inspect_trial, plan_trials, run_trials
    from launcher.environment.machine import read_machine
    from launcher.launch.signal_handler import SignalHandler
    from launcher.recipe.resolve import resolve
    from launcher.runs.rundir import create_run_dir

    signals = SignalHandler()
    reference, machine = resolve(recipe), read_machine()
    given = read_overrides(config, overrides)
    _refuse_strategy(given)
    numbers = _numbers(worlds) or [n for n in (1, 2, 4, 8) if n <= (machine.num_gpus or 4)]
    folder = create_run_dir(out, f"prove-{reference.function.__name__}").path
    try:
        trials = plan_trials(
            reference, given, machine, worlds=numbers, strategies=strategies, folder=folder
        )
    except Exception:
        shutil.rmtree(folder)
        raise
    steps = min(steps, trials[0].plan.total_steps)
    if not as_json:
        click.echo(f"{trials[0].plan.recipe}: {steps:,} of {trials[0].plan.total_steps:,} steps")
        click.echo(head())
    rows = []
    for row in run_trials(
        reference, given, trials, steps=steps, tolerance=tolerance, signals=signals
    ):
        rows.append(row)
        if row.error:
            click.echo(f"launcher: {row.error}", err=True)
        if not as_json:
            click.echo(row_line(row))
    differing = [row for row in rows if row.difference is not None and not row.agrees]
    found: list[str] = []
    if differing:
        inspection = inspect_trial(reference, given, differing[0].trial, signals)
        found = [] if inspection is None else causes(inspection, differing[0].trial)
    agree = all(row.agrees for row in rows)
    if as_json:
        values = {"agree": agree, "rows": [to_dict(row) for row in rows], "causes": found}
        click.echo(json.dumps(values))
    else:
        _explain(verdict(rows, steps), found, agree=agree, known=not differing)
    if agree and out is None:
        shutil.rmtree(folder)
    elif not as_json:
        click.echo(f"run folders: {folder}")
    return 0 if agree else EXIT_FAILED


def _refuse_strategy(given: tuple[Override, ...]) -> None:
    if named := [override for override in given if override.name == "strategy"]:
        raise UsageError(
            f"{named[-1]}: what is compared is said by --strategies {named[-1].value}, or with "
            "several that are separated by commas."
        )


def _numbers(worlds: tuple[str, ...] | None) -> list[int]:
    numbers = []
    for text in worlds or ():
        if not text.isdigit() or int(text) < 1:
            raise UsageError(f"--worlds: expected whole numbers of at least 1, found {text!r}.")
        numbers.append(int(text))
    return sorted(set(numbers))


def _explain(said: str, causes: list[str], *, agree: bool, known: bool) -> None:
    click.echo(f"\n{said}")
    for cause in causes:
        click.echo(f"\ncause: {cause}")
    if not agree and not causes and not known:
        click.echo(
            "\nNo cause was found in the data, the loss or the model. Rounding grows with every "
            "step, fastest where the learning rate is high: fewer --steps, or the same ones with "
            "precision=fp64, tell whether it is that."
        )
