"""Callbacks of a recipe, in this process: hooks, state, resuming, and what is refused."""

from __future__ import annotations

import math
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import recipe, train
from torch import nn

from launcher import CallbackContext, RecipeError, TrainingError, make_plan
from launcher.environment.machine import read_machine
from launcher.printable import notes_of
from launcher.recipe.callback_checks import HOOKS
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.job import ResumeFrom
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest


class Book:
    """Writes down the hooks that are called, and keeps the list in its state."""

    def __init__(self) -> None:
        self.lines: list[list[Any]] = []
        self.contexts: list[CallbackContext] = []

    def _write(self, hook: str, context: CallbackContext) -> None:
        self.lines.append([hook, context.step, context.epoch])
        self.contexts.append(context)

    def state_dict(self) -> dict[str, Any]:
        return {"lines": self.lines, "nan": math.nan}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert math.isnan(state["nan"])
        self.lines = state["lines"]

    def on_run_start(self, context: CallbackContext) -> None:
        self._write("on_run_start", context)

    def before_step(self, context: CallbackContext) -> None:
        self._write("before_step", context)

    def after_step(self, context: CallbackContext) -> None:
        self._write("after_step", context)

    def on_evaluation(self, context: CallbackContext) -> None:
        self._write("on_evaluation", context)

    def on_checkpoint(self, context: CallbackContext) -> None:
        assert context.checkpoint is not None
        assert (context.checkpoint / "checkpoint.json").is_file()
        self._write("on_checkpoint", context)

    def on_run_end(self, context: CallbackContext) -> None:
        self._write("on_run_end", context)


def steps_of(book: Book, hook: str) -> list[tuple[int, int]]:
    """Return the (step, epoch) of each call of a hook."""
    return [(step, epoch) for name, step, epoch in book.lines if name == hook]


def test_hooks_are_called_in_order(tmp_path: Path) -> None:
    """Each hook is called where its name says, with the step, the epoch and what was measured."""
    book = Book()
    trained = recipe(book)
    run_dir = train(tmp_path / "run", trained)
    assert [line[0] for line in book.lines[:3]] == ["on_run_start", "before_step", "after_step"]
    assert book.lines[-1] == ["on_run_end", 6, 2]
    assert steps_of(book, "before_step") == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]
    assert steps_of(book, "after_step") == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert steps_of(book, "on_evaluation") == [(3, 1), (6, 2)]
    assert len(steps_of(book, "on_checkpoint")) >= 2
    last = book.contexts[-1]
    assert (last.rank, last.world_size, last.finished) == (0, 1, True)
    assert last.plan == make_plan(trained, read_machine(), nproc_per_node=1)
    assert last.run_dir == run_dir.path
    assert last.rows[-1].step == 6
    assert last.evaluation.keys() == {"loss"}
    assert isinstance(last.model, nn.Linear)
    assert not book.contexts[0].finished
    assert not book.contexts[0].evaluation


def test_steps_are_the_same_with_callbacks(tmp_path: Path) -> None:
    """Callbacks, also those that draw random numbers, change no bit of the weights."""

    class Drawing(Book):
        def _write(self, hook: str, context: CallbackContext) -> None:
            torch.rand(3)

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    run_dirs = [
        train(tmp_path / name, recipe(*callbacks, model=model))
        for name, callbacks in (("without", ()), ("with", (Drawing(),)))
    ]
    one, other = (run_dir.model.read_bytes() for run_dir in run_dirs)
    assert one == other


def test_evaluations_draw_the_same_numbers_after_any_step(tmp_path: Path) -> None:
    """Random numbers of forward and loss in an evaluation depend neither on the step nor before."""

    class Drawing(Book):
        def before_step(self, context: CallbackContext) -> None:
            random.seed(), np.random.seed(), torch.seed()

    book = Drawing()

    def loss(outputs: torch.Tensor, batch: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        return outputs.sum() * 0 + noise, len(batch[0])

    train(tmp_path / "run", recipe(book, loss=loss, evaluate_every=1))
    evaluated = {
        context.evaluation["loss"]
        for (hook, *_), context in zip(book.lines, book.contexts, strict=True)
        if hook == "on_evaluation"
    }
    assert steps_of(book, "on_evaluation")[-1] == (6, 2)
    assert len(evaluated) == 1


def test_a_weight_that_the_optimizer_lacks_is_not_unfrozen(tmp_path: Path) -> None:
    """A callback that unfreezes what the model function froze ends the run with its name."""

    class Unfreezing:
        def before_step(self, context: CallbackContext) -> None:
            if context.step == 2:
                context.model.requires_grad_(True)

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3).requires_grad_(False), nn.Linear(3, 1))

    with pytest.raises(TrainingError, match=r"Unfreezing .* 0\.weight"):
        train(tmp_path / "run", recipe(Unfreezing(), model=model))


def test_a_callback_resumes_with_its_state(tmp_path: Path) -> None:
    """What a callback has seen before a checkpoint is what it knows in the resumed run."""
    whole, first, second, other = Book(), Book(), Book(), Book()
    train(tmp_path / "whole", recipe(whole))
    train(tmp_path / "parts", recipe(first), stop_at=4)
    train(tmp_path / "parts", recipe(second, other), ResumeFrom())
    for hook in ("before_step", "after_step", "on_evaluation"):
        assert steps_of(second, hook) == steps_of(whole, hook)
    assert len(steps_of(second, "on_run_start")) == 2
    assert steps_of(other, "after_step") == [(5, 2), (6, 2)], "a new one begins anew"


def test_a_run_that_is_stopped_ends_for_its_callbacks(tmp_path: Path) -> None:
    """After a signal, a checkpoint is saved and `on_run_end` is called for an unfinished run."""
    stop, book = StopRequest(), Book()

    class Stopping(Book):
        def before_step(self, context: CallbackContext) -> None:
            stop.number = signal.SIGTERM if context.step == 2 else None

    train(tmp_path / "run", recipe(Stopping(), book, evaluate_every=1), stop=stop)
    assert book.lines[-2:] == [["on_checkpoint", 3, 1], ["on_run_end", 3, 1]]
    assert not book.contexts[-1].finished
    assert list_checkpoints(RunDir(tmp_path / "run"))[0].step == 3
    resumed = Book()
    train(tmp_path / "run", recipe(Stopping(), resumed), ResumeFrom())
    assert steps_of(resumed, "after_step")[-3:] == [(4, 2), (5, 2), (6, 2)]
    assert resumed.contexts[-1].finished


def test_an_evaluation_that_a_callback_refused_is_told_again(tmp_path: Path) -> None:
    """A resumed run tells callbacks of an evaluation that is recorded, and is in no checkpoint."""

    class Refusing(Book):
        def on_evaluation(self, context: CallbackContext) -> None:
            raise ValueError("no more")

    unsaved = {"checkpoint_every": 1000}
    with pytest.raises(ValueError, match="no more") as caught:
        train(tmp_path / "run", recipe(Refusing(), **unsaved))
    [note] = notes_of(caught.value)
    assert "Refusing" in note
    assert "on_evaluation" in note
    assert "step 3" in note
    assert "rank 0" in note
    book = Book()
    train(tmp_path / "run", recipe(book, **unsaved), ResumeFrom())
    assert steps_of(book, "on_evaluation") == [(3, 1), (6, 2)]
    assert book.contexts[1].evaluation["loss"] > 0


def test_a_checkpoint_of_a_run_without_callbacks_resumes(tmp_path: Path) -> None:
    """Callbacks that are added to a run begin with its next step."""
    book = Book()
    train(tmp_path / "run", recipe(), stop_at=4)
    assert list_checkpoints(RunDir(tmp_path / "run"))[0].read_manifest().values["callbacks"] is None
    train(tmp_path / "run", recipe(book), ResumeFrom())
    assert steps_of(book, "after_step") == [(5, 2), (6, 2)]


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (
            {"best": {"weights": torch.zeros(2)}},
            r"a Tensor as state_dict\(\)\['best'\]\['weights'\]",
        ),
        ({"steps": {0: 1.0}}, r"an int as a key of state_dict\(\)\['steps'\]"),
        ([1, 2], "a list"),
        ({"text": "x" * 2_000_000}, "characters"),
    ],
)
def test_a_state_that_cannot_be_saved_is_refused(tmp_path: Path, state: Any, found: str) -> None:
    """After the first step, the callback is named, and what in its state no checkpoint can hold."""

    class Keeping(Book):
        def state_dict(self) -> dict[str, Any]:
            kept: dict[str, Any] = state
            return kept

    with pytest.raises(TrainingError, match=f"callback Keeping .*{found}"):
        train(tmp_path / "run", recipe(Keeping()))


class Trained:
    """A callback of another trainer."""

    def on_step_end(self, context: CallbackContext) -> None:
        """Do nothing."""


class Misspelt:
    """A callback with a wrong letter."""

    def on_evaluaton(self, context: CallbackContext) -> None:
        """Do nothing."""


class WithoutContext:
    """A callback whose hook takes nothing."""

    def after_step(self) -> None:
        """Do nothing."""


class Forgetful:
    """A callback that saves what it cannot load."""

    def after_step(self, context: CallbackContext) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("callbacks", "named"),
    [
        ((Trained(),), "on_step_end write after_step"),
        ((Misspelt(),), "Did you mean on_evaluation"),
        ((WithoutContext(),), "WithoutContext.after_step"),
        ((Forgetful(),), "no load_state_dict"),
        ((Book,), r"Write Book\(\)"),
        ((object(),), "on_run_start, before_step"),
        ((print,), "none of the methods"),
        (Book(), r"callbacks=\(Book\(\),\)"),
        (None, "a tuple of objects"),
    ],
)
def test_an_object_that_is_no_callback_is_refused(callbacks: Any, named: str) -> None:
    """A recipe refuses what no run would call, with the names of hooks that are near."""
    with pytest.raises(RecipeError, match=named):
        replace(recipe(), callbacks=callbacks)


def test_a_list_and_objects_with_functions_are_taken() -> None:
    """Hooks may be attributes, and other methods may begin with an underscore."""

    class Sparse:
        def __init__(self) -> None:
            self.after_step = lambda _: None

        def _on_anything(self) -> None:
            pass

    callbacks: Any = [Sparse(), Book()]
    assert replace(recipe(), callbacks=callbacks).callbacks == tuple(callbacks)
    assert all(callable(getattr(Book(), hook)) for hook in HOOKS)
