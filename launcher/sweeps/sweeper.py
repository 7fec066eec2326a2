"""Train the runs of a sweep, some at a time, and choose which of them go on."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Protocol

from launcher.analysis.halving import choose
from launcher.errors import EXIT_RESUMABLE, RunDirError, UsageError
from launcher.launch.typed_recipe import keep_recipe
from launcher.paths import exists
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.history import History
from launcher.runs.ownership import own_run_dir
from launcher.runs.rundir import RunDir, create_run_dir
from launcher.signals import STOP_SIGNALS, announce, handlers_restored, install
from launcher.sweeps.shares import Share
from launcher.sweeps.sweep_record import Choice, SweepRecord, is_sweep, read_sweep
from launcher.sweeps.sweep_request import PreparedSweep, SweepTrial
from launcher.sweeps.sweep_result import SweepResult, TrialResult, read_trial, trial_folder
from launcher.sweeps.trial_process import TrialProcess, TrialTask, clear_unstarted, preload

_SECONDS_BETWEEN_LOOKS = 0.2
"""A process whose end is hidden by one that it has left running is noticed after this time."""


class SweepListener(Protocol):
    """Receives what a sweep does."""

    def on_begin(self, sweep: PreparedSweep, folder: RunDir, num_done: int) -> None:
        """Receive the sweep, its folder, and how many runs need no more training."""

    def on_start(self, trial: SweepTrial, run_dir: RunDir, until: int) -> None:
        """Learn that a run starts, or continues, and trains until it has taken `until` steps."""

    def on_wait(self, running: Sequence[tuple[SweepTrial, RunDir]], num_waiting: int) -> None:
        """Learn which runs are training, several times a second."""

    def on_end(self, result: TrialResult) -> None:
        """Receive what a run that trains no more, or pauses, has come to."""

    def on_choice(self, choice: Choice) -> None:
        """Receive a choice of the runs that go on."""


class Quiet:
    """A listener that prints nothing, for programs."""

    def on_begin(self, sweep: PreparedSweep, folder: RunDir, num_done: int) -> None:
        """Do nothing."""

    def on_start(self, trial: SweepTrial, run_dir: RunDir, until: int) -> None:
        """Do nothing."""

    def on_wait(self, running: Sequence[tuple[SweepTrial, RunDir]], num_waiting: int) -> None:
        """Do nothing."""

    def on_end(self, result: TrialResult) -> None:
        """Do nothing."""

    def on_choice(self, choice: Choice) -> None:
        """Do nothing."""


def run_sweep(
    sweep: PreparedSweep,
    listener: SweepListener,
    *,
    out: Path | None,
    announces: bool,
) -> SweepResult:
    """Train the runs of a sweep that have not finished, and return what all of them came to.

    Args:
        sweep: The sweep.
        listener: Receives what happens.
        out: The folder to make, or of the same sweep, to continue; None makes one below runs/.
        announces: Whether this process prints which signal stops the sweep.

    Raises:
        RunDirError: The folder exists and holds something else, another process owns it, or it
            cannot be written.
        UsageError: The evaluations lack the metric of the stop rule.
    """
    record = sweep.record
    if out is not None and is_sweep(out):
        before = read_sweep(out)
        before.check_same(record, out.resolve())
        record = replace(record, recipe=before.recipe, choices=before.choices, trials=before.trials)
        folder = RunDir(out.resolve())
    else:
        if out is not None and exists(out):
            raise RunDirError(
                f"{out} exists already, and holds no sweep. Give another --out, or move it away."
            )
        folder = create_run_dir(out, f"sweep-{sweep.trials[0].plan.recipe}")
    with own_run_dir(folder), Stopping(announces=announces) as stopping:
        sweep = replace(sweep, reference=keep_recipe(sweep.reference, folder))
        return _Sweeper(sweep, record, folder, listener, stopping).run()


class Stopping:
    """Passes the signals that ask this process to stop on to the runs that are training.

    Args:
        announces: Whether to print the signal.
    """

    def __init__(self, *, announces: bool) -> None:
        self.stopped_by: signal.Signals | None = None
        """The first signal that arrived."""
        self.processes: list[TrialProcess] = []
        self._announces = announces
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._stack.enter_context(handlers_restored())
            signal.signal(signal.SIGINT, self._stop)
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    install(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _stop(self, number: int, _: FrameType | None) -> None:
        received = signal.Signals(number)
        if self.stopped_by is None and self._announces:
            again = "; Ctrl-C again stops at once" if received is signal.SIGINT else ""
            announce(f"{received.name}: every run stops after its step{again}")
        self.stopped_by = self.stopped_by or received
        for process in self.processes:
            process.signal(received)


class _Sweeper:
    """Trains the runs of one sweep.

    Args:
        sweep: The sweep.
        record: The content of sweep.json, with the choices that were made before.
        folder: The folder of the sweep, which this process owns.
        listener: Receives what happens.
        stopping: Handles signals.
    """

    def __init__(
        self,
        sweep: PreparedSweep,
        record: SweepRecord,
        folder: RunDir,
        listener: SweepListener,
        stopping: Stopping,
    ) -> None:
        self._sweep, self._record, self._folder = sweep, record, folder
        self._listener, self._stopping = listener, stopping
        self._errors: dict[int, str] = {}
        """Why runs failed in this process, by their index."""
        self._dropped = {
            index for choice in record.choices for index in choice.tried if index not in choice.kept
        }
        errors = {trial.index: trial.error for trial in record.trials}
        self._errors |= {index: errors[index] for index in self._dropped if errors.get(index)}
        self._results = {trial.index: self._read(trial) for trial in sweep.trials}

    def run(self) -> SweepResult:
        """Train the runs to their end or until the stop rule drops them."""
        trials = self._sweep.trials
        self._save()
        done = sum(self._is_done(trial) for trial in trials)
        self._listener.on_begin(self._sweep, self._folder, done)
        if done < len(trials):
            preload([trial.plan for trial in trials])
        for number, rung in enumerate(self._sweep.rungs):
            if number < len(self._record.choices) or not self._left():
                continue
            self._train({trial.index: rung[trial.index] for trial in self._left()})
            if self._stopping.stopped_by is not None or self._has_unfinished(rung):
                break
            self._choose(rung)
        else:
            self._train({trial.index: trial.plan.total_steps for trial in self._left()})
        self._save()
        return SweepResult(
            path=self._folder.path,
            goal=self._sweep.goal,
            trials=tuple(self._results.values()),
            stopped_by=self._stopping.stopped_by,
        )

    def _left(self) -> list[SweepTrial]:
        """Return the runs that the stop rule has not dropped."""
        return [trial for trial in self._sweep.trials if trial.index not in self._dropped]

    def _has_unfinished(self, rung: Sequence[int]) -> bool:
        """Return whether a run was stopped before the steps of a choice and can be resumed."""
        return any(
            trial.index not in self._errors and not self._reached(trial, rung[trial.index])
            for trial in self._left()
        )

    def _is_done(self, trial: SweepTrial) -> bool:
        return trial.index in self._dropped or self._reached(trial, trial.plan.total_steps)

    def _reached(self, trial: SweepTrial, steps: int) -> bool:
        """Return whether a run has taken so many steps and can continue from there."""
        run_dir = self._run_dir(trial)
        if run_dir.result.exists():
            return True
        checkpoints = list_checkpoints(run_dir)
        return steps < trial.plan.total_steps and bool(checkpoints) and checkpoints[0].step >= steps

    def _run_dir(self, trial: SweepTrial) -> RunDir:
        return RunDir(trial_folder(self._folder.path, trial.index, len(self._sweep.trials)))

    def _train(self, until: dict[int, int]) -> None:
        """Train runs until each has taken its steps, failed, or been stopped by a signal.

        Args:
            until: Steps of each run, by its index.
        """
        waiting = deque(
            trial
            for trial in self._sweep.trials
            if trial.index in until
            and trial.index not in self._errors
            and not self._reached(trial, until[trial.index])
        )
        free = list(self._sweep.shares)
        running: list[tuple[SweepTrial, TrialProcess]] = []
        stopping = self._stopping
        try:
            while running or (waiting and stopping.stopped_by is None):
                while waiting and free and stopping.stopped_by is None:
                    trial = waiting.popleft()
                    process = self._start(trial, free.pop(0), until[trial.index])
                    running.append((trial, process))
                self._listener.on_wait(
                    [(trial, self._run_dir(trial)) for trial, _ in running], len(waiting)
                )
                for ended in self._wait(running):
                    running.remove(ended)
                    free.insert(0, ended[1].task.share)
                    self._end(*ended)
        finally:
            for _, process in running:  # only if an error ends the sweep itself
                process.signal(signal.SIGTERM)

    def _start(self, trial: SweepTrial, share: Share, until: int) -> TrialProcess:
        run_dir = self._run_dir(trial)
        clear_unstarted(run_dir.path)
        self._listener.on_start(trial, run_dir, until)
        task = TrialTask(
            recipe=self._sweep.reference.location,
            overrides=trial.overrides,
            nproc_per_node=trial.plan.nproc_per_node,
            folder=run_dir.path,
            log=self._folder.path / "logs" / f"{run_dir.path.name}.log",
            share=share,
            pause_after=until if until < trial.plan.total_steps else None,
            parent=os.getpid(),
        )
        process = TrialProcess(task)
        self._stopping.processes.append(process)
        if self._stopping.stopped_by is not None:  # the signal came while the process was made
            process.signal(self._stopping.stopped_by)
        return process

    def _wait(
        self, running: Sequence[tuple[SweepTrial, TrialProcess]]
    ) -> list[tuple[SweepTrial, TrialProcess]]:
        """Return the runs whose processes have ended, perhaps none."""
        wait([process.sentinel for _, process in running], timeout=_SECONDS_BETWEEN_LOOKS)
        return [pair for pair in running if pair[1].exit_code is not None]

    def _end(self, trial: SweepTrial, process: TrialProcess) -> None:
        """Record what a run whose process has ended came to."""
        self._stopping.processes.remove(process)
        code, error = process.exit_code, process.close()
        was_stopped = code == EXIT_RESUMABLE or self._stopping.stopped_by is not None
        if code and not was_stopped:
            log = f"logs/{process.task.log.name} in the folder of the sweep has its output"
            self._errors[trial.index] = error or f"exit code {code}; {log}"
        self._results[trial.index] = self._read(trial)
        self._save()
        self._listener.on_end(self._results[trial.index])

    def _read(self, trial: SweepTrial) -> TrialResult:
        return read_trial(
            self._run_dir(trial).path,
            trial.settings,
            trial.index,
            self._sweep.goal,
            dropped=trial.index in self._dropped,
            error=self._errors.get(trial.index, ""),
        )

    def _choose(self, rung: Sequence[int]) -> None:
        """Choose the runs that go on, and write the choice before any of them does.

        Raises:
            UsageError: No run that has not failed has the metric.
        """
        goal, left = self._sweep.goal, self._left()
        alive = [trial for trial in left if trial.index not in self._errors]
        metrics = {trial.index: self._metrics_at(trial, rung[trial.index]) for trial in alive}
        if alive and not any(goal.name in values for values in metrics.values()):
            known = ", ".join(sorted({name for values in metrics.values() for name in values}))
            found = f"its evaluations give {known}" if known else "it has no evaluation data"
            raise UsageError(
                f"--stop halving compares the runs by {goal.name}, which "
                f"{alive[0].plan.recipe} does not evaluate: {found}. The runs have paused; give "
                "another --metric, and another --out."
            )
        values = {
            index: None if (value := found.get(goal.name)) is None or math.isnan(value) else value
            for index, found in metrics.items()
        }
        kept = choose(values, goal, self._sweep.record.eta) if values else ()
        choice = Choice(
            tried=tuple(trial.index for trial in left),
            steps=tuple(rung[trial.index] for trial in left),
            values=tuple(values.get(trial.index) for trial in left),
            kept=kept,
        )
        self._dropped |= set(choice.tried) - set(kept)
        for trial in left:
            self._results[trial.index] = self._read(trial)
        self._record = replace(self._record, choices=(*self._record.choices, choice))
        self._save()
        self._listener.on_choice(choice)

    def _metrics_at(self, trial: SweepTrial, steps: int) -> dict[str, float]:
        """Return the newest value of each metric after so many steps.

        A set with a schedule of its own may have been evaluated before the others.
        """
        found: dict[str, float] = {}
        for step, values in History(self._run_dir(trial)).evaluations:
            if step <= steps:
                found |= values
        return found

    def _save(self) -> None:
        """Write sweep.json with what every run has come to so far."""
        trials = tuple(result.to_record() for result in self._results.values())
        self._record = replace(self._record, trials=trials)
        self._record.save(self._folder.path)
