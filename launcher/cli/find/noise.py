"""`launcher find noise`: measure the gradient noise scale."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.arguments import out_option
from launcher.cli.settings_command import SettingsCommand
from launcher.cli.target import target_arguments
from launcher.cli.values import Count
from launcher.console.echo import echo
from launcher.errors import EXIT_FAILED

if TYPE_CHECKING:
    from launcher.launch.signal_handler import SignalHandler
    from launcher.tuning.probe_run import Target


@click.command(cls=SettingsCommand, short_help="Measure the gradient noise scale.")
@target_arguments
@click.option(
    "--steps",
    type=Count(min=40, largest=10**9),
    default=500,
    show_default=True,
    metavar="K",
    help="Optimizer steps to measure, of those planned.",
)
@out_option
@click.option("--json", "as_json", is_flag=True, help="Print measurements and estimates as JSON.")
def command(
    target: Target,
    signals: SignalHandler,
    steps: int,
    out: Path | None,
    *,
    as_json: bool,
) -> int:
    """Measure the gradient noise scale B_simple of RECIPE over some steps of training.

    Without momentum B_simple is the critical batch, at which a larger batch starts to cost more
    samples than it saves steps (McCandlish et al., arXiv:1812.06162); momentum raises it. The
    global batch stays the same, but may be split into smaller micro-batches, whose gradients are
    compared.

    \b
    launcher find noise digits
    launcher find noise digits -n 2 --steps 200 batch_size=64
    """
    from launcher.console.plots import has_images, write_png
    from launcher.json_file import encode_json
    from launcher.runs.rundir import create_run_dir
    from launcher.tuning.noise_search import find_noise, plan_noise
    from launcher.tuning.summaries import noise_plot, noise_text

    probe = plan_noise(target)
    run_dir = create_run_dir(out, f"find-noise-{probe.plan.recipe}")
    result = find_noise(probe, run_dir, signals, steps=steps, quiet=as_json)
    if as_json:
        echo(encode_json(asdict(result)))
    else:
        echo(noise_text(result, probe))
    if result.whole is None:
        return EXIT_FAILED
    if has_images():
        write_png(noise_plot(result, probe), run_dir.path / "noise.png")
        echo(f"plot: {run_dir.shown}/noise.png", err=as_json)
    return 0
