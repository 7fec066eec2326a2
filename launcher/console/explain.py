"""The text of `launcher plan`: every number of a plan with its arithmetic and its origin.

A resumed run also prints what differs from the plan that it started with.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from launcher.planning.derivations import counted
from launcher.planning.lr_path import first_difference
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.recipe.schedules import Schedule

_WIDTH = 96
_LABEL_WIDTH = 14


def explain(plan: Plan, *, recipe: str = "") -> str:
    """Return the plan as labelled lines of at most 96 characters.

    Args:
        plan: The plan.
        recipe: The location of the recipe, shown beside its name; empty to omit it.
    """
    lines = [f"{plan.recipe}{'  ' + recipe if recipe else ''}"]
    for label, text in _rows(plan):
        lines += _wrapped(label, text)
    return "\n".join(lines)


def changed_lines(changes: Iterable[str]) -> list[str]:
    """Return the lines, printed below a plan, that state how a resumed run differs from it.

    Args:
        changes: One sentence for each difference.
    """
    return [line for change in changes for line in _wrapped("changed", change)]


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        width=_WIDTH,
        initial_indent=f"  {label:<{_LABEL_WIDTH - 2}}",
        subsequent_indent=" " * _LABEL_WIDTH,
        break_long_words=False,
        break_on_hyphens=False,
    )


def schedule_change(
    step: int, was: tuple[Plan, Schedule], now: tuple[Plan, Schedule]
) -> str | None:
    """Return how the learning rate of a resumed run differs from its earlier plan.

    Args:
        step: Number of steps already taken.
        was: Plan and schedule before the run was resumed.
        now: Plan and schedule of the resumed run.

    Returns:
        A clause that names the first step with another learning rate, both rates and both
        schedules. None if every remaining step keeps its learning rate.
    """
    (old, _), (new, _) = was, now
    if _lr_inputs(old) == _lr_inputs(new):
        return None
    shared_steps = range(step, min(old.total_steps, new.total_steps))
    first_change = first_difference(
        shared_steps, lambda index: _lr(*was, index) != _lr(*now, index)
    )
    if first_change is None:
        if old.total_steps == new.total_steps or step < old.total_steps:
            return None
        before, after = _lr(*was, step - 1), _lr(*now, step)
        return (
            f"the learning rate changes from {before:.3g} at step {step:,}, the last of the "
            f"earlier plan, to {after:.3g} at step {step + 1:,}: {new.settings['schedule']} now "
            f"spans {new.total_steps:,} steps instead of {old.total_steps:,}"
        )
    return (
        f"the learning rate of step {first_change + 1:,} is {_lr(*now, first_change):.3g} instead "
        f"of {_lr(*was, first_change):.3g}: the remaining steps follow {new.settings['schedule']} "
        f"over {new.total_steps:,} steps instead of {old.settings['schedule']} over "
        f"{old.total_steps:,}"
    )


def _lr_inputs(plan: Plan) -> tuple[object, ...]:
    """Return everything that determines the learning rate of each step of a plan."""
    settings = plan.settings["schedule"], plan.settings["lr_rule"]
    return plan.lr, plan.total_steps, plan.stages, settings


def _lr(plan: Plan, schedule: Schedule, step: int) -> float:
    return plan.lr * plan.schedule_value_at(schedule, step).factor


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    settings, derivations = plan.settings, plan.derivations
    yield "ranks", _ranks(plan)
    yield "batch", derivations["batch_size"]
    if len(plan.stages) > 1:
        yield "", derivations["stages"]
    yield "lr", derivations["lr"]
    lr_range = f"starts at {plan.lr_start:.3g}, peaks at step {plan.lr_peak_step:,}"
    yield "", f"{lr_range}, ends at {plan.lr_end:.3g}: {settings['schedule']}"
    yield "steps", derivations["total_steps"]
    if plan.evaluate_every:
        yield "evaluation", f"every {plan.evaluate_every:,} steps, and after the last step"
    else:
        yield "evaluation", "after each epoch, and after the last step"
    yield "workers", f"{plan.workers_per_rank} per rank ({derivations['workers_per_rank']})"
    pinned = "pinned" if plan.pin_memory else "not pinned"
    yield "memory", f"{pinned} ({derivations['pin_memory']})"
    yield (
        "speed-ups",
        ", ".join(plan.performance_flags) or f"none enabled: {plan.precision} throughout",
    )
    yield "optimizer", str(settings.get("optimizer", "built by the recipe"))
    for source, settings_text in _settings_by_source(plan):
        yield "set by", f"{source}: {settings_text}"
    for note in plan.notes:
        yield "note", note


def _ranks(plan: Plan) -> str:
    unit = "GPU" if plan.device == "cuda" else "CPU rank"
    layout = "one process, no process group"
    strategy = STRATEGIES[plan.strategy]
    if plan.backend != "local":
        layout = f"{strategy.title} over {'NCCL' if plan.device == 'cuda' else 'gloo'}"
    if strategy.sharded:
        layout += f": {strategy.sharded} in {counted(plan.world_size, 'shard')}"
    nodes, per_node = counted(plan.nodes, "node"), counted(plan.nproc_per_node, unit)
    return f"{plan.world_size:,} = {nodes} x {per_node}, {layout}"


def _settings_by_source(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield (source, settings) for the settings that differ from their defaults."""
    groups: dict[str, list[str]] = {}
    for name, source in plan.sources.items():
        if source == "default" or source.startswith("replaced by") or name == "name":
            continue
        setting = f"{name}={plan.settings[name]}" if name in plan.settings else name
        groups.setdefault(source, []).append(setting)
    for source, settings in groups.items():
        yield source, ", ".join(settings)
