"""The page of one run.

From top to bottom: the failure if there was one, learning curves, learning rate and gradient norm,
throughput, ranks, attempts, checkpoints, sections of finders, the plan, the environment and the
settings.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Iterator, Sequence
from textwrap import shorten
from typing import Any

from launcher.analysis.time_shares import (
    mean_device_seconds,
    mean_own_seconds,
    own_seconds,
    shares_text,
    smoothed,
    step_parts,
    stragglers_text,
    utilisation,
)
from launcher.console.explain import explain
from launcher.console.failure import failure_text
from launcher.console.plots import Curve, Plot, schedule_plots
from launcher.console.progress import ordered_metrics
from launcher.errors import UsageError
from launcher.planning.derivations import counted
from launcher.quantities import duration, measured, size
from launcher.recipe.callspec import parse
from launcher.recipe.evaluation_sets import metric_name
from launcher.recipe.schedules import SCHEDULES, Schedule
from launcher.report.figures import Bars, Figure, Moment, Span, Timeline
from launcher.report.page import Page, Section, Table
from launcher.runs.events import Failed, Saved, Stopped
from launcher.runs.history import Attempt, History, evaluation_set_names, split_metric

_MAX_METRIC_CARDS = 4
_MAX_RANK_CURVES = 16
"""With more ranks, their step times over the steps are not drawn."""

_MAX_MESSAGE = 160
"""Characters of an error message shown in the table of attempts; the failure section has all."""


_MAX_CHECKPOINTS = 10
"""The newest checkpoints, which the table of checkpoints has."""


def run_page(history: History, more: Sequence[Section] = ()) -> Page:
    """Return the page of one run.

    Args:
        history: The run.
        more: Further sections, such as those of finders, shown before the plan.
    """
    plan = history.plan
    date = ""
    if (began := history.began) is not None:
        date = f", {time.strftime('%Y-%m-%d %H:%M', time.localtime(began))}"
    sections = [
        *_failure(history),
        _learning(history),
        *_hyperparameters(history),
        *_throughput(history),
        *_ranks(history),
        *_attempts(history),
        *_checkpoints(history),
        *more,
        *_plan(history),
        *_environment(history),
        *_settings(history),
    ]
    return Page(
        title=f"{plan.recipe}: {history.run_dir.path.name}",
        state=history.state.name,
        facts=f"{history.state.words}{date}",
        cards=_cards(history),
        sections=[
            section for section in sections if section.figures or section.table or section.text
        ],
    )


def _cards(history: History) -> list[tuple[str, str]]:
    plan = history.plan
    cards = [("steps", f"{history.last_step:,} of {history.total_steps:,}")]
    if history.evaluations:
        values = history.latest_evaluation
        names = ordered_metrics(values)[:_MAX_METRIC_CARDS]
        cards += [(f"held-out {name}", measured(values[name])) for name in names]
        if history.result is not None and (best := history.result.best) and best.value is not None:
            cards.append((f"best {best.metric}", f"{measured(best.value)} at step {best.step:,}"))
    elif history.steps["loss"]:
        cards.append(("loss", measured(history.steps["loss"][-1])))
    if (seconds := history.active_seconds()) is not None:
        cards.append(("run time", duration(seconds)))
    if (times := history.time_used()) is not None:
        used, given = times
        over = f", {duration(used - given)} over" if used > given else ""
        cards.append(("time used", f"{duration(used)} of {duration(given)}{over}"))
    if (throughput := history.typical("samples_per_second")) is not None:
        cards.append(("samples/s", f"{throughput:,.0f}"))
    unit = "GPU" if plan.device == "cuda" else "CPU rank"
    cards.append(("ranks", f"{counted(plan.world_size, unit)}, {plan.strategy}"))
    cards.append(("batch", f"{plan.batch_size:,}"))
    lrs = [(f"peak lr of {each.name}", each.lr) for each in plan.objectives]
    cards += [(name, f"{lr:.4g}") for name, lr in lrs or [("peak lr", plan.lr)]]
    if (flops := history.flops_per_second()) is not None:
        cards.append(utilisation(history, flops))
    if history.ranks:
        cards.append(("peak memory per rank", size(max(history.ranks[-1].memory_bytes))))
    return cards


def _learning(history: History) -> Section:
    """Return the section of loss, metrics, logged numbers and noise scale over the steps."""
    figures: list[Figure] = []
    steps = history.steps
    if steps["step"]:
        curves = [
            *_training_curves(steps["step"], steps["loss"]),
            *evaluation_curves(history, "loss"),
        ]
        figures.append(over_steps("loss", "loss", curves))
    for name in metric_names([history]):
        curves = [*logged_curves(history, name), *evaluation_curves(history, name)]
        figures.append(over_steps(name, name, curves))
    for name in sorted(history.logged.keys() - metric_names([history])):
        figures.append(over_steps(name, name, list(logged_curves(history, name))))
    if history.noise:
        noise = Curve(name="B_simple", xs=[s for s, _ in history.noise], ys=_values(history.noise))
        batch_size = float(history.plan.batch_size)
        batch = Curve(name="batch", xs=noise.xs, ys=[batch_size] * len(noise.xs), style="dashed")
        figures.append(over_steps("gradient noise scale", "items", [noise, batch], log_y=True))
    return Section(title="Learning", figures=figures)


def _hyperparameters(history: History) -> Iterator[Section]:
    """Yield the section of learning rate and momentum, used and planned, and gradient norm."""
    steps = history.steps
    if not steps["step"]:
        return
    figures: list[Figure] = []
    planned = {plot.y_label: plot.curves[0] for plot in _planned_schedule(history)}
    for name, title in (("lr", "learning rate"), ("momentum", "momentum")):
        used = Curve(name="used", xs=steps["step"], ys=steps[name])
        if not any(map(math.isfinite, used.ys)):
            continue
        curves = [used]
        if name in planned:
            curve = planned[name]
            curves.append(Curve(name="planned", xs=curve.xs, ys=curve.ys, style="dashed"))
        figures.append(over_steps(title, name, curves))
    if "batch" in planned:
        figures.append(over_steps("global batch size", "samples", [planned["batch"]]))
    if any(map(math.isfinite, steps["grad_norm"])):
        norm = Curve(name="gradient", xs=steps["step"], ys=steps["grad_norm"])
        curves = [norm]
        limit = history.plan.settings.get("max_grad_norm")
        if limit and not history.plan.objectives:
            ends = [steps["step"][0], steps["step"][-1]]
            curves.append(Curve(name="max_grad_norm", xs=ends, ys=[limit] * 2, style="dashed"))
        title = "gradient norm before clipping"
        figures.append(over_steps(title, "norm", curves, log_y=True))
    yield Section(title="Learning rate and gradient", figures=figures)


def _planned_schedule(history: History) -> list[Plot]:
    """Return the plots of the planned schedule; none if the recipe or the run defines it.

    Of several objectives it is that of the first with a turn in every step, as in metrics.jsonl.
    """
    plan = history.plan
    main = next((each for each in plan.objectives if each.every == 1), None)
    text = plan.settings["schedule"] if main is None else main.schedule
    try:
        schedule = parse(str(text), SCHEDULES, kind="schedule")
    except UsageError:  # not one of SCHEDULES
        return []
    assert isinstance(schedule, Schedule)
    if not schedule.is_planned:
        return []
    return schedule_plots(schedule, plan, main)


def _throughput(history: History) -> Iterator[Section]:
    """Yield the section of throughput and the breakdown of step time."""
    steps = history.steps
    if not steps["step"]:
        return
    parts = step_parts(history)
    curves = [
        Curve(name=name, xs=steps["step"], ys=[1e3 * value for value in values], style="stacked")
        for name, values in parts.items()
    ]
    rate = Curve(name="samples/s", xs=steps["step"], ys=steps["samples_per_second"])
    figures: list[Figure] = [
        over_steps("throughput of all ranks together", "samples/s", [rate]),
        over_steps("breakdown of step time", "ms", curves),
    ]
    paragraph = shares_text(history, parts)
    yield Section(title="Throughput", paragraph=paragraph, figures=figures)


def _ranks(history: History) -> Iterator[Section]:
    """Yield the section of step time, data wait and memory of each rank."""
    if not history.ranks:
        return
    latest = history.ranks[-1]
    names = [str(rank) for rank in range(len(latest.memory_bytes))]
    figures: list[Figure] = []
    rank_seconds = mean_own_seconds(history)
    paragraph = ""
    if rank_seconds is not None and len(rank_seconds) > 1:
        device_seconds = mean_device_seconds(history)
        paragraph = stragglers_text(rank_seconds, device_seconds)
        title = "step time of each rank, excluding waits for other ranks"
        figures.append(_rank_bars(title, "ms", names, [1e3 * value for value in rank_seconds]))
        if device_seconds is not None:
            title = "time of forward and backward passes on the GPU of each rank"
            values = [1e3 * value for value in device_seconds]
            figures.append(_rank_bars(title, "ms", names, values))
        rows = own_seconds(history)
        if len(rank_seconds) <= _MAX_RANK_CURVES and len(rows) > 1:
            steps = [step for step, _ in rows]
            curves = [
                Curve(
                    name=f"rank {rank}",
                    xs=steps,
                    ys=[1e3 * seconds[rank] for _, seconds in rows],
                )
                for rank in range(len(rank_seconds))
            ]
            title = "step time of each rank over the steps, excluding waits for other ranks"
            figures.append(over_steps(title, "ms", curves))
    if len(names) > 1:
        waits = [1e3 * value for value in latest.data_wait_seconds]
        title = "time that each rank waits for data, mean of the latest steps"
        figures.append(_rank_bars(title, "ms", names, waits))
    kind = "GPU" if history.plan.device == "cuda" else "host"
    memory = [value / 2**20 for value in latest.memory_bytes]
    figures.append(_rank_bars(f"peak {kind} memory of each rank", "MiB", names, memory))
    yield Section(title="Ranks", paragraph=paragraph, figures=figures)


def _rank_bars(title: str, unit: str, names: list[str], values: list[float]) -> Bars:
    return Bars(title=title, x_label="rank", y_label=unit, names=names, values=values)


_LOSSES = {
    "rank": "a rank on {} had failed",
    "node": "{} was lost",
    "health": "{} was not fit",
    "joined": "{} had joined",
}
"""What the launchers of several nodes noticed before they started the ranks again."""


def _attempts(history: History) -> Iterator[Section]:
    """Yield the section of attempts: a timeline with checkpoints, and how each attempt ended."""
    attempts = history.attempts()
    if not attempts:
        return
    spans = []
    for number, attempt in enumerate(attempts, start=1):
        begin = attempt.began.time
        end = max(attempt.until, begin)
        is_running = history.state.name == "running" and attempt is attempts[-1]
        outcome = _outcome(attempt, is_running=is_running)
        description = f"{duration(end - begin)} from step {attempt.began.step:,}, {outcome}"
        if (recovered := attempt.recovered) is not None:
            seconds = (
                f"{recovered.seconds:.3g} s after {_LOSSES.get(recovered.cause, _LOSSES['node'])}"
            )
            description += f"; first step {seconds.format(recovered.node)}"
        row = _attempt_name(number, attempt)
        spans.append(Span(row=row, begin=begin, end=end, description=description))
    figures: list[Figure] = [
        Timeline(
            title="attempts and checkpoints over time",
            spans=spans,
            moments=list(_checkpoint_moments(history, spans)),
        )
    ]
    paragraph = f"{counted(len(attempts), 'attempt')}."
    table = Table(
        head=("attempt", "from step", "ranks", "outcome"),
        rows=[
            [
                span.row,
                f"{attempt.began.step:,}",
                f"{attempt.began.ranks} {attempt.began.strategy}",
                span.description,
            ]
            for span, attempt in zip(spans, attempts, strict=True)
        ],
    )
    yield Section(title="Attempts", paragraph=paragraph, table=table, figures=figures)


def _checkpoint_moments(history: History, spans: Sequence[Span]) -> Iterator[Moment]:
    """Yield each checkpoint at the time of its step, in the row of its attempt."""
    for step, _ in history.stalls:
        when = _time_of(history, step)
        if when is not None:
            row = next((span.row for span in reversed(spans) if span.begin <= when), spans[0].row)
            yield Moment(row=row, time=when, name="checkpoint")


def _checkpoints(history: History) -> Iterator[Section]:
    """Yield the section of checkpoints: their age, how long they took, and their bandwidth."""
    figures: list[Figure] = []
    paragraph = ""
    if history.stalls:
        steps, stalls = [step for step, _ in history.stalls], _values(history.stalls)
        stall_ms = [1e3 * seconds for seconds in stalls]
        curve = Curve(name="stall", xs=steps, ys=stall_ms, style="points")
        figures.append(over_steps("delay of the step by each checkpoint", "ms", [curve]))
        checkpoints = counted(len(stalls), "checkpoint")
        paragraph = f"{checkpoints} delayed the steps by {sum(stalls):.3g} s in total."
    if quick := history.quick_checkpoints:
        paragraph += f" {len(quick):,} of them are quick checkpoints on the nodes, the newest of "
        paragraph += f"step {quick[-1].step:,}."
    saved = history.checkpoints
    rates = [(each.step, each.bytes_per_second or math.nan) for each in saved]
    if saved:
        megabytes = [rate / 1e6 for rate in _values(rates)]
        curve = Curve(name="MB/s", xs=[step for step, _ in rates], ys=megabytes, style="points")
        figures.append(over_steps("bandwidth of writing each checkpoint", "MB/s", [curve]))
        paragraph += f" The newest one, of step {saved[-1].step:,}, {_age(history, saved[-1])}."
    table = Table(
        head=("step", "complete at", "after the one before", "stall", "writing", "size", "per s"),
        rows=[
            [
                f"{each.step:,}",
                time.strftime("%m-%d %H:%M:%S", time.localtime(each.time)),
                "" if before is None else duration(each.time - before.time),
                f"{1e3 * each.stall_seconds:.3g} ms",
                f"{each.write_seconds:.3g} s",
                size(each.num_bytes),
                "?" if (rate := each.bytes_per_second) is None else size(rate),
            ]
            for before, each in list(zip([None, *saved], saved, strict=False))[-_MAX_CHECKPOINTS:]
        ],
    )
    if figures:
        yield Section(
            title="Checkpoints",
            paragraph=paragraph.strip(),
            table=table if saved else None,
            figures=figures,
        )


def _age(history: History, saved: Saved) -> str:
    """Return how old a checkpoint is, or was when the run ended."""
    if history.state.name == "running":
        return f"is {duration(max(time.time() - saved.time, 0.0))} old"
    end = max((attempt.until for attempt in history.attempts()), default=saved.time)
    return f"was {duration(max(end - saved.time, 0.0))} old when the run ended"


def _attempt_name(number: int, attempt: Attempt) -> str:
    job = attempt.began.job
    return f"{number}" if job is None else f"{number}, job {job}"


def _outcome(attempt: Attempt, *, is_running: bool) -> str:
    """Return how an attempt ended, or that it is still running."""
    event = attempt.ended
    if event is None:
        return "still running" if is_running else "ended without recording how"
    if isinstance(event, Failed):
        first_line = event.message.partition("\n")[0]
        message = shorten(first_line, _MAX_MESSAGE, placeholder=" ...")
        if event.rank is None:
            return f"failed: {message}"
        return f"failed on rank {event.rank} ({event.node}): {event.error}: {message}"
    how = "stopped" if isinstance(event, Stopped) else "finished"
    return f"{how} after step {event.step:,}"


def _time_of(history: History, step: int) -> float | None:
    """Return when a step was taken, in seconds since 1970; None if no step was recorded."""
    steps = history.steps["step"]
    index = bisect.bisect_left(steps, step)
    return history.steps["time"][min(index, len(steps) - 1)] if steps else None


def _failure(history: History) -> Iterator[Section]:
    """Yield the section of the failure that ended the run, if one did."""
    if history.failure is not None:
        text = failure_text(history.failure, history.run_dir)
        yield Section(title="Failure", text=text)


def _plan(history: History) -> Iterator[Section]:
    """Yield the section of the plan as `launcher plan` prints it."""
    text = explain(history.plan, recipe=history.record.recipe)
    yield Section(title="Plan", text=text)


def _environment(history: History) -> Iterator[Section]:
    """Yield the section of command, code, host, device and package versions."""
    record = history.record
    rows = [
        ["recipe", record.recipe],
        ["folder", record.folder],
        ["command", " ".join(record.command)],
    ]
    if git := record.git:
        num_modified = git.changed_files
        modified = counted(num_modified, "modified file") if num_modified else "no modified files"
        rows.append(["git", f"{git.commit} ({git.branch}), {modified}"])
    rows.append(["host", record.host])
    if history.device_name:
        rows.append(["device", history.device_name])
    rows += [[name, version] for name, version in record.versions.items()]
    yield Section(title="Environment", table=Table(head=("", ""), rows=rows))


def _settings(history: History) -> Iterator[Section]:
    """Yield the folded section of all settings with their origins."""
    rows = [
        [name, _text(value), str(history.plan.sources.get(name, ""))]
        for name, value in history.plan.settings.items()
    ]
    table = Table(head=("setting", "value", "set by"), rows=rows)
    yield Section(title="Settings", table=table, folded=True)


def over_steps(title: str, label: str, curves: list[Curve], *, log_y: bool = False) -> Plot:
    """Return a plot of curves over the steps. `label` is that of the y axis."""
    return Plot(title=title, x_label="step", y_label=label, curves=curves, log_y=log_y)


def evaluation_curves(history: History, metric: str, run: str = "") -> Iterator[Curve]:
    """Yield the curve of a metric over the steps for each evaluation set that has it.

    Args:
        history: The run.
        metric: The name of the metric within a set.
        run: The name of the run, if there are several; the curves are called by it and their set.
    """
    sets = evaluation_set_names(history.latest_evaluation)
    for set_name in sets or [""]:
        name = metric_name(set_name, metric)
        points = [(step, values[name]) for step, values in history.evaluations if name in values]
        if points:
            title = f"{run} {set_name}".strip() or "held-out"
            yield Curve(name=title, xs=[step for step, _ in points], ys=_values(points))


def logged_curves(history: History, name: str) -> Iterator[Curve]:
    """Yield the curves of a number that the recipe has logged, as it is and smoothed."""
    if pairs := history.logged.get(name):
        yield from _training_curves([step for step, _ in pairs], _values(pairs))


def _training_curves(steps: Sequence[float], values: Sequence[float]) -> Iterator[Curve]:
    yield Curve(name="training", xs=steps, ys=values, style="faint")
    yield Curve(name="training, smoothed", xs=steps, ys=smoothed(values))


def metric_names(histories: Sequence[History]) -> list[str]:
    """Return the names of the runs' metrics, within their evaluation sets, without the loss."""
    names: dict[str, None] = {}
    for history in histories:
        values = history.latest_evaluation
        sets = evaluation_set_names(values)
        names |= dict.fromkeys(split_metric(name, sets)[1] for name in values)
    return [name for name in names if name != "loss"]


def _values(pairs: Sequence[tuple[int, float]]) -> list[float]:
    return [value for _, value in pairs]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
