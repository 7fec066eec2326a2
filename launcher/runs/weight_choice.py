"""Which weights of a run a command takes: its final weights, or those of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.errors import RunDirError
from launcher.paths import is_file
from launcher.runs.best import find_best_checkpoint
from launcher.runs.checkpoints import Checkpoint, find_checkpoint, list_checkpoints
from launcher.runs.final_result import find_result
from launcher.runs.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class WeightChoice:
    """The weights of a run that are evaluated, and with which predictions are made."""

    run_dir: RunDir
    """The run, which is only read."""

    step: int
    """The number of steps after which the weights were saved."""

    is_final: bool
    """Whether they are in model.safetensors; otherwise in the checkpoint of this step."""

    @property
    def name(self) -> str:
        """Return what holds the weights, such as `model.safetensors` or `step-00000120`."""
        return self.run_dir.model.name if self.is_final else self.checkpoint.name

    @property
    def checkpoint(self) -> Checkpoint:
        """Return the checkpoint that holds the weights.

        Raises:
            CheckpointError: It has been removed since it was chosen.
        """
        return find_checkpoint(self.run_dir, str(self.step))


def choose_weights(run_dir: RunDir, name: str | None) -> WeightChoice:
    """Return the weights of a run that `name` stands for.

    Args:
        run_dir: The run.
        name: `last` for the newest checkpoint, `best` for the best one, or a checkpoint's step or
            name; None for the final weights or, while the run has none, the newest checkpoint.

    Raises:
        RunDirError: The run has no weights.
        CheckpointError: The run has no such checkpoint; the message lists those it has.
    """
    result = find_result(run_dir)
    if name is None and result is not None and is_file(run_dir.model):
        step = result.steps if result.weights_step is None else result.weights_step
        return WeightChoice(run_dir=run_dir, step=step, is_final=True)
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints and not (name is not None and is_file(run_dir.model)):
        raise RunDirError(
            f"{run_dir.shown} has no weights: neither {run_dir.model.name}, which a run writes "
            "after its last step, nor a checkpoint. Wait until the run has saved one, or start it "
            "again."
        )
    if name == "best":
        return _of(run_dir, find_best_checkpoint(run_dir))
    if name in (None, "last") and checkpoints:
        return _of(run_dir, checkpoints[0])
    return _of(run_dir, find_checkpoint(run_dir, name or "last"))


def _of(run_dir: RunDir, checkpoint: Checkpoint) -> WeightChoice:
    return WeightChoice(run_dir=run_dir, step=checkpoint.step, is_final=False)
