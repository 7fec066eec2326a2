"""An estimate as a table, with what it rests on and what it leaves out."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from launcher.analysis.scaling_model import Bounds, Link
from launcher.console.tables import table
from launcher.quantities import duration, size
from launcher.tuning.estimate import GRADIENT_BYTES, Estimate, EstimateRow

_WIDTH = 96
_MUCH = 0.05

_LEFT_OUT = (
    "A span is from all communication hidden behind computation that can be to none. Left out: "
    "ranks that are slower than others, other jobs on the network, kernels that communication "
    "slows down, data that more nodes read at once, evaluations. What a size takes that was not "
    "measured is drawn as a line between those that were."
)


def estimate_text(estimate: Estimate, device: str) -> str:
    """Return the table, and the arithmetic behind it."""
    measured = estimate.measured
    unit = "GPU" if device == "cuda" else "node"
    sizes = ", ".join(f"{n} samples in {1e3 * s:.3g} ms" for n, s in measured.micro_steps)
    gradients = size(GRADIENT_BYTES * measured.num_trained)
    lines = [
        f"measured on one device: {sizes}; {measured.num_trained:,} weights, {gradients} in fp32",
        _facts_text(estimate, unit),
    ]
    if measured.data_wait > _MUCH:
        lines.append(f"{measured.data_wait:.0%} of that time waited for data; find loader helps")
    if measured.noise_scale is not None:
        lines.append(
            f"noise scale {measured.noise_scale:,.0f} samples: a batch of B takes 1 + B / "
            f"{measured.noise_scale:,.0f} times the samples of a tiny one to the same loss"
        )
    if not measured.save_seconds:
        lines.append("no checkpoint was saved in what was measured, so failures are left out")
    wrapped = [piece for line in lines for piece in _wrap(line)]
    cells = [_head(unit, estimate), *(_cells(row) for row in estimate.rows)]
    shown = table(cells, ">" * len(cells[0]))
    ends = [] if estimate.refusal is None else _wrap(f"no more: {estimate.refusal}")
    return "\n".join([*wrapped, "", *shown, *ends, "", *_wrap(_LEFT_OUT)])


def _facts_text(estimate: Estimate, unit: str) -> str:
    facts = estimate.facts
    return (
        f"within a node {_link(facts.network.inside)}, between nodes "
        f"{_link(facts.network.between)}; a failure in {facts.mtbf_seconds / 3600:,.0f} hours of a "
        f"{unit}, {duration(facts.restart_seconds)} to begin again. A site profile (--cluster) "
        "says what is true of yours"
    )


def _link(link: Link) -> str:
    return f"{link.bytes_per_second / 1e9:.3g} GB/s and {link.seconds * 1e6:.3g} us"


def _head(unit: str, estimate: Estimate) -> list[str]:
    head = ["ranks", "batch", "per rank", "ms a step", "samples/s", "efficiency", "run"]
    head.append(f"{unit} hours")
    if estimate.facts.price_per_hour is not None:
        head.append("price")
    if estimate.measured.noise_scale is not None:
        head.append("samples")
    if estimate.measured.save_seconds:
        head += ["save every", "goodput"]
    return head


def _cells(row: EstimateRow) -> list[str]:
    cells = [
        f"{row.nodes:,} x {row.nproc_per_node}",
        f"{row.batch_size:,}",
        f"{row.micro_batch_size} x {row.accumulation_steps}",
        _span(row.seconds_per_step, lambda value: f"{1e3 * value:,.3g}"),
        _span(row.samples_per_second, lambda value: f"{value:,.0f}"),
        _span(row.efficiency, lambda value: f"{100 * value:.0f}") + " %",
        _span(row.seconds, duration),
        _span(row.device_hours, lambda value: f"{value:,.3g}"),
    ]
    if row.price is not None:
        cells.append(_span(row.price, lambda value: f"{value:,.2f}"))
    if row.samples_ratio is not None:
        cells.append(f"x{row.samples_ratio:.2f}")
    if row.save_every is not None:
        cells += [duration(row.save_every), f"{row.goodput:.1%}"]
    return cells


def _span(span: Bounds, text: Callable[[float], str]) -> str:
    best, worst = text(span.best), text(span.worst)
    return best if best == worst else f"{best} - {worst}"


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
