"""The text of a plan: every number with its arithmetic and its origin, or the six lines of a run.

A resumed run also prints what differs from the plan that it started with.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping

from launcher.planning.derivations import counted, dependence_notes, virtual_notes
from launcher.planning.lr_path import first_difference
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.recipe.averaging import AVERAGES, Averaging
from launcher.recipe.callspec import parse
from launcher.recipe.catalogue import written
from launcher.recipe.hang_limits import hang_limits
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


def summarize(plan: Plan, *, recipe: str = "", more: str = "") -> str:
    """Return the six lines that a run prints of its plan, and its notes.

    A line has fewer details if they would not fit; only what a user set is wrapped instead.

    Args:
        plan: The plan.
        recipe: The location of the recipe.
        more: Where every number is shown, as the end of the last line; left out if it does not fit.
    """
    ranks = _ranks(plan)
    heads = [f"{plan.recipe} on {text}" for text in (ranks, ranks.partition(":")[0])]
    places = [recipe, _end_of(recipe)]
    lines = [_fitting("", *(f"{head}  {place}".rstrip() for head in heads for place in places))]
    total = plan.derivations["total_steps"].partition(";")[0]
    schedule = plan.settings["schedule"]
    if _is_to_be_timed(plan):
        total = f"{total}, as many as fit in max_time={plan.settings['max_time']}"
    steps = [f"{total}; {schedule}: {_lr_range(plan)}", f"{total}; {schedule}", total]
    if plan.objectives:
        steps = [f"{total}; {_turns(plan)}", total]
    pinned = "pinned" if plan.pin_memory else "not pinned"
    lr = plan.derivations["lr"]
    lrs = [lr, lr.partition(",")[0], f"{plan.lr:.6g}"]
    if plan.objectives:
        lrs = [", ".join(f"{each.lr:.6g} ({each.name})" for each in plan.objectives)]
    rows = [
        ("batch", [*(f"{_batch(plan)}; lr {text}" for text in lrs), _batch(plan)]),
        ("steps", steps),
        ("data", [f"{counted(plan.workers_per_rank, 'worker')} per rank, memory {pinned}"]),
        ("speed-ups", [_speed_ups(plan)]),
    ]
    lines += [_labelled(label, _fitting(label, *texts)) for label, texts in rows]
    given = [
        f"{source}: {text}" for source, text in _settings_by_source(plan) if source != "recipe"
    ]
    set_by = "; ".join(given) or "the recipe"
    lines += _wrapped(
        "set by", _fitting("set by", *([f"{set_by}; {more}"] if more else []), set_by)
    )
    for note in plan.notes:
        lines += _wrapped("note", note)
    return "\n".join(lines)


def _end_of(location: str) -> str:
    """Return the last folder and the file of a location: `.../recipes/digits.py:digits`."""
    pieces = location.split("/")
    return "/".join(("...", *pieces[-2:])) if len(pieces) > 2 else location


def _batch(plan: Plan) -> str:
    ranks = counted(plan.data_ranks, "rank" if plan.tensor_parallel == 1 else "data rank")
    accumulation = counted(plan.accumulation_steps, "accumulation step")
    if len(plan.stages) > 1:
        return f"{plan.batch_size:,} on {ranks}, {plan.derivations['stages']}"
    shares = sorted(set(plan.samples_per_rank))
    if shares == [plan.micro_batch_size * plan.accumulation_steps]:
        text = f"{plan.batch_size:,} = {ranks} x {counted(plan.micro_batch_size, 'sample')}"
        return text if plan.accumulation_steps == 1 else f"{text} x {accumulation}"
    each = f"{' or '.join(map(str, shares))} each"
    details = each if plan.accumulation_steps == 1 else f"{each}, {accumulation}"
    return f"{plan.batch_size:,} on {ranks} ({details})"


def _lr_range(plan: Plan) -> str:
    if plan.lr_start is None or plan.lr_end is None:
        return f"lr {plan.lr:.3g}, changed as the run goes"
    if _is_constant(plan):
        return f"lr {plan.lr_start:.3g} at every step"
    ends = f"lr {plan.lr_start:.3g} to {plan.lr_end:.3g}"
    return f"{ends}, peak {_peak(plan)}" if _peaks_within(plan) else ends


def _is_to_be_timed(plan: Plan) -> bool:
    """Return whether the number of steps will follow from `max_time` and the measured speed."""
    return plan.settings.get("max_time") is not None and plan.timed_steps is None


def _timing_text(plan: Plan) -> str:
    return (
        f"max_time={plan.settings['max_time']}: the run measures the speed of its first steps, and "
        "plans as many steps as fit in that time; its schedule spans them. Their number depends "
        "on the machine and the ranks"
    )


def _peak(plan: Plan) -> str:
    """Return where the learning rate is highest; as a part of the run if its steps are unknown."""
    if plan.lr_peak_step is not None and _is_to_be_timed(plan):
        return f"after {plan.lr_peak_step / plan.total_steps:.0%} of the steps"
    return f"at step {plan.lr_peak_step:,}"


def _peaks_within(plan: Plan) -> bool:
    """Return whether the learning rate is highest at another step than the first and the last."""
    return plan.lr_peak_step is not None and 1 < plan.lr_peak_step < plan.total_steps


def _is_constant(plan: Plan) -> bool:
    constant = str(plan.settings["schedule"]).startswith("constant(")
    return constant and len(plan.stages) == 1


def _fitting(label: str, *texts: str) -> str:
    """Return the first of `texts` that fits on the line of `label`, or else the last."""
    return next((text for text in texts if len(_labelled(label, text)) <= _WIDTH), texts[-1])


def _labelled(label: str, text: str) -> str:
    return f"  {label:<{_LABEL_WIDTH - 2}}{text}" if label else text


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
    if not (was[1].is_planned and now[1].is_planned):
        schedules = old.settings["schedule"], new.settings["schedule"]
        if schedules[0] == schedules[1]:
            return None
        return f"the remaining steps follow {schedules[1]} instead of {schedules[0]}"
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
    return plan.lr, plan.total_steps, plan.timed_steps, plan.stages, settings


def _lr(plan: Plan, schedule: Schedule, step: int) -> float:
    return plan.lr * plan.schedule_value_at(schedule, step).factor


def _derived(plan: Plan, *rows: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Yield rows, each a label and a key, whose texts the plan has; older plans lack some."""
    for label, key in rows:
        for line in filter(None, plan.derivations.get(key, "").split("\n")):
            yield label, line


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    settings, derivations = plan.settings, plan.derivations
    yield "ranks", _ranks(plan)
    yield from _derived(plan, ("shards", "shards"), ("messages", "messages"), ("", "alternatives"))
    yield "batch", derivations["batch_size"]
    if len(plan.stages) > 1:
        yield "", derivations["stages"]
    if plan.objectives:
        yield from _objective_rows(plan)
    else:
        yield "lr", derivations["lr"]
        yield "", f"{_lr_path_text(plan)}: {settings['schedule']}"
    yield "steps", derivations["total_steps"]
    if _is_to_be_timed(plan):
        yield "", _timing_text(plan)
    yield from _evaluation_rows(plan)
    yield from _derived(plan, ("order", "order"))
    threads = settings.get("worker_threads", 1)  # plans of older versions have none
    each = f", {threads} threads each" if threads > 1 else ""
    yield "workers", f"{plan.workers_per_rank} per rank{each} ({derivations['workers_per_rank']})"
    pinned = "pinned" if plan.pin_memory else "not pinned"
    yield "memory", f"{pinned} ({derivations['pin_memory']})"
    yield "speed-ups", _speed_ups(plan)
    yield from _update_rows(plan)
    yield from _derived(plan, ("quick saves", "quick_checkpoints"))
    yield "hang limits", str(hang_limits(settings["hang_timeout"]))
    for source, settings_text in _settings_by_source(plan):
        yield "set by", f"{source}: {settings_text}"
    dependence: tuple[str, ...]
    if plan.virtual_ranks is not None:
        dependence = virtual_notes(plan.distribution, exact=plan.exact)
    else:
        dependence = dependence_notes(
            sync_batchnorm=bool(settings.get("sync_batchnorm")),
            world_size=plan.data_ranks,
            micro=plan.micro_batch_size,
            batch_size=plan.batch_size,
            tensor_parallel=plan.tensor_parallel,
        )
    for note in dict.fromkeys((*dependence, *plan.notes)):
        yield "note", note


def _update_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield the optimizer, unless it has a line with its objective, and the average."""
    if not plan.objectives:
        yield "optimizer", str(plan.settings.get("optimizer", "built by the recipe"))
    if averaging := plan.settings.get("averaging"):
        yield "averaging", f"{averaging} {_averaged_from(plan, averaging)}; evaluated and exported"


def _lr_path_text(plan: Plan) -> str:
    """Return where the learning rate starts, peaks and ends."""
    if plan.lr_start is None or plan.lr_end is None:
        return "the run computes the learning rate of each step"
    if _is_constant(plan):
        return f"{plan.lr_start:.3g} at every step"
    peak = f", peaks {_peak(plan)}" if _peaks_within(plan) else ""
    return f"starts at {plan.lr_start:.3g}{peak}, ends at {plan.lr_end:.3g}"


def _averaged_from(plan: Plan, averaging: str) -> str:
    rule = parse(averaging, AVERAGES, kind="averaging")
    assert isinstance(rule, Averaging)
    return f"from step {rule.first_step(plan.total_steps):,} on"


def _evaluation_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield when the run is evaluated, and what follows from evaluations."""
    settings = plan.settings
    every = f"every {plan.evaluate_every:,} steps" if plan.evaluate_every else "after each epoch"
    yield "evaluation", f"{every}, and after the last step"
    if keep_best := settings.get("keep_best"):
        name, _, mode = keep_best.rpartition(":")
        words = "largest" if mode == "max" else "smallest"
        yield "", f"the run ends with the weights of the {words} {name}"
    if stop_after := settings.get("stop_after"):
        evaluations = counted(stop_after, "evaluation")
        yield "", f"the run ends after {evaluations} in a row without a better value"


def _objective_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield what each objective trains, and its learning rate, in the order of their turns."""
    for number, objective in enumerate(plan.objectives, start=1):
        turns = "every step" if objective.every == 1 else f"1 of {objective.every} steps"
        patterns = " ".join(objective.parameters)
        label = "objectives" if number == 1 else ""
        yield label, f"{number}. {objective.name}: {patterns}, in {turns}, {objective.optimizer}"
        start, end = objective.lr_start, objective.lr_end
        ends = "in the run" if start is None or end is None else f"{start:.3g} to {end:.3g}"
        yield "", f"   lr {objective.lr_derivation}; {ends} by {objective.schedule}"


def _turns(plan: Plan) -> str:
    """Return the objectives in the order of their turns: `critic, then actor in 1 of 5 steps`."""
    return ", then ".join(
        objective.name + ("" if objective.every == 1 else f" in 1 of {objective.every} steps")
        for objective in plan.objectives
    )


def _speed_ups(plan: Plan) -> str:
    return ", ".join(plan.performance_flags) or f"none enabled: {plan.precision} throughout"


def _ranks(plan: Plan) -> str:
    unit = "GPU" if plan.device == "cuda" else "CPU rank"
    layout = "one process, no process group"
    strategy = STRATEGIES[plan.strategy]
    if plan.backend != "local":
        layout = f"{strategy.title} over {'NCCL' if plan.device == 'cuda' else 'gloo'}"
    if strategy.sharded:
        layout += f": {strategy.sharded} in {counted(plan.shards, 'shard')}"
        copies = plan.data_ranks // plan.shards
        layout += f" and {copies:,} copies" if copies > 1 else ""
    nodes, per_node = counted(plan.nodes, "node"), counted(plan.nproc_per_node, unit)
    groups = ""
    if plan.tensor_parallel > 1:
        groups = (
            f" = {counted(plan.data_ranks, 'data rank')} x {plan.tensor_parallel} tensor-parallel"
        )
    return f"{plan.world_size:,} = {nodes} x {per_node}{groups}, {layout}"


def _settings_by_source(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield (source, settings) for the settings that differ from their defaults."""
    groups: dict[str, list[str]] = {}
    for name, source in plan.sources.items():
        if source == "default" or source.startswith("replaced by"):
            continue
        if name in ("name", "objectives"):  # which have lines of their own
            continue
        value = plan.settings.get(name)
        shown = written(value) if isinstance(value, Mapping) else value
        setting = f"{name}={shown}" if name in plan.settings else name
        groups.setdefault(source, []).append(setting)
    for source, settings in groups.items():
        yield source, ", ".join(settings)
