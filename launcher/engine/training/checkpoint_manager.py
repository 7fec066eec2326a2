"""Decide when a run saves a checkpoint, and save it while training continues.

A save has three parts. First, all ranks copy their state to the host; a step waits for nothing
else. Then each rank writes its shard in a thread of its own, without communication. When an
exchange of flags shows that all ranks have written, rank 0 commits the checkpoint: it writes the
manifest and gives the folder its final name.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.engine.metrics.meter import RankFlags
from launcher.engine.ranks.current_device import make_current
from launcher.engine.saving.checkpoint_tensors import collect_file_sums, root_cause, write_shard
from launcher.engine.state.fragments import Fragment
from launcher.engine.state.training_state import Snapshot, changed_groups
from launcher.engine.training.callback_hooks import CallbackHooks
from launcher.engine.training.context import Listener, TrainContext
from launcher.errors import LauncherError, TrainingError
from launcher.runs.best import BestEvaluations, record_best, steps_to_keep
from launcher.runs.checkpoints import (
    begin_checkpoint,
    commit_checkpoint,
    list_checkpoints,
    prune_checkpoints,
)
from launcher.runs.manifest import FORMAT, Manifest
from launcher.runs.provenance import versions
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest


class _ShardWriter:
    """Writes this rank's shard of a checkpoint in a thread.

    Args:
        folder: The folder of the checkpoint.
        rank: The rank.
        state: The copies on the host, which are released when they have been written.
        device: The device of the rank.
    """

    def __init__(self, folder: Path, rank: int, state: Snapshot, device: torch.device) -> None:
        self.folder = folder
        self.started = time.perf_counter()
        self.error: str | None = None
        self.is_done = False
        self._rank, self._state, self._device = rank, state, device
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            make_current(self._device)  # torch synchronises with the current device of the thread
            write_shard(self.folder, self._rank, self._state.tensors)
        except BaseException as error:  # noqa: BLE001  # torch raises one; every rank reports it
            self.error = root_cause(error)
        self._state.tensors.clear()
        self._state.release()
        self.is_done = True


@dataclass(kw_only=True)
class SaveCosts:
    """What saving a checkpoint has cost this rank; the last one counts."""

    stall_seconds: float | None = None
    """Time that the training waited; None before the first checkpoint."""

    seconds: float | None = None
    """Time until the checkpoint was complete; None before the first complete one."""

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
    ) -> None:
        self._context, self._backend, self._run_dir = context, context.backend, run_dir
        self._stop, self._pause_after = stop, pause_after
        self._every_steps, self._every_seconds = parse_interval(context.recipe.checkpoint_every)
        self._groups, self._listener, self._data = groups, listener, data
        self._hooks = hooks
        self._writer: _ShardWriter | None = None
        self._manifest: Manifest | None = None
        self._last_save = time.perf_counter()
        self._state_was_checked = False
        self._saved_step = resumed_step
        self.best = best
        self._is_best = False
        self.costs = SaveCosts()

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written beside the training; equal on every rank."""
        return self._writer is not None

    def adopt(self, context: TrainContext) -> None:
        """Save the state of `context` from now on: the same training, with another plan."""
        self._context = context

    @property
    def has_ended(self) -> bool:
        """Whether the evaluations have not improved for so long that the run ends."""
        return self.best is not None and self.best.has_ended

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` steps; equal on every rank."""
        if step == self._pause_after:
            return True
        return self._every_steps is not None and step % self._every_steps == 0

    def flags(self) -> RankFlags:
        """Return the flags of this rank."""
        elapsed = time.perf_counter() - self._last_save
        is_due = self._every_seconds is not None and elapsed >= self._every_seconds
        return RankFlags(
            stop=float(self._stop.number is not None),
            save=float(is_due and self._writer is None),
            written=float(self._writer is not None and self._writer.is_done),
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
        if flags.stop or flags.save or self._is_best or self.is_due(step):
            self.save(step)
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
        backend, context = self._backend, self._context
        if refusal := self._find_unsavable_state():
            self._report_failure(step, refusal)
            return
        averages = () if context.averages is None else context.averages.tensors_to_save()
        state = backend.snapshot(context.model, context.optimizer, averages)
        self._manifest = self._make_manifest(step, state)
        self._saved_step = step
        folder: Path | None = None
        reason: str | None = None
        if backend.rank == 0:
            try:
                folder = begin_checkpoint(self._run_dir, step)
            except OSError as error:
                reason = root_cause(error)
        folder, reason = backend.broadcast((folder, reason))
        if folder is None:
            state.release()
            self._report_failure(step, f"{self._run_dir.checkpoints}: {reason}")
            return
        self.costs.num_bytes = sum(map(_num_bytes, state.tensors.values()))
        self._writer = _ShardWriter(folder, backend.rank, state, backend.device)
        self.costs.stall_seconds = time.perf_counter() - started
        self._listener.on_values(step, {"checkpoint_stall_seconds": self.costs.stall_seconds})

    def finish(self) -> None:
        """Wait for the pending save, if any, and commit it if it is complete (collective)."""
        writer, manifest, self._writer = self._writer, self._manifest, None
        if writer is None or manifest is None:
            return
        writer.wait()
        errors = self._backend.gather(writer.error)
        reason = next(
            (f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None),
            None,
        )
        self._last_save = time.perf_counter()
        if self._backend.rank == 0 and reason is None:
            try:
                commit_checkpoint(writer.folder, collect_file_sums(manifest, writer.folder))
                keep = self._context.recipe.keep_checkpoints
                others = steps_to_keep(self._run_dir, keep, self.best)
                prune_checkpoints(self._run_dir, keep, others)
            except (OSError, LauncherError, ValueError, KeyError) as error:
                reason = root_cause(error)
        if self._backend.rank == 0 and reason is not None:
            shutil.rmtree(writer.folder, ignore_errors=True)
        reason = self._backend.broadcast(reason)
        if reason is not None:
            self._report_failure(manifest.step, reason)
            return
        self.costs.seconds = time.perf_counter() - writer.started
        self._listener.on_values(manifest.step, {"checkpoint_seconds": self.costs.seconds})
        self._hooks.on_checkpoint(writer.folder.with_name(writer.folder.name.removeprefix(".")))

    def free_host_memory(self) -> None:
        """Free the memory of the copies, which has been kept for the next checkpoint.

        The memory that a pending save uses is freed when it has been written.
        """
        self._backend.host_memory.free()

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

    def _report_failure(self, step: int, reason: str) -> None:
        self._last_save = time.perf_counter()
        if self._backend.rank != 0:
            return
        checkpoints = list_checkpoints(self._run_dir)
        newest = f"is {checkpoints[0].name}" if checkpoints else "does not exist yet"
        self._listener.on_warning(
            f"the checkpoint after step {step:,} could not be saved ({reason}). "
            f"The run continues. Its newest complete checkpoint {newest}."
        )
        self._listener.on_values(step, {"checkpoint_failed": 1.0})


def _num_bytes(tensor: Tensor | Fragment) -> int:
    return tensor.nbytes if isinstance(tensor, Tensor) else tensor.values.nbytes


def parse_interval(every: int | str) -> tuple[int | None, float | None]:
    """Return (steps, seconds) between checkpoints, of which one is None."""
    if isinstance(every, int):
        return every, None
    return None, float(every.removesuffix("min")) * 60
