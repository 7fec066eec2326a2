"""Initial weights in safetensors files: which are refused, and which are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from launcher import RecipeError
from launcher.engine.saving.stored_weights import StoredWeights
from launcher.engine.state.initial_values import fragment, parts_of
from launcher.planning.weight_headers import read_weight_headers


class Model(nn.Module):
    """A model with a shared weight, a saved buffer and one that is not saved."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(5, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.body[0].weight  # type: ignore[assignment]
        self.register_buffer("places", torch.arange(3), persistent=False)


def tensors() -> dict[str, Tensor]:
    """Return all tensors that the files of the model hold; the shared weight has one name."""
    saved = Model().state_dict()
    del saved["head.weight"]
    return {
        name: torch.arange(float(value.numel())).view(value.shape) for name, value in saved.items()
    }


def write(folder: Path, stored: dict[str, Tensor]) -> str:
    """Write a file, and return the setting that names it."""
    save_file(stored, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("prefix", ["body.", ""])
def test_all_values_are_read(tmp_path: Path, prefix: str) -> None:
    """Names may lack the prefix of the base model, and shared weights all names but one."""
    model, stored = Model(), tensors()
    named = {name.replace("body.", prefix): value for name, value in stored.items()}
    weights = StoredWeights(write(tmp_path, named), model, strict=True)
    left = weights.read(parts_of(model))
    assert set(left) == {"places"}
    for name, value in stored.items():
        assert torch.equal(model.state_dict()[name].double(), value.double()), name
    assert torch.equal(model.head.weight, stored["body.0.weight"])
    assert weights.checksums.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize(("start", "length"), [(0, 4), (4, 6), (10, 8), (15, 4)])
def test_a_rank_reads_its_own_elements(tmp_path: Path, start: int, length: int) -> None:
    """A fragment that begins and ends within a row is filled, and what lies beyond is not."""
    weights = StoredWeights(write(tmp_path, tensors()), Model(), strict=True)
    memory = torch.full((length,), -1.0)
    weights.read({"body.0.weight": fragment(torch.Size((5, 3)), memory, start)})
    assert memory.tolist() == [i if i < 15 else -1.0 for i in range(start, start + length)]


def test_missing_and_extra_names_are_listed(tmp_path: Path) -> None:
    """Strict reading names what is missing and what is left over; otherwise both are accepted."""
    stored = tensors()
    stored |= {f"extra.{number}": torch.zeros(1) for number in range(9)}
    del stored["body.1.weight"]
    text, model = write(tmp_path, stored), Model()
    with pytest.raises(RecipeError) as refused:
        StoredWeights(text, model, strict=True)
    for found in ("body.1.weight", "extra.0", "extra.4", "4 more", "strict_weights=false"):
        assert found in str(refused.value)
    assert "extra.5" not in str(refused.value)
    left = StoredWeights(text, model, strict=False).read(parts_of(model))
    assert set(left) == {"body.1.weight", "places"}


@pytest.mark.parametrize("strict", [True, False])
def test_other_shapes_are_refused(tmp_path: Path, strict: bool) -> None:
    """A tensor of another shape is never accepted."""
    stored = tensors() | {"body.0.weight": torch.zeros(6, 3)}
    with pytest.raises(RecipeError, match=r"body\.0\.weight \(6, 3\) instead of \(5, 3\)"):
        StoredWeights(write(tmp_path, stored), Model(), strict=strict)


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    """Write an index of a folder."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_names_the_files(tmp_path: Path) -> None:
    """Tensors of several files are found by the index."""
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(())}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    stored = read_weight_headers(str(tmp_path))
    assert {name: weight.shape for name, weight in stored.items()} == {"a": (2, 3), "b": ()}
    assert stored["b"].file == tmp_path / "two.safetensors"


def _nothing(_: Path) -> None:
    """Write no file."""


def _text(folder: Path) -> None:
    (folder / "model.safetensors").write_text("no safetensors file")


def _cut_off(folder: Path) -> None:
    write(folder, {"a": torch.zeros(100)})
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _absent_file(folder: Path) -> None:
    write_index(folder, {"a": "absent.safetensors"})


def _absent_tensor(folder: Path) -> None:
    save_file({"b": torch.zeros(1)}, folder / "one.safetensors")
    write_index(folder, {"a": "one.safetensors"})


def _other_folder(folder: Path) -> None:
    write_index(folder, {"a": "../model.safetensors"})


def _not_an_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[1, 2")


DAMAGES = [_nothing, _text, _cut_off, _absent_file, _absent_tensor, _other_folder, _not_an_index]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_read_is_refused(tmp_path: Path, damage: object) -> None:
    """A folder without readable weights is refused before any process starts."""
    assert callable(damage)
    damage(tmp_path)
    with pytest.raises(RecipeError, match=r"weights=.*safetensors"):
        read_weight_headers(str(tmp_path))
