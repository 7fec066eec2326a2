"""`launcher export`: a plan as configuration files, for those who launch by hand."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.arguments import (
    SettingsCommand,
    config_option,
    nproc_option,
    overrides_argument,
    read_overrides,
    recipe_argument,
)
from launcher.errors import PlanError, UsageError

if TYPE_CHECKING:
    from launcher.planning.plan import Plan


@click.command(
    cls=SettingsCommand, short_help="Write a plan as Accelerate's and DeepSpeed's files."
)
@recipe_argument
@overrides_argument
@nproc_option
@click.option("--nodes", type=click.IntRange(min=1), default=1, metavar="M", help="Nodes.")
@config_option
@click.option(
    "--accelerate",
    type=click.Path(path_type=Path),
    metavar="FILE.yaml",
    help="Write the configuration of `accelerate launch --config_file FILE.yaml`.",
)
@click.option(
    "--deepspeed",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Write the DeepSpeed configuration; strategy=zero1, zero2 or zero3.",
)
def command(
    recipe: str,
    overrides: tuple[str, ...],
    nproc_per_node: int | None,
    nodes: int,
    config: Path | None,
    accelerate: Path | None,
    deepspeed: Path | None,
) -> None:
    """Write the plan of RECIPE as configuration files in which every value is resolved.

    The files say how ranks are started and what is sharded. What else the recipe sets stays with
    it, so the command that is printed at the end repeats the settings given here.

    \b
    launcher export digits -n 4 --accelerate accelerate.yaml
    launcher export digits strategy=zero2 --accelerate zero2.yaml --deepspeed zero2.json
    accelerate launch --config_file zero2.yaml recipes/digits.py
    """
    import yaml

    from launcher.environment.machine import read_machine
    from launcher.planning.configs import accelerate_config, deepspeed_config
    from launcher.planning.strategy import STRATEGIES
    from launcher.recipe.resolve import resolve
    from launcher.runs.job import plan_recipe

    if accelerate is None and deepspeed is None:
        raise UsageError(
            "Say what to write: --accelerate FILE.yaml, --deepspeed FILE.json or both."
        )
    reference = resolve(recipe)
    given = read_overrides(config, overrides)
    built, plan = plan_recipe(
        reference,
        given,
        read_machine(),
        nodes=nodes,
        nproc_per_node=nproc_per_node,
        elsewhere=True,
    )
    if deepspeed is not None and not STRATEGIES[plan.strategy].uses_deepspeed:
        raise PlanError(
            f"--deepspeed {deepspeed}: the plan is for strategy={plan.strategy}, which DeepSpeed "
            "has no part in. Add strategy=zero1, zero2 or zero3, or leave --deepspeed out."
        )
    if deepspeed is not None:
        _write(deepspeed, json.dumps(deepspeed_config(built.recipe, plan), indent=2) + "\n")
    if accelerate is not None:
        file = str(deepspeed.resolve()) if deepspeed is not None else None
        values = accelerate_config(built.recipe, plan, deepspeed_file=file)
        head = f"# launcher export: {plan.recipe}, {_ranks(plan)}, strategy={plan.strategy}\n"
        _write(accelerate, head + yaml.safe_dump(values, sort_keys=False))
        how = ["--config_file", str(accelerate)]
    else:
        how = ["--use_deepspeed", "--deepspeed_config_file", str(deepspeed)]
        how += ["--num_processes", str(plan.world_size)]
    settings = [*(["--config", str(config)] if config else []), *overrides]
    click.echo(f"launch: {_command(plan, how, _program(reference.shown), settings)}")


def _program(recipe: str) -> list[str]:
    place = recipe.rpartition(":")[0]
    return [place] if place.endswith(".py") else ["-m", place]


def _command(plan: Plan, how: list[str], program: list[str], settings: list[str]) -> str:
    """Return the command that starts the ranks of one node."""
    words = ["accelerate", "launch", *how]
    if plan.nodes == 1:
        return shlex.join([*words, *program, *settings])
    several = "--machine_rank RANK_OF_NODE --main_process_ip FIRST_NODE --main_process_port PORT"
    return f"{shlex.join(words)} {several} {shlex.join([*program, *settings])}"


def _ranks(plan: Plan) -> str:
    from launcher.planning.derivations import ranks_text

    return f"{ranks_text(plan.nodes, plan.nproc_per_node)} ranks"


def _write(path: Path, text: str) -> None:
    from launcher.runs.rundir import write_atomic

    write_atomic(path, text)
    click.echo(f"wrote {path}")
