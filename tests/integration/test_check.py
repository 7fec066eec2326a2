"""A recipe of one's own: copied from another, and tried out before it is trained."""

from __future__ import annotations

import json

import pytest
from support import ROOT, Commands

from launcher.recipe.scaffold import renamed

HEAD = """
import {imports}

from launcher import Data, Recipe, sgd


def odd() -> Recipe:
    return Recipe(
        name="odd", model=build_model, data=build_data, loss=loss, batch_size=4, lr=0.1,
        lr_batch_size=4, steps=3, optimizer=sgd(), train_samples=16, num_workers=2,
        metrics={"own": lambda outputs, batch: {metric}},
    )


def build_model():
    from torch import nn

    {model}


def build_data():
    import os

    import torch
    from torch.utils.data import TensorDataset

    train = TensorDataset(torch.randn(16, 3), torch.randn(16))
    built = os.getpid()

    class ByProcess(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + (os.getpid() != built), y

    return Data(train={train}, evaluation=train)


def loss(outputs, batch):
    errors = (outputs.squeeze(1) - batch[1]).square()
    return {loss}
"""
RIGHT = {
    "imports": "json",
    "model": "return nn.Linear(3, 1)",
    "loss": "errors.sum(), len(errors)",
    "metric": "(outputs.sum(), len(outputs))",
    "train": "train",
}
UNUSED = """class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x):
            return self.one(x)

    return Net()"""


@pytest.mark.parametrize(
    ("changes", "level", "check", "words"),
    [
        ({}, "ok", "loss", "(sum, count)"),
        ({"imports": "torch"}, "warning", "import", "loads torch"),
        ({"loss": "errors.mean(), len(errors)"}, "failure", "loss", "it returned a mean"),
        ({"loss": "errors.sum(), 2 * len(errors)"}, "failure", "loss", "counted 16 items"),
        ({"model": UNUSED}, "warning", "model", "other.weight, other.bias get no gradient"),
        ({"metric": "outputs.mean()"}, "failure", "metrics", "own returned a tensor of shape ()"),
        ({"metric": "batch[7]"}, "failure", "metrics", "IndexError"),
        ({"metric": "(outputs.sum(), 0)"}, "warning", "metrics", "counted nothing"),
        (
            {"train": "ByProcess(*train.tensors)"},
            "failure",
            "data",
            "others when two DataLoader workers read at once",
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
            "statistics over the micro-batch",
        ),
    ],
)
def test_what_is_wrong_is_said(
    run: Commands, changes: dict[str, str], level: str, check: str, words: str
) -> None:
    """In words, with what to do; the exit code is 1 where a run would fail or be wrong."""
    text = HEAD
    for name, value in (RIGHT | changes).items():
        text = text.replace(f"{{{name}}}", value)
    (run.folder / "odd.py").write_text(text)
    launcher = ("launcher",) if check != "import" else ("python", "-m", "launcher")  # from cold
    done = run(*launcher, "check", "odd.py", "--json")
    assert done.exit_code == (1 if level == "failure" else 0), done.stdout + done.stderr
    findings = json.loads(done.stdout)["findings"]
    (found,) = (each for each in findings if each["check"] == check)
    assert found["level"] == level, findings
    assert words in found["found"]
    assert bool(found["remedy"]) == (level != "ok")


def test_our_recipe_is_right(run: Commands) -> None:
    """Nothing to warn of, and what was found is a line each."""
    done = run("launcher", "check", "digits", "lr=0.2")
    assert done.exit_code == 0, done.stderr
    assert "lr 0.2" in done.stdout
    assert "1,437 training samples, 360 held out" in done.stdout
    assert done.stdout.endswith("6 ok, 0 warnings, 0 failures\n") or "1 warning" in done.stdout


def test_a_recipe_for_several_ranks_is_tried_out(run: Commands) -> None:
    """What shards over ranks is planned for them, and looked at in one process."""
    done = run("launcher", "check", "gpt:gpt_fsdp", f"data={ROOT}/recipes")
    assert done.exit_code == 0, done.stderr
    assert "0 failures" in done.stdout


def test_a_recipe_that_raises_is_shown(run: Commands) -> None:
    """With its traceback, once."""
    text = HEAD
    for name, value in (RIGHT | {"model": "raise OSError('no such thing')"}).items():
        text = text.replace(f"{{{name}}}", value)
    (run.folder / "odd.py").write_text(text)
    done = run("launcher", "check", "odd.py")
    assert done.exit_code == 1
    assert done.stderr.count("OSError: no such thing") == 1


@pytest.mark.parametrize("source", ["digits", "fashion_mnist", "gpt", "resnet", "tabular"])
def test_a_copy_plans_at_once(run: Commands, source: str) -> None:
    """Under its own name, in a folder of one's own."""
    done = run("launcher", "new", "work/mine", "--from", source)
    assert done.exit_code == 0, done.stderr
    assert "launcher run work/mine.py" in done.stdout
    text = (run.folder / "work/mine.py").read_text()
    assert "def mine(" in text
    assert 'name="mine"' in text
    if source == "digits":
        trained = run("launcher", "run", "work/mine.py", "-n", "1", "steps=2", "--out", "out")
        assert trained.exit_code == 0, trained.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my-recipe", "'my-recipe'"),
        ("class", "'class'"),
        ("there", "there.py"),
        ("there.py/mine", "Cannot write"),
    ],
)
def test_a_name_that_will_not_do_is_refused(run: Commands, name: str, words: str) -> None:
    """And what is there stays as it is."""
    (run.folder / "there.py").write_text("kept")
    done = run("launcher", "new", name)
    assert done.exit_code == 2
    assert words in done.stderr
    assert (run.folder / "there.py").read_text() == "kept"


def test_only_the_name_is_renamed() -> None:
    """Not what contains it, what stands behind a dot, or words in text."""
    text = 'def old(x):\n    """An old one."""\n    return m.old(x, old, "old", "an old", older)\n'
    assert renamed(text, "old", "new") == (
        'def new(x):\n    """An old one."""\n    return m.old(x, new, "new", "an old", older)\n'
    )


CONTENTS = {
    "missing": "torch.tensor([float('nan'), 1.0, 2.0])",
    "arrays": "torch.ones(3).numpy()",
    "objects": "Pair(torch.ones(3), object())",
}


@pytest.mark.parametrize("content", CONTENTS)
def test_what_samples_may_hold(run: Commands, content: str) -> None:
    """NaN, arrays, and objects of the recipe's own are the same when they are read again."""
    text = HEAD.replace("return Data(train={train}, evaluation=train)", "return samples()")
    for name, value in RIGHT.items():
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

    return Data(train=[{CONTENTS[content]} for _ in range(16)], collate=collate)


def forward(model, batch):
    import torch

    return model(torch.ones(len(batch[1]), 3))
"""
    text = text.replace("len(errors)", "len(batch[1])")
    (run.folder / "odd.py").write_text(text)
    done = run("launcher", "check", "odd.py")
    assert done.exit_code == 0, done.stdout + done.stderr
