"""Orders and mixtures in real runs: the same samples in each step on 1 and 2 ranks."""

from __future__ import annotations

import pytest
from support import Commands, read_lines

RECIPE = '''
from launcher import Data, Mixture, Recipe, Source, sgd


def ordered(*, mixed: bool = False) -> Recipe:
    """A line through 300 numbers, or through a mixture of them."""
    return Recipe(
        name="ordered", model=build_model, data=lambda: build_data(mixed), loss=squared,
        batch_size=24, lr=0.01, lr_rule="none", epochs=2, optimizer=sgd(), in_memory=True,
        train_samples=300, device="cpu", shuffle_window=48, record_samples=True,
    )


def build_model():
    from torch import nn

    return nn.Linear(1, 1)


def build_data(mixed):
    import torch
    from torch.utils.data import TensorDataset

    numbers = torch.arange(300.0)[:, None] / 300
    lengths = [1 + index * 7 % 50 for index in range(300)]
    if not mixed:
        return Data(train=TensorDataset(numbers), lengths=lengths)
    sources = [
        Source(TensorDataset(numbers[:200]), weight=[(0, 3), (1, 1)]),
        Source(TensorDataset(numbers[200:]), weight=1),
    ]
    return Data(train=Mixture(sources))


def squared(outputs, batch):
    return outputs.square().sum(), len(batch[0])
'''


@pytest.mark.parametrize(
    "settings", [["shuffle=window"], ["shuffle=length"], ["mixed=true", "shuffle=window"]]
)
def test_ranks_take_the_same_samples(run: Commands, settings: list[str]) -> None:
    """On 2 ranks each step has the samples and the loss of a run on 1 rank."""
    (run.folder / "recipe.py").write_text(RECIPE)
    losses, samples = {}, {}
    for ranks in (1, 2):
        out = f"r{ranks}"
        done = run(
            "launcher", "run", "recipe.py:ordered", "-n", str(ranks), "--out", out, *settings
        )
        assert done.exit_code == 0, done.stderr
        rows = read_lines(run.folder / out / "metrics.jsonl")
        losses[ranks] = [row["loss"] for row in rows if "loss" in row]
        files = [run.folder / out / f"samples/rank{rank}.jsonl" for rank in range(ranks)]
        steps = zip(*(read_lines(file) for file in files), strict=True)
        samples[ranks] = [
            [index for row in step for batch in row["micro_batches"] for index in batch]
            for step in steps
        ]
    assert samples[1] == samples[2]
    assert len(samples[1]) == 26
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
