"""Saving while the steps go on, and reading what was saved: torch.distributed.checkpoint.

A save has three parts. All ranks copy what they keep to the host, which is all that a step waits
for. Each writes its copies beside the others in a thread of its own, without a word to them. When
the next numbers of the loop show that all are done, rank 0 gives the folder its name.

Tensors are written as safetensors, with their place in the whole, so that any number of ranks can
read what it needs, and reading runs no code of the file's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from launcher.checkpoints import (
    FORMAT,
    Checkpoint,
    FileSum,
    Manifest,
    begin,
    commit,
    list_checkpoints,
    prune,
    sum_file,
)
from launcher.engine.backends.base import Backend
from launcher.engine.loop import Listener, Trainee
from launcher.engine.metrics import Votes
from launcher.engine.state import changed_groups
from launcher.errors import CheckpointError, LauncherError
from launcher.provenance import versions
from launcher.rundir import RunDir, write_json
from launcher.signals import StopRequest

_BYTES_PER_FILE = 1 << 30
"""A file is put together in memory before it is written."""


class _ShardWriter(HuggingFaceStorageWriter):
    """Writes what one rank keeps, under a name of that rank's, without asking the others."""

    def __init__(self, folder: Path, rank: int, files: dict[str, int]) -> None:
        super().__init__(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        self._rank = rank

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            dataclasses.replace(
                plan, storage_data={**plan.storage_data, "shard_index": self._rank + 1}
            )
            for plan in super().prepare_global_plan(plans)
        ]


class _Reader(HuggingFaceStorageReader):
    """Reads the heads of all files once."""

    @functools.cached_property
    def _metadata(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata


class StoredState:
    """The state in a checkpoint: a `launcher.engine.state.Source`."""

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        self.name = str(checkpoint.path)
        self.world_size = manifest.world_size
        self.values = manifest.values
        self._reader = _Reader(str(checkpoint.path))
        self._tensors: Mapping[str, Any] = self._reader.read_metadata().state_dict_metadata

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def size(self, name: str) -> torch.Size | None:
        found = self._tensors.get(name)
        return None if found is None else found.size

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self._tensors[name].properties.dtype
        return dtype

    def read(self, targets: dict[str, Tensor]) -> None:
        _accept_no_dist()
        load(targets, storage_reader=self._reader, no_dist=True)


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
            self.error = _reason(error)
        del self._arguments  # the copies
        self.done = True


def write_shard(folder: Path, rank: int, tensors: dict[str, Tensor]) -> None:
    """Write one rank's tensors, and the sums of its files, to the disk."""
    files, size = {}, 0
    for name, tensor in tensors.items():
        size += tensor.numel() * tensor.element_size()
        files[name] = size // _BYTES_PER_FILE + 1
    _accept_no_dist()
    save(tensors, storage_writer=_ShardWriter(folder, rank, files), no_dist=True)
    own = sorted(folder.glob(f"shard-{rank + 1:05}-*"))
    write_json(folder / f"rank{rank}.json", {path.name: asdict(sum_file(path)) for path in own})


class Keeper:
    """Keeps the checkpoints of a run, on every rank alike: an attendant of the loop.

    A save that fails, on a full disk or in a folder that has gone, is told and does not end the
    run; what was saved before stays.

    Args:
        trainee: What is trained.
        stop: Notes what asks this rank to stop.
        run_dir: Where checkpoints go.
        groups: What the optimizer's groups held when they were new.
        listener: Hears of what was saved and what could not be.
    """

    def __init__(
        self,
        trainee: Trainee,
        stop: StopRequest,
        run_dir: RunDir,
        *,
        groups: list[dict[str, Any]],
        listener: Listener,
    ) -> None:
        self._trainee, self._backend, self._run_dir = trainee, trainee.backend, run_dir
        self._stop = stop
        self._every_steps, self._every_seconds = _interval(trainee.recipe.checkpoint_every)
        self._groups, self._listener = groups, listener
        self._writing: _Writing | None = None
        self._manifest: Manifest | None = None
        self._since = time.perf_counter()
        self.newest: int | None = None
        """The step of the newest whole checkpoint of this process."""

    def is_due(self, step: int) -> bool:
        """Return whether one is due after `step` steps; the same on every rank."""
        return self._every_steps is not None and step % self._every_steps == 0

    def votes(self) -> Votes:
        """Return what this rank has to tell the others."""
        passed = time.perf_counter() - self._since
        due = self._every_seconds is not None and passed >= self._every_seconds
        return Votes(
            stop=float(self._stop.number is not None),
            save=float(due and self._writing is None),
            written=float(self._writing is not None and self._writing.done),
        )

    def attend(self, step: int, votes: Votes) -> bool:
        """Save where it is time to, name what is whole, return whether to stop (collective)."""
        if votes.written == self._backend.world_size:
            self.finish()
        if votes.stop or votes.save or self.is_due(step):
            self.save(step)
        if votes.stop:
            self.finish()
        return votes.stop > 0

    def save(self, step: int) -> None:
        """Begin to save what there is after `step` steps, unless that is done (collective)."""
        if self._manifest is not None and self._manifest.step == step:
            return
        self.finish()
        started = time.perf_counter()
        backend, trainee = self._backend, self._trainee
        state = backend.snapshot(trainee.model, trainee.optimizer)
        self._manifest = self._describe(step, state.values)
        folder: Path | None = None
        error: str | None = None
        if backend.rank == 0:
            try:
                folder = begin(self._run_dir, step)
            except OSError as failed:
                error = _reason(failed)
        folder, error = backend.broadcast((folder, error))
        if folder is None:
            self._failed(step, f"{self._run_dir.checkpoints}: {error}")
            return
        self._writing = _Writing(folder, backend.rank, state.tensors)
        self._listener.noted(step, {"checkpoint_stall_seconds": time.perf_counter() - started})

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
                commit(writing.folder, _with_files(manifest, writing.folder))
                prune(self._run_dir, self._trainee.recipe.keep_checkpoints)
            except (OSError, LauncherError, ValueError, KeyError) as failed:
                error = _reason(failed)
        if self._backend.rank == 0 and error is not None:
            shutil.rmtree(writing.folder, ignore_errors=True)
        error = self._backend.broadcast(error)
        if error is not None:
            self._failed(manifest.step, error)
            return
        self.newest = manifest.step
        self._listener.noted(
            manifest.step, {"checkpoint_seconds": time.perf_counter() - writing.started}
        )

    def _describe(self, step: int, values: dict[str, Any]) -> Manifest:
        scaler = self._backend.scaler
        groups = changed_groups(self._trainee.optimizer, self._groups)
        return Manifest(
            format=FORMAT,
            step=step,
            samples=self._trainee.sampler.samples_before(step),
            world_size=self._backend.world_size,
            agreement=self._trainee.plan.agreement(),
            values={
                "optimizer": values,
                "groups": groups,
                "scaler": None if scaler is None else scaler.state(),
            },
            versions=versions(),
        )

    def _failed(self, step: int, error: str) -> None:
        self._since = time.perf_counter()
        if self._backend.rank != 0:
            return
        left = list_checkpoints(self._run_dir)
        newest = f"{left[0].name} is the newest" if left else "there is none"
        self._listener.warned(
            f"the checkpoint after step {step:,} could not be saved ({error}). "
            f"The run goes on; of those that are whole {newest}."
        )
        self._listener.noted(step, {"checkpoint_failed": 1.0})


def _interval(every: int | str) -> tuple[int | None, float | None]:
    """Return the steps between checkpoints, or the seconds."""
    if isinstance(every, int):
        return every, None
    return None, float(every.removesuffix("min")) * 60


def load_newest(
    candidates: list[Checkpoint], backend: Backend, *, fall_back: bool, tell: Callable[[str], None]
) -> tuple[Checkpoint, Manifest]:
    """Return the first of the candidates that is undamaged, having read all its bytes (collective).

    Args:
        candidates: Checkpoints, the preferred first.
        backend: The ranks, which share the reading.
        fall_back: Whether to take the next where one is damaged, and say so.
        tell: Shows a line to the user.

    Raises:
        CheckpointError: The first is damaged, or all are.
    """
    for number, checkpoint in enumerate(candidates):
        manifest, damage = None, ""
        try:
            manifest = checkpoint.read_manifest()
            files = sorted(manifest.files)[backend.rank :: backend.world_size]
            damage = next(checkpoint.damages(files, manifest), "")
        except CheckpointError as error:
            damage = str(error)
        found = next(filter(None, backend.gather(damage)), None)
        if found is None and manifest is not None:
            return checkpoint, manifest
        following = candidates[number + 1 :]
        said = f"{checkpoint.path} is damaged: {found}"
        if following and fall_back:
            tell(f"launcher: {said}; {following[0].name} is taken instead.")
            continue
        other = "There is no earlier one."
        if following:
            other = (
                f"The one before it is {following[0].name}: add `--from {following[0].name}`, or "
                "--auto to take the newest that is not damaged."
            )
        raise CheckpointError(f"{said}. {other}")
    raise CheckpointError("There is no checkpoint to resume from.")


def _with_files(manifest: Manifest, folder: Path) -> Manifest:
    """Return the manifest with the sums that the ranks left in the folder, which are removed.

    Raises:
        OSError: A rank's are not there: the folder is not shared by all nodes.
    """
    files: dict[str, FileSum] = {}
    for rank in range(manifest.world_size):
        path = folder / f"rank{rank}.json"
        sums = json.loads(path.read_text(encoding="utf-8"))
        files |= {name: FileSum(**each) for name, each in sums.items()}
        path.unlink()
    for name in files:
        (folder / name).stat()
    return dataclasses.replace(manifest, files=files)


def _accept_no_dist() -> None:
    """Have torch.distributed.checkpoint work in this process alone without a remark."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _reason(error: BaseException) -> str:
    """Return what went wrong in a few words, from inside what torch wraps around it."""
    found = error
    while found.__cause__ is not None or isinstance(found, CheckpointException):
        inner = getattr(found, "failures", None)
        following = next(iter(inner.values()))[0] if inner else found.__cause__
        if following is None:
            break
        found = following
    text = found.strerror if isinstance(found, OSError) else None
    return (text or str(found)).rstrip(".")
