"""Recipes of the package: each learns from its data, and refuses missing or damaged data."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from support import ROOT

from launcher import RecipeError, packaged_file
from launcher.recipe.parameters import parameters_of
from launcher.recipe.resolve import list_recipes, resolve
from launcher.recipes.fashion_mnist import read_idx
from launcher.recipes.gpt import cut, pack, pad
from launcher.recipes.resnet import build_resnet
from launcher.recipes.rough_intervals import build_model as build_rough
from launcher.recipes.rough_intervals import coverage

IDX = bytes((0, 0, 8, 2)) + (2).to_bytes(4, "big") + (3).to_bytes(4, "big")


def test_an_idx_file_is_read(tmp_path: Path) -> None:
    """An IDX file is read in the shape that its header gives."""
    path = tmp_path / "some.gz"
    path.write_bytes(gzip.compress(IDX + bytes(range(6))))
    assert read_idx(path, dimensions=2).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "dataset-fashion-mnist"),
        (b"<html>not found</html>", "Not a gzipped file"),
        (gzip.compress(IDX + bytes(6))[:-9], "some.gz"),
        (gzip.compress(IDX + bytes(5)), "2 dimensions"),
        (gzip.compress(b"something else"), "2 dimensions"),
    ],
    ids=["missing", "other", "cut", "short", "text"],
)
def test_a_damaged_idx_file_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    """A missing or damaged IDX file is refused by its path."""
    path = tmp_path / "some.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_idx(path, dimensions=2)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_every_recipe_is_described() -> None:
    """Every recipe and parameter has a sentence, and recipes/README.md lists the functions."""
    page = (ROOT / "recipes/README.md").read_text()
    for recipe in list_recipes(ROOT / "recipes"):
        assert f"`{recipe.function}`" in page
        assert recipe.sentence
        function = resolve(f"{recipe.path}:{recipe.function}").function
        for parameter in parameters_of(function):
            assert parameter.sentence.endswith("."), (recipe.function, parameter.name)


def test_bounds_stay_in_order() -> None:
    """The lower bound of a rough neuron is at most its upper, and coverage is a fraction."""
    forecast = build_rough(4)(torch.randn(50, 7, 2))
    assert (forecast[:, 0] <= forecast[:, 1]).all()
    truth = torch.tensor([[0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    forecasts = torch.tensor([[1.0, 5.0], [-1.0, 3.0], [3.0, 4.0]])
    total, days = coverage(forecasts, (truth, truth))
    assert (float(total), days) == (1.5, 3)


def test_a_package_that_is_missing_is_named() -> None:
    """A missing package is named with its pip command, and a missing file with its name."""
    with pytest.raises(RecipeError, match="pip install not_installed_anywhere"):
        packaged_file("not_installed_anywhere", "x.csv")
    with pytest.raises(RecipeError, match=r"has no file x\.csv"):
        packaged_file("sklearn", "x.csv")


def test_documents_are_cut_and_packed() -> None:
    """Packed documents keep every byte, and padding is ignored by the loss."""
    texts = [bytes(range(1, 101)), bytes(range(200)), b"ab"]
    tokens, targets = pack(texts).tensors
    joined = b"\0".join([*texts, b""])
    assert bytes(tokens.flatten().tolist()) == joined[: tokens.numel()]
    assert bytes(targets.flatten().tolist()) == joined[1 : tokens.numel() + 1]
    pieces = cut(texts)
    assert [len(piece) for piece in pieces] == [100, 129, 72, 2]
    inputs, targets = pad([pieces[0], pieces[3]])
    assert inputs.shape == targets.shape == (2, 99)
    assert (targets[1] != -100).sum() == 1


def test_resnet_56_equals_the_paper() -> None:
    """ResNet-56 has 853,018 weights and 55 convolutions, as in He et al. (2016)."""
    net = build_resnet([9] * 3, [16, 32, 64], num_classes=10, stem="small")
    assert sum(parameter.numel() for parameter in net.parameters()) == 853_018
    assert sum(isinstance(module, torch.nn.Conv2d) for module in net.modules()) == 55
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
