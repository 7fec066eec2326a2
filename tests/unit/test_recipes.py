"""Recipes of the package: each learns from its data, and refuses missing or damaged data."""

from __future__ import annotations

import fnmatch
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT

from launcher import RecipeError, packaged_file
from launcher.recipe.parameters import parameters_of
from launcher.recipe.resolve import list_recipes, resolve
from launcher.recipes.curriculum import Blocks
from launcher.recipes.fashion_mnist import read_idx
from launcher.recipes.gpt import cut, pack, pad
from launcher.recipes.pretrain_lm import TENSOR_PARALLEL, build_data, llama_8b, write_tokens
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


def test_llama_8b_equals_the_paper() -> None:
    """The largest model has the 8.03 billion weights of Llama 3 8B, and every layer has a place.

    It is built without values, as a plan with tensor_parallel needs it.
    """
    with torch.device("meta"):
        model = llama_8b().model()
    weights = dict(model.named_parameters())
    assert sum(weight.numel() for weight in weights.values()) == 8_030_261_248
    assert weights["model.layers.31.mlp.down_proj.weight"].shape == (4096, 14336)
    assert weights["lm_head.weight"].shape == (128256, 4096)
    modules = [name for name, module in model.named_modules() if not any(module.children())]
    for name in modules:
        styles = [
            style for pattern, style in TENSOR_PARALLEL.items() if fnmatch.fnmatch(name, pattern)
        ]
        assert len(styles) == (0 if "norm" in name else 1), name


def test_files_of_tokens_are_read_in_blocks(tmp_path: Path) -> None:
    """Blocks of files are in a row, targets are the next tokens, and the end is held out."""
    first, second = list(range(100, 152)), list(range(200, 225))
    assert write_tokens([first, second[:5]], tmp_path / "a.bin", vocabulary=300, end=1) == 59
    write_tokens([second], tmp_path / "b.bin", vocabulary=300)
    assert (tmp_path / "a.bin").stat().st_size == 118
    data = build_data(tmp_path, None, 8, 300)
    samples = [*data.train, *data.evaluation]
    assert (len(data.train), len(data.evaluation)) == (9, 1)
    assert samples[0][0].tolist() == list(range(100, 108))
    assert samples[0][1].tolist() == list(range(101, 109))
    assert samples[7][0].tolist() == list(range(200, 208))
    assert samples[9][1].tolist() == list(range(217, 225))
    (tmp_path / "b.bin").rename(tmp_path / "val.bin")
    data = build_data(tmp_path, None, 8, 300)
    assert (len(data.train), len(data.evaluation)) == (7, 3)
    assert write_tokens([[70_000]], tmp_path / "large.bin", vocabulary=1 << 17) == 1
    assert (tmp_path / "large.bin").stat().st_size == 4


@pytest.mark.parametrize(
    ("content", "vocabulary", "message"),
    [
        (None, 256, "no such file"),
        (b"", 256, "empty"),
        (bytes(1001), 256, "1,001 bytes"),
        (bytes(16), 256, "too few tokens"),
        (np.arange(100, dtype="<u4").tobytes(), 256, "token_type=uint32"),
        (np.arange(100, dtype="<u2").tobytes(), 1 << 17, "token_type=uint16"),
        (np.arange(300, 400, dtype="<u2").tobytes(), 256, "308"),
    ],
    ids=["missing", "empty", "odd", "short", "uint32", "uint16", "vocabulary"],
)
def test_a_file_without_such_tokens_is_refused(
    tmp_path: Path, content: bytes | None, vocabulary: int, message: str
) -> None:
    """A file that is missing, empty, too short, or of other tokens is refused by its path."""
    path = tmp_path / "tokens.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        build_data(path, None, 8, vocabulary)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_tokens_outside_the_vocabulary_are_not_written(tmp_path: Path) -> None:
    """A document with a token that the vocabulary lacks is refused, and leaves no file."""
    with pytest.raises(RecipeError, match="255"):
        write_tokens([[1, 2], [256]], tmp_path / "tokens.bin", vocabulary=256)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("content", "message"), [(None, "lines="), (b"\xff\n", "UTF-8")])
def test_lines_that_cannot_be_read_are_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    """A missing file of lines, and one that is not in UTF-8, are refused by their path."""
    path = tmp_path / "lines.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        list(Blocks(path))
    assert str(path) in str(caught.value)
