"""The tensors of a checkpoint, written and read by torch.distributed.checkpoint.

They are written as safetensors, with their place in the whole, so that any number of ranks can
read what it needs, and reading runs no code of the file's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from itertools import chain
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

from launcher.engine.backends.base import Backend
from launcher.engine.state.compiled import plain_name
from launcher.errors import CheckpointError
from launcher.runs.checkpoints import Checkpoint, damage_error
from launcher.runs.manifest import FileSum, Manifest, sum_file
from launcher.runs.rundir import write_json

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
    """The state in a checkpoint: a `launcher.engine.state.training_state.Source`."""

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        self.name = str(checkpoint.path)
        self.world_size = manifest.world_size
        self.values = manifest.values
        self.steps = manifest.step
        self.lists_state = manifest.format > 1 or manifest.agreement.get("strategy") != "fsdp"
        self._reader = _Reader(str(checkpoint.path))
        self._tensors: Mapping[str, Any] = self._reader.read_metadata().state_dict_metadata
        self._stored = {plain_name(name): name for name in self._tensors}

    def names(self) -> Iterable[str]:
        return self._stored.keys()

    def size(self, name: str) -> torch.Size | None:
        found = self._tensors.get(self._stored.get(name, name))
        return None if found is None else found.size

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self._tensors[self._stored[name]].properties.dtype
        return dtype

    def read(self, targets: dict[str, Tensor]) -> None:
        _accept_no_dist()
        stored = {self._stored[name]: tensor for name, tensor in targets.items()}
        load(stored, storage_reader=self._reader, no_dist=True)


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
            wrong = chain(checkpoint.unlisted(manifest), checkpoint.damages(files, manifest))
            damage = next(wrong, "")
        except CheckpointError as error:
            damage = str(error)
        found = next(filter(None, backend.gather(damage)), None)
        if found is None and manifest is not None:
            return checkpoint, manifest
        following = candidates[number + 1 :]
        if not (following and fall_back):
            raise damage_error(checkpoint, found or "", following)
        tell(
            f"launcher: {checkpoint.path} is damaged: {found}; {following[0].name} is taken "
            "instead."
        )
    raise CheckpointError("There is no checkpoint to resume from.")


def with_files(manifest: Manifest, folder: Path) -> Manifest:
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


def reason_of(error: BaseException) -> str:
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
