"""Texts and plots of what the searches found, for terminals and pages.

Every text that recommends settings ends with them, as lines for a `--config` file and as
`name=value` for the command line.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from launcher.analysis.batch_sizes import SizeTrial
from launcher.analysis.gradient_noise import (
    MAX_BATCH_RATIO,
    RunningNoise,
    items_ratio,
    steps_ratio,
)
from launcher.analysis.lr_curve import usable_part
from launcher.analysis.lr_trials import (
    DEFAULT_STEPS,
    RIGHT_PERCENT,
    LRSearchResult,
    LRTrial,
    fitted_lr,
)
from launcher.console.plots import Curve, Mark, Plot, draw
from launcher.planning.loading import PREFETCH_FACTOR
from launcher.planning.plan import Plan
from launcher.quantities import size

if TYPE_CHECKING:
    from launcher.tuning.batch_search import BatchSearchResult
    from launcher.tuning.loader_search import LoaderSearchResult, LoaderTrial
    from launcher.tuning.noise_search import NoiseSearchResult
    from launcher.tuning.probe_run import Probe

RULES = {
    "trainings": "where the final loss of short trainings is lowest, for the recipe's length",
    "lowest": "where the smoothed loss of the range test is lowest",
}
"""The rules that suggest a learning rate, and what each suggests."""

_SYMBOLS = {"trainings": "t", "lowest": "l"}

_HEADROOM = 0.25
"""How far above the usable part of a curve its divergence is drawn, as a part of its height."""

_BATCH_FACTORS = (0.25, 0.5, 1, 2, 4, 8, 16)
"""Batches in the table of the noise scale, relative to the present one."""


def lr_plot(result: LRSearchResult, plan: Plan) -> Plot:
    """Return the curve of a range test, with its divergence, short trainings and suggestions.

    Args:
        result: Result of the search.
        plan: The plan of the range test.
    """
    lrs, losses = usable_part(result.curve)
    ceiling = max(losses, default=0.0)
    ceiling += _HEADROOM * (ceiling - min(losses, default=0.0))
    curves = [Curve(name="range test, smoothed", xs=lrs, ys=losses)]
    broken = list(zip(result.curve.lrs, result.curve.losses, strict=True))[len(lrs) :]
    if broken or len(lrs) < plan.total_steps:
        diverged_lrs = [lr for lr, _ in broken] or lrs[-1:]
        heights = [min(loss, ceiling) for _, loss in broken[:-1]] + [ceiling][: len(diverged_lrs)]
        xs, ys = lrs[-1:] + diverged_lrs, losses[-1:] + heights
        curves.append(Curve(name="range test, diverged", xs=xs, ys=ys, style="faint"))
    trials = sorted((trial.lr, trial.loss) for trial in result.trials if trial.loss is not None)
    if trials:
        ys = [min(loss, ceiling) for _, loss in trials]
        name = "final loss of short trainings"
        curves.append(Curve(name=name, xs=[lr for lr, _ in trials], ys=ys))
    marks = [
        Mark(
            name=rule,
            symbol=_SYMBOLS[rule],
            x=lr,
            y=losses[min(bisect.bisect_left(lrs, lr), len(losses) - 1)],
        )
        for rule, lr in asdict(result.suggestions).items()
        if rule in RULES and lr is not None and losses
    ]
    return Plot(
        title=f"{plan.recipe}: loss of {plan.batch_size:,} samples over the learning rate",
        x_label="lr",
        y_label="loss",
        curves=curves,
        marks=marks,
        log_x=True,
    )


def lr_text(result: LRSearchResult, rule: str, settings: Mapping[str, float], plan: Plan) -> str:
    """Return the plot of a search, its suggestions and the recommended settings.

    Args:
        result: Result of the range test, with short trainings if there were any.
        rule: The rule that the settings follow.
        settings: Recommended settings by name; empty if there are none.
        plan: The plan of the range test.
    """
    if result.suggestions.reason:
        return f"No learning rate is suggested: {result.suggestions.reason}."
    lines = [draw(lr_plot(result, plan)), "", lr_suggestions_text(result, plan), ""]
    if not settings:
        text = "Every short training diverged. Choose a lower learning rate than those above."
        return "\n".join([*lines, text])
    evidence = f"launcher find lr --rule {rule}: " + (
        f"a range test of {len(result.curve.lrs)} steps"
        if rule == "lowest"
        else f"short trainings at {len(result.trials)} learning rates"
    )
    evidence += f"; {lr_confidence(rule, plan.total_steps)}"
    values = {
        name: str(value) if isinstance(value, int) else f"{value:.3g}"
        for name, value in settings.items()
    }
    return "\n".join([*lines, recommendation(values, evidence)])


def lr_confidence(rule: str, steps: int) -> str:
    """Return how often a rule is right with so many steps at each learning rate.

    The numbers are those of benchmarks/lr_finder.py, which measures `DEFAULT_STEPS`.
    """
    if steps < DEFAULT_STEPS:
        return f"fewer than {DEFAULT_STEPS} steps, which is right less often"
    return f"within a factor of 2 of the best in {RIGHT_PERCENT[rule]} % of benchmarked searches"


def lr_trial_text(trial: LRTrial) -> str:
    """Return the outcome of the short trainings at one learning rate, in one line."""
    outcome = "diverged" if trial.loss is None else f"final loss {trial.loss:.4g}"
    return f"  lr {trial.lr:<9.3g} {outcome}"


def lr_suggestions_text(result: LRSearchResult, plan: Plan) -> str:
    """Return the suggestion of each rule, where the loss diverges, and the short trainings."""
    lines = [f"Suggested learning rates at a global batch of {plan.batch_size:,} samples:"]
    for rule, explanation in RULES.items():
        lr = getattr(result.suggestions, rule)
        if lr is not None:
            lines.append(f"  {rule:<10} {lr:<9.3g} {explanation}")
            lines.append(f"  {'':<20} {lr_confidence(rule, plan.total_steps)}")
    lrs, _ = usable_part(result.curve)
    if 0 < len(lrs) < plan.total_steps:
        lines.append(f"The loss of the range test diverges above a learning rate of {lrs[-1]:.3g}.")
    if result.trials:
        lines.append(f"Trainings of {result.trial_steps:,} steps at this batch:")
        lines += map(lr_trial_text, result.trials)
    found, found_in_trials = result.suggestions.trainings, fitted_lr(result.trials)
    if found is not None and found_in_trials is not None and found < found_in_trials:
        lines.append(
            f"They are best at {found_in_trials:.3g}; the recipe has {result.whole_steps:,} steps, "
            f"for which that is multiplied by {found / found_in_trials:.2g}."
        )
    return "\n".join(lines)


def size_trial_text(trial: SizeTrial) -> str:
    """Return the outcome of a trial of a micro-batch size, in one line."""
    if trial.samples_per_second is None or trial.peak_bytes is None:
        return f"  {trial.size:>7,} samples  out of memory"
    rate = f"{trial.samples_per_second:>10,.0f} samples/s"
    return f"  {trial.size:>7,} samples  {rate}  peak memory {size(trial.peak_bytes)}"


def batch_plot(result: BatchSearchResult, plan: Plan) -> Plot:
    """Return the throughput over the micro-batch size."""
    fitting = [trial for trial in result.trials if trial.samples_per_second is not None]
    fitting.sort(key=lambda trial: trial.size)
    return Plot(
        title=f"{plan.recipe}: throughput over the micro-batch size",
        x_label="micro-batch",
        y_label="samples/s",
        curves=[
            Curve(
                name="samples/s",
                xs=[float(trial.size) for trial in fitting],
                ys=[trial.samples_per_second or 0.0 for trial in fitting],
            )
        ],
        log_x=True,
    )


def batch_text(result: BatchSearchResult, chosen: SizeTrial | None) -> str:
    """Return the largest and the recommended micro-batch size.

    Args:
        result: Result of the search.
        chosen: The recommended trial; None if no size fits.
    """
    limit = (
        "the GPU's memory less 10 %" if result.memory_bytes is None else size(result.memory_bytes)
    )
    if chosen is None:
        return (
            f"Not one sample fits into the memory of a rank ({limit}). Try "
            "activation_checkpointing=true, offload=cpu, strategy=fsdp or strategy=zero3."
        )
    largest = max(trial.size for trial in result.trials if trial.fits)
    reason = (
        "no other size is much faster, and larger ones need more memory"
        if chosen.size < largest
        else "it is the fastest"
    )
    lines = [
        f"The largest micro-batch that fits has {largest:,} samples.",
        f"A rank's share of the global batch has {result.share:,} samples.",
        f"The memory limit of a rank is {limit}.",
        f"The recommended micro-batch has {chosen.size:,} samples: {reason}.",
        "",
        recommendation(
            {"micro_batch_size": str(chosen.size)},
            f"launcher find batch: {chosen.samples_per_second:,.0f} samples/s",
        ),
    ]
    return "\n".join(lines)


def loader_trial_text(reading: LoaderTrial) -> str:
    """Return a measurement with a number of workers, in one line."""
    line = (
        f"  {reading.workers:>3} workers  {reading.samples_per_second:>10,.0f} samples/s  a step "
        f"takes {_milliseconds(reading.step_seconds)} and waits "
        f"{_milliseconds(reading.wait_seconds_per_step)} for data"
    )
    if reading.worker_bytes:
        line += f"  {size(reading.worker_bytes)} per worker"
    if reading.workers and reading.prefetch_factor != PREFETCH_FACTOR:
        line += f"  prefetch_factor={reading.prefetch_factor}"
    if reading.worker_threads > 1:
        line += f"  worker_threads={reading.worker_threads}"
    if reading.workers and reading.worker_start != "fork":
        line += f"  worker_start={reading.worker_start}, first batch after "
        line += f"{reading.start_seconds:.1f} s"
    return line + ("  pin_memory=true" if reading.pin_memory else "")


def loader_plot(result: LoaderSearchResult, plan: Plan) -> Plot:
    """Return the throughput over the number of workers."""
    # The first reading of a number of workers has the planned prefetching and pinning.
    rates = {
        reading.workers: reading.samples_per_second
        for reading in reversed(result.readings)
        if reading.worker_threads == 1
    }
    xs = sorted(rates)
    return Plot(
        title=f"{plan.recipe}: throughput over the workers per rank",
        x_label="workers",
        y_label="samples/s",
        curves=[Curve(name="samples/s", xs=xs, ys=[rates[x] for x in xs])],
    )


def loader_text(result: LoaderSearchResult, plan: Plan) -> str:
    """Return the cost of a sample, the predicted and the recommended number of workers."""
    cost, best = result.cost, result.best
    planned = next(reading for reading in result.readings if reading.workers == result.planned)
    kind = (
        "waiting, which workers overlap" if cost.is_latency_bound else "CPU time, which needs cores"
    )
    ratio = f"{best.samples_per_second / planned.samples_per_second:.2f} times"
    wait = _milliseconds(best.wait_seconds_per_step)
    planned_wait = _milliseconds(planned.wait_seconds_per_step)
    predicted_rate = f"{result.predicted_samples_per_second:,.0f} samples/s"
    values = {name: str(value).lower() for name, value in result.settings.items()}
    lines = [
        f"Reading a sample takes {_milliseconds(cost.reading)}, most of it {kind}.",
        f"Computing on a sample takes {_milliseconds(cost.computing)}.",
        f"The model predicts {result.predicted} workers per rank with {predicted_rate}.",
        f"At most {result.most} workers per rank are possible, limited by {result.limited_by}.",
        f"The plan has num_workers={result.planned}.",
        f"{_assignments(values)} has {ratio} the samples/s of the plan.",
        f"A step then waits {wait} for data instead of {planned_wait}.",
    ]
    if best.workers:
        total = best.worker_bytes * best.workers * plan.nproc_per_node
        queue = best.queue_bytes * plan.nproc_per_node
        lines.append(
            f"The workers take {size(total)} of each node's memory: {size(best.worker_bytes)} each "
            "that they share with no other process. Their batches take up to "
            f"{size(queue)} of shared memory."
        )
    lines += result.notes
    evidence = f"launcher find loader: {best.samples_per_second:,.0f} samples/s"
    return "\n".join([*lines, "", recommendation(values, evidence)])


def noise_plot(result: NoiseSearchResult, probe: Probe) -> Plot:
    """Return the running noise scale over the steps, without its first tenth."""
    running = RunningNoise(memory=max(len(result.measurements) / 10, 10))
    scales = [(measurement.step, running.add(measurement)) for measurement in result.measurements]
    points = [(step, scale) for step, scale in scales[len(scales) // 10 :] if scale is not None]
    return Plot(
        title=f"{probe.plan.recipe}: gradient noise scale, in {_items(probe)}",
        x_label="step",
        y_label="B_simple",
        curves=[
            Curve(
                name="B_simple, running",
                xs=[step for step, _ in points],
                ys=[scale for _, scale in points],
            )
        ],
        log_y=True,
    )


def noise_text(result: NoiseSearchResult, probe: Probe) -> str:
    """Return the plot of the noise scale and the text of `noise_summary`."""
    if result.whole is None:
        return noise_summary(result, probe)
    return f"{draw(noise_plot(result, probe))}\n\n{noise_summary(result, probe)}"


def noise_summary(result: NoiseSearchResult, probe: Probe) -> str:
    """Return the noise scale, a table of batches, and the batch and ranks that are efficient."""
    plan, estimate = probe.plan, result.whole
    items = _items(probe)
    if estimate is None:
        return (
            f"The noise scale is undetermined: {len(result.measurements)} steps are too few, or "
            "the gradient is too small compared with its noise. Try more --steps."
        )
    interval = f"from {_number(estimate.low)} to {_number(estimate.high)}"
    lines = [
        f"B_simple = {_number(estimate.b_simple)} {items}, over {estimate.measurements:,} steps.",
        f"The 95 % confidence interval is {interval} {items}.",
    ]
    first, second = result.halves
    if first and second:
        lines.append(
            f"B_simple is {_number(first.b_simple)} over the first half of the steps and "
            f"{_number(second.b_simple)} over the second half."
        )
    batch = result.measurements[0].big_items
    scale = result.critical or estimate.b_simple
    lines.append(
        f"With a momentum of {result.momentum:.3g} the critical batch B_crit is {_number(scale)}."
    )
    lines += [
        "",
        f"Steps and {items} to the same loss, relative to a batch of {batch:,.0f} {items}:",
        f"  {'batch':>10}  steps   {items}",
    ]
    for factor in _BATCH_FACTORS:
        other = batch * factor
        steps = steps_ratio(batch, other, scale)
        cost = items_ratio(batch, other, scale)
        remark = "   beyond 2 x B_crit" if other > MAX_BATCH_RATIO * scale else ""
        lines.append(f"  {other:>10,.0f}  x{steps:<5.2f}  x{cost:<5.2f}{remark}")
    lines.append(
        "Such steps were within 25 % of those measured in benchmarks up to 8 times the batch, and "
        "within a third at 16 times."
    )
    return "\n".join([*lines, "", _batch_advice(scale, plan, batch, items)])


def _batch_advice(scale: float, plan: Plan, batch: float, items: str) -> str:
    """Return the largest batch that is efficient, and the ranks that it keeps busy."""
    limit = MAX_BATCH_RATIO * scale
    share = batch / plan.world_size
    if limit < batch:
        return (
            f"The batch of {batch:,.0f} {items} exceeds 2 x B_crit = {_number(limit)}.\n"
            f"A smaller batch takes only a few more steps and far fewer {items}."
        )
    unit = "GPU" if plan.device == "cuda" else "rank"
    ranks = max(int(limit / share), 1)
    return (
        f"Batches up to 2 x B_crit = {_number(limit)} {items} are efficient.\n"
        f"That is enough for {ranks:,} {unit}{'' if ranks == 1 else 's'} with the present "
        f"{share:,.0f} {items} each."
    )


def recommendation(values: Mapping[str, str], evidence: str) -> str:
    """Return settings as lines for a file and for the command line, with their evidence."""
    lines = ["Recommended settings, as lines for a --config file:"]
    comment = f"  # {evidence}"
    for name, value in values.items():
        lines.append(f"{name}: {value}{comment}")
        comment = ""
    lines.append("The same settings on the command line:")
    lines.append(_assignments(values))
    return "\n".join(lines)


def _assignments(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _items(probe: Probe) -> str:
    """Return the name of what a loss is averaged over: samples, or the items a recipe counts."""
    return "samples" if probe.recipe.count is None else "items"


def _number(value: float) -> str:
    """Return a number rounded to three digits, without an exponent if it is large."""
    return f"{value:.3g}" if not 1000 <= value < math.inf else f"{float(f'{value:.3g}'):,.0f}"
