"""When a run saves, and that it goes on meanwhile.

A save has three parts. All ranks copy what they keep to the host, which is all that a step waits
for. Each writes its copies beside the others in a thread of its own, without a word to them. When
the next numbers of the loop show that all are done, rank 0 gives the folder its name.
"""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from launcher.engine.metrics.meter import RankFlags
from launcher.engine.saving.checkpoint_tensors import reason_of, with_files, write_shard
from launcher.engine.state.training_state import Snapshot, changed_groups
from launcher.engine.training.loop import Callback, TrainContext
from launcher.errors import LauncherError, TrainingError
from launcher.runs.checkpoints import begin, commit, list_checkpoints, prune
from launcher.runs.manifest import FORMAT, Manifest
from launcher.runs.provenance import versions
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest


class _Writing:
    """One rank's part of a checkpoint on its way to the disk."""

    def __init__(self, folder: Path, rank: int, tensors: dict[str, Tensor]) -> None:
        self.folder = folder
        self.started = time.perf_counter()
        self.error: str | None = None
        self.done = False
        self._arguments = folder, rank, tensors
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            write_shard(*self._arguments)
        except BaseException as error:  # noqa: BLE001  # torch wraps in one; told to all ranks
            self.error = reason_of(error)
        del self._arguments  # the copies
        self.done = True


class CheckpointManager:
    """Keeps the checkpoints of a run, on every rank alike: an attendant of the loop.

    A save that fails, on a full disk or in a folder that has gone, is told and does not end the
    run; what was saved before stays.

    Args:
        trainee: What is trained.
        stop: Notes what asks this rank to stop.
        run_dir: Where checkpoints go.
        groups: What the optimizer's groups held when they were new.
        listener: Hears of what was saved and what could not be.
        data: The fingerprint of the data; None where it is not known.
    """

    def __init__(
        self,
        context: TrainContext,
        stop: StopRequest,
        run_dir: RunDir,
        *,
        groups: list[dict[str, Any]],
        callback: Callback,
        data: dict[str, Any] | None = None,
    ) -> None:
        self._context, self._backend, self._run_dir = context, context.backend, run_dir
        self._stop = stop
        self._every_steps, self._every_seconds = _interval(context.recipe.checkpoint_every)
        self._groups, self._callback, self._data = groups, callback, data
        self._writing: _Writing | None = None
        self._manifest: Manifest | None = None
        self._since = time.perf_counter()
        self._checked = False

    def is_due(self, step: int) -> bool:
        """Return whether one is due after `step` steps; the same on every rank."""
        return self._every_steps is not None and step % self._every_steps == 0

    def flags(self) -> RankFlags:
        """Return what this rank has to tell the others."""
        passed = time.perf_counter() - self._since
        due = self._every_seconds is not None and passed >= self._every_seconds
        return RankFlags(
            stop=float(self._stop.number is not None),
            save=float(due and self._writing is None),
            written=float(self._writing is not None and self._writing.done),
        )

    def on_step_end(self, step: int, flags: RankFlags) -> bool:
        """Save where it is time to, name what is whole, return whether to stop (collective).

        Raises:
            TrainingError: The first time, there is state that a checkpoint could not hold.
        """
        if not self._checked:
            self._checked = True
            if refusal := self._refusal():
                raise TrainingError(refusal)
        if flags.written == self._backend.world_size:
            self.finish()
        if flags.stop or flags.save or self.is_due(step):
            self.save(step)
        if flags.stop:
            self.finish()
        return flags.stop > 0

    def save(self, step: int) -> None:
        """Begin to save what there is after `step` steps, unless that is done (collective)."""
        if self._manifest is not None and self._manifest.step == step:
            return
        self.finish()
        started = time.perf_counter()
        backend, context = self._backend, self._context
        if refusal := self._refusal():
            self._failed(step, refusal)
            return
        state = backend.snapshot(context.model, context.optimizer)
        self._manifest = self._describe(step, state)
        folder: Path | None = None
        error: str | None = None
        if backend.rank == 0:
            try:
                folder = begin(self._run_dir, step)
            except OSError as failed:
                error = reason_of(failed)
        folder, error = backend.broadcast((folder, error))
        if folder is None:
            self._failed(step, f"{self._run_dir.checkpoints}: {error}")
            return
        self._writing = _Writing(folder, backend.rank, state.tensors)
        self._callback.on_note(step, {"checkpoint_stall_seconds": time.perf_counter() - started})

    def _refusal(self) -> str | None:
        """Return what of the state on any rank a checkpoint could not hold (collective)."""
        own = None
        try:
            self._backend.check_state(self._context.model, self._context.optimizer)
        except TrainingError as error:
            own = str(error)
        return next(filter(None, self._backend.gather(own)), None)

    def finish(self) -> None:
        """Wait for the one under way, if any, and name it if it is whole (collective)."""
        writing, manifest, self._writing = self._writing, self._manifest, None
        if writing is None or manifest is None:
            return
        writing.wait()
        errors = self._backend.gather(writing.error)
        error = next(
            (f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None), None
        )
        self._since = time.perf_counter()
        if self._backend.rank == 0 and error is None:
            try:
                commit(writing.folder, with_files(manifest, writing.folder))
                prune(self._run_dir, self._context.recipe.keep_checkpoints)
            except (OSError, LauncherError, ValueError, KeyError) as failed:
                error = reason_of(failed)
        if self._backend.rank == 0 and error is not None:
            shutil.rmtree(writing.folder, ignore_errors=True)
        error = self._backend.broadcast(error)
        if error is not None:
            self._failed(manifest.step, error)
            return
        self._callback.on_note(
            manifest.step, {"checkpoint_seconds": time.perf_counter() - writing.started}
        )

    def _describe(self, step: int, state: Snapshot) -> Manifest:
        scaler = self._backend.scaler
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
                "scaler": None if scaler is None else scaler.state(),
                "extra": state.extra,
                "data": self._data,
            },
            versions=versions(),
        )

    def _failed(self, step: int, error: str) -> None:
        self._since = time.perf_counter()
        if self._backend.rank != 0:
            return
        left = list_checkpoints(self._run_dir)
        newest = f"{left[0].name} is the newest" if left else "there is none"
        self._callback.on_warning(
            f"the checkpoint after step {step:,} could not be saved ({error}). "
            f"The run goes on; of those that are whole {newest}."
        )
        self._callback.on_note(step, {"checkpoint_failed": 1.0})


def _interval(every: int | str) -> tuple[int | None, float | None]:
    """Return the steps between checkpoints, or the seconds."""
    if isinstance(every, int):
        return every, None
    return None, float(every.removesuffix("min")) * 60
