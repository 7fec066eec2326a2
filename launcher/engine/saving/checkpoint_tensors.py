"""The tensors of a checkpoint, written and read by torch.distributed.checkpoint.

The files are safetensors that record the place of each shard in the full tensor, so any number of
ranks can read the parts that it needs. Each shard is a box. ZeRO's partitions, which may begin and
end within a row, are stored as several boxes in different files. Reading a file executes no code
from it.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from launcher.engine.backends.base import Backend
from launcher.engine.state.compiled import plain_name
from launcher.engine.state.fragments import Box, Fragment, boxes
from launcher.errors import CheckpointError
from launcher.json_file import MAX_BYTES, decode_json
from launcher.regular_file import read_regular
from launcher.runs.checkpoints import Checkpoint, damage_error
from launcher.runs.files import write_json
from launcher.runs.manifest import FileDigest, Manifest, sum_file

_BYTES_PER_FILE = 1 << 30
"""Size at which a rank starts a new file, because each file is assembled in memory."""


class _ShardWriter(HuggingFaceStorageWriter):
    """Writes the tensors of one rank to files with the rank's number, without communication."""

    def __init__(self, folder: Path, rank: int, files: dict[str, int]) -> None:
        super().__init__(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        self._rank = rank
        # The tensors are on the host. Otherwise torch would use a stream of the first GPU that it
        # finds, and initialise CUDA also where a run trains on the CPU.
        self.per_thread_copy_ahead = 0

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            dataclasses.replace(
                plan, storage_data={**plan.storage_data, "shard_index": self._rank + 1}
            )
            for plan in super().prepare_global_plan(plans)
        ]


class _Reader(HuggingFaceStorageReader):
    """Reads the headers of all files once."""

    @functools.cached_property
    def _metadata(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata


class StoredState:
    """The state in a checkpoint: a `launcher.engine.state.training_state.StateSource`.

    Args:
        checkpoint: The checkpoint.
        manifest: The verified manifest of the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        self.name = str(checkpoint.path)
        self.world_size = manifest.world_size
        self.values = manifest.values
        self.steps = manifest.step
        self.has_complete_state = (
            manifest.format > 1 or manifest.agreement.get("strategy") != "fsdp"
        )
        self._reader = _Reader(str(checkpoint.path))
        self._tensors: Mapping[str, Any] = self._reader.read_metadata().state_dict_metadata
        self._stored = {plain_name(name): name for name in self._tensors}

    def names(self) -> Iterable[str]:
        return self._stored.keys()

    def size(self, name: str) -> torch.Size | None:
        metadata = self._tensors.get(self._stored.get(name, name))
        return None if metadata is None else metadata.size

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self._tensors[self._stored[name]].properties.dtype
        return dtype

    def read(self, targets: dict[str, Tensor]) -> None:
        _ignore_no_dist_warning()
        stored = {self._stored[name]: tensor for name, tensor in targets.items()}
        load(stored, storage_reader=self._reader, no_dist=True)


class _StoredBox:
    """A box of a tensor, as torch.distributed.checkpoint asks for what it writes."""

    def __init__(self, values: Tensor, box: Box, size: torch.Size) -> None:
        self.values, self._box, self._size = values, box, size

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        offsets, sizes, _start = self._box
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties.create_from_tensor(self.values),
            size=self._size,
        )
        index = MetadataIndex(name, offsets)
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]


class _Planner(DefaultSavePlanner):
    """Finds the values of boxes as well as those of tensors."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict[index.fqn]
        return value.values if isinstance(value, _StoredBox) else super().lookup_object(index)


def write_shard(folder: Path, rank: int, tensors: Mapping[str, Tensor | Fragment]) -> None:
    """Write the tensors of one rank, and the digests of its files, to `folder`."""
    parts = _assign_files(tensors)
    num_files = max((index for _, files in parts for index in files.values()), default=1)
    _ignore_no_dist_warning()
    for stored, files in parts:
        files[""] = num_files  # the number in the names of all files
        writer = _ShardWriter(folder, rank, files)
        save(stored, storage_writer=writer, planner=_Planner(), no_dist=True)
    paths = sorted(folder.glob(f"shard-{rank + 1:05}-*"))
    write_json(folder / f"rank{rank}.json", {path.name: asdict(sum_file(path)) for path in paths})


def _assign_files(
    tensors: Mapping[str, Tensor | Fragment],
) -> list[tuple[dict[str, Any], dict[str, int]]]:
    """Divide tensors into sets in which each name occurs once, and each set into files.

    A file holds one box of a tensor at most, because boxes of a tensor have the same name.

    Returns:
        For each set, its content by name and the number of the file of each name.
    """
    sets: list[dict[str, Any]] = [{}]
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            sets[0][name] = tensor
            continue
        stop = tensor.start + tensor.values.numel()
        for index, box in enumerate(boxes(tensor.size, tensor.start, stop)):
            first = box.start - tensor.start
            values = tensor.values[first : first + box.sizes.numel()].view(box.sizes)
            if index == len(sets):
                sets.append({})
            sets[index][name] = _StoredBox(values, box, tensor.size)
    parts, first_file = [], 1
    for stored in sets:
        files, num_bytes = {}, 0
        for name, value in stored.items():
            num_bytes += (value.values if isinstance(value, _StoredBox) else value).nbytes
            files[name] = first_file + num_bytes // _BYTES_PER_FILE
        first_file = max(files.values(), default=first_file - 1) + 1
        parts.append((stored, files))
    return parts


def load_newest(
    candidates: list[Checkpoint], backend: Backend, *, fall_back: bool, tell: Callable[[str], None]
) -> tuple[Checkpoint, Manifest]:
    """Return the first undamaged candidate, after verifying all its bytes (collective).

    Args:
        candidates: Checkpoints in order of preference.
        backend: The ranks, each of which verifies a share of the files.
        fall_back: Whether to report a damaged checkpoint and try the next one.
        tell: A function that shows a line to the user.

    Raises:
        CheckpointError: A checkpoint is damaged, and `fall_back` is false or none is left to try.
    """
    for index, checkpoint in enumerate(candidates):
        manifest, damage = None, ""
        try:
            manifest = checkpoint.read_manifest()
            files = sorted(manifest.files)[backend.rank :: backend.world_size]
            damages = chain(
                checkpoint.find_unlisted(manifest), checkpoint.find_damage(files, manifest)
            )
            damage = next(damages, "")
        except CheckpointError as error:
            damage = str(error)
        first_damage = next(filter(None, backend.gather(damage)), None)
        if first_damage is None and manifest is not None:
            return checkpoint, manifest
        remaining = candidates[index + 1 :]
        if not (remaining and fall_back):
            raise damage_error(checkpoint, first_damage or "", remaining)
        tell(
            f"launcher: {checkpoint.path} is damaged: {first_damage}; using {remaining[0].name} "
            "instead."
        )
    raise CheckpointError("There is no checkpoint to resume from.")


def collect_file_sums(manifest: Manifest, folder: Path) -> Manifest:
    """Return the manifest with the file digests of all ranks, and delete the ranks' digest files.

    Raises:
        OSError: The files of a rank are missing, because not all nodes share the folder.
    """
    files: dict[str, FileDigest] = {}
    for rank in range(manifest.world_size):
        path = folder / f"rank{rank}.json"
        files |= decode_json(read_regular(path, MAX_BYTES), dict[str, FileDigest])
        path.unlink()
    for name in files:
        (folder / name).stat()
    return dataclasses.replace(manifest, files=files)


def _ignore_no_dist_warning() -> None:
    """Suppress the warning that torch.distributed.checkpoint works in a single process."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def root_cause(error: BaseException) -> str:
    """Return the message of the error at the root of an exception from torch's checkpoint code."""
    root = error
    while root.__cause__ is not None or isinstance(root, CheckpointException):
        failures = getattr(root, "failures", None)
        cause = next(iter(failures.values()))[0] if failures else root.__cause__
        if cause is None:
            break
        root = cause
    text = root.strerror if isinstance(root, OSError) else None
    return (text or str(root)).rstrip(".")
