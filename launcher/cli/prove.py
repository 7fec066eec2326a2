"""`launcher prove`: compare the steps of a recipe over numbers of ranks and strategies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.arguments import (
    config_option,
    out_option,
    overrides_argument,
    read_overrides,
    recipe_argument,
)
from launcher.cli.settings_command import SettingsCommand
from launcher.cli.values import MAX_NODES, Count, Number
from launcher.console.echo import echo
from launcher.errors import EXIT_FAILED, UsageError
from launcher.recipe.text_values import digits

if TYPE_CHECKING:
    from launcher.checks.proof import Proof
    from launcher.checks.prove import ParityRow, ParityRun

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
    type=Count(min=1, largest=10**9),
    default=_STEPS,
    show_default=True,
    metavar="K",
    help="Optimizer steps of each run, of those planned.",
)
@click.option(
    "--tolerance",
    type=Number(min=0),
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
    weights are compared by their largest relative difference, and so are evaluations within these
    steps (evals). The exit code is 1 if steps or evaluated losses differ by more than rounding, or
    with exact=true if any metric differs at all; the cause is named if it can be found.

    \b
    launcher prove digits
    launcher prove recipes/digits.py --worlds 1,2,3 --strategies ddp,zero3 --steps 20
    launcher prove digits micro_batch_size=16 optimizer=adamw
    launcher prove digits precision=fp64 --steps 60
    """
    from launcher.checks.proof import default_worlds, prove
    from launcher.checks.proof_summary import header, row_line, to_dict, verdict
    from launcher.environment.machine import read_machine
    from launcher.json_file import encode_json
    from launcher.launch.only_launcher import check_only_launcher
    from launcher.launch.signal_handler import SignalHandler
    from launcher.recipe.resolve import resolve

    check_only_launcher()
    signals = SignalHandler(saves=False)
    machine = read_machine()

    def show_plan(trial: ParityRun, num_steps: int) -> None:
        if not as_json:
            echo(f"{trial.plan.recipe}: {num_steps:,} of {trial.plan.total_steps:,} steps")
            echo(header())

    def show_row(row: ParityRow) -> None:
        if row.error:
            echo(f"launcher: {row.error}", err=True)
        if not as_json:
            echo(row_line(row))

    proof = prove(
        resolve(recipe),
        read_overrides(config, overrides),
        machine,
        worlds=_numbers(worlds) or default_worlds(machine),
        strategies=strategies,
        steps=steps,
        tolerance=tolerance,
        out=out,
        signals=signals,
        on_plan=show_plan,
        on_row=show_row,
    )
    if as_json:
        rows = [to_dict(row) for row in proof.rows]
        echo(encode_json({"agree": proof.agrees, "rows": rows, "causes": proof.causes}))
        return 0 if proof.agrees else EXIT_FAILED
    echo(f"\n{verdict(proof.rows, min(steps, proof.rows[0].trial.plan.total_steps))}")
    _show_causes(proof)
    if proof.folder is not None:
        echo(f"run folders: {proof.folder}")
    return 0 if proof.agrees else EXIT_FAILED


def _show_causes(proof: Proof) -> None:
    for cause in proof.causes:
        echo(f"\ncause: {cause}")
    if proof.search_error:
        echo("\nThe search for the cause, with a few samples in one process, failed.")
        echo(proof.search_error, err=True)
    if proof.has_unexplained_difference:
        from launcher.checks.proof_summary import unexplained

        echo(f"\n{unexplained(proof.rows)}")


def _numbers(worlds: tuple[str, ...] | None) -> list[int]:
    numbers = []
    for text in worlds or ():
        number = digits(text)
        if not number or number > MAX_NODES:
            raise UsageError(
                f"--worlds: expected whole numbers of at least 1, found {text[:50]!r}."
            )
        numbers.append(number)
    return sorted(set(numbers))
