"""The checks before the first step: different data, a loss that is a mean, broken metrics."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Commands, read_lines
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from launcher import Data, Recipe, RecipeError, constant, make_plan, read_machine, sgd
from launcher.engine.backends.local import LocalBackend
from launcher.engine.ranks.output import Output
from launcher.engine.run import train_rank
from launcher.runs.rundir import RunDir

RECIPE = """
import os

from launcher import Data, Recipe, constant, main


def odd(*, kind: str = "plain", order: str = "abc") -> Recipe:
    return Recipe(
        name="odd", model=build_model, data=lambda: build_data(kind, order), loss=loss,
        forward=lambda model, batch: model(batch[0]), batch_size=8, lr=0.1, lr_batch_size=8,
        steps=4, schedule=constant(), num_workers=0,
        metrics={"wrong": lambda outputs, batch: outputs.mean()} if kind == "metric" else {},
    )


def build_data(kind, order):
    import numpy as np
    import torch

    rank = int(os.environ.get("RANK", 0))
    generator = np.random.default_rng()
    count = 40 - 8 * rank if kind == "lengths" else 40
    places = generator.permutation(40) if kind == "split" else range(40)
    samples = [(torch.full((4,), i / 40), order.index("abc"[i % 3])) for i in places][:count]

    class Drawn(list):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + float(generator.random()), y

    train = Drawn(samples) if kind == "generator" else samples
    evaluation = samples[:8]
    if kind == "two":
        evaluation = {"dev/1": samples, "b": samples}
    if kind == "held_out" and rank:
        evaluation = samples[1:9]
    if kind == "evaluation_length" and rank:
        evaluation = None
    return Data(train=train, evaluation=evaluation)


def build_model():
    from torch import nn

    return nn.Linear(4, 3)


def loss(outputs, batch):
    from torch.nn.functional import cross_entropy

    return cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1])


if __name__ == "__main__":
    main(odd)
"""


@pytest.fixture
def folder(run: Commands) -> Path:
    """Return the folder of the run, with the recipe in it."""
    (run.folder / "odd.py").write_text(RECIPE)
    return run.folder


def steps_of(folder: Path) -> list[int]:
    """Return the steps in metrics.jsonl of a run folder."""
    path = folder / "metrics.jsonl"
    return [row["step"] for row in read_lines(path) if "loss" in row] if path.exists() else []


@pytest.mark.parametrize(
    ("kind", "fragments"),
    [
        ("split", ("training sample", "on rank 1", "on rank 0")),
        ("held_out", ("evaluation sample", "on rank 1", "on rank 0")),
        ("lengths", ("training samples is 32 on rank 1", "40 on rank 0")),
        ("evaluation_length", ("evaluation samples is 0 on rank 1", "8 on rank 0")),
        ("generator", ("training sample", "read again", "generator of your own")),
    ],
)
def test_different_data_on_a_rank_is_refused(
    run: Commands, folder: Path, kind: str, fragments: tuple[str, ...]
) -> None:
    """Ranks with different data take no step; the error names the difference and the rank."""
    done = run("launcher", "run", "odd.py", "-n", "2", f"kind={kind}", "--out", "out")
    assert done.exit_code == 2, done.stdout + done.stderr
    for fragment in fragments:
        assert fragment in done.stderr
    assert "Traceback" not in done.stderr
    assert steps_of(folder / "out") == []


@pytest.mark.usefixtures("folder")
def test_a_generator_of_the_recipe_is_a_warning_on_one_rank(run: Commands) -> None:
    """On one rank, samples that change are a warning, and the run can be resumed."""
    done = run("launcher", "run", "odd.py", "-n", "1", "kind=generator", "--out", "out")
    assert done.exit_code == 0, done.stderr
    assert "generator of your own" in done.stdout + done.stderr
    done = run("launcher", "resume", "out", "steps=6")
    assert done.exit_code == 0, done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a run from which it is resumed, by path."""
    names = ("run.yaml", "metrics.jsonl", "result.json", "model.safetensors")
    paths = [*(folder / name for name in names), *folder.glob("checkpoints/*/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_different_data_is_not_resumed(run: Commands, folder: Path) -> None:
    """A run resumes with the same data, or with different data that the user accepts."""
    done = run("launcher", "run", "odd.py", "-n", "1", "checkpoint_every=2", "--out", "out")
    assert done.exit_code == 0, done.stderr
    before = contents(folder / "out")
    done = run("launcher", "resume", "out", "--from", "2", "steps=6", "-n", "2", "order=cab")
    assert done.exit_code == 2
    after = contents(folder / "out")
    assert {name: after[name] for name in before} == before, "the run is unchanged"
    for fragment in ("step-00000002", "training sample", "at [1]", "--accept data"):
        assert fragment in done.stderr
    done = run("launcher", "resume", "out", "steps=6", "-n", "2", "order=cab", "--accept", "data")
    assert done.exit_code == 0, done.stderr
    done = run("launcher", "resume", "out", "steps=7", "-n", "1")
    assert done.exit_code == 0, "the next checkpoint holds the accepted data"
    assert steps_of(folder / "out") == [1, 2, 3, 4, 5, 6, 7]


def test_another_length_is_not_resumed(run: Commands, folder: Path) -> None:
    """Data of another length is refused, known to the plan or not, unless the user accepts it."""
    recipe = run.folder / "odd.py"
    done = run("launcher", "run", "odd.py", "-n", "1", "--out", "out")
    assert done.exit_code == 0, done.stderr
    recipe.write_text(RECIPE.replace("else 40\n", "else 39\n"))
    for setting in ("steps=5", "epochs=2"):
        done = run("launcher", "resume", "out", "-n", "1", setting, "--allow-code-change")
        assert done.exit_code == 2
        assert "39" in done.stderr
        assert "--accept data" in done.stderr
    done = run("python", "odd.py", "steps=5", "--resume", "out", "--accept", "data")
    assert done.exit_code == 0, done.stderr
    assert steps_of(folder / "out") == [1, 2, 3, 4, 5]


def test_an_older_checkpoint_is_resumed(run: Commands, folder: Path) -> None:
    """A checkpoint without a fingerprint resumes with any data; a damaged one is refused."""
    done = run("launcher", "run", "odd.py", "-n", "1", "--out", "out")
    assert done.exit_code == 0, done.stderr
    path = folder / "out/checkpoints/step-00000004/checkpoint.json"
    for command in (("launcher", "run", "odd.py", "-n", "1"), ("python", "odd.py")):
        done = run(*command, "--accept", "data")
        assert done.exit_code == 2, "a new run has nothing to accept"
    before = contents(folder / "out")
    done = run(
        *("launcher", "run", "odd.py", "-n", "1", "steps=5", "order=cab"),
        *("--out", "out", "--continue"),
    )
    assert done.exit_code == 2
    assert contents(folder / "out") == before
    manifest = json.loads(path.read_text())
    del manifest["digest"]  # which format 1 does not have
    manifest["format"] = 1
    assert manifest["values"]["data"]["train"]["length"] == 40
    manifest["values"]["data"] = {"train": {"length": 40, "samples": 7}}
    path.write_text(json.dumps(manifest))
    done = run("launcher", "resume", "out", "steps=5")
    assert done.exit_code == 2
    assert "damaged" in done.stderr
    del manifest["values"]["data"]
    path.write_text(json.dumps(manifest))
    done = run(
        *("launcher", "run", "odd.py", "-n", "1", "steps=5", "order=cab"),
        *("--out", "out", "--continue"),
    )
    assert done.exit_code == 0, done.stderr
    assert steps_of(folder / "out") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("kind", "fragment"), [("metric", "The metric wrong"), ("two", "'dev/1'")])
def test_a_mistake_in_evaluation_is_found_before_the_first_step(
    run: Commands, folder: Path, kind: str, fragment: str
) -> None:
    """A metric without (sum, count), or a wrong name of a set, is found before the first step."""
    done = run("launcher", "run", "odd.py", "-n", "1", f"kind={kind}", "--out", "out")
    assert done.exit_code == 2
    assert fragment in done.stderr
    assert steps_of(folder / "out") == []


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_a_mean_is_refused_on_shards(run: Commands, strategy: str) -> None:
    """A loss that returns a mean is found with a sharded model as well."""
    (run.folder / "odd.py").write_text(RECIPE.replace(', reduction="sum"', ""))
    done = run("launcher", "run", "odd.py", "-n", "2", f"strategy={strategy}", "--out", "out")
    assert done.exit_code == 2, done.stdout + done.stderr
    assert "a mean instead of a sum" in done.stderr
    assert steps_of(run.folder / "out") == []


INPUTS = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
TARGETS = torch.arange(40) % 3


class Noisy(nn.Module):
    """A model that draws random numbers in forward, as a VAE does, and counts its calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Dropout(0.2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        outputs: Tensor = self.inner(x)
        return outputs + torch.randn_like(outputs)


def summed(outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
    """Return the sum of the cross-entropies."""
    return functional.cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1])


def averaged(outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
    """Return the mean of the cross-entropies with their count, by mistake."""
    return functional.cross_entropy(outputs, batch[1]), len(batch[1])


def contrastive(outputs: Tensor, _: Any) -> tuple[Tensor, int]:
    """Return a loss in which every sample depends on all others."""
    return functional.cross_entropy(
        outputs @ outputs.T, torch.arange(len(outputs)), reduction="sum"
    ), len(outputs)


def pairwise(outputs: Tensor, _: Any) -> tuple[Tensor, int]:
    """Return the sum of the distances of all pairs."""
    return torch.cdist(outputs, outputs).sum(), len(outputs)


def in_training_only(outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
    """Raise without a gradient, as the losses of some detectors do in evaluation."""
    assert outputs.requires_grad
    return summed(outputs, batch)


def train(
    tmp_path: Path, loss: Callable[..., Any], *, trial: bool = True, **changes: Any
) -> list[float]:
    """Train in this process; return the losses of the steps."""
    fields: dict[str, Any] = {
        "name": "small",
        "model": lambda: nn.Linear(4, 3),
        "data": lambda: Data(train=TensorDataset(INPUTS, TARGETS)),
        "loss": loss,
        "batch_size": 16,
        "lr": 0.1,
        "lr_batch_size": 16,
        "steps": 6,
        "schedule": constant(),
        "optimizer": sgd(),
        "in_memory": True,
        "device": "cpu",
    }
    recipe = Recipe(**fields | changes)
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    plan = make_plan(recipe, read_machine(), nproc_per_node=1)
    output = Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO())
    backend = LocalBackend(recipe, plan)
    train_rank(recipe, plan, backend, RunDir(folder), output, trial=trial)
    return [row["loss"] for row in read_lines(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_a_mean_with_its_count_is_refused(tmp_path: Path, precision: str) -> None:
    """A mean with the count of its items is refused in every precision."""
    with pytest.raises(RecipeError, match="a mean instead of a sum"):
        train(tmp_path, averaged, precision=precision)


def test_a_weighted_mean_is_refused(tmp_path: Path) -> None:
    """A mean over items of which the halves of a batch hold different numbers is refused."""

    def weights(batch: Any) -> Tensor:
        values: Tensor = batch[1] * 5 + 1
        return values

    def loss(outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        losses = functional.cross_entropy(outputs, batch[1], reduction="none") * weights(batch)
        return losses.sum() / weights(batch).sum(), weights(batch).sum()

    def count(batch: Any) -> int:
        return int(weights(batch).sum())

    with pytest.raises(RecipeError, match="a mean instead of a sum"):
        train(tmp_path, loss, count=count)


@pytest.mark.parametrize("loss", [summed, contrastive, pairwise, in_training_only])
@pytest.mark.parametrize("model", [lambda: nn.Linear(4, 3), Noisy])
def test_other_losses_are_trained(
    tmp_path: Path, loss: Callable[..., Any], model: Callable[[], nn.Module]
) -> None:
    """A loss that couples samples, draws random numbers or fails in evaluation is accepted."""
    for seed in range(4):
        assert len(train(tmp_path, loss, model=model, seed=seed, steps=1)) == 1


def test_the_trial_leaves_no_trace(tmp_path: Path) -> None:
    """Losses with and without the trial are equal to the bit for a model with random state."""
    losses = train(tmp_path, summed, model=Noisy)
    assert losses == train(tmp_path, summed, model=Noisy, trial=False)
    assert len(losses) == 6


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_few_samples_are_enough(tmp_path: Path, samples: int) -> None:
    """A data set that is smaller than the trial can be trained."""
    data = Data(
        train=TensorDataset(INPUTS[:samples], TARGETS[:samples]), evaluation=[(INPUTS[0], 1)]
    )
    losses = train(tmp_path, summed, data=lambda: data, batch_size=1, lr_batch_size=1)
    assert len(losses) == 6


def test_one_sample_at_a_time_may_have_any_shape(run: Commands) -> None:
    """The trial takes no larger micro-batches than the run, whose samples may not stack."""
    (run.folder / "ragged.py").write_text(
        "from launcher import Data, Recipe, constant\n"
        "def ragged() -> Recipe:\n"
        "    import torch\n"
        "    from torch import nn\n"
        "    return Recipe(\n"
        '        name="ragged", model=lambda: nn.Linear(1, 3), batch_size=4, micro_batch_size=1,\n'
        "        data=lambda: Data(\n"
        "            train=[(torch.randn(1 + i % 5, 1), i % 3) for i in range(16)]\n"
        "        ),\n"
        "        forward=lambda model, batch: model(batch[0]).mean(1),\n"
        "        loss=lambda out, batch: (\n"
        '            nn.functional.cross_entropy(out, batch[1], reduction="sum"), len(batch[1])\n'
        "        ),\n"
        "        lr=0.1, lr_batch_size=4, steps=2, schedule=constant(), in_memory=True,\n"
        "    )\n"
    )
    done = run("launcher", "run", "ragged.py", "-n", "2", "-q")
    assert done.exit_code == 0, done.stderr
