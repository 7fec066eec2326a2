"""The page of a run: what ran, how it learned, where its time went, what happened to it."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Iterator, Sequence
from textwrap import shorten
from typing import Any

from launcher.analysis.time_shares import (
    mean_own_seconds,
    own_seconds,
    shares_in_words,
    smoothed,
    step_parts,
    stragglers_in_words,
    utilisation,
)
from launcher.console.explain import explain
from launcher.console.failure import failure_text
from launcher.console.plots import Curve, Plot, schedule_plots
from launcher.errors import UsageError
from launcher.planning.derivations import counted
from launcher.quantities import duration, size
from launcher.recipe.callspec import parse
from launcher.recipe.schedules import SCHEDULES, Schedule
from launcher.report.figures import Bars, Figure, Moment, Span, Timeline
from launcher.report.page import Page, Section, Table
from launcher.runs.history import Attempt, History

_MOST_CARDS = 4
_MOST_LINES = 16
"""Ranks whose own lines are drawn over the steps."""


def run_page(history: History, more: Sequence[Section] = ()) -> Page:
    """Return the page of one run.

    Args:
        history: The run.
        more: Sections that end the page, such as what finders measured of its recipe.
    """
    plan = history.plan
    began = next((event["time"] for event in history.events), None)
    when = "" if began is None else f", {time.strftime('%Y-%m-%d %H:%M', time.localtime(began))}"
    sections = [
        *_post_mortem(history),
        learning(history),
        *_hyperparameters(history),
        *_speed(history),
        *_ranks(history),
        *_clock(history),
        *more,
        *_what_ran(history),
    ]
    return Page(
        title=f"{plan.recipe}: {history.run_dir.path.name}",
        state=history.state.name,
        facts=f"{history.state.words}{when}",
        cards=_cards(history),
        sections=[each for each in sections if each.figures or each.table or each.text],
    )


def _cards(history: History) -> list[tuple[str, str]]:
    plan = history.plan
    cards = [("steps", f"{history.last_step:,} of {history.total_steps:,}")]
    if history.evaluations:
        values = history.evaluations[-1][1]
        ordered = sorted(values, key=lambda name: (name == "loss", name))[:_MOST_CARDS]
        cards += [(f"held-out {name}", f"{values[name]:.4f}") for name in ordered]
    elif history.steps["loss"]:
        cards.append(("loss", f"{history.steps['loss'][-1]:.4f}"))
    if (seconds := history.seconds_at_work()) is not None:
        cards.append(("at work", duration(seconds)))
    if (speed := history.typical("samples_per_second")) is not None:
        cards.append(("samples/s", f"{speed:,.0f}"))
    unit = "GPU" if plan.device == "cuda" else "CPU rank"
    cards.append(("ranks", f"{counted(plan.world_size, unit)}, {plan.strategy}"))
    cards.append(("batch", f"{plan.batch_size:,}"))
    cards.append(("peak lr", f"{plan.lr:.4g}"))
    if (flops := history.flops_per_second()) is not None:
        cards.append(utilisation(history, flops))
    if history.ranks:
        cards.append(("memory of a rank", size(max(history.ranks[-1].memory_bytes))))
    return cards


def learning(history: History) -> Section:
    """Return loss, metrics and gradients over the steps."""
    figures: list[Figure] = []
    steps = history.steps
    if steps["step"]:
        smooth = smoothed(steps["loss"])
        curves = [
            Curve(name="training", xs=steps["step"], ys=steps["loss"], style="faint"),
            Curve(name="training, smoothed", xs=steps["step"], ys=smooth),
            *evaluation_curves(history, "loss", "held-out"),
        ]
        figures.append(over_steps("loss", "loss", curves))
    for name in metric_names([history]):
        figures.append(over_steps(name, name, list(evaluation_curves(history, name, name))))
    if history.noise:
        noise = Curve(name="B_simple", xs=[s for s, _ in history.noise], ys=_second(history.noise))
        batch = float(history.plan.batch_size)
        level = Curve(name="batch", xs=noise.xs, ys=[batch] * len(noise.xs), style="dashed")
        figures.append(
            over_steps("gradient noise scale", "items", [noise, level], log_y=True),
        )
    return Section(title="Learning", figures=figures)


def _hyperparameters(history: History) -> Iterator[Section]:
    """Yield learning rate and momentum, as they were used and as they were planned; gradients."""
    steps = history.steps
    if not steps["step"]:
        return
    figures: list[Figure] = []
    planned = {plot.y_label: plot.curves[0] for plot in _planned(history)}
    for name, title in (("lr", "learning rate"), ("momentum", "momentum")):
        used = Curve(name="used", xs=steps["step"], ys=steps[name])
        if not any(map(math.isfinite, used.ys)):
            continue
        curves = [used]
        if name in planned:
            plan = planned[name]
            curves.append(Curve(name="planned", xs=plan.xs, ys=plan.ys, style="dashed"))
        figures.append(over_steps(title, name, curves))
    if "batch" in planned:
        figures.append(over_steps("global batch size", "samples", [planned["batch"]]))
    if any(map(math.isfinite, steps["grad_norm"])):
        norm = Curve(name="gradient", xs=steps["step"], ys=steps["grad_norm"])
        curves = [norm]
        limit = history.plan.settings.get("max_grad_norm")
        if limit:
            ends = [steps["step"][0], steps["step"][-1]]
            curves.append(Curve(name="max_grad_norm", xs=ends, ys=[limit] * 2, style="dashed"))
        title = "norm of the gradient, before clipping"
        figures.append(over_steps(title, "norm", curves, log_y=True))
    yield Section(title="Learning rate and gradient", figures=figures)


def _planned(history: History) -> list[Plot]:
    try:
        schedule = parse(str(history.plan.settings["schedule"]), SCHEDULES, kind="schedule")
    except UsageError:  # the recipe's own
        return []
    assert isinstance(schedule, Schedule)
    return schedule_plots(schedule, history.plan)


def _speed(history: History) -> Iterator[Section]:
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
        over_steps("samples a second, over all ranks", "samples/s", [rate]),
        over_steps("where the time of a step goes", "ms", curves),
    ]
    yield Section(title="Speed", words=shares_in_words(history, parts), figures=figures)


def _ranks(history: History) -> Iterator[Section]:
    """Yield what each rank took of a step, and held of memory."""
    if not history.ranks:
        return
    last = history.ranks[-1]
    names = [str(rank) for rank in range(len(last.memory_bytes))]
    figures: list[Figure] = []
    own = mean_own_seconds(history)
    words = ""
    if own is not None and len(own) > 1:
        words = stragglers_in_words(own)
        title = "a rank's own part of a step, without waiting for others"
        milliseconds = [1e3 * value for value in own]
        figures.append(
            Bars(title=title, x_label="rank", y_label="ms", names=names, values=milliseconds)
        )
        rows = own_seconds(history)
        if len(own) <= _MOST_LINES and len(rows) > 1:
            steps = [step for step, _ in rows]
            curves = [
                Curve(name=f"rank {rank}", xs=steps, ys=[1e3 * each[rank] for _, each in rows])
                for rank in range(len(own))
            ]
            figures.append(over_steps("the same over the steps", "ms", curves))
    if len(names) > 1:
        waits = [1e3 * value for value in last.data_wait_seconds]
        title = "waiting for data in a step, lately"
        figures.append(Bars(title=title, x_label="rank", y_label="ms", names=names, values=waits))
    kind = "the GPU" if history.plan.device == "cuda" else "the host"
    title = f"memory of {kind}, the most that was held"
    held = [value / 2**20 for value in last.memory_bytes]
    figures.append(Bars(title=title, x_label="rank", y_label="MiB", names=names, values=held))
    yield Section(title="Ranks", words=words, figures=figures)


def _clock(history: History) -> Iterator[Section]:
    """Yield what happened when: attempts, how they ended, checkpoints."""
    attempts = history.attempts()
    if not attempts:
        return
    spans = []
    for number, attempt in enumerate(attempts, start=1):
        row = _attempt_name(number, attempt)
        ends = max(attempt.until, attempt.began["time"])
        words = f"{duration(ends - attempt.began['time'])} from step {attempt.began['step']:,}"
        words += f", {ending_in_words(attempt, goes_on=history.state.name == 'running')}"
        spans.append(Span(row=row, begin=attempt.began["time"], end=ends, words=words))
    moments = []
    for step, _ in history.stalls:
        when = _time_of(history, step)
        if when is not None:
            row = next((s.row for s in reversed(spans) if s.begin <= when), spans[0].row)
            moments.append(Moment(row=row, time=when, words="checkpoint"))
    figures: list[Figure] = [Timeline(title="what happened when", spans=spans, moments=moments)]
    words = f"{counted(len(attempts), 'attempt')}."
    if history.stalls:
        steps, stalls = [step for step, _ in history.stalls], _second(history.stalls)
        waits = [1e3 * seconds for seconds in stalls]
        curve = Curve(name="stall", xs=steps, ys=waits, style="points")
        figures.append(over_steps("what a step waited for a checkpoint", "ms", [curve]))
        words += f" {counted(len(stalls), 'checkpoint')} held it up for {sum(stalls):.3g} s in all."
    head = ("attempt", "began at step", "ranks", "what came of it")
    table = Table(
        head=head,
        rows=[
            [s.row, f"{a.began['step']:,}", f"{a.began['ranks']} {a.began['strategy']}", s.words]
            for s, a in zip(spans, attempts, strict=True)
        ],
    )
    yield Section(title="Time", words=words, table=table, figures=figures)


def _attempt_name(number: int, attempt: Attempt) -> str:
    job = attempt.began.get("job")
    return f"{number}" if job is None else f"{number}, job {job}"


def ending_in_words(attempt: Attempt, *, goes_on: bool) -> str:
    """Return how an attempt ended."""
    ended = attempt.ended
    if ended is None:
        return "goes on" if goes_on else "ended without a word"
    if ended["event"] == "failed":
        head = shorten(str(ended.get("message") or "").partition("\n")[0], 160, placeholder=" ...")
        if ended["rank"] is None:
            return f"failed: {head}"
        return f"failed on rank {ended['rank']} ({ended['node']}): {ended['error']}: {head}"
    return f"{ended['event']} after step {ended['step']:,}"


def _time_of(history: History, step: int) -> float | None:
    steps = history.steps["step"]
    index = bisect.bisect_left(steps, step)
    return history.steps["time"][min(index, len(steps) - 1)] if steps else None


def _post_mortem(history: History) -> Iterator[Section]:
    if history.failure is None:
        return
    text = failure_text(history.failure, history.run_dir)
    yield Section(title="Post-mortem", text=text)


def _what_ran(history: History) -> Iterator[Section]:
    record = history.record
    yield Section(title="Plan", text=explain(history.plan, recipe=record.recipe))
    rows = [["recipe", record.recipe], ["folder", record.folder]]
    rows.append(["command", " ".join(record.command)])
    if git := record.git:
        changed = git.changed_files
        state = f", {counted(changed, 'file')} changed" if changed else ", nothing changed"
        rows.append(["git", f"{git.commit} ({git.branch}){state}"])
    rows.append(["host", record.host])
    rows += [
        ["device", event["device_name"]] for event in history.events[-99:] if "device_name" in event
    ][-1:]
    rows += [[name, version] for name, version in record.versions.items()]
    yield Section(title="Where it ran", table=Table(head=("", ""), rows=rows))
    settings = [
        [name, _plain(value), str(history.plan.sources.get(name, ""))]
        for name, value in history.plan.settings.items()
    ]
    table = Table(head=("setting", "value", "from"), rows=settings)
    yield Section(title="Settings", table=table, folded=True)


def over_steps(title: str, label: str, curves: list[Curve], *, log_y: bool = False) -> Plot:
    """Return curves over the steps as a plot."""
    return Plot(title=title, x_label="step", y_label=label, curves=curves, log_y=log_y)


def evaluation_curves(history: History, metric: str, name: str) -> Iterator[Curve]:
    """Yield a metric over the steps, if it was evaluated."""
    points = [(step, values[metric]) for step, values in history.evaluations if metric in values]
    if points:
        yield Curve(name=name, xs=[step for step, _ in points], ys=_second(points))


def metric_names(histories: Sequence[History]) -> list[str]:
    """Return what the runs were evaluated by, besides the loss."""
    found: dict[str, None] = {}
    for history in histories:
        for _, values in history.evaluations[:1]:
            found |= dict.fromkeys(name for name in values if name != "loss")
    return list(found)


def _second(pairs: Sequence[tuple[int, float]]) -> list[float]:
    return [value for _, value in pairs]


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
