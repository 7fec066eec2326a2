"""`launcher plan`: print every derived number of a run before it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
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
from launcher.console.echo import echo
from launcher.errors import UsageError

if TYPE_CHECKING:
    from launcher.environment.machine import Machine
    from launcher.planning.plan import Plan
    from launcher.recipe.overrides import BuiltRecipe, Override
    from launcher.recipe.recipe import Recipe
    from launcher.recipe.resolve import Reference
    from launcher.tuning.estimate import Estimate
    from launcher.tuning.memory_plan import MemoryPlan


@click.command(cls=SettingsCommand, short_help="Print every number of a run before it starts.")
@recipe_argument
@overrides_argument
@nproc_option
@node_count_option
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option(
    "--estimate",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Estimate the run on more ranks from measurements on one: a folder of `run -n 1`, "
    "`find batch -n 1` or `find noise`. May be repeated.",
)
@click.option(
    "--cluster", metavar="NAME", help="Site profile with links and prices for --estimate."
)
@click.option(
    "--memory",
    "with_memory",
    is_flag=True,
    help="Add the memory of a rank, by kind and under each strategy; refuse a plan that cannot "
    "fit. The model is built without memory for its values.",
)
@click.option(
    "--plot", is_flag=True, help="Plot the learning rate, and the momentum if it changes."
)
def command(
    recipe: str,
    overrides: tuple[str, ...],
    nproc_per_node: int | None,
    nodes: int,
    config: Path | None,
    folders: tuple[Path, ...],
    cluster: str | None,
    as_json: bool,
    with_memory: bool,
    plot: bool,
) -> None:
    """Print every number of a run of RECIPE with its arithmetic; nothing is trained.

    \b
    launcher plan digits
    launcher plan digits "schedule=cyclical(cycles=3)" --plot
    launcher plan digits -n 8 --nodes 2 device=cuda
    launcher plan digits -n 8 --nodes 64 device=cuda --estimate runs/one-gpu
    launcher plan gpt -n 8 device=cuda layers=32 width=4096 heads=32 --memory
    launcher plan recipes/digits.py:digits lr=0.2 batch_size=512 --json
    """
    from launcher.environment.machine import read_machine
    from launcher.json_file import encode_json
    from launcher.recipe.resolve import resolve
    from launcher.runs.plan_recipe import plan_recipe

    if plot and as_json:
        raise UsageError("--plot and --json exclude each other: keep one.")
    if cluster is not None and not folders:
        raise UsageError("--cluster applies to --estimate: add --estimate FOLDER.")
    reference, machine = resolve(recipe), read_machine()
    all_overrides = read_overrides(config, overrides)

    def plan_for(nodes: int, nproc: int | None) -> tuple[BuiltRecipe, Plan]:
        return plan_recipe(
            reference, all_overrides, machine, nodes=nodes, nproc_per_node=nproc, elsewhere=True
        )

    built, plan = plan_for(nodes, nproc_per_node)
    estimate, memory = None, None
    if folders:
        estimate = _estimate(folders, cluster, plan, lambda *world: plan_for(*world)[1])
    if with_memory:
        memory = _memory(reference, all_overrides, built, plan, machine)
    if as_json:
        parts = {"estimate": estimate, "memory": memory}
        values = {name: asdict(part) for name, part in parts.items() if part is not None}
        echo(encode_json(plan.to_dict() | values))
    else:
        _print(plan, reference, memory, estimate)
        if plot:
            _draw_schedules(built.recipe, plan)
    if memory is not None:
        memory.check()


def _draw_schedules(recipe: Recipe, plan: Plan) -> None:
    from launcher.console.plots import draw, schedule_plots

    for alone, objective in zip(recipe.by_objective(), plan.objectives or (None,), strict=True):
        for curve in schedule_plots(alone.schedule, plan, objective):
            echo(f"\n{draw(curve)}")


def _print(
    plan: Plan, reference: Reference, memory: MemoryPlan | None, estimate: Estimate | None
) -> None:
    from launcher.console.explain import explain

    echo(explain(plan, recipe=reference.shown))
    if memory is not None:
        from launcher.tuning.memory_table import memory_text

        echo(f"\n{memory_text(memory)}")
    if estimate is not None:
        from launcher.tuning.estimate_table import estimate_text

        echo(f"\n{estimate_text(estimate, plan.device)}")


def _memory(
    reference: Reference,
    overrides: tuple[Override, ...],
    built: BuiltRecipe,
    plan: Plan,
    machine: Machine,
) -> MemoryPlan:
    from launcher.launch.only_launcher import check_only_launcher
    from launcher.launch.signal_handler import SignalHandler
    from launcher.tuning.memory_plan import is_this_machine, measure_model_memory, plan_memory

    check_only_launcher()
    facts = measure_model_memory(reference, overrides, built, plan, SignalHandler(saves=False))
    return plan_memory(facts, built.recipe, plan, is_here=is_this_machine(plan, machine))


def _estimate(
    folders: tuple[Path, ...],
    cluster: str | None,
    plan: Plan,
    plan_for: Callable[[int, int], Plan],
) -> Estimate:
    from launcher.slurm.site import find_site
    from launcher.tuning.estimate import estimate_inputs, estimate_scaling
    from launcher.tuning.measurements import read_measurements

    measured = read_measurements(folders, plan)
    facts = estimate_inputs(find_site(cluster), plan.device)
    return estimate_scaling(plan_for, plan.nodes, plan.nproc_per_node, measured, facts)
