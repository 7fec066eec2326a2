"""The whole proof: plan and run every configuration, compare them, and look for the cause."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.checks.proof_summary import causes
from launcher.checks.prove import ParityRow, ParityRun, inspect_trial, plan_trials, run_trials
from launcher.environment.machine import Machine
from launcher.errors import UsageError
from launcher.launch.signal_handler import SignalHandler
from launcher.recipe.overrides import Override
from launcher.recipe.resolve import Reference
from launcher.runs.failure_record import RunFailedError
from launcher.runs.rundir import create_run_dir

_WORLDS = (1, 2, 4, 8)
_MAX_CPU_RANKS = 4


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The outcome of a comparison of the steps of a recipe over ranks and strategies."""

    rows: tuple[ParityRow, ...]
    """One row for each configuration that ran, the reference first."""

    causes: tuple[str, ...]
    """Sentences that name why the steps differ; empty if they agree or no cause was found."""

    search_error: str = ""
    """Why the search for causes failed; empty if it did not."""

    folder: Path | None
    """The folder of the runs; None if it was removed, because all runs agree."""

    @property
    def agrees(self) -> bool:
        """Whether every configuration ran and took the same steps as the reference."""
        return all(row.agrees for row in self.rows)

    @property
    def has_unexplained_difference(self) -> bool:
        """Whether steps differ by more than rounding and a search found no cause."""
        return not self.causes and not self.search_error and any(_differs(row) for row in self.rows)


def default_worlds(machine: Machine) -> list[int]:
    """Return the numbers of ranks to compare: powers of two that the machine can run."""
    return [number for number in _WORLDS if number <= (machine.num_gpus or _MAX_CPU_RANKS)]


def prove(
    reference: Reference,
    overrides: Sequence[Override],
    machine: Machine,
    *,
    worlds: Sequence[int],
    strategies: Sequence[str] | None,
    steps: int,
    tolerance: float | None,
    out: Path | None,
    signals: SignalHandler,
    on_plan: Callable[[ParityRun, int], None],
    on_row: Callable[[ParityRow], None],
) -> Proof:
    """Run the first steps of a recipe in every configuration and compare them.

    Args:
        reference: The recipe.
        overrides: Settings to apply to it.
        machine: The machine to run on.
        worlds: Numbers of ranks.
        strategies: Strategies; None takes those of ddp, fsdp and zero2 that the settings allow.
        steps: Optimizer steps of each run, at most those planned.
        tolerance: Largest relative difference that counts as rounding; None depends on the
            precision.
        out: The folder to make and keep; None makes one that is removed if all runs agree.
        signals: Handles signals for the runs.
        on_plan: Receives the reference configuration and the number of steps before the first run.
        on_row: Receives each row as soon as its run has ended.

    Raises:
        UsageError: The overrides choose a strategy, or a configuration cannot run.
    """
    chosen = [override for override in overrides if override.name == "strategy"]
    if chosen:
        raise UsageError(
            f"{chosen[-1]}: choose what is compared with --strategies {chosen[-1].value}, or with "
            "a comma-separated list."
        )
    folder = create_run_dir(out, f"prove-{reference.function.__name__}").path
    try:
        trials = plan_trials(
            reference, overrides, machine, worlds=worlds, strategies=strategies, folder=folder
        )
    except Exception:
        shutil.rmtree(folder)
        raise
    steps = min(steps, trials[0].plan.total_steps)
    on_plan(trials[0], steps)
    rows = []
    for row in run_trials(
        reference, overrides, trials, steps=steps, tolerance=tolerance, signals=signals
    ):
        rows.append(row)
        on_row(row)
    sentences: list[str] = []
    search_error = ""
    if differing := next(filter(_differs, rows), None):
        try:
            inspection = inspect_trial(reference, overrides, differing.trial, signals)
            sentences = causes(inspection, differing.trial)
        except RunFailedError as error:
            search_error = str(error)
    proof = Proof(
        rows=tuple(rows), causes=tuple(sentences), search_error=search_error, folder=folder
    )
    if proof.agrees and out is None:
        shutil.rmtree(folder)
        return Proof(rows=proof.rows, causes=(), folder=None)
    return proof


def _differs(row: ParityRow) -> bool:
    return row.difference is not None and not row.agrees
