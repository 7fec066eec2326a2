"""A proof in words: a line for each configuration, and what makes them differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.checks.prove import ParityRow, ParityRun

if TYPE_CHECKING:
    from launcher.engine.probes.inspection import Inspection
    from launcher.engine.probes.parity import ParityDifference

_COLUMNS = ("strategy", "ranks", "x accum.", "samples", "lr", "items", "loss", "norm", "weights")
_WIDTHS = (10, 5, 8, 8, 8, 8, 8, 8, 8)


def head() -> str:
    """Return the names of the columns."""
    return _line(_COLUMNS)


def row_line(row: ParityRow) -> str:
    """Return the line of one configuration."""
    plan = row.trial.plan
    start = [row.trial.strategy, str(plan.world_size), str(plan.accumulation_steps)]
    if row.exit_code:
        return f"{_line(start)}  failed with exit code {row.exit_code}"
    if row.difference is None:
        return f"{_line(start)}  the others are compared with this one"
    found = row.difference
    exact = [
        f"step {found.unequal[name]}" if name in found.unequal else "="
        for name in ("sample ids", "learning rate", "item counts")
    ]
    rounded = [_relative(value) for value in (found.loss, found.grad_norm, found.weights)]
    return _line([*start, *exact, *rounded]) + ("" if found.agrees else "  differs")


def verdict(rows: list[ParityRow], steps: int) -> str:
    """Return what the table shows, in a sentence."""
    failed = [row for row in rows if row.exit_code]
    differ = [row for row in rows if not row.agrees and not row.exit_code]
    if not failed and not differ:
        return (
            f"The same {steps:,} steps in all {len(rows)} configurations: sample ids, learning "
            "rates and item counts are equal, the rest to rounding."
        )
    parts = []
    for row in differ:
        assert row.difference is not None
        parts.append(f"{_name(row.trial)}: {_what_differs(row.difference)}")
    parts += [f"{_name(row.trial)}: the run failed, see above" for row in failed]
    return "\n".join(parts)


def causes(inspection: Inspection, trial: ParityRun) -> list[str]:
    """Return what makes the steps of a recipe depend on the ranks, and what to do about each."""
    found = []
    if inspection.changing_samples:
        shown = ", ".join(map(str, inspection.changing_samples))
        found.append(
            f"Unseeded randomness in the data set: training sample {shown} was another when it was "
            "read again. The global generators of random, numpy.random and torch are seeded for "
            "each sample; a generator of its own, the time or the operating system's are not."
        )
    if inspection.loss_is_mean:
        found.append(
            "The loss returns a mean: over two halves of a batch it has the mean of their losses. "
            "Return the sum, as with reduction='sum', and the number of items."
        )
    if inspection.loss_is_no_sum:
        found.append(
            "The loss is no sum over samples: that of a batch is not the sum of that of its "
            "halves, so that accumulating over micro-batches computes something else."
        )
    for kind, names in (
        ("weight", inspection.changed_weights),
        ("buffer", inspection.changed_buffers),
    ):
        if names:
            found.append(
                f"Forward changes the {kind} {_some(names)}, and each rank sees other samples. "
                "`launcher check` says what to do."
            )
    synced = bool(trial.plan.settings["sync_batchnorm"])
    if inspection.batch_norms and not synced:
        found.append(
            f"BatchNorm ({_some(inspection.batch_norms)}): its statistics are over the micro-batch "
            "of one rank. sync_batchnorm=true takes them over all ranks."
        )
    elif inspection.batch_norms and trial.plan.accumulation_steps > 1:
        found.append(
            f"BatchNorm ({_some(inspection.batch_norms)}): its statistics are over one micro-batch "
            "of every rank. They are over the same samples where no configuration accumulates: a "
            "larger micro_batch_size."
        )
    elif inspection.coupled and not synced:
        found.append(
            "In training a sample's loss depends on the other samples of its micro-batch, and "
            "those depend on the ranks."
        )
    if inspection.random:
        which = f" ({_some(inspection.dropouts)})" if inspection.dropouts else ""
        found.append(
            f"Dropout or other randomness in the model{which}: each rank draws its own, so that "
            "another number of ranks is another draw of the same distribution."
        )
    return found


def to_dict(row: ParityRow) -> dict[str, object]:
    """Return a row as plain values."""
    found = row.difference
    values: dict[str, object] = {
        "strategy": row.trial.strategy,
        "ranks": row.trial.plan.world_size,
        "accumulation_steps": row.trial.plan.accumulation_steps,
        "exit_code": row.exit_code,
        "agrees": row.agrees,
    }
    if found is not None:
        values |= {
            "unequal": dict(found.unequal),
            "first_step": found.first_step,
            "loss": found.loss,
            "grad_norm": found.grad_norm,
            "weights": found.weights,
            "tolerance": found.tolerance,
        }
    return values


def _what_differs(found: ParityDifference) -> str:
    if found.unequal:
        name, step = min(found.unequal.items(), key=lambda item: item[1])
        return f"{name} differ from step {step}"
    if found.first_step is not None:
        beyond = f"by more than {found.tolerance:g} from step {found.first_step}"
        return f"losses or gradient norms differ {beyond}"
    return f"the final weights differ by more than {found.tolerance:g}"


def _name(trial: ParityRun) -> str:
    return f"{trial.strategy} on {trial.plan.world_size}"


def _relative(value: float) -> str:
    return "=" if value == 0 else f"{value:.1e}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    padded = [f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=False)]
    return "  ".join(padded).rstrip()
