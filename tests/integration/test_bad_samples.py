"""Tests of bad_samples: samples that cannot be read are left out, counted and listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from support import Commands, read_lines
from torch import Tensor
from torch.utils.data import Dataset

from launcher import Data, RecipeError, SampleError, Stream, TrainingError
from launcher.runs.job import ResumeFrom

RECIPE = '''
from launcher import Data, Recipe, constant, main, sgd


class Numbers:
    def __len__(self):
        return 20

    def __getitem__(self, index):
        import torch

        if index in (3, 4, 11, 17):
            raise ValueError(f"broken {index}")
        return torch.full((4,), index / 10) + torch.rand(4)


def numbers(*, workers: int = 0) -> Recipe:
    """A line through samples of which some are broken."""
    return Recipe(
        name="numbers", model=build_model, data=lambda: Data(train=Numbers()), loss=squared,
        forward=lambda model, batch: model(batch), batch_size=6, lr=0.01, lr_rule="none", epochs=2,
        optimizer=sgd(), num_workers=workers, checkpoint_every=1, keep_checkpoints=9, device="cpu",
        bad_samples="skip", max_bad_samples=8, micro_batch_size=1, schedule=constant(),
    )


def build_model():
    from torch import nn

    return nn.Linear(4, 1)


def squared(outputs, batch):
    return outputs.square().sum(), len(batch)


if __name__ == "__main__":
    main()
'''


class Broken(Dataset[Tensor]):
    """Numbers of which some raise an exception, always or in the first read alone."""

    def __init__(self, bad: tuple[int, ...], *, once: bool = False) -> None:
        self.bad, self.once, self.raised = bad, once, set[int]()

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        if index in self.bad and not (self.once and index in self.raised):
            self.raised.add(index)
            raise OSError(5, "unreadable", f"/data/{index}.bin")
        return torch.full((4,), float(index))


def recipe(train: Any, **changes: Any) -> Any:
    """Return a recipe of 6 steps of 8 samples that leaves bad samples out."""
    fields: dict[str, Any] = {"epochs": None, "steps": 6, "train_samples": None, "batch_size": 8}
    fields |= {"data": lambda: Data(train=train), "checkpoint_every": 1, "keep_checkpoints": 9}
    fields |= {"loss": lambda outputs, batch: (outputs.square().sum(), len(batch))}
    fields |= {"forward": lambda model, batch: model(batch), "bad_samples": "skip"}
    return small_runs.recipe(**fields | {"max_bad_samples": 6} | changes)


def items(run_dir: Any) -> list[int]:
    """Return the number of items of each step."""
    return [row["items"] for row in read_lines(run_dir.metrics) if "loss" in row]


def test_the_same_samples_are_left_out_on_any_number_of_ranks(
    tmp_path: Path, run: Commands
) -> None:
    """Runs on 1 and 3 ranks, and a resumed one, leave out and list the same samples."""
    file = tmp_path / "numbers.py"
    file.write_text(RECIPE)
    curves, listed = [], []
    for name, ranks, settings in (("one", 1, ()), ("three", 3, ("workers=2",)), ("cut", 2, ())):
        steps = ("steps=3",) if name == "cut" else ()
        done = run(
            *("launcher", "run", file, *settings, *steps, "-n", str(ranks)),
            *("--out", tmp_path / name),
        )
        assert done.exit_code == 0, done.stderr
        if name == "cut":
            done = run("launcher", "resume", tmp_path / name, "-n", "1", "steps=8")
            assert done.exit_code == 0, done.stderr
        curves.append(
            [row["loss"] for row in read_lines(tmp_path / name / "metrics.jsonl") if "loss" in row]
        )
        listed.append(read_lines(tmp_path / name / "bad_samples.jsonl"))
    assert len(curves[0]) == 8
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)
    assert listed[0] == listed[1] == listed[2]
    assert sorted(line["sample"] for line in listed[0]) == sorted([3, 4, 11, 17] * 2)
    assert {line["reason"] for line in listed[0] if line["sample"] == 3} == {"ValueError: broken 3"}


def test_the_loss_divides_by_what_was_there(tmp_path: Path) -> None:
    """Steps count the samples that were read, and the list names the files of the others."""
    run_dir = small_runs.train(tmp_path / "run", recipe(Broken((5, 6, 20))))
    assert sum(items(run_dir)) == 48 - 6
    lines = read_lines(run_dir.bad_samples)
    assert sorted((line["epoch"], line["sample"]) for line in lines) == [
        *((1, 5), (1, 6), (1, 20), (2, 5), (2, 6), (2, 20))
    ]
    assert {line["file"] for line in lines} == {f"/data/{n}.bin" for n in (5, 6, 20)}
    left_out = dict.fromkeys(range(1, 7), 0)
    for line in lines:
        left_out[line["step"]] += 1
    assert items(run_dir) == [8 - left_out[step] for step in range(1, 7)]
    counts = [row["bad_samples"] for row in read_lines(run_dir.metrics) if "bad_samples" in row]
    assert counts[-1] == 6


def test_a_limit_ends_the_run(tmp_path: Path) -> None:
    """More bad samples than max_bad_samples end the run, also as a share and after a resume."""
    with pytest.raises(TrainingError, match=r"max_bad_samples=0\.1"):
        small_runs.train(tmp_path / "share", recipe(Broken((1, 2, 3)), max_bad_samples=0.1))
    broken = recipe(Broken((5, 6, 20)), max_bad_samples=5)
    small_runs.train(tmp_path / "cut", broken, stop_at=4)
    with pytest.raises(TrainingError, match="max_bad_samples=5"):
        small_runs.train(tmp_path / "cut", broken, ResumeFrom())
    with pytest.raises(RecipeError, match="max_bad_samples"):
        recipe(None, max_bad_samples=-1)


def test_a_bad_sample_stops_the_run_by_default(tmp_path: Path) -> None:
    """With bad_samples=stop, an exception of the data set ends the run and names the sample."""
    with pytest.raises(SampleError, match="sample 5"):
        small_runs.train(tmp_path / "run", recipe(Broken((5,)), bad_samples="stop"))


def test_a_sample_that_fails_once_is_read_again(tmp_path: Path) -> None:
    """A sample whose second read succeeds is not left out."""
    run_dir = small_runs.train(tmp_path / "run", recipe(Broken((5, 6), once=True)))
    assert items(run_dir) == [8] * 6
    assert not run_dir.bad_samples.exists()


def test_a_bad_sample_of_an_evaluation_is_listed_once(tmp_path: Path) -> None:
    """Evaluations leave out bad samples, which are listed once however often they are read."""
    data = Data(train=Broken(()), evaluation=Broken((2, 9)))
    run_dir = small_runs.train(tmp_path / "run", recipe(None, data=lambda: data, evaluate_every=2))
    lines = read_lines(run_dir.bad_samples)
    assert [(line["split"], line["sample"]) for line in lines] == [
        *(("evaluation", 2), ("evaluation", 9))
    ]
    (*_, last) = (row["evaluation"] for row in read_lines(run_dir.metrics) if "evaluation" in row)
    assert last["loss"] > 0


def test_a_batch_without_a_readable_sample_has_no_weight(tmp_path: Path) -> None:
    """A step whose samples are all bad changes nothing, and data that is all bad ends the run."""
    bad = set(range(8))
    stream = Stream(lambda: iter(range(60)), transform=lambda n: 1 / 0 if n in bad else number(n))
    settings = {"max_bad_samples": 8, "lr": 0.1}
    run_dir = small_runs.train(tmp_path / "run", recipe(stream, **settings))
    assert items(run_dir) == [1, 8, 8, 8, 8, 8]
    assert len(read_lines(run_dir.bad_samples)) == 8
    with pytest.raises(SampleError, match="No sample of the train data"):
        small_runs.train(tmp_path / "none", recipe(Broken(tuple(range(24)))))


def number(value: int) -> Tensor:
    """Return a sample."""
    return torch.full((4,), float(value))
