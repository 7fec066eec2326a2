"""`launcher prove`: compare the steps of a recipe over numbers of ranks and strategies."""

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
    """Comma-separated values without duplicates."""

    name = "list"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        items = (item.strip() for item in str(value).split(","))
        return tuple(dict.fromkeys(item for item in items if item)) or self.fail(
            "expected comma-separated values, found none."
        )


@click.command(
    cls=SettingsCommand, short_help="Compare steps over numbers of ranks and strategies."
)
@recipe_argument
@overrides_argument
@click.option(
    "--worlds",
    type=_List(),
    metavar="1,2,4",
    help="Numbers of ranks. Default: 1, 2 and 4; with GPUs, powers of two up to their number.",
)
@click.option(
    "--strategies",
    type=_List(),
    metavar="ddp,...",
    help="Strategies: ddp, fsdp, zero1, zero2, zero3. Default: ddp, fsdp and zero2, where the "
    "settings allow them.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=_STEPS,
    show_default=True,
    metavar="K",
    help="Optimizer steps of each run, of those planned.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    metavar="X",
    help="Largest relative difference that counts as rounding. Default: 1e-5 in fp32, 1e-10 in "
    "fp64.",
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
    """Run the first steps of RECIPE on several numbers of ranks and compare them.

    Sample ids, learning rates and item counts must be equal; losses, gradient norms and final
    weights are compared by their largest relative difference. The exit code is 1 if they differ by
    more than rounding; the cause is named if it can be found.

    \b
    launcher prove digits
    launcher prove recipes/digits.py --worlds 1,2,3 --strategies ddp,zero3 --steps 20
    launcher prove digits micro_batch_size=16 optimizer=adamw
    launcher prove digits precision=fp64 --steps 60
    """
    from launcher.checks.proof_summary import causes, header, row_line, to_dict, verdict
    from launcher.checks.prove import inspect_trial, plan_trials, run_trials
    from launcher.environment.machine import read_machine
    from launcher.launch.signal_handler import SignalHandler
    from launcher.recipe.resolve import resolve
    from launcher.runs.rundir import create_run_dir

    signals = SignalHandler()
    reference, machine = resolve(recipe), read_machine()
    all_overrides = read_overrides(config, overrides)
    _refuse_strategy(all_overrides)
    numbers = _numbers(worlds) or [n for n in (1, 2, 4, 8) if n <= (machine.num_gpus or 4)]
    folder = create_run_dir(out, f"prove-{reference.function.__name__}").path
    try:
        trials = plan_trials(
            reference, all_overrides, machine, worlds=numbers, strategies=strategies, folder=folder
        )
    except Exception:
        shutil.rmtree(folder)
        raise
    steps = min(steps, trials[0].plan.total_steps)
    if not as_json:
        click.echo(f"{trials[0].plan.recipe}: {steps:,} of {trials[0].plan.total_steps:,} steps")
        click.echo(header())
    rows = []
    for row in run_trials(
        reference, all_overrides, trials, steps=steps, tolerance=tolerance, signals=signals
    ):
        rows.append(row)
        if row.error:
            click.echo(f"launcher: {row.error}", err=True)
        if not as_json:
            click.echo(row_line(row))
    differing = [row for row in rows if row.difference is not None and not row.agrees]
    found_causes: list[str] = []
    if differing:
        inspection = inspect_trial(reference, all_overrides, differing[0].trial, signals)
        found_causes = [] if inspection is None else causes(inspection, differing[0].trial)
    agree = all(row.agrees for row in rows)
    if as_json:
        values = {"agree": agree, "rows": [to_dict(row) for row in rows], "causes": found_causes}
        click.echo(json.dumps(values))
    else:
        _explain(verdict(rows, steps), found_causes, agree=agree, known=not differing)
    if agree and out is None:
        shutil.rmtree(folder)
    elif not as_json:
        click.echo(f"run folders: {folder}")
    return 0 if agree else EXIT_FAILED


def _refuse_strategy(all_overrides: tuple[Override, ...]) -> None:
    if named := [override for override in all_overrides if override.name == "strategy"]:
        raise UsageError(
            f"{named[-1]}: choose what is compared with --strategies {named[-1].value}, or with a "
            "comma-separated list."
        )


def _numbers(worlds: tuple[str, ...] | None) -> list[int]:
    numbers = []
    for text in worlds or ():
        if not text.isdigit() or int(text) < 1:
            raise UsageError(f"--worlds: expected whole numbers of at least 1, found {text!r}.")
        numbers.append(int(text))
    return sorted(set(numbers))


def _explain(conclusion: str, causes: list[str], *, agree: bool, known: bool) -> None:
    click.echo(f"\n{conclusion}")
    for cause in causes:
        click.echo(f"\ncause: {cause}")
    if not agree and not causes and not known:
        click.echo(
            "\nNo cause was found in the data, the loss or the model. Rounding errors grow with "
            "every step, fastest at high learning rates: run fewer --steps, or set precision=fp64, "
            "to see whether rounding is the cause."
        )
