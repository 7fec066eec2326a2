"""Decide when a run saves a checkpoint, and save it while training continues.

A save has three parts. First, all ranks copy their state to the host; a step waits for nothing
else. Then a process beside each rank writes its shard, without communication. When an exchange of
flags shows that all ranks have written, rank 0 commits the checkpoint: it writes the manifest and
gives the folder its final name.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.engine.metrics.meter import RankFlags
from launcher.engine.saving.checkpoint_tensors import collect_file_sums
from launcher.engine.saving.shard_writer import PendingShard, ShardWriter, WrittenShard
from launcher.engine.state.training_state import Snapshot, changed_groups
from launcher.engine.training.callback_hooks import CallbackHooks
from launcher.engine.training.checkpoint_reports import CheckpointReports
from launcher.engine.training.context import Listener, TrainContext
from launcher.engine.training.quick_saves import QuickSaves
from launcher.errors import LauncherError, TrainingError
from launcher.runs.best import BestEvaluations, record_best, steps_to_keep
from launcher.runs.checkpoints import (
    begin_checkpoint,
    commit_checkpoint,
    prune_checkpoints,
)
from launcher.runs.events import QUICK
from launcher.runs.manifest import FORMAT, Manifest
from launcher.runs.provenance import versions
from launcher.runs.rundir import RunDir
from launcher.runs.shard_files import error_text
from launcher.signals import StopRequest


@dataclass(kw_only=True)
class SaveCosts:
    """What saving a checkpoint has cost this rank; the last one counts."""

    stall_seconds: float | None = None
    """Time that the training waited; None before the first checkpoint."""

    seconds: float | None = None
    """Time from the end of the stall until the checkpoint was complete; None before the first
    complete one."""

    num_bytes: int = 0
    """Bytes that this rank wrote."""


class CheckpointManager:
    """A `StepController` that saves and prunes the checkpoints of a run, and stops it on request.

    A failed save, because of a full disk or a missing folder for example, is a warning: the run
    continues, and earlier checkpoints remain.

    Args:
        context: What is trained.
        stop: Records the signals that ask this rank to stop.
        run_dir: The run folder.
        groups: The optimizer's parameter groups as they were when the optimizer was built.
        listener: Receives timings, and a warning for each failed save.
        data: Fingerprint of the data; None if it is not known.
        hooks: The recipe's callbacks, which are told of checkpoints and whose state is saved.
        resumed_step: The step of the checkpoint from which the run was resumed; None if it was not.
        pause_after: Step after which the run stops with a checkpoint; None does not stop it.
        best: The best evaluations so far; None if none is kept.
        quick: The quick checkpoints; None if there are none.
    """

    def __init__(
        self,
        context: TrainContext,
        stop: StopRequest,
        run_dir: RunDir,
        *,
        groups: list[dict[str, Any]],
        listener: Listener,
        data: dict[str, Any] | None = None,
        hooks: CallbackHooks,
        resumed_step: int | None = None,
        pause_after: int | None = None,
        best: BestEvaluations | None = None,
        quick: QuickSaves | None = None,
    ) -> None:
        self._context, self._backend, self._run_dir = context, context.backend, run_dir
        self._stop, self._pause_after = stop, pause_after
        self._every_steps, self._every_seconds = parse_interval(context.recipe.checkpoint_every)
        self._groups, self._listener, self._data = groups, listener, data
        self._hooks = hooks
        self._reports = CheckpointReports(context.backend, run_dir, listener)
        self._writer = ShardWriter()
        self._pending: PendingShard | None = None
        self._quick, self._is_quick = quick, False
        """The quick checkpoints, and whether the pending one is quick."""

        self._manifest: Manifest | None = None
        self._last_save = time.perf_counter()
        self._state_was_checked = False
        self._saved_step = resumed_step
        self.best = best
        self._is_best = False
        self.costs = SaveCosts()
        self._quick_stall = 0.0

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written beside the training; equal on every rank."""
        return self._pending is not None

    def adopt(self, context: TrainContext) -> None:
        """Save the state of `context` from now on: the same training, with another plan."""
        self._context = context

    @property
    def has_ended(self) -> bool:
        """Whether the evaluations have not improved for so long that the run ends."""
        return self.best is not None and self.best.has_ended

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` steps; equal on every rank."""
        return self._is_due(step) or (self._quick is not None and self._quick.is_due(step))

    def _is_due(self, step: int) -> bool:
        """Return whether one in the run folder is due."""
        if step == self._pause_after:
            return True
        return self._every_steps is not None and step % self._every_steps == 0

    def flags(self) -> RankFlags:
        """Return the flags of this rank."""
        elapsed = time.perf_counter() - self._last_save
        is_due = self._every_seconds is not None and elapsed >= self._every_seconds
        return RankFlags(
            stop=float(self._stop.number is not None),
            save=float(is_due and (self._pending is None or self._is_quick)),
            written=float(self._pending is not None and self._pending.is_done),
        )

    def before_evaluation(self, step: int) -> None:
        """Save a first checkpoint if the run has none, because evaluations may fail (collective).

        A mistake in the code of an evaluation often shows in the first one, which may be the end of
        a long epoch. The call waits until the checkpoint is complete.

        Raises:
            TrainingError: There is state that a checkpoint cannot hold.
        """
        if self._saved_step == step:  # a resumed run evaluates before its first step
            return
        self._check_state()
        if self._saved_step is not None:
            return
        # An evaluation starts with it, so the resumed run evaluates the same model.
        self._context.batch_norms.average(self._backend)
        self.save(step)
        self.finish()

    def on_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Take an evaluation into account, which may be the best one.

        A checkpoint of this step that was saved before it is told.

        Raises:
            RecipeError: The evaluation does not give the metric of `keep_best`.
        """
        if self.best is None:
            return
        self._is_best = self.best.add(step, values) and self._saved_step != step
        if self._saved_step == step and self._backend.rank == 0:
            with contextlib.suppress(LauncherError):  # metrics.jsonl has the values as well
                record_best(self._run_dir, step, self.best)

    def on_step_end(self, step: int, flags: RankFlags) -> bool:
        """Save if a checkpoint is due, commit a written one, return whether to stop (collective).

        The run also stops once its evaluations have not improved for so long that it has ended.

        Raises:
            TrainingError: There is state that a checkpoint cannot hold.
        """
        self._check_state()
        if flags.written == self._backend.world_size:
            self.finish()
        if flags.stop or flags.save or self._is_best or self._is_due(step):
            self.save(step)
        elif self._quick is not None and (self._quick.is_due(step) or self._quick.is_late):
            self._save_quick(step, self._quick)
        self._is_best = False
        stops = flags.stop > 0 or step == self._pause_after
        if stops:
            self.finish()
        return stops or self.has_ended

    def save(self, step: int) -> None:
        """Start saving the state after `step` steps, unless that has been done (collective)."""
        if self._saved_step == step:
            return
        self.finish()
        started = time.perf_counter()
        backend = self._backend
        if refusal := self._find_unsavable_state():
            self._fail(step, refusal)
            return
        state = self._copy_state(step)
        self._saved_step, self._is_quick = step, False
        folder: Path | None = None
        reason: str | None = None
        if backend.rank == 0:
            try:
                folder = begin_checkpoint(self._run_dir, step)
            except OSError as error:
                reason = error_text(error)
        folder, reason = backend.broadcast((folder, reason))
        if folder is None:
            state.release()
            self._fail(step, f"{self._run_dir.checkpoints}: {reason}")
            return
        self._pending = self._writer.start(folder, backend.rank, state)
        self.costs.stall_seconds = time.perf_counter() - started
        self._listener.on_values(step, {"checkpoint_stall_seconds": self.costs.stall_seconds})

    def _save_quick(self, step: int, quick: QuickSaves) -> None:
        """Start saving a quick checkpoint, unless another one is being written (collective).

        The first checkpoint of a run is in the run folder: without one there, no run resumes.
        """
        if self._saved_step is None:
            self.save(step)
            return
        quick.is_late = self._pending is not None  # it is saved as soon as that one is complete
        if quick.is_late or step in (self._saved_step, self._context.plan.total_steps):
            return
        started = time.perf_counter()
        reason = self._find_unsavable_state() or quick.connect(self._writer)
        if reason is not None:
            self._reports.quick_failed(step, reason)
            return
        state = self._copy_state(step)
        self._is_quick = True
        target = quick.target(step)
        self._pending = self._writer.start(quick.part(step), self._backend.rank, state, target)
        self._quick_stall = time.perf_counter() - started

    def _fail(self, step: int, reason: str) -> None:
        """Warn that a checkpoint could not be saved; the next one is due an interval later."""
        self._last_save = time.perf_counter()
        self._reports.failed(step, reason)

    def _copy_state(self, step: int) -> Snapshot:
        """Copy this rank's state to the host, and keep the manifest of it (collective)."""
        context = self._context
        averages = () if context.averages is None else context.averages.tensors_to_save()
        state = self._backend.snapshot(context.model, context.optimizer, averages)
        self._manifest = self._make_manifest(step, state)
        return state

    def finish(self) -> None:
        """Wait for the pending save, if any, and commit it if it is complete (collective)."""
        pending, manifest, self._pending = self._pending, self._manifest, None
        if pending is None or manifest is None:
            return
        pending.wait()
        parts = self._backend.gather(pending.outcome)
        self._reports.threads(parts)
        reason = next(
            (f"rank {rank}: {part.error}" for rank, part in enumerate(parts) if part.error), None
        )
        if self._is_quick and self._quick is not None:
            self._finish_quick(self._quick, pending, manifest, parts, reason)
            return
        self._last_save = time.perf_counter()
        if self._backend.rank == 0 and reason is None:
            try:
                commit_checkpoint(pending.folder, collect_file_sums(manifest, pending.folder))
                keep = self._context.recipe.keep_checkpoints
                others = steps_to_keep(self._run_dir, keep, self.best)
                prune_checkpoints(self._run_dir, keep, others)
            except (OSError, LauncherError, ValueError, KeyError) as error:
                reason = error_text(error)
        if self._backend.rank == 0 and reason is not None:
            shutil.rmtree(pending.folder, ignore_errors=True)
        reason = self._backend.broadcast(reason)
        if reason is not None:
            self._fail(manifest.step, reason)
            return
        if self._quick is not None:
            self._quick.remove_before(manifest.step + 1)
        self.costs.seconds = time.perf_counter() - pending.started
        self.costs.num_bytes = pending.outcome.num_bytes
        stall = self.costs.stall_seconds or 0.0
        self._reports.saved(manifest.step, parts, stall, self.costs.seconds)
        self._hooks.on_checkpoint(pending.folder.with_name(pending.folder.name.removeprefix(".")))

    def _finish_quick(
        self,
        quick: QuickSaves,
        pending: PendingShard,
        manifest: Manifest,
        parts: Sequence[WrittenShard],
        reason: str | None,
    ) -> None:
        """Complete a quick checkpoint that every rank has written or could not (collective)."""
        started = time.perf_counter()
        reason = quick.commit(manifest, reason)
        if reason is not None:
            self._reports.quick_failed(manifest.step, reason)
            return
        ended = time.perf_counter()
        stall = self._quick_stall + ended - started  # every rank completes its part
        self._listener.on_values(manifest.step, {"checkpoint_stall_seconds": stall})
        self._reports.saved(manifest.step, parts, stall, ended - pending.started, place=QUICK)

    def free_host_memory(self) -> None:
        """Free the memory of the copies and end the process that writes; there are no more saves.

        A pending save stays incomplete.
        """
        self._writer.close()
        self._backend.host_memory.free()
        if self._quick is not None:
            self._quick.close()

    def _check_state(self) -> None:
        """Refuse, in the first call, state that a checkpoint cannot hold (collective).

        Raises:
            TrainingError: There is such state.
        """
        if self._state_was_checked:
            return
        self._state_was_checked = True
        self._hooks.state()
        if refusal := self._find_unsavable_state():
            raise TrainingError(refusal)

    def _find_unsavable_state(self) -> str | None:
        """Return why a checkpoint cannot hold the state of some rank, or None (collective)."""
        refusal = None
        try:
            self._backend.check_state(self._context.model, self._context.optimizer)
        except TrainingError as error:
            refusal = str(error)
        return next(filter(None, self._backend.gather(refusal)), None)

    def _make_manifest(self, step: int, state: Snapshot) -> Manifest:
        averages, watch = self._context.averages, self._context.data_watch
        scalers = [scaler.state() for scaler in self._backend.scalers]
        stream = None if watch is None else watch.state
        groups = changed_groups(self._context.optimizer, self._groups)
        return Manifest(
            format=FORMAT,
            step=step,
            samples=self._context.sampler.samples_before(step),
            world_size=self._backend.world_size,
            agreement=self._context.plan.agreement(),
            values={
                "optimizer": state.values,
                "groups": groups,
                "scaler": scalers[0] if scalers else None,
                "scalers": scalers[1:],
                "plateaus": [plateau.state() for plateau in self._context.plateaus],
                "extra": state.extra,
                "data": self._data,
                "stream": None if stream is None else stream.to_json(),
                "callbacks": self._hooks.state(),
                "averaging": None if averages is None else averages.state(),
                "best": None if self.best is None else self.best.state(),
            },
            versions=versions(),
        )


def parse_interval(every: int | str) -> tuple[int | None, float | None]:
    """Return (steps, seconds) between checkpoints, of which one is None."""
    if isinstance(every, int):
        return every, None
    return None, float(every.removesuffix("min")) * 60
