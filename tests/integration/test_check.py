"""`launcher check` finds what is wrong with a recipe; `launcher new` copies a recipe."""

from __future__ import annotations

import json

import pytest
from support import ROOT, Commands

RECIPE = """
import {imports}

from launcher import Data, Recipe, sgd


def odd() -> Recipe:
    return Recipe(
        name="odd", model=build_model, data=build_data, loss=loss, batch_size=4, lr=0.1,
        lr_batch_size=4, steps=3, optimizer=sgd(), train_samples=16, num_workers=2,
        metrics={"custom": lambda outputs, batch: {metric}},
    )


def build_model():
    from torch import nn

    {model}


def build_data():
    import os

    import torch
    from torch.utils.data import TensorDataset

    train = TensorDataset(torch.randn(16, 3), torch.randn(16))
    builder_pid = os.getpid()

    class ByProcess(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + (os.getpid() != builder_pid), y

    return Data(train={train}, evaluation=train)


def loss(outputs, batch):
    errors = (outputs.squeeze(1) - batch[1]).square()
    return {loss}
"""
CORRECT = {
    "imports": "json",
    "model": "return nn.Linear(3, 1)",
    "loss": "errors.sum(), len(errors)",
    "metric": "(outputs.sum(), len(outputs))",
    "train": "train",
}
UNUSED = """class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x):
            return self.used(x)

    return Net()"""


@pytest.mark.parametrize(
    ("changes", "level", "check", "fragment"),
    [
        ({}, "ok", "loss", "(sum, count)"),
        ({"imports": "torch"}, "warning", "import", "torch"),
        ({"loss": "errors.mean(), len(errors)"}, "failure", "loss", "mean"),
        ({"loss": "errors.sum(), 2 * len(errors)"}, "failure", "loss", "16 items in a batch of 8"),
        ({"model": UNUSED}, "warning", "model", "unused.weight, unused.bias"),
        (
            {"metric": "outputs.mean()"},
            "failure",
            "metrics",
            "tensor of shape ()",
        ),
        ({"metric": "batch[7]"}, "failure", "metrics", "IndexError"),
        ({"metric": "(outputs.sum(), 0)"}, "warning", "metrics", "custom counted 0 items"),
        (
            {"train": "ByProcess(*train.tensors)"},
            "failure",
            "data",
            "samples 0, 1, 2, 3 and 4 more",
        ),
        (
            {"loss": "errors.sum() / 0, len(errors)"},
            "failure",
            "outputs",
            "not finite",
        ),
        (
            {"model": "return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))"},
            "warning",
            "BatchNorm",
            "micro-batch of one rank",
        ),
    ],
)
def test_each_defect_is_found(
    run: Commands, changes: dict[str, str], level: str, check: str, fragment: str
) -> None:
    """Each defect gives a finding with a remedy, and a failure gives exit code 1."""
    text = RECIPE
    for name, value in (CORRECT | changes).items():
        text = text.replace(f"{{{name}}}", value)
    (run.folder / "odd.py").write_text(text)
    launcher = ("launcher",) if check != "import" else ("python", "-m", "launcher")  # from cold
    done = run(*launcher, "check", "odd.py", "--json")
    assert done.exit_code == (1 if level == "failure" else 0), done.stdout + done.stderr
    findings = json.loads(done.stdout)["findings"]
    (finding,) = (finding for finding in findings if finding["check"] == check)
    assert finding["level"] == level, findings
    assert fragment in finding["found"]
    assert bool(finding["remedy"]) == (level != "ok")


def test_a_data_set_of_launcher_that_loads_numpy_is_named(run: Commands) -> None:
    """Where a recipe's file imports a data set of launcher, the remedy for numpy names it."""
    text = RECIPE.replace("{imports}", "json").replace("import Data", "import Data, ParquetRows")
    for name, value in CORRECT.items():
        text = text.replace(f"{{{name}}}", value)
    (run.folder / "odd.py").write_text(text)
    done = run("python", "-m", "launcher", "check", "odd.py", "--json")  # from cold
    findings = json.loads(done.stdout)["findings"]
    (finding,) = (finding for finding in findings if finding["check"] == "import")
    assert "numpy" in finding["found"]
    assert "ParquetRows" in finding["remedy"]


def test_an_installed_recipe_passes(run: Commands) -> None:
    """The digits recipe has no failure; the findings show the lr that was set and the samples."""
    done = run("launcher", "check", "digits", "lr=0.2")
    assert done.exit_code == 0, done.stderr
    assert "lr 0.2" in done.stdout
    assert "1,437 training samples, 360 evaluation samples" in done.stdout
    assert done.stdout.endswith("6 ok, 0 warnings, 0 failures\n") or "1 warning" in done.stdout


def test_a_sharded_recipe_passes(run: Commands) -> None:
    """A recipe that needs several ranks is planned for them and inspected in one process."""
    done = run("launcher", "check", "gpt:gpt_fsdp", f"data={ROOT}/recipes")
    assert done.exit_code == 0, done.stderr
    assert "0 failures" in done.stdout


def test_a_single_sample_passes(run: Commands) -> None:
    """A recipe with one training sample is checked like any other."""
    text = RECIPE.replace(
        "torch.randn(16, 3), torch.randn(16)", "torch.randn(1, 3), torch.randn(1)"
    )
    for name, value in CORRECT.items():
        text = text.replace(f"{{{name}}}", value)
    assert "randn(1, 3)" in text
    (run.folder / "odd.py").write_text(text)
    done = run("launcher", "check", "odd.py", "--json")
    assert done.exit_code == 0, done.stdout + done.stderr


def test_an_exception_is_shown_once(run: Commands) -> None:
    """An exception in the recipe is printed once, with its traceback."""
    text = RECIPE
    for name, value in (CORRECT | {"model": "raise OSError('no such thing')"}).items():
        text = text.replace(f"{{{name}}}", value)
    (run.folder / "odd.py").write_text(text)
    done = run("launcher", "check", "odd.py")
    assert done.exit_code == 1
    assert done.stderr.count("OSError: no such thing") == 1


def test_the_template_trains(run: Commands) -> None:
    """`launcher new` writes a recipe that passes `check` and trains under its name."""
    done = run("launcher", "new", "work/mine")
    assert done.exit_code == 0, done.stderr
    assert "`launcher run work/mine.py`" in done.stdout
    checked = run("launcher", "check", "work/mine.py")
    assert checked.exit_code == 0, checked.stdout + checked.stderr
    options = ("-n", "1", "epochs=4", "hidden=32", "--out", "out")
    trained = run("launcher", "run", "work/mine.py", *options)
    assert trained.exit_code == 0, trained.stderr
    result = json.loads((run.folder / "out/result.json").read_text())
    assert result["evaluation"]["accuracy"] > 0.7
    assert run("ruff", "check", "--select", "E9,F,D1", "work/mine.py").exit_code == 0


@pytest.mark.parametrize("source", ["digits", "gpt:gpt_fsdp"])
def test_a_copy_can_be_planned(run: Commands, source: str) -> None:
    """`launcher new --from` copies a recipe's file, whose functions keep their names."""
    done = run("launcher", "new", "work/mine", "--from", source)
    assert done.exit_code == 0, done.stderr
    stem, _, function = source.partition(":")
    assert (run.folder / "work/mine.py").read_text() == (ROOT / f"recipes/{stem}.py").read_text()
    recipe = f"work/mine.py:{function or stem}"
    assert f"`launcher run {recipe}`" in done.stdout
    planned = run("launcher", "plan", recipe, "-n", "2")
    assert planned.exit_code == 0, planned.stderr


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("my-recipe", "my-recipe"),
        ("class", "class"),
        ("existing", "existing.py"),
        ("existing.py/mine", "existing.py/mine.py"),
    ],
)
def test_an_unusable_name_is_refused(run: Commands, name: str, fragment: str) -> None:
    """The error names what was asked, and an existing file keeps its content."""
    (run.folder / "existing.py").write_text("kept")
    done = run("launcher", "new", name)
    assert done.exit_code == 2
    assert fragment in done.stderr
    assert "Traceback" not in done.stderr
    assert (run.folder / "existing.py").read_text() == "kept"


SAMPLES = {
    "missing": "torch.tensor([float('nan'), 1.0, 2.0])",
    "arrays": "torch.ones(3).numpy()",
    "objects": "Pair(torch.ones(3), object())",
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_samples_of_any_type_compare_equal(run: Commands, kind: str) -> None:
    """Samples with NaN, arrays or custom objects count as unchanged when they are read again."""
    text = RECIPE.replace("return Data(train={train}, evaluation=train)", "return samples()")
    for name, value in CORRECT.items():
        text = text.replace(f"{{{name}}}", value)
    text = text.replace("errors = (outputs.squeeze(1) - batch[1])", "errors = outputs.squeeze(1)")
    text = text.replace("data=build_data,", "data=build_data, forward=forward,")
    text += f"""

from dataclasses import dataclass


@dataclass
class Pair:
    x: object
    y: object


def samples():
    import torch

    def collate(samples):
        return samples[0], samples

    return Data(train=[{SAMPLES[kind]} for _ in range(16)], collate=collate)


def forward(model, batch):
    import torch

    return model(torch.ones(len(batch[1]), 3))
"""
    text = text.replace("len(errors)", "len(batch[1])")
    (run.folder / "odd.py").write_text(text)
    done = run("launcher", "check", "odd.py")
    assert done.exit_code == 0, done.stdout + done.stderr
