"""Runs of recipes that are typed into a notebook or at a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support import ROOT, Commands, read_lines

from launcher.runs.run_record import read_run
from launcher.runs.rundir import RunDir

DEFINITIONS = """
import time
import launcher
from launcher import Data, Recipe, constant, sgd

SECONDS = 0.002

class Slow:
    def __init__(self, count):
        self.count = count
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        import torch
        time.sleep(SECONDS)
        return torch.full((8,), float(index))

def model():
    from torch import nn
    return nn.Linear(8, 1)

def slow(*, count: int = 4096) -> Recipe:
    return Recipe(
        name="slow", model=model, data=lambda: Data(train=Slow(count)),
        loss=lambda outputs, batch: (outputs.sum(), len(batch)),
        forward=lambda model, batch: model(batch), optimizer=sgd(momentum=0.0),
        schedule=constant(), batch_size=32, lr=1e-6, lr_rule="none", epochs=1,
        train_samples=count,
    )

def failing() -> Recipe:
    from dataclasses import replace
    def loss(outputs, batch):
        raise ValueError("the loss <of> a cell")
    return replace(slow(), loss=loss)
"""


def execute(run: Commands, notebook: Path, *arguments: str) -> list[list[dict[str, Any]]]:
    """Execute a notebook and return the outputs of each code cell."""
    done = run("python", ROOT / "tests/kernel.py", notebook, "executed.ipynb", *arguments)
    assert done.exit_code == 0, done.stderr
    cells = json.loads((run.folder / "executed.ipynb").read_text())["cells"]
    return [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]


def html_of(output: dict[str, Any]) -> str:
    """Return the HTML that a cell shows."""
    return "".join(output["data"]["text/html"])


def test_the_notebook_of_the_docs_runs(run: Commands) -> None:
    """A recipe of cells trains on two ranks and resumes on one, with a plot of each run."""
    *_, planned, trained, resumed = execute(run, ROOT / "docs/notebook.ipynb")
    assert "60 = 10 epochs x 6 steps" in "".join(planned[0]["text"])
    live, result = map(html_of, trained)
    assert "<svg" in live
    assert "finished after 30 steps" in live
    assert "finished after 30 steps" in result
    live, history = map(html_of, resumed)
    assert "finished after 60 steps" in live
    assert "60 of 60" in history
    assert history.count("<polyline") == 2  # training and evaluation
    (folder,) = (run.folder / "runs").iterdir()
    assert (folder / "run.yaml").read_text().startswith("recipe: ./recipe.py:mine\n")
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl") if "lr" in line] == list(
        range(1, 61)
    )
    assert read_run(RunDir(folder)).recipe == f"{folder}/recipe.py:mine"


def test_an_interrupted_cell_leaves_a_run_to_resume(run: Commands) -> None:
    """An interrupt stops a run with a checkpoint, from which the moved run resumes elsewhere."""
    cells = [
        DEFINITIONS,
        "launcher.run(slow, nproc_per_node=1, out='runs/cell', count=400_000)",  # for 15 minutes
        "launcher.run(failing, nproc_per_node=1, steps=1)",
    ]
    notebook = run.folder / "notebook.ipynb"
    notebook.write_text(json.dumps(notebook_of(cells)))
    _, (live, result), (post_mortem, error) = execute(run, notebook, "--interrupt")
    assert "stopped after step" in html_of(live)
    assert "stopped by SIGINT" in html_of(result)
    assert "launcher.resume(&#x27;runs/cell&#x27;)" in html_of(result)
    assert "ValueError: the loss &lt;of&gt; a cell" in html_of(post_mortem)
    assert "&lt;cell In[1]&gt;" in html_of(post_mortem)
    assert error["traceback"][0].startswith("RunFailedError: ")
    assert len(error["traceback"]) == 1

    (run.folder / "runs/cell").rename(run.folder / "moved")
    stopped_at = max(line["step"] for line in read_lines(run.folder / "moved/metrics.jsonl"))
    assert 2 <= stopped_at < 12_500
    resumed = run("launcher", "resume", "moved", "-n", "1", f"steps={stopped_at + 2}", "-q")
    assert resumed.exit_code == 0, resumed.stderr
    steps = [line["step"] for line in read_lines(run.folder / "moved/metrics.jsonl")]
    assert max(steps) == stopped_at + 2


def notebook_of(cells: list[str]) -> dict[str, Any]:
    """Return a notebook of code cells."""
    return {
        "cells": [
            {
                "cell_type": "code",
                "id": f"cell-{number}",
                "metadata": {},
                "execution_count": None,
                "outputs": [],
                "source": text,
            }
            for number, text in enumerate(cells)
        ],
        "metadata": {},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def test_a_recipe_typed_at_a_prompt_is_trained(run: Commands) -> None:
    """A recipe that is typed at the prompt of Python trains on two forked ranks."""
    lines = "SECONDS = 0", "result = launcher.run(slow, nproc_per_node=2, out='out', count=64)"
    program = [DEFINITIONS, *lines, "print(result.step, result.finished)\n"]
    (run.folder / "typed.txt").write_text("\n".join(program))
    done = run("sh", "-c", "exec python -i < typed.txt")
    assert done.exit_code == 0, done.stderr
    assert "2 True" in done.stdout, done.stderr
