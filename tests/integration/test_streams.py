"""Tests of streams: the same samples on any number of ranks, resuming, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from support import Commands, read_lines
from torch import Tensor
from torch.utils.data import IterableDataset

from launcher import Data, RecipeError, SampleError, Stream
from launcher.engine.data.prefetching import raise_if_error
from launcher.engine.data.reader import Reader
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.data.streams import as_stream
from launcher.runs.job import ResumeFrom

RECIPE = '''
import random

from launcher import Data, Recipe, Stream, main, sgd


def streamed(*, kind: str = "good", workers: int = 0, held_out: bool = False) -> Recipe:
    """A line through the samples of a stream."""
    return Recipe(
        name="streamed", model=build_model, data=lambda: build_data(kind, held_out), loss=squared,
        forward=lambda model, batch: model(batch),
        batch_size=6, lr=0.01, lr_rule="none", steps=8, optimizer=sgd(), num_workers=workers,
        record_samples=True, checkpoint_every=1, keep_checkpoints=9, device="cpu",
    )


def build_model():
    from torch import nn

    return nn.Linear(4, 1)


def build_data(kind, held_out):
    few = Stream(lambda: numbers("good", 5), transform=to_tensor)
    train = Stream(lambda: numbers(kind), transform=to_tensor)
    return Data(train=train, evaluation=few if held_out else None)


def numbers(kind, stop=10_000):
    import os

    own = random.Random() if kind == "unseeded" else None
    for index in range({"short": 20}.get(kind, stop)):
        value = index + random.random()
        if kind == "late" and index >= 16 and os.environ["RANK"] == "1":
            value = -1.0
        if kind == "uneven" and index >= 16 and os.environ["RANK"] == "1":
            return
        yield value if own is None else own.random()


def to_tensor(value):
    import torch

    return torch.full((4,), value / 100) + torch.rand(4)


def squared(outputs, batch):
    return outputs.square().sum(), len(batch)


if __name__ == "__main__":
    main()
'''


class Counted(IterableDataset[Tensor]):
    """Numbers from 0 on, with a state; it remembers how many have been read."""

    def __init__(self, stop: int = 1_000, *, stateful: bool = True) -> None:
        self.stop, self.position, self.first, self.num_read = stop, 0, 0, 0
        if stateful:
            self.state_dict = lambda: {"position": self.position}
            self.load_state_dict = self._load

    def _load(self, state: dict[str, int]) -> None:
        self.first = state["position"]

    def __iter__(self) -> Iterator[Tensor]:
        self.position, self.first = self.first, 0
        while self.position < self.stop:
            self.position += 1
            self.num_read += 1
            yield torch.tensor([self.position - 1.0] * 4)


def recipe(train: Any, **changes: Any) -> Any:
    """Return a recipe of 6 steps of 8 samples that keeps the sums of the inputs it saw."""
    fields: dict[str, Any] = {"epochs": None, "steps": 6, "train_samples": None, "batch_size": 8}
    fields |= {
        "data": lambda: Data(train=train),
        "loss": lambda outputs, batch: (outputs.square().sum(), len(batch)),
    }
    fields |= {"forward": lambda model, batch: model(batch), "keep_checkpoints": 9}
    return small_runs.recipe(**fields | {"checkpoint_every": 1} | changes)


def losses(run_dir: Any) -> list[float]:
    """Return the losses of a run by step."""
    return [row["loss"] for row in read_lines(run_dir.metrics) if "loss" in row]


def test_steps_have_the_same_samples_on_any_number_of_ranks(tmp_path: Path, run: Commands) -> None:
    """Runs on 1, 2 and 3 ranks, with and without a worker, take the same steps from a stream."""
    file = tmp_path / "streamed.py"
    file.write_text(RECIPE)
    curves = []
    for ranks, workers in ((1, 0), (2, 4), (3, 1)):
        run_dir = tmp_path / f"run{ranks}"
        finished = run(
            *("launcher", "run", file, f"workers={workers}", "held_out=true", "-n", str(ranks)),
            *("--out", run_dir),
        )
        assert finished.exit_code == 0, finished.stderr
        rows = read_lines(run_dir / "metrics.jsonl")
        curves.append([row["loss"] for row in rows if "loss" in row])
        ids = [
            [index for batch in row["micro_batches"] for index in batch]
            for rank in range(ranks)
            for row in read_lines(run_dir / f"samples/rank{rank}.jsonl")
        ]
        assert sorted(index for batch in ids for index in batch) == list(range(48))
    assert curves[1] == pytest.approx(curves[0])
    assert curves[2] == pytest.approx(curves[0])
    assert len(curves[0]) == 8


@pytest.mark.parametrize(
    ("kind", "code", "fragment"),
    [
        ("unseeded", 2, "Ranks have different data: training sample 0"),
        ("late", 1, "Ranks read different streams: sample 16 of epoch 1 is"),
        ("uneven", 1, "ended after 16 samples"),
        ("short", 1, "ended after 20 samples"),
    ],
)
def test_other_streams_are_refused(
    tmp_path: Path, run: Commands, kind: str, code: int, fragment: str
) -> None:
    """Two ranks refuse a stream that differs between them, and one that ends too early."""
    file = tmp_path / "streamed.py"
    file.write_text(RECIPE)
    finished = run("launcher", "run", file, f"kind={kind}", "-n", "2")
    assert finished.exit_code == code
    assert fragment in finished.stderr


@pytest.mark.parametrize(("stateful", "num_read"), [(True, 24), (False, 48)])
def test_a_run_resumes_at_the_sample(tmp_path: Path, stateful: bool, num_read: int) -> None:
    """A run that resumes takes the samples that follow, by the stream's state or by reading on."""
    whole = small_runs.train(tmp_path / "whole", recipe(Counted(stateful=stateful)))
    small_runs.train(tmp_path / "cut", recipe(Counted(stateful=stateful)), stop_at=3)
    stream = Counted(stateful=stateful)
    again = small_runs.train(tmp_path / "cut", recipe(stream), ResumeFrom())
    assert losses(again) == losses(whole)
    assert len(losses(whole)) == 6
    assert stream.num_read == num_read


def test_epochs_of_a_stream_take_train_samples(tmp_path: Path) -> None:
    """With train_samples, a stream starts again in each epoch, and the last batch is shorter."""
    stream = Counted(20, stateful=False)
    run_dir = small_runs.train(
        tmp_path / "run", recipe(stream, epochs=2, steps=None, train_samples=20)
    )
    rows = read_lines(run_dir.metrics)
    assert [row["items"] for row in rows if "loss" in row] == [8, 8, 4, 8, 8, 4]
    assert stream.num_read == 40


def test_a_changed_stream_is_refused_on_resume(tmp_path: Path) -> None:
    """A stream that yields other samples than before the checkpoint is refused, unless accepted."""

    def numbers(add: float) -> Any:
        return Stream(lambda: (torch.full((4,), add + index) for index in range(99)))

    small_runs.train(tmp_path / "run", recipe(numbers(0.0)), stop_at=3)
    with pytest.raises(SampleError, match="sample 16 of epoch 1"):
        small_runs.train(tmp_path / "run", recipe(numbers(1.0)), ResumeFrom())
    accepted = small_runs.train(
        tmp_path / "run", recipe(numbers(1.0)), ResumeFrom(accept=("data",))
    )
    assert len(losses(accepted)) == 6


def test_what_a_stream_draws_depends_on_the_position() -> None:
    """Samples of a stream that draws random numbers do not depend on which ones are kept."""

    def drawn() -> Iterator[float]:
        while True:
            yield float(torch.rand(()))

    def read(*requests: list[int]) -> dict[int, float]:
        reader = Reader(recipe(drawn), Data(train=as_stream(drawn)))
        numbers: dict[int, float] = {}
        for indices in requests:
            request = MicroBatchRequest("train", 0, indices, has_weight=True)
            batch = raise_if_error(reader[request]).batch
            numbers |= dict(zip(indices, batch.tolist(), strict=True))
        return numbers

    everything, some = read(list(range(9))), read([1, 2], [5], [8])
    assert len(set(everything.values())) == 9
    assert some == {index: everything[index] for index in (1, 2, 5, 8)}


def test_a_state_is_saved_where_the_stream_stands(tmp_path: Path) -> None:
    """The manifest holds the state after exactly the samples of the checkpoint's steps."""
    run_dir = small_runs.train(tmp_path / "run", recipe(Counted()), stop_at=4)
    (folder, *_) = sorted(run_dir.checkpoints.iterdir(), reverse=True)
    saved = json.loads((folder / "checkpoint.json").read_text())["values"]["stream"]
    assert (saved["epoch"], saved["position"], saved["state"]) == (0, 32, '{"position": 32}')


def test_an_iterator_is_refused() -> None:
    """An iterator, which can be read once, is refused with the name of Stream."""
    with pytest.raises(RecipeError, match=r"launcher\.Stream"):
        as_stream(iter([1]))
    with pytest.raises(RecipeError, match="function"):
        Stream([1])  # type: ignore[arg-type]
    assert as_stream([1]) is None
    assert as_stream(torch.utils.data.TensorDataset(torch.zeros(3))) is None
