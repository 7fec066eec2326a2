"""What the user and the record of a run are told of its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.engine.backends.base import Backend
from launcher.engine.saving.shard_writer import WrittenShard
from launcher.engine.training.context import Listener
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.events import RUN_FOLDER, record_event
from launcher.runs.rundir import RunDir


class CheckpointReports:
    """Tells what became of checkpoints; rank 0 warns and writes the events.

    Args:
        backend: This rank among the others.
        run_dir: The run folder.
        listener: Receives warnings and timings.
    """

    def __init__(self, backend: Backend, run_dir: RunDir, listener: Listener) -> None:
        self._is_first, self._run_dir, self._listener = backend.rank == 0, run_dir, listener
        self._told_of_quick = False

    def threads(self, parts: Sequence[WrittenShard]) -> None:
        """Warn of ranks that write checkpoints without a process for it, once for each."""
        for rank, part in enumerate(parts):
            if part.note is not None and self._is_first:
                self._listener.on_warning(
                    f"rank {rank} wrote a checkpoint in a thread, because {part.note}. The "
                    "checkpoint is as good as any, but steps are slower while a thread writes."
                )

    def saved(
        self,
        step: int,
        parts: Sequence[WrittenShard],
        stall_seconds: float,
        seconds: float,
        *,
        place: str = RUN_FOLDER,
    ) -> None:
        """Record what a complete checkpoint has cost.

        Args:
            step: The step after which it was saved.
            parts: What became of the parts of all ranks.
            stall_seconds: Time that the training waited for the copies.
            seconds: Time from then on until it was complete.
            place: Where it is, as the event `saved` says it.
        """
        num_bytes = sum(part.num_bytes for part in parts)
        write_seconds = max(part.seconds for part in parts)
        values = {
            "checkpoint_seconds": seconds,
            "checkpoint_write_seconds": write_seconds,
            "checkpoint_bytes": float(num_bytes),
        }
        if place == RUN_FOLDER:
            self._listener.on_values(step, values)
        if self._is_first:
            record_event(
                self._run_dir,
                "saved",
                step=step,
                place=place,
                stall_seconds=stall_seconds,
                write_seconds=write_seconds,
                seconds=seconds,
                num_bytes=num_bytes,
            )

    def failed(self, step: int, reason: str) -> None:
        """Warn of a checkpoint that could not be saved."""
        if not self._is_first:
            return
        checkpoints = list_checkpoints(self._run_dir)
        newest = (
            f"Its newest complete checkpoint is {checkpoints[0].name}."
            if checkpoints
            else "It has no complete checkpoint yet."
        )
        self._listener.on_warning(
            f"the checkpoint after step {step:,} could not be saved ({reason}). "
            f"The run continues. {newest}"
        )
        self._listener.on_values(step, {"checkpoint_failed": 1.0})

    def quick_failed(self, step: int, reason: str) -> None:
        """Warn of the first quick checkpoint that could not be saved."""
        if self._is_first and not self._told_of_quick:
            self._listener.on_warning(
                f"the quick checkpoint after step {step:,} could not be saved ({reason}). The run "
                "continues, and tries again without telling of it. The checkpoints in the run "
                "folder are not affected."
            )
        self._told_of_quick = True
