"""A run that is at work, on one screen of a terminal."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from launcher.analysis.time_shares import (
    mean_own_seconds,
    step_parts,
    stragglers,
    stragglers_in_words,
)
from launcher.console.progress import metrics_text, sparkline, step_line
from launcher.planning.derivations import counted
from launcher.quantities import duration, size
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.heartbeat import Heartbeat
from launcher.runs.history import History
from launcher.runs.status import COLOURS, RunState

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_MOST_RANKS = 16
"""Of more, those are shown that take the longest."""

_BAR = 24
_SPARKS = 40
_RECENT = 0.2
"""The part of the steps that the speed is taken from."""


def screen(history: History, state: RunState) -> RenderableType:
    """Return what to show of a run now.

    Args:
        history: The run.
        state: How it fares, which for a job Slurm may know better.
    """
    from rich.console import Group
    from rich.text import Text

    plan = history.plan
    unit = "GPU" if plan.device == "cuda" else "CPU rank"
    ranks = f"{counted(plan.world_size, unit)}, {plan.strategy}"
    title = Text.assemble(
        (plan.recipe, "bold"), f"  {history.run_dir.shown}  ", (state.name, COLOURS[state.name])
    )
    if state.name != "running":
        title.append(f"  {state.words}")
    title.append(f"  {ranks}", "dim")
    parts: list[RenderableType] = [title]
    if history.last_step:
        parts += [_bar(history), _numbers(history)]
    if history.health:
        parts.append(_ranks(history))
        own = mean_own_seconds(history) or []
        if stragglers(own):
            parts.append(Text(stragglers_in_words(own), "yellow"))
    return Group(*parts)


def _bar(history: History) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column()
    row.add_column(ratio=1)
    row.add_column()
    row.add_column()
    done, total = history.last_step, history.total_steps
    row.add_row(
        f"step {done:,}/{total:,}",
        ProgressBar(total=total, completed=done),
        f"{done / total:.0%}",
        f"{duration(seconds_left(history))} left",
    )
    return row


def seconds_left(history: History) -> float | None:
    """Return how long the steps that are left take at the speed of the latest; None if unknown."""
    times = history.steps["time"]
    recent = max(int(len(times) * _RECENT), 2)
    if len(times) < 2 or not math.isfinite(times[-recent:][0]):
        return None
    per_step = (times[-1] - times[-recent:][0]) / max(len(times[-recent:]) - 1, 1)
    return per_step * (history.total_steps - history.last_step)


def _numbers(history: History) -> Table:
    from rich.table import Table

    steps = history.steps
    grid = Table.grid(padding=(0, 2))
    grid.add_row("loss", f"{steps['loss'][-1]:.4f}", sparkline(steps["loss"], _SPARKS))
    if history.evaluations:
        step, values = history.evaluations[-1]
        series = [each.get("loss", math.nan) for _, each in history.evaluations]
        shown = f"{sparkline(series, _SPARKS)}  {metrics_text(values)} at step {step:,}"
        grid.add_row("held-out", f"{values.get('loss', math.nan):.4f}", shown)
    rates = steps["samples_per_second"]
    grid.add_row("samples/s", f"{rates[-1]:,.0f}", sparkline(rates, _SPARKS))
    norm = steps["grad_norm"][-1]
    grid.add_row(
        "lr", f"{steps['lr'][-1]:.3g}", f"{sparkline(steps['lr'], _SPARKS)}  norm {norm:.3g}"
    )
    if history.noise:
        scales = [scale for _, scale in history.noise]
        grid.add_row("noise scale", f"{scales[-1]:,.0f}", sparkline(scales, _SPARKS))
    latest = {name: values[-1] for name, values in step_parts(history).items()}
    whole = sum(latest.values())
    if whole > 0:
        shares = ", ".join(f"{value / whole:.0%} {name}" for name, value in latest.items())
        grid.add_row("a step", f"{1e3 * whole:.3g} ms", shares)
    saved = list_checkpoints(history.run_dir)
    if saved:
        grid.add_row("checkpoint", f"{saved[0].step:,}", "the newest step that is saved")
    return grid


def _ranks(history: History) -> Table:
    """Return a line for each rank: its own part of a step beside the largest, and what it does."""
    from rich.table import Table

    last = history.ranks[-1].own_seconds if history.ranks else None
    own = dict(enumerate(last or ()))
    largest = max(own.values(), default=0.0)
    shown = history.health
    if len(shown) > _MOST_RANKS:
        shown = sorted(shown, key=lambda each: -own.get(each.rank, 0.0))[:_MOST_RANKS]
    grid = Table.grid(padding=(0, 2))
    for health in shown:
        value = own.get(health.rank)
        filled = round(_BAR * value / largest) if value and largest else 0
        grid.add_row(
            f"rank {health.rank}",
            "█" * filled + "░" * (_BAR - filled) if value else "",
            f"{1e3 * value:.3g} ms" if value else "",
            _doing(health),
            _memory(health),
            "" if health.utilisation is None else f"{health.utilisation:.0%}",
            health.node if history.plan.nodes > 1 else "",
        )
    if len(history.health) > len(shown):
        grid.add_row("", f"and {len(history.health) - len(shown)} ranks that take less")
    return grid


def _doing(health: Heartbeat) -> str:
    still = time.time() - health.since
    return health.phase if still < 5 else f"{health.phase}, for {duration(still)}"


def _memory(health: Heartbeat) -> str:
    if not health.memory_bytes:
        return ""
    held = size(health.memory_bytes)
    return f"{held} of {size(health.memory_total_bytes)}" if health.memory_total_bytes else held


def line(history: History, state: RunState) -> str:
    """Return how far a run is, in a line of text."""
    if state.name != "running" or not history.last_step:
        return state.words if state.words.startswith(state.name) else f"{state.name}: {state.words}"
    steps = history.steps
    return step_line(
        history.last_step,
        history.total_steps,
        steps["loss"][-1],
        steps["lr"][-1],
        steps["samples_per_second"][-1],
        duration(seconds_left(history)),
    )


def to_dict(history: History, state: RunState) -> dict[str, Any]:
    """Return what to show of a run now, for programs."""
    steps = history.steps
    latest = {name: column[-1] for name, column in steps.items() if column}
    latest.pop("step", None)
    return {
        "time": time.time(),
        "state": state.name,
        "words": state.words,
        "step": history.last_step,
        "total_steps": history.total_steps,
        "seconds_left": seconds_left(history),
        "latest": latest,
        "evaluation": history.evaluations[-1][1] if history.evaluations else {},
        "own_seconds": history.ranks[-1].own_seconds if history.ranks else None,
    }
