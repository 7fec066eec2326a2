"""`launcher run --debug`: a run in this process."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace

from launcher.console.echo import echo_if_possible
from launcher.console.explain import summarize
from launcher.launch.prepare import RunRequest, prepare_run
from launcher.launch.run_folder import open_run_folder
from launcher.planning.configs import process_environment
from launcher.recipe.overrides import Override, build
from launcher.runs.job import RecipeSource

_SETTINGS = {
    "num_workers": 0,
    "worker_threads": 1,
    "compile": False,
    "strategy": "ddp",  # plain training, on one rank
    "offload": None,
    "tensor_parallel": 1,
    "shard": "node",
    "reshard_after_forward": True,
    "accumulate_unsharded": False,
    "prefetch_blocks": 0,
    "reduce_dtype": "fp32",
}
"""Settings with which all of a recipe's code runs in one process, as it is written."""


def debug(request: RunRequest, *, post_mortem: bool) -> int:
    """Train with one rank in this process; return the exit code.

    Settings that need other processes, or that change how the recipe's code runs, are replaced.

    Args:
        request: The run.
        post_mortem: Whether pdb opens where an error was raised.

    Raises:
        UsageError: The recipe or the plan is wrong.
        RunDirError: The run folder cannot be made.
    """
    recipe = build(request.reference, request.overrides).recipe
    replaced = (
        Override(name=name, value=value, source="--debug")
        for name, value in _SETTINGS.items()
        if getattr(recipe, name) != value
    )
    request = replace(
        request,
        overrides=(*request.overrides, *replaced),
        nproc_per_node=1,
        in_process=True,
    )
    prepared = prepare_run(request)
    os.environ.update(process_environment(prepared.plan))
    if prepared.plan.device != "cpu":  # an error is raised by the call that caused it
        os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")
    from launcher.engine.debug_rank import debug_rank

    with ExitStack() as ownership:
        run_dir = open_run_folder(
            request.out, prepared.plan.recipe, prepared.description, ownership
        )
        if request.output_mode == "progress":
            shown = prepared.reference.shown
            more = f"{run_dir.shown}/run.yaml has every number"
            echo_if_possible(summarize(prepared.plan, recipe=shown, more=more))
        return debug_rank(
            build(prepared.reference, prepared.overrides).recipe,
            prepared.plan,
            run_dir,
            source=RecipeSource(recipe=prepared.reference.location, overrides=prepared.overrides),
            output_mode=request.output_mode,
            write_report=request.write_report,
            post_mortem=post_mortem,
        )
