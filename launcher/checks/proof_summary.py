"""The output of `launcher prove`: a row for each configuration, the verdict, and the causes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from launcher.checks.prove import ParityRow, ParityRun
from launcher.planning.configs import AUTOCAST
from launcher.planning.strategy import STRATEGIES
from launcher.printable import printable

if TYPE_CHECKING:
    from launcher.engine.probes.inspection import Inspection
    from launcher.engine.probes.parity import ParityDifference

_COLUMNS = (
    *("strategy", "ranks", "x accum.", "samples", "lr", "items", "loss", "norm", "weights"),
    "evals",
)
_NO_CAUSE = (
    "No cause was found in the data, the loss or the model. Rounding errors grow with every step, "
    "fastest at high learning rates: run fewer --steps, or set precision=fp64, to see whether "
    "rounding is the cause."
)

_WEIGHTS_ALONE = (
    "Losses and gradient norms agree in every step, and no cause was found in the data, the loss "
    "or the model. An optimizer that divides each gradient by its size, as adamw() does, moves a "
    "weight whose gradient is rounding noise as far as any other, in a direction that rounding "
    "decides. The bias of the keys in attention is such a weight: it changes no output. If the "
    "weights agree with optimizer=sgd(), this is the cause, and the trained function is the same."
)

_SHOWN_DIGITS = 12
"""Number of digits of the weights' SHA-256 that each row of an exact recipe shows."""

_WIDTHS = (10, 5, 8, 8, 8, 8, 8, 8, 8, 8)


def header() -> str:
    """Return the header of the table."""
    return _line(_COLUMNS)


def row_line(row: ParityRow) -> str:
    """Return the row of one configuration.

    Exactly compared values show `=` or the first step that differs; the others show the largest
    relative difference from the reference.
    """
    plan = row.trial.plan
    cells = [row.trial.strategy, str(plan.world_size), str(plan.accumulation_steps)]
    if row.exit_code:
        return f"{_line(cells)}  failed with exit code {row.exit_code}"
    digest = f"  {row.weights_digest[:_SHOWN_DIGITS]}" if plan.exact else ""
    if row.difference is None:
        return f"{_line(cells)}  the reference that the others are compared with{digest}"
    difference = row.difference
    exact = [
        f"step {difference.unequal[name]}" if name in difference.unequal else "="
        for name in ("sample ids", "learning rate", "item counts")
    ]
    relative = [
        _relative_text(value)
        for value in (difference.loss, difference.grad_norm, difference.weights)
    ]
    evaluated = ["-" if row.evaluation is None else _relative_text(row.evaluation[1])]
    end = "" if row.agrees else "  differs"
    return f"{_line([*cells, *exact, *relative, *evaluated])}{digest}{end}"


def verdict(rows: Sequence[ParityRow], steps: int) -> str:
    """Return the conclusion of the table: one sentence, or a line for each row that disagrees.

    Args:
        rows: The rows of the table.
        steps: Number of optimizer steps that each configuration took.
    """
    failed = [row for row in rows if row.exit_code]
    evaluated = any(row.evaluation is not None for row in rows)
    differ = [row for row in rows if not row.agrees and not row.exit_code]
    if not failed and not differ and all(row.trial.plan.exact for row in rows):
        return (
            f"The same {steps:,} steps to the bit in all {len(rows)} configurations: sample ids, "
            "learning rates, item counts, losses, gradient norms and weights are equal"
            f"{', and so are all evaluations' if evaluated else ''}. The weights have the SHA-256 "
            f"{rows[0].weights_digest}."
        )
    if not failed and not differ:
        return (
            f"The same {steps:,} steps in all {len(rows)} configurations: sample ids, learning "
            "rates and item counts are equal; losses, gradient norms and weights agree to rounding"
            f"{', and so do the losses of evaluations' if evaluated else ''}."
        )
    lines = []
    for row in differ:
        assert row.difference is not None
        text = _difference_text(row.difference)
        if row.difference.agrees:
            text = f"evaluations differ by more than {row.difference.tolerance:g}"
        lines.append(f"{_name(row.trial)}: {text}")
    lines += [f"{_name(row.trial)}: the run failed, see above" for row in failed]
    return "\n".join(lines)


def unexplained(rows: Sequence[ParityRow]) -> str:
    """Return what to try where no cause of a difference was found."""
    differences = [row.difference for row in rows if row.difference is not None and not row.agrees]
    if all(each.steps_agree and not each.agrees for each in differences):
        return _WEIGHTS_ALONE
    return _NO_CAUSE


def causes(inspection: Inspection, trial: ParityRun) -> list[str]:
    """Return why the steps of a recipe depend on the ranks, one paragraph for each cause.

    Args:
        inspection: The inspection of the recipe.
        trial: A trial whose steps differ from the reference.
    """
    return [*_data_and_loss_causes(inspection), *_model_causes(inspection, trial)]


def _data_and_loss_causes(inspection: Inspection) -> Iterator[str]:
    if inspection.changing_samples:
        samples = ", ".join(map(str, inspection.changing_samples))
        yield (
            f"Unseeded randomness in the data set: training samples {samples} changed when they "
            "were read a second time. The global generators of random, numpy.random and torch are "
            "seeded for each sample; a generator of your own, the time and random numbers of the "
            "operating system are not."
        )
    if inspection.loss_is_mean:
        yield (
            "The loss returns a mean: for a whole batch it gives the mean of the losses of its two "
            "halves. Return the sum, as with reduction='sum', and the number of items."
        )
    if inspection.loss_is_not_sum:
        yield (
            "The loss is not a sum over samples: the loss of a batch differs from the sum of the "
            "losses of its halves, so accumulation over micro-batches computes something else."
        )


def _model_causes(inspection: Inspection, trial: ParityRun) -> Iterator[str]:
    for kind, names in (
        ("weight", inspection.changed_weights),
        ("buffer", inspection.changed_buffers),
    ):
        if names:
            yield (
                f"Forward changes the {kind} {_first_name(names)}, and each rank processes other "
                "samples. `launcher check` prints what to do."
            )
    plan = trial.plan
    gathers = STRATEGIES[trial.strategy].gathers_parameters_in_autocast_dtype
    if plan.exact and gathers and plan.precision in AUTOCAST:
        yield (
            f"Under strategy={trial.strategy}, weights are gathered in {plan.precision}, which "
            "rounds them before other strategies do. Its steps are equal on any number of ranks: "
            f"compare them with --strategies {trial.strategy}."
        )
    if plan.virtual_ranks is not None:
        return
    synced = bool(trial.plan.settings["sync_batchnorm"])
    if inspection.batch_norms and not synced:
        yield (
            f"BatchNorm ({_first_name(inspection.batch_norms)}): statistics are taken over the "
            "micro-batch of one rank. sync_batchnorm=true takes them over all ranks, and "
            "virtual_ranks over the same parts of the batch on any number of ranks."
        )
    elif inspection.batch_norms and trial.plan.accumulation_steps > 1:
        yield (
            f"BatchNorm ({_first_name(inspection.batch_norms)}): statistics are taken over one "
            "micro-batch of every rank. They cover the same samples in every configuration that "
            "does not accumulate: set a larger micro_batch_size."
        )
    elif inspection.coupled and not synced:
        yield (
            "In training, the loss of a sample depends on the other samples of its micro-batch, "
            "and those depend on the number of ranks."
        )
    if inspection.random:
        source = (
            f"Dropout ({_first_name(inspection.dropouts)})"
            if inspection.dropouts
            else "Random numbers that forward or the loss draws"
        )
        yield (
            f"{source}: in training, the outputs are random. Each rank draws its own numbers, so "
            "another number of ranks draws other numbers from the same distribution. With "
            "virtual_ranks, each part of the batch draws its own."
        )


def to_dict(row: ParityRow) -> dict[str, object]:
    """Return a row as JSON-compatible values."""
    difference = row.difference
    values: dict[str, object] = {
        "strategy": row.trial.strategy,
        "ranks": row.trial.plan.world_size,
        "accumulation_steps": row.trial.plan.accumulation_steps,
        "exit_code": row.exit_code,
        "agrees": row.agrees,
        "weights_sha256": row.weights_digest,
    }
    if difference is not None:
        values |= {
            "unequal": dict(difference.unequal),
            "first_step": difference.first_step,
            "loss": difference.loss,
            "grad_norm": difference.grad_norm,
            "weights": difference.weights,
            "most_different_weight": difference.weight or None,
            "tolerance": difference.tolerance,
            "evaluation": None if row.evaluation is None else row.evaluation[1],
        }
    return values


def _difference_text(difference: ParityDifference) -> str:
    """Return the first difference from the reference, exactly compared values first."""
    if difference.unequal:
        name, step = min(difference.unequal.items(), key=lambda item: item[1])
        return f"unequal {name} from step {step}"
    limit = f"{difference.tolerance:g}"
    if difference.first_step is not None:
        return (
            f"losses or gradient norms differ by more than {limit} from step "
            f"{difference.first_step}"
        )
    return f"the final weights differ by more than {limit}, most in {printable(difference.weight)}"


def _name(trial: ParityRun) -> str:
    return f"{trial.strategy} on {trial.plan.world_size}"


def _relative_text(value: float) -> str:
    return "=" if value == 0 else f"{value:.1e}"


def _first_name(names: list[str]) -> str:
    """Return the first name and the number of the others: `layer1.norm and 3 more`."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    padded = [f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=False)]
    return "  ".join(padded).rstrip()
