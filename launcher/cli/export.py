"""`launcher export`: a plan as configuration files, for those who launch by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from launcher.cli.arguments import (
    SettingsCommand,
    config_option,
    nproc_option,
    overrides_argument,
    read_overrides,
)
from launcher.errors import PlanError, UsageError


@click.command(cls=SettingsCommand)
@click.argument("recipe")
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

    \b
    launcher export digits -n 4 --accelerate accelerate.yaml
    launcher export digits strategy=zero2 --accelerate zero2.yaml --deepspeed zero2.json
    accelerate launch --config_file zero2.yaml recipes/digits.py
    """
    import yaml

    from launcher.configs import accelerate_config, deepspeed_config
    from launcher.job import plan_recipe
    from launcher.machine import read_machine
    from launcher.resolve import resolve

    if accelerate is None and deepspeed is None:
        raise UsageError(
            "Say what to write: --accelerate FILE.yaml, --deepspeed FILE.json or both."
        )
    reference = resolve(recipe)
    built, plan = plan_recipe(
        reference,
        read_overrides(config, overrides),
        read_machine(),
        nodes=nodes,
        nproc_per_node=nproc_per_node,
        elsewhere=True,
    )
    if deepspeed is not None and plan.backend != "deepspeed":
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


def _ranks(plan: Any) -> str:
    from launcher.reasons import ranks_text

    return ranks_text(plan.nodes, plan.nproc_per_node)


def _write(path: Path, text: str) -> None:
    from launcher.rundir import write_atomic

    write_atomic(path, text)
    click.echo(f"wrote {path}")
