"""Final weights: written one tensor at a time, and copied into folders that transformers reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from launcher.engine.backends.base import WeightKind
from launcher.engine.saving.final_weights import save_weights
from launcher.engine.saving.hugging_face import export_weights
from launcher.errors import RecipeError, RunDirError, TrainingError
from launcher.runs.rundir import RunDir
from launcher.tensor_file import read_tensor_file

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "wide": torch.randn(3, 5, dtype=torch.float64),
    "half": torch.randn(7).to(torch.bfloat16),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "turned": torch.randn(4, 6).t(),
    "double": torch.randn(2, 2, dtype=torch.float64),
}
KINDS = {name: WeightKind(tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()}


def test_tensors_of_any_type_are_written_as_they_come(tmp_path: Path) -> None:
    """Tensors of several types, in an order that the file does not have, are read back equal."""
    save_weights(iter(TENSORS.items()), KINDS, RunDir(tmp_path))
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_all_weights_are_gathered_even_if_none_can_be_written(tmp_path: Path) -> None:
    """A file that cannot be written is an error after the last tensor, as other ranks need it."""
    taken = []

    def gather() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in TENSORS.items():
            taken.append(name)
            yield name, tensor

    with pytest.raises(TrainingError, match="No such file or directory"):
        save_weights(gather(), KINDS, RunDir(tmp_path / "missing"))
    assert taken == list(TENSORS)


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "empty"])
def test_a_damaged_file_of_weights_is_refused(tmp_path: Path, damage: str) -> None:
    """A file of weights that is cut off, too long, or has no header is refused by its path."""
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.ones(2)}, path)
    assert {name: t.shape for name, t in read_tensor_file(path).tensors.items()} == {
        "a": (3,),
        "b": (2,),
    }
    content = path.read_bytes()
    path.write_bytes(
        {"cut": content[:-1], "longer": content + b"0", "header": b"12345678{}", "empty": b""}[
            damage
        ]
    )
    with pytest.raises(RunDirError, match=r"some\.safetensors"):
        read_tensor_file(path)


class Described(nn.Module):
    """A model with a description, and a head that is its embedding."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.config: Any = {"model_type": "some", "torch_dtype": "bfloat16"}
        self.embedding = nn.Embedding(6, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, 6, bias=False)
        self.head.weight = self.embedding.weight


def test_shared_weights_are_exported_once_and_in_files_of_a_size(tmp_path: Path) -> None:
    """Files are as large as allowed, an index lists them, and shared weights are in one of them."""
    model, run_dir = Described(), RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    save_file({n: t.detach() for n, t in model.named_parameters()}, run_dir.model)
    with torch.device("meta"):
        described = Described()
    folder = tmp_path / "exported"
    export = export_weights(run_dir, described, folder, max_shard_bytes=100)
    assert (export.num_weights, export.num_bytes, export.num_files) == (44, 176, 2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "embedding.weight": "model-00001-of-00002.safetensors",
        "body.weight": "model-00002-of-00002.safetensors",
        "body.bias": "model-00002-of-00002.safetensors",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config == {"model_type": "some", "dtype": "float32"}
    loaded = load_file(folder / "model-00002-of-00002.safetensors")
    assert torch.equal(loaded["body.weight"], model.body.weight)
    export_weights(run_dir, described, folder, max_shard_bytes=1000)
    names = {"config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == names
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(RunDirError, match=r"tokenizer\.json"):
        export_weights(run_dir, described, folder, max_shard_bytes=1000)
    with pytest.raises(RecipeError, match=r"embedding\.weight of shape \(6, 4\)"):
        export_weights(run_dir, Described(5), tmp_path / "other", max_shard_bytes=1000)
    described.config = {"model_type": "some", "of": {1, 2}}
    with pytest.raises(RecipeError, match="JSON"):
        export_weights(run_dir, described, tmp_path / "other", max_shard_bytes=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "run"]


def test_a_config_keeps_numbers_that_json_lacks(tmp_path: Path) -> None:
    """NaN and infinities of a configuration are the same when transformers reads the folder."""
    LlamaConfig = pytest.importorskip("transformers", minversion="5.0").LlamaConfig  # noqa: N806
    model, run_dir = Described(), RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    save_file({n: t.detach() for n, t in model.named_parameters()}, run_dir.model)
    given = {"limit": math.inf, "limits": [-math.inf, 1.5], "scale": math.nan}
    model.config = LlamaConfig(**given)
    export_weights(run_dir, model, tmp_path / "exported", max_shard_bytes=1000)
    read = LlamaConfig.from_pretrained(tmp_path / "exported")
    assert (read.limit, read.limits) == (math.inf, [-math.inf, 1.5])
    assert math.isnan(read.scale)
    model.config = {"model_type": "some", "limit": math.inf}
    export_weights(run_dir, model, tmp_path / "plain", max_shard_bytes=1000)
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert config["limit"] == {"__float__": "Infinity"}
