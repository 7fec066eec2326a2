"""Parts of tensors that ZeRO keeps on a rank, in the files of a checkpoint."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from launcher.engine.saving import checkpoint_tensors
from launcher.engine.saving.checkpoint_tensors import StoredState, write_shard
from launcher.engine.state.fragments import Fragment, boxes
from launcher.runs.checkpoints import Checkpoint
from launcher.runs.manifest import FORMAT, Manifest

SHAPES = [(), (7,), (5, 4), (1, 9), (9, 1), (3, 4, 5), (2, 3, 2, 3), (4, 1, 1, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_cover_each_element_once(shape: tuple[int, ...]) -> None:
    """Every run of elements is covered by few boxes, of which each has consecutive elements."""
    full = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations(range(full.numel() + 1), 2):
        found = list(boxes(full.shape, start, stop))
        assert len(found) <= max(2 * len(shape) - 1, 1)
        elements = []
        for box in found:
            place = tuple(
                slice(offset, offset + length)
                for offset, length in zip(box.offsets, box.sizes, strict=True)
            )
            content = full[place].flatten().tolist()
            assert content == list(range(box.start, box.start + box.sizes.numel()))
            elements += content
        assert elements == list(range(start, stop))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2)])
def test_an_empty_tensor_has_no_boxes(shape: tuple[int, ...]) -> None:
    """Nothing is stored of a tensor without elements."""
    assert list(boxes(torch.Size(shape), 0, 0)) == []


def read(folder: Path, world_size: int) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint in full."""
    manifest = Manifest(
        format=FORMAT,
        step=1,
        samples=1,
        world_size=world_size,
        agreement={},
        values={"optimizer": {}, "groups": [], "scaler": None},
        versions={},
    )
    stored = StoredState(Checkpoint(step=1, path=folder), manifest)
    tensors = {
        name: torch.empty(stored.size(name) or (), dtype=stored.dtype(name))
        for name in stored.names()
    }
    stored.read(tensors)
    return tensors


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("bytes_per_file", [1 << 30, 40])
def test_fragments_are_read_as_full_tensors(
    tmp_path: Path, world_size: int, bytes_per_file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that ranks write in parts are read in full, whatever the size of the files."""
    monkeypatch.setattr(checkpoint_tensors, "_BYTES_PER_FILE", bytes_per_file)
    tensors = {f"model/{shape}": torch.randn(shape) for shape in SHAPES}
    step = torch.tensor(5.0)
    for rank in range(world_size):
        own: dict[str, Tensor | Fragment] = {"optimizer/step": step} if rank == 0 else {}
        for name, tensor in tensors.items():
            length = -(-tensor.numel() // world_size)
            start = min(rank * length, tensor.numel())
            values = tensor.flatten()[start : start + length].clone()
            own[name] = Fragment(values=values, start=start, size=tensor.shape)
        write_shard(tmp_path, rank, own)
    expected = tensors | {"optimizer/step": step}
    found = read(tmp_path, world_size)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
