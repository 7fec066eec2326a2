"""The arguments of commands that measure a recipe on the ranks that would train it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.cli.arguments import (
    config_option,
    nproc_option,
    overrides_argument,
    read_overrides,
    recipe_argument,
)


def target_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add recipe, overrides and ranks; call `function` with `target` and `signals`."""

    @functools.wraps(function)
    def command(
        recipe: str,
        overrides: tuple[str, ...],
        nproc_per_node: int | None,
        config: Path | None,
        **options: Any,
    ) -> Any:
        from launcher.environment.machine import read_machine
        from launcher.launch.only_launcher import check_only_launcher
        from launcher.launch.signal_handler import SignalHandler
        from launcher.recipe.resolve import resolve
        from launcher.tuning.probe_run import Target

        check_only_launcher()
        signals = SignalHandler(saves=False)
        target = Target(
            reference=resolve(recipe),
            overrides=read_overrides(config, overrides),
            machine=read_machine(),
            nproc_per_node=nproc_per_node,
        )
        return function(target=target, signals=signals, **options)

    return recipe_argument(overrides_argument(nproc_option(config_option(command))))
