"""What finders found, in words and curves."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from launcher.analysis.batch_sizes import SizeTrial
from launcher.analysis.gradient_noise import (
    LARGEST,
    RunningNoise,
    items_ratio,
    steps_ratio,
)
from launcher.analysis.lr_curve import FoundLR, LRTrial, usable
from launcher.console.plots import Curve, Mark, Plot, draw
from launcher.planning.loading import PREFETCH_FACTOR
from launcher.planning.plan import Plan
from launcher.quantities import size

if TYPE_CHECKING:
    from launcher.tuning.batch_search import FoundBatch
    from launcher.tuning.loader_search import FoundLoader, LoaderTrial
    from launcher.tuning.noise_search import FoundNoise
    from launcher.tuning.probe_run import Probe

RULES = {
    "valley": "two thirds along the longest descent",
    "steep": "where the loss falls fastest",
    "minimum": "a tenth of where it is lowest",
    "slide": "before its slope changes, from the right",
}

_SYMBOLS = {"valley": "v", "steep": "s", "minimum": "m", "slide": "l"}


def lr_plot(found: FoundLR, plan: Plan) -> Plot:
    """Return the curve of a range test with what the rules suggest."""
    lrs, losses = usable(found.curve)
    marks = [
        Mark(
            name=name,
            symbol=_SYMBOLS[name],
            x=lr,
            y=losses[min(bisect.bisect_left(lrs, lr), len(losses) - 1)],
        )
        for name, lr in asdict(found.suggestions).items()
        if name in RULES and lr is not None
    ]
    return Plot(
        title=f"{plan.recipe}: loss of {plan.batch_size:,} samples over the learning rate",
        x_label="lr",
        y_label="loss",
        curves=[Curve(name="loss, smoothed", xs=lrs, ys=losses)],
        marks=marks,
        log_x=True,
    )


def lr_text(found: FoundLR, rule: str, settings: Mapping[str, float], plan: Plan) -> str:
    """Return curve, suggestions, and the lines to paste."""
    if found.suggestions.reason:
        return f"No learning rate is suggested: {found.suggestions.reason}."
    lines = [draw(lr_plot(found, plan)), "", lr_rules(found, plan)]
    if not settings:
        nothing = "Every training diverged" if found.trials else f"The rule {rule} suggests nothing"
        return "\n".join([*lines, "", f"{nothing}: take another rule."])
    evidence = (
        f"# launcher find lr, {rule}: {len(found.curve.lrs)} steps of {plan.batch_size:,} samples"
    )
    if found.trials:
        evidence = f"# launcher find lr: the best of {len(found.trials)} whole, short trainings"
    lines += ["", "for --config, or as name=value:"]
    for name, value in settings.items():
        lines.append(f"{name}: {value:.3g}  {evidence}")
        evidence = ""
    return "\n".join(line.rstrip() for line in lines)


def lr_trial_text(trial: LRTrial) -> str:
    """Return what came of one short training, in a line."""
    ended = "diverged" if trial.loss is None else f"loss {trial.loss:.4g} at its end"
    return f"  lr {trial.lr:<9.3g} {ended}"


def lr_rules(found: FoundLR, plan: Plan) -> str:
    """Return what each rule suggests."""
    lines = [f"at a batch of {plan.batch_size:,}:"]
    for name, what in RULES.items():
        lr = getattr(found.suggestions, name)
        lines.append(f"  {name:<8} {'-' if lr is None else f'{lr:.3g}':<9} {what}")
    if found.trials:
        lines += ["whole trainings in few steps:", *map(lr_trial_text, found.trials)]
    return "\n".join(lines)


def trial_text(trial: SizeTrial) -> str:
    """Return what came of one size, in a line."""
    if trial.samples_per_second is None or trial.peak_bytes is None:
        return f"  {trial.size:>7,} samples  out of memory"
    speed = f"{trial.samples_per_second:>10,.0f} samples/s"
    return f"  {trial.size:>7,} samples  {speed}  {size(trial.peak_bytes)} at most"


def batch_plot(found: FoundBatch, plan: Plan) -> Plot:
    """Return the speed over the size that goes through the model at once."""
    fitting = [trial for trial in found.trials if trial.samples_per_second is not None]
    fitting.sort(key=lambda trial: trial.size)
    return Plot(
        title=f"{plan.recipe}: speed over the micro-batch",
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


def batch_text(found: FoundBatch, chosen: SizeTrial | None) -> str:
    """Return which size fits, which is the fastest, and the line to paste."""
    limit = "the GPU, less a tenth" if found.memory_bytes is None else size(found.memory_bytes)
    if chosen is None:
        return f"Not one sample fits into the memory of a rank ({limit})."
    largest = max(trial.size for trial in found.trials if trial.fits)
    lines = [f"largest that fits: {largest:,} of the {found.share:,} samples of a rank's share"]
    lines.append(f"memory of a rank:  {limit}")
    if chosen.size < largest:
        lines.append(f"take {chosen.size:,}: it is as fast as the fastest, in less memory")
    else:
        lines.append(f"take {chosen.size:,}: it is the fastest")
    evidence = f"# launcher find batch: {chosen.samples_per_second:,.0f} samples/s"
    lines += ["", "for --config, or as name=value:", f"micro_batch_size: {chosen.size}  {evidence}"]
    return "\n".join(lines)


def reading_text(reading: LoaderTrial) -> str:
    """Return what was measured with a number of workers, in a line."""
    line = (
        f"  {reading.workers:>3} workers  {reading.samples_per_second:>10,.0f} samples/s  a step "
        f"waits {_milliseconds(reading.wait_seconds_per_step)} of "
        f"{_milliseconds(reading.step_seconds)}"
    )
    if reading.worker_bytes:
        line += f"  {size(reading.worker_bytes)} each"
    if reading.workers and reading.prefetch_factor != PREFETCH_FACTOR:
        line += f"  {reading.prefetch_factor} batches ready"
    return line + ("  pinned" if reading.pin_memory else "")


def loader_plot(found: FoundLoader, plan: Plan) -> Plot:
    """Return the speed over the number of workers."""
    rates = {each.workers: each.samples_per_second for each in reversed(found.readings)}
    xs = sorted(rates)
    return Plot(
        title=f"{plan.recipe}: speed over the workers of a rank",
        x_label="workers",
        y_label="samples/s",
        curves=[Curve(name="samples/s", xs=xs, ys=[rates[x] for x in xs])],
    )


def loader_text(found: FoundLoader, plan: Plan) -> str:
    """Return what reading costs, what was predicted and measured, and the lines to paste."""
    cost, best = found.cost, found.best
    planned = next(each for each in found.readings if each.workers == found.planned)
    kind = "waiting, which workers do together" if cost.waits else "work, which takes cores"
    ratio = best.samples_per_second / planned.samples_per_second
    lines = []
    lines.append(
        f"a sample takes {_milliseconds(cost.reading)} to read, most of it {kind}; "
        f"{_milliseconds(cost.computing)} to compute on"
    )
    lines.append(
        f"predicted: {found.predicted} workers per rank, "
        f"{found.predicted_samples_per_second:,.0f} samples/s; room for {found.most} "
        f"({found.limited_by})"
    )
    taken = ", ".join(f"{name}={value}" for name, value in found.settings.items())
    lines.append(
        f"take {taken}: x{ratio:.2f} the samples/s of the planned {found.planned} workers, a step "
        f"waits {_milliseconds(best.wait_seconds_per_step)} instead of "
        f"{_milliseconds(planned.wait_seconds_per_step)}"
    )
    if best.workers:
        total = best.worker_bytes * best.workers * plan.nproc_per_node
        lines.append(f"the workers cost {size(total)} of a node's memory")
    lines += ["", "for --config, or as name=value:"]
    evidence = f"# launcher find loader: {best.samples_per_second:,.0f} samples/s"
    for name, value in found.settings.items():
        lines.append(f"{name}: {str(value).lower()}  {evidence}".rstrip())
        evidence = ""
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def noise_plot(found: FoundNoise, probe: Probe) -> Plot:
    """Return how the noise scale went over the steps."""
    running = RunningNoise(memory=max(len(found.measurements) / 10, 10))
    points = [(each.step, running.add(each)) for each in found.measurements]
    told = [(step, scale) for step, scale in points[len(points) // 10 :] if scale is not None]
    return Plot(
        title=f"{probe.plan.recipe}: gradient noise scale, in {_items(probe)}",
        x_label="step",
        y_label="B_simple",
        curves=[
            Curve(
                name="B_simple, running",
                xs=[step for step, _ in told],
                ys=[scale for _, scale in told],
            )
        ],
        log_y=True,
    )


def noise_text(found: FoundNoise, probe: Probe) -> str:
    """Return the noise scale, what it says of batches, and how many GPUs are worth using."""
    if found.whole is None:
        return noise_account(found, probe)
    return f"{draw(noise_plot(found, probe))}\n\n{noise_account(found, probe)}"


def noise_account(found: FoundNoise, probe: Probe) -> str:
    """Return what `noise_text` does, without the curve."""
    plan, whole = probe.plan, found.whole
    items = _items(probe)
    if whole is None:
        return (
            f"The noise scale cannot be told: {len(found.measurements)} steps say too little, or "
            "the gradient is too small beside its noise. More --steps may help."
        )
    lines = []
    lines.append(
        f"B_simple = {_number(whole.b_simple)} {items}, 95 %: {_number(whole.low)} to "
        f"{_number(whole.high)}, from {whole.measurements:,} steps of training"
    )
    first, second = found.halves
    if first and second:
        lines.append(
            f"           {_number(first.b_simple)} in the first half of them, "
            f"{_number(second.b_simple)} in the second, which counts from here on"
        )
    batch = found.measurements[0].big_items
    scale = (found.latest or whole).b_simple
    lines += ["", f"  {'batch':>10}  steps   {items}    (to the same loss, against {batch:,.0f})"]
    for factor in (0.25, 0.5, 1, 2, 4, 8, 16):
        other = batch * factor
        steps = steps_ratio(batch, other, scale)
        cost = items_ratio(batch, other, scale)
        remark = "   more than it is worth" if other > LARGEST * scale else ""
        lines.append(f"  {other:>10,.0f}  x{steps:<5.2f}  x{cost:<5.2f}{remark}")
    return "\n".join([*lines, "", _advice(scale, plan, batch)])


def _advice(scale: float, plan: Plan, batch: float) -> str:
    """Return how large a batch, and how many ranks, are worth it."""
    largest = LARGEST * scale
    share = batch / plan.world_size
    unit = "GPU" if plan.device == "cuda" else "rank"
    if largest < batch:
        return (
            f"The batch of {batch:,.0f} is beyond 2 x B_simple = {_number(largest)}: a smaller one "
            "takes hardly more steps and far fewer samples."
        )
    worth = max(int(largest / share), 1)
    return (
        f"Worth it: batches up to 2 x B_simple = {_number(largest)}, which is {worth:,} "
        f"{unit}{'' if worth == 1 else 's'} at the {share:,.0f} that each takes now."
    )


def _items(probe: Probe) -> str:
    return "samples" if probe.recipe.count is None else "items"


def _number(value: float) -> str:
    """Return a number in three digits."""
    return f"{value:.3g}" if not 1000 <= value < math.inf else f"{float(f'{value:.3g}'):,.0f}"
