"""`launcher check`: a recipe, tried out on a batch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.arguments import (
    SettingsCommand,
    config_option,
    overrides_argument,
    read_overrides,
    recipe_argument,
)
from launcher.errors import EXIT_FAILED

if TYPE_CHECKING:
    from launcher.findings import Finding


@click.command(cls=SettingsCommand, short_help="Try a recipe out on a batch.")
@recipe_argument
@overrides_argument
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def command(recipe: str, overrides: tuple[str, ...], config: Path | None, *, as_json: bool) -> int:
    """Build what RECIPE describes and take a few samples through it, on the CPU.

    Looks at what importing it loads, whether samples stay the same, also in DataLoader workers,
    whether the model's outputs are finite and all of its weights are used, whether the loss and
    the metrics return (sum, count), and at what depends on the number of ranks. The exit code is 1
    where a run would fail, or be wrong.

    \b
    launcher check digits
    launcher check mine.py lr=0.2
    """
    from launcher.checks.check import check_recipe, heavy_imports
    from launcher.console.findings_table import finding_lines, summary
    from launcher.environment.machine import read_machine
    from launcher.findings import ok, warning, worst
    from launcher.launch.signal_handler import SignalHandler
    from launcher.recipe.resolve import resolve

    signals = SignalHandler()
    findings: list[Finding] = []

    def tell(finding: Finding) -> None:
        findings.append(finding)
        if not as_json:
            for line in finding_lines(finding):
                click.echo(line)

    before = set(sys.modules)
    reference = resolve(recipe)
    if heavy := heavy_imports(before):
        tell(
            warning(
                "import",
                f"importing {reference.shown} loads {', '.join(heavy)}",
                "import them inside the functions that use them: planning and listing stay instant",
            )
        )
    else:
        tell(ok("import", f"{reference.shown}, nothing heavy"))
    given = read_overrides(config, overrides)
    for finding in check_recipe(reference, given, read_machine(), signals):
        tell(finding)
    if as_json:
        click.echo(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        click.echo(summary(findings))
    return EXIT_FAILED if worst(findings) == "failure" else 0
