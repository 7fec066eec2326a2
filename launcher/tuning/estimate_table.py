"""The text of an estimate: its inputs, a table by number of ranks, and its limits."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from launcher.analysis.scaling_model import Bounds, Link
from launcher.console.tables import table
from launcher.quantities import duration, size
from launcher.tuning.estimate import GRADIENT_BYTES, Estimate, EstimateRow

_WIDTH = 96
_LARGE_WAIT = 0.05
"""Fraction of the measured time from which waiting for data is reported."""

_LIMITS = (
    "Each range goes from communication that overlaps with computation wherever it can to "
    "communication that never does. Not modelled: stragglers, other jobs on the network, kernels "
    "that communication slows down, storage that more nodes read at once, and evaluation. The time "
    "of a micro-batch size that was not measured is interpolated linearly."
)


def estimate_text(estimate: Estimate, device: str) -> str:
    """Return an estimate as text.

    Args:
        estimate: The estimate.
        device: "cuda" or "cpu", the device of its plan.
    """
    measured = estimate.measured
    unit = "GPU" if device == "cuda" else "node"
    micro_steps = ", ".join(
        f"{num_samples} samples in {1e3 * seconds:.3g} ms"
        for num_samples, seconds in measured.micro_steps
    )
    gradients = size(GRADIENT_BYTES * measured.num_trained)
    sentences = [
        f"Measured on one device: {micro_steps}.",
        f"The {measured.num_trained:,} trained weights have {gradients} of gradients in fp32.",
        _inputs_text(estimate, unit),
    ]
    if measured.data_wait > _LARGE_WAIT:
        sentences.append(
            f"Steps waited for data during {measured.data_wait:.0%} of that time; "
            "`launcher find loader` finds the number of workers that avoids it."
        )
    if measured.critical_batch is not None:
        critical = f"{measured.critical_batch:,.0f}"
        sentences.append(
            f"The critical batch is {critical} samples, by the noise of the gradients: to the same "
            f"loss, a batch of B samples takes 1 + B / {critical} times those of a tiny batch."
        )
    if not measured.save_seconds:
        sentences.append(
            "Failures are not included, because no checkpoint was saved in the measured runs."
        )
    header = [line for sentence in sentences for line in _wrap(sentence)]
    rows = [_head(unit, estimate), *(_cells(row) for row in estimate.rows)]
    lines = table(rows, ">" * len(rows[0]))
    if estimate.refusal is not None:
        lines += _wrap(f"The run cannot use more ranks. {estimate.refusal}")
    return "\n".join([*header, "", *lines, "", *_wrap(_LIMITS)])


def _inputs_text(estimate: Estimate, unit: str) -> str:
    facts = estimate.facts
    mtbf_hours = facts.mtbf_seconds / 3600
    return (
        f"Cluster: within a node {_link(facts.network.inside)}, between nodes "
        f"{_link(facts.network.between)}, one failure per {mtbf_hours:,.0f} hours of a {unit}, "
        f"{duration(facts.restart_seconds)} to restart. These are the values of a site profile "
        "(--cluster), or defaults where it states none."
    )


def _link(link: Link) -> str:
    return f"{link.bytes_per_second / 1e9:.3g} GB/s and {link.seconds * 1e6:.3g} us"


def _head(unit: str, estimate: Estimate) -> list[str]:
    head = ["ranks", "batch", "per rank", "ms/step", "samples/s", "efficiency", "run"]
    head.append(f"{unit} hours")
    if estimate.rows and estimate.rows[0].steps is not None:
        head.append("steps")
    if estimate.facts.price_per_hour is not None:
        head.append("price")
    if estimate.measured.critical_batch is not None:
        head.append("samples")
    if estimate.measured.save_seconds:
        head += ["save every", "goodput"]
    return head


def _cells(row: EstimateRow) -> list[str]:
    cells = [
        f"{row.nodes:,} x {row.nproc_per_node}",
        f"{row.batch_size:,}",
        f"{row.micro_batch_size} x {row.accumulation_steps}",
        _range(row.seconds_per_step, lambda value: f"{1e3 * value:,.3g}"),
        _range(row.samples_per_second, lambda value: f"{value:,.0f}"),
        _range(row.efficiency, lambda value: f"{100 * value:.0f}") + " %",
        _range(row.seconds, duration),
        _range(row.device_hours, lambda value: f"{value:,.3g}"),
    ]
    if row.steps is not None:
        cells.append(_range(row.steps, lambda value: f"{value:,.0f}"))
    if row.price is not None:
        cells.append(_range(row.price, lambda value: f"{value:,.2f}"))
    if row.samples_ratio is not None:
        cells.append(f"x{row.samples_ratio:.2f}")
    if row.save_every is not None:
        cells += [duration(row.save_every), f"{row.goodput:.1%}"]
    return cells


def _range(bounds: Bounds, text: Callable[[float], str]) -> str:
    best, worst = text(bounds.best), text(bounds.worst)
    return best if best == worst else f"{best} - {worst}"


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
