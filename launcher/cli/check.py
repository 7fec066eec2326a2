"""`launcher check`: try a recipe on one batch and report problems."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.arguments import (
    config_option,
    overrides_argument,
    read_overrides,
    recipe_argument,
)
from launcher.cli.settings_command import SettingsCommand
from launcher.console.echo import echo
from launcher.errors import EXIT_FAILED

if TYPE_CHECKING:
    from launcher.findings import Finding


@click.command(cls=SettingsCommand, short_help="Try a recipe on one batch and report problems.")
@recipe_argument
@overrides_argument
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(recipe: str, overrides: tuple[str, ...], config: Path | None, *, as_json: bool) -> int:
    """Build the data, model and optimizer of RECIPE and run a few samples through it on the CPU.

    It checks what the import loads, whether samples are repeatable, also in DataLoader workers,
    whether outputs are finite and every weight gets a gradient, whether loss and metrics return
    (sum, count), and what depends on the number of ranks. The exit code is 1 if a run would fail or
    be wrong.

    \b
    launcher check digits
    launcher check mine.py lr=0.2
    """
    from launcher.checks.check import check_recipe, heavy_imports, heavy_names
    from launcher.console.findings_table import finding_lines, summary
    from launcher.environment.machine import read_machine
    from launcher.findings import ok, warning, worst
    from launcher.json_file import encode_json
    from launcher.launch.only_launcher import check_only_launcher
    from launcher.launch.signal_handler import SignalHandler
    from launcher.recipe.resolve import resolve

    check_only_launcher()
    signals = SignalHandler(saves=False)
    findings: list[Finding] = []

    def report(finding: Finding) -> None:
        findings.append(finding)
        if not as_json:
            for line in finding_lines(finding):
                echo(line)

    before = set(sys.modules)
    reference = resolve(recipe)
    if heavy := heavy_imports(before):
        ours = heavy_names(reference)
        and_ours = f", and {', '.join(ours)} of launcher," if ours else ""
        report(
            warning(
                "import",
                f"importing {reference.shown} loads {', '.join(heavy)}",
                f"import them{and_ours} inside the functions that use them, so that planning "
                "stays fast",
            )
        )
    else:
        report(ok("import", f"{reference.shown} loads no heavy package"))
    all_overrides = read_overrides(config, overrides)
    for finding in check_recipe(reference, all_overrides, read_machine(), signals):
        report(finding)
    if as_json:
        echo(encode_json({"findings": [asdict(finding) for finding in findings]}))
    else:
        echo(summary(findings))
    return EXIT_FAILED if worst(findings) == "failure" else 0
