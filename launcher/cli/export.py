"""`launcher export`: write a plan for Accelerate and DeepSpeed, or weights for Hugging Face."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.arguments import (
    config_option,
    node_count_option,
    nproc_option,
    overrides_argument,
    read_overrides,
    recipe_argument,
)
from launcher.cli.settings_command import SettingsCommand
from launcher.cli.values import Bytes, Folder
from launcher.console.echo import echo
from launcher.errors import PlanError, UsageError

if TYPE_CHECKING:
    from launcher.planning.plan import Plan
    from launcher.recipe.overrides import Override


@click.command(
    cls=SettingsCommand, short_help="Write a plan for Accelerate, or weights for Hugging Face."
)
@recipe_argument
@overrides_argument
@nproc_option
@node_count_option
@config_option
@click.option(
    "--accelerate",
    type=click.Path(path_type=Path),
    metavar="FILE.yaml",
    help="Write the file for `accelerate launch --config_file FILE.yaml`.",
)
@click.option(
    "--deepspeed",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Write the DeepSpeed configuration (strategy=zero1, zero2 or zero3).",
)
@click.option("--force", is_flag=True, help="Replace files that launcher did not write.")
@click.option(
    "--hf",
    type=Folder(),
    metavar="FOLDER",
    help="Write the final weights of the run RECIPE for `from_pretrained` of Hugging Face.",
)
@click.option(
    "--max-shard-size",
    type=Bytes(),
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="With --hf: largest size of a file of weights.",
)
def command(
    recipe: str,
    overrides: tuple[str, ...],
    nproc_per_node: int | None,
    nodes: int,
    config: Path | None,
    accelerate: Path | None,
    deepspeed: Path | None,
    hf: Path | None,
    max_shard_size: int,
    *,
    force: bool,
) -> None:
    """Write the plan of RECIPE as configuration files, or the weights of a run for Hugging Face.

    In the configuration files every value is resolved.

    The files define how ranks start and what is sharded. Everything else stays in the recipe, so
    the printed launch command repeats the settings given here.

    \b
    launcher export digits -n 4 --accelerate accelerate.yaml
    launcher export digits strategy=zero2 --accelerate zero2.yaml --deepspeed zero2.json
    accelerate launch --config_file zero2.yaml recipes/digits.py

    With --hf, RECIPE is a run folder. The recipe builds its model again, whose attribute `config`
    becomes config.json; NAME=VALUE changes its settings. Of a model with adapters of peft, the
    adapter is written.

    \b
    launcher export runs/pretrain_lm-20260101-120000 --hf exported
    """
    if hf is not None:
        if accelerate or deepspeed or nproc_per_node or nodes != 1 or force:
            raise UsageError("--hf goes with settings and --max-shard-size alone.")
        _export_weights(Path(recipe), hf, read_overrides(config, overrides), max_shard_size)
        return
    import yaml

    from launcher.environment.machine import read_machine
    from launcher.json_file import encode_json
    from launcher.planning.configs import (
        accelerate_config,
        deepspeed_config,
        is_deepspeed_export,
    )
    from launcher.planning.strategy import STRATEGIES
    from launcher.recipe.resolve import resolve
    from launcher.runs.output_file import check_output
    from launcher.runs.plan_recipe import plan_recipe

    if accelerate is None and deepspeed is None:
        raise UsageError(
            "Nothing to write: add --accelerate FILE.yaml, --deepspeed FILE.json or both; or give "
            "a run folder and --hf FOLDER."
        )
    if deepspeed is not None:
        check_output(deepspeed, is_deepspeed_export, force=force, option="--deepspeed")
    if accelerate is not None:
        check_output(accelerate, _is_accelerate_export, force=force, option="--accelerate")
    reference = resolve(recipe)
    built, plan = plan_recipe(
        reference,
        read_overrides(config, overrides),
        read_machine(),
        nodes=nodes,
        nproc_per_node=nproc_per_node,
        elsewhere=True,
    )
    if deepspeed is not None and not STRATEGIES[plan.strategy].uses_deepspeed:
        raise PlanError(
            f"--deepspeed {deepspeed}: the plan has strategy={plan.strategy}, which does not use "
            "DeepSpeed. Set strategy=zero1, zero2 or zero3, or remove --deepspeed."
        )
    if deepspeed is not None:
        _write(deepspeed, encode_json(deepspeed_config(built.recipe, plan), indent=2) + "\n")
    if accelerate is not None:
        file = str(deepspeed.resolve()) if deepspeed is not None else None
        values = accelerate_config(built.recipe, plan, deepspeed_file=file)
        head = f"{_MARK} {plan.recipe}, {_ranks(plan)}, strategy={plan.strategy}\n"
        _write(accelerate, head + yaml.safe_dump(values, sort_keys=False))
        options = ["--config_file", str(accelerate)]
    else:
        options = ["--use_deepspeed", "--deepspeed_config_file", str(deepspeed)]
        options += ["--num_processes", str(plan.world_size)]
    settings = [*(["--config", str(config)] if config else []), *overrides]
    echo(f"launch: {_command(plan, options, _program(reference.shown), settings)}")


def _export_weights(
    run: Path, folder: Path, overrides: tuple[Override, ...], max_shard_bytes: int
) -> None:
    """Write the final weights of a run for `from_pretrained`."""
    from launcher.api import write_hugging_face
    from launcher.quantities import size

    export = write_hugging_face(run, folder, overrides, max_shard_bytes=max_shard_bytes)
    files = f"{export.num_files} file{'s' * (export.num_files > 1)}"
    echo(
        f"wrote {folder}: {export.kind}, {export.num_weights:,} weights, "
        f"{size(export.num_bytes)} in {files}"
    )


_MARK = "# launcher export:"
"""The beginning of a configuration of Accelerate that this command has written."""


def _is_accelerate_export(head: bytes) -> bool:
    return head.startswith(_MARK.encode())


def _program(recipe: str) -> list[str]:
    """Return the words that name a recipe's file or module on a command line of Python."""
    location = recipe.rpartition(":")[0]
    return [location] if location.endswith(".py") else ["-m", location]


def _command(plan: Plan, options: list[str], program: list[str], settings: list[str]) -> str:
    """Return the command that starts the ranks of one node."""
    words = ["accelerate", "launch", *options]
    if plan.nodes == 1:
        return shlex.join([*words, *program, *settings])
    node_options = (
        "--machine_rank RANK_OF_NODE --main_process_ip FIRST_NODE --main_process_port PORT"
    )
    return f"{shlex.join(words)} {node_options} {shlex.join([*program, *settings])}"


def _ranks(plan: Plan) -> str:
    from launcher.planning.derivations import ranks_text

    return f"{ranks_text(plan.nodes, plan.nproc_per_node)} ranks"


def _write(path: Path, text: str) -> None:
    from launcher.runs.output_file import write_output

    write_output(path, text)
    echo(f"wrote {path}")
