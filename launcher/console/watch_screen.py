"""What `launcher watch` shows of a run: a screen for terminals, a line of text, values for JSON."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.analysis.time_shares import (
    mean_device_seconds,
    mean_own_seconds,
    step_parts,
    stragglers,
    stragglers_text,
)
from launcher.console.progress import metrics_text, sparkline, step_line
from launcher.planning.derivations import counted
from launcher.printable import printable
from launcher.quantities import duration, measured, size
from launcher.recipe.evaluation_sets import metric_name
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.heartbeat import Heartbeat
from launcher.runs.history import History, evaluation_set_names
from launcher.runs.mirror_record import mirror_problem
from launcher.runs.status import COLOURS, RunState
from launcher.runs.step_row import LOGGED

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

_MAX_RANKS = 16
"""Maximum number of ranks shown; the slowest are kept."""

_MAX_LOGGED = 8
"""Maximum number of curves of logged numbers."""

_BAR_WIDTH = 24
_SPARKLINE_WIDTH = 40
_RECENT_SHARE = 0.2
"""Share of the steps, counted from the newest, that the remaining time is estimated from."""

_SECONDS_IN_PHASE = 5.0
"""A rank that has been in one phase for longer is shown with the time."""


@dataclass(frozen=True)
class Printable:
    """What rich draws of `content`, with control characters in its texts as escapes."""

    content: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment

        for segment in console.render(self.content, options):
            text = segment.text if segment.control else printable(segment.text)
            yield Segment(text, segment.style, segment.control)


def screen(history: History, state: RunState) -> RenderableType:
    """Return the screen of a run: title, progress, curves, ranks and stragglers.

    Args:
        history: The run as read from its folder.
        state: State of the run; for a Slurm job it may come from Slurm instead of the folder.
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
        parts += [_progress_row(history), _metrics_grid(history)]
    if history.health:
        parts.append(_rank_grid(history))
        own_seconds = mean_own_seconds(history) or []
        device_seconds = mean_device_seconds(history)
        if stragglers(own_seconds) or stragglers(device_seconds or ()):
            parts.append(Text(stragglers_text(own_seconds, device_seconds), "yellow"))
    if problem := mirror_problem(history.run_dir):
        parts.append(Text(problem, "yellow"))
    return Group(*parts)


def _progress_row(history: History) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column()
    row.add_column(ratio=1)
    row.add_column()
    row.add_column()
    step, total_steps = history.last_step, history.total_steps
    row.add_row(
        f"step {step:,}/{total_steps:,}",
        ProgressBar(total=total_steps, completed=step),
        f"{step / total_steps:.0%}",
        f"{duration(seconds_left(history))} left",
    )
    return row


def seconds_left(history: History) -> float | None:
    """Estimate the remaining time of a run from the speed of its latest steps.

    Returns:
        Seconds, or None if there are fewer than two steps or their times are unknown.
    """
    times = history.steps["time"]
    recent_times = times[-max(int(len(times) * _RECENT_SHARE), 2) :]
    if len(times) < 2 or not math.isfinite(recent_times[0]):
        return None
    seconds_per_step = (recent_times[-1] - recent_times[0]) / max(len(recent_times) - 1, 1)
    return seconds_per_step * (history.total_steps - history.last_step)


def _metrics_grid(history: History) -> Table:
    """Return rows of label, latest value and sparkline."""
    from rich.table import Table

    steps = history.steps
    grid = Table.grid(padding=(0, 2))
    grid.add_row("loss", measured(steps["loss"][-1]), sparkline(steps["loss"], _SPARKLINE_WIDTH))
    for name, pairs in list(history.logged.items())[:_MAX_LOGGED]:
        curve = sparkline([value for _, value in pairs], _SPARKLINE_WIDTH)
        grid.add_row(name, measured(pairs[-1][1]), curve)
    for set_name in evaluation_set_names(history.latest_evaluation) or [""]:
        _add_evaluations(grid, history, set_name)
    rates = steps["samples_per_second"]
    grid.add_row("samples/s", f"{rates[-1]:,.0f}", sparkline(rates, _SPARKLINE_WIDTH))
    norm = f"gradient norm {steps['grad_norm'][-1]:.3g}"
    grid.add_row(
        "lr", f"{steps['lr'][-1]:.3g}", f"{sparkline(steps['lr'], _SPARKLINE_WIDTH)}  {norm}"
    )
    if history.noise:
        scales = [scale for _, scale in history.noise]
        grid.add_row("noise scale", f"{scales[-1]:,.0f}", sparkline(scales, _SPARKLINE_WIDTH))
    parts = {name: values[-1] for name, values in step_parts(history).items()}
    step_seconds = sum(parts.values())
    if step_seconds > 0:
        shares = ", ".join(f"{value / step_seconds:.0%} {name}" for name, value in parts.items())
        grid.add_row("step time", f"{1e3 * step_seconds:.3g} ms", shares)
    checkpoints = list_checkpoints(history.run_dir)
    if checkpoints:
        grid.add_row("checkpoint", f"{checkpoints[0].step:,}", _newest_checkpoint(history))
    return grid


def _newest_checkpoint(history: History) -> str:
    """Return how old the newest checkpoint is, and what it has cost."""
    if not history.checkpoints:
        return "the step of the newest checkpoint"
    saved = history.checkpoints[-1]
    text = f"{duration(max(time.time() - saved.time, 0.0))} old, a stall of "
    text += f"{1e3 * saved.stall_seconds:.3g} ms"
    if (rate := saved.bytes_per_second) is not None:
        text += f", then {size(saved.num_bytes)} in {saved.write_seconds:.3g} s, {size(rate)}/s"
    return text


def _add_evaluations(grid: Table, history: History, set_name: str) -> None:
    """Add the row of an evaluation set to the metrics, if it has been evaluated."""
    name = metric_name(set_name, "loss")
    evaluations = [each for each in history.evaluations if name in each[1]]
    if not evaluations:
        return
    step, values = evaluations[-1]
    own = {key: value for key, value in values.items() if key.startswith(metric_name(set_name, ""))}
    losses = [metrics[name] for _, metrics in evaluations]
    curve = f"{sparkline(losses, _SPARKLINE_WIDTH)}  {metrics_text(own)} at step {step:,}"
    grid.add_row(set_name or "held-out", measured(values[name]), curve)


def _rank_grid(history: History) -> Table:
    """Return one row for each rank: bar and time of its own part of a step, phase, memory.

    The own part of a step excludes waiting for other ranks; bars are relative to the slowest rank.
    """
    from rich.table import Table

    latest = history.ranks[-1].own_seconds if history.ranks else None
    own_seconds = dict(enumerate(latest or ()))
    slowest = max(own_seconds.values(), default=0.0)
    heartbeats = history.health
    if len(heartbeats) > _MAX_RANKS:
        by_time = sorted(heartbeats, key=lambda heartbeat: -own_seconds.get(heartbeat.rank, 0.0))
        heartbeats = by_time[:_MAX_RANKS]
    grid = Table.grid(padding=(0, 2))
    for heartbeat in heartbeats:
        seconds = own_seconds.get(heartbeat.rank)
        filled = round(_BAR_WIDTH * seconds / slowest) if seconds and slowest else 0
        grid.add_row(
            f"rank {heartbeat.rank}",
            "█" * filled + "░" * (_BAR_WIDTH - filled) if seconds else "",
            f"{1e3 * seconds:.3g} ms" if seconds else "",
            _phase_text(heartbeat),
            _memory_text(heartbeat),
            "" if heartbeat.utilisation is None else f"{heartbeat.utilisation:.0%}",
            heartbeat.node if history.plan.nodes > 1 else "",
        )
    if num_hidden := len(history.health) - len(heartbeats):
        grid.add_row("", f"and {num_hidden} {'faster' if own_seconds else 'more'} ranks")
    return grid


def _phase_text(heartbeat: Heartbeat) -> str:
    """Return the phase of a rank, with its duration once that is notable."""
    seconds = time.time() - heartbeat.since
    if seconds < _SECONDS_IN_PHASE:
        return heartbeat.phase
    return f"{heartbeat.phase} for {duration(seconds)}"


def _memory_text(heartbeat: Heartbeat) -> str:
    if not heartbeat.memory_bytes:
        return ""
    used = size(heartbeat.memory_bytes)
    total = heartbeat.memory_total_bytes
    return f"{used} of {size(total)}" if total else used


def status_line(history: History, state: RunState) -> str:
    """Return the state of a run as one line of text, with its latest step if it is running.

    A mirror whose uploads fail is told as well.
    """
    problem = mirror_problem(history.run_dir)
    return _state_line(history, state) + (f"; {problem}" if problem else "")


def _state_line(history: History, state: RunState) -> str:
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
        {name: pairs[-1][1] for name, pairs in history.logged.items()},
    )


def status_values(history: History, state: RunState) -> dict[str, Any]:
    """Return the state of a run as JSON-compatible values, times in seconds.

    `latest` holds the columns of `launcher.runs.history.COLUMNS` at the last step and the latest
    logged numbers as `train/NAME`, `own_seconds`
    the part of a step that each rank spends without waiting for others, and `device_seconds` its
    passes on its GPU.
    """
    latest = {name: column[-1] for name, column in history.steps.items() if column}
    latest.pop("step", None)
    latest |= {f"{LOGGED}{name}": pairs[-1][1] for name, pairs in history.logged.items()}
    return {
        "time": time.time(),
        "state": state.name,
        "words": state.words,
        "step": history.last_step,
        "total_steps": history.total_steps,
        "seconds_left": seconds_left(history),
        "latest": latest,
        "evaluation": history.latest_evaluation,
        "own_seconds": history.ranks[-1].own_seconds if history.ranks else None,
        "device_seconds": history.ranks[-1].device_seconds if history.ranks else None,
        "mirror_problem": mirror_problem(history.run_dir) or None,
    }
