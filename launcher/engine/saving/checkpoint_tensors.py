"""The tensors of a checkpoint: how files hold them, and how they are read.

The files are safetensors that record the place of each shard in the full tensor, as those of
torch.distributed.checkpoint do, which reads them. Any number of ranks can therefore read the parts
that it needs. Each shard is a box. ZeRO's partitions, which may begin and end within a row, are
stored as several boxes in different files. Reading a file executes no code from it.

torch's own writer plans every checkpoint anew, in a tenth of a millisecond for each tensor, and
assembles each file in memory. Here the files are described as pieces of the memory in which the
copies lie, and another process writes them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from launcher.engine.backends.base import Backend
from launcher.engine.state.compiled import plain_name
from launcher.engine.state.fragments import Fragment, boxes
from launcher.engine.state.shared_memory import SharedMemory
from launcher.errors import CheckpointError
from launcher.json_file import MAX_BYTES, decode_json, encode_json
from launcher.regular_file import read_regular
from launcher.runs.checkpoints import Checkpoint, damage_error
from launcher.runs.manifest import FileDigest, Manifest
from launcher.runs.shard_files import Piece, encode_request, write_files
from launcher.tensor_file import encode_header

_BYTES_PER_FILE = 1 << 30
"""Size at which a rank starts a new file."""

_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The words of the format for dtypes, in the order in which their tensors follow in a file, so that
each tensor is aligned to the size of its elements (safetensors 0.8)."""

_ORDER = {dtype: number for number, dtype in enumerate(_DTYPES)}


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


class _Stored(NamedTuple):
    """A box of a tensor, as it is stored."""

    values: Tensor
    """Its elements on the host."""

    offsets: tuple[int, ...]
    """The index of its first element in the full tensor."""


def write_shard(folder: Path, rank: int, tensors: Mapping[str, Tensor | Fragment]) -> None:
    """Write the tensors of one rank, and the digests of its files, to `folder`."""
    memory = SharedMemory()
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        write_files(memory.descriptor, descriptor, describe_shard(rank, tensors, memory))
    finally:
        os.close(descriptor)
        memory.close()


def describe_shard(
    rank: int,
    tensors: Mapping[str, Tensor | Fragment],
    memory: SharedMemory,
    to: Mapping[str, Any] | None = None,
) -> Piece:
    """Write the request for a rank's files behind the tensors in `memory`, and return its place.

    Behind them are also the headers of the files, and copies of tensors that lie elsewhere.

    Args:
        rank: The rank.
        tensors: Its tensors.
        memory: The memory in which most of them lie.
        to: Where the files are also sent; None sends them nowhere.

    Raises:
        OSError: There is not enough memory.
        TypeError: The format has no word for the dtype of a tensor.
    """
    sets = _assign_files(tensors)
    num_files = max((max(files) for files in sets if files), default=1)
    end = memory.end
    requests: dict[str, list[Piece]] = {}
    for number, stored in chain.from_iterable(files.items() for files in sets):
        name = f"shard-{rank + 1:05}-model-{number:05}-of-{num_files:05}.safetensors"
        requests[name] = pieces = []
        for content in _contents(stored):
            start = memory.place(content) if isinstance(content, Tensor) else None
            num_bytes = content.nbytes if isinstance(content, Tensor) else len(content)
            if start is None:
                start = end
                end += _append(memory, end, content)
            pieces.append((start, num_bytes))
    request = encode_request(requests, f"rank{rank}.json", to)
    return end, _append(memory, end, request)


def _append(memory: SharedMemory, place: int, content: Tensor | bytes) -> int:
    """Write bytes to shared memory and return their number."""
    view = memoryview(_bytes_of(content) if isinstance(content, Tensor) else content)
    written = 0
    while written < len(view):
        written += os.pwrite(memory.descriptor, view[written:], place + written)
    return written


def _bytes_of(tensor: Tensor) -> Any:
    """Return the bytes of a tensor on the host as an array."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _contents(stored: Mapping[str, _Stored]) -> Iterable[Tensor | bytes]:
    """Yield the header of a file and then its tensors."""
    ordered = sorted(stored.items(), key=lambda item: (_order(*item), item[0]))
    offsets = {name: {"saved_offsets": each.offsets} for name, each in stored.items()}
    yield encode_header(
        [
            (name, _DTYPES[values.dtype], values.shape, values.nbytes)
            for name, (values, _) in ordered
        ],
        {"DCP_SHARDING_INFO": encode_json(offsets), "DCP_VERSION": "1.0", "format": "pt"},
    )
    for _, (values, _) in ordered:
        if values.nbytes:
            yield values


def _order(name: str, stored: _Stored) -> int:
    """Return the place of a dtype among the tensors of a file.

    Raises:
        TypeError: The format has no word for it.
    """
    order = _ORDER.get(stored.values.dtype)
    if order is None:
        raise TypeError(f"{name} has dtype {stored.values.dtype}, which safetensors files lack")
    return order


def _assign_files(
    tensors: Mapping[str, Tensor | Fragment],
) -> list[dict[int, dict[str, _Stored]]]:
    """Divide tensors into sets in which each name occurs once, and each set into files.

    A file holds one box of a tensor at most, because boxes of a tensor have the same name.

    Returns:
        For each set, the content of its files by their numbers, from 1 on.
    """
    sets: list[dict[str, _Stored]] = [{}]
    place_of = functools.cache(_local_offsets)
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            local = tensor._local_tensor  # noqa: SLF001  # to_local takes ten times as long
            sets[0][name] = _Stored(
                local, place_of(tensor.shape, tensor.device_mesh, tensor.placements)
            )
        elif isinstance(tensor, Tensor):
            sets[0][name] = _Stored(tensor, (0,) * tensor.dim())
        else:
            for index, stored in enumerate(_boxes_of(tensor)):
                if index == len(sets):
                    sets.append({})
                sets[index][name] = stored
    parts, first_file = [], 1
    for stored_set in sets:
        files: dict[int, dict[str, _Stored]] = {}
        num_bytes = 0
        for name, stored in stored_set.items():
            num_bytes += stored.values.nbytes
            files.setdefault(first_file + num_bytes // _BYTES_PER_FILE, {})[name] = stored
        first_file = max(files, default=first_file - 1) + 1
        parts.append(files)
    return parts


def _boxes_of(fragment: Fragment) -> Iterable[_Stored]:
    stop = fragment.start + fragment.values.numel()
    for box in boxes(fragment.size, fragment.start, stop):
        first = box.start - fragment.start
        values = fragment.values[first : first + box.sizes.numel()].view(box.sizes)
        yield _Stored(values, box.offsets)


def _local_offsets(shape: torch.Size, mesh: Any, placements: Any) -> tuple[int, ...]:
    """Return where the shard of this rank begins in the full tensor."""
    return tuple(compute_local_shape_and_global_offset(shape, mesh, placements)[1])


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
