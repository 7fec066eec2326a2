"""A plan in words, with the arithmetic of every derived number."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from launcher.planning.derivations import counted
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.recipe.schedules import Schedule

_WIDTH = 96
_LABEL = 14


def explain(plan: Plan, *, recipe: str = "") -> str:
    """Return the plan as text of a few lines, none wider than a terminal.

    Args:
        plan: The plan.
        recipe: Where the recipe is, if that should be shown.
    """
    lines = [f"{plan.recipe}{'  ' + recipe if recipe else ''}"]
    for label, text in _rows(plan):
        lines += _wrapped(label, text)
    return "\n".join(lines)


def changed_lines(changes: Iterable[str]) -> list[str]:
    """Return lines that say, below a plan, what has changed since the run that was."""
    return [line for change in changes for line in _wrapped("changed", change)]


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        width=_WIDTH,
        initial_indent=f"  {label:<{_LABEL - 2}}",
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def schedule_change(
    step: int, was: tuple[Plan, Schedule], now: tuple[Plan, Schedule]
) -> str | None:
    """Return what becomes of the learning rate of a run that goes on with other settings.

    Args:
        step: Steps that were taken.
        was: The plan and the schedule of the run that was.
        now: Those that it goes on with.

    Returns:
        A sentence; None where no step that is left has another learning rate than it would have
        had.
    """
    (old, _), (new, _) = was, now
    if _lr_path(old) == _lr_path(new):
        return None
    common = range(step, min(old.total_steps, new.total_steps))
    changed = next((each for each in common if _lr(*was, each) != _lr(*now, each)), None)
    if changed is None:
        if old.total_steps == new.total_steps or step < old.total_steps:
            return None
        before, after = _lr(*was, step - 1), _lr(*now, step)
        return (
            f"the learning rate goes from {before:.3g} at step {step:,}, the last of the plan, to "
            f"{after:.3g} at step {step + 1:,}: {new.settings['schedule']} is taken over "
            f"{new.total_steps:,} steps instead of {old.total_steps:,}"
        )
    return (
        f"the learning rate of step {changed + 1:,} is {_lr(*now, changed):.3g} instead of "
        f"{_lr(*was, changed):.3g}: {new.settings['schedule']} is taken over {new.total_steps:,} "
        f"steps (was {old.settings['schedule']} over {old.total_steps:,}), also for those that are "
        "left"
    )


def _lr_path(plan: Plan) -> tuple[object, ...]:
    """Return what the learning rates of a plan follow from."""
    settings = plan.settings["schedule"], plan.settings["lr_rule"]
    return plan.lr, plan.total_steps, plan.stages, settings


def _lr(plan: Plan, schedule: Schedule, step: int) -> float:
    return plan.lr * plan.setting_at(schedule, step).factor


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    settings, derivations = plan.settings, plan.derivations
    yield "ranks", _ranks(plan)
    yield "batch", derivations["batch_size"]
    if len(plan.stages) > 1:
        yield "", derivations["stages"]
    yield "lr", derivations["lr"]
    path = f"starts at {plan.lr_start:.3g}, peaks at step {plan.lr_peak_step:,}"
    yield "", f"{path}, ends at {plan.lr_end:.3g}: {settings['schedule']}"
    yield "steps", derivations["total_steps"]
    if plan.evaluate_every:
        yield "evaluation", f"every {plan.evaluate_every:,} steps, and after the last"
    else:
        yield "evaluation", "after each epoch, and after the last step"
    yield "workers", f"{plan.workers_per_rank} per rank ({derivations['workers_per_rank']})"
    pinned = "pinned" if plan.pin_memory else "not pinned"
    yield "memory", f"{pinned} ({derivations['pin_memory']})"
    yield (
        "speed-ups",
        ", ".join(plan.performance_flags) or f"none is on: {plan.precision} throughout",
    )
    yield "optimizer", str(settings.get("optimizer", "made by the recipe"))
    for name, group in _by_source(plan):
        yield "set by", f"{name}: {group}"
    for note in plan.notes:
        yield "note", note


def _ranks(plan: Plan) -> str:
    unit = "GPU" if plan.device == "cuda" else "CPU rank"
    how = "one process, no process group"
    strategy = STRATEGIES[plan.strategy]
    if plan.backend != "local":
        how = f"{strategy.title} over {'NCCL' if plan.device == 'cuda' else 'gloo'}"
    if strategy.sharded:
        how += f": {strategy.sharded} in {counted(plan.world_size, 'shard')}"
    nodes, per_node = counted(plan.nodes, "node"), counted(plan.nproc_per_node, unit)
    return f"{plan.world_size:,} = {nodes} x {per_node}, {how}"


def _by_source(plan: Plan) -> Iterator[tuple[str, str]]:
    """Group the settings that are not at their default by where they came from."""
    groups: dict[str, list[str]] = {}
    for name, source in plan.sources.items():
        if source == "default" or source.startswith("replaced by") or name == "name":
            continue
        shown = f"{name}={plan.settings[name]}" if name in plan.settings else name
        groups.setdefault(source, []).append(shown)
    for source, shown_settings in groups.items():
        yield source, ", ".join(shown_settings)
